package e2e

import (
	"fmt"
	"maps"
	"testing"
	"time"
)

// doOneOfEach sends requests that take 15 queries in all and stream 25 users.
func (s *service) doOneOfEach(t *testing.T) {
	path := s.createUser(t)
	for _, tt := range []struct {
		request, body, header string
		status                int
	}{
		{"GET " + path, "", "", 200}, {"GET " + path, "", "Cache-Control: no-cache", 200}, {"GET " + missingUser, "", "", 404},
		{"POST /users", "{}", "", 422},                  // no query
		{"POST /users", ada, "Idempotency-Key: 1", 201}, // two queries
		{"POST /users", ada, "", 201}, {"POST /users/batch", batchOf(22, ada), "", 201}, {"GET /users/stream", "", "", 200},
		{"GET /users/stream?age_filter=99", "", "", 200}, // two queries
		{"HEAD /users/stream", "", "", 200},              // no query
		{"PUT " + path, ada, "", 200},                    // two queries
		{"GET /users/stream/pages", "", "", 200}, {"DELETE " + path, "", "", 204},
		{"GET /slow_query", "", "X-Request-Timeout: 0.1", 504}, {"GET /nowhere", "", "", 404}, // no queries
	} {
		want(t, s.do(tt.request, tt.body, tt.header), tt.status)
	}
}

func TestMetricsMatchRequests(t *testing.T) {
	s, proxy := startBehindProxy(t)
	m := s.metrics(t)
	c, open, queries := m.Cassandra, m.Connections.Open, m.Queries
	check(t, c.Connected && c.Session*c.Hosts == 1 && open >= 2 && m.Connections.Opened >= open && m.Memory >= 1<<20, "metrics = %+v", m)
	s.doOneOfEach(t)
	proxy.credit.Store(0)
	conn := s.dial(t, rawGet(missingUser), 0)
	s.awaitInFlight(t, 1)
	conn.Close()
	want(t, s.do("GET "+missingUser, "", "X-Request-Timeout: 0.2"), 504)
	await(t, 10*time.Second, "silent", func() bool { return s.metrics(t).Cassandra.Silent == 1 })
	s.awaitInFlight(t, 0)
	m = s.metrics(t)
	check(t, m.Queries == queries+17 && m.Errors == 1 && m.Rows == 25, "metrics = %+v, want %d queries, 1 error, 25 rows", m, queries+17)
	delete(m.ByRoute, "GET /metrics")
	delete(m.ByRoute, "GET /health")
	byRoute := map[string]map[string]int64{
		"GET /users/{id}": {"200": 2, "404": 1, "499": 1, "504": 1}, "POST /users": {"201": 3, "422": 1}, "POST /users/batch": {"201": 1},
		"PUT /users/{id}": {"200": 1}, "DELETE /users/{id}": {"204": 1}, "GET /users/stream": {"200": 3},
		"GET /users/stream/pages": {"200": 1}, "GET /slow_query": {"504": 1}, "none": {"404": 1},
	}
	check(t, maps.EqualFunc(m.ByRoute, byRoute, maps.Equal), "requests by route = %v, want %v", m.ByRoute, byRoute)
	r := s.do("GET /metrics", "", "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.1")
	want(t, r, 200, fmt.Sprint("\ncassandra_queries_total ", m.Queries), "\ncassandra_query_errors_total 1\n", "\nrows_streamed_total 25\n",
		`http_requests_total{route="POST /users",status="201"} 3`, `http_request_duration_seconds_count{route="POST /users"} 4`,
		fmt.Sprint("\ncassandra_connections_open ", m.Connections.Open), fmt.Sprint("\ncassandra_connected ",
			map[bool]int{true: 1}[m.Cassandra.Connected]), `http_request_duration_seconds_bucket{route="POST /users",le="+Inf"} 4`)
}
