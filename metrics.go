// This file counts what the service does and shows it at GET /metrics, as JSON
// and in Prometheus' text format, in the manner of expvar: atomic counters that
// the middleware and the driver's observers fill. It never touches Cassandra.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"runtime"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
)

const rateWindow = 60 // seconds that queries_per_second covers

// bounds are the histograms' upper bounds in seconds: a point read takes about
// one millisecond, and no page more than 12 s.
var bounds = [...]float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60}

// counters are the service's counters, as in expvar: package state that is
// written where things happen and read by collect.
var counters = struct {
	started      time.Time
	inFlight     atomic.Int64   // HTTP requests
	active       atomic.Int64   // those that a drain waits for
	rowsStreamed atomic.Int64   // by GET /users/stream
	queries      atomic.Int64   // sent to Cassandra
	queryErrors  atomic.Int64   // of those
	lastResponse atomic.Int64   // of Cassandra to a query, in nanoseconds since started
	skew         atomic.Int64   // nanoseconds from this clock to the node's
	connected    atomic.Bool    // result of the last ping
	connections  countingDialer // of the global session and of attempts to open one
	queryRate    rate
	queryTimes   histogram
	routesMu     sync.Mutex
	routes       map[string]*routeStats // by pattern
}{started: time.Now(), routes: map[string]*routeStats{}}

// observer counts every attempt that the driver sends: a query, a page, a batch.
type observer struct{}

// ObserveQuery implements gocql.QueryObserver.
func (observer) ObserveQuery(_ context.Context, q gocql.ObservedQuery) {
	countQuery(q.Start, q.End, q.Err)
}

// ObserveBatch implements gocql.BatchObserver.
func (observer) ObserveBatch(_ context.Context, b gocql.ObservedBatch) {
	countQuery(b.Start, b.End, b.Err)
}

// countQuery counts a query. A client that disconnected is not a failure.
func countQuery(start, end time.Time, err error) {
	counters.queries.Add(1)
	counters.queryRate.add(end)
	counters.queryTimes.observe(end.Sub(start))
	switch {
	case err == nil:
		counters.lastResponse.Store(int64(end.Sub(counters.started)))
	case !errors.Is(err, context.Canceled):
		counters.queryErrors.Add(1)
	}
}

// routeStats counts the requests of one route.
type routeStats struct {
	statuses [600]atomic.Int64 // by HTTP status or statusAborted
	times    histogram
}

// statsOf returns the only routeStats of a pattern.
func statsOf(pattern string) *routeStats {
	counters.routesMu.Lock()
	defer counters.routesMu.Unlock()
	if counters.routes[pattern] == nil {
		counters.routes[pattern] = new(routeStats)
	}
	return counters.routes[pattern]
}

func (s *routeStats) count(status int, took time.Duration) {
	s.statuses[status].Add(1)
	s.times.observe(took)
}

// byStatus returns the counts that are not zero, named as they are shown.
func (s *routeStats) byStatus() map[string]int64 {
	counts := map[string]int64{}
	for status := range s.statuses {
		if n := s.statuses[status].Load(); n > 0 {
			name := strconv.Itoa(status)
			if status == statusAborted {
				name = "aborted"
			}
			counts[name] = n
		}
	}
	return counts
}

// histogram counts durations in buckets.
type histogram struct {
	buckets [len(bounds) + 1]atomic.Int64 // each up to its bound and above the one before; the last has no bound
	nanos   atomic.Int64                  // sum of all durations
}

func (h *histogram) observe(d time.Duration) {
	i, _ := slices.BinarySearch(bounds[:], d.Seconds())
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// cumulative returns the number of durations up to each bound, and last of all.
func (h *histogram) cumulative() (counts [len(bounds) + 1]int64) {
	var sum int64
	for i := range h.buckets {
		sum += h.buckets[i].Load()
		counts[i] = sum
	}
	return counts
}

// quantile estimates a quantile in milliseconds. Like Prometheus it assumes that
// durations are spread evenly within a bucket.
func (h *histogram) quantile(q float64) float64 {
	counts := h.cumulative()
	rank := q * float64(counts[len(bounds)])
	if rank == 0 {
		return 0
	}
	i := slices.IndexFunc(counts[:], func(n int64) bool { return float64(n) >= rank })
	if i == len(bounds) {
		return bounds[i-1] * 1000
	}
	low, below := 0.0, int64(0)
	if i > 0 {
		low, below = bounds[i-1], counts[i-1]
	}
	return 1000 * (low + (bounds[i]-low)*(rank-float64(below))/float64(counts[i]-below))
}

// rate counts events by the second they happened in, for rateWindow seconds.
type rate struct {
	mu      sync.Mutex
	seconds [rateWindow]int64 // Unix time of each slot
	counts  [rateWindow]int64
}

func (r *rate) add(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	slot := at.Unix() % rateWindow
	if r.seconds[slot] != at.Unix() {
		r.seconds[slot], r.counts[slot] = at.Unix(), 0
	}
	r.counts[slot]++
}

// perSecond returns the mean of the last rateWindow seconds, or since start.
func (r *rate) perSecond(start, at time.Time) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var sum int64
	for slot, second := range r.seconds {
		if at.Unix()-second < rateWindow {
			sum += r.counts[slot]
		}
	}
	return float64(sum) / min(max(at.Sub(start).Seconds(), 1), rateWindow)
}

// metrics is the response of GET /metrics.
type metrics struct {
	TotalQueries         int64                       `json:"total_queries"`
	ActiveConnections    int64                       `json:"active_connections"`
	QueriesPerSecond     float64                     `json:"queries_per_second"`
	AverageQueryTimeMS   float64                     `json:"average_query_time_ms"`
	ErrorsCount          int64                       `json:"errors_count"`
	QueryTimes           queryTimes                  `json:"query_times"`
	QueryPerformance     percentiles                 `json:"query_performance"`
	TotalRequests        int64                       `json:"total_requests"`
	RequestsInFlight     int64                       `json:"requests_in_flight"`
	RequestsByRoute      map[string]map[string]int64 `json:"requests_by_route"`
	CassandraConnections connectionCounts            `json:"cassandra_connections"`
	Cassandra            cassandraState              `json:"cassandra"`
	StreamsActive        int                         `json:"streams_active"`
	RowsStreamed         int64                       `json:"rows_streamed"`
	Goroutines           int                         `json:"goroutines"`
	MemoryBytes          uint64                      `json:"memory_bytes"`
	UptimeSeconds        float64                     `json:"uptime_seconds"`
}

type queryTimes struct {
	Count int64   `json:"count"`
	SumMS float64 `json:"sum_ms"`
}

type percentiles struct {
	P50 float64 `json:"p50_ms"`
	P95 float64 `json:"p95_ms"`
	P99 float64 `json:"p99_ms"`
}

type connectionCounts struct {
	Open   int64 `json:"open"`
	Opened int64 `json:"opened"`
	Failed int64 `json:"failed"`
}

type cassandraState struct {
	Connected   bool    `json:"connected"` // result of the last ping
	Session     int64   `json:"session"`
	Hosts       int     `json:"hosts"`
	HostsSilent int     `json:"hosts_silent"`
	ClockSkewMS float64 `json:"clock_skew_ms"`
}

// getMetrics handles GET /metrics.
func getMetrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Vary", "Accept")
	m := collect()
	if preferred(r, "application/json", "text/plain", "application/openmetrics-text") == "application/json" {
		return writeJSON(w, http.StatusOK, m)
	}
	return writeBody(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", m.prometheus())
}

func collect() metrics {
	connections, times := &counters.connections, &counters.queryTimes
	m := metrics{
		TotalQueries:         counters.queries.Load(),
		ActiveConnections:    connections.open.Load(),
		QueriesPerSecond:     counters.queryRate.perSecond(counters.started, time.Now()),
		ErrorsCount:          counters.queryErrors.Load(),
		QueryTimes:           queryTimes{times.cumulative()[len(bounds)], milliseconds(time.Duration(times.nanos.Load()))},
		QueryPerformance:     percentiles{times.quantile(.5), times.quantile(.95), times.quantile(.99)},
		RequestsInFlight:     counters.inFlight.Load(),
		RequestsByRoute:      map[string]map[string]int64{},
		CassandraConnections: connectionCounts{connections.open.Load(), connections.opened.Load(), connections.failed.Load()},
		Cassandra:            cassandraState{Connected: counters.connected.Load(), ClockSkewMS: milliseconds(time.Duration(counters.skew.Load()))},
		StreamsActive:        len(streams),
		RowsStreamed:         counters.rowsStreamed.Load(),
		Goroutines:           runtime.NumGoroutine(),
		MemoryBytes:          memoryBytes(),
		UptimeSeconds:        time.Since(counters.started).Seconds(),
	}
	if m.QueryTimes.Count > 0 {
		m.AverageQueryTimeMS = m.QueryTimes.SumMS / float64(m.QueryTimes.Count)
	}
	if s := global.session.Load(); s != nil {
		m.Cassandra.Session = s.number
	}
	counters.routesMu.Lock()
	defer counters.routesMu.Unlock()
	for pattern, stats := range counters.routes {
		for status, n := range stats.byStatus() {
			if m.RequestsByRoute[pattern] == nil {
				m.RequestsByRoute[pattern] = map[string]int64{}
			}
			m.RequestsByRoute[pattern][status] = n
			m.TotalRequests += n
		}
	}
	return m
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// memoryBytes returns the memory that the Go runtime has obtained from the OS
// and not returned.
func memoryBytes() uint64 {
	samples := []runtimemetrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	runtimemetrics.Read(samples)
	return samples[0].Value.Uint64() - samples[1].Value.Uint64()
}

// prometheus returns the metrics in the text format 0.0.4, with histograms in
// the place of percentiles.
func (m metrics) prometheus() []byte {
	var out bytes.Buffer
	head := func(name, kind, help string) {
		fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	value := func(name, kind, help string, v float64) {
		head(name, kind, help)
		fmt.Fprintf(&out, "%s %g\n", name, v)
	}
	connected := 0.0
	if m.Cassandra.Connected {
		connected = 1
	}
	value("cassandra_queries_total", "counter", "Queries sent to Cassandra; each page and each attempt counts.", float64(m.TotalQueries))
	value("cassandra_query_errors_total", "counter", "Queries that failed.", float64(m.ErrorsCount))
	value("cassandra_queries_per_second", "gauge", "Queries per second, mean of the last 60 s.", m.QueriesPerSecond)
	value("cassandra_connections_open", "gauge", "Open connections to Cassandra.", float64(m.CassandraConnections.Open))
	value("cassandra_connections_opened_total", "counter", "Connections to Cassandra that were opened.", float64(m.CassandraConnections.Opened))
	value("cassandra_connections_failed_total", "counter", "Connections to Cassandra that could not be opened.", float64(m.CassandraConnections.Failed))
	value("cassandra_connected", "gauge", "1 if Cassandra responded to the last ping, else 0.", connected)
	value("cassandra_session", "gauge", "Number of the current session.", float64(m.Cassandra.Session))
	value("cassandra_hosts", "gauge", "Known Cassandra nodes.", float64(m.Cassandra.Hosts))
	value("cassandra_hosts_silent", "gauge", "Cassandra nodes that do not respond.", float64(m.Cassandra.HostsSilent))
	value("cassandra_clock_skew_seconds", "gauge", "The node's clock minus the service's.", m.Cassandra.ClockSkewMS/1000)
	value("http_requests_in_flight", "gauge", "Active HTTP requests.", float64(m.RequestsInFlight))
	value("streams_active", "gauge", "Streams and pages that are being sent.", float64(m.StreamsActive))
	value("rows_streamed_total", "counter", "Users sent by streams.", float64(m.RowsStreamed))
	value("goroutines", "gauge", "Goroutines of the process.", float64(m.Goroutines))
	value("memory_bytes", "gauge", "Memory obtained from the OS.", float64(m.MemoryBytes))
	value("uptime_seconds", "gauge", "Time since the process started.", m.UptimeSeconds)

	head("http_requests_total", "counter", "HTTP requests by route and status.")
	for _, pattern := range slices.Sorted(maps.Keys(m.RequestsByRoute)) {
		for _, status := range slices.Sorted(maps.Keys(m.RequestsByRoute[pattern])) {
			fmt.Fprintf(&out, "http_requests_total{route=%q,status=%q} %d\n", pattern, status, m.RequestsByRoute[pattern][status])
		}
	}
	head("http_request_duration_seconds", "histogram", "Duration of HTTP requests by route.")
	for _, pattern := range slices.Sorted(maps.Keys(m.RequestsByRoute)) {
		statsOf(pattern).times.prometheus(&out, "http_request_duration_seconds", fmt.Sprintf("route=%q", pattern))
	}
	head("cassandra_query_duration_seconds", "histogram", "Duration of queries.")
	counters.queryTimes.prometheus(&out, "cassandra_query_duration_seconds", "")
	return out.Bytes()
}

func (h *histogram) prometheus(out *bytes.Buffer, name, labels string) {
	separator := ""
	if labels != "" {
		separator = ","
	}
	counts := h.cumulative()
	for i, bound := range bounds {
		fmt.Fprintf(out, "%s_bucket{%s%sle=\"%g\"} %d\n", name, labels, separator, bound, counts[i])
	}
	total := counts[len(bounds)]
	fmt.Fprintf(out, "%s_bucket{%s%sle=\"+Inf\"} %d\n", name, labels, separator, total)
	fmt.Fprintf(out, "%s_sum{%s} %g\n%s_count{%s} %d\n", name, labels, time.Duration(h.nanos.Load()).Seconds(), name, labels, total)
}
