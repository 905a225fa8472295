// This file lets the service test itself: that a failed query, a broken or
// cancelled stream or a nested session never harms the one session that serves
// everybody, and that slow requests end at their deadline. Each self-test does
// what it says against Cassandra, in a scratch table of its own, and answers
// what it observed; each verdict is a pure function of observations.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxHeavy     = 4               // self-tests and performance runs at work at once
	closeTimeout = 5 * time.Second // for the connections of a closed session to be gone
)

const (
	createScratchTable = `CREATE TABLE IF NOT EXISTS "%s".scratch (run uuid, n int, name text, age int, PRIMARY KEY (run, n)) WITH default_time_to_live = 600`
	insertScratch      = `INSERT INTO scratch (run, n, name, age) VALUES (?, ?, ?, ?)`
	selectScratch      = `SELECT name, age FROM scratch WHERE run = ?`
	selectOfAge        = `SELECT name, age FROM scratch WHERE run = ? AND age = ? ALLOW FILTERING`
	selectNowhere      = `SELECT name, age FROM non_existent_table_xyz`
	selectClusterName  = `SELECT cluster_name FROM system.local WHERE key = 'local'`
)

// takingTurns lets n requests of the handlers that it wraps work at once; the
// others wait within their deadline.
func takingTurns(n int) func(handler) handler {
	turns := make(chan struct{}, n)
	return func(h handler) handler {
		return func(w http.ResponseWriter, r *http.Request) error {
			select {
			case turns <- struct{}{}:
				defer func() { <-turns }()
				return h(w, r)
			case <-r.Context().Done():
				return fmt.Errorf("waiting for a turn: %w", r.Context().Err())
			}
		}
	}
}

// slowQuery answers GET /slow_query and /long_running_query after d and one real
// query, unless the deadline passes or the client leaves first.
func slowQuery(d time.Duration, message string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		start := time.Now()
		pause(r.Context(), d)
		if err := r.Context().Err(); err != nil {
			return fmt.Errorf("taking %s: %w", d, err)
		}
		if _, err := readOne(r.Context(), selectVersion); err != nil {
			return err
		}
		return writeJSON(w, http.StatusOK, struct {
			Message  string  `json:"message"`
			Duration float64 `json:"duration"` // seconds
		}{message, time.Since(start).Seconds()})
	}
}

// readOne reads the one text value of a statement without parameters.
func readOne(ctx context.Context, statement string) (value string, err error) {
	db, err := currentSession()
	if err != nil {
		return "", err
	}
	err = db.Query(statement).WithContext(ctx).Scan(&value)
	return value, failed(read, err, "running %s", statement)
}

// sessionState is what a self-test sees of the global session, before and after.
type sessionState struct {
	number int64
	open   bool
}

func observeSession() sessionState {
	s, err := currentSession()
	if err != nil {
		return sessionState{}
	}
	return sessionState{number: s.number, open: !s.Closed()}
}

// sameAs is the verdict session_unchanged: still the one there was, and open.
func (after sessionState) sameAs(before sessionState) bool {
	return after.open && before.open && after.number == before.number
}

// report answers with what a self-test observed, unless its time was up or one
// of errs says that Cassandra was not there: that tells nothing of the session,
// while finding it closed does.
func report(w http.ResponseWriter, r *http.Request, observed any, errs ...error) error {
	for _, err := range append(errs, r.Context().Err()) {
		if err != nil && !errors.Is(err, gocql.ErrSessionClosed) {
			return fmt.Errorf("testing: %w", err)
		}
	}
	return writeJSON(w, http.StatusOK, observed)
}

// queryErrorReport is the answer of testQueryError.
type queryErrorReport struct {
	Test              string `json:"test"`
	ErrorCaught       string `json:"error_caught"`
	SessionUnchanged  bool   `json:"session_unchanged"`
	SessionOpen       bool   `json:"session_open"`
	SessionStillWorks bool   `json:"session_still_works"`
	CassandraVersion  string `json:"cassandra_version"`
}

// testQueryError answers POST /context_manager_safety/query_error: a query on a
// table that does not exist, then a valid one.
func testQueryError(w http.ResponseWriter, r *http.Request) error {
	before := observeSession()
	_, caught := readOne(r.Context(), selectNowhere)
	if !isRefusal(caught) {
		return unexpected(caught)
	}
	release, err := readOne(r.Context(), selectVersion)
	after := observeSession()
	return report(w, r, queryErrorReport{
		Test:              "query_error",
		ErrorCaught:       caught.Error(),
		SessionUnchanged:  after.sameAs(before),
		SessionOpen:       after.open,
		SessionStillWorks: err == nil,
		CassandraVersion:  release,
	}, err)
}

// isRefusal reports that Cassandra was there and refused the statement.
func isRefusal(err error) bool {
	var refused gocql.RequestError
	return errors.As(err, &refused) && refused.Code() == gocql.ErrCodeInvalid
}

// unexpected is the error of a self-test that could not break what it meant to.
func unexpected(err error) error {
	if err == nil {
		return errors.New("the table non_existent_table_xyz exists")
	}
	return err
}

// streamingErrorReport is the answer of testStreamingError.
type streamingErrorReport struct {
	Test                 string `json:"test"`
	StreamingErrorCaught bool   `json:"streaming_error_caught"`
	ErrorMessage         string `json:"error_message"`
	SessionUnchanged     bool   `json:"session_unchanged"`
	SessionOpen          bool   `json:"session_open"`
	SessionStillStreams  bool   `json:"session_still_streams"`
	StreamCompleted      bool   `json:"stream_completed"`
	RowsAfterError       int    `json:"rows_after_error"`
}

// testStreamingError answers POST /context_manager_safety/streaming_error: a
// stream over a table that does not exist, then a real one of 20 rows.
func testStreamingError(w http.ResponseWriter, r *http.Request) error {
	ctx := r.Context()
	before := observeSession()
	t, err := newScratch(ctx, slices.Repeat([]int{20}, 20))
	if err != nil {
		return err
	}
	_, caught := t.stream(ctx, t.pages(selectNowhere), nil)
	if !isRefusal(caught) {
		return unexpected(caught)
	}
	rows, err := t.stream(ctx, t.pages(selectScratch, t.run), nil)
	after := observeSession()
	return report(w, r, streamingErrorReport{
		Test:                 "streaming_error",
		StreamingErrorCaught: caught != nil,
		ErrorMessage:         caught.Error(),
		SessionUnchanged:     after.sameAs(before),
		SessionOpen:          after.open,
		SessionStillStreams:  len(rows) > 0,
		StreamCompleted:      err == nil && len(rows) == 20,
		RowsAfterError:       len(rows),
	}, err)
}

// observedStream is one of the three streams of testConcurrentStreams.
type observedStream struct {
	Age       int          `json:"age"`
	Count     int          `json:"count"`
	Users     []scratchRow `json:"users"`
	firstPage time.Time
	ended     time.Time
}

// concurrentReport is the answer of testConcurrentStreams.
type concurrentReport struct {
	Test                  string           `json:"test"`
	StreamsCompleted      int              `json:"streams_completed"`
	AllStreamsIndependent bool             `json:"all_streams_independent"`
	Results               []observedStream `json:"results"`
	SessionStillOpen      bool             `json:"session_still_open"`
}

// testConcurrentStreams answers POST /context_manager_safety/concurrent_streams:
// three streams at once, one for each age, over the same 30 rows. Each waits
// after its first page until all have theirs.
func testConcurrentStreams(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	ages := []int{20, 30, 40}
	t, err := newScratch(ctx, slices.Repeat(ages, 10))
	if err != nil {
		return err
	}
	streams, errs := make([]observedStream, len(ages)), make([]error, len(ages))
	var arrived, running sync.WaitGroup
	arrived.Add(len(ages))
	for i, age := range ages {
		running.Go(func() {
			meet := sync.OnceFunc(arrived.Done)
			defer meet() // a stream that fails early must not keep the others waiting
			streams[i].Age = age
			streams[i].Users, errs[i] = t.stream(ctx, t.pages(selectOfAge, t.run, age), sync.OnceFunc(func() {
				streams[i].firstPage = time.Now()
				meet()
				arrived.Wait()
			}))
			streams[i].Count, streams[i].ended = len(streams[i].Users), time.Now()
		})
	}
	running.Wait()
	return report(w, r, concurrentReport{
		Test:                  "concurrent_streams",
		StreamsCompleted:      completed(errs),
		AllStreamsIndependent: areIndependent(streams),
		Results:               streams,
		SessionStillOpen:      observeSession().open,
	}, errs...)
}

// completed counts the streams that ended without an error.
func completed(errs []error) (n int) {
	for _, err := range errs {
		if err == nil {
			n++
		}
	}
	return n
}

// areIndependent is the verdict all_streams_independent: every stream had begun
// before the first one ended, and each saw its own ten rows and no other.
func areIndependent(streams []observedStream) bool {
	for _, s := range streams {
		if len(s.Users) != 10 || slices.ContainsFunc(s.Users, func(row scratchRow) bool { return row.Age != s.Age }) {
			return false
		}
		if slices.ContainsFunc(streams, func(other observedStream) bool { return !s.firstPage.Before(other.ended) }) {
			return false
		}
	}
	return true
}

// nestedReport is the answer of testNestedContexts.
type nestedReport struct {
	Test                  string   `json:"test"`
	Events                []string `json:"events"`
	CorrectOrder          bool     `json:"correct_order"`
	RowCount              int      `json:"row_count"`
	MainSessionUnaffected bool     `json:"main_session_unaffected"`
}

// nestedOrder is how the events of testNestedContexts follow one another where
// nothing that is closed takes with it what it was opened in.
var nestedOrder = []string{
	"cluster_opened", "session_opened", "stream_opened", "stream_closed", "session_works_after_stream:5", "session_closing",
	"session_closed", "cluster_works_after_session:True", "cluster_closing", "cluster_closed",
}

// areInOrder is the verdict correct_order.
func areInOrder(events []string) bool { return slices.Equal(events, nestedOrder) }

// testNestedContexts answers POST /context_manager_safety/nested_contexts: a
// cluster, a session in it, a stream in that, closed innermost first. A cluster
// is a driver configuration whose dialer counts its connections.
func testNestedContexts(w http.ResponseWriter, r *http.Request) error {
	ctx := r.Context()
	before := observeSession()
	t, err := newScratch(ctx, slices.Repeat([]int{20}, 5))
	if err != nil {
		return err
	}
	n := nested{scratch: t}
	if err := n.openCluster(ctx); err != nil {
		return err
	}
	_, err = readOne(ctx, selectVersion)
	return report(w, r, nestedReport{
		Test:                  "nested_contexts",
		Events:                n.events,
		CorrectOrder:          areInOrder(n.events),
		RowCount:              n.rows,
		MainSessionUnaffected: observeSession().sameAs(before) && err == nil,
	}, err)
}

// nested is the state of testNestedContexts: what happened so far.
type nested struct {
	*scratch
	dialer countingDialer
	events []string
	rows   int
}

func (n *nested) happened(event string, args ...any) {
	n.events = append(n.events, fmt.Sprintf(event, args...))
}

// openCluster opens the outermost context, and in it the others.
func (n *nested) openCluster(ctx context.Context) error {
	probe := func() error { return n.inSession(ctx, func(*gocql.Session) error { return nil }) }
	if err := probe(); err != nil {
		return err
	}
	n.happened("cluster_opened")
	if err := n.inSession(ctx, func(s *gocql.Session) error { return n.openSession(ctx, s) }); err != nil {
		return err
	}
	if err := probe(); err != nil {
		return err
	}
	n.happened("cluster_works_after_session:True")
	n.happened("cluster_closing")
	if waitUntil(func() bool { return n.dialer.open.Load() == 0 }, closeTimeout) {
		n.happened("cluster_closed")
	}
	return nil
}

// inSession runs do with a session of the cluster that has answered a query.
func (n *nested) inSession(ctx context.Context, do func(*gocql.Session) error) error {
	cfg := global.cluster.config(&n.dialer)
	cfg.Keyspace = global.cluster.keyspace
	s, err := createSession(ctx, cfg)
	if err != nil {
		return failed(read, err, "opening a nested session")
	}
	defer closeSession(s)
	if err := s.Query(selectVersion).WithContext(ctx).Exec(); err != nil {
		return failed(read, err, "asking a nested session")
	}
	return do(s)
}

func (n *nested) openSession(ctx context.Context, s *gocql.Session) error {
	n.happened("session_opened")
	inner := &scratch{db: s, run: n.run}
	rows, err := inner.stream(ctx, inner.pages(selectScratch, n.run), sync.OnceFunc(func() { n.happened("stream_opened") }))
	if err != nil {
		return err
	}
	n.rows = len(rows)
	if inner.allEnded() {
		n.happened("stream_closed")
	}
	again, err := inner.stream(ctx, inner.pages(selectScratch, n.run), nil)
	if err != nil {
		return err
	}
	n.happened("session_works_after_stream:%d", len(again))
	n.happened("session_closing")
	closeSession(s)
	if s.Closed() {
		n.happened("session_closed")
	}
	return nil
}

// cancellationReport is the answer of testCancellation.
type cancellationReport struct {
	Test                      string `json:"test"`
	RowsProcessedBeforeCancel int    `json:"rows_processed_before_cancel"`
	WasCancelled              bool   `json:"was_cancelled"`
	ErrorType                 string `json:"error_type"`
	CleanedUp                 bool   `json:"cleaned_up"`
	SessionStillWorks         bool   `json:"session_still_works"`
	SessionOpen               bool   `json:"session_open"`
	NewStreamWorked           bool   `json:"new_stream_worked"`
	TotalRows                 int    `json:"total_rows"`
}

// testCancellation answers POST /context_manager_safety/cancellation: a stream
// of 50 rows whose context ends after its first page, then a new one.
func testCancellation(w http.ResponseWriter, r *http.Request) error {
	const total = 50
	t, err := newScratch(r.Context(), slices.Repeat([]int{20}, total))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	processed, cancelled := t.stream(ctx, t.pages(selectScratch, t.run), cancel)
	all, err := t.stream(r.Context(), t.pages(selectScratch, t.run), nil)
	_, queryErr := readOne(r.Context(), selectVersion)
	return report(w, r, cancellationReport{
		Test:                      "cancellation",
		RowsProcessedBeforeCancel: len(processed),
		WasCancelled:              wasCancelled(cancelled, len(processed), total),
		ErrorType:                 rootOf(cancelled),
		CleanedUp:                 t.allEnded(),
		SessionStillWorks:         queryErr == nil,
		SessionOpen:               observeSession().open,
		NewStreamWorked:           err == nil && len(all) == total,
		TotalRows:                 len(all),
	}, err, queryErr)
}

// wasCancelled is the verdict was_cancelled: the context's end, and nothing
// else, kept the stream from the rest of its rows.
func wasCancelled(err error, processed, total int) bool {
	return errors.Is(err, context.Canceled) && processed < total
}

// rootOf is the innermost error's text: "context canceled".
func rootOf(err error) string {
	for ; errors.Unwrap(err) != nil; err = errors.Unwrap(err) {
	}
	return fmt.Sprint(err)
}

// safetyStatus is the answer of GET /context_manager_safety/status.
type safetyStatus struct {
	SessionOpen bool   `json:"session_open"`
	SessionID   string `json:"session_id"`
	ClusterOpen bool   `json:"cluster_open"`
	ClusterID   string `json:"cluster_id"`
	Keyspace    string `json:"keyspace"`
}

// getSafetyStatus answers GET /context_manager_safety/status.
func getSafetyStatus(w http.ResponseWriter, r *http.Request) error {
	cluster, err := readOne(r.Context(), selectClusterName)
	if err != nil {
		return err
	}
	state := observeSession()
	return writeJSON(w, http.StatusOK, safetyStatus{
		SessionOpen: state.open,
		SessionID:   fmt.Sprint(state.number),
		ClusterOpen: connections.open.Load() > 0,
		ClusterID:   cluster,
		Keyspace:    global.cluster.keyspace,
	})
}

// scratch is the part of the scratch table that one run of a self-test has to
// itself, and how many iterations it has open there.
type scratch struct {
	db   *gocql.Session
	run  gocql.UUID
	open atomic.Int64
}

// allEnded is the verdict cleaned_up.
func (t *scratch) allEnded() bool { return t.open.Load() == 0 }

// scratchRow is a row of the scratch table.
type scratchRow struct {
	Name string `json:"name"`
	Age  int    `json:"age"`
}

// newScratch fills a new run with a row for each age. They go by themselves
// after the table's time to live.
func newScratch(ctx context.Context, ages []int) (*scratch, error) {
	s, err := currentSession()
	if err != nil {
		return nil, err
	}
	t := &scratch{db: s.Session, run: gocql.UUID(uuid.New())}
	batch := t.db.NewBatch(gocql.UnloggedBatch).WithContext(ctx) // one partition: atomic as it is
	for n, age := range ages {
		batch.Query(insertScratch, t.run, n, fmt.Sprintf("user %d", n), age)
	}
	err = t.db.ExecuteBatch(batch)
	return t, failed(read, err, "filling the scratch table") // not write: rows half written harm nobody
}

// pages fetches the rows of a statement, 5 a page.
func (t *scratch) pages(statement string, values ...any) nextPage {
	var state []byte
	return func(ctx context.Context) (page, error) {
		rows := t.db.Query(statement, values...).WithContext(ctx).PageSize(5).PageState(state).Iter()
		if rows.NumRows() == 0 {
			if err := rows.Close(); err != nil {
				return page{}, failed(read, err, "reading a page of the scratch table")
			}
		}
		state = rows.PageState()
		return page{rows: rows, more: len(state) > 0}, nil
	}
}

// stream reads all pages, calling afterPage, if it is not nil, after each.
func (t *scratch) stream(ctx context.Context, pages nextPage, afterPage func()) ([]scratchRow, error) {
	rows := []scratchRow{}
	for page, err := range pagesAhead(ctx, &t.open, alone(pages)) {
		if err != nil {
			return rows, err
		}
		var row scratchRow
		for page.Scan(&row.Name, &row.Age) {
			rows = append(rows, row)
		}
		if err := page.Close(); err != nil {
			return rows, failed(read, err, "streaming the scratch table")
		}
		if afterPage != nil {
			afterPage()
		}
	}
	return rows, nil
}
