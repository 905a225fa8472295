// This file holds the self-tests, which show that a failed query, a failed or cancelled stream, or a nested session
// never harms the global session. It also holds the slow requests and the measurement of concurrent reads.

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxSelfTests    = 4               // concurrent self-tests and performance runs
	closeTimeout    = 5 * time.Second // for a nested session, and its connections, to close
	scratchPage     = 5               // rows
	defaultRequests = 100             // reads in a performance run
	maxRequests     = 1000

	createScratchTable = `CREATE TABLE IF NOT EXISTS "%s".scratch
		(run uuid, n int, name text, age int, PRIMARY KEY (run, n)) WITH default_time_to_live = 600`
	selectIDs         = `SELECT id FROM users LIMIT 1000`
	insertScratch     = `INSERT INTO scratch (run, n, name, age) VALUES (?, ?, ?, ?)`
	selectScratch     = `SELECT name, age FROM scratch WHERE run = ?`
	selectOfAge       = `SELECT name, age FROM scratch WHERE run = ? AND age = ? ALLOW FILTERING`
	selectMissing     = `SELECT name, age FROM non_existent_table_xyz`
	selectVersion     = `SELECT release_version FROM system.local WHERE key = 'local'`
	selectClusterName = `SELECT cluster_name FROM system.local WHERE key = 'local'`
)

var selfTests = make(gate, maxSelfTests)

// performance is the response of GET /performance/async and /performance/sync.
type performance struct {
	Mode               string  `json:"mode"`
	Requests           int     `json:"requests"`
	SuccessfulRequests int     `json:"successful_requests"`
	FailedRequests     int     `json:"failed_requests"`
	TotalTime          float64 `json:"total_time"` // seconds
	RequestsPerSecond  float64 `json:"requests_per_second"`
	AvgTimePerRequest  float64 `json:"avg_time_per_request"` // total time divided by requests
	percentiles
}

// measure handles GET /performance/{mode}: it reads single users, concurrently or one at a time.
func measure(mode string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		params := newParameters(r)
		n := params.number("requests", defaultRequests, 1, maxRequests)
		if params.err != nil {
			return params.err
		}
		ctx := r.Context()
		ids, err := someIDs(ctx)
		if err != nil {
			return err
		}
		times := make([]time.Duration, n)
		var failed atomic.Int64
		var reads sync.WaitGroup
		start := time.Now()
		for i := 0; i < n && ctx.Err() == nil; i++ {
			reads.Go(func() {
				began := time.Now()
				_, err := readUser(ctx, ids[rand.IntN(len(ids))], false)
				times[i] = time.Since(began)
				if err != nil && !errors.Is(err, errNoUser) {
					failed.Add(1)
				}
			})
			if mode == "sync" {
				reads.Wait()
			}
		}
		reads.Wait()
		if ctx.Err() != nil {
			return fmt.Errorf("measuring: %w", ctx.Err())
		}
		return writeJSON(w, http.StatusOK, summarize(mode, time.Since(start), times, int(failed.Load())))
	}
}

// someIDs returns the ids of the first users of the table, or a random one if it is empty.
func someIDs(ctx context.Context) (ids []uuid.UUID, err error) {
	var id gocql.UUID
	rows := currentSession().Query(selectIDs).WithContext(ctx).RoutingKey([]byte(selectIDs)).Iter()
	for rows.Scan(&id) {
		ids = append(ids, uuid.UUID(id))
	}
	if ids == nil {
		ids = append(ids, uuid.New())
	}
	return ids, queryErrorf(read, rows.Close(), "reading ids")
}

func summarize(mode string, total time.Duration, times []time.Duration, failed int) performance {
	slices.Sort(times)
	n := len(times)
	percentile := func(percent int) float64 { return milliseconds(times[(n*percent+99)/100-1]) }
	return performance{
		Mode: mode, Requests: n, SuccessfulRequests: n - failed, FailedRequests: failed, TotalTime: total.Seconds(),
		RequestsPerSecond: float64(n) / total.Seconds(), AvgTimePerRequest: total.Seconds() / float64(n),
		percentiles: percentiles{percentile(50), percentile(95), percentile(99)},
	}
}

// slowQuery handles GET /slow_query and /long_running_query: it waits, then runs a real query, unless the deadline
// passes or the client leaves first.
func slowQuery(d time.Duration, message string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		start := time.Now()
		sleep(r.Context(), d)
		if err := r.Context().Err(); err != nil {
			return fmt.Errorf("waiting %s: %w", d, err)
		}
		if _, err := readValue(r.Context(), selectVersion); err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, map[string]any{"message": message, "duration": time.Since(start).Seconds()})
	}
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}

// readValue returns the one text value that a statement selects.
func readValue(ctx context.Context, statement string) (value string, err error) {
	query := currentSession().Query(statement).WithContext(ctx).RoutingKey([]byte(statement)) // see scan.read
	err = query.Consistency(gocql.One).Scan(&value)
	return value, queryErrorf(read, err, "running %s", statement)
}

// sessionState is what a self-test observes of the global session.
type sessionState struct {
	number int64
	open   bool
}

func observeSession() sessionState {
	s := currentSession()
	return sessionState{number: counters.sessions.Load(), open: s != nil && !s.Closed()}
}

// unchangedSince reports whether it is still the same open session.
func (s sessionState) unchangedSince(before sessionState) bool { return s.open && s == before }

var errNoRefusal = errors.New("the query on non_existent_table_xyz was not refused as invalid")

// testQueryError handles POST /context_manager_safety/query_error: a query on a missing table, then a valid one.
func testQueryError(w http.ResponseWriter, r *http.Request) error {
	before := observeSession()
	_, caught := readValue(r.Context(), selectMissing)
	if codeOf(caught) != gocql.ErrCodeInvalid {
		return errors.Join(caught, errNoRefusal)
	}
	release, err := readValue(r.Context(), selectVersion)
	if err != nil {
		return err
	}
	after := observeSession()
	return writeJSON(w, http.StatusOK, map[string]any{
		"test": "query_error", "error_caught": caught.Error(), "cassandra_version": release,
		"session_still_works": release != "",
		"session_unchanged":   after.unchangedSince(before), "session_open": after.open,
	})
}

// testStreamingError handles POST /context_manager_safety/streaming_error: a stream that fails, then one of 20 rows.
func testStreamingError(w http.ResponseWriter, r *http.Request) error {
	ctx, before := r.Context(), observeSession()
	t, err := newScratch(ctx, slices.Repeat([]int{20}, 20))
	if err != nil {
		return err
	}
	_, caught := t.stream(ctx, nil, selectMissing)
	if codeOf(caught) != gocql.ErrCodeInvalid {
		return errors.Join(caught, errNoRefusal)
	}
	rows, err := t.stream(ctx, nil, selectScratch, t.run)
	if err != nil {
		return err
	}
	after := observeSession()
	return writeJSON(w, http.StatusOK, map[string]any{
		"test": "streaming_error", "streaming_error_caught": caught != nil, "error_message": caught.Error(),
		"session_unchanged": after.unchangedSince(before), "session_open": after.open, "session_still_streams": len(rows) > 0,
		"stream_completed": len(rows) == 20, "rows_after_error": len(rows),
	})
}

// ageStream is one of the three streams of testConcurrentStreams.
type ageStream struct {
	Age              int          `json:"age"`
	Count            int          `json:"count"`
	Users            []scratchRow `json:"users"`
	firstPage, ended time.Time
}

// testConcurrentStreams handles POST /context_manager_safety/concurrent_streams: three concurrent streams, one per
// age, over the same 30 rows. Each waits after its first page until all have theirs.
func testConcurrentStreams(w http.ResponseWriter, r *http.Request) error {
	ages := []int{20, 30, 40}
	t, err := newScratch(r.Context(), slices.Repeat(ages, 10))
	if err != nil {
		return err
	}
	streams, errs := make([]ageStream, len(ages)), make([]error, len(ages))
	var arrived, running sync.WaitGroup
	arrived.Add(len(ages))
	for i, age := range ages {
		running.Go(func() {
			arrive := sync.OnceFunc(arrived.Done)
			defer arrive() // a stream that fails early must not block the others
			s := &streams[i]
			s.Age = age
			s.Users, errs[i] = t.stream(r.Context(), sync.OnceFunc(func() {
				s.firstPage = time.Now()
				arrive()
				arrived.Wait()
			}), selectOfAge, t.run, age)
			s.Count, s.ended = len(s.Users), time.Now()
		})
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"test": "concurrent_streams", "streams_completed": len(streams), "all_streams_independent": areIndependent(streams),
		"results": streams, "session_still_open": observeSession().open,
	})
}

// areIndependent reports whether all first pages came before any stream ended, and each stream saw only its ten rows.
func areIndependent(streams []ageStream) bool {
	for _, s := range streams {
		isForeign := func(row scratchRow) bool { return row.Age != s.Age }
		endedBefore := func(other ageStream) bool { return !s.firstPage.Before(other.ended) }
		if len(s.Users) != 10 || slices.ContainsFunc(s.Users, isForeign) || slices.ContainsFunc(streams, endedBefore) {
			return false
		}
	}
	return true
}

// nestedOrder is the order of events if closing an inner resource leaves the outer ones open.
var nestedOrder = []string{
	"cluster_opened", "session_opened", "stream_opened", "stream_closed", "session_works_after_stream:5",
	"session_closing", "session_closed", "cluster_works_after_session:True", "cluster_closing", "cluster_closed",
}

// testNestedContexts handles POST /context_manager_safety/nested_contexts: a cluster, a session in it and a stream in
// that, closed innermost first. The cluster is a driver configuration whose dialer counts its connections.
func testNestedContexts(w http.ResponseWriter, r *http.Request) error {
	before := observeSession()
	t, err := newScratch(r.Context(), slices.Repeat([]int{20}, 5))
	if err != nil {
		return err
	}
	ctx, closeCluster := context.WithCancel(r.Context())
	defer closeCluster()
	var dialer countingDialer
	var events []string
	happened := func(next ...string) { events = append(events, next...) }
	if _, err := openNested(ctx, &dialer); err != nil {
		return err
	}
	happened("cluster_opened")
	rows, err := t.useNestedSession(ctx, &dialer, happened)
	_, errAgain := openNested(ctx, &dialer)
	if err := errors.Join(err, errAgain); err != nil {
		return err
	}
	happened("cluster_works_after_session:True", "cluster_closing")
	closeCluster()
	waitUntil(func() bool { return dialer.open.Load() == 0 || r.Context().Err() != nil }, closeTimeout)
	if dialer.open.Load() == 0 {
		happened("cluster_closed")
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"test": "nested_contexts", "events": events, "correct_order": slices.Equal(events, nestedOrder), "row_count": rows,
		"main_session_unaffected": observeSession().unchangedSince(before),
	})
}

// openNested returns a separate session that has responded to a query and closes when ctx ends.
func openNested(ctx context.Context, dialer *countingDialer) (*gocql.Session, error) {
	s, err := createSession(ctx, global.cluster.config(dialer))
	if err == nil {
		context.AfterFunc(ctx, s.Close)
		err = s.Query(selectVersion).WithContext(ctx).Consistency(gocql.One).Exec()
	}
	return s, queryErrorf(read, err, "opening a nested session")
}

// useNestedSession opens a session, streams in it twice and closes it.
func (t *scratch) useNestedSession(ctx context.Context, d *countingDialer, happened func(...string)) (int, error) {
	session, err := openNested(ctx, d)
	if err != nil {
		return 0, err
	}
	happened("session_opened")
	inner := &scratch{db: session, run: t.run}
	first, err := inner.stream(ctx, sync.OnceFunc(func() { happened("stream_opened") }), selectScratch, t.run)
	if inner.open.Load() == 0 {
		happened("stream_closed")
	}
	again, errAgain := inner.stream(ctx, nil, selectScratch, t.run)
	if err := errors.Join(err, errAgain); err != nil {
		return 0, err
	}
	happened(fmt.Sprintf("session_works_after_stream:%d", len(again)), "session_closing")
	go session.Close()
	if waitUntil(func() bool { return session.Closed() || ctx.Err() != nil }, closeTimeout) {
		happened("session_closed")
	}
	return len(first), ctx.Err()
}

// testCancellation handles POST /context_manager_safety/cancellation: a stream that is cancelled, then a new one.
func testCancellation(w http.ResponseWriter, r *http.Request) error {
	const total = 50
	t, err := newScratch(r.Context(), slices.Repeat([]int{20}, total))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	processed, cancelled := t.stream(ctx, cancel, selectScratch, t.run)
	all, err := t.stream(r.Context(), nil, selectScratch, t.run)
	release, errRelease := readValue(r.Context(), selectVersion)
	if err := errors.Join(err, errRelease); err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"test": "cancellation", "rows_processed_before_cancel": len(processed), "total_rows": len(all),
		"was_cancelled": wasCancelled(cancelled, len(processed), total), "error_type": fmt.Sprint(errors.Unwrap(cancelled)),
		"cleaned_up": t.open.Load() == 0, "session_still_works": release != "", "session_open": observeSession().open,
		"new_stream_worked": len(all) == total,
	})
}

// wasCancelled reports whether a stream ended before its last row because its context was cancelled.
func wasCancelled(err error, processed, total int) bool {
	return errors.Is(err, context.Canceled) && processed < total
}

// getSafetyStatus handles GET /context_manager_safety/status.
func getSafetyStatus(w http.ResponseWriter, r *http.Request) error {
	cluster, err := readValue(r.Context(), selectClusterName)
	if err != nil {
		return err
	}
	state := observeSession()
	return writeJSON(w, http.StatusOK, map[string]any{
		"session_open": state.open, "session_id": fmt.Sprint(state.number), "keyspace": global.cluster.keyspace,
		"cluster_open": counters.connections.open.Load() > 0, "cluster_id": cluster,
	})
}

// scratch is the partition of the scratch table for one run of a self-test, and the number of its open iterations.
type scratch struct {
	db   *gocql.Session
	run  gocql.UUID
	open atomic.Int64
}

type scratchRow struct {
	Name string `json:"name"`
	Age  int    `json:"age"`
}

// newScratch writes a row for each age to a new partition. They expire through the table's TTL.
func newScratch(ctx context.Context, ages []int) (*scratch, error) {
	t := &scratch{db: currentSession(), run: gocql.UUID(uuid.New())}
	batch := t.db.NewBatch(gocql.UnloggedBatch).WithContext(ctx) // atomic, since it has one partition
	for n, age := range ages {
		batch.Bind(insertScratch, values(t.run, n, fmt.Sprintf("user %d", n), age))
	}
	return t, queryErrorf(read, t.db.ExecuteBatch(batch), "writing the scratch table") // as a read: lost rows don't matter
}

// stream reads all rows of a statement page by page. It calls afterPage, if not nil, after each page but the last.
func (t *scratch) stream(ctx context.Context, afterPage func(), statement string, values ...any) ([]scratchRow, error) {
	query := t.db.Query(statement, values...).WithContext(ctx).RoutingKey(t.run[:])
	it := query.PageSize(scratchPage).Prefetch(0).Iter()
	t.open.Add(1)
	defer t.open.Add(-1)
	var rows []scratchRow
	for row := (scratchRow{}); it.Scan(&row.Name, &row.Age); {
		rows = append(rows, row)
		if afterPage != nil && it.WillSwitchPage() {
			afterPage()
		}
	}
	return rows, queryErrorf(read, it.Close(), "streaming the scratch table")
}
