// The tests send requests to the service in process, through its real routes and middleware, against a live Cassandra.
// They share one keyspace, which is dropped at the end, and compare differences of counters. Tests that need processes, outages
// or an empty database are in e2e/. Helpers come first, then a section for each service file, then fuzz targets and benchmarks.

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

var (
	config  settings // of the service
	service *router  // in process
)

func TestMain(m *testing.M) {
	if err := runTests(m); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runTests(m *testing.M) (err error) {
	keyspace := fmt.Sprintf("test_%d_%d", os.Getpid(), time.Now().UnixNano())
	os.Setenv("CASSANDRA_KEYSPACE", keyspace)
	if config, err = loadSettings(os.Getenv); err != nil {
		return err
	}
	unbound := config.cluster.config(&countingDialer{})
	unbound.Keyspace = ""
	admin, err := createSession(context.Background(), unbound)
	if err != nil {
		return fmt.Errorf("%w\nThe tests need Cassandra; this command starts it and runs them: go run ./cassandra go test -p 1 ./...", err)
	}
	defer admin.Close()
	disconnect := keepConnected(config.cluster)
	defer disconnect()
	if !waitUntil(func() bool { return currentSession() != nil }, time.Minute) {
		return errors.New("the service does not connect; see its log")
	}
	service = newRouter(config)
	m.Run()
	disconnect() // or the watch would create the tables again
	return admin.Query(`DROP KEYSPACE "` + keyspace + `"`).Exec()
}

// exec runs a statement with the driver, bypassing the service.
func exec(t testing.TB, statement string, values ...any) {
	t.Helper()
	must(t, currentSession().Query(statement, values...).Exec())
}

// concurrently calls f with 0 to n-1, at most 32 at a time.
func concurrently(n int, f func(i int)) {
	var running sync.WaitGroup
	slots := make(gate, 32)
	for i := range n {
		slots <- struct{}{}
		running.Go(func() {
			defer slots.leave()
			f(i)
		})
	}
	running.Wait()
}

func pick[T any](condition bool, yes, no T) T {
	if condition {
		return yes
	}
	return no
}

// response is what a client receives.
type response struct {
	request string // such as "GET /users"
	status  int
	header  http.Header
	body    string
	aborted bool
}

func (r response) String() string {
	return fmt.Sprintf("%s: status = %d, aborted %t, body %.2000s", r.request, r.status, r.aborted, r.body)
}

// do sends a request, such as "GET /users", to the service in process. Headers are "Name: value". By default the body is JSON.
func do(t testing.TB, request, body string, headers ...string) response {
	return doOn(t, service, request, body, headers...)
}

func doOn(t testing.TB, h http.Handler, request, body string, headers ...string) response {
	return respond(h, newRequest(t.Context(), request, body, headers...))
}

func newRequest(ctx context.Context, request, body string, headers ...string) *http.Request {
	method, target, _ := strings.Cut(request, " ")
	r := httptest.NewRequestWithContext(ctx, method, target, strings.NewReader(body))
	if r.Host = "localhost"; body == "" {
		r.Body = http.NoBody
	}
	for _, h := range headers {
		if name, value, _ := strings.Cut(h, ": "); name == "Host" {
			r.Host = value
		} else {
			r.Header.Add(name, value)
		}
	}
	if r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", "application/json")
	}
	return r
}

// respond returns a handler's response to a request, without a network.
func respond(h http.Handler, r *http.Request) (resp response) {
	w := httptest.NewRecorder()
	defer func() {
		v := recover()
		resp = response{r.Method + " " + r.RequestURI, w.Code, w.Result().Header, w.Body.String(), v == http.ErrAbortHandler}
		if v != nil && v != http.ErrAbortHandler {
			panic(v)
		}
	}()
	h.ServeHTTP(w, r)
	return
}

// routed returns the service with one more route, /test.
func routed(h handler, opts ...options) *router {
	rt := newRouter(config)
	rt.handle("GET /test", h, opts...)
	rt.handle("POST /test", h, opts...)
	return rt
}

// decode reads a JSON body after checking the status.
func decode[T any](t testing.TB, r response, status int) (value T) {
	t.Helper()
	if r.status != status || r.aborted {
		t.Fatalf("%s; want %d", r, status)
	}
	must(t, json.Unmarshal([]byte(r.body), &value))
	return value
}

// userJSON is a user as a client sees it.
type userJSON struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Email     string `json:"email"`
	Age       int    `json:"age"`
	CreatedAt string `json:"created_at"`
	UpdatedAt string `json:"updated_at"`
}

// encode returns JSON as the service should write it, without the newline.
func encode(v any) string {
	var b strings.Builder
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encoder.Encode(v)
	return strings.TrimSuffix(b.String(), "\n")
}

const adaBody = `{"name":"Ada Lovelace","email":"ada@example.com","age":36}`

func createAda(t testing.TB) response {
	t.Helper()
	r := do(t, "POST /users", adaBody)
	wantStatus(t, r, 201)
	return r
}

func createPath(t testing.TB) string { t.Helper(); return createAda(t).header.Get("Location") }

func missingPath() string { return "/users/" + uuid.NewString() }

func wantEqual[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	failIf(t, got != want, "%s = %.3000v, want %.3000v", what, got, want)
}

func failIf(t testing.TB, failed bool, format string, args ...any) {
	t.Helper()
	if failed {
		t.Errorf(format, args...)
	}
}

func must(t testing.TB, err error) {
	if t.Helper(); err != nil {
		t.Fatal(err)
	}
}

func wantStatus(t testing.TB, r response, status int) {
	t.Helper()
	failIf(t, r.status != status || r.aborted, "%s; want %d", r, status)
}

func wantBody(t testing.TB, r response, status int, body string) {
	t.Helper()
	failIf(t, r.status != status || r.aborted || r.body != body, "%s; want %d %.2000s", r, status, body)
}

// wantJSON compares a complete body, whatever the order of its members. Masked members must be there, with any value.
func wantJSON(t testing.TB, r response, status int, body string, masked ...string) {
	t.Helper()
	got, want := decode[map[string]any](t, r, status), decode[map[string]any](t, response{body: body}, 0)
	for _, name := range masked {
		if _, ok := got[name]; ok {
			got[name], want[name] = nil, nil
		}
	}
	wantEqual(t, r.request, encode(got), encode(want))
	wantHeader(t, r, "Content-Type", "application/json")
}

func wantHeader(t testing.TB, r response, name, value string) {
	t.Helper()
	wantEqual(t, r.request+": "+name, r.header.Get(name), value)
}

// wantProblem checks a complete problem response; errs are the JSON of its errors. Only a 503 has Retry-After.
func wantProblem(t testing.TB, r response, status int, detail string, errs ...string) {
	t.Helper()
	members := ""
	if len(errs) > 0 {
		members = `,"errors":[` + strings.Join(errs, ",") + `]`
	}
	wantBody(t, r, status, fmt.Sprintf(`{"title":%q,"status":%d,"detail":%q%s,"request_id":%q}`+"\n",
		http.StatusText(status), status, detail, members, r.header.Get("X-Request-Id")))
	wantHeader(t, r, "Content-Type", "application/problem+json")
	wantHeader(t, r, "Retry-After", map[int]string{503: "1"}[status])
	wantHeader(t, r, "Location", "")
}

// wrong returns the JSON of an error; kind is parameter, header or pointer.
func wrong(kind, name, detail string) string {
	return fmt.Sprintf(`{%q:%q,"detail":%q}`, kind, name, detail)
}

func wantInvalid(t testing.TB, r response, errs ...string) {
	t.Helper()
	wantProblem(t, r, 422, "The request is not valid; see errors", errs...)
}

// at returns the JSON of an error in a body.
func at(pointer, detail string) string { return wrong("pointer", pointer, detail) }

// serve starts a handler behind a listener, as run does, and returns its URL.
func serve(t testing.TB, h http.Handler) string {
	server := httptest.NewUnstartedServer(h)
	server.Config.ConnContext = limitSendBuffer
	server.Start()
	t.Cleanup(server.Close)
	t.Cleanup(server.CloseClientConnections) // first
	return server.URL
}

func send(t testing.TB, url, request string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = io.WriteString(conn, request)
	must(t, err)
	return conn.(*net.TCPConn)
}

func receive(t testing.TB, conn io.Reader) string {
	t.Helper()
	text, err := io.ReadAll(conn)
	must(t, err)
	return string(text)
}

// wantParts checks that a raw response has all parts.
func wantParts(t testing.TB, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		failIf(t, !strings.Contains(text, part), "response %q lacks %q", text, part)
	}
}

// logLines is a log that a test reads.
type logLines chan string

func (l logLines) Write(line []byte) (int, error) { l <- string(line); return len(line), nil }

// captureLog returns a function that returns the lines logged since its last call.
func captureLog(t testing.TB) (logged func() []string) {
	log, before := make(logLines, 1000), slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return func() (lines []string) {
		for len(log) > 0 {
			lines = append(lines, <-log)
		}
		return lines
	}
}

// Tests of main.go.

// environ returns a getenv for settings such as "ADDR=:8000".
func environ(settings ...string) func(string) string {
	values := map[string]string{}
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		values[name] = value
	}
	return func(name string) string { return values[name] }
}

func TestInvalidSettings(t *testing.T) {
	for _, tt := range []struct{ name, allowed, values string }{ // values are separated by |
		{"ADDR", "host:port, such as 127.0.0.1:8000", "8000|localhost:|localhost:65536|localhost:http"},
		{"ALLOWED_HOSTS", "host names without ports or brackets, separated by commas, or *", ",|a b|a/b|*,a|a:80|[::1]"},
		{"MAX_IN_FLIGHT", "a whole number from 1 to 1000000", "0|-1|+5|many|1000001|99999999999999999999"},
		{"DRAIN_DELAY", "a duration, such as 5s", "5|-1s"}, {"SHUTDOWN_TIMEOUT", "a duration, such as 20s", "5|soon"},
		{"LOG_FORMAT", "text or json", "JSON|text\n"}, {"SHUTDOWN_ENDPOINT", "on or off", "yes|ON|1|on\n"},
		{"CASSANDRA_HOSTS", "host names or addresses without ports, separated by commas",
			"a,,b|http://a/|a:9042|a,b:9042|[::1]:9042|127.0.0.1:9042"},
		{"CASSANDRA_PORT", "a port from 1 to 65535", "0|65536|9042 "},
		{"CASSANDRA_KEYSPACE", "1 to 48 letters, digits or underscores (the prefix system is reserved)",
			strings.Repeat("k", 49) + `|a"; DROP KEYSPACE b; --|` + "a\nb|system|SYSTEM|System_Auth|system_virtual_schema"},
		{"CASSANDRA_DATACENTER", "the name of a data centre: letters, digits, dots, dashes or underscores", "d'c"},
		{"CASSANDRA_CONSISTENCY", "LOCAL_QUORUM, QUORUM or ALL", "ONE|TWO|THREE|ANY|LOCAL_ONE|EACH_QUORUM|SERIAL|quorum"},
		{"CASSANDRA_REPLICATION", "a number of replicas from 1 to 99, or one per data centre, such as dc1:3,dc2:3",
			"0|100|dc1:3,|dc1:0|dc1:1,dc1:2|d'c:1|class:1"},
		{"CASSANDRA_TLS_CA", "a readable file of PEM certificates", "/nowhere.pem|go.mod"},
	} {
		for value := range strings.SplitSeq(tt.values, "|") {
			_, err := loadSettings(environ(tt.name + "=" + value))
			wantEqual(t, "error", fmt.Sprint(err), fmt.Sprintf("%s must be %s, not %q", tt.name, tt.allowed, value))
		}
	}
	err := run(t.Context(), environ("DRAIN_DELAY=1m", "LOG_FORMAT=xml", "CASSANDRA_PASSWORD=hunter2"), io.Discard)
	wantEqual(t, "error of several", fmt.Sprint(err), `LOG_FORMAT must be text or json, not "xml"; CASSANDRA_USERNAME and `+
		`CASSANDRA_PASSWORD must be set together; SHUTDOWN_TIMEOUT must be at least DRAIN_DELAY (1m0s), not 20s`)
}

func TestSettings(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600))
	const defaults = "addr:127.0.0.1:8000 logFormat:text allowedHosts:[localhost 127.0.0.1 ::1] allowShutdown:true " +
		"cluster:{hosts:[localhost] port:9042 keyspace:test_keyspace datacenter: consistency:LOCAL_QUORUM " +
		"replication:{'class': 'NetworkTopologyStrategy', 'replication_factor': 1} " +
		"username: password: tlsCA:} maxInFlight:1024 drainDelay:0 shutdownTimeout:20000000000"
	for _, tt := range []struct{ settings, was, is string }{ // separated by |
		{"", "", ""}, {"ADDR=[::1]:0", "addr:127.0.0.1:8000", "addr:[::1]:0"},
		{"ADDR=:80", "addr:127.0.0.1:8000|allowedHosts:[localhost 127.0.0.1 ::1]|allowShutdown:true",
			"addr::80|allowedHosts:[]|allowShutdown:false"},
		{"ADDR=10.0.0.1:80|SHUTDOWN_ENDPOINT=on", "addr:127.0.0.1:8000|allowedHosts:[localhost 127.0.0.1 ::1]",
			"addr:10.0.0.1:80|allowedHosts:[]"},
		{"SHUTDOWN_ENDPOINT=off|ALLOWED_HOSTS=*", "allowShutdown:true|allowedHosts:[localhost 127.0.0.1 ::1]",
			"allowShutdown:false|allowedHosts:[]"},
		{"ALLOWED_HOSTS=A.b, 2001:db8::1", "[localhost 127.0.0.1 ::1]", "[a.b 2001:db8::1]"},
		{"MAX_IN_FLIGHT=5|DRAIN_DELAY=1s|SHUTDOWN_TIMEOUT=1m|LOG_FORMAT=json", "1024|drainDelay:0|20000000000|text",
			"5|drainDelay:1000000000|60000000000|json"},
		{"CASSANDRA_HOSTS=a.b, 10.0.0.1,::1|CASSANDRA_PORT=9142|CASSANDRA_KEYSPACE=Big_1", "[localhost]|9042|test_keyspace",
			"[a.b 10.0.0.1 ::1]|9142|Big_1"},
		{"CASSANDRA_DATACENTER=dc-1|CASSANDRA_REPLICATION=dc1:3,dc2:2", "datacenter:|'replication_factor': 1",
			"datacenter:dc-1|'dc1': 3,'dc2': 2"},
		{"CASSANDRA_CONSISTENCY=ALL|CASSANDRA_TLS_CA=" + ca, "consistency:LOCAL_QUORUM|tlsCA:", "consistency:ALL|tlsCA:" + ca},
		{"CASSANDRA_CONSISTENCY=QUORUM|CASSANDRA_USERNAME=u|CASSANDRA_PASSWORD=p", "consistency:LOCAL_QUORUM|username:|password:",
			"consistency:QUORUM|username:u|password:p"},
	} {
		want, is := defaults, strings.Split(tt.is, "|")
		for i, was := range strings.Split(tt.was, "|") {
			want = strings.Replace(want, was, is[i], 1)
		}
		got, err := loadSettings(environ(strings.Split(tt.settings, "|")...))
		must(t, err)
		wantEqual(t, "settings of "+tt.settings, fmt.Sprintf("%+v", got), "{"+want+"}")
	}
}

// allowedMethods returns the methods of each path that GET / lists. A test in e2e/ compares that list with openapi.json.
func allowedMethods() map[string]string {
	allowed := map[string]string{}
	for _, method := range strings.Fields("DELETE GET PATCH POST PUT") {
		for _, endpoint := range service.endpoints {
			if path, ok := strings.CutPrefix(endpoint, method+" "); ok {
				allowed[path] = strings.TrimPrefix(allowed[path]+", "+pick(method == "GET", "GET, HEAD", method), ", ")
			}
		}
	}
	return allowed
}

func TestWrongMethods(t *testing.T) {
	for path, allow := range allowedMethods() {
		path = strings.Replace(path, "{id}", "batches", 1) // an {id}, unlike batch
		for method := range strings.FieldsSeq("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT FOO get") {
			if !slices.Contains(strings.Split(allow, ", "), method) {
				r := do(t, method+" "+path, adaBody)
				wantProblem(t, r, 405, "Allowed methods: "+allow)
				wantHeader(t, r, "Allow", allow)
			}
		}
	}
}

func TestUnknownPaths(t *testing.T) {
	path := createPath(t)
	for target := range strings.FieldsSeq("/nothing /Users //users /users/ /users// /users//stream /users/./stream /users/../health " +
		"/users/%2e%2e/health /%2e/health /health%2f /users/%2F //evil.example/.. " +
		"/users/batch/ /users;x /docs/openapi.json * " + path + "/ " + path + "/x") {
		for method := range strings.FieldsSeq("GET POST DELETE OPTIONS CONNECT") {
			wantProblem(t, do(t, method+" "+target, ""), 404, "No such path; GET / lists the endpoints")
		}
	}
}

func TestRoot(t *testing.T) {
	wantJSON(t, do(t, "GET /", ""), 200, `{"message":"cassandra-service-go is running!","version":"1.0.0","docs":"/docs","endpoints":`+
		encode(service.endpoints)+"}")
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	url := serve(t, service)
	targets := strings.Fields("/users/x /nothing /users?limit=0 /users/stream?limit=0 /users/stream/pages?page_state=x /shutdown " +
		createPath(t))
	for path, allow := range allowedMethods() {
		if strings.Contains(allow, "HEAD") && !strings.HasSuffix(path, "_query") {
			targets = append(targets, path)
		}
	}
	for _, target := range targets {
		get, queries := do(t, "GET "+target, ""), counters.queries.Load()
		text := receive(t, send(t, url, "HEAD "+target+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
		wantParts(t, text, fmt.Sprintf("HTTP/1.1 %d ", get.status), "\r\nContent-Type: "+get.header.Get("Content-Type")+"\r\n")
		failIf(t, !strings.HasSuffix(text, "\r\n\r\n"), "HEAD %s has a body: %q", target, text)
		queries = counters.queries.Load() - queries
		failIf(t, strings.Contains(target, "/stream") && queries != 0, "HEAD %s: %d queries, want none", target, queries)
	}
}

func TestAccept(t *testing.T) {
	const asJSON, text = "application/json", "text/plain; version=0.0.4; charset=utf-8"
	for _, tt := range []struct{ target, accept, contentType string }{
		{"/", "*/*", asJSON}, {"/", "text/html;q=0.5, application/json", asJSON},
		{"/", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", ""}, // a browser
		{"/metrics", "application/json, text/plain, */*", asJSON}, {"/metrics", "text/plain", text},
		{"/metrics", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.1", text}, // Prometheus
		{"/users/stream", "application/json, application/x-ndjson", asJSON}, {"/users/stream", "Application/X-NDJSON", ndjson},
		{"/users/stream", "application/x-ndjson;q=0", asJSON}, {"/users/stream", "application/x-ndjson;q=x, ;;, */*", asJSON},
	} {
		r := do(t, "GET "+tt.target+"?limit=1", "", "Accept: "+tt.accept)
		wantStatus(t, r, pick(tt.contentType == "", 302, 200))
		wantHeader(t, r, "Content-Type", tt.contentType)
		wantHeader(t, r, "Vary", "Accept")
		wantHeader(t, r, "Location", pick(tt.contentType == "", "/docs", ""))
	}
}

func TestRequestID(t *testing.T) {
	longest, seen := strings.Repeat("x", 64), map[string]bool{}
	generated := regexp.MustCompile(`^[a-z0-9]{9,13}$`)
	for given, valid := range map[string]bool{"A-z_0.9": true, longest: true, longest + "x": false, "": false, "a b": false, "a\nb": false,
		"ä": false, `a"b`: false} {
		for target := range strings.FieldsSeq("/ /nothing /users/x") {
			got := do(t, "GET "+target, "", "X-Request-Id: "+given).header.Get("X-Request-Id")
			failIf(t, valid && got != given || !valid && (!generated.MatchString(got) || seen[got]),
				"X-Request-Id of %s = %q, given %q", target, got, given)
			seen[got] = true
		}
	}
}

func TestRequestTimeoutHeader(t *testing.T) {
	for value := range strings.FieldsSeq("0.5 0.000000001 00030 60 60.000000001 61 999999999.999999999") {
		wantStatus(t, do(t, "GET /", "", "X-Request-Timeout: "+value), 200)
	}
	invalid := wrong("header", "X-Request-Timeout", "must be seconds above 0 in plain digits, at most 9 on each side of a point, such as 0.5")
	for value := range strings.SplitSeq("|0|0.0|-1|+5|inf|NaN|0x1p-2|1_0|1e3|1.|.5|1.2.3|1,5|5s| |1234567890|0.1234567890|٣|5\n", "|") {
		for request := range strings.SplitSeq("GET /|GET /health|GET /users/stream|GET /nothing|PUT /users/batch|POST /users|POST /shutdown",
			"|") {
			wantInvalid(t, do(t, request, "", "X-Request-Timeout: "+value), invalid)
		}
	}
	wantInvalid(t, do(t, "GET /", "", "X-Request-Timeout: 5", "X-Request-Timeout: 5"), invalid)
}

func TestRequestTimeoutIsTheDeadline(t *testing.T) {
	for header, want := range map[string][2]float64{ // seconds without and with noDeadline
		"X-Other: 1": {30, 0}, "X-Request-Timeout: 0.25": {0.25, 0.25}, "X-Request-Timeout: 999999999": {60, 60},
	} {
		for i, opts := range []options{0, noDeadline} {
			doOn(t, routed(func(_ http.ResponseWriter, r *http.Request) error {
				deadline, _ := r.Context().Deadline()
				left := max(0, time.Until(deadline).Seconds())
				failIf(t, left > want[i] || left < want[i]-1, "%s, options %d: %g s left, want %g", header, opts, left, want[i])
				return nil
			}, opts), "GET /test", "", header)
		}
	}
}

const internalError = "Internal error; search the log for this request_id"

func TestPanicIsLoggedOnceAndHidden(t *testing.T) {
	logged := captureLog(t)
	h := routed(func(http.ResponseWriter, *http.Request) error { panic("secret text") })
	wantProblem(t, doOn(t, h, "GET /test", "", "X-Request-Id: the-one"), 500, internalError)
	lines := logged()
	wantEqual(t, "lines in the log", len(lines), 1)
	wantParts(t, lines[0], "level=ERROR", "request_id=the-one", "method=GET", "path=/test", "status=500", "secret text", "main_test.go:")
}

func TestFailureAfterTheStatusLineAborts(t *testing.T) {
	const last = `{"title":"Internal Server Error","status":500,"detail":"` + internalError + `","request_id":"1","page_state":"here"}` + "\n"
	logged, failures := captureLog(t), map[string]func() error{
		"":         func() error { panic(http.ErrAbortHandler) },
		"error":    func() error { return errors.New("secret") },
		"position": func() error { return &streamError{errors.New("secret"), "here"} },
	}
	for name, fail := range failures {
		url := serve(t, routed(func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Content-Type", map[string]string{"position": ndjson}[name])
			io.WriteString(w, "part")
			http.NewResponseController(w).Flush()
			return fail()
		}))
		text := receive(t, send(t, url, "GET /test HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: 1\r\n\r\n"))
		_, chunks, _ := strings.Cut(text, "\r\n\r\n")
		end := map[string]string{"position": fmt.Sprintf("%x\r\n%s\r\n", len(last), last)}[name] // never "0", which would end the body
		wantEqual(t, name+": chunks", chunks, "4\r\npart\r\n"+end)
		wantEqual(t, name+": is logged", len(logged()) == 1, name != "")
	}
}

// meter is a ResponseWriter that keeps no body. It has deadlines like a connection, counts writes that shared one, and cuts large ones.
type meter struct {
	httptest.ResponseRecorder
	read, write time.Time
	shared      int
}

func (m *meter) SetReadDeadline(at time.Time) error  { m.read = at; return nil }
func (m *meter) SetWriteDeadline(at time.Time) error { m.write = at; return nil }
func (m *meter) Write(p []byte) (int, error)         { m.Flush(); return min(len(p), 32<<10), nil }
func (m *meter) Flush() {
	if time.Until(m.write) < writeTimeout-time.Second {
		m.shared++
	}
	m.write = time.Time{}
}

// A client has 30 s for each 32 KiB, each flush and the closing bytes, and for 100 Continue, which reading the body sends.
func TestEachWriteHasItsDeadline(t *testing.T) {
	w, r := new(meter), newRequest(t.Context(), "POST /test", adaBody)
	r.Body = io.NopCloser(io.TeeReader(r.Body, w))
	routed(func(w http.ResponseWriter, r *http.Request) error {
		n, err := w.Write(make([]byte, 100_000))
		failIf(t, n != 100_000, "%d bytes written, %v; want pieces of 32 KiB", n, err)
		return http.NewResponseController(w).Flush()
	}).ServeHTTP(w, r)
	w.Flush()
	failIf(t, w.shared > 0 || !w.read.IsZero(), "%d writes shared a deadline; that of the body is %s", w.shared, w.read)
}

func TestCrossOriginWrites(t *testing.T) {
	for header, refused := range map[string]bool{
		"Sec-Fetch-Site: cross-site": true, "Sec-Fetch-Site: same-site": true, "Origin: http://evil.example": true, "Origin: null": true,
		"Sec-Fetch-Site: same-origin": false, "Origin: http://localhost": false, "Sec-Fetch-Site: none": false, "Accept: */*": false,
	} {
		wantStatus(t, do(t, "GET /users", "", header), 200)
		if r := do(t, "POST /users", adaBody, header); refused {
			wantProblem(t, r, 403, "Cross-origin requests that change data are not allowed")
		} else {
			wantStatus(t, r, 201)
		}
	}
}

func TestAllowedHosts(t *testing.T) {
	for _, tt := range []struct{ setting, good, refused string }{ // separated by |
		{"ADDR=127.0.0.1:8000", "localhost|LOCALHOST:8000|127.0.0.1:1|[::1]:8000|[::1]", "|evil.example|localhost.evil.example:8000|127.0.0.2"},
		{"ALLOWED_HOSTS=a.example,2001:db8::1", "A.example:80|[2001:db8::1]:80", "|localhost|b.a.example"},
		{"ADDR=:8000", "|anything.example", "-"},
	} {
		cfg, err := loadSettings(environ(tt.setting))
		must(t, err)
		for target := range strings.FieldsSeq("/ /docs /nothing") {
			get := func(host string) response { return doOn(t, newRouter(cfg), "GET "+target, "", "Host: "+host) }
			for host := range strings.SplitSeq(tt.good, "|") {
				wantStatus(t, get(host), pick(target == "/nothing", 404, 200))
			}
			for host := range strings.SplitSeq(strings.TrimPrefix(tt.refused, "-"), "|") {
				failIf(t, tt.refused != "-" && get(host).status != 421, "Host %q is not refused", host)
			}
		}
	}
	wantProblem(t, do(t, "GET /nothing", "", "Host: evil.example"), 421, "Host not allowed; see ALLOWED_HOSTS")
}

const postHead = "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

// Each of these clients gets its response, and then the connection is closed, although the rest of the body never comes.
func TestBodiesThatDoNotArrive(t *testing.T) {
	const (
		post, get           = "POST /users HTTP/1.1\r\nHost: localhost\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\n"
		soon, length, chunk = "X-Request-Timeout: 0.3\r\n", "Content-Length: 50\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
		large, bad          = "The body is too large; the limit is 1048576 bytes", "The request is not valid; see errors"
	)
	url, huge, slow := serve(t, service), "Content-Length: 1048577\r\n\r\n"+strings.Repeat(" ", maxBody+1), "The body did not arrive in time"
	for _, tt := range []struct{ request, status, detail string }{
		{post + soon + length + "{", "408", slow}, {post + soon + chunk, "408", slow}, {post + soon + chunk + "0\r\nX: ", "408", slow},
		{get + soon + length + "{", "408", slow}, {"POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + soon + length + "{", "408", slow},
		{post + huge, "413", large}, {get + huge, "413", large}, {post + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\n" + huge, "413", large},
		{post + "X-Request-Timeout: x\r\n" + length, "422", bad}, {post + chunk + "0\r\nbad\r\n" + get + "\r\n", "422", bad},
		{post + "Origin: http://evil.example\r\n" + length, "403", "Cross-origin requests that change data are not allowed"},
		{"POST /users HTTP/1.1\r\nHost: evil.example\r\n" + length, "421", "Host not allowed; see ALLOWED_HOSTS"},
		{"POST / HTTP/1.1\r\nHost: a.b\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n", "421", "Host not allowed; see ALLOWED_HOSTS"},
	} {
		start := time.Now()
		wantParts(t, receive(t, send(t, url, tt.request)), "HTTP/1.1 "+tt.status+" ", "\r\nConnection: close\r\n", `"detail":"`+tt.detail+`"`)
		failIf(t, time.Since(start) > 3*time.Second, "%.200q: closed after %s", tt.request, time.Since(start))
	}
	conn := send(t, url, postHead+"Content-Length: 70\r\n\r\n"+adaBody)
	conn.CloseWrite()
	wantParts(t, receive(t, conn), "HTTP/1.1 422 ", at("", "is truncated or badly chunked, or its trailer is too long"))
}

func TestBodyOfAGetIsDiscarded(t *testing.T) {
	for request, want := range map[string]bool{"GET /test": false, "POST /test": true} {
		h := routed(func(_ http.ResponseWriter, r *http.Request) error {
			wantEqual(t, request+": body held", r.Body.(receivedBody).Cap() >= maxBody, want)
			return nil
		})
		wantStatus(t, doOn(t, h, request, strings.Repeat(" ", maxBody)), 200)
	}
	wantStatus(t, do(t, "DELETE "+missingPath(), strings.Repeat("x", maxBody)), 204)
}

// Bodies are bounded by the sum of their declared sizes, from the first byte on.
func TestSumOfBodies(t *testing.T) {
	rt := newRouter(config)
	url := serve(t, rt)
	awaitSum := func(want int64) {
		failIf(t, !waitUntil(func() bool { return rt.bodies.Load() == want }, 10*time.Second), "bodies = %d, want %d", rt.bodies.Load(), want)
	}
	conns := []net.Conn{send(t, url, postHead+"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")} // counts as maxBody
	for range maxBodies/maxBody - 1 {
		conns = append(conns, send(t, url, postHead+"Content-Length: 1048576\r\n\r\n{"))
	}
	awaitSum(maxBodies)
	wantParts(t, receive(t, send(t, url, postHead+"Content-Length: 50\r\n\r\n{")), "HTTP/1.1 503 ",
		"Too many large request bodies; try again in a second")
	wantStatus(t, doOn(t, rt, "GET /users", ""), 200)
	for _, conn := range conns {
		conn.Close()
	}
	awaitSum(0)
	wantStatus(t, doOn(t, rt, "POST /users", adaBody), 201)
}

func TestMaxInFlight(t *testing.T) {
	limited := config
	limited.maxInFlight = 2
	rt, entered, leave := newRouter(limited), make(chan struct{}), make(chan struct{})
	rt.handle("GET /test", func(http.ResponseWriter, *http.Request) error { entered <- struct{}{}; <-leave; return nil })
	url := serve(t, rt)
	for range 3 {
		send(t, url, postHead+"Content-Length: 9\r\n\r\n{") // slow bodies occupy no slot
	}
	get, logged := func(target string) response { return doOn(t, rt, "GET "+target, "") }, captureLog(t)
	var inside sync.WaitGroup
	for range 2 {
		inside.Go(func() { wantStatus(t, get("/test"), 200) })
		<-entered
	}
	for target := range strings.FieldsSeq("/test /users /docs") {
		wantProblem(t, get(target), 503, "Too many concurrent requests; try again in a second")
	}
	for target := range strings.FieldsSeq("/ /health /metrics") {
		wantStatus(t, get(target), 200)
	}
	wantStatus(t, doOn(t, rt, "POST /shutdown", ""), 403) // exempt, too
	wantEqual(t, "lines in the log", len(logged()), 0)
	close(leave)
	inside.Wait()
	inside.Go(func() { <-entered })
	wantStatus(t, get("/test"), 200)
	inside.Wait()
}

func TestShutdownEndpoint(t *testing.T) {
	on, off := newRouter(settings{maxInFlight: 1, allowShutdown: true}), newRouter(settings{maxInFlight: 1})
	post := func(rt *router, peer, host, header string) response {
		r := newRequest(t.Context(), "POST /shutdown", "", "Host: "+host, cmp.Or(header, "Accept: */*"))
		r.RemoteAddr = peer
		return respond(rt, r)
	}
	const here = "127.0.0.1:5000"
	for _, tt := range []struct{ peer, host, header string }{
		{"10.0.0.1:5000", "localhost:8000", ""}, {"[2001:db8::1]:5000", "localhost:8000", ""}, {"", "localhost:8000", ""}, {here, "", ""},
		{here, "evil.example:8000", ""}, {here, "localhost.evil.example", ""}, {here, "127.0.0.1.evil.example", ""}, {here, "0.0.0.0:8000", ""},
		{here, "localhost", "Forwarded: for=127.0.0.1"}, {here, "localhost", "x-forwarded-for: 127.0.0.1"},
		{here, "localhost", "X-Forwarded-Host: "}, {"[::1]:5000", "[::1]:8000", "X-Real-IP: 127.0.0.1"}, {here, "localhost", "Via: 1.1 proxy"},
		{here, "localhost", "True-Client-IP: a"}, {here, "localhost", "CF-Connecting-IP: a"}, {here, "localhost", "X-Original-Host: a"},
	} {
		wantProblem(t, post(on, tt.peer, tt.host, tt.header), 403, "Shutdown is only accepted directly from this machine")
	}
	wantStatus(t, post(on, here, "localhost:8000", "Origin: http://localhost:3000"), 403)
	wantProblem(t, post(off, here, "localhost:8000", ""), 403, "POST /shutdown is turned off; see SHUTDOWN_ENDPOINT")
	wantEqual(t, "draining after refusals", shutdown.draining.Load(), false)
	defer shutdown.draining.Store(false)
	for host := range strings.FieldsSeq("localhost LOCALHOST:80 127.1.2.3:80 [::1]:80 [::1] [::ffff:127.0.0.1]:80") {
		shutdown.draining.Store(false)
		wantJSON(t, post(on, here, host, ""), 200, `{"message":"Shutdown initiated"}`)
		wantEqual(t, "draining, requested", shutdown.draining.Load() && len(shutdown.requested) == 1, true)
	}
	<-shutdown.requested
}

// Tests of health.go.

func TestHealth(t *testing.T) {
	measured := regexp.MustCompile(`"latency_ms":[0-9.e-]+,.*"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"`)
	for header, body := range map[string]string{
		"X-Request-Timeout: 9":        `"status":"healthy","cassandra":"connected","cassandra_connected":true`,
		"X-Request-Timeout: 0.000001": `"status":"unhealthy","cassandra":"disconnected","cassandra_connected":false`,
	} {
		r, status := do(t, "GET /health", "", header), pick(strings.Contains(body, "true"), 200, 503)
		wantJSON(t, r, status, fmt.Sprintf(`{%s,"keyspace":%q}`, body, config.cluster.keyspace), "latency_ms", "timestamp")
		wantEqual(t, "measurements in "+r.body, measured.MatchString(r.body), true)
		wantHeader(t, r, "Retry-After", map[int]string{503: "1"}[status])
	}
}

const notAvailable = "Cassandra is not available; try again in a moment"

// fault is an error response from Cassandra, by its code.
type fault int

func (f fault) Code() int       { return int(f) }
func (f fault) Message() string { return "secret" }
func (f fault) Error() string   { return fmt.Sprintf("secret %#x", int(f)) }

// faults lists the status of each error by kind of statement. 503 guarantees that nothing was written,
// 504 means that a write may have been applied, and 0 is impossible.
var faults = []struct {
	why                       string
	read, insert, batch, edit int
	errs                      []error
}{
	{"never sent", 503, 503, 503, 503, []error{errNotConnected, gocql.ErrNoConnections, gocql.ErrSessionClosed, gocql.ErrNoStreams}},
	{"all or a part was sent, and may have been applied, before the connection failed", 503, 504, 504, 504,
		[]error{io.EOF, &net.OpError{Op: "write", Net: "tcp", Err: os.ErrDeadlineExceeded}}},
	{"sent, and the response may be on its way", 504, 504, 504, 504, []error{context.DeadlineExceeded, gocql.ErrTimeoutNoResponse}},
	{"replicas are counted before a write, but an edit's commit comes after its proposal", 503, 503, 503, 504,
		[]error{&gocql.RequestErrUnavailable{Consistency: gocql.LocalQuorum}}},
	{"Paxos had not begun", 503, 0, 0, 503, []error{&gocql.RequestErrUnavailable{Consistency: gocql.Consistency(gocql.LocalSerial)},
		&gocql.RequestErrUnavailable{Consistency: gocql.Consistency(gocql.Serial)}}},
	{"can come after a batch's log was written (mutateAtomically) or a proposal accepted (commitPaxos)", 503, 503, 504, 504,
		[]error{fault(gocql.ErrCodeOverloaded), fault(gocql.ErrCodeBootstrapping)}},
	{"an exception at any stage", 503, 504, 504, 504, []error{fault(gocql.ErrCodeServer)}},
	{"an edit reads after other proposals were accepted", 504, 0, 0, 504, []error{fault(gocql.ErrCodeReadTimeout)}},
	{"a replica failed, or met too many tombstones", 503, 0, 0, 504, []error{fault(gocql.ErrCodeReadFailure)}},
	{"some replicas may have it; a batch is replayed from its log", 0, 504, 504, 504, []error{fault(gocql.ErrCodeWriteTimeout),
		fault(gocql.ErrCodeWriteFailure)}},
	{"accepted by some replicas, so a later transaction may complete it", 0, 0, 0, 504, []error{fault(gocql.ErrCodeCASWriteUnknown)}},
	{"a bug, a missing permission or an altered table: refused at every attempt", 500, 500, 500, 500, []error{fault(gocql.ErrCodeSyntax),
		fault(gocql.ErrCodeInvalid), fault(gocql.ErrCodeUnauthorized), fault(gocql.ErrCodeConfig), fault(gocql.ErrCodeProtocol),
		gocql.MarshalError("secret"), gocql.UnmarshalError("secret")}},
}

const (
	tooLate      = "timeout: the deadline passed before the response was ready"
	inDoubtUser  = "timeout: the user may or may not have been created; GET its Location, and retry only with an Idempotency-Key"
	inDoubtUsers = "timeout: the users may or may not have been created; retry only with an Idempotency-Key"
	inDoubtEdit  = "timeout: the change may or may not have been applied; GET the user with Cache-Control: no-cache to find out"
)

func TestFaultsByKindOfStatement(t *testing.T) {
	timeouts, logged := map[queryKind]string{read: tooLate, insert: inDoubtUser, batchInsert: inDoubtUsers, edit: inDoubtEdit}, captureLog(t)
	check := func(kind queryKind, status int, err error, unreachable bool) {
		h := routed(func(http.ResponseWriter, *http.Request) error { return queryErrorf(kind, err, "testing") })
		detail := map[int]string{500: internalError, 503: notAvailable, 504: timeouts[kind]}[status]
		wantProblem(t, doOn(t, h, "GET /test", ""), status, detail)
		lines := logged()
		failIf(t, unreachable != (lines == nil) || len(lines) > 1, "log = %q for %v", lines, err)
		wantStatus(t, doOn(t, h, "GET /test", "", "X-Request-Timeout: 5"), status)
		wantEqual(t, fmt.Sprintf("%v with X-Request-Timeout is logged", err), logged() != nil, !unreachable && err != context.DeadlineExceeded)
	}
	for _, tt := range faults {
		for _, err := range tt.errs {
			for kind, status := range map[queryKind]int{read: tt.read, insert: tt.insert, batchInsert: tt.batch, edit: tt.edit} {
				if status != 0 {
					check(kind, status, err, tt.why == "never sent")
				}
			}
		}
	}
}

func TestDrainAbortsRequests(t *testing.T) {
	ctx, abort := context.WithCancelCause(t.Context())
	abort(errShutdown)
	r := respond(service, newRequest(ctx, "POST /users", adaBody))
	r.header.Del("Location")
	wantProblem(t, r, 504, inDoubtUser)
}

// fragile is a dialer and each of its connections. While cuts is not negative, one in 20 writes by send closes the connection.
type fragile struct {
	*countingDialer
	net.Conn
	cuts *atomic.Int64
}

func (f fragile) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := f.countingDialer.DialContext(ctx, network, addr)
	if err == nil {
		c.(*conn).Conn = fragile{Conn: c.(*conn).Conn, cuts: f.cuts}
	}
	return c, err
}

func (f fragile) Write(requests []byte) (int, error) {
	if f.cuts.Load() >= 0 && rand.N(20) == 0 {
		f.cuts.Add(1)
		return 0, errors.Join(net.ErrClosed, f.Close())
	}
	return f.Conn.Write(requests)
}

// Connections are cut 1000 times after they accepted requests that are not sent yet. No acknowledged write is lost, and
// no write that returned 503 is applied.
func TestRequestsThatAreNotSent(t *testing.T) {
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.DiscardHandler))
	dialer, began := fragile{countingDialer: new(countingDialer), cuts: new(atomic.Int64)}, time.Now()
	dialer.cuts.Store(-1)
	cfg := config.cluster.config(dialer.countingDialer)
	cfg.Dialer, cfg.NumConns = dialer, 32
	cfg.ReconnectionPolicy = &gocql.ConstantReconnectionPolicy{MaxRetries: 3, Interval: time.Millisecond}
	session, err := createSession(t.Context(), cfg)
	must(t, err)
	defer session.Close()
	sound := global.session.Swap(session)
	defer global.session.Store(sound)
	dialer.cuts.Store(0)
	var allowed sync.Map // by name: the ages that a user may have; 0 is no user
	concurrently(32, func(client int) {
		for i := 0; dialer.cuts.Load() < 1000 && time.Since(began) < 2*time.Minute; i++ { // half a minute, if the machine is idle
			name := fmt.Sprintf("%d: client %d user %d", began.UnixNano(), client, i)
			created := do(t, "POST /users", fmt.Sprintf(`{"name":%q,"email":"a@b.c","age":1}`, name))
			ages := map[int][]int{201: {1}, 503: {0}, 504: {0, 1}}[created.status]
			if created.status == 201 {
				changed := do(t, "PATCH "+created.header.Get("Location"), `{"age":2}`).status
				ages = map[int][]int{200: {2}, 503: {1}, 504: {1, 2}}[changed]
			}
			allowed.Store(name, ages)
		}
	})
	global.session.Store(sound)
	ages := map[string]int{}
	for _, u := range decode[[]userJSON](t, do(t, "GET /users/stream", ""), 200) {
		ages[u.Name] = u.Age
	}
	for name, want := range allowed.Range {
		failIf(t, !slices.Contains(want.([]int), ages[name.(string)]), "%s: age %d, want one of %v (0: absent)", name, ages[name.(string)], want)
	}
}

func TestClockSkewIsLoggedWhenItBeginsAndEnds(t *testing.T) {
	logged := captureLog(t)
	defer recordSkew(time.Duration(counters.skew.Load()))
	for _, tt := range []struct{ seconds, lines float64 }{{0, 0}, {-6, 1}, {-7, 0}, {8, 0}, {1, 1}, {0, 0}} {
		recordSkew(time.Duration(tt.seconds) * time.Second)
		wantEqual(t, "clock_skew_ms", figure(t, "cassandra.clock_skew_ms"), 1000*tt.seconds)
		wantEqual(t, fmt.Sprintf("lines in the log at %g s", tt.seconds), len(logged()), int(tt.lines))
	}
}

// Tests of users.go.

var (
	nameRule                  = "must be text of 1 to 100 characters, at least one of them visible, without control characters or U+FFFD"
	emailRule                 = "must be one plain address of at most 254 bytes, such as ada@example.com"
	ageRule                   = "must be a whole number from 0 to 150"
	badName, badEmail, badAge = at("/name", nameRule), at("/email", emailRule), at("/age", ageRule)
	noName, noEmail, noAge    = at("/name", "is missing; it "+nameRule), at("/email", "is missing; it "+emailRule), at("/age",
		"is missing; it "+ageRule)
	nameTwice, ageTwice = at("/name", "appears more than once"), at("/age", "appears more than once")
	notObject           = at("", "must be an object; its fields are name, email and age")
	noFields            = at("", "must have at least one of name, email and age")
	empty               = at("", "must be JSON; it is empty")
	longName            = at("", "has a member name of more than 100 bytes")
	stopped             = at("", "validation stopped after 100 errors")
)

func unknown(pointer string) string {
	return at(pointer, "unknown field; the fields are name, email and age (case-sensitive)")
}

func notJSON(why string) string { return at("", "must be one JSON value: "+why) }

func userWithName(name string) string {
	return `{"name":` + name + `,"email":"ada@example.com","age":36}`
}
func userWithEmail(email string) string { return `{"name":"Ada","email":` + email + `,"age":36}` }
func userWithAge(age string) string {
	return `{"name":"Ada","email":"ada@example.com","age":` + age + `}`
}
func adaWith(member string) string { return strings.TrimSuffix(adaBody, "}") + "," + member + "}" }

// badValues break the rule of their field.
var badValues = []struct {
	field, err string
	body       func(value string) string
	values     []string
}{
	{"name", badName, userWithName, []string{`""`, `" \t\u00a0\u2003"`, `"\u200b"`, `"\u00ad\u2060 "`, `{}`, `true`, `null`, `1`, `"a\u0000"`,
		`"a\nb"`, `"a\u007f"`, `"a\u0085"`, `"a\ufffd"`, "\"a\ufffd\"", `"a\ud83d"`, `"\uDE00a"`, `"\ude00\ud83d"`, `"\ud83d\u0041"`,
		"\"Ad\xff\"", "\"Ad\xe2\x82\"", "\"\xed\xa0\x80\"", `"` + strings.Repeat("𝄞", 101) + `"`}},
	{"email", badEmail, userWithEmail, []string{`""`, `"ada"`, `"ada@"`, `"@example.com"`, `"Ada <ada@example.com>"`, `"<ada@example.com>"`,
		`["a@b.c"]`, `null`, `1`, `"a@b.c, d@e.f"`, `"ada@example.com (Ada)"`, `" ada@example.com"`, `"ada@example.com\n"`, `"a..b@example.com"`,
		`"a@b.c\r\nBcc: d@e.f"`, `"a\u200bb@example.com"`, `"ada@exam\u00adple.com"`, `"\ud83d@example.com"`,
		`"` + strings.Repeat("a", 243) + `@example.com"`, `"` + strings.Repeat("a ", 500_000) + `@example.com"`}},
	{"age", badAge, userWithAge, []string{`-1`, `151`, `1e400`, `100e99999999999999999999`, strings.Repeat("9", 1000), `-9e99`, `30.5`, `1e-1`,
		`"30"`, `true`, `null`, `[30]`}},
}

// badBodies of POST and PUT, with their errors.
var badBodies = []struct{ body, errs string }{
	{`{}`, noName + "," + noEmail + "," + noAge}, {`{"name":null,"email":null,"age":null}`, badName + "," + badEmail + "," + badAge},
	{`{"age":-1,"x":1,"name":"Ada","name":"Ada"}`, badAge + "," + unknown("/x") + "," + nameTwice + "," + noEmail},
	{`{"name":1,"name":"Ada","email":"a@b.c","age":1}`, badName + "," + nameTwice}, {adaWith(`"nick":"a"`), unknown("/nick")},
	{adaWith(`"a/b~c":1`), unknown("/a~1b~0c")}, {adaWith(`"":1`), unknown("/")},
	{adaWith(`"` + strings.Repeat("x", 100) + `":1`), unknown("/" + strings.Repeat("x", 100))},
	{adaWith(`"` + strings.Repeat("é", 50) + `x":1,"` + strings.Repeat("y", 500_000) + `":1`), longName + "," + longName},
	{`{"Name":"Ada","EMAIL":"ada@example.com","aGe":36}`, unknown("/Name") + "," + unknown("/EMAIL") + "," + unknown("/aGe") + "," + noName +
		"," + noEmail + "," + noAge},
	{adaWith("\"\u212Aname\":1"), unknown("/\u212Aname")}, // a letter that folds to k
	{adaWith(`"age":36`), ageTwice}, {adaWith(`"\u0061ge":36`), ageTwice},
	{adaWith(`"id":1,"id":2`), at("/id", "appears more than once")}, {`null`, notObject}, {`1`, notObject}, {`"Ada"`, notObject},
	{`[` + adaBody + `]`, notObject}, {"", empty}, {" \r\n\t", empty},
	{`name=Ada`, notJSON("invalid character 'a' in literal null (expecting 'u')")},
	{`{"name":"Ada"`, notJSON("unexpected end of JSON input")}, {adaBody + `{}`, notJSON("invalid character '{' after top-level value")},
	{userWithAge(`NaN`), notJSON("invalid character 'N' looking for beginning of value")},
	{strings.Repeat("[", 500_000), notJSON("invalid character '[' exceeded max depth")},
	{adaWith(`"id":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)), notJSON("invalid character '[' exceeded max depth")},
}

func TestBadBodies(t *testing.T) {
	created := createAda(t)
	path := created.header.Get("Location")
	for _, tt := range badBodies {
		wantInvalid(t, do(t, "POST /users", tt.body), tt.errs)
		wantInvalid(t, do(t, "PUT "+path, tt.body), tt.errs)
	}
	for _, tt := range badValues {
		for _, value := range tt.values {
			wantInvalid(t, do(t, "POST /users", tt.body(value)), tt.err)
			wantInvalid(t, do(t, "PUT "+path, tt.body(value)), tt.err)
			wantInvalid(t, do(t, "PATCH "+path, `{"`+tt.field+`":`+value+`}`), tt.err)
		}
	}
	var members, errs []string
	for i := range 80_000 { // a megabyte
		members, errs = append(members, fmt.Sprintf(`"x%d":0`, i)), append(errs, unknown(fmt.Sprintf("/x%d", i)))
	}
	wantInvalid(t, do(t, "POST /users", "{"+strings.Join(members[:96], ",")+"}"), append(slices.Clone(errs[:96]), noName, noEmail, noAge)...)
	wantInvalid(t, do(t, "POST /users", "{"+strings.Join(members, ",")+"}"), append(slices.Clone(errs[:99]), stopped)...)
	wantInvalid(t, do(t, "PATCH "+path, "{"+strings.Join(members, ",")+"}"), append(errs[:99], stopped)...)
	for body, errs := range map[string]string{
		`{}`: noFields, `{"id":"x","created_at":1,"updated_at":null}`: noFields, `{"nick":"a"}`: unknown("/nick"),
		`{"name":"Bob","email":1,"age":1.5}`: badEmail + "," + badAge, `{"name":null,"name":"Bob","age":1}`: badName + "," + nameTwice,
		`[{"op":"replace","path":"/age","value":1}]`: notObject, `{"age":1,"` + strings.Repeat("x", 101) + `":null}`: longName,
	} {
		wantInvalid(t, do(t, "PATCH "+path, body, "Content-Type: application/merge-patch+json"), errs)
	}
	wantBody(t, do(t, "GET "+path, ""), 200, created.body)
}

func TestContentTypes(t *testing.T) {
	path := createPath(t)
	const refused = "|text/plain|application/x-www-form-urlencoded|application/jsonx|application/json/x|application/vnd.api+json|json|" +
		"application/json; charset|application/json, text/plain"
	for request := range strings.SplitSeq("POST /users|POST /users/batch|PUT "+path+"|PATCH "+path, "|") {
		body := pick(strings.HasSuffix(request, "batch"), "["+adaBody+"]", adaBody)
		status := pick(strings.HasPrefix(request, "POST"), 201, 200)
		for contentType := range strings.SplitSeq(refused, "|") {
			wantProblem(t, do(t, request, body, "Content-Type: "+contentType), 415, "Send the body as JSON: -H 'Content-Type: application/json'")
		}
		for contentType := range strings.SplitSeq("application/json|Application/JSON|application/json; charset=utf-8", "|") {
			wantStatus(t, do(t, request, body, "Content-Type: "+contentType), status)
		}
		status = pick(strings.HasPrefix(request, "PATCH"), 200, 415)
		wantStatus(t, do(t, request, body, "Content-Type: application/merge-patch+json"), status)
	}
}

func TestMalformedIDs(t *testing.T) {
	const id = "8b1a9953-c461-4d3c-9f3a-0123456789ab"
	for malformed := range strings.FieldsSeq("ada 1 8b1a9953c4614d3c9f3a0123456789ab %7BID%7D urn:uuid:ID ID0 " +
		"8b1a-9953c461-4d3c-9f3a-0123456789ab %20TAIL TAIL gTAIL ID%00 %22TAIL%22 %2e 1;DROP %C3%A4TAIL") {
		malformed = strings.NewReplacer("ID", id, "TAIL", id[1:]).Replace(malformed)
		for method := range strings.FieldsSeq("GET PUT PATCH DELETE") {
			wantProblem(t, do(t, method+" /users/"+malformed, `{"age":1}`), 400, "Invalid UUID format")
		}
	}
}

// usersAtTheLimits are valid; want is the user in the response, if it differs.
var usersAtTheLimits = []struct{ body, want string }{
	{userWithName(`"` + strings.Repeat("𝄞", 100) + `"`), ""}, {userWithEmail(`"` + strings.Repeat("a", 242) + `@example.com"`), ""},
	{`{"name":"a","email":"a@b","age":0}`, ""}, {userWithAge(`150`), ""}, {userWithAge(`30.0`), userWithAge(`30`)},
	{userWithAge(`3e1`), userWithAge(`30`)}, {userWithAge(`300000E-4`), userWithAge(`30`)}, {userWithAge(`-0.0e5`), userWithAge(`0`)},
	{userWithName(`" a "`), ""}, {userWithName("\"a\u200b\u00ad\""), ""}, // invisible characters beside a visible one
	{`{"age":36,"email":"ada@example.com","name":"Ada"}`, userWithName(`"Ada"`)},
	{`{"n\u0061me":"\u0041da","email":"ada@example.com","age":36}`, userWithName(`"Ada"`)},
	{`{"name":"李 Зоя é👩‍🚀","email":"зоя@пример.рф","age":1}`, ""},
	{userWithName(`"\ud83d\uDE00"`), userWithName(`"😀"`)}, {userWithName(`"\\ud83d"`), ""}, {userWithName(`"<b>&\u2028\"\\"`), ""},
	{adaWith(`"id":[],"created_at":{"a":1},"updated_at":null`), adaBody}, // read-only
	{"\r\n\t " + adaBody + strings.Repeat(" ", maxBody-len(adaBody)-4), adaBody},
}

func TestUsersAtTheLimits(t *testing.T) {
	generated := regexp.MustCompile(`^[0-9a-f-]{14}4[0-9a-f]{3}-[89ab][0-9a-f-]{16} \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)
	for _, tt := range usersAtTheLimits {
		want := decode[userJSON](t, response{body: cmp.Or(tt.want, tt.body)}, 0)
		posted := do(t, "POST /users", tt.body)
		got := decode[userJSON](t, posted, 201)
		want.ID, want.CreatedAt, want.UpdatedAt = got.ID, got.CreatedAt, got.CreatedAt
		wantBody(t, posted, 201, encode(want)+"\n")
		wantEqual(t, got.ID+" "+got.CreatedAt+" is valid", generated.MatchString(got.ID+" "+got.CreatedAt), true)
		wantHeader(t, posted, "Location", "/users/"+got.ID)
		wantHeader(t, posted, "Content-Type", "application/json")
		read := do(t, "GET /users/"+got.ID, "")
		wantBody(t, read, 200, posted.body)
		wantHeader(t, read, "ETag", posted.header.Get("ETag"))
		id := gocql.UUID(uuid.MustParse(got.ID)).Bytes()
		wantEqual(t, "serial reads", currentSession().Query(`SELECT * FROM system.paxos WHERE row_key = ?`, id).Iter().NumRows(), 0)
		wantBody(t, do(t, "GET /users/"+strings.ToUpper(got.ID), "", "Cache-Control: max-age=0, No-Cache"), 200, posted.body)
		put := do(t, "PUT /users/"+got.ID, read.body) // a response can be edited and PUT back
		want.UpdatedAt = decode[userJSON](t, put, 200).UpdatedAt
		wantBody(t, put, 200, encode(want)+"\n")
	}
}

func TestChangesOfAUser(t *testing.T) {
	before := createAda(t)
	path, u := before.header.Get("Location"), decode[userJSON](t, before, 201)
	for _, tt := range []struct {
		method, body string
		change       func()
	}{
		{"PUT", `{"name":"Bob","email":"bob@example.com","age":40}`, func() { u.Name, u.Email, u.Age = "Bob", "bob@example.com", 40 }},
		{"PATCH", `{"name":"Eve"}`, func() { u.Name = "Eve" }},
		{"PATCH", `{"email":"eve@example.com"}`, func() { u.Email = "eve@example.com" }}, {"PATCH", `{"age":0}`, func() { u.Age = 0 }},
		{"PATCH", `{"age":0}`, func() {}}, // even the same value makes a new version
		{"PATCH", `{"id":"x","created_at":"x","updated_at":"x","age":7}`, func() { u.Age = 7 }},
	} { // without a pause, so the clock often has not moved
		r, last := do(t, tt.method+" "+path, tt.body), u.UpdatedAt
		tt.change()
		u.UpdatedAt = decode[userJSON](t, r, 200).UpdatedAt
		failIf(t, u.UpdatedAt <= last || r.header.Get("ETag") == before.header.Get("ETag"),
			"updated_at = %s, ETag = %s, want new ones after %s, %s", u.UpdatedAt, r.header.Get("ETag"), last, before.header.Get("ETag"))
		wantBody(t, r, 200, encode(u)+"\n")
		before = do(t, "GET "+path, "")
		wantBody(t, before, 200, r.body)
		wantHeader(t, before, "ETag", r.header.Get("ETag"))
	}
}

func TestMissingAndDeletedUsers(t *testing.T) {
	for _, path := range []string{createPath(t), missingPath()} {
		for range 2 {
			wantBody(t, do(t, "DELETE "+path, ""), 204, "")
		}
		for method := range strings.FieldsSeq("PUT PATCH GET") {
			wantProblem(t, do(t, method+" "+path, adaBody), 404, "User not found")
		}
		wantProblem(t, do(t, "GET "+path, "", "Cache-Control: no-cache"), 404, "User not found")
	}
}

// newAda returns a user that was not written.
func newAda() *user {
	u := newUsers(1)[0]
	u.Name, u.Email, u.Age = "Ada Lovelace", "ada@example.com", 36
	return &u
}

// lostChanges creates n users, changes each immediately, by PUT, PATCH or DELETE in turn, and counts the changes that
// were reported as applied and are lost.
func lostChanges(t *testing.T, n int, create func(u *user) error) (lost int64) {
	concurrently(n, func(i int) {
		u, method := newAda(), []string{"PUT", "PATCH", "DELETE"}[i%3]
		must(t, create(u))
		path := "/users/" + u.ID.String()
		changed := do(t, method+" "+path, pick(method == "PUT", userWithAge("77"), `{"age":77}`))
		wantStatus(t, changed, pick(method == "DELETE", 204, 200))
		r := do(t, "GET "+path, "")
		if isKept := pick(method == "DELETE", r.status == 404, strings.Contains(r.body, `"age":77`)); !isKept {
			atomic.AddInt64(&lost, 1)
		}
	})
	return lost
}

func TestChangesRightAfterCreationAreKept(t *testing.T) {
	for _, skew := range []time.Duration{0, time.Hour, -time.Hour} { // of the clock of the instance that creates the user
		wantEqual(t, "lost changes with a skew of "+skew.String(), lostChanges(t, 90, func(u *user) error {
			u.CreatedAt += skew.Milliseconds()
			u.UpdatedAt = u.CreatedAt
			return createUsers(httptest.NewRecorder(), newRequest(t.Context(), "POST /users", ""), insert, "", []user{*u})
		}), 0)
	}
	// To show that this test can fail: an INSERT stamped 5 ms ahead, or more on a busy machine, wins over later changes.
	lost := int64(0)
	for ahead := 5 * time.Millisecond; ahead < time.Minute && lost == 0; ahead *= 5 {
		lost = lostChanges(t, 60, func(u *user) error {
			return currentSession().Query(insertUser, u.columns()...).WithTimestamp(time.Now().Add(ahead).UnixMicro()).Exec()
		})
	}
	failIf(t, lost == 0, "no change is ever lost, so this test shows nothing")
}

// The change runs between an edit's read and its write, so another instance's edit can be placed exactly there. Others may
// write rows with null columns: IF updated_at = null would also hold for a deleted row, and make half a new one.
func TestEditsOfTwoInstances(t *testing.T) {
	for _, tt := range []struct {
		create, between string
		age             int // -1: no user
	}{
		{insertUser, "", 37}, {insertUser, `UPDATE users SET updated_at = 1, age = 50 WHERE id = ? IF EXISTS`, 51},
		{insertUser, `DELETE FROM users WHERE id = ? IF EXISTS`, -1}, {`INSERT INTO users (id) VALUES (?)`, "", 1},
		{`INSERT INTO users (id) VALUES (?)`, `DELETE FROM users WHERE id = ? IF EXISTS`, -1},
	} {
		ada, before := newAda(), int64(0)
		ada.UpdatedAt += time.Hour.Milliseconds() // by a clock that is ahead
		exec(t, tt.create, ada.columns()[:strings.Count(tt.create, "?")]...)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		u, err := changeUser(ctx, ada.ID, nil, func(u *user) {
			before = u.UpdatedAt
			if u.Age++; tt.between != "" {
				exec(t, tt.between, gocql.UUID(u.ID))
				tt.between = ""
			}
		})
		path := "/users/" + ada.ID.String()
		if tt.age < 0 {
			wantStatus(t, do(t, "GET "+path, ""), 404) // a part of a row would be 200
			wantEqual(t, "error", err, error(errNoUser))
			continue
		}
		wantEqual(t, "error", err, nil)
		wantEqual(t, "age", u.Age, tt.age)
		failIf(t, u.UpdatedAt <= before, "updated_at = %d, want it after %d", u.UpdatedAt, before)
		wantBody(t, do(t, "GET "+path, ""), 200, string(u.appendJSON(nil))+"\n")
	}
}

func TestRowsWithNullColumns(t *testing.T) {
	const null = `","name":"","email":"","age":0,"created_at":"1970-01-01T00:00:00.000Z","updated_at":"1970-01-01T00:00:00.000Z"}` + "\n"
	for request, want := range map[string]string{
		"PUT " + adaBody:   `"name":"Ada Lovelace","email":"ada@example.com","age":36,"created_at":"1970-01-01T00:00:00.000Z"`,
		`PATCH {"age":36}`: `"name":"","email":"","age":36,"created_at":"1970-01-01T00:00:00.000Z"`,
		"DELETE ":          "",
	} {
		for header := range strings.SplitSeq(`If-Match: *|X-Other: 1|If-Match: "0"`, "|") {
			id := gocql.UUID(uuid.New())
			exec(t, `INSERT INTO users (id) VALUES (?)`, id)
			path := "/users/" + id.String()
			wantBody(t, do(t, "GET "+path, ""), 200, `{"id":"`+id.String()+null)
			method, body, _ := strings.Cut(request, " ")
			r := do(t, method+" "+path, body, header)
			wantStatus(t, r, pick(want == "", 204, 200))
			got := do(t, "GET "+path, "")
			failIf(t, !strings.Contains(r.body, want) || !strings.Contains(got.body, want) || (got.status == 404) != (want == ""),
				"%s; then %s; want %s", r, got, want)
		}
	}
}

// tagLists are values of If-None-Match and If-Match, and whether they match the user's current ETag, TAG.
var tagLists = []struct {
	list         string // | separates the values of two headers
	weak, strong bool   // If-None-Match compares weakly, If-Match strongly
}{
	{"TAG", true, true}, {"*", true, true}, {`"a" , TAG`, true, true}, {`"a",TAG,W/"b"`, true, true}, {`"a"|TAG`, true, true},
	{"W/TAG", true, false}, {`W/"a" , W/TAG , "b"`, true, false}, {`"a"`, false, false}, {`"*"`, false, false}, {`"x,*,y"`, false, false},
	// malformed ones match nothing
	{"", false, false}, {"1", false, false}, {"w/TAG", false, false}, {"TAG,", false, false}, {`"a" TAG`, false, false},
	{"TAG TAG", false, false}, {"*, TAG", false, false},
}

// conditional returns a header for each value of a list.
func conditional(name, list, tag string) (headers []string) {
	for value := range strings.SplitSeq(strings.ReplaceAll(list, "TAG", tag), "|") {
		headers = append(headers, name+": "+value)
	}
	return headers
}

func TestIfNoneMatch(t *testing.T) {
	created := createAda(t)
	path, tag := created.header.Get("Location"), created.header.Get("ETag")
	wantEqual(t, tag+" is strong", regexp.MustCompile(`^"[!#-~]+"$`).MatchString(tag), true)
	for _, tt := range tagLists {
		for method := range strings.FieldsSeq("GET HEAD") {
			r := do(t, method+" "+path, "", conditional("If-None-Match", tt.list, tag)...)
			wantBody(t, r, pick(tt.weak, 304, 200), pick(tt.weak, "", created.body)) // net/http removes the body of a HEAD
			wantHeader(t, r, "ETag", tag)
			wantHeader(t, r, "Content-Type", pick(tt.weak, "", "application/json"))
		}
	}
	wantProblem(t, do(t, "GET "+missingPath(), "", "If-None-Match: *"), 404, "User not found")
}

func TestIfMatch(t *testing.T) {
	for _, tt := range tagLists {
		for method, body := range map[string]string{"PUT": adaBody, "PATCH": `{"age":1}`, "DELETE": ""} {
			created := createAda(t)
			path, tag := created.header.Get("Location"), created.header.Get("ETag")
			given := conditional("If-Match", tt.list, tag)
			r := do(t, method+" "+path, body, given...)
			switch {
			case !tt.strong:
				wantProblem(t, r, 412, "If-Match does not match the current ETag")
				wantHeader(t, r, "ETag", tag)
				wantBody(t, do(t, "GET "+path, ""), 200, created.body)
			case method == "DELETE":
				wantBody(t, r, 204, "")
				wantStatus(t, do(t, "GET "+path, ""), 404)
			default:
				wantBody(t, do(t, "GET "+path, ""), 200, r.body)
				wantStatus(t, do(t, method+" "+path, body, given...), pick(tt.list == "*", 200, 412))
			}
			missing := do(t, method+" "+missingPath(), body, given...)
			wantStatus(t, missing, pick(method == "DELETE", 412, 404))
			wantHeader(t, missing, "ETag", "")
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	reused := wrong("header", "Idempotency-Key", "was used for a different request")
	key := "Idempotency-Key: " + strings.Repeat("~", 219) + uuid.NewString() // the longest
	first := do(t, "POST /users", adaBody, key)
	wantHeader(t, first, "Idempotency-Replayed", "")
	path := first.header.Get("Location")
	patched := do(t, "PATCH "+path, `{"age":1}`)
	for _, body := range []string{adaBody, `{"age":36.0,"email":"ada@example.com","name":"\u0041da Lovelace","id":"ignored"}`} {
		r := do(t, "POST /users", body, key)
		wantBody(t, r, 201, first.body)
		wantHeader(t, r, "Idempotency-Replayed", "true")
		wantHeader(t, r, "Location", path)
		wantHeader(t, r, "ETag", first.header.Get("ETag"))
	}
	wantInvalid(t, do(t, "POST /users", userWithAge("37"), key), reused)
	wantInvalid(t, do(t, "POST /users/batch", "["+adaBody+"]", key), reused)
	wantBody(t, do(t, "GET "+path, ""), 200, patched.body) // a repeat does not undo a change
	wantStatus(t, do(t, "DELETE "+path, ""), 204)
	wantBody(t, do(t, "POST /users", adaBody, key), 201, first.body)
	wantStatus(t, do(t, "GET "+path, ""), 404) // a repeat does not undo a deletion
	key = "Idempotency-Key: " + uuid.NewString()
	first = do(t, "POST /users/batch", batchOf(50, shortTexts), key)
	wantBody(t, do(t, "POST /users/batch", batchOf(50, shortTexts), key), 201, first.body)
	wantInvalid(t, do(t, "POST /users/batch", batchOf(49, shortTexts), key), reused)
	wantInvalid(t, do(t, "POST /users/batch", strings.Replace(batchOf(50, shortTexts), `"age":49`, `"age":50`, 1), key), reused)
}

// A first request may end between recording its key and writing the user.
func TestRetryCompletesTheFirstRequest(t *testing.T) {
	key, ada := uuid.NewString(), newAda()
	wantStatus(t, do(t, "POST /users", adaBody, "Idempotency-Key: "+key), 201)
	fingerprint, seconds := []byte{}, 0
	must(t, currentSession().Query(`SELECT fingerprint, TTL(ids) FROM idempotency_keys WHERE key = ?`, key).Scan(&fingerprint, &seconds))
	failIf(t, seconds < 86_000 || seconds > 86_400, "a key is kept for %d s, want a day", seconds)
	ids := []gocql.UUID{gocql.UUID(ada.ID)}
	exec(t, `INSERT INTO idempotency_keys (key, created_at, fingerprint, ids) VALUES (?, ?, ?, ?)`, key+"-2", ada.CreatedAt, fingerprint, ids)
	r := do(t, "POST /users", adaBody, "Idempotency-Key: "+key+"-2")
	wantBody(t, r, 201, string(ada.appendJSON(nil))+"\n")
	wantBody(t, do(t, "GET /users/"+ada.ID.String(), ""), 200, r.body)
}

func TestInvalidIdempotencyKeys(t *testing.T) {
	invalid := wrong("header", "Idempotency-Key", "must be a single value of 1 to 255 visible ASCII characters")
	for _, key := range []string{"", " ", "a b", "a\tb", "ä", "a\x7f", strings.Repeat("k", 256)} {
		wantInvalid(t, do(t, "POST /users", adaBody, "Idempotency-Key: "+key), invalid)
		wantInvalid(t, do(t, "POST /users/batch", "[{}]", "Idempotency-Key: "+key), invalid,
			element(0, noName), element(0, noEmail), element(0, noAge))
	}
	wantInvalid(t, do(t, "POST /users", adaBody, "Idempotency-Key: a", "Idempotency-Key: a"), invalid)
}

func TestRequestsPastTheirDeadline(t *testing.T) {
	isPath := regexp.MustCompile(`^/users/[0-9a-f-]{36}$`)
	path := createPath(t)
	for request := range strings.SplitSeq("POST /users|POST /users/batch|DELETE PATH|PUT PATH|PATCH PATH|GET PATH|GET /users|"+
		"GET /performance/async|GET /slow_query|POST /context_manager_safety/query_error|GET /users/stream|GET /users/stream?limit=5|"+
		"GET /users/stream?age_filter=1|GET /users/stream/pages", "|") {
		detail := cmp.Or(map[string]string{"POST /users": inDoubtUser, "POST /users/batch": inDoubtUsers, "DELETE PATH": inDoubtEdit}[request],
			tooLate)
		body := pick(strings.HasSuffix(request, "batch"), "["+adaBody+"]", adaBody)
		for header := range strings.SplitSeq("X-Other: 1|Accept: application/x-ndjson|Idempotency-Key: "+uuid.NewString(), "|") {
			r := do(t, strings.Replace(request, "PATH", path, 1), body, "X-Request-Timeout: 0.000000001", header)
			wantEqual(t, request+" has a Location", isPath.MatchString(r.header.Get("Location")), request == "POST /users")
			r.header.Del("Location")
			if wantStatus(t, r, 504); !strings.HasPrefix(header, "Idem") { // with a key the deadline may pass before any write
				wantProblem(t, r, 504, detail)
			}
		}
	}
}

// batchOf returns the body of a batch of n users with the texts of each.
func batchOf(n int, texts func(i int) (name, email string)) string {
	elements := make([]string, n)
	for i := range elements {
		name, email := texts(i)
		elements[i] = fmt.Sprintf(`{"name":%q,"email":%q,"age":%d}`, name, email, i)
	}
	return "[" + strings.Join(elements, ",") + "]"
}

func shortTexts(i int) (name, email string) {
	return fmt.Sprintf("Ada %d", i), fmt.Sprintf("ada%d@example.com", i)
}

func TestBatchIsCreatedInOrder(t *testing.T) {
	for _, n := range []int{1, maxBatch} {
		r := do(t, "POST /users/batch", batchOf(n, shortTexts))
		created := decode[struct{ Created []userJSON }](t, r, 201).Created
		wantBody(t, r, 201, fmt.Sprintf(`{"count":%d,"created":%s}`, n, encode(created))+"\n")
		for i, u := range created {
			name, email := shortTexts(i)
			wantEqual(t, "created", u, userJSON{u.ID, name, email, i, u.CreatedAt, u.CreatedAt})
			wantBody(t, do(t, "GET /users/"+u.ID, ""), 200, encode(u)+"\n")
		}
	}
}

func element(i int, err string) string {
	return strings.Replace(err, `"pointer":"`, fmt.Sprintf(`"pointer":"/%d`, i), 1)
}

func TestRefusedBatchWritesNothing(t *testing.T) {
	wrongSize, missing := at("", "must be an array of 1 to 100 users"), []string{}
	for i := range 33 {
		missing = append(missing, element(i, noName), element(i, noEmail), element(i, noAge))
	}
	before := counters.queries.Load()
	for body, errs := range map[string][]string{
		strings.Replace(batchOf(100, shortTexts), `"age":99`, `"age":151`, 1): {element(99, badAge)},
		`[` + adaBody + `,null,{"name":"Ada","email":"x","age":151},[],{}]`: {element(1, notObject), element(2, badEmail), element(2, badAge),
			element(3, notObject), element(4, noName), element(4, noEmail), element(4, noAge)},
		"[" + strings.Repeat("{},", 99) + "{}]": append(missing, stopped), `[]`: {wrongSize}, batchOf(101, shortTexts): {wrongSize},
		"[" + strings.Repeat("0,", 500_000) + "0]": {wrongSize}, adaBody: {wrongSize}, `null`: {wrongSize},
	} {
		wantInvalid(t, do(t, "POST /users/batch", body), errs...)
	}
	wantEqual(t, "queries", counters.queries.Load()-before, 0)
}

// Cassandra counts bytes in its own way, but accepts any batch of 44,000 bytes of response JSON, whatever the users look like.
func TestLargestBatch(t *testing.T) {
	const limit = 44_000
	email := strings.Repeat("e", maxEmail-len("@example.com")) + "@example.com"
	for _, n := range []int{55, maxBatch} { // few large users, and many small ones
		post := func(allNames int) response { // bytes, distributed evenly
			return do(t, "POST /users/batch", batchOf(n, func(i int) (string, string) {
				size := allNames*(i+1)/n - allNames*i/n
				return strings.Repeat("𝔸", size/4) + strings.Repeat("A", size%4), email
			}))
		}
		most := n + limit - len(post(n).body)
		r := post(most)
		wantStatus(t, r, 201)
		wantEqual(t, "bytes", len(r.body), limit)
		wantProblem(t, post(most+1), 413, "Batch too large: 44001 bytes of response JSON, limit 44000; split it")
	}
}

// Tests of stream.go.

var (
	number0, number1 = "must be one whole number in plain digits, at least 0", "must be one whole number in plain digits, at least 1"
	badLimit         = wrong("parameter", "limit", number1)
	badFetch         = wrong("parameter", "fetch_size", number1)
	badFilter        = wrong("parameter", "age_filter", number0)
	corrupt          = wrong("parameter", "page_state", "is empty, repeated, corrupt or from another endpoint; start again without page_state")
	otherFilter      = wrong("parameter", "page_state", "was made with another age_filter; start again without page_state")
)

func TestBadParameters(t *testing.T) {
	escape := func(why string) string { return wrong("parameter", "query string", "must be percent-encoded: "+why) }
	queries := map[string]string{
		"limit=%zz": escape(`invalid URL escape "%zz"`), "limit=5%2": escape(`invalid URL escape "%2"`),
		"%zz=1&limit=0":                           escape(`invalid URL escape "%zz"`) + "," + badLimit,
		"limit=1;fetch_size=2":                    escape("invalid semicolon separator in query"),
		"fetch_size=0&limit=x&age_filter=-1":      badFetch + "," + badLimit + "," + badFilter,
		"page_state=x&fetch_size=0&age_filter=-1": corrupt + "," + badFetch + "," + badFilter,
	}
	for query := range strings.FieldsSeq("limit=0 limit=-1 limit=-99999999999999999999 limit=+5 limit=%2B5 limit=1.5 limit=1e3 limit=0x10 " +
		"limit=1_0 limit=%D9%A3 limit=ten limit= limit limit=1%20 limit=1%00 limit=1&limit=1 limit=1&%6cimit=2&limit") { // %D9%A3 is Arabic
		queries[query] = badLimit
	}
	for query, errs := range queries {
		for path := range strings.FieldsSeq("/users /users/stream /users/stream/pages") {
			if path != "/users" || !strings.Contains(query, "age_filter") { // unknown there
				wantInvalid(t, do(t, "GET "+path+"?"+query, ""), errs)
			}
		}
	}
	wantInvalid(t, do(t, "GET /performance/sync?requests=0", ""), wrong("parameter", "requests", number1))
}

func TestGoodParameters(t *testing.T) {
	users := storedUsers(t)
	for query, n := range map[string]int{
		"limit=1": 1, "limit=001": 1, "limit=%31": 1, "limit=101": 100, "limit=99999999999999999999": 100, "": 10, "Limit=x": 10,
		"unknown=%00&&=&age_filter=x": 10,
	} {
		wantBody(t, do(t, "GET /users?"+query, ""), 200, array(users[:n]))
	}
	for _, query := range []string{"limit=1&fetch_size=99999999999999999999&age_filter=0", "limit=1&fetch_size=0001"} {
		wantBody(t, do(t, "GET /users/stream?"+query, ""), 200, array(users[:1]))
	}
	wantBody(t, do(t, "GET /users/stream?age_filter=99999999999999999999", ""), 200, array(ofAge(users, 150))) // clamped
	wantEqual(t, "users in a page of 5001", strings.Count(do(t, "GET /users/stream/pages?fetch_size=5001", "").body, `"id":`), 5000)
}

var fillOnce sync.Once

// storedUsers reads all users with the driver alone, in token order. There are over 6000, at least 60 of each age from 0 to 99.
func storedUsers(t testing.TB) (users []*user) {
	t.Helper()
	fillOnce.Do(func() { fillUsers(t, 6000) })
	rows, token := currentSession().Query(`SELECT `+userColumns+`, token(id) FROM users`).PageSize(5000).Iter(), int64(0)
	for u := new(user); rows.Scan(append(u.columns(), &token)...); u = new(user) {
		users = append(users, u)
		if tokenOf(u.ID) != token { // then a stream would not end
			t.Fatalf("tokenOf(%s) = %d, want %d", u.ID, tokenOf(u.ID), token)
		}
	}
	must(t, rows.Close())
	return users
}

// fillUsers inserts n users with names of 100 characters.
func fillUsers(t testing.TB, n int) {
	concurrently(n, func(i int) {
		u := newAda()
		u.Name, u.Age = fmt.Sprintf("%0100d", i), i%100
		wantEqual(t, "error", currentSession().Query(insertUser, u.columns()...).Exec(), nil)
	})
}

// ofAge returns the users of an age or older.
func ofAge(users []*user, age int) []*user {
	return slices.DeleteFunc(slices.Clone(users), func(u *user) bool { return u.Age < age })
}

// lines returns users as NDJSON. The next function, array, returns them as a JSON array.
func lines(users []*user) string {
	var text []byte
	for _, u := range users {
		text = append(u.appendJSON(text), '\n')
	}
	return string(text)
}

func array(users []*user) string {
	return "[" + strings.ReplaceAll(strings.TrimSuffix(lines(users), "\n"), "\n", ",") + "]\n"
}

// readPages follows page_state from a query on, cycling through the fetch sizes, and returns all users as a JSON array.
func readPages(t testing.TB, h http.Handler, path, member, query string, fetchSizes ...int) string {
	t.Helper()
	var pages []string
	for i := 0; ; i++ {
		size := fetchSizes[i%len(fetchSizes)]
		r := doOn(t, h, fmt.Sprintf("GET %s?%s&fetch_size=%d", path, query, size), "")
		members := decode[map[string]json.RawMessage](t, r, 200)
		users, state, more := string(members[member]), strings.Trim(string(members["page_state"]), `"`), string(members["has_more"]) == "true"
		wantBody(t, r, 200, fmt.Sprintf(`{"%s":%s,"has_more":%t,"page_state":%s}`+"\n", member, users, more, members["page_state"]))
		wantEqual(t, "has_more", more, state != "null")
		if users != "[]" {
			pages = append(pages, strings.Trim(users, "[]"))
		}
		n := strings.Count(users, `"id":`)
		failIf(t, member == "users" && n > size, "%d users for fetch_size %d", n, size) // elsewhere ids with one token share a page
		if !more {
			wantHeader(t, r, "Link", "")
			return "[" + strings.Join(pages, ",") + "]\n"
		}
		query = "page_state=" + state
		wantHeader(t, r, "Link", fmt.Sprintf(`<%s?fetch_size=%d&page_state=%s>; rel="next"`, path, size, state))
	}
}

func TestStreamsHaveEveryUserOnce(t *testing.T) {
	all := storedUsers(t)
	pages := func(query string, sizes ...int) string {
		return readPages(t, service, "/users/stream/pages", "users", query, sizes...)
	}
	for query := range strings.SplitSeq("|fetch_size=100|fetch_size=5000", "|") {
		wantBody(t, do(t, "GET /users/stream?"+query, ""), 200, array(all))
		wantBody(t, do(t, "GET /users/stream?"+query, "", "Accept: "+ndjson), 200, lines(all))
	}
	wantEqual(t, "pages of changing sizes", pages("", 1000, 1, 999, 70, 5000), array(all))
	for _, age := range []int{1, 90, 99, 150} {
		older, query := ofAge(all, age), fmt.Sprintf("age_filter=%d", age)
		wantBody(t, do(t, "GET /users/stream?fetch_size=500&"+query, ""), 200, array(older))
		wantBody(t, do(t, "GET /users/stream?"+query, "", "Accept: "+ndjson), 200, lines(older))
		wantEqual(t, "pages of "+query, pages(query, 1000, 100), array(older))
	}
	for _, tt := range []struct{ limit, fetchSize, age int }{
		{1, 1000, 0}, {1, 1, 0}, {999, 1000, 0}, {1000, 1000, 0}, {2001, 1000, 0}, {5999, 1000, 0}, {100_000, 5000, 0},
		{500, 100, 50}, {7, 3, 90}, {600, 100, 90}, {5000, 100, 99},
	} {
		older := ofAge(all, tt.age)
		want, query := array(older[:min(tt.limit, len(older))]), fmt.Sprintf("limit=%d&age_filter=%d", tt.limit, tt.age)
		wantBody(t, do(t, fmt.Sprintf("GET /users/stream?%s&fetch_size=%d", query, tt.fetchSize), ""), 200, want)
		wantEqual(t, "pages of "+query, pages(query, tt.fetchSize), want)
	}
}

func TestListHasEveryUserOnce(t *testing.T) {
	all := storedUsers(t)
	next := regexp.MustCompile(`^<(/users\?limit=100&page_state=[A-Za-z0-9._~-]+)>; rel="next"$`)
	for target, at := "/users?limit=100", 0; target != ""; at += 100 {
		r := do(t, "GET "+target, "")
		wantBody(t, r, 200, array(all[at:min(at+100, len(all))]))
		target = ""
		if link := next.FindStringSubmatch(r.header.Get("Link")); link != nil {
			target = link[1]
		} else if at+100 < len(all) || r.header.Get("Link") != "" {
			t.Fatalf("Link = %q after %d of %d users", r.header.Get("Link"), at+100, len(all))
		}
	}
}

var tables atomic.Int64

// newTable creates a table like users, with n users, and returns its name and the handlers of its stream and its pages, at /test.
func newTable(t *testing.T, n int) (name string, streamed, pages http.Handler, insert func(u *user)) {
	t.Helper()
	tb := *usersTable
	tb.name = fmt.Sprintf("users%d", tables.Add(1))
	tb.selectRange = strings.Replace(tb.selectRange, "users", tb.name, 1)
	tb.selectFiltered = strings.Replace(tb.selectFiltered, "users", tb.name, 1)
	exec(t, strings.Replace(fmt.Sprintf(createUsersTable, config.cluster.keyspace), ".users", "."+tb.name, 1))
	insert = func(u *user) { exec(t, strings.Replace(insertUser, "users", tb.name, 1), u.columns()...) }
	for range n {
		insert(newAda())
	}
	return tb.name, routed(func(w http.ResponseWriter, r *http.Request) error { return tb.stream(w, r) }),
		routed(func(w http.ResponseWriter, r *http.Request) error { return tb.getPage(w, r) }), insert
}

func TestQueriesOfAStream(t *testing.T) {
	empty, emptyStream, emptyPages, _ := newTable(t, 0)
	_, fewStream, fewPages, _ := newTable(t, 20)
	wantBody(t, doOn(t, emptyStream, "GET /test", ""), 200, "[]\n")
	wantBody(t, doOn(t, emptyPages, "GET /test", ""), 200, `{"`+empty+`":[],"has_more":false,"page_state":null}`+"\n")
	count := func(h http.Handler, query string, users int, most int64) {
		before := counters.queries.Load()
		r := doOn(t, h, "GET /test?"+query, "")
		wantEqual(t, "users of "+query, strings.Count(r.body, `"id":`), users)
		n := counters.queries.Load() - before
		failIf(t, n < 1 || n > most, "%s: %d queries, want 1 to %d", query, n, most)
	}
	count(emptyStream, "age_filter=1", 0, 2)
	count(fewStream, "", 20, 1)
	count(fewStream, "limit=20", 20, 1)
	count(fewStream, "age_filter=30", 20, 2)
	count(fewPages, "fetch_size=7", 7, 1)
	count(fewPages, "age_filter=37", 0, 2)
}

func firstToken(t testing.TB, h http.Handler, target string) string {
	t.Helper()
	state, _ := decode[map[string]any](t, doOn(t, h, "GET "+target, ""), 200)["page_state"].(string)
	if state == "" {
		t.Fatalf("no page_state after %s", target)
	}
	return state
}

func TestDamagedPageTokens(t *testing.T) {
	storedUsers(t)
	const page = "/users/stream/pages?page_state="
	token := firstToken(t, service, "/users/stream/pages?fetch_size=10&age_filter=30&limit=99")
	failIf(t, url.QueryEscape(token) != token || len(token) > 200, "token = %q, want short and URL-safe text", token)
	damaged := []string{token + token, token + "=", token + "\n", " " + token, "", "%%%", strings.ToUpper(token), strings.Repeat(".", 6),
		strings.Repeat("9", 5000)}
	for i := range token {
		damaged = append(damaged, token[:i], token[:i]+token[i+1:], token[:i+1]+token[i:])
		for _, c := range []byte{'A', '1', token[i] ^ 1, token[i] ^ 32, 0, 255} {
			if c != token[i] {
				damaged = append(damaged, token[:i]+string([]byte{c})+token[i+1:])
			}
		}
	}
	for _, text := range damaged {
		wantInvalid(t, do(t, "GET "+page+url.QueryEscape(text), ""), corrupt)
	}
	_, link, _ := strings.Cut(do(t, "GET /users", "").header.Get("Link"), "page_state=")
	list, _, _ := strings.Cut(link, ">")
	_, _, otherPages, _ := newTable(t, 20)
	for target, err := range map[string]string{
		page + token + "&age_filter=31": otherFilter, "/users/stream?page_state=" + token + "&age_filter=0": otherFilter,
		page + token + "&page_state=" + token: corrupt, page + token + "&limit=x": badLimit /* validated, but unused */, page + list: corrupt,
		"/users/stream?page_state=" + list: corrupt, "/users?page_state=" + token: corrupt, page + token[:len(token)-8] + "00000000": corrupt,
		page + firstToken(t, otherPages, "/test?fetch_size=10"): corrupt, "/users?limit=0&page_state=" + list[1:]: badLimit + "," + corrupt,
	} {
		wantInvalid(t, do(t, "GET "+target, ""), err)
	}
	wantInvalid(t, doOn(t, otherPages, "GET /test?page_state="+token, ""), corrupt)
}

func TestPageTokenKeepsItsQuery(t *testing.T) {
	rest := array(ofAge(storedUsers(t), 30)[10:25])
	token := firstToken(t, service, "/users/stream/pages?fetch_size=10&age_filter=30&limit=25")
	for query := range strings.SplitSeq("|&age_filter=30|&limit=3|&fetch_size=5000", "|") {
		wantBody(t, do(t, "GET /users/stream/pages?page_state="+token+query, ""), 200,
			`{"users":`+rest[:len(rest)-1]+`,"has_more":false,"page_state":null}`+"\n")
		wantBody(t, do(t, "GET /users/stream?page_state="+token+query, ""), 200, rest)
	}
}

// A page returns what it has found after half of the time, however narrow its slices are.
func TestPagesEndInTime(t *testing.T) {
	s := newScan(usersTable)
	s.minAge, s.width = maxAge, 1<<44 // a million slices
	start, r := time.Now(), do(t, "GET /users/stream/pages?page_state="+s.token(streamToken), "", "X-Request-Timeout: 2")
	wantParts(t, r.body, `"has_more":true,"page_state":"`+streamToken)
	failIf(t, time.Since(start) > 1900*time.Millisecond, "a page took %s of 2 s", time.Since(start))
}

// idsByToken has three ids for each token. Murmur3 hashes the last id to -2^63, which Cassandra replaces with 2^63-1.
var idsByToken = map[int64]string{
	math.MinInt64 + 1: "cb4551b2-b9fb-9613-7cd2-96af69805086 c858a7a9-78e6-16af-9737-b6b642a52aaa 0e030456-13ed-3dbb-3195-59d04bffc4a6",
	0:                 "c5a81096-2f4d-5e41-5b82-8312802740cc 247cd111-b473-d61c-df65-c049ccd2cad0 67d6fcf0-c72e-707d-7271-aa71eadefe56",
	1:                 "ce8dd895-104b-22ee-0838-f1e460bb7fe6 a99df533-bf2c-9073-af3c-77974e62b498 ced57f72-0f30-b53f-eaea-d5768e612778",
	math.MaxInt64:     "c0992c12-d3a9-aeda-d444-488351a9c592 6051880b-bbb9-c732-9ca4-2df5ec2c80f1 34b18271-bf96-f4e7-83df-22a188141b82",
}

// Rows with the same token share a page, so none is lost at its end.
func TestIDsWithTheSameToken(t *testing.T) {
	name, streamed, pages, insert := newTable(t, 0)
	for token, ids := range idsByToken {
		for id := range strings.FieldsSeq(ids) {
			u := newAda()
			u.ID = uuid.MustParse(id)
			wantEqual(t, "token of "+id, tokenOf(u.ID), token)
			insert(u)
		}
	}
	all := doOn(t, streamed, "GET /test", "").body
	wantEqual(t, "users", strings.Count(all, `"id"`), 12)
	for size := 1; size <= 13; size++ { // pages end before, between and after them
		for query := range strings.SplitSeq("|age_filter=30", "|") {
			wantBody(t, doOn(t, streamed, fmt.Sprintf("GET /test?fetch_size=%d&%s", size, query), ""), 200, all)
			wantEqual(t, fmt.Sprintf("pages of %d", size), readPages(t, pages, "/test", name, query, size), all)
		}
	}
}

func TestSlices(t *testing.T) {
	wantEqual(t, "a slice that times out is too wide", isTooWide(fault(gocql.ErrCodeReadTimeout)), true)
	for range 1000 {
		s := newScan(usersTable)
		s.from = int64(rand.Uint64())
		from := s.from - int64(rand.Uint64N(uint64(s.from)-(1<<63))>>1)
		s.setWidth(from, rand.IntN(1000), 1+rand.IntN(filterRows))
		failIf(t, s.width == 0 || s.bound() <= s.from, "from %d: %+v, bound %d", from, s, s.bound())
		s.width = math.MaxUint64 >> (1 + rand.IntN(8)) // at most 512 slices
		for before := s.from; s.more() && !t.Failed(); before = s.from {
			s.from = s.bound()
			failIf(t, s.from <= before, "a slice from %d ends at %d", before, s.from)
		}
	}
}

// Tests of safety.go.

// The self-tests run concurrently, and leave the users, the session and everything else as they were.
func TestSelfTests(t *testing.T) {
	users, before := array(storedUsers(t)), observeSession()
	goroutines, open := runtime.NumGoroutine(), counters.connections.open.Load()
	results := make([]string, 3)
	for i, age := range []int{20, 30, 40} {
		var rows []string
		for n := i; n < 30; n += 3 {
			rows = append(rows, fmt.Sprintf(`{"name":"user %d","age":%d}`, n, age))
		}
		results[i] = fmt.Sprintf(`{"age":%d,"count":10,"users":[%s]}`, age, strings.Join(rows, ","))
	}
	const caught = "table non_existent_table_xyz does not exist"
	var running sync.WaitGroup
	for request, want := range map[string]string{
		"POST query_error": `"error_caught":"running SELECT name, age FROM non_existent_table_xyz: ` + caught + `","session_unchanged":true,` +
			`"session_open":true,"session_still_works":true`,
		"POST streaming_error": `"streaming_error_caught":true,"error_message":"streaming the scratch table: ` + caught + `",` +
			`"session_open":true,"session_unchanged":true,"session_still_streams":true,"stream_completed":true,"rows_after_error":20`,
		"POST concurrent_streams": `"streams_completed":3,"all_streams_independent":true,"results":[` + strings.Join(results, ",") +
			`],"session_still_open":true`,
		"POST nested_contexts": `"events":["cluster_opened","session_opened","stream_opened","stream_closed","session_works_after_stream:5",` +
			`"session_closing","session_closed","cluster_works_after_session:True","cluster_closing","cluster_closed"],"correct_order":true,` +
			`"row_count":5,"main_session_unaffected":true`,
		"POST cancellation": `"rows_processed_before_cancel":5,"was_cancelled":true,"error_type":"context canceled","cleaned_up":true,` +
			`"session_still_works":true,"session_open":true,"new_stream_worked":true,"total_rows":50`,
		"GET status": fmt.Sprintf(`"session_open":true,"session_id":"%d","cluster_open":true,"keyspace":%q`,
			observeSession().number, config.cluster.keyspace),
	} {
		if name, ok := strings.CutPrefix(request, "POST "); ok {
			want = fmt.Sprintf(`"test":%q,`, name) + want
		}
		masked := map[string]string{"POST query_error": "cassandra_version", "GET status": "cluster_id"}[request]
		for range 4 {
			running.Go(func() {
				wantJSON(t, do(t, strings.Replace(request, " ", " /context_manager_safety/", 1), ""), 200, "{"+want+"}", masked)
			})
		}
	}
	for range 5 {
		wantBody(t, do(t, "GET /users/stream", ""), 200, users)
	}
	running.Wait()
	wantEqual(t, "session", observeSession(), before)
	quiet := func() bool { return runtime.NumGoroutine() <= goroutines && counters.connections.open.Load() == open }
	failIf(t, !waitUntil(quiet, 10*time.Second), "%d goroutines, %d connections, want %d and %d", runtime.NumGoroutine(),
		counters.connections.open.Load(), goroutines, open)
}

func TestVerdicts(t *testing.T) {
	start, open := time.Now(), sessionState{number: 1, open: true}
	independent := func(damage func(s []ageStream)) bool {
		streams := make([]ageStream, 3)
		for i, age := range []int{20, 30, 40} {
			rows, first := slices.Repeat([]scratchRow{{Age: age}}, 10), start.Add(time.Duration(i)*time.Second)
			streams[i] = ageStream{Age: age, Users: rows, firstPage: first, ended: start.Add(time.Minute)}
		}
		damage(streams)
		return areIndependent(streams)
	}
	for verdict, got := range map[string]bool{
		"good: streams as they should be":           independent(func([]ageStream) {}),
		"bad: foreign row":                          independent(func(s []ageStream) { s[1].Users[9].Age = 20 }),
		"bad: missing row":                          independent(func(s []ageStream) { s[2].Users = s[2].Users[:9] }),
		"bad: extra row":                            independent(func(s []ageStream) { s[0].Users = append(s[0].Users, s[0].Users[0]) }),
		"bad: a stream ended before the last began": independent(func(s []ageStream) { s[0].ended = start.Add(time.Second) }),
		"bad: a stream never began":                 independent(func(s []ageStream) { s[1] = ageStream{Age: 30} }),
		"good: same session":                        open.unchangedSince(open),
		"bad: another session":                      sessionState{2, true}.unchangedSince(open),
		"bad: closed session":                       sessionState{1, false}.unchangedSince(open),
		"bad: session that was closed before":       open.unchangedSince(sessionState{1, false}),
		"bad: no session":                           sessionState{}.unchangedSince(sessionState{}),
		"good: cancelled midway":                    wasCancelled(queryErrorf(read, context.Canceled, "reading"), 5, 50),
		"bad: not cancelled":                        wasCancelled(nil, 5, 50),
		"bad: cancelled at its end":                 wasCancelled(context.Canceled, 50, 50),
		"bad: failed for another reason":            wasCancelled(gocql.ErrNoConnections, 5, 50),
	} {
		wantEqual(t, verdict, got, strings.HasPrefix(verdict, "good"))
	}
}

func TestSlowQueries(t *testing.T) {
	for target, want := range map[string]string{"/slow_query": `^{"duration":5\.[0-4]\d*,"message":"Slow query completed"}\n$`,
		"/long_running_query": `^{"duration":10\.[0-4]\d*,"message":"Long running query completed"}\n$`} {
		t.Run(target, func(t *testing.T) {
			t.Parallel() // the two wait together
			start := time.Now()
			wantProblem(t, do(t, "GET "+target, "", "X-Request-Timeout: 0.1"), 504, tooLate)
			took := time.Since(start)
			failIf(t, took < 100*time.Millisecond || took > 300*time.Millisecond, "a deadline of 100 ms passed after %s", took)
			before, r := counters.queries.Load(), do(t, "GET "+target, "")
			failIf(t, counters.queries.Load() == before, "no query was sent")
			failIf(t, r.status != 200 || !regexp.MustCompile(want).MatchString(r.body), "%s; want %s", r, want)
		})
	}
}

func TestPerformance(t *testing.T) {
	for _, mode := range []string{"async", "sync"} {
		p := decode[performance](t, do(t, "GET /performance/"+mode+"?requests=500", ""), 200)
		counts := p.Mode == mode && p.Requests == 500 && p.SuccessfulRequests == 500 && p.FailedRequests == 0
		ordered := 0 < p.P50 && p.P50 <= p.P95 && p.P95 <= p.P99 && p.P99 <= 1000*p.TotalTime
		means := math.Abs(p.RequestsPerSecond*p.TotalTime-500) < 1e-6 && math.Abs(p.AvgTimePerRequest*500-p.TotalTime) < 1e-9
		failIf(t, !counts || !ordered || !means, "figures do not add up: %+v", p)
		wantEqual(t, mode+" reads overlapped", p.P50*250 > 1000*p.TotalTime, mode == "async") // half of the reads took P50 or more
	}
	for query, want := range map[string]int{"": 100, "?requests=1": 1, "?requests=1001": 1000} {
		wantEqual(t, "reads", decode[performance](t, do(t, "GET /performance/async"+query, ""), 200).Requests, want)
	}
	before := counters.queries.Load()
	wantProblem(t, do(t, "GET /performance/sync?requests=1000", "", "X-Request-Timeout: 0.05"), 504, tooLate)
	failIf(t, counters.queries.Load()-before > 900, "%d queries in a run of 50 ms", counters.queries.Load()-before)
}

// Tests of metrics.go.

// figure returns one of the metrics by its path, such as "cassandra.session", without a request, which would count.
func figure(t testing.TB, path string) float64 {
	t.Helper()
	var value any = decode[map[string]any](t, response{body: encode(jsonMetrics())}, 0)
	for name := range strings.SplitSeq(path, ".") {
		value = value.(map[string]any)[name]
	}
	if isTrue, ok := value.(bool); ok {
		return pick(isTrue, 1.0, 0)
	}
	return value.(float64)
}

func TestQueriesPerSecondIsTheMeanOfAMinute(t *testing.T) {
	var h history
	total := int64(0)
	for _, tt := range []struct {
		seconds, perTick int64
		want             float64
	}{{10, 1, 10}, {20, 0, 100. / 30}, {30, 0, 100. / 60}, {4, 0, 60. / 60}, {6, 0, 0}} {
		for range tt.seconds * int64(time.Second/hostInterval) {
			total += tt.perTick
			h.record(total)
		}
		wantEqual(t, "rate", h.perSecond(total), tt.want)
	}
}

func TestQuantilesLieWithinTheirBucket(t *testing.T) {
	h, times := new(histogram), make([]time.Duration, 100)
	wantEqual(t, "quantile of nothing", h.quantile(.5), 0)
	for i := range times {
		times[i] = time.Duration(i+1) * time.Millisecond
		h.observe(times[i])
	}
	wantEqual(t, "exact percentiles", summarize("sync", time.Second, times, 0).percentiles, percentiles{50, 95, 99})
	for _, q := range []float64{.5, .95, .99} {
		failIf(t, math.Abs(h.quantile(q)-100*q) > 1, "quantile %g = %g ms", q, h.quantile(q))
	}
	h.observe(time.Hour)
	wantEqual(t, "quantile 1, the last bound", h.quantile(1), 60_000)
}

// Fuzz targets.

// FuzzUserJSON compares the encoder of users with encoding/json.
func FuzzUserJSON(f *testing.F) {
	f.Add([]byte("0123456789abcdef"), "Ada", "ada@example.com", 36, int64(1767323045678), int64(0))
	f.Add([]byte{}, "\"\\/\b\f\n\r\t\x00\x1f\x7f<>&\u2028\u2029é漢𝔸\ufffd", "\xff\xfe", -1, int64(-1), int64(253402300799999))
	f.Add([]byte{255}, "\xe2\x80", "…", 150, int64(951782400000), int64(4107542399999))
	f.Fuzz(func(t *testing.T, id []byte, name, email string, age int, created, updated int64) {
		const yearZero, yearTenThousand = -62167219200000, 253402300800000 // RFC 3339 has four digits
		if min(created, updated) < yearZero || max(created, updated) >= yearTenThousand {
			t.Skip()
		}
		u := user{record: record{CreatedAt: created, UpdatedAt: updated}, Name: name, Email: email, Age: age}
		copy(u.ID[:], id)
		text := func(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z") }
		wantEqual(t, "JSON", string(u.appendJSON(nil)), encode(userJSON{u.ID.String(), name, email, age, text(created), text(updated)}))
	})
}

// FuzzPageToken parses any position with a valid checksum, which anyone can compute. Every scan that parseToken accepts can continue.
func FuzzPageToken(f *testing.F) {
	const start, most = ".0.9223372036854775807.-9223372036854775808.0", ".-1.-1.9223372036854775807.18446744073709551615"
	for _, position := range []string{start, most, ".150.1.-1.1125899906842624", ".0.0.0.0", ".-1.1.0.1"} {
		f.Add(position)
	}
	f.Fuzz(func(t *testing.T, position string) {
		for _, kind := range []string{listToken, streamToken} {
			sum := crc32.ChecksumIEEE([]byte(kind + position + "." + config.cluster.keyspace + ".users"))
			s, ok := usersTable.parseToken(fmt.Sprintf("%s%s.%08x", kind, position, sum), kind)
			wrong := pick(ok, !s.more() || s.bound() <= s.from || s.minAge < 0 || s.minAge > maxAge, position == start)
			failIf(t, wrong, "%s%s: %t, %+v", kind, position, ok, s)
		}
	})
}

// FuzzRequest sends arbitrary requests. None may cause an internal error.
func FuzzRequest(f *testing.F) {
	path := createPath(f)
	for target := range strings.FieldsSeq(strings.Join(slices.Collect(maps.Keys(allowedMethods())), " ") +
		" /users?limit=2 /users/stream?age_filter=3&limit=9 // /%zz " + path) {
		for method := range strings.FieldsSeq("GET POST PUT PATCH DELETE") {
			f.Add(method, target, "Content-Type: application/json\r\nX-Request-Timeout: 0.3", adaBody)
		}
	}
	f.Add("POST", "/users/batch", "Content-Type: application/json\r\nIdempotency-Key: k", "["+adaBody+"]")
	f.Add("PATCH", path, "Content-Type: application/merge-patch+json\r\nIf-Match: *", `{"age":1}`)
	f.Add("GET", path, "If-None-Match: \"a\", *\r\nCache-Control: no-cache\r\nAccept: text/html;q=x", "")
	f.Add("POST", "/users", "Transfer-Encoding: chunked\r\nContent-Type: application/json", "5\r\n{\"a\":\r\n")
	f.Fuzz(func(t *testing.T, method, target, headers, body string) {
		if !strings.Contains(headers, "X-Request-Timeout") {
			headers = strings.TrimPrefix(headers+"\r\nX-Request-Timeout: 0.3", "\r\n")
		}
		raw := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\n%s\r\nContent-Length: %d\r\n\r\n%s", method, target, headers, len(body), body)
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw)))
		if err != nil {
			t.Skip() // net/http refuses it
		}
		resp := respond(service, r)
		if resp.status >= 400 && (resp.status != 503 || r.URL.Path != "/health") && r.Method != "HEAD" {
			var p problem
			err := json.Unmarshal([]byte(resp.body), &p)
			failIf(t, err != nil || p.Status != resp.status || p.Detail == "", "%q: %s, %v", raw, resp, err)
		}
		failIf(t, resp.status < 200 || resp.status == 500 || resp.status > 504, "%q: %s", raw, resp)
	})
}

// Benchmarks.

// way is one way to do a benchmark's work. Its do runs the work once and returns the number of rows.
type way struct {
	name string
	do   func() (rows int, err error)
}

// compare runs all ways in turn, for 0.3 s each, in 15 rounds after one to warm up. It reports the medians of their
// rates, and of the ratios to the first one, which vary less between machines. The order is random, since
// each way leaves garbage and a table to flush for the next. One iteration is the entire comparison, so -benchtime is 1x.
func compare(b *testing.B, name string, clients int, ways ...way) {
	b.Run(fmt.Sprintf("%s/clients=%d", name, clients), func(b *testing.B) {
		rates, ratios := make([][16]float64, len(ways)), make([][16]float64, len(ways))
		for b.Loop() {
			for round := range 16 {
				for _, i := range rand.Perm(len(ways)) {
					rates[i][round] = rateOf(b, clients, ways[i].do)
				}
				for i := range ways {
					ratios[i][round] = rates[i][round] / rates[0][round]
				}
			}
		}
		for i, w := range ways {
			slices.Sort(rates[i][1:])
			b.ReportMetric(rates[i][8], w.name+"/s")
			if slices.Sort(ratios[i][1:]); i > 0 {
				b.ReportMetric(ratios[i][8], w.name+":"+ways[0].name)
			}
		}
		b.ReportMetric(0, "ns/op")
	})
}

// rateOf returns the rows per second of concurrent clients.
func rateOf(b *testing.B, clients int, do func() (int, error)) float64 {
	var rows atomic.Int64
	var running sync.WaitGroup
	start := time.Now()
	for range clients {
		running.Go(func() {
			for time.Since(start) < 300*time.Millisecond && !b.Failed() {
				n, err := do()
				failIf(b, err != nil, "%v", err)
				rows.Add(int64(n))
			}
		})
	}
	running.Wait()
	return float64(rows.Load()) / time.Since(start).Seconds()
}

// bare is the driver alone, with its own dialer, and the ids of some users.
type bare struct {
	*gocql.Session
	ids []gocql.UUID
}

func (db bare) anyID() gocql.UUID { return db.ids[rand.IntN(len(db.ids))] }

func (db bare) get() (int, error) {
	return 1, db.Query(selectUser, db.anyID()).Scan(new(user).columns()...)
}

func (db bare) post() (int, error) { return 1, db.Query(insertUser, newAda().columns()...).Exec() }

func (db bare) put() (int, error) {
	_, err := db.Query(updateUser+ifExists, append(newAda().columns()[2:], db.anyID())...).ScanCAS(new(int64))
	return 1, err
}

func (db bare) scan(size, most int) (rows int, err error) {
	it := db.Query(`SELECT ` + userColumns + ` FROM users`).PageSize(size).Iter()
	for columns := new(user).columns(); rows < most && it.Scan(columns...); rows++ {
	}
	return rows, it.Close()
}

// ServeHTTP serves users naively, without deadlines, limits, ids, metrics and problem responses.
func (db bare) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	u, err := newAda(), error(nil)
	if r.Method == "GET" {
		err = db.Query(selectUser, strings.TrimPrefix(r.URL.Path, "/users/")).Scan(u.columns()...)
	} else if err = json.NewDecoder(r.Body).Decode(u); err == nil {
		err = db.Query(insertUser, u.columns()...).Exec()
	}
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
	}
	json.NewEncoder(w).Encode(u)
}

// sends returns a way that sends a request, over HTTP or, if url is "", in process. ID is any user's id, KEY a new key.
func (db bare) sends(b *testing.B, name, url, request, body string, rows int, headers ...string) way {
	headers = append(headers, "Host: localhost", "Content-Type: application/json", fmt.Sprintf("Content-Length: %d\r\n", len(body)))
	text := request + " HTTP/1.1\r\n" + strings.Join(headers, "\r\n") + "\r\n" + body
	parsed, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
	must(b, err)
	connections := sync.Pool{New: func() any {
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		failIf(b, err != nil, "%v", err)
		return bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	}}
	return way{name, func() (_ int, err error) {
		id, status := db.anyID().String(), 0
		if url == "" {
			w, r, target := &meter{}, *parsed, *parsed.URL
			target.Path = strings.Replace(target.Path, "ID", id, 1)
			r.URL, r.Body = &target, io.NopCloser(strings.NewReader(body))
			service.ServeHTTP(w, &r)
			status = w.Code
		} else {
			c := connections.Get().(*bufio.ReadWriter)
			c.WriteString(strings.Replace(strings.Replace(text, "ID", id, 1), "KEY", uuid.NewString(), 1))
			c.Flush()
			var resp *http.Response
			if resp, err = http.ReadResponse(c.Reader, nil); err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				status = resp.StatusCode
				connections.Put(c)
			}
		}
		if err != nil || status >= 300 {
			return 0, fmt.Errorf("%s: status %d, %v", request, status, err)
		}
		return rows, nil
	}}
}

// BenchmarkService compares the service, in process and over HTTP, with the bare driver and a naive handler. Streams run before any create.
func BenchmarkService(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(gcPercent)) // as run does
	const users = 200_000
	exec(b, `TRUNCATE users`)
	fillUsers(b, users)
	cfg := config.cluster.config(&countingDialer{})
	cfg.Dialer, cfg.NumConns = nil, 2 // the driver's defaults
	session, err := cfg.CreateSession()
	must(b, err)
	defer session.Close()
	db, id := bare{Session: session}, gocql.UUID{}
	for rows := session.Query(`SELECT id FROM users LIMIT 1000`).Iter(); rows.Scan(&id); {
		db.ids = append(db.ids, id)
	}
	url, naive := serve(b, service), serve(b, db)
	for _, size := range []int{100, 1000, 5000} {
		stream := fmt.Sprintf("GET /users/stream?fetch_size=%d", size)
		compare(b, fmt.Sprintf("streams/page=%d", size), 1, way{"bare", func() (int, error) { return db.scan(size, users) }},
			db.sends(b, "process", "", stream, "", users), db.sends(b, "http", url, stream, "", users),
			db.sends(b, "limit", url, stream+"&limit=100000", "", 100_000))
	}
	for _, clients := range []int{1, 32, 128} {
		run := func(name string, bare func() (int, error), request, body string, others ...way) {
			compare(b, name, clients, append([]way{{"bare", bare}, db.sends(b, "process", "", request, body, 1),
				db.sends(b, "http", url, request, body, 1)}, others...)...)
		}
		run("reads", db.get, "GET /users/ID", "", db.sends(b, "naive", naive, "GET /users/ID", "", 1),
			db.sends(b, "no-cache", url, "GET /users/ID", "", 1, "Cache-Control: no-cache"))
		run("updates", db.put, "PUT /users/ID", adaBody, db.sends(b, "if-match", url, "PUT /users/ID", adaBody, 1, "If-Match: *"))
		run("creates", db.post, "POST /users", adaBody, db.sends(b, "naive", naive, "POST /users", adaBody, 1),
			db.sends(b, "key", url, "POST /users", adaBody, 1, "Idempotency-Key: KEY"))
	}
}
