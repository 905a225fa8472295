package e2e

import (
	"maps"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMetricsAreWhatHappened(t *testing.T) {
	s, proxy := startBehindProxy(t)
	path := s.createUser(t)
	before := s.metrics(t)
	byRoute, queries, errors := before.ByRoute, before.Queries, before.Errors
	expect := func(pattern, status string, sent, failed int64) {
		if byRoute[pattern] == nil {
			byRoute[pattern] = map[string]int64{}
		}
		byRoute[pattern][status]++
		queries, errors = queries+sent, errors+failed
	}
	for _, tt := range []struct {
		request, body, header string
		status                int
		pattern               string
		queries               int64
	}{
		{"GET " + path, "", "", 200, "GET /users/{id}", 1},
		{"GET " + path, "", "Cache-Control: no-cache", 200, "GET /users/{id}", 1},
		{"GET " + missingUser, "", "", 404, "GET /users/{id}", 1},
		{"POST /users", "{}", "", 422, "POST /users", 0},
		{"POST /users", ada, "", 201, "POST /users", 1},
		{"POST /users", ada, "Idempotency-Key: 1", 201, "POST /users", 2},
		{"POST /users/batch", batchOf(22, ada), "", 201, "POST /users/batch", 1},
		{"GET /users/stream", "", "", 200, "GET /users/stream", 1}, // of 25 users
		{"HEAD /users/stream", "", "", 200, "GET /users/stream", 0},
		{"GET /users/stream/pages", "", "", 200, "GET /users/stream/pages", 1},
		{"GET /slow_query", "", "X-Request-Timeout: 0.1", 504, "GET /slow_query", 0},
		{"PUT " + path, ada, "", 200, "PUT /users/{id}", 2},
		{"DELETE " + path, "", "", 204, "DELETE /users/{id}", 1},
		{"GET /nowhere", "", "", 404, "none", 0},
	} {
		want(t, s.do(tt.request, tt.body, tt.header), tt.status)
		expect(tt.pattern, strconv.Itoa(tt.status), tt.queries, 0)
	}
	conn := s.dial(t, rawGet("/slow_query"), 0)
	s.awaitInFlight(t, 1)
	conn.Close()
	expect("GET /slow_query", "499", 0, 0)
	proxy.silent.Store(true)
	want(t, s.do("GET "+missingUser, "", "X-Request-Timeout: 0.2"), 504)
	expect("GET /users/{id}", "504", 1, 1)
	s.awaitInFlight(t, 0)
	after := s.metrics(t)
	delete(after.ByRoute, "GET /metrics")
	delete(byRoute, "GET /metrics")
	if !maps.EqualFunc(after.ByRoute, byRoute, maps.Equal) || after.Queries != queries || after.Errors != errors || after.Rows != before.Rows+25 {
		t.Errorf("metrics = %+v, want %d queries, %d errors, %d rows, %v", after, queries, errors, before.Rows+25, byRoute)
	}
}

func TestMetricsOfASilentCassandra(t *testing.T) {
	t.Parallel()
	s, proxy := startBehindProxy(t, useCrowd(t))
	if m := s.metrics(t); !m.Cassandra.Connected || m.Cassandra.Hosts != 1 || m.Cassandra.Session != 1 || m.Connections.Open < 2 ||
		m.Connections.Opened < m.Connections.Open || m.Goroutines < 5 || m.Memory < 1<<20 || m.Memory > 1<<30 {
		t.Errorf("metrics = %+v", m)
	}
	proxy.silent.Store(true)
	await(t, 15*time.Second, "disconnected", func() bool { return !s.metrics(t).Cassandra.Connected })
	active := s.slowQuery(t)
	s.Process.Signal(syscall.SIGTERM)
	await(t, 5*time.Second, "draining", func() bool { return s.do("GET /nothing", "").status == 503 })
	for _, accept := range []string{"application/json", "text/plain"} {
		if r := s.do("GET /metrics", "", "Accept: "+accept); !want(t, r, 200) || r.took > time.Second {
			t.Errorf("%s; want it immediately", r)
		}
	}
	<-active
}

func TestPrometheusAgreesWithJSON(t *testing.T) {
	s := startHealthy(t, useCrowd(t))
	for range 3 {
		want(t, s.do("GET "+missingUser, ""), 404)
	}
	s.stream(t, "")
	r := s.do("GET /metrics", "", "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.1")
	if got := r.header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("Content-Type = %s", got)
	}
	m, samples := s.metrics(t), map[string]string{}
	for line := range strings.Lines(r.body) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		samples[name] += value
	}
	for name, value := range map[string]int64{
		"cassandra_queries_total": m.Queries, "cassandra_query_errors_total": m.Errors, "cassandra_connections_open": int64(m.Connections.Open),
		"rows_streamed_total": crowdSize,
	} {
		if samples[name] != strconv.FormatInt(value, 10) {
			t.Errorf("%s = %q, want %d", name, samples[name], value)
		}
	}
	want(t, r, 200, `http_requests_total{route="GET /users/{id}",status="404"} 3`, `http_request_duration_seconds_count{route="GET /users/{id}"} 3`,
		`http_request_duration_seconds_bucket{route="GET /users/{id}",le="+Inf"} 3`)
}
