// Command cassandra-service-go is an HTTP API for users stored in Apache Cassandra: CRUD, lists, atomic batches,
// streams of any size, self-tests of its one session, health and metrics. It starts listening immediately, connects
// and reconnects to Cassandra on its own, and drains before it exits.
//
// loadSettings lists the environment variables that configure it. SIGTERM, SIGINT, SIGHUP and POST /shutdown start a
// drain: /health returns 503 "draining", / and /metrics still respond, other new requests get 503, and active requests
// get their response. A second signal exits immediately.
//
// This file holds the process lifecycle, the route table, the middleware, and the mapping from errors to responses.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	version        = "1.0.0"
	maxBody        = 1 << 20                // bytes of a request body; a user is under 1 kB, this is for batches
	maxBodies      = 64 << 20               // bytes of all bodies that are being received or handled
	maxHeader      = 16 << 10               // bytes; enough for any page token, 431 beyond
	maxErrors      = 100                    // in a 422 response
	defaultTimeout = 30 * time.Second       // of a request without X-Request-Timeout
	maxTimeout     = 60 * time.Second       // X-Request-Timeout is clamped to it
	headerTimeout  = 10 * time.Second       // for a request's header to arrive
	idleTimeout    = 2 * time.Minute        // of a kept-alive connection, longer than most load balancers'
	writeTimeout   = 30 * time.Second       // for a client to read one write
	writeSize      = 32 << 10               // bytes of one write
	sendBuffer     = 64 << 10               // bytes; Linux's default buffers megabytes and so masks a slow reader
	abortTimeout   = 300 * time.Millisecond // for aborted requests and connections to end
	gcPercent      = 300                    // at 100 a heap of a few megabytes would be collected 40 times a second
	memoryLimit    = 256 << 20              // bytes; close to it the heap is collected more often

	statusClientLeft = 499 // as nginx counts a client that closed the connection; never sent
	statusAborted    = 599 // a response that was aborted after its status line; never sent
)

var (
	//go:embed docs/openapi.json
	openAPI []byte
	//go:embed docs/index.html
	docsPage []byte

	// errShutdown is the cancellation cause of requests still active at SHUTDOWN_TIMEOUT.
	errShutdown  = errors.New("the service is shutting down")
	validID      = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	validSeconds = regexp.MustCompile(`^[0-9]{1,9}(\.[0-9]{1,9})?$`)
	// forwarding matches the headers that proxies add.
	forwarding = regexp.MustCompile(`Forwarded|^Via$|-Ip$|^X-Original-|^X-Envoy-`)
)

// shutdown is the shutdown state of the process.
var shutdown = struct {
	draining  atomic.Bool
	requested chan struct{} // by POST /shutdown
}{requested: make(chan struct{}, 1)}

func main() {
	signal.Ignore(syscall.SIGPIPE) // a dead reader of the log must not end the process
	ctx, cancel := context.WithCancel(context.Background())
	signalled, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(signalled, func() { stop(); cancel() }) // in this order, so a second signal has its default effect
	if err := run(ctx, os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "cassandra-service-go:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends or POST /shutdown, then drains. It fails if a setting is invalid or the address is taken.
func run(ctx context.Context, getenv func(string) string, stderr io.Writer) error {
	cfg, err := loadSettings(getenv)
	if err != nil {
		return err
	}
	logs := map[string]slog.Handler{"text": slog.NewTextHandler(stderr, nil), "json": slog.NewJSONHandler(stderr, nil)}
	slog.SetDefault(slog.New(logs[cfg.logFormat]))
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return fmt.Errorf("listening on ADDR: %w", err)
	}
	base, abort := context.WithCancelCause(context.Background())
	defer abort(nil)
	defer keepConnected(cfg.cluster)()
	server := &http.Server{
		Handler: newRouter(cfg), DisableGeneralOptionsHandler: true, // which has no deadline
		BaseContext: func(net.Listener) context.Context { return base }, ConnContext: limitSendBuffer,
		ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader - 4<<10, // net/http adds 4 KiB
		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	slog.Info("listening", "addr", listener.Addr().String(), "docs", "http://"+listener.Addr().String()+"/docs")
	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	case <-shutdown.requested:
	}
	drain(server, abort, cfg)
	return nil
}

// limitSendBuffer keeps the socket's send buffer small, so that writes progress as fast as the client reads.
func limitSendBuffer(ctx context.Context, conn net.Conn) context.Context {
	conn.(*net.TCPConn).SetWriteBuffer(sendBuffer)
	return ctx
}

// drain refuses new requests while active ones finish, for at least DRAIN_DELAY and at most SHUTDOWN_TIMEOUT. Then it
// aborts the rest and closes the listener, which stays open until then so that probes can see "draining".
func drain(server *http.Server, abort context.CancelCauseFunc, cfg settings) {
	shutdown.draining.Store(true)
	start := time.Now()
	slog.Info("draining", "active", counters.active.Load())
	idle := func() bool { return counters.active.Load() == 0 }
	if !waitUntil(func() bool { return idle() && time.Since(start) >= cfg.drainDelay }, cfg.shutdownTimeout) {
		slog.Warn("drain timed out; aborting active requests", "active", counters.active.Load())
		abort(errShutdown)
		waitUntil(idle, abortTimeout)
	}
	ctx, cancel := context.WithTimeout(context.Background(), abortTimeout)
	defer cancel()
	server.Shutdown(ctx) // a write to a client that has stopped reading ends with the process
	slog.Info("stopped", "after", time.Since(start).Round(time.Millisecond))
}

// waitUntil polls until done returns true or the timeout passes.
func waitUntil(done func() bool, timeout time.Duration) bool {
	for deadline := time.Now().Add(timeout); !done() && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	return done()
}

// settings is the configuration read from the environment.
type settings struct {
	addr, logFormat             string
	allowedHosts                []string // nil: any
	allowShutdown               bool
	cluster                     cluster
	maxInFlight                 int
	drainDelay, shutdownTimeout time.Duration
}

// loadSettings reads the environment. Its error is one line with each invalid variable, its value and what is allowed.
func loadSettings(getenv func(string) string) (settings, error) {
	env := &environment{getenv: getenv}
	s := settings{
		addr:            setting(env, "ADDR", "127.0.0.1:8000", "host:port, such as 127.0.0.1:8000", parseAddr),
		maxInFlight:     setting(env, "MAX_IN_FLIGHT", "1024", "a whole number from 1 to 1000000", wholeNumber(1, 1_000_000)),
		drainDelay:      setting(env, "DRAIN_DELAY", "0s", "a duration, such as 5s", parseDuration),
		shutdownTimeout: setting(env, "SHUTDOWN_TIMEOUT", "20s", "a duration, such as 20s", parseDuration),
		logFormat:       setting(env, "LOG_FORMAT", "text", "text or json", matching(`^(text|json)$`)),
		cluster:         loadCluster(env),
	}
	hosts, onOrOff, rule := "*", "off", "host names without ports or brackets, separated by commas, or *"
	if isLoopback(s.addr) {
		hosts, onOrOff = "localhost,127.0.0.1,::1", "on"
	}
	s.allowedHosts = setting(env, "ALLOWED_HOSTS", hosts, rule, parseAllowedHosts)
	s.allowShutdown = setting(env, "SHUTDOWN_ENDPOINT", onOrOff, "on or off", matching(`^(on|off)$`)) == "on"
	if s.shutdownTimeout < s.drainDelay {
		env.reject("SHUTDOWN_TIMEOUT must be at least DRAIN_DELAY (%s), not %s", s.drainDelay, s.shutdownTimeout)
	}
	if env.invalid != nil {
		return settings{}, errors.New(strings.Join(env.invalid, "; "))
	}
	return s, nil
}

// environment reads settings and collects the invalid ones.
type environment struct {
	getenv  func(string) string
	invalid []string
}

func (env *environment) reject(format string, args ...any) {
	env.invalid = append(env.invalid, fmt.Sprintf(format, args...))
}

// setting parses a variable, or its fallback if it is unset or empty.
func setting[T any](env *environment, name, fallback, allowed string, parse func(string) (T, bool)) T {
	text := cmp.Or(env.getenv(name), fallback)
	value, ok := parse(text)
	if !ok {
		env.reject("%s must be %s, not %q", name, allowed, text)
	}
	return value
}

// parseAllowedHosts returns nil for *.
func parseAllowedHosts(text string) (hosts []string, ok bool) {
	if text == "*" {
		return nil, true
	}
	return parseHosts(strings.ToLower(text))
}

// hostname returns the host of an address without port and brackets.
func hostname(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return strings.Trim(address, "[]")
}

func isLoopback(address string) bool {
	return strings.EqualFold(hostname(address), "localhost") || net.ParseIP(hostname(address)).IsLoopback()
}

// newRouter returns the route table.
func newRouter(cfg settings) *router {
	rt := &router{settings: cfg, mux: http.NewServeMux(), slots: make(gate, cfg.maxInFlight)}
	handle := rt.handle
	handle("GET /{$}", rt.getRoot, probe)
	handle("GET /health", getHealth, probe)
	handle("GET /metrics", getMetrics, probe)
	handle("POST /shutdown", rt.postShutdown, uncapped|offline)
	handle("GET /openapi.json", getDocument(openAPI, "application/json"), offline)
	handle("GET /docs", getDocument(docsPage, "text/html; charset=utf-8"), offline)
	handle("POST /users", postUser)
	handle("GET /users", usersTable.list)
	handle("POST /users/batch", postBatch)
	handle("GET /users/stream", streams.limit("streams", usersTable.stream), noDeadline)
	handle("GET /users/stream/pages", streams.limit("streams", usersTable.getPage))
	handle("GET /users/{id}", withID(getUser))
	handle("PUT /users/{id}", withID(editUser))
	handle("PATCH /users/{id}", withID(editUser))
	handle("DELETE /users/{id}", withID(removeUser))
	handle("GET /performance/async", selfTests.queue(measure("async")))
	handle("GET /performance/sync", selfTests.queue(measure("sync")))
	handle("GET /slow_query", slowQuery(5*time.Second, "Slow query completed"))
	handle("GET /long_running_query", slowQuery(10*time.Second, "Long running query completed"))
	handle("POST /context_manager_safety/query_error", selfTests.queue(testQueryError))
	handle("POST /context_manager_safety/streaming_error", selfTests.queue(testStreamingError))
	handle("POST /context_manager_safety/concurrent_streams", selfTests.queue(testConcurrentStreams))
	handle("POST /context_manager_safety/nested_contexts", selfTests.queue(testNestedContexts))
	handle("POST /context_manager_safety/cancellation", selfTests.queue(testCancellation))
	handle("GET /context_manager_safety/status", getSafetyStatus)

	rt.unmatched = &route{router: rt, handler: rt.refuseUnmatched, options: offline, stats: statsOf("none")}
	for _, pattern := range []string{ // batch and stream are not ids, so other methods get 405 instead of /users/{id}
		"/", "GET /users/batch", "PUT /users/batch", "PATCH /users/batch", "DELETE /users/batch",
		"PUT /users/stream", "PATCH /users/stream", "DELETE /users/stream",
	} {
		rt.mux.Handle(pattern, rt.unmatched)
	}
	return rt
}

// router holds the route table and the state shared by all routes.
type router struct {
	settings
	mux         *http.ServeMux
	endpoints   []string // the patterns in the order of the table
	unmatched   *route
	crossOrigin http.CrossOriginProtection
	slots       gate         // MAX_IN_FLIGHT
	bodies      atomic.Int64 // bytes of the bodies that are being received or handled
}

// handler handles a request, or returns the error to respond with. It never writes an error itself.
type handler func(w http.ResponseWriter, r *http.Request) error

// options are a route's exceptions to the default middleware.
type options uint

const (
	noDeadline options = 1 << iota // unless the request sets one
	offline                        // works without Cassandra
	uncapped                       // not limited by MAX_IN_FLIGHT
	probing                        // responds during a drain, and does not delay it
	probe      = offline | uncapped | probing
)

// route is one line of the route table.
type route struct {
	*router
	handler handler
	options options
	stats   *routeStats
}

func (rt *router) handle(pattern string, h handler, opts ...options) { // at most one; | combines options
	endpoint := strings.TrimSuffix(pattern, "{$}")
	rt.endpoints = append(rt.endpoints, endpoint)
	rt.mux.Handle(pattern, &route{rt, h, cmp.Or(opts...), statsOf(endpoint)})
}

// ServeHTTP routes a request. The mux alone would redirect unclean paths.
func (rt *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if escaped := r.URL.EscapedPath(); path.Clean("/"+escaped) != escaped { // also the target *
		rt.unmatched.ServeHTTP(w, r)
		return
	}
	rt.mux.ServeHTTP(w, r)
}

// refuseUnmatched responds with 405 if other methods have a route, else with 404.
func (rt *router) refuseUnmatched(w http.ResponseWriter, r *http.Request) error {
	var allowed []string
	for _, method := range []string{"DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"} {
		h, _ := rt.mux.Handler(&http.Request{Method: method, Host: r.Host, URL: r.URL})
		if line, ok := h.(*route); ok && line != rt.unmatched {
			allowed = append(allowed, method)
		}
	}
	if allowed == nil {
		return notFound("No such path; GET / lists the endpoints")
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	return refuse(http.StatusMethodNotAllowed, "Allowed methods: "+w.Header().Get("Allow"))
}

// ServeHTTP sets the request's id, runs the handler, responds with its error or aborts, and counts the outcome.
func (line *route) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	counters.inFlight.Add(1)
	defer counters.inFlight.Add(-1)
	if line.options&probing == 0 {
		counters.active.Add(1)
		defer counters.active.Add(-1)
	}
	id := r.Header.Get("X-Request-Id")
	if !validID.MatchString(id) {
		id = strconv.FormatUint(rand.Uint64(), 36)
	}
	w.Header().Set("X-Request-Id", id)
	rec := &recorder{ResponseWriter: w, ResponseController: http.NewResponseController(w)}
	status := rec.finish(r, line.serve(rec, r))
	line.stats.statuses[status].Add(1)
	line.stats.times.observe(time.Since(start))
	if status == statusAborted || status == statusClientLeft {
		panic(http.ErrAbortHandler) // the only way to make net/http abort the connection
	}
}

// serve is the middleware: recover, checks, body, deadline, cap; then the handler.
func (line *route) serve(w *recorder, r *http.Request) (err error) {
	defer func() {
		if v := recover(); v == http.ErrAbortHandler {
			err = http.ErrAbortHandler
		} else if v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	size := int64(min(uint64(r.ContentLength), maxBody)) // -1, a chunked body, counts as the largest
	defer line.bodies.Add(-size)
	deadline, err := line.admit(w, r, line.bodies.Add(size))
	if err == nil {
		err = receiveBody(w, r, cmp.Or(deadline, time.Now().Add(defaultTimeout)))
	}
	if err != nil && size > 0 {
		w.SetReadDeadline(time.Now())         // net/http reads the rest of the body before it closes the connection
		w.Header().Set("Connection", "close") // else it could take that rest, such as a bad trailer, for a request
	}
	if !deadline.IsZero() {
		ctx, cancel := context.WithDeadline(r.Context(), deadline)
		defer cancel()
		r = r.WithContext(ctx)
	}
	switch {
	case err != nil:
		return err
	case currentSession() == nil && line.options&offline == 0:
		return errNotConnected
	case line.options&uncapped == 0:
		return line.slots.limit("requests", line.handler)(w, r)
	}
	return line.handler(w, r)
}

// admit runs the checks that need no body, and returns the request's deadline; zero is none.
func (line *route) admit(w http.ResponseWriter, r *http.Request, bodies int64) (deadline time.Time, err error) {
	isSet, text := r.Header["X-Request-Timeout"] != nil, strings.Join(r.Header["X-Request-Timeout"], ",")
	timeout, _ := time.ParseDuration(cmp.Or(text, "0") + "s")
	switch {
	case shutdown.draining.Load() && line.options&probing == 0:
		w.Header().Set("Connection", "close")
		err = refuse(http.StatusServiceUnavailable, "The service is draining; send the request to another instance")
	case line.allowedHosts != nil && !slices.Contains(line.allowedHosts, strings.ToLower(hostname(r.Host))):
		err = refuse(http.StatusMisdirectedRequest, "Host not allowed; see ALLOWED_HOSTS")
	case line.crossOrigin.Check(r) != nil:
		err = refuse(http.StatusForbidden, "Cross-origin requests that change data are not allowed")
	case isSet && (timeout == 0 || !validSeconds.MatchString(text)):
		const rule = "must be seconds above 0 in plain digits, at most 9 on each side of a point, such as 0.5"
		err = invalid(fieldError{Header: "X-Request-Timeout", Detail: rule})
	case r.ContentLength != 0 && bodies > maxBodies:
		err = refuse(http.StatusServiceUnavailable, "Too many large request bodies; try again in a second")
	case isSet:
		deadline = time.Now().Add(min(timeout, maxTimeout))
	case line.options&noDeadline == 0:
		deadline = time.Now().Add(defaultTimeout)
	}
	return deadline, err
}

// receivedBody is a body that has been received completely.
type receivedBody struct{ *bytes.Buffer }

func (receivedBody) Close() error { return nil }

// receiveBody receives the body before the request counts towards MAX_IN_FLIGHT, so slow uploads can't block others.
// net/http detects a disconnect only after that. The body of a GET, HEAD or DELETE is discarded.
func receiveBody(w *recorder, r *http.Request, deadline time.Time) error {
	body, sink, sent := receivedBody{new(bytes.Buffer)}, io.Discard, r.Body
	if r.Body = body; r.ContentLength == 0 {
		return nil
	}
	w.SetReadDeadline(deadline)  // a context does not unblock Read
	w.SetWriteDeadline(deadline) // for 100 Continue: the previous request's write deadline may have passed
	if strings.HasPrefix(r.Method, "P") {
		body.Grow(int(min(max(r.ContentLength, 0), maxBody)) + bytes.MinRead)
		sink = body
	}
	_, err := io.Copy(sink, http.MaxBytesReader(w.ResponseWriter, sent, maxBody))
	w.SetReadDeadline(time.Time{})
	_, isTooLarge := errors.AsType[*http.MaxBytesError](err)
	switch {
	case isTooLarge:
		return refuse(http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is too large; the limit is %d bytes", maxBody))
	case err != nil && !time.Now().Before(deadline):
		return refuse(http.StatusRequestTimeout, "The body did not arrive in time")
	case err != nil:
		return invalid(inBody("", "is truncated or badly chunked, or its trailer is too long"))
	}
	return nil
}

// gate limits how many requests are inside it.
type gate chan struct{}

// queue makes requests beyond the limit wait, at most until their deadline.
func (g gate) queue(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if err := g.wait(r.Context()); err != nil {
			return err
		}
		defer g.leave()
		return h(w, r)
	}
}

// limit makes a handler refuse requests beyond the limit.
func (g gate) limit(what string, h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		select {
		case g <- struct{}{}:
			defer g.leave()
			return h(w, r)
		default:
			return refuse(http.StatusServiceUnavailable, "Too many concurrent "+what+"; try again in a second")
		}
	}
}

func (g gate) leave() { <-g }

func (g gate) wait(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for other requests: %w", ctx.Err())
	}
}

// recorder remembers the status, and disconnects a client that stops reading for writeTimeout.
type recorder struct {
	http.ResponseWriter
	*http.ResponseController
	status int // 0 until the status line is written; statusClientLeft after a failed write
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) WriteHeader(status int) {
	if w.status = status; status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write writes in pieces, each with its own deadline: a slow but steady reader can still receive a large body.
func (w *recorder) Write(p []byte) (written int, err error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	for piece := range slices.Chunk(p, writeSize) {
		w.SetWriteDeadline(time.Now().Add(writeTimeout))
		n, err := w.ResponseWriter.Write(piece)
		if written += n; err != nil {
			w.status = statusClientLeft
			return written, err
		}
	}
	return written, nil
}

// FlushError implements ResponseController.Flush. It sets a new deadline, since the last Write may have been slow.
func (w *recorder) FlushError() error {
	w.SetWriteDeadline(time.Now().Add(writeTimeout))
	return w.Flush()
}

// finish responds with the handler's error and returns the status to count. It logs the service's errors, but not those
// that the client or its own deadline caused. A missing Cassandra is logged elsewhere.
func (w *recorder) finish(r *http.Request, err error) int {
	w.SetWriteDeadline(time.Now().Add(writeTimeout)) // for the closing bytes, and whatever net/http has buffered
	switch {
	case err == nil:
		return cmp.Or(w.status, http.StatusOK)
	case err == http.ErrAbortHandler:
		return statusAborted
	}
	p := asProblem(context.Cause(r.Context()), err)
	if w.status == statusClientLeft || p.Status == statusClientLeft {
		return statusClientLeft
	}
	p.Title, p.RequestID = http.StatusText(p.Status), w.Header().Get("X-Request-Id")
	if broken, ok := errors.AsType[*streamError](err); ok && w.status != 0 {
		p.PageState = broken.pageState
	}
	isClients := err == error(p) || r.Header["X-Request-Timeout"] != nil && errors.Is(err, context.DeadlineExceeded)
	if p.Status >= 500 && !isClients && !isUnreachable(err) {
		slog.Error("request failed",
			"request_id", p.RequestID, "method", r.Method, "path", r.URL.Path, "status", p.Status, "error", err)
	}
	body, _ := json.Marshal(p)
	switch {
	case w.status == 0:
		for name, only := range map[string]int{"ETag": http.StatusPreconditionFailed, "Location": http.StatusGatewayTimeout} {
			if p.Status != only { // the handler set it for another outcome
				w.Header().Del(name)
			}
		}
		writeBody(w, p.Status, "application/problem+json", body, []byte("\n"))
		return p.Status
	case w.Header().Get("Content-Type") == ndjson:
		w.Write(append(body, '\n'))
		w.Flush()
	}
	return statusAborted
}

// problem is an RFC 9457 error response.
type problem struct {
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	Errors    []fieldError `json:"errors,omitempty"`
	RequestID string       `json:"request_id"`
	PageState string       `json:"page_state,omitempty"` // where an aborted stream can resume
}

func (p *problem) Error() string { return p.Detail }

// fieldError locates one invalid value and says what is allowed.
type fieldError struct {
	Pointer   *string `json:"pointer,omitempty"` // JSON Pointer (RFC 6901) into the body
	Parameter string  `json:"parameter,omitempty"`
	Header    string  `json:"header,omitempty"`
	Detail    string  `json:"detail"`
}

// invalid returns a 422 response. The last of maxErrors errors says that there may be more.
func invalid(errs ...fieldError) *problem {
	if len(errs) >= maxErrors {
		errs = append(errs[:maxErrors-1], inBody("", fmt.Sprintf("validation stopped after %d errors", maxErrors)))
	}
	return &problem{Status: http.StatusUnprocessableEntity, Detail: "The request is not valid; see errors", Errors: errs}
}

func refuse(status int, detail string) *problem { return &problem{Status: status, Detail: detail} }

// notFound is an error that becomes a 404 response.
type notFound string

func (e notFound) Error() string { return string(e) }

// asProblem maps every error to a response; the driver's text only goes to the log. cause is why the request's
// context ended, its own deadline aside: the client left, or a drain timed out.
func asProblem(cause, err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	_, isMissing := errors.AsType[notFound](err)
	switch outcome := outcomeOf(err); {
	case cause != nil && cause != errShutdown:
		return refuse(statusClientLeft, "")
	case isMissing:
		return refuse(http.StatusNotFound, err.Error())
	case errors.Is(err, errTagMismatch):
		return refuse(http.StatusPreconditionFailed, "If-Match does not match the current ETag")
	case errors.Is(err, errKeyReused):
		return invalid(fieldError{Header: "Idempotency-Key", Detail: "was used for a different request"})
	case outcome == inDoubt:
		return refuse(http.StatusGatewayTimeout, inDoubtDetail(err))
	case cause == errShutdown:
		return refuse(http.StatusServiceUnavailable, "The service is shutting down")
	case outcome == notWritten:
		return refuse(http.StatusServiceUnavailable, "Cassandra is not available; try again in a moment")
	case outcome == late || errors.Is(err, context.DeadlineExceeded):
		return refuse(http.StatusGatewayTimeout, "timeout: the deadline passed before the response was ready")
	}
	return refuse(http.StatusInternalServerError, "Internal error; search the log for this request_id")
}

// writeJSON responds with a JSON body, which it encodes before it sends the status.
func writeJSON(w http.ResponseWriter, status int, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encoding the response: %w", err)
	}
	return writeBody(w, status, "application/json", body, []byte("\n"))
}

// writeBody responds with a body that may come in several parts.
func writeBody(w http.ResponseWriter, status int, contentType string, parts ...[]byte) error {
	size := 0
	for _, part := range parts {
		size += len(part)
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(size))
	w.WriteHeader(status)
	_, err := (*net.Buffers)(&parts).WriteTo(w)
	return err
}

// getRoot handles GET /, the liveness probe, which never touches Cassandra.
func (rt *router) getRoot(w http.ResponseWriter, r *http.Request) error {
	w.Header().Set("Vary", "Accept")
	if preferred(r, "application/json", "text/html") == "text/html" {
		w.Header().Set("Location", "/docs")
		w.WriteHeader(http.StatusFound)
		return nil
	}
	return writeJSON(w, http.StatusOK, map[string]any{
		"message": "cassandra-service-go is running!", "version": version, "docs": "/docs", "endpoints": rt.endpoints,
	})
}

// getDocument serves an embedded file. Its CSP allows the page's <style> and <script>, and requests to this service.
func getDocument(body []byte, contentType string) handler {
	policy := "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; " +
		"frame-ancestors 'none'"
	for _, element := range []string{"style", "script"} {
		_, rest, _ := bytes.Cut(body, []byte("<"+element+">"))
		text, _, _ := bytes.Cut(rest, []byte("</"+element+">"))
		sum := sha256.Sum256(text)
		policy += fmt.Sprintf("; %s-src 'sha256-%s'", element, base64.StdEncoding.EncodeToString(sum[:]))
	}
	return func(w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Security-Policy", policy)
		return writeBody(w, http.StatusOK, contentType, body)
	}
}

// postShutdown handles POST /shutdown, which does what SIGTERM does. It is for development: no check of a request can
// prove that no local proxy forwarded it.
func (rt *router) postShutdown(w http.ResponseWriter, r *http.Request) error {
	switch {
	case !rt.allowShutdown:
		return refuse(http.StatusForbidden, "POST /shutdown is turned off; see SHUTDOWN_ENDPOINT")
	case !isLoopback(r.RemoteAddr), !isLoopback(r.Host),
		slices.ContainsFunc(slices.Collect(maps.Keys(r.Header)), forwarding.MatchString):
		return refuse(http.StatusForbidden, "Shutdown is only accepted directly from this machine")
	}
	shutdown.draining.Store(true)
	select {
	case shutdown.requested <- struct{}{}:
	default: // requested before
	}
	return writeJSON(w, http.StatusOK, map[string]string{"message": "Shutdown initiated"})
}
