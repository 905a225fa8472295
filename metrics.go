// This file counts what the service does and shows it at GET /metrics, as JSON
// and in Prometheus' text format, in the manner of expvar: atomic counters that
// the middleware and the driver's observers fill. It never touches Cassandra.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"mime"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
)

const rateWindow = 60 // seconds that queries_per_second covers

// bounds are the histograms' upper bounds in seconds: a point read takes about
// one millisecond, and no page more than 12 s.
var bounds = [...]float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60}

// counters are written where things happen and read by GET /metrics, as in expvar.
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
	routes       sync.Map // of *routeStats by pattern
}{started: time.Now()}

// observer counts every attempt that the driver sends: a query, a page, a batch.
type observer struct{}

func (observer) ObserveQuery(_ context.Context, q gocql.ObservedQuery) {
	countQuery(q.Start, q.End, q.Err)
}
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
	stats, _ := counters.routes.LoadOrStore(pattern, new(routeStats))
	return stats.(*routeStats)
}

func (s *routeStats) count(status int, took time.Duration) {
	s.statuses[status].Add(1)
	s.times.observe(took)
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

// quantile estimates a quantile in milliseconds. It assumes that a bucket is evenly filled.
func (h *histogram) quantile(q float64) float64 {
	counts := h.cumulative()
	rank := q * float64(counts[len(bounds)])
	if rank == 0 {
		return 0
	}
	i := slices.IndexFunc(counts[:], func(n int64) bool { return float64(n) >= rank })
	low, high, below := 0.0, bounds[min(i, len(bounds)-1)], int64(0)
	if i > 0 {
		low, below = bounds[i-1], counts[i-1]
	}
	return 1000 * (low + (high-low)*(rank-float64(below))/float64(counts[i]-below))
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

type percentiles struct {
	P50 float64 `json:"p50_ms"`
	P95 float64 `json:"p95_ms"`
	P99 float64 `json:"p99_ms"`
}

// getMetrics handles GET /metrics.
func getMetrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Vary", "Accept")
	if preferred(r, "application/json", "text/plain", "application/openmetrics-text") == "application/json" {
		return writeJSON(w, http.StatusOK, jsonMetrics())
	}
	return writeBody(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", prometheusMetrics())
}

func jsonMetrics() map[string]any {
	dialer, times := &counters.connections, &counters.queryTimes
	count, sum := times.cumulative()[len(bounds)], milliseconds(time.Duration(times.nanos.Load()))
	byRoute, total := requestsByRoute()
	return map[string]any{
		"total_queries":         counters.queries.Load(),
		"active_connections":    dialer.open.Load(),
		"queries_per_second":    counters.queryRate.perSecond(counters.started, time.Now()),
		"average_query_time_ms": sum / float64(max(1, count)),
		"errors_count":          counters.queryErrors.Load(),
		"query_times":           map[string]any{"count": count, "sum_ms": sum},
		"query_performance":     percentiles{times.quantile(.5), times.quantile(.95), times.quantile(.99)},
		"total_requests":        total,
		"requests_in_flight":    counters.inFlight.Load(),
		"requests_by_route":     byRoute,
		"cassandra_connections": map[string]any{
			"open": dialer.open.Load(), "opened": dialer.opened.Load(), "failed": dialer.failed.Load(),
		},
		"cassandra": map[string]any{
			"connected": counters.connected.Load(), "session": observeSession().number,
			"clock_skew_ms": milliseconds(time.Duration(counters.skew.Load())),
		},
		"streams_active": len(streams),
		"rows_streamed":  counters.rowsStreamed.Load(),
		"goroutines":     runtime.NumGoroutine(),
		"memory_bytes":   memoryBytes(),
		"uptime_seconds": time.Since(counters.started).Seconds(),
	}
}

// requestsByRoute returns the number of requests by pattern and status, and of all.
func requestsByRoute() (counts map[string]map[string]int64, total int64) {
	counts = map[string]map[string]int64{}
	for pattern, stats := range counters.routes.Range {
		byStatus := map[string]int64{}
		for status := range stats.(*routeStats).statuses {
			if n := stats.(*routeStats).statuses[status].Load(); n > 0 {
				byStatus[cmp.Or(map[int]string{statusAborted: "aborted"}[status], strconv.Itoa(status))] = n
				total += n
			}
		}
		if len(byStatus) > 0 {
			counts[pattern.(string)] = byStatus
		}
	}
	return counts, total
}

// preferred negotiates the content type: it returns the offer with the highest
// q in Accept, or the first one on a tie or without a match.
func preferred(r *http.Request, offers ...string) string {
	best, bestQ := offers[0], 0.0
	for accepted := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
		mediaType, params, err := mime.ParseMediaType(accepted)
		q, qErr := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
		isBetter := q > bestQ || q == bestQ && mediaType == offers[0]
		if err == nil && qErr == nil && isBetter && slices.Contains(offers, mediaType) {
			best, bestQ = mediaType, q
		}
	}
	return best
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// memoryBytes returns the memory that was obtained from the OS and not returned.
func memoryBytes() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Sys - m.HeapReleased
}

// prometheusMetrics returns the same in the text format 0.0.4, with histograms for percentiles.
func prometheusMetrics() []byte {
	var out bytes.Buffer
	value := func(name, kind, help string, v any) {
		writeHead(&out, name, kind, help)
		fmt.Fprintf(&out, "%s %v\n", name, v)
	}
	connected, connections := map[bool]int{true: 1}[counters.connected.Load()], &counters.connections
	rate, skew := counters.queryRate.perSecond(counters.started, time.Now()), time.Duration(counters.skew.Load())
	value("cassandra_queries_total", "counter", "Queries sent; each page and attempt counts.", counters.queries.Load())
	value("cassandra_query_errors_total", "counter", "Queries that failed.", counters.queryErrors.Load())
	value("cassandra_queries_per_second", "gauge", "Mean of the last 60 s.", rate)
	value("cassandra_connections_open", "gauge", "Open connections.", connections.open.Load())
	value("cassandra_connections_opened_total", "counter", "Connections that were opened.", connections.opened.Load())
	value("cassandra_connections_failed_total", "counter", "Connections that failed to open.", connections.failed.Load())
	value("cassandra_connected", "gauge", "1 if Cassandra responded to the last ping, else 0.", connected)
	value("cassandra_session", "gauge", "Number of the current session.", observeSession().number)
	value("cassandra_clock_skew_seconds", "gauge", "The node's clock minus the service's.", skew.Seconds())
	value("http_requests_in_flight", "gauge", "Active HTTP requests.", counters.inFlight.Load())
	value("streams_active", "gauge", "Streams and pages that are being sent.", len(streams))
	value("rows_streamed_total", "counter", "Users sent by streams.", counters.rowsStreamed.Load())
	value("goroutines", "gauge", "Goroutines of the process.", runtime.NumGoroutine())
	value("memory_bytes", "gauge", "Memory obtained from the OS.", memoryBytes())
	value("uptime_seconds", "gauge", "Time since the process started.", time.Since(counters.started).Seconds())
	writeHistograms(&out)
	return out.Bytes()
}

func writeHead(out *bytes.Buffer, name, kind, help string) {
	fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// writeHistograms writes what has labels or buckets.
func writeHistograms(out *bytes.Buffer) {
	byRoute, _ := requestsByRoute()
	routes := slices.Sorted(maps.Keys(byRoute))
	writeHead(out, "http_requests_total", "counter", "HTTP requests by route and status.")
	for _, pattern := range routes {
		for _, status := range slices.Sorted(maps.Keys(byRoute[pattern])) {
			fmt.Fprintf(out, "http_requests_total{route=%q,status=%q} %d\n", pattern, status, byRoute[pattern][status])
		}
	}
	writeHead(out, "http_request_duration_seconds", "histogram", "Duration of HTTP requests by route.")
	for _, pattern := range routes {
		statsOf(pattern).times.prometheus(out, "http_request_duration_seconds", fmt.Sprintf("route=%q,", pattern))
	}
	writeHead(out, "cassandra_query_duration_seconds", "histogram", "Duration of queries.")
	counters.queryTimes.prometheus(out, "cassandra_query_duration_seconds", "")
}

// prometheus writes the histogram. Labels end in a comma.
func (h *histogram) prometheus(out *bytes.Buffer, name, labels string) {
	counts := h.cumulative()
	for i, bound := range append(bounds[:], math.Inf(1)) {
		fmt.Fprintf(out, "%s_bucket{%sle=\"%g\"} %d\n", name, labels, bound, counts[i])
	}
	labels = strings.TrimSuffix(labels, ",")
	sum, count := time.Duration(h.nanos.Load()).Seconds(), counts[len(bounds)]
	fmt.Fprintf(out, "%s_sum{%s} %g\n%s_count{%s} %d\n", name, labels, sum, name, labels, count)
}
