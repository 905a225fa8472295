// Command cassandra-service-go serves users kept in Apache Cassandra over HTTP:
// CRUD, lists, atomic batches, streams of any size, self-tests of its one
// session, health and metrics. It listens at once, finds Cassandra by itself,
// the first time and after every outage, and drains before it ends.
//
// Everything is set by environment variables; loadSettings lists them with
// their defaults. SIGTERM, SIGINT and POST /shutdown drain: /health answers 503
// "draining", other new requests 503, and what is in flight gets its answer. A
// second signal ends the process at once.
//
// This file is the way of a request (route table, middleware, handler, one
// adapter from errors to answers) and the life of the process around it.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const version = "1.0.0"

const (
	maxBody        = 1 << 20                // bytes; a user is under 1 kB, this is for batches
	smallBody      = 64 << 10               // bytes, more than most batches have
	maxLarge       = 64                     // bodies above smallBody received at once: they are held in memory
	maxHeader      = 16 << 10               // bytes; long enough for any page token, 431 beyond
	defaultTimeout = 30 * time.Second       // of a request without X-Request-Timeout
	maxTimeout     = 60 * time.Second       // what X-Request-Timeout is lowered to
	headerTimeout  = 10 * time.Second       // for a request's header to arrive
	idleTimeout    = 2 * time.Minute        // of a kept-alive connection, above that of most load balancers
	writeTimeout   = 30 * time.Second       // for a client to take one write
	sendBuffer     = 64 << 10               // bytes; by default Linux hides a slow reader behind megabytes
	cutTimeout     = 300 * time.Millisecond // for handlers to notice that the drain is over
	gcPercent      = 300                    // a heap of few live megabytes would be collected 40 times a second at 100

	statusClientLeft = 499 // counted, never sent: nobody is there to read it
	statusAborted    = 0   // counted: the answer was cut after its status line
)

// life is the life of the process, as every request sees it.
var life = struct {
	draining atomic.Bool
	stop     chan struct{} // receives what POST /shutdown asks for
}{stop: make(chan struct{}, 1)}

// errShutdown is the cause of a request's cancelled context when the drain's
// time is up.
var errShutdown = errors.New("the service is shutting down")

//go:embed docs
var docs embed.FS

func main() {
	// stop makes a second signal fatal, but it also ends its own context; so run
	// has another, which ends after that.
	signalled, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	ctx, cancel := context.WithCancel(context.Background())
	context.AfterFunc(signalled, func() {
		stop()
		cancel()
	})
	if err := run(ctx, os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "cassandra-service-go:", err)
		os.Exit(1)
	}
}

// run is the service: it serves until ctx ends or POST /shutdown asks for it,
// drains, and returns nil. It fails on a bad setting or a taken address.
func run(ctx context.Context, getenv func(string) string, stderr io.Writer) error {
	cfg, err := loadSettings(getenv)
	if err != nil {
		return err
	}
	slog.SetDefault(slog.New(cfg.logHandler(stderr)))
	debug.SetGCPercent(gcPercent)
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("listening on ADDR: %w", err)
	}
	base, cut := context.WithCancelCause(context.Background())
	defer cut(nil)
	closeCassandra := keepConnected(cfg.cluster)
	defer closeCassandra()
	server := &http.Server{
		Handler:           newRouter(cfg.maxInFlight),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       limitSendBuffer,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	slog.Info("listening", "addr", listener.Addr().String())
	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	case <-life.stop:
	}
	drain(server, cut, cfg)
	return nil
}

// limitSendBuffer keeps the socket's send buffer small, so that a write says
// how fast its client reads.
func limitSendBuffer(ctx context.Context, conn net.Conn) context.Context {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	return ctx
}

// drain turns new requests away while those in flight finish, for at least
// DRAIN_DELAY and at most SHUTDOWN_TIMEOUT; then it cancels the rest and closes
// the listener, which stays open until here so that probes can see "draining".
func drain(server *http.Server, cut context.CancelCauseFunc, cfg settings) {
	life.draining.Store(true)
	start := time.Now()
	slog.Info("draining", "in_flight", counters.inFlight.Load())
	idle := func() bool { return counters.inFlight.Load() == 0 && time.Since(start) >= cfg.drainDelay }
	if !waitUntil(idle, cfg.shutdownTimeout) {
		slog.Warn("cutting what is still in flight", "in_flight", counters.inFlight.Load())
		cut(errShutdown)
		waitUntil(func() bool { return counters.inFlight.Load() == 0 }, cutTimeout)
	}
	ctx, cancel := context.WithTimeout(context.Background(), cutTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		server.Close() // also ends a write that its client does not take
	}
	slog.Info("stopped", "after", time.Since(start).Round(time.Millisecond))
}

// waitUntil polls done until it holds or the timeout has passed.
func waitUntil(done func() bool, timeout time.Duration) bool {
	for deadline := time.Now().Add(timeout); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// settings are what the environment says.
type settings struct {
	addr            string
	cluster         cluster
	maxInFlight     int
	drainDelay      time.Duration
	shutdownTimeout time.Duration
	logFormat       string
}

// loadSettings reads and checks the environment. Its error is one line that
// names each bad variable, its value and what would be right.
func loadSettings(getenv func(string) string) (settings, error) {
	env := &environment{getenv: getenv}
	s := settings{
		addr:            setting(env, "ADDR", "127.0.0.1:8000", "host:port, as in 127.0.0.1:8000", parseAddr),
		maxInFlight:     setting(env, "MAX_IN_FLIGHT", "1024", "a whole number from 1 to 1000000", wholeNumberIn(1, 1_000_000)),
		drainDelay:      setting(env, "DRAIN_DELAY", "0s", "a duration, as in 5s", parseDuration),
		shutdownTimeout: setting(env, "SHUTDOWN_TIMEOUT", "20s", "a duration, as in 20s", parseDuration),
		logFormat:       setting(env, "LOG_FORMAT", "text", "text or json", oneOf("text", "json")),
		cluster: cluster{
			hosts:       setting(env, "CASSANDRA_HOSTS", "localhost", "host names or addresses separated by commas", parseHosts),
			port:        setting(env, "CASSANDRA_PORT", "9042", "a port from 1 to 65535", wholeNumberIn(1, 65535)),
			keyspace:    setting(env, "CASSANDRA_KEYSPACE", "test_keyspace", "1 to 48 letters, digits or underscores, none of Cassandra's own", parseKeyspace),
			datacenter:  setting(env, "CASSANDRA_DATACENTER", "", "a data centre's name: letters, digits, points, dashes or underscores", matching(`^[\w.-]*$`)),
			consistency: setting(env, "CASSANDRA_CONSISTENCY", "LOCAL_QUORUM", "ONE, TWO, THREE, QUORUM, ALL, LOCAL_ONE, LOCAL_QUORUM or EACH_QUORUM", parseConsistency),
			replication: setting(env, "CASSANDRA_REPLICATION", "1", "a number of replicas from 1 to 99, or one for each data centre, as in dc1:3,dc2:3", parseReplication),
			username:    getenv("CASSANDRA_USERNAME"),
			password:    getenv("CASSANDRA_PASSWORD"),
			tlsCA:       setting(env, "CASSANDRA_TLS_CA", "", "a readable file of PEM certificates", parseCertificates),
		},
	}
	if (s.cluster.username == "") != (s.cluster.password == "") {
		env.bad = append(env.bad, "CASSANDRA_USERNAME and CASSANDRA_PASSWORD must be set together")
	}
	if s.shutdownTimeout < s.drainDelay {
		env.bad = append(env.bad, fmt.Sprintf("SHUTDOWN_TIMEOUT %q must be at least DRAIN_DELAY %q", s.shutdownTimeout, s.drainDelay))
	}
	if env.bad != nil {
		return settings{}, errors.New(strings.Join(env.bad, "; "))
	}
	return s, nil
}

func (s settings) logHandler(w io.Writer) slog.Handler {
	if s.logFormat == "json" {
		return slog.NewJSONHandler(w, nil)
	}
	return slog.NewTextHandler(w, nil)
}

// environment collects what is wrong with the settings read from it.
type environment struct {
	getenv func(string) string
	bad    []string
}

// setting parses a variable, or its fallback where it is unset or empty.
func setting[T any](env *environment, name, fallback, want string, parse func(string) (T, bool)) T {
	text := cmp.Or(env.getenv(name), fallback)
	value, ok := parse(text)
	if !ok {
		env.bad = append(env.bad, fmt.Sprintf("%s is %q, it must be %s", name, text, want))
	}
	return value
}

func parseAddr(text string) (string, bool) {
	_, port, err := net.SplitHostPort(text)
	_, ok := wholeNumberIn(0, 65535)(port)
	return text, err == nil && ok
}

func wholeNumberIn(low, high int) func(string) (int, bool) {
	return func(text string) (int, bool) {
		n, err := strconv.Atoi(text)
		return n, err == nil && isDigits(text) && low <= n && n <= high
	}
}

func parseDuration(text string) (time.Duration, bool) {
	d, err := time.ParseDuration(text)
	return d, err == nil && d >= 0
}

func oneOf(values ...string) func(string) (string, bool) {
	return func(text string) (string, bool) { return text, slices.Contains(values, text) }
}

func matching(pattern string) func(string) (string, bool) {
	return func(text string) (string, bool) { return text, regexp.MustCompile(pattern).MatchString(text) }
}

// newRouter builds the route table. At most maxInFlight requests are served at
// once by what is not exempt.
func newRouter(maxInFlight int) http.Handler {
	rt := &router{mux: http.NewServeMux(), methods: map[string]map[string]*route{}, crossOrigin: http.NewCrossOriginProtection(), maxInFlight: int64(maxInFlight)}
	handle := rt.handle
	heavy := takingTurns(maxHeavy)

	handle("GET /{$}", rt.getRoot, exempt)
	handle("GET /health", getHealth, exempt|duringDrain)
	handle("GET /metrics", getMetrics, exempt)
	handle("POST /shutdown", postShutdown, exempt)
	handle("GET /openapi.json", getDocument("docs/openapi.json", "application/json"))
	handle("GET /docs", getDocument("docs/index.html", "text/html; charset=utf-8"))
	handle("POST /users", postUser)
	handle("GET /users", listUsers)
	handle("POST /users/batch", postBatch)
	handle("GET /users/stream", streamUsers, noDeadline)
	handle("GET /users/stream/pages", getPage)
	handle("GET /users/{id}", getUser)
	handle("PUT /users/{id}", putUser)
	handle("PATCH /users/{id}", patchUser)
	handle("DELETE /users/{id}", deleteUser)
	handle("GET /performance/async", heavy(measure("async", runAtOnce)))
	handle("GET /performance/sync", heavy(measure("sync", runInTurn)))
	handle("GET /slow_query", slowQuery(5*time.Second, "Slow query completed"))
	handle("GET /long_running_query", slowQuery(10*time.Second, "Long running query completed"))
	handle("POST /context_manager_safety/query_error", heavy(testQueryError))
	handle("POST /context_manager_safety/streaming_error", heavy(testStreamingError))
	handle("POST /context_manager_safety/concurrent_streams", heavy(testConcurrentStreams))
	handle("POST /context_manager_safety/nested_contexts", heavy(testNestedContexts))
	handle("POST /context_manager_safety/cancellation", heavy(testCancellation))
	handle("GET /context_manager_safety/status", getSafetyStatus)

	return rt.complete()
}

// router holds the route table and what all its routes share.
type router struct {
	mux         *http.ServeMux
	endpoints   []string                     // in the order of the table
	methods     map[string]map[string]*route // path → method → route
	crossOrigin *http.CrossOriginProtection
	notFound    *route
	maxInFlight int64
	capped      atomic.Int64 // requests in flight that are not exempt from the cap
	largeBodies atomic.Int64 // being received
}

// handler answers a request or returns the error that the adapter answers; it
// never writes an error itself.
type handler func(w http.ResponseWriter, r *http.Request) error

// traits are how a route differs from most.
type traits uint

const (
	exempt      traits = 1 << iota // from the cap on requests in flight
	duringDrain                    // answered while the service drains
	noDeadline                     // unless the request sets one
)

// route is one line of the route table.
type route struct {
	*router
	traits
	handle handler
	stats  *routeStats
}

func (rt *router) handle(pattern string, h handler, ts ...traits) {
	line := &route{router: rt, handle: h, stats: statsOf(pattern)}
	for _, t := range ts {
		line.traits |= t
	}
	rt.endpoints = append(rt.endpoints, strings.TrimSuffix(pattern, "{$}"))
	method, target, _ := strings.Cut(pattern, " ")
	if rt.methods[target] == nil {
		rt.methods[target] = map[string]*route{}
	}
	rt.methods[target][method] = line
}

// complete registers each path once, for all methods. So a wrong method on
// /users/batch is a 405 of that path: registered by method, it would fall
// through to /users/{id}, and the mux's Allow would list the methods of both.
func (rt *router) complete() http.Handler {
	for target, methods := range rt.methods {
		if get := methods["GET"]; get != nil {
			methods["HEAD"] = get
		}
		wrongMethod := &route{router: rt, handle: methodNotAllowed(methods), stats: statsOf(target)}
		rt.mux.HandleFunc(target, func(w http.ResponseWriter, r *http.Request) {
			cmp.Or(methods[r.Method], wrongMethod).ServeHTTP(w, r)
		})
	}
	rt.notFound = &route{router: rt, stats: statsOf("none"), handle: func(http.ResponseWriter, *http.Request) error {
		return &problem{Status: http.StatusNotFound, Detail: "No such path; GET / lists the endpoints"}
	}}
	rt.mux.Handle("/", rt.notFound)
	return rt
}

func methodNotAllowed(methods map[string]*route) handler {
	allow := make([]string, 0, len(methods))
	for method := range methods {
		allow = append(allow, method)
	}
	slices.Sort(allow)
	return func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Allow", strings.Join(allow, ", "))
		return &problem{Status: http.StatusMethodNotAllowed, Detail: "This path takes " + strings.Join(allow, ", ")}
	}
}

// ServeHTTP finds the route. The mux would answer an unclean path like //users
// with a redirect in HTML that repeats the request elsewhere: here it is 404.
func (rt *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.EscapedPath()
	if !strings.HasPrefix(asked, "/") || strings.Contains(asked, "//") || strings.Contains(asked, "/.") {
		rt.notFound.ServeHTTP(w, r)
		return
	}
	rt.mux.ServeHTTP(w, r)
}

// ServeHTTP is the adapter every request passes: it gives the request its id,
// turns the handler's error into a problem answer, or, after the status line,
// into an aborted connection, and counts the outcome.
func (line *route) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	counters.inFlight.Add(1)
	defer counters.inFlight.Add(-1)
	rec := &recorder{ResponseWriter: w}
	id := requestID(r)
	rec.Header().Set("X-Request-Id", id)
	status := rec.finish(r, id, line.answer(rec, r))
	line.stats.count(status, time.Since(start))
	if status == statusAborted || status == statusClientLeft {
		panic(http.ErrAbortHandler) // the only way to make net/http cut the connection
	}
}

// answer is the middleware: recover, drain, cross-origin check, deadline, body,
// cap in flight; then the handler.
func (line *route) answer(w *recorder, r *http.Request) (err error) {
	defer func() {
		switch v := recover(); v {
		case nil:
		case http.ErrAbortHandler:
			err = http.ErrAbortHandler
		default:
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if life.draining.Load() && line.traits&duringDrain == 0 {
		w.Header().Set("Connection", "close")
		return unavailable("The service is draining; send the request to another instance")
	}
	if err := line.crossOrigin.Check(r); err != nil {
		return &problem{Status: http.StatusForbidden, Detail: "Browsers may not write from a page of another origin"}
	}
	timeout, err := requestTimeout(r, line.traits&noDeadline != 0)
	if err != nil {
		return err
	}
	bodyTimeout := cmp.Or(timeout, defaultTimeout)
	if timeout > 0 {
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		r = r.WithContext(ctx)
	}
	if err := line.receiveBody(w, r, bodyTimeout); err != nil {
		return err
	}
	if line.traits&exempt == 0 {
		defer line.capped.Add(-1)
		if line.capped.Add(1) > line.maxInFlight {
			return unavailable("Too many requests at once; try again in a second")
		}
	}
	return line.handle(w, r)
}

var requestIDs = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// requestID is the client's X-Request-Id if it is fit for a log, else a new one.
func requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); id != "" && requestIDs.MatchString(id) {
		return id
	}
	return rand.Text()
}

var seconds = regexp.MustCompile(`^[0-9]{1,9}(\.[0-9]{1,9})?$`)

// requestTimeout is what X-Request-Timeout asks for, or the default; 0 is none.
func requestTimeout(r *http.Request, none bool) (time.Duration, error) {
	values := r.Header.Values("X-Request-Timeout")
	if len(values) == 0 {
		if none {
			return 0, nil
		}
		return defaultTimeout, nil
	}
	asked, _ := strconv.ParseFloat(values[0], 64)
	if len(values) > 1 || !seconds.MatchString(values[0]) || asked == 0 {
		return 0, invalid(fieldError{Header: "X-Request-Timeout", Detail: "must be seconds above 0, once, in digits with at most one point, as in 0.5"})
	}
	return min(time.Duration(asked*float64(time.Second)), maxTimeout), nil
}

// receiveBody reads the whole body before the request takes one of the places
// in flight, so that a slow sender holds up nobody. It also lets net/http
// notice that a client left: it watches only once the body is read.
func (rt *router) receiveBody(w *recorder, r *http.Request, timeout time.Duration) error {
	if r.Body == http.NoBody {
		return nil
	}
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(timeout)) // a context does not unblock Read
	whole := http.MaxBytesReader(w.ResponseWriter, r.Body, maxBody)
	body, err := io.ReadAll(io.LimitReader(whole, smallBody))
	if len(body) == smallBody {
		defer rt.largeBodies.Add(-1)
		if rt.largeBodies.Add(1) > maxLarge {
			control.SetReadDeadline(time.Now()) // do not wait for the rest
			return unavailable("Too many large bodies at once; try again in a second")
		}
		var rest []byte
		rest, err = io.ReadAll(whole)
		body = append(body, rest...)
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		control.SetReadDeadline(time.Now()) // net/http would wait for the rest before it closes the connection
		return &problem{Status: http.StatusRequestEntityTooLarge, Detail: fmt.Sprintf("The body may have at most %d bytes", maxBody)}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &problem{Status: http.StatusRequestTimeout, Detail: "The body did not arrive in time"}
	case err != nil:
		return invalid(inBody("", "must arrive whole; it ended early"))
	}
	control.SetReadDeadline(time.Time{})
	r.Body = io.NopCloser(bytes.NewReader(body))
	return nil
}

// recorder remembers the status, and renews the write deadline so that a client
// that takes nothing for writeTimeout is cut off.
type recorder struct {
	http.ResponseWriter
	status int // 0 until the status line is written
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Write writes in pieces, each with writeTimeout of its own: a slow reader gets
// megabytes whole.
func (w *recorder) Write(p []byte) (written int, err error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	control := http.NewResponseController(w.ResponseWriter)
	for piece := range slices.Chunk(p, writeSize) {
		control.SetWriteDeadline(time.Now().Add(writeTimeout))
		n, err := w.ResponseWriter.Write(piece)
		if written += n; err != nil {
			return written, err
		}
	}
	return written, nil
}

// finish answers the handler's error, logs it if it is not the client's, and
// returns the status to count.
func (w *recorder) finish(r *http.Request, id string, err error) int {
	switch err {
	case nil:
		return cmp.Or(w.status, http.StatusOK)
	case http.ErrAbortHandler:
		return statusAborted
	}
	p := asProblem(r, err)
	p.Title, p.RequestID = http.StatusText(p.Status), id
	if p.Status == statusClientLeft {
		return statusClientLeft
	}
	if err != error(p) { // a problem of the handler's own making is the client's fault
		slog.Error("request failed", "request_id", id, "method", r.Method, "path", r.URL.Path, "status", p.Status, "started", w.status != 0, "error", err)
	}
	if w.status != 0 {
		if w.Header().Get("Content-Type") == ndjson {
			json.NewEncoder(w).Encode(p)
			http.NewResponseController(w).Flush()
		}
		return statusAborted
	}
	w.Header().Set("Content-Type", "application/problem+json")
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	body, _ := json.Marshal(p)
	w.WriteHeader(p.Status)
	w.Write(append(body, '\n'))
	return p.Status
}

// problem is an error answer as RFC 9457 has it.
type problem struct {
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	Errors    []fieldError `json:"errors,omitempty"`
	RequestID string       `json:"request_id"`
}

func (p *problem) Error() string { return p.Detail }

// fieldError says where the fault is, in one of three ways, and what is right.
type fieldError struct {
	Pointer   *string `json:"pointer,omitempty"` // JSON Pointer (RFC 6901) into the body
	Parameter string  `json:"parameter,omitempty"`
	Header    string  `json:"header,omitempty"`
	Detail    string  `json:"detail"`
}

func invalid(errs ...fieldError) *problem {
	return &problem{Status: http.StatusUnprocessableEntity, Detail: "The request is not valid; see errors", Errors: errs}
}

func unavailable(detail string) *problem {
	return &problem{Status: http.StatusServiceUnavailable, Detail: detail}
}

// queryError is a failed request to Cassandra, as every store function returns
// it: what it was doing, and whether it changes data.
type queryError struct {
	doing string // "inserting user 1b4e…"
	kind  queryKind
	err   error
}

type queryKind int

const (
	read queryKind = iota
	write
	conditionalWrite // a lightweight transaction
	readBack         // the read after one that was applied
)

func (e *queryError) Error() string { return e.doing + ": " + e.err.Error() }
func (e *queryError) Unwrap() error { return e.err }

// asProblem is the one table from errors to answers. What the driver says stays
// in the log. A write that failed is 503 only if it surely was not sent. r is the
// request as it came, without its deadline: its context ends only when the client
// leaves or the drain cuts it.
func asProblem(r *http.Request, err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	const noCassandra = "Cassandra is not available; try again in a moment"
	bug := &problem{Status: http.StatusInternalServerError, Detail: "Internal error; the log has it under this request_id"}
	query, isQuery := errors.AsType[*queryError](err)
	isWrite := isQuery && query.kind != read
	cause := context.Cause(r.Context())
	switch {
	case !isQuery && errors.Is(err, os.ErrDeadlineExceeded):
		return &problem{Status: http.StatusRequestTimeout, Detail: "The client took nothing for too long"}
	case cause != nil && cause != errShutdown:
		return &problem{Status: statusClientLeft}
	case isQuery && isBug(err):
		return bug
	case isQuery && notApplied(query):
		return unavailable(noCassandra)
	case isWrite:
		return &problem{Status: http.StatusGatewayTimeout, Detail: "timeout: no answer to the write, which may have been applied; read before you try again"}
	case cause == errShutdown:
		return unavailable("The service is shutting down")
	case isTimeout(err):
		return &problem{Status: http.StatusGatewayTimeout, Detail: "timeout: the deadline passed before the answer was there"}
	case isQuery:
		return unavailable(noCassandra)
	}
	return bug
}

// isBug reports errors that no retry and no recovery of Cassandra mends.
func isBug(err error) bool {
	var marshal gocql.MarshalError
	var unmarshal gocql.UnmarshalError
	if errors.As(err, &marshal) || errors.As(err, &unmarshal) {
		return true
	}
	var refused gocql.RequestError
	if !errors.As(err, &refused) {
		return false
	}
	switch refused.Code() {
	case gocql.ErrCodeSyntax, gocql.ErrCodeInvalid, gocql.ErrCodeConfig, gocql.ErrCodeUnauthorized, gocql.ErrCodeProtocol, gocql.ErrCodeAlreadyExists:
		return true
	}
	return false
}

// notApplied reports failures that left no trace in Cassandra: nothing was
// sent, or the coordinator refused it at once. A lightweight transaction can
// also find its replicas gone after it proposed its write; only a serial
// consistency in the refusal says that it came before.
func notApplied(failed *queryError) bool {
	if failed.kind == readBack {
		return false
	}
	for _, unsent := range []error{errNotConnected, gocql.ErrNoConnections, gocql.ErrSessionClosed, gocql.ErrNoStreams} {
		if errors.Is(failed, unsent) {
			return true
		}
	}
	if refused, ok := errors.AsType[*gocql.RequestErrUnavailable](failed); ok {
		serial := refused.Consistency == gocql.Consistency(gocql.LocalSerial) || refused.Consistency == gocql.Consistency(gocql.Serial)
		return failed.kind != conditionalWrite || serial
	}
	var refused gocql.RequestError
	return errors.As(failed, &refused) && (refused.Code() == gocql.ErrCodeOverloaded || refused.Code() == gocql.ErrCodeBootstrapping)
}

func isTimeout(err error) bool {
	var refused gocql.RequestError
	if errors.As(err, &refused) {
		return refused.Code() == gocql.ErrCodeReadTimeout || refused.Code() == gocql.ErrCodeWriteTimeout
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, gocql.ErrTimeoutNoResponse)
}

// readJSON returns the body, which is one JSON value of one of the media types.
func readJSON(r *http.Request, mediaTypes ...string) (json.RawMessage, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(mediaTypes, mediaType) {
		return nil, &problem{Status: http.StatusUnsupportedMediaType, Detail: "Send the body as JSON: -H 'Content-Type: " + mediaTypes[0] + "'"}
	}
	body, err := io.ReadAll(r.Body) // from memory, see receiveBody
	if err != nil {
		return nil, fmt.Errorf("reading the body: %w", err)
	}
	if len(bytes.TrimSpace(body)) == 0 {
		return nil, invalid(inBody("", "must be JSON; it is empty"))
	}
	if !utf8.Valid(body) { // encoding/json would turn it into U+FFFD
		return nil, invalid(inBody("", "must be valid UTF-8"))
	}
	var value json.RawMessage
	if err := json.Unmarshal(body, &value); err != nil {
		return nil, invalid(inBody("", "must be one JSON value: "+err.Error()))
	}
	return value, nil
}

func inBody(pointer, detail string) fieldError {
	return fieldError{Pointer: &pointer, Detail: detail}
}

// pointerEscaper makes a member's name a part of a JSON Pointer.
var pointerEscaper = strings.NewReplacer("~", "~0", "/", "~1")

// member is a name and its value in a JSON object.
type member struct {
	name  string
	value json.RawMessage
}

// objectMembers returns a valid JSON object's members as they stand there:
// encoding/json alone takes NAME for name, and the last of two for both.
func objectMembers(object json.RawMessage) (members []member, ok bool) {
	dec := json.NewDecoder(bytes.NewReader(object))
	if start, _ := dec.Token(); start != json.Delim('{') {
		return nil, false
	}
	for dec.More() {
		name, _ := dec.Token()
		m := member{name: name.(string)}
		if dec.Decode(&m.value) != nil {
			return nil, false
		}
		members = append(members, m)
	}
	return members, true
}

// parseText returns a JSON string's text, or nil if raw is something else.
func parseText(raw json.RawMessage) *string {
	if raw[0] == '"' && bytes.IndexByte(raw, '\\') < 0 { // as most are: it stands there as it is
		return new(string(raw[1 : len(raw)-1]))
	}
	var text *string
	if json.Unmarshal(raw, &text) != nil || text == nil || hasLoneSurrogate(raw) {
		return nil
	}
	return text
}

// escapes matches a surrogate pair, half a one (as its group), any other escape.
var escapes = regexp.MustCompile(`\\u(?i:d[89ab]..)\\u(?i:d[c-f]..)|(\\u(?i:d[89a-f]..))|\\.`)

// hasLoneSurrogate finds half a surrogate pair in a JSON string: encoding/json
// turns it into U+FFFD in silence.
func hasLoneSurrogate(raw json.RawMessage) bool {
	return slices.ContainsFunc(escapes.FindAllSubmatch(raw, -1), func(match [][]byte) bool { return match[1] != nil })
}

// parseInteger returns the whole number that a JSON number is, however it is
// written (30, 30.0, 3e1), in exact decimal; ok is false for a fraction. What has
// more than nine digits comes back as a thousand million with its sign.
func parseInteger(number string) (n int, ok bool) {
	mantissa, exponent, _ := strings.Cut(strings.ToLower(number), "e")
	digits, negative := strings.CutPrefix(mantissa, "-")
	if digits == "" || digits[0] < '0' || digits[0] > '9' {
		return 0, false // a string, null or the like
	}
	whole, fraction, _ := strings.Cut(digits, ".")
	shift, _ := strconv.Atoi(cmp.Or(exponent, "0")) // out of range it is the nearest
	shift = max(-1<<30, min(shift, 1<<30))          // far more than a body has digits, and sums do not overflow
	digits = strings.TrimLeft(whole+fraction, "0")
	significant := strings.TrimRight(digits, "0")
	zeros := shift - len(fraction) + len(digits) - len(significant)
	switch {
	case significant == "":
		return 0, true
	case zeros < 0:
		return 0, false
	case len(significant)+zeros > 9:
		n = 1_000_000_000
	default:
		n, _ = strconv.Atoi(significant + strings.Repeat("0", zeros))
	}
	if negative {
		n = -n
	}
	return n, true
}

// writeJSON answers with a status and a JSON body, encoded before the status is
// sent. It escapes like the row encoder, so a user reads the same everywhere.
func writeJSON(w http.ResponseWriter, status int, value any) error {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(value); err != nil {
		return fmt.Errorf("encoding the answer: %w", err)
	}
	return writeBody(w, status, "application/json", body.Bytes())
}

func writeBody(w http.ResponseWriter, status int, contentType string, body []byte) error {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, err := w.Write(body)
	return err
}

// parameters reads a query string and collects what is wrong with it. Unlike
// url.Values it drops nothing in silence.
type parameters struct {
	query string
	errs  []fieldError
}

// text returns the one value of a parameter, and whether it is there.
func (p *parameters) text(name string) (value string, given bool) {
	for pair := range strings.SplitSeq(p.query, "&") {
		key, escaped, _ := strings.Cut(pair, "=")
		if key, err := url.QueryUnescape(key); err != nil || key != name {
			continue
		}
		text, err := url.QueryUnescape(escaped)
		switch {
		case given:
			p.reject(name, "must be given once")
		case err != nil:
			p.reject(name, "must be percent-encoded: "+err.Error())
		default:
			value = text
		}
		given = true
	}
	return value, given
}

// number returns a whole number, lowered to high; fallback where it is missing.
func (p *parameters) number(name string, fallback, low, high int) int {
	faults := len(p.errs)
	text, given := p.text(name)
	if !given || len(p.errs) > faults {
		return fallback
	}
	n, err := strconv.Atoi(text)
	if errors.Is(err, strconv.ErrRange) {
		n = high
	}
	if !isDigits(text) || n < low {
		p.reject(name, fmt.Sprintf("must be a whole number in digits, at least %d", low))
		return fallback
	}
	return min(n, high)
}

func (p *parameters) reject(name, detail string) {
	if e := (fieldError{Parameter: name, Detail: detail}); !slices.Contains(p.errs, e) {
		p.errs = append(p.errs, e)
	}
}

// err is the answer to what was rejected, or nil.
func (p *parameters) err() error {
	if p.errs == nil {
		return nil
	}
	return invalid(p.errs...)
}

// pathID is the {id} of the path; uuid.Parse alone also takes braces, a urn:
// prefix and 32 bare digits.
func pathID(r *http.Request) (uuid.UUID, error) {
	text := r.PathValue("id")
	id, err := uuid.Parse(text)
	if err != nil || len(text) != 36 {
		return uuid.Nil, &problem{Status: http.StatusBadRequest, Detail: "Invalid UUID format"}
	}
	return id, nil
}

func isDigits(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == ""
}

// preferred returns which of the media types on offer the Accept header likes
// best; the first where it likes several as much, or none.
func preferred(r *http.Request, offers ...string) string {
	best, bestQ := offers[0], 0.0
	for _, offer := range offers {
		for accepted := range strings.SplitSeq(strings.Join(r.Header.Values("Accept"), ","), ",") {
			mediaType, params, err := mime.ParseMediaType(accepted)
			if err != nil || mediaType != offer {
				continue
			}
			q, err := strconv.ParseFloat(cmp.Or(params["q"], "1"), 64)
			if err == nil && q > bestQ {
				best, bestQ = offer, q
			}
		}
	}
	return best
}

// getDocument answers with a file that is built in. The policy lets the page
// run its own style and script, talk to this service, and nothing else.
func getDocument(name, contentType string) handler {
	body, err := docs.ReadFile(name)
	policy := fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		inlineSource(body, "style"), inlineSource(body, "script"))
	return func(w http.ResponseWriter, r *http.Request) error {
		if err != nil {
			return err
		}
		w.Header().Set("Content-Security-Policy", policy)
		return writeBody(w, http.StatusOK, contentType, body)
	}
}

// inlineSource allows exactly what stands in the page's one such element.
func inlineSource(page []byte, element string) string {
	_, rest, _ := bytes.Cut(page, []byte("<"+element+">"))
	text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
	sum := sha256.Sum256(text)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// postShutdown answers POST /shutdown and does what SIGTERM does. Only somebody
// on this machine may: behind a local proxy every peer is loopback, and DNS
// rebinding brings a foreign Host.
func postShutdown(w http.ResponseWriter, r *http.Request) error {
	if !isLoopback(r.RemoteAddr) || !isLoopback(r.Host) || isForwarded(r.Header) {
		return &problem{Status: http.StatusForbidden, Detail: "Shutdown is for a direct request from this machine"}
	}
	select {
	case life.stop <- struct{}{}:
	default: // already asked for
	}
	life.draining.Store(true)
	return writeJSON(w, http.StatusOK, map[string]string{"message": "Shutdown initiated"})
}

// isLoopback takes a host with or without a port.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = strings.Trim(address, "[]")
	}
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

func isForwarded(header http.Header) bool {
	for name := range header {
		if strings.HasPrefix(name, "X-Forwarded") || slices.Contains([]string{"Forwarded", "Via", "X-Real-Ip", "True-Client-Ip", "Cf-Connecting-Ip"}, name) {
			return true
		}
	}
	return false
}
