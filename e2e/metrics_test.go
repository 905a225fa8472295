package e2e

import (
	"fmt"
	"maps"
	"strconv"
	"testing"
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
		{"GET /users/stream?age_filter=99", "", "", 200, "GET /users/stream", 2},
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
	if c := before.Cassandra; !c.Connected || c.Hosts != 1 || c.Session != 1 || before.Connections.Open < 2 || before.Memory < 1<<20 {
		t.Errorf("metrics = %+v", before)
	}
	proxy.credit.Store(0)
	want(t, s.do("GET "+missingUser, "", "X-Request-Timeout: 0.2"), 504)
	expect("GET /users/{id}", "504", 1, 1)
	s.awaitInFlight(t, 0)
	after := s.metrics(t)
	delete(after.ByRoute, "GET /metrics")
	delete(byRoute, "GET /metrics")
	if !maps.EqualFunc(after.ByRoute, byRoute, maps.Equal) || after.Queries != queries || after.Errors != errors || after.Rows != 25 {
		t.Errorf("metrics = %+v, want %d queries, %d errors, 25 rows, %v", after, queries, errors, byRoute)
	}
	r := s.do("GET /metrics", "", "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.1")
	want(t, r, 200, fmt.Sprintf("\ncassandra_queries_total %d\n", queries), fmt.Sprintf("\ncassandra_query_errors_total %d\n", errors),
		fmt.Sprintf("\nrows_streamed_total %d\n", after.Rows), fmt.Sprintf("\ncassandra_connections_open %d\n", after.Connections.Open),
		fmt.Sprintf("\nhttp_requests_total{route=\"PUT /users/{id}\",status=\"200\"} %d\n", byRoute["PUT /users/{id}"]["200"]),
		"\nhttp_request_duration_seconds_count{route=\"PUT /users/{id}\"} 1\n")
	if got := r.header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("Content-Type = %s", got)
	}
}
