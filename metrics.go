// This file counts requests and queries and shows the figures at GET /metrics, as JSON and in Prometheus' text format.
// The middleware and the driver's observers fill atomic counters, as in expvar. It never touches Cassandra.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
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

const rateWindow = time.Minute // averaging window of queries_per_second

// bounds are the histograms' upper bounds in seconds: a point read takes about one millisecond, a page at most 12 s.
var bounds = [...]float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60}

// counters are written where things happen and read by GET /metrics, as in expvar.
var counters = struct {
	started      time.Time
	inFlight     atomic.Int64   // HTTP requests
	active       atomic.Int64   // those that a drain waits for
	rowsStreamed atomic.Int64   // by GET /users/stream
	queries      atomic.Int64   // sent to Cassandra
	queryErrors  atomic.Int64   // failed queries
	lastResponse atomic.Int64   // of Cassandra to a query, in nanoseconds since started
	skew         atomic.Int64   // nanoseconds from this clock to the node's
	connected    atomic.Bool    // result of the last ping
	sessions     atomic.Int64   // opened so far: the number of the current one
	connections  countingDialer // of the global session and of attempts to open one
	queryHistory history
	queryTimes   histogram
	routes       sync.Map // of *routeStats by pattern
}{started: time.Now()}

// observer counts every attempt that the driver sends: a query, a page, a batch.
type observer struct{}

func (observer) ObserveQuery(_ context.Context, q gocql.ObservedQuery) {
	countQuery(q.Start, q.End, q.Host, q.Err)
}
func (observer) ObserveBatch(_ context.Context, b gocql.ObservedBatch) {
	countQuery(b.Start, b.End, b.Host, b.Err)
}

// pingObserver records how hosts respond, and counts nothing.
type pingObserver struct{}

func (pingObserver) ObserveQuery(_ context.Context, q gocql.ObservedQuery) {
	counters.connections.observe(q.Host, q.End.Sub(q.Start), q.Err)
}

// countQuery counts a query. A cancelled query, as after a disconnect or a faster second attempt, is not a failure.
func countQuery(start, end time.Time, node *gocql.HostInfo, err error) {
	counters.queries.Add(1)
	counters.queryTimes.observe(end.Sub(start))
	counters.connections.observe(node, end.Sub(start), err)
	switch {
	case err == nil:
		counters.lastResponse.Store(int64(uptime()))
	case !errors.Is(err, context.Canceled):
		counters.queryErrors.Add(1)
	}
}

// recordSkew logs when the clocks begin and cease to differ by more than maxSkew.
func recordSkew(skew time.Duration) {
	before := time.Duration(counters.skew.Swap(int64(skew)))
	if isLarge := skew.Abs() > maxSkew; isLarge != (before.Abs() > maxSkew) {
		does := map[bool]string{true: "differ", false: "agree again"}[isLarge]
		slog.Warn("the clocks of this service and of Cassandra "+does, "skew", skew.Round(time.Millisecond))
	}
}

// sampleCounters records the queries and counts the hosts until ctx ends. It logs when a host falls silent or is back.
func sampleCounters(ctx context.Context) {
	d, silent := &counters.connections, map[any]time.Duration{} // when each host was last silent
	for ; ctx.Err() == nil; sleep(ctx, hostInterval) {
		counters.queryHistory.record(counters.queries.Load())
		hosts, lagging := int64(0), false
		for addr, value := range d.byAddress.Range {
			h := value.(*host)
			hosts += min(1, h.open.Load())
			switch last, was := silent[addr]; {
			case h.isSilent():
				if silent[addr] = uptime(); !was {
					slog.Warn("a host does not respond", "host", addr)
				}
			case was && uptime()-last > backAfter:
				delete(silent, addr)
				slog.Info("a host responds again", "host", addr)
			}
			lagging = lagging || h.ill.Load() != 0
		}
		d.hosts.Store(hosts)
		d.silent.Store(int64(len(silent)))
		d.lagging.Store(lagging || len(silent) > 0)
	}
}

// observe records how a host responded to a query.
func (d *countingDialer) observe(node *gocql.HostInfo, took time.Duration, err error) {
	isIll := took > maxSilence || isUnavailable(err)
	if !isIll && !d.lagging.Load() {
		return // as usual
	}
	d.host(node.ConnectAddressAndPort()).ill.Store(map[bool]int64{true: int64(uptime())}[isIll])
	d.lagging.Store(true)
}

// host is a node as its connections see it. Times are nanoseconds of uptime.
type host struct {
	open    atomic.Int64 // connections
	waiting atomic.Int64 // time of the first request since it last sent a byte; 0 if there is none
	ill     atomic.Int64 // time of its last slow or refused query, or last trial allowed by lags; 0 if it is healthy
}

func (h *host) isSilent() bool {
	since := h.waiting.Load()
	return since != 0 && elapsed(since) > maxSilence
}

// lags reports whether queries should go to other hosts. An ill host gets one query per maxSilence until one is quick.
func (h *host) lags() bool {
	ill := h.ill.Load()
	return h.isSilent() || ill != 0 && (elapsed(ill) < maxSilence || !h.ill.CompareAndSwap(ill, int64(uptime())))
}

// elapsed returns the time since an uptime in nanoseconds.
func elapsed(since int64) time.Duration { return uptime() - time.Duration(since) }

// routeStats counts the requests of one route.
type routeStats struct {
	statuses [600]atomic.Int64 // by HTTP status or statusAborted
	times    histogram
}

// statsOf returns the shared routeStats of a pattern.
func statsOf(pattern string) *routeStats {
	stats, _ := counters.routes.LoadOrStore(pattern, new(routeStats))
	return stats.(*routeStats)
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

// cumulative returns the number of durations up to each bound, and their total.
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

// history is a counter's recent values, one per hostInterval.
type history struct {
	values [rateWindow/hostInterval + 1]atomic.Int64
	length atomic.Int64
}

func (h *history) record(value int64) { h.values[h.length.Add(1)%int64(len(h.values))].Store(value) }

// perSecond returns how fast the counter grew within rateWindow, or since the start.
func (h *history) perSecond(value int64) float64 {
	length, size := h.length.Load(), int64(len(h.values))
	grown := value - h.values[(length+1)%size].Load()
	return float64(grown) / max(1, min(float64(length)*hostInterval.Seconds(), rateWindow.Seconds()))
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

// metric is a value that both formats have. A dot in its JSON name separates object and member.
type metric struct {
	json, prometheus, kind, help string
	value                        any
}

func metrics() []metric {
	c, dialer := &counters, &counters.connections
	rate, skew := c.queryHistory.perSecond(c.queries.Load()), milliseconds(time.Duration(c.skew.Load()))
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	opened, failed := dialer.opened.Load(), dialer.failed.Load()
	return []metric{
		{"total_queries", "cassandra_queries_total", "counter", "Queries, pages and retries sent.", c.queries.Load()},
		{"errors_count", "cassandra_query_errors_total", "counter", "Queries that failed.", c.queryErrors.Load()},
		{"queries_per_second", "cassandra_queries_per_second", "gauge", "Mean rate over the last 60 s.", rate},
		{"active_connections", "cassandra_connections_open", "gauge", "Open connections.", dialer.open.Load()},
		{"cassandra_connections.opened", "cassandra_connections_opened_total", "counter", "Connections opened.", opened},
		{"cassandra_connections.failed", "cassandra_connections_failed_total", "counter", "Failed dials.", failed},
		{"cassandra.connected", "cassandra_connected", "gauge", "Result of the last ping.", c.connected.Load()},
		{"cassandra.session", "cassandra_session", "gauge", "Number of the current session.", c.sessions.Load()},
		{"cassandra.hosts", "cassandra_hosts", "gauge", "Hosts with an open connection.", dialer.hosts.Load()},
		{"cassandra.hosts_silent", "cassandra_hosts_silent", "gauge", "Hosts that do not respond.", dialer.silent.Load()},
		{"cassandra.clock_skew_ms", "cassandra_clock_skew_milliseconds", "gauge", "Node clock minus service clock.", skew},
		{"requests_in_flight", "http_requests_in_flight", "gauge", "Active HTTP requests.", c.inFlight.Load()},
		{"streams_active", "streams_active", "gauge", "Streams and pages that are being sent.", len(streams)},
		{"rows_streamed", "rows_streamed_total", "counter", "Users sent by streams.", c.rowsStreamed.Load()},
		{"goroutines", "goroutines", "gauge", "Goroutines of the process.", runtime.NumGoroutine()},
		{"memory_bytes", "memory_bytes", "gauge", "Memory obtained from the OS.", memory.Sys - memory.HeapReleased},
		{"uptime_seconds", "uptime_seconds", "gauge", "Time since the process started.", uptime().Seconds()},
	}
}

func jsonMetrics() map[string]any {
	times := &counters.queryTimes
	count, sum := times.cumulative()[len(bounds)], milliseconds(time.Duration(times.nanos.Load()))
	byRoute, total := requestsByRoute()
	all := map[string]any{
		"average_query_time_ms": sum / float64(max(1, count)),
		"query_times":           map[string]any{"count": count, "sum_ms": sum},
		"query_performance":     percentiles{times.quantile(.5), times.quantile(.95), times.quantile(.99)},
		"total_requests":        total,
		"requests_by_route":     byRoute,
		"cassandra":             map[string]any{},
		"cassandra_connections": map[string]any{"open": counters.connections.open.Load()},
	}
	for _, m := range metrics() {
		if object, name, isNested := strings.Cut(m.json, "."); isNested {
			all[object].(map[string]any)[name] = m.value
		} else {
			all[m.json] = m.value
		}
	}
	return all
}

// requestsByRoute returns the number of requests by pattern and status, and their total.
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

// preferred returns the offer with the highest q in Accept, or the first one on a tie or without a match.
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

func uptime() time.Duration { return time.Since(counters.started) }

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// prometheusMetrics returns the metrics in the text format 0.0.4, with histograms instead of percentiles.
func prometheusMetrics() []byte {
	var out bytes.Buffer
	for _, m := range metrics() {
		writeHead(&out, m.prometheus, m.kind, m.help)
		if yes, ok := m.value.(bool); ok {
			m.value = map[bool]int{true: 1}[yes]
		}
		fmt.Fprintf(&out, "%s %v\n", m.prometheus, m.value)
	}
	byRoute, _ := requestsByRoute()
	routes := slices.Sorted(maps.Keys(byRoute))
	writeHead(&out, "http_requests_total", "counter", "HTTP requests by route and status.")
	for _, pattern := range routes {
		for _, status := range slices.Sorted(maps.Keys(byRoute[pattern])) {
			fmt.Fprintf(&out, "http_requests_total{route=%q,status=%q} %d\n", pattern, status, byRoute[pattern][status])
		}
	}
	writeHead(&out, "http_request_duration_seconds", "histogram", "Duration of HTTP requests by route.")
	for _, pattern := range routes {
		statsOf(pattern).times.prometheus(&out, "http_request_duration_seconds", fmt.Sprintf("route=%q,", pattern))
	}
	writeHead(&out, "cassandra_query_duration_seconds", "histogram", "Duration of queries.")
	counters.queryTimes.prometheus(&out, "cassandra_query_duration_seconds", "")
	return out.Bytes()
}

func writeHead(out *bytes.Buffer, name, kind, help string) {
	fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
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
