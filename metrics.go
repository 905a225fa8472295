// This file counts what the service does and shows it at /metrics, as JSON and
// in Prometheus' text format, without ever asking Cassandra: atomic counters,
// filled by the middleware, by the driver's observers and by a dialer that
// counts connections. Up to /performance, which measures the reads of users.go and
// stream.go and alone needs math/rand and uuid, it leans on four names of main.go:
// preferred, statusAborted, writeBody and writeJSON.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	rateWindow      = 60 // seconds that queries_per_second looks back
	defaultRequests = 100
	maxRequests     = 1000 // reads in one run of /performance
)

// bounds are the histograms' buckets in seconds: a point read takes about one
// millisecond, no page more than 12 s.
var bounds = [...]float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60}

// counters are what the service counts, as in expvar: package state, written
// where things happen and read by collect.
var counters = struct {
	started      time.Time
	inFlight     atomic.Int64 // HTTP requests
	streams      atomic.Int64 // under way at /users/stream
	scans        atomic.Int64 // open iterations of those
	rowsStreamed atomic.Int64 // by those
	queries      atomic.Int64 // to Cassandra, those that found no connection too
	queryErrors  atomic.Int64
	lastAnswer   atomic.Int64 // of Cassandra to a query, in nanoseconds since 1970
	queryRate    rate
	queryTimes   histogram
	routesMu     sync.Mutex
	routes       map[string]*routeStats // by pattern
}{started: time.Now(), routes: map[string]*routeStats{}}

// connections counts those of the global session and of the tries to open one.
var connections countingDialer

// observer is told by the driver of every attempt: a query, a page, a batch.
type observer struct{}

// ObserveQuery implements gocql.QueryObserver.
func (observer) ObserveQuery(_ context.Context, q gocql.ObservedQuery) {
	countQuery(q.Start, q.End, q.Err)
}

// ObserveBatch implements gocql.BatchObserver.
func (observer) ObserveBatch(_ context.Context, b gocql.ObservedBatch) {
	countQuery(b.Start, b.End, b.Err)
}

// countQuery counts a request to Cassandra that was sent.
func countQuery(start, end time.Time, err error) {
	counters.queryTimes.observe(end.Sub(start))
	countOutcome(end, err)
	if err == nil {
		counters.lastAnswer.Store(end.UnixNano())
	}
}

// countUnsent counts one that found no connection; no observer is told of it.
func countUnsent(err error) { countOutcome(time.Now(), err) }

func countOutcome(at time.Time, err error) {
	counters.queries.Add(1)
	counters.queryRate.add(at)
	if err != nil && !errors.Is(err, context.Canceled) { // a client that left is no failure
		counters.queryErrors.Add(1)
	}
}

// routeStats are the requests of one route.
type routeStats struct {
	statuses [600]atomic.Int64 // by HTTP status; statusAborted is one too
	times    histogram
}

// statsOf returns the one routeStats of a pattern.
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
	buckets [len(bounds) + 1]atomic.Int64 // each with what lies above the bound before
	nanos   atomic.Int64                  // the sum
}

func (h *histogram) observe(d time.Duration) {
	i, _ := slices.BinarySearch(bounds[:], d.Seconds())
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// cumulative returns for each bound, and at last for all, how many lie at or
// below it.
func (h *histogram) cumulative() (counts [len(bounds) + 1]int64) {
	var sum int64
	for i := range h.buckets {
		sum += h.buckets[i].Load()
		counts[i] = sum
	}
	return counts
}

// quantile estimates the duration in milliseconds below which the share q lies,
// as Prometheus does: evenly spread within a bucket.
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
	slots [rateWindow]atomic.Uint64 // unix second in the upper half, count in the lower
}

func (r *rate) add(at time.Time) {
	second := uint64(at.Unix())
	slot := &r.slots[second%rateWindow]
	for {
		old := slot.Load()
		fresh := old + 1
		if old>>32 != second {
			fresh = second<<32 + 1
		}
		if slot.CompareAndSwap(old, fresh) {
			return
		}
	}
}

// perSecond is the mean of the last rateWindow seconds, or since start.
func (r *rate) perSecond(start, at time.Time) float64 {
	var sum uint64
	for i := range r.slots {
		if slot := r.slots[i].Load(); at.Unix()-int64(slot>>32) < rateWindow {
			sum += slot & math.MaxUint32
		}
	}
	return float64(sum) / min(max(at.Sub(start).Seconds(), 1), rateWindow)
}

// countingDialer dials for the driver, which tells nobody when it closes a
// connection.
type countingDialer struct {
	open, opened, failed atomic.Int64
}

// DialContext implements gocql.Dialer.
func (d *countingDialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		d.failed.Add(1)
		return nil, err
	}
	d.open.Add(1)
	d.opened.Add(1)
	return &countedConn{TCPConn: conn.(*net.TCPConn), dialer: d}, nil
}

// countedConn embeds the concrete type, so that the driver can still use writev.
type countedConn struct {
	*net.TCPConn
	dialer *countingDialer
	once   sync.Once
}

// Close closes the connection and counts that once.
func (c *countedConn) Close() error {
	c.once.Do(func() { c.dialer.open.Add(-1) })
	return c.TCPConn.Close()
}

// metrics is the answer of GET /metrics.
type metrics struct {
	TotalQueries         int64                       `json:"total_queries"`
	ActiveConnections    int64                       `json:"active_connections"`
	QueriesPerSecond     float64                     `json:"queries_per_second"`
	AverageQueryTimeMS   float64                     `json:"average_query_time_ms"`
	ErrorsCount          int64                       `json:"errors_count"`
	TotalRequests        int64                       `json:"total_requests"`
	RequestsInFlight     int64                       `json:"requests_in_flight"`
	RequestsByRoute      map[string]map[string]int64 `json:"requests_by_route"`
	QueryPerformance     percentiles                 `json:"query_performance"`
	CassandraConnections connectionCounts            `json:"cassandra_connections"`
	StreamsActive        int64                       `json:"streams_active"`
	RowsStreamed         int64                       `json:"rows_streamed"`
	Goroutines           int                         `json:"goroutines"`
	MemoryBytes          uint64                      `json:"memory_bytes"`
	UptimeSeconds        float64                     `json:"uptime_seconds"`
	scansOpen            int64                       // in Prometheus' text only
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

// getMetrics answers GET /metrics.
func getMetrics(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Vary", "Accept")
	m := collect()
	if preferred(r, "application/json", "text/plain", "application/openmetrics-text") == "application/json" {
		return writeJSON(w, http.StatusOK, m)
	}
	return writeBody(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", m.prometheus())
}

func collect() metrics {
	m := metrics{
		TotalQueries:         counters.queries.Load(),
		ActiveConnections:    connections.open.Load(),
		QueriesPerSecond:     counters.queryRate.perSecond(counters.started, time.Now()),
		ErrorsCount:          counters.queryErrors.Load(),
		RequestsInFlight:     counters.inFlight.Load(),
		RequestsByRoute:      map[string]map[string]int64{},
		QueryPerformance:     percentiles{counters.queryTimes.quantile(.5), counters.queryTimes.quantile(.95), counters.queryTimes.quantile(.99)},
		CassandraConnections: connectionCounts{connections.open.Load(), connections.opened.Load(), connections.failed.Load()},
		StreamsActive:        counters.streams.Load(),
		scansOpen:            counters.scans.Load(),
		RowsStreamed:         counters.rowsStreamed.Load(),
		Goroutines:           runtime.NumGoroutine(),
		MemoryBytes:          memoryBytes(),
		UptimeSeconds:        time.Since(counters.started).Seconds(),
	}
	if sent := counters.queryTimes.cumulative()[len(bounds)]; sent > 0 {
		m.AverageQueryTimeMS = milliseconds(time.Duration(counters.queryTimes.nanos.Load() / sent))
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

// memoryBytes is what the Go runtime has from the system, less what it gave back.
func memoryBytes() uint64 {
	samples := []runtimemetrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	runtimemetrics.Read(samples)
	return samples[0].Value.Uint64() - samples[1].Value.Uint64()
}

// prometheus writes the metrics in the text format 0.0.4, the times as the
// histograms that JSON has percentiles of.
func (m metrics) prometheus() []byte {
	var out bytes.Buffer
	head := func(name, kind, help string) {
		fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	value := func(name, kind, help string, v float64) {
		head(name, kind, help)
		fmt.Fprintf(&out, "%s %g\n", name, v)
	}
	value("cassandra_queries_total", "counter", "Requests to Cassandra; a page counts one.", float64(m.TotalQueries))
	value("cassandra_query_errors_total", "counter", "Requests to Cassandra that failed.", float64(m.ErrorsCount))
	value("cassandra_queries_per_second", "gauge", "Requests to Cassandra in the last 60 s, per second.", m.QueriesPerSecond)
	value("cassandra_connections_open", "gauge", "Open connections to Cassandra.", float64(m.CassandraConnections.Open))
	value("cassandra_connections_opened_total", "counter", "Connections to Cassandra opened so far.", float64(m.CassandraConnections.Opened))
	value("cassandra_connections_failed_total", "counter", "Dials to Cassandra that failed.", float64(m.CassandraConnections.Failed))
	value("http_requests_in_flight", "gauge", "HTTP requests being answered.", float64(m.RequestsInFlight))
	value("streams_active", "gauge", "Streams of users under way.", float64(m.StreamsActive))
	value("scans_open", "gauge", "Iterations over users that have not ended.", float64(m.scansOpen))
	value("rows_streamed_total", "counter", "Users sent by streams.", float64(m.RowsStreamed))
	value("goroutines", "gauge", "Goroutines of the process.", float64(m.Goroutines))
	value("memory_bytes", "gauge", "Memory the process has from the system.", float64(m.MemoryBytes))
	value("uptime_seconds", "gauge", "Time since the process started.", m.UptimeSeconds)

	head("http_requests_total", "counter", "HTTP requests answered, by route and status.")
	for _, pattern := range slices.Sorted(maps.Keys(m.RequestsByRoute)) {
		for _, status := range slices.Sorted(maps.Keys(m.RequestsByRoute[pattern])) {
			fmt.Fprintf(&out, "http_requests_total{route=%q,status=%q} %d\n", pattern, status, m.RequestsByRoute[pattern][status])
		}
	}
	head("http_request_duration_seconds", "histogram", "Time to answer HTTP requests, by route.")
	for _, pattern := range slices.Sorted(maps.Keys(m.RequestsByRoute)) {
		statsOf(pattern).times.prometheus(&out, "http_request_duration_seconds", fmt.Sprintf("route=%q", pattern))
	}
	head("cassandra_query_duration_seconds", "histogram", "Time of requests to Cassandra that were sent.")
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

// performance is the answer of GET /performance/async and /performance/sync.
type performance struct {
	Mode               string  `json:"mode"`
	Requests           int     `json:"requests"`
	SuccessfulRequests int     `json:"successful_requests"`
	FailedRequests     int     `json:"failed_requests"`
	TotalTime          float64 `json:"total_time"`
	RequestsPerSecond  float64 `json:"requests_per_second"`
	AvgTimePerRequest  float64 `json:"avg_time_per_request"`
	percentiles
}

// measure answers GET /performance/{mode}: it runs N reads of single users and
// says how long they took.
func measure(mode string, run func(n int, do func(i int))) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		params := &parameters{query: r.URL.RawQuery}
		n := params.number("requests", defaultRequests, 1, maxRequests)
		if err := params.err(); err != nil {
			return err
		}
		ctx := r.Context()
		ids, err := someIDs(ctx)
		if err != nil {
			return err
		}
		times, failures := make([]time.Duration, n), make([]bool, n)
		start := time.Now()
		run(n, func(i int) {
			if ctx.Err() != nil {
				return
			}
			began := time.Now()
			_, err := readUser(ctx, ids[rand.IntN(len(ids))])
			_, missing := errors.AsType[*problem](err)
			times[i], failures[i] = time.Since(began), err != nil && !missing
		})
		if ctx.Err() != nil {
			return fmt.Errorf("measuring: %w", ctx.Err())
		}
		return writeJSON(w, http.StatusOK, summarize(mode, time.Since(start), times, failures))
	}
}

func runAtOnce(n int, do func(i int)) {
	var reads sync.WaitGroup
	for i := range n {
		reads.Go(func() { do(i) })
	}
	reads.Wait()
}

func runInTurn(n int, do func(i int)) {
	for i := range n {
		do(i)
	}
}

func summarize(mode string, total time.Duration, times []time.Duration, failures []bool) performance {
	slices.Sort(times)
	n := len(times)
	p := performance{Mode: mode, Requests: n, TotalTime: total.Seconds(), RequestsPerSecond: float64(n) / total.Seconds(), AvgTimePerRequest: total.Seconds() / float64(n)}
	for _, failure := range failures {
		if failure {
			p.FailedRequests++
		}
	}
	p.SuccessfulRequests = n - p.FailedRequests
	rank := func(percent int) float64 { return milliseconds(times[(n*percent+99)/100-1]) }
	p.percentiles = percentiles{rank(50), rank(95), rank(99)}
	return p
}

// someIDs returns the ids of the first page of the table, or a random one while
// it is empty.
func someIDs(ctx context.Context) ([]uuid.UUID, error) {
	page, err := newScan(noAgeFilter, unlimited).fetch(ctx, maxRequests)
	if err != nil {
		return nil, err
	}
	row := newUserRow()
	ids := []uuid.UUID{}
	for page.rows.Scan(row.dest...) {
		ids = append(ids, uuid.UUID(row.id))
	}
	if len(ids) == 0 {
		ids = append(ids, uuid.New())
	}
	return ids, failed(read, page.rows.Close(), "reading ids")
}
