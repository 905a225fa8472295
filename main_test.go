// The tests talk to a real Cassandra, through the real routes and middleware.
// Most use the handler in process, on one keyspace that is thrown away. What
// needs an empty table, other settings, an outage or a memory reading starts
// the test binary again as the service, with a keyspace of its own. What starts,
// asks and breaks a service comes first, then a section for each file.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

var long = flag.Bool("long", false, "also run the tests that take minutes")

// service is the handler in process that most tests call.
var service http.Handler

// disconnect ends what the handler in process is connected to.
var disconnect func()

// admin is a session without a keyspace, for what the service never does.
var admin *gocql.Session

func TestMain(m *testing.M) {
	if os.Getenv("RUN_AS_SERVICE") != "" {
		main()
		return
	}
	flag.Parse()
	os.Exit(runTests(m))
}

// binaries is a folder for what the tests build.
var binaries string

func runTests(m *testing.M) int {
	var err error
	if binaries, err = os.MkdirTemp("", "test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(binaries)
	keyspace := newKeyspaceName()
	os.Setenv("CASSANDRA_KEYSPACE", keyspace)
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	disconnect = keepConnected(cfg.cluster)
	defer func() { disconnect() }()
	conn, err := net.DialTimeout("tcp", cassandraAddress(), 4*time.Second)
	if err == nil {
		conn.Close()
	}
	if err != nil || !waitUntil(func() bool { return global.session.Load() != nil }, time.Minute) {
		fmt.Fprintln(os.Stderr, "The tests need a Cassandra. Type this, it starts one: go run ./cassandra go test ./...")
		return 1
	}
	admin, err = createSession(context.Background(), cfg.cluster.config(&countingDialer{}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer admin.Close()
	defer dropKeyspace(keyspace)
	defer dropKeyspace(crowd.keyspace)
	service = newRouter(cfg.maxInFlight)
	return m.Run()
}

func newKeyspaceName() string { return fmt.Sprintf("test_%d_%d", os.Getpid(), time.Now().UnixNano()) }

func dropKeyspace(name string) {
	if err := admin.Query(`DROP KEYSPACE IF EXISTS "` + name + `"`).Exec(); err != nil {
		fmt.Fprintln(os.Stderr, "dropping", name, err)
	}
}

// newKeyspace names a keyspace that is dropped after the test.
func newKeyspace(t testing.TB) string {
	name := newKeyspaceName()
	t.Cleanup(func() { dropKeyspace(name) })
	return name
}

// openKeyspace returns a session as the service has one, for a test.
func openKeyspace(t testing.TB, c cluster) *gocql.Session {
	t.Helper()
	db, err := c.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeSession(db) })
	return db
}

// useKeyspace makes the handler in process serve another keyspace for a test.
func useKeyspace(t testing.TB, name string) {
	t.Helper()
	usual := global.cluster
	connect := func(c cluster) {
		disconnect()
		disconnect = keepConnected(c)
		if !waitUntil(func() bool { return global.session.Load() != nil }, 15*time.Second) {
			t.Fatal("not connected within 15 s")
		}
	}
	c := usual
	c.keyspace = name
	t.Cleanup(func() { connect(usual) })
	connect(c)
}

// insertUsers writes n users past the service and returns their ids. Their names
// have 100 characters: a thousand are a quarter of a megabyte.
func insertUsers(t testing.TB, db *gocql.Session, n int, age func(i int) int) []uuid.UUID {
	t.Helper()
	ids := make([]uuid.UUID, n)
	atOnce(n, func(i int) {
		u := user{ID: uuid.New(), Name: fmt.Sprintf("%0100d", i), Email: fmt.Sprintf("user%d@example.com", i), Age: age(i), CreatedAt: now(), UpdatedAt: now()}
		ids[i] = u.ID
		if t.Failed() {
			return
		}
		if err := db.Query(insertUser, u.values()...).Exec(); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	return ids
}

// atOnce calls do for 0 to n-1, at most 32 of them at a time.
func atOnce(n int, do func(i int)) {
	var running sync.WaitGroup
	turns := make(chan struct{}, 32)
	for i := range n {
		turns <- struct{}{}
		running.Go(func() {
			defer func() { <-turns }()
			do(i)
		})
	}
	running.Wait()
}

// crowd is a keyspace of 12 000 users that some tests read and none changes.
var crowd = struct {
	keyspace string
	once     sync.Once
	ages     map[string]int // by id; 120 users of each age from 0 to 99
}{keyspace: newKeyspaceName() + "_crowd", ages: map[string]int{}}

// useCrowd makes the handler in process serve the crowd.
func useCrowd(t testing.TB) {
	t.Helper()
	useKeyspace(t, crowd.keyspace)
	crowd.once.Do(func() {
		for i, id := range insertUsers(t, openKeyspace(t, global.cluster), 12_000, func(i int) int { return i % 100 }) {
			crowd.ages[id.String()] = i % 100
		}
	})
}

// needsLong skips a test that takes minutes unless -long is given.
func needsLong(t testing.TB) {
	if !*long {
		t.Skip("takes minutes; run with -long")
	}
}

// answer is what a client got; err where it got none, or not all of it.
type answer struct {
	request string // as in "GET /users"
	status  int
	header  http.Header
	body    string
	took    time.Duration // over the wire
	err     error
}

// String is what a failed test says of an answer.
func (a answer) String() string {
	text := fmt.Sprintf("%s: status = %d after %s, body %s", a.request, a.status, a.took, a.body)
	if a.err != nil {
		text += ", error " + a.err.Error()
	}
	return text
}

// call sends a request, as in "GET /users", to the handler in process. Headers
// are "Name: value"; unless they say otherwise the body is JSON.
func call(t testing.TB, request, body string, headers ...string) answer {
	t.Helper()
	return callOn(t, service, request, body, headers...)
}

func callOn(t testing.TB, h http.Handler, request, body string, headers ...string) answer {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	method, target, _ := strings.Cut(request, " ")
	r := httptest.NewRequestWithContext(t.Context(), method, target, reader)
	addHeaders(r, headers)
	defer func() {
		if v := recover(); v != nil {
			t.Fatalf("%s: the connection was cut (%v); the log says why", request, v)
		}
	}()
	return record(h, r)
}

// record has a handler answer a request without a network.
func record(h http.Handler, r *http.Request) answer {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return answer{request: r.Method + " " + r.RequestURI, status: w.Code, header: w.Result().Header, body: w.Body.String()}
}

func addHeaders(r *http.Request, headers []string) {
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	if r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", "application/json")
	}
}

// decode reads an answer's JSON body, after checking its status.
func decode[T any](t testing.TB, a answer, status int) (value T) {
	t.Helper()
	if a.status != status {
		t.Fatalf("%s; want %d", a, status)
	}
	if err := json.Unmarshal([]byte(a.body), &value); err != nil {
		t.Fatalf("%s: %v", a, err)
	}
	return value
}

// userJSON is a user as a client sees one.
type userJSON struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Email     string `json:"email"`
	Age       int    `json:"age"`
	CreatedAt string `json:"created_at"`
	UpdatedAt string `json:"updated_at"`
}

// The fields of a user as a body has them, and as the service reads it.
const aBody = `{"name":"Ada Lovelace","email":"ada@example.com","age":36}`

var ada, _ = parseUserFields(json.RawMessage(aBody), "", true)

// aUser creates a user in the shared keyspace.
func aUser(t testing.TB) userJSON {
	t.Helper()
	return decode[userJSON](t, call(t, "POST /users", aBody), 201)
}

func wantStatus(t testing.TB, a answer, status int) {
	t.Helper()
	if a.status != status {
		t.Errorf("%s; want %d", a, status)
	}
}

// wantProblem checks a whole problem answer; errs are the JSON of its errors. A
// 503, and no other, says when to come back.
func wantProblem(t testing.TB, a answer, status int, detail string, errs ...string) {
	t.Helper()
	members := all(errs...)
	if members != "" {
		members = `,"errors":[` + members + `]`
	}
	want := fmt.Sprintf(`{"title":%q,"status":%d,"detail":%q%s,"request_id":%q}`+"\n", http.StatusText(status), status, detail, members, a.header.Get("X-Request-Id"))
	if a.status != status || a.body != want {
		t.Errorf("%s, want %d %s", a, status, want)
	}
	if a.header.Get("Content-Type") != "application/problem+json" || (a.header.Get("Retry-After") == "1") != (status == 503) {
		t.Errorf("header = %v", a.header)
	}
}

// The details of problems that several tests meet.
const (
	notValid      = "The request is not valid; see errors"
	notAvailable  = "Cassandra is not available; try again in a moment"
	tooLate       = "timeout: the deadline passed before the answer was there"
	mayBeApplied  = "timeout: no answer to the write, which may have been applied; read before you try again"
	internalError = "Internal error; the log has it under this request_id"
)

// serve puts a handler behind a real listener, as run does, and returns its URL.
func serve(t testing.TB, h http.Handler) string {
	server := httptest.NewUnstartedServer(h)
	server.Config.ConnContext = limitSendBuffer
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
}

// dial opens a connection of which a test sees every byte.
func dial(t testing.TB, url string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(40 * time.Second))
	return conn.(*net.TCPConn)
}

// overTheWire sends a raw request and returns all that comes back until the
// server closes the connection.
func overTheWire(t testing.TB, url, request string) string {
	t.Helper()
	conn := dial(t, url)
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("after %q: %v", answer, err)
	}
	return string(answer)
}

// openReader sends a GET and reads n bytes of the answer, with a small buffer:
// what it leaves the service has to keep.
func openReader(t testing.TB, url, target string, n int64) net.Conn {
	t.Helper()
	conn := dial(t, url)
	conn.SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", target)
	if _, err := io.CopyN(io.Discard, conn, n); err != nil {
		t.Fatal(err)
	}
	return conn
}

const anyPort = "127.0.0.1:0"

// listen listens on an address until the test ends.
func listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener
}

// closedAddress is one where nobody listens.
func closedAddress(t testing.TB) string {
	t.Helper()
	listener := listen(t, anyPort)
	defer listener.Close()
	return listener.Addr().String()
}

// process is the service in a process of its own.
type process struct {
	*exec.Cmd
	url    string
	log    *logBuffer
	exited chan struct{} // closed when it has; ProcessState is set then
}

// startService runs the service with the settings, each NAME=value. Unless they
// say otherwise it has a free port and a keyspace of its own. It is killed after
// the test if it still runs then.
func startService(t testing.TB, settings ...string) *process {
	t.Helper()
	return startProcess(t, exec.Command(os.Args[0]), settings...)
}

// startProcess starts a command that is the service and waits until it listens.
func startProcess(t testing.TB, cmd *exec.Cmd, settings ...string) *process {
	t.Helper()
	p := &process{Cmd: cmd, log: &logBuffer{}, exited: make(chan struct{})}
	p.Env = append(os.Environ(), "RUN_AS_SERVICE=1", "ADDR=127.0.0.1:0")
	if !strings.Contains(strings.Join(settings, "\n"), "CASSANDRA_KEYSPACE=") {
		p.Env = append(p.Env, "CASSANDRA_KEYSPACE="+newKeyspace(t))
	}
	p.Env = append(p.Env, settings...)
	p.Stderr = p.log
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("log of the service:\n%s", p.log)
		}
	})
	listening := regexp.MustCompile(`addr"?[=:]"?([^\s"]+)`) // in either LOG_FORMAT
	waitUntil(func() bool { return listening.MatchString(p.log.String()) || p.hasExited() }, 10*time.Second)
	addr := listening.FindStringSubmatch(p.log.String())
	if addr == nil || p.hasExited() {
		t.Fatalf("the service did not start: %s", p.log)
	}
	p.url = "http://" + addr[1]
	return p
}

// startHealthy starts the service and waits until it has found Cassandra.
func startHealthy(t testing.TB, settings ...string) *process {
	t.Helper()
	p := startService(t, settings...)
	p.awaitHealthy(t, 30*time.Second)
	return p
}

// sharedKeyspace is the setting for a service that may see other tests' users.
func sharedKeyspace() string { return "CASSANDRA_KEYSPACE=" + os.Getenv("CASSANDRA_KEYSPACE") }

// client keeps as many connections as there are clients in a test.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4000}}

// ask sends the service a request, written as for call.
func (p *process) ask(request, body string, headers ...string) (a answer) {
	a.request = request
	start := time.Now()
	defer func() { a.took = time.Since(start) }()
	method, target, _ := strings.Cut(request, " ")
	r, err := http.NewRequest(method, p.url+target, strings.NewReader(body))
	if err != nil {
		a.err = err
		return a
	}
	addHeaders(r, headers)
	got, err := client.Do(r)
	if err != nil {
		a.err = err
		return a
	}
	defer got.Body.Close()
	if got.Close { // net/http takes the header out
		got.Header.Set("Connection", "close")
	}
	text, err := io.ReadAll(got.Body)
	a.status, a.header, a.body, a.err = got.StatusCode, got.Header, string(text), err
	return a
}

// metrics returns what the service counts.
func (p *process) metrics(t testing.TB) metrics {
	t.Helper()
	return decode[metrics](t, p.ask("GET /metrics", ""), 200)
}

// awaitHealthy waits until /health is 200.
func (p *process) awaitHealthy(t testing.TB, within time.Duration) {
	t.Helper()
	healthy := func() bool { return p.ask("GET /health", "").status == 200 }
	if !waitUntil(healthy, within) {
		t.Fatalf("not healthy within %s", within)
	}
}

// awaitQuiet waits until nothing is left of the requests before: as much is
// open and running as in m.
func (p *process) awaitQuiet(t testing.TB, m metrics) {
	t.Helper()
	var now metrics
	quiet := func() bool {
		client.CloseIdleConnections()
		now = p.metrics(t)
		return now.RequestsInFlight == 1 && now.StreamsActive == 0 && now.Goroutines <= m.Goroutines+4 && now.ActiveConnections <= m.ActiveConnections
	}
	if !waitUntil(quiet, 20*time.Second) {
		t.Errorf("in flight = %d, streams = %d, goroutines = %d, connections = %d; before: %d goroutines, %d connections", now.RequestsInFlight, now.StreamsActive, now.Goroutines, now.ActiveConnections, m.Goroutines, m.ActiveConnections)
	}
}

func (p *process) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// wantExit waits for the end of a service.
func (p *process) wantExit(t testing.TB, status int, within time.Duration) {
	t.Helper()
	if !waitUntil(p.hasExited, within) {
		t.Fatalf("still running after %s", within)
	}
	if got := p.ProcessState.ExitCode(); got != status {
		t.Errorf("exit status = %d (%s), want %d", got, p.ProcessState, status)
	}
}

// awaitRefusal waits until the log says why the service cannot connect, once,
// and checks that requests are answered 503.
func (p *process) awaitRefusal(t testing.TB, why string) {
	t.Helper()
	line := regexp.MustCompile(`level=WARN msg="cannot connect to Cassandra, trying on" hosts=\[\S+\] port=\d+ error=".*` + regexp.QuoteMeta(why))
	if !waitUntil(func() bool { return line.MatchString(p.log.String()) }, 30*time.Second) {
		t.Fatalf("no line matches %s in\n%s", line, p.log)
	}
	for _, path := range []string{"/health", "/users"} {
		wantStatus(t, p.ask("GET "+path, ""), 503)
	}
}

// logBuffer is a buffer that one goroutine writes and others read.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

var selfTests = []string{"query_error", "streaming_error", "concurrent_streams", "nested_contexts", "cancellation"}

const nobody = "/users/7c9e6679-7425-40de-944b-e07fc1f90ae7"

// askEverything sends one request to each endpoint that needs Cassandra, all at
// once, and has each answer checked.
func askEverything(p *process, check func(answer), headers ...string) {
	requests := map[string]string{
		"POST /users": aBody, "GET /users": "", "POST /users/batch": "[" + aBody + "]",
		"GET /users/stream": "", "GET /users/stream?age_filter=30": "", "GET /users/stream/pages": "",
		"GET " + nobody: "", "PUT " + nobody: aBody, "PATCH " + nobody: aBody, "DELETE " + nobody: "",
		"GET /performance/async": "", "GET /performance/sync": "", "GET /slow_query": "", "GET /long_running_query": "",
		"GET /context_manager_safety/status": "",
	}
	for _, name := range selfTests {
		requests["POST /context_manager_safety/"+name] = ""
	}
	var asking sync.WaitGroup
	for request, body := range requests {
		asking.Go(func() {
			check(p.ask(request, body, headers...))
		})
	}
	asking.Wait()
}

// cassandraAddress is where the tests' Cassandra answers.
func cassandraAddress() string {
	host, _, _ := strings.Cut(cmp.Or(os.Getenv("CASSANDRA_HOSTS"), "127.0.0.1"), ",")
	return net.JoinHostPort(host, cmp.Or(os.Getenv("CASSANDRA_PORT"), "9042"))
}

// proxy stands between a service and Cassandra and can fail as networks do.
type proxy struct {
	listener net.Listener
	mu       sync.Mutex
	silent   bool
	credit   int               // bytes that still pass
	changed  *sync.Cond        // the credit
	held     int               // pumps that wait for credit
	conns    map[net.Conn]bool // true: frozen
}

// startProxy returns a proxy to the tests' Cassandra.
func startProxy(t testing.TB, listener net.Listener) *proxy {
	p := &proxy{listener: listener, credit: math.MaxInt, conns: map[net.Conn]bool{}}
	p.changed = sync.NewCond(&p.mu)
	t.Cleanup(p.cut)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", cassandraAddress())
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns[client], p.conns[server] = false, false
			p.mu.Unlock()
			go p.pump(client, server)
			go p.pump(server, client)
		}
	}()
	return p
}

// pump copies until either end fails, dropping everything while silent.
func (p *proxy) pump(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		for p.credit <= 0 {
			p.held++
			p.changed.Wait()
			p.held--
		}
		p.credit -= n
		silent := p.silent || p.conns[from]
		p.mu.Unlock()
		if silent {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// holdAfter lets about n more bytes pass and holds back all others until it is
// called again, or the connections are cut.
func (p *proxy) holdAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.credit = n
	p.changed.Broadcast()
}

// isHolding says that something waits to pass.
func (p *proxy) isHolding() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held > 0
}

// cut breaks all connections; new ones may be made.
func (p *proxy) cut() {
	defer p.holdAfter(math.MaxInt)
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		conn.Close()
	}
	clear(p.conns)
}

// swallow drops all bytes while on; connections stay open.
func (p *proxy) swallow(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = on
}

// freeze drops all bytes on the connections there are; new ones work.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		p.conns[conn] = true
	}
}

// startBehindProxy starts the service with a proxy before Cassandra, to fail it.
func startBehindProxy(t testing.TB, settings ...string) (*process, *proxy) {
	t.Helper()
	proxy := startProxy(t, listen(t, anyPort))
	return startHealthy(t, append(settings, proxy.settings()...)...), proxy
}

// settings make a service use the proxy for all its connections.
func (p *proxy) settings() []string { return cassandraAt(p.listener.Addr().String()) }

// cassandraAt makes a service ask for Cassandra at host:port. The driver may
// learn of other addresses there, but keeps to the port.
func cassandraAt(addr string) []string {
	host, port, _ := net.SplitHostPort(addr)
	return []string{"CASSANDRA_HOSTS=" + host, "CASSANDRA_PORT=" + port}
}

// node is a Cassandra of a test's own, started by the launcher.
type node struct {
	addr    string // host:port
	pidFile string // of the Cassandra process, or one line for each node
}

// startNode runs the launcher with flags, as in "-restart", "3s", on a free port.
func startNode(t testing.TB, flags ...string) *node {
	t.Helper()
	launcher, err := buildLauncher()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{pidFile: filepath.Join(t.TempDir(), "pid")}
	flags = append(flags, "-pid", n.pidFile, "sh", "-c", "echo $CASSANDRA_HOSTS:$CASSANDRA_PORT; exec sleep 3600")
	cmd := exec.Command(launcher, flags...)
	var stdout, log logBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-exited
		if t.Failed() {
			t.Logf("log of the launcher:\n%s", &log)
		}
	})
	if !waitUntil(func() bool { return strings.Contains(stdout.String(), "\n") }, 4*time.Minute) {
		t.Fatalf("Cassandra did not start:\n%s", &log)
	}
	n.addr = strings.TrimSpace(stdout.String())
	return n
}

// cluster is how to reach the node, or another of its cluster, at a host.
func (n *node) cluster(host string) cluster {
	_, port, _ := net.SplitHostPort(n.addr)
	c := global.cluster
	c.hosts = []string{host}
	c.port, _ = strconv.Atoi(port)
	return c
}

// open returns a session to the node.
func (n *node) open(t testing.TB, keyspace string) *gocql.Session {
	t.Helper()
	c := n.cluster("127.0.0.1")
	c.keyspace = keyspace
	return openKeyspace(t, c)
}

// signal sends a signal to a node, the first being 0.
func (n *node) signal(t testing.TB, i int, sig syscall.Signal) {
	t.Helper()
	pids, err := os.ReadFile(n.pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.Fields(string(pids))[i])
	if err != nil || syscall.Kill(pid, sig) != nil {
		t.Fatalf("signalling node %d of %q", i, pids)
	}
}

// awaitAnswer waits until the node answers CQL on an address of its own.
func (n *node) awaitAnswer(t testing.TB, host string) {
	t.Helper()
	answers := func() bool {
		cfg := n.cluster(host).config(&countingDialer{})
		cfg.DisableInitialHostLookup = true
		s, err := createSession(t.Context(), cfg)
		if err != nil {
			pause(t.Context(), 50*time.Millisecond)
			return false
		}
		defer s.Close()
		return s.Query(selectVersion).Exec() == nil
	}
	if !waitUntil(answers, 3*time.Minute) {
		t.Fatalf("the node on %s does not answer", host)
	}
}

// Tests of main.go.

// environ makes a getenv of NAME=value settings.
func environ(settings ...string) func(string) string {
	return func(name string) string {
		for _, s := range settings {
			if value, ok := strings.CutPrefix(s, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

const (
	hostsRule       = "host names or addresses separated by commas"
	replicationRule = "a number of replicas from 1 to 99, or one for each data centre, as in dc1:3,dc2:3"
)

var badSettings = []struct{ setting, right string }{
	{"ADDR=8000", "host:port, as in 127.0.0.1:8000"},
	{"ADDR=localhost:", "host:port, as in 127.0.0.1:8000"},
	{"ADDR=localhost:65536", "host:port, as in 127.0.0.1:8000"},
	{"ADDR=localhost:http", "host:port, as in 127.0.0.1:8000"},
	{"MAX_IN_FLIGHT=0", "a whole number from 1 to 1000000"},
	{"MAX_IN_FLIGHT=-1", "a whole number from 1 to 1000000"},
	{"MAX_IN_FLIGHT=+5", "a whole number from 1 to 1000000"},
	{"MAX_IN_FLIGHT=many", "a whole number from 1 to 1000000"},
	{"MAX_IN_FLIGHT=99999999999999999999", "a whole number from 1 to 1000000"},
	{"DRAIN_DELAY=5", "a duration, as in 5s"},
	{"DRAIN_DELAY=-1s", "a duration, as in 5s"},
	{"SHUTDOWN_TIMEOUT=soon", "a duration, as in 20s"},
	{"LOG_FORMAT=JSON", "text or json"},
	{"CASSANDRA_HOSTS=a,,b", hostsRule},
	{"CASSANDRA_HOSTS=http://a/", hostsRule},
	{"CASSANDRA_PORT=0", "a port from 1 to 65535"},
	{"CASSANDRA_PORT=65536", "a port from 1 to 65535"},
	{"CASSANDRA_PORT=9042 ", "a port from 1 to 65535"},
	{`CASSANDRA_KEYSPACE=a"; DROP KEYSPACE b; --`, "1 to 48 letters, digits or underscores, none of Cassandra's own"},
	{"CASSANDRA_KEYSPACE=" + strings.Repeat("k", 49), "1 to 48 letters, digits or underscores, none of Cassandra's own"},
	{"CASSANDRA_KEYSPACE=system_auth", "1 to 48 letters, digits or underscores, none of Cassandra's own"},
	{"CASSANDRA_KEYSPACE=line\nbreak", "1 to 48 letters, digits or underscores, none of Cassandra's own"},
	{"CASSANDRA_DATACENTER=d'c", "a data centre's name: letters, digits, points, dashes or underscores"},
	{"CASSANDRA_CONSISTENCY=MOST", "ONE, TWO, THREE, QUORUM, ALL, LOCAL_ONE, LOCAL_QUORUM or EACH_QUORUM"},
	{"CASSANDRA_CONSISTENCY=ANY", "ONE, TWO, THREE, QUORUM, ALL, LOCAL_ONE, LOCAL_QUORUM or EACH_QUORUM"},
	{"CASSANDRA_REPLICATION=0", replicationRule},
	{"CASSANDRA_REPLICATION=100", replicationRule},
	{"CASSANDRA_REPLICATION=dc1:3,", replicationRule},
	{"CASSANDRA_REPLICATION=dc1:0", replicationRule},
	{"CASSANDRA_REPLICATION=dc1:1,dc1:2", replicationRule},
	{"CASSANDRA_REPLICATION=d'c:1", replicationRule},
	{"CASSANDRA_TLS_CA=/nowhere.pem", "a readable file of PEM certificates"},
	{"CASSANDRA_TLS_CA=go.mod", "a readable file of PEM certificates"},
}

func TestBadSettingsAreNamed(t *testing.T) {
	for _, tt := range badSettings {
		t.Run(tt.setting, func(t *testing.T) {
			name, value, _ := strings.Cut(tt.setting, "=")
			want := fmt.Sprintf("%s is %q, it must be %s", name, value, tt.right)
			if _, err := loadSettings(environ(tt.setting)); err == nil || err.Error() != want {
				t.Errorf("error = %v, want %s", err, want)
			}
		})
	}
}

func TestFailedStartsSayWhyInOneLine(t *testing.T) {
	taken := listen(t, anyPort).Addr().String()
	tests := []struct {
		name     string
		settings []string
		want     string
	}{
		{"bad settings", []string{"DRAIN_DELAY=1m", "LOG_FORMAT=xml", "CASSANDRA_USERNAME=", "CASSANDRA_PASSWORD=hunter2"}, `LOG_FORMAT is "xml", it must be text or json; ` +
			`CASSANDRA_USERNAME and CASSANDRA_PASSWORD must be set together; SHUTDOWN_TIMEOUT "20s" must be at least DRAIN_DELAY "1m0s"`},
		{"a taken address", []string{"ADDR=" + taken}, "listening on ADDR: listen tcp " + taken + ": bind: address already in use"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(append(os.Environ(), "RUN_AS_SERVICE=1"), tt.settings...)
			out, _ := cmd.CombinedOutput()
			if want := "cassandra-service-go: " + tt.want + "\n"; string(out) != want || cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("exit status = %d, want 1; output %s, want %s", cmd.ProcessState.ExitCode(), out, want)
			}
		})
	}
}

func TestSettingsAreRead(t *testing.T) {
	const rf1 = "{'class': 'NetworkTopologyStrategy', 'replication_factor': 1}"
	tests := []struct {
		name     string
		settings []string
		want     settings
	}{
		{"defaults", nil, settings{"127.0.0.1:8000", cluster{[]string{"localhost"}, 9042, "test_keyspace", "", gocql.LocalQuorum, rf1, "", "", ""}, 1024, 0, 20 * time.Second, "text"}},
		{"all set", []string{
			"ADDR=[::1]:0", "CASSANDRA_HOSTS=a.example, 10.0.0.1,::1", "CASSANDRA_PORT=9142", "CASSANDRA_KEYSPACE=Big_1", "CASSANDRA_DATACENTER=dc-1",
			"CASSANDRA_CONSISTENCY=QUORUM", "CASSANDRA_REPLICATION=dc1:3,dc2:2", "CASSANDRA_USERNAME=u", "CASSANDRA_PASSWORD=p", "MAX_IN_FLIGHT=5",
			"DRAIN_DELAY=1s", "SHUTDOWN_TIMEOUT=1m", "LOG_FORMAT=json",
		}, settings{"[::1]:0", cluster{[]string{"a.example", "10.0.0.1", "::1"}, 9142, "Big_1", "dc-1", gocql.Quorum, "{'class': 'NetworkTopologyStrategy', 'dc1': 3, 'dc2': 2}", "u", "p", ""}, 5, time.Second, time.Minute, "json"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := loadSettings(environ(tt.settings...))
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("settings = %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}

func TestLogFormatJSON(t *testing.T) {
	p := startService(t, sharedKeyspace(), "LOG_FORMAT=json")
	line, _, _ := strings.Cut(p.log.String(), "\n")
	var logged struct{ Level, Msg, Addr string }
	if err := json.Unmarshal([]byte(line), &logged); err != nil || logged.Level != "INFO" || logged.Msg != "listening" || "http://"+logged.Addr != p.url {
		t.Errorf("log line %q: %+v, %v", line, logged, err)
	}
}

// allowed is the route table as a client sees it: which methods a path takes.
var allowed = map[string]string{
	"/":                                   "GET, HEAD",
	"/health":                             "GET, HEAD",
	"/metrics":                            "GET, HEAD",
	"/shutdown":                           "POST",
	"/openapi.json":                       "GET, HEAD",
	"/docs":                               "GET, HEAD",
	"/users":                              "GET, HEAD, POST",
	"/users/batch":                        "POST",
	"/users/stream":                       "GET, HEAD",
	"/users/stream/pages":                 "GET, HEAD",
	"/users/batches":                      "DELETE, GET, HEAD, PATCH, PUT", // an {id}, unlike batch
	"/performance/async":                  "GET, HEAD",
	"/performance/sync":                   "GET, HEAD",
	"/slow_query":                         "GET, HEAD",
	"/long_running_query":                 "GET, HEAD",
	"/context_manager_safety/query_error": "POST",
	"/context_manager_safety/streaming_error":    "POST",
	"/context_manager_safety/concurrent_streams": "POST",
	"/context_manager_safety/nested_contexts":    "POST",
	"/context_manager_safety/cancellation":       "POST",
	"/context_manager_safety/status":             "GET, HEAD",
}

func TestWrongMethodsAreAnsweredWithAllow(t *testing.T) {
	for path, allow := range allowed {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO", "get"} {
			if slices.Contains(strings.Split(allow, ", "), method) {
				continue
			}
			t.Run(method+" "+path, func(t *testing.T) {
				a := call(t, method+" "+path, aBody)
				wantProblem(t, a, 405, "This path takes "+allow)
				if got := a.header.Get("Allow"); got != allow {
					t.Errorf("Allow = %q, want %q", got, allow)
				}
			})
		}
	}
}

func TestUnknownPathsAreNotFound(t *testing.T) {
	id := aUser(t).ID
	for _, path := range []string{
		"/nothing", "/Users", "//users", "/users/", "/users//", "/users/" + id + "/", "/users/" + id + "/x", "/users//stream", "/users/./stream",
		"/users/../health", "/users/%2e%2e/health", "/%2e/health", "/health%2f", "/users/%2F", "//evil.example/..", "/users/batch/", "/users;x", "/docs/openapi.json", "*",
	} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT"} {
			t.Run(method+" "+path, func(t *testing.T) {
				wantProblem(t, call(t, method+" "+path, ""), 404, "No such path; GET / lists the endpoints")
			})
		}
	}
}

func TestRootListsTheRouteTable(t *testing.T) {
	root := decode[struct {
		Message, Version string
		Endpoints        []string
	}](t, call(t, "GET /", ""), 200)
	listed := map[string][]string{}
	for _, endpoint := range root.Endpoints {
		method, path, _ := strings.Cut(endpoint, " ")
		path = strings.Replace(strings.TrimSuffix(path, "{$}"), "{id}", "batches", 1)
		listed[path] = append(listed[path], method)
		if method == "GET" {
			listed[path] = append(listed[path], "HEAD")
		}
	}
	for path, methods := range listed {
		slices.Sort(methods)
		if got := strings.Join(methods, ", "); got != allowed[path] {
			t.Errorf("%s takes %q, want %q", path, got, allowed[path])
		}
	}
	if len(listed) != len(allowed) || root.Version != version || root.Message != "cassandra-service-go is running!" {
		t.Errorf("%d paths, want %d; %+v", len(listed), len(allowed), root)
	}
}

func TestHeadIsGetWithoutBody(t *testing.T) {
	url := serve(t, service)
	targets := []string{"/users/" + aUser(t).ID, "/users/" + uuid.NewString(), "/users/x", "/nothing", "/users?limit=0", "/users/stream?limit=0", "/users/stream/pages?page_state=x", "/shutdown"}
	for path, allow := range allowed {
		if strings.Contains(allow, "HEAD") && !strings.HasSuffix(path, "_query") {
			targets = append(targets, path)
		}
	}
	for _, target := range targets {
		t.Run(target, func(t *testing.T) {
			get := call(t, "GET "+target, "")
			answer := overTheWire(t, url, "HEAD "+target+" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
			header, body, _ := strings.Cut(answer, "\r\n\r\n")
			if want := fmt.Sprintf("HTTP/1.1 %d ", get.status); !strings.HasPrefix(header, want) || body != "" {
				t.Errorf("answer %q, want %q", answer, want)
			}
			if want := "Content-Type: " + get.header.Get("Content-Type") + "\r\n"; !strings.Contains(header+"\r\n", want) {
				t.Errorf("header %q, want %q", header, want)
			}
		})
	}
}

func TestHeadOfStreamsAsksCassandraNothing(t *testing.T) {
	for _, target := range []string{"/users/stream", "/users/stream/pages"} {
		before := counters.queries.Load()
		a := call(t, "HEAD "+target, "")
		if asked := counters.queries.Load() - before; a.status != 200 || asked != 0 {
			t.Errorf("HEAD %s: status = %d after %d queries, want 200 after none", target, a.status, asked)
		}
	}
}

func TestRequestID(t *testing.T) {
	longest := strings.Repeat("x", 64)
	tests := []struct{ name, given, want string }{
		{"taken", "A-z_0.9", "A-z_0.9"},
		{"longest", longest, longest},
		{"too long", longest + "x", ""},
		{"none", "", ""},
		{"a space", "a b", ""},
		{"a line break", "a\nb", ""},
		{"not ASCII", "ä", ""},
		{"a quote", `a"b`, ""},
	}
	made := regexp.MustCompile(`^[A-Z0-9]{26}$`)
	seen := map[string]bool{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, target := range []string{"/", "/nothing", "/users/x"} {
				got := call(t, "GET "+target, "", "X-Request-Id: "+tt.given).header.Get("X-Request-Id")
				if tt.want != "" && got != tt.want || tt.want == "" && (!made.MatchString(got) || seen[got]) {
					t.Errorf("X-Request-Id of %s = %q, want %q", target, got, cmp.Or(tt.want, "a new one"))
				}
				seen[got] = true
			}
		})
	}
}

var (
	goodTimeouts = []string{"0.5", "0.000000001", "00030", "60", "60.000000001", "61", "999999999.999999999"}
	badTimeouts  = []string{"", "0", "0.0", "-1", "+5", "inf", "NaN", "0x1p-2", "1_0", "1e3", "1.", ".5", "1.2.3", "1,5", "5s", " ", "1234567890", "0.1234567890", "٣", "5\n"}
)

func TestRequestTimeoutHeader(t *testing.T) {
	for _, value := range goodTimeouts {
		t.Run("taken "+value, func(t *testing.T) {
			wantStatus(t, call(t, "GET /", "", "X-Request-Timeout: "+value), 200)
		})
	}
	const refused = `{"header":"X-Request-Timeout","detail":"must be seconds above 0, once, in digits with at most one point, as in 0.5"}`
	for _, value := range badTimeouts {
		for _, request := range []string{"GET /", "GET /health", "GET /users/stream", "GET /nothing", "PUT /users/batch", "POST /users", "POST /shutdown"} {
			t.Run(request+" refused "+value, func(t *testing.T) {
				wantProblem(t, call(t, request, "", "X-Request-Timeout: "+value), 422, notValid, refused)
			})
		}
	}
	t.Run("twice", func(t *testing.T) {
		wantProblem(t, call(t, "GET /", "", "X-Request-Timeout: 5", "X-Request-Timeout: 5"), 422, notValid, refused)
	})
}

func TestRequestTimeoutIsTheDeadline(t *testing.T) {
	tests := []struct {
		headers     []string
		traits      traits
		least, most time.Duration
	}{
		{nil, 0, 29 * time.Second, defaultTimeout},
		{[]string{"X-Request-Timeout: 0.25"}, 0, 0, 250 * time.Millisecond},
		{[]string{"X-Request-Timeout: 999999999"}, 0, 59 * time.Second, maxTimeout},
		{nil, noDeadline, 0, 0},
		{[]string{"X-Request-Timeout: 10"}, noDeadline, 9 * time.Second, 10 * time.Second},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%q %d", tt.headers, tt.traits), func(t *testing.T) {
			var left time.Duration
			h := routed(1, func(w http.ResponseWriter, r *http.Request) error {
				if deadline, ok := r.Context().Deadline(); ok {
					left = time.Until(deadline)
				}
				return nil
			}, tt.traits)
			callOn(t, h, "GET /test", "", tt.headers...)
			if left < tt.least || left > tt.most {
				t.Errorf("%s left, want %s to %s", left, tt.least, tt.most)
			}
		})
	}
}

// routed puts handlers behind the real middleware, on /test and /health.
func routed(maxInFlight int, h handler, ts ...traits) http.Handler {
	rt := &router{mux: http.NewServeMux(), methods: map[string]map[string]*route{}, crossOrigin: http.NewCrossOriginProtection(), maxInFlight: int64(maxInFlight)}
	rt.handle("GET /test", h, ts...)
	rt.handle("POST /test", h, ts...)
	rt.handle("GET /health", getHealth, exempt)
	rt.handle("GET /metrics", getMetrics, exempt)
	rt.handle("GET /{$}", rt.getRoot, exempt)
	return rt.complete()
}

// captureLog collects what is logged in this process until the test ends.
func captureLog(t testing.TB) *logBuffer {
	log, before := &logBuffer{}, slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return log
}

func TestPanicIsLoggedOnceAndHidden(t *testing.T) {
	log := captureLog(t)
	h := routed(1, func(http.ResponseWriter, *http.Request) error { panic("secret text") })
	a := callOn(t, h, "GET /test", "", "X-Request-Id: the-one")
	wantProblem(t, a, 500, internalError)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 1 {
		t.Fatalf("%d log lines, want 1: %s", len(lines), log)
	}
	for _, part := range []string{"level=ERROR", "request_id=the-one", "method=GET", "path=/test", "status=500", "secret text", "main_test.go:"} {
		if !strings.Contains(lines[0], part) {
			t.Errorf("log line %s lacks %s", lines[0], part)
		}
	}
	wantStatus(t, callOn(t, h, "GET /", ""), 200)
}

func TestFailureAfterTheStatusLineCutsTheConnection(t *testing.T) {
	tests := []struct {
		name string
		fail func() error
		logs int
	}{
		{"an error", func() error { return errors.New("broken") }, 1},
		{"a panic", func() error { panic("broken") }, 1},
		{"an abort", func() error { panic(http.ErrAbortHandler) }, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			log := captureLog(t)
			url := serve(t, routed(1, func(w http.ResponseWriter, r *http.Request) error {
				io.WriteString(w, "part")
				http.NewResponseController(w).Flush()
				return tt.fail()
			}))
			answer, err := http.Get(url + "/test")
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			body, err := io.ReadAll(answer.Body)
			if string(body) != "part" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("body = %q, %v; want it cut", body, err)
			}
			if got := strings.Count(log.String(), "\n"); got != tt.logs {
				t.Errorf("%d log lines, want %d: %s", got, tt.logs, log)
			}
		})
	}
}

func TestMiddlewareKeepsFlushAndDeadlines(t *testing.T) {
	seen := make(chan struct{})
	url := serve(t, routed(1, func(w http.ResponseWriter, r *http.Request) error {
		control := http.NewResponseController(w)
		io.WriteString(w, "first")
		err := errors.Join(control.SetReadDeadline(time.Now().Add(time.Minute)), control.SetWriteDeadline(time.Now().Add(time.Minute)), control.Flush())
		select {
		case <-seen:
		case <-time.After(10 * time.Second):
			err = errors.Join(err, errors.New("the client saw nothing before the end"))
		}
		return err
	}))
	answer, err := http.Get(url + "/test")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.ReadFull(answer.Body, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	close(seen)
	if rest, err := io.ReadAll(answer.Body); err != nil || len(rest) > 0 {
		t.Errorf("rest = %q, %v", rest, err)
	}
}

func TestCrossOriginWritesAreRefused(t *testing.T) {
	tests := []struct {
		name, method, header string
		status               int
	}{
		{"fetch from another site", "POST", "Sec-Fetch-Site: cross-site", 403},
		{"fetch from a sibling", "POST", "Sec-Fetch-Site: same-site", 403},
		{"old browser elsewhere", "POST", "Origin: http://evil.example", 403},
		{"no origin at all", "POST", "Origin: null", 403},
		{"same origin", "POST", "Sec-Fetch-Site: same-origin", 201},
		{"old browser here", "POST", "Origin: http://example.com", 201},
		{"typed in", "POST", "Sec-Fetch-Site: none", 201},
		{"no browser", "POST", "Accept: */*", 201},
		{"reading is free", "GET", "Sec-Fetch-Site: cross-site", 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := call(t, tt.method+" /users", aBody, tt.header)
			wantStatus(t, a, tt.status)
			if tt.status == 403 {
				wantProblem(t, a, 403, "Browsers may not write from a page of another origin")
			}
		})
	}
}

const postHead = "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

func TestBodiesThatCostTooMuchEndTheConnection(t *testing.T) {
	url := serve(t, service)
	huge := strings.Repeat(" ", maxBody+1)
	tests := []struct{ name, request, status, detail string }{
		{"slow", postHead + "X-Request-Timeout: 0.3\r\nContent-Length: 50\r\n\r\n{", "408 Request Timeout", "The body did not arrive in time"},
		{"slow in chunks", postHead + "X-Request-Timeout: 0.3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", "408 Request Timeout", "The body did not arrive in time"},
		{"a byte too long", postHead + "Content-Length: 1048577\r\n\r\n" + huge, "413 Request Entity Too Large", "The body may have at most 1048576 bytes"},
		{"endless in chunks", postHead + "Transfer-Encoding: chunked\r\n\r\nffffffff\r\n" + huge, "413 Request Entity Too Large", "The body may have at most 1048576 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			answer := overTheWire(t, url, tt.request)
			for _, part := range []string{"HTTP/1.1 " + tt.status + "\r\n", "\r\nConnection: close\r\n", "\r\nContent-Type: application/problem+json\r\n", `"detail":"` + tt.detail + `"`} {
				if !strings.Contains(answer, part) {
					t.Errorf("answer %q lacks %q", answer, part)
				}
			}
		})
	}
}

func TestTruncatedBodyIsRefused(t *testing.T) {
	url := serve(t, service)
	conn := dial(t, url)
	io.WriteString(conn, postHead+"Content-Length: 70\r\n\r\n"+aBody)
	conn.CloseWrite()
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 422 ") || !strings.Contains(string(answer), `{"pointer":"","detail":"must arrive whole; it ended early"}`) {
		t.Errorf("answer %q, %v", answer, err)
	}
}

func TestDisconnectCancelsTheContext(t *testing.T) {
	for _, request := range []string{"GET /test HTTP/1.1\r\nHost: a\r\n\r\n", "POST /test HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"} {
		t.Run(request[:4], func(t *testing.T) {
			started, cause := make(chan struct{}), make(chan error, 1)
			url := serve(t, routed(1, func(w http.ResponseWriter, r *http.Request) error {
				close(started)
				<-r.Context().Done()
				cause <- r.Context().Err()
				return r.Context().Err()
			}))
			conn := dial(t, url)
			io.WriteString(conn, request)
			<-started
			conn.Close()
			if err := <-cause; err != context.Canceled {
				t.Errorf("the context ended with %v, want %v", err, context.Canceled)
			}
		})
	}
}

func TestExcessInFlightIsTurnedAway(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	h := routed(2, func(w http.ResponseWriter, r *http.Request) error {
		entered <- struct{}{}
		<-leave
		return nil
	})
	var inside sync.WaitGroup
	for range 2 {
		inside.Go(func() { callOn(t, h, "GET /test", "") })
		<-entered
	}
	for range 3 {
		a := callOn(t, h, "GET /test", "")
		wantProblem(t, a, 503, "Too many requests at once; try again in a second")
	}
	for _, path := range []string{"/", "/health", "/metrics"} {
		wantStatus(t, callOn(t, h, "GET "+path, ""), 200)
	}
	close(leave)
	inside.Wait()
	inside.Go(func() { <-entered })
	wantStatus(t, callOn(t, h, "GET /test", ""), 200)
	inside.Wait()
}

func TestSlowBodiesTakeNoPlaceInFlight(t *testing.T) {
	url := serve(t, routed(1, func(w http.ResponseWriter, r *http.Request) error { return nil }))
	before := counters.inFlight.Load()
	for range 3 {
		io.WriteString(dial(t, url), "POST /test HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
	}
	waitUntil(func() bool { return counters.inFlight.Load() == before+3 }, 10*time.Second)
	if answer := overTheWire(t, url, "GET /test HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(answer, "HTTP/1.1 200 ") {
		t.Errorf("answer %q, want 200", answer)
	}
}

func TestLargeBodiesDoNotFillTheMemory(t *testing.T) {
	p := startHealthy(t)
	before := p.metrics(t).MemoryBytes
	head := fmt.Sprintf("POST /users/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", maxBody)
	for range 4 * maxLarge { // all but a byte of each
		conn := dial(t, p.url)
		io.WriteString(conn, head+strings.Repeat(" ", smallBody))
		go io.WriteString(conn, strings.Repeat(" ", maxBody-smallBody-1)) // fails where it is refused
	}
	refused := func() bool { return p.metrics(t).RequestsByRoute["POST /users/batch"]["503"] == 3*maxLarge }
	if !waitUntil(refused, 10*time.Second) {
		t.Errorf("requests = %v, want %d refused", p.metrics(t).RequestsByRoute, 3*maxLarge)
	}
	if used := p.metrics(t).MemoryBytes - before; used > 4*maxLarge*maxBody {
		t.Errorf("memory grew by %d bytes", used)
	}
	wantStatus(t, p.ask("POST /users", aBody), 201)
}

func TestHeadersThatCostTooMuch(t *testing.T) {
	t.Parallel()
	p := startService(t, sharedKeyspace())
	if answer := overTheWire(t, p.url, "GET / HTTP/1.1\r\nHost: a\r\nX-Huge: "+strings.Repeat("x", 2*maxHeader)+"\r\n\r\n"); !strings.HasPrefix(answer, "HTTP/1.1 431 ") {
		t.Errorf("answer to a huge header %q, want 431", answer)
	}
	start := time.Now()
	answer := overTheWire(t, p.url, "GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ")
	if took := time.Since(start); answer != "" && !strings.HasPrefix(answer, "HTTP/1.1 408 ") || took < headerTimeout/2 || took > 3*headerTimeout {
		t.Errorf("answer to a slow header %q after %s, want the end after %s", answer, took, headerTimeout)
	}
}

func TestErrorsBecomeAnswers(t *testing.T) {
	wireTimeout := &net.OpError{Op: "write", Net: "tcp", Err: os.ErrDeadlineExceeded}
	tests := []struct {
		name   string
		kind   queryKind
		err    error
		status int
		detail string
	}{
		{"read without a connection", read, gocql.ErrNoConnections, 503, notAvailable},
		{"write without a connection", write, gocql.ErrNoConnections, 503, notAvailable},
		{"read when the wire is stuck", read, wireTimeout, 503, notAvailable},
		{"write when the wire is stuck", write, wireTimeout, 504, mayBeApplied},
		{"read when the node dies", read, io.EOF, 503, notAvailable},
		{"write when the node dies", conditionalWrite, io.EOF, 504, mayBeApplied},
		{"read at its deadline", read, context.DeadlineExceeded, 504, tooLate},
		{"write at its deadline", write, context.DeadlineExceeded, 504, mayBeApplied},
		{"read the node took too long for", read, gocql.ErrTimeoutNoResponse, 504, tooLate},
		{"read of too few replicas", read, &gocql.RequestErrUnavailable{}, 503, notAvailable},
		{"write to too few replicas", write, &gocql.RequestErrUnavailable{}, 503, notAvailable},
		{"transaction that may have begun", conditionalWrite, &gocql.RequestErrUnavailable{Consistency: gocql.LocalQuorum}, 504, mayBeApplied},
		{"transaction that did not begin", conditionalWrite, &gocql.RequestErrUnavailable{Consistency: gocql.Consistency(gocql.LocalSerial)}, 503, notAvailable},
		{"read after an applied write without a connection", readBack, gocql.ErrNoConnections, 504, mayBeApplied},
		{"read after an applied write of too few replicas", readBack, &gocql.RequestErrUnavailable{}, 504, mayBeApplied},
		{"a value of the wrong type", write, gocql.MarshalError("secret"), 500, internalError},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			log := captureLog(t)
			a := callOn(t, routed(1, func(http.ResponseWriter, *http.Request) error { return failed(tt.kind, tt.err, "testing") }), "GET /test", "")
			wantProblem(t, a, tt.status, tt.detail)
			if !strings.Contains(log.String(), tt.err.Error()) || strings.Count(log.String(), "\n") != 1 {
				t.Errorf("logged %q, want one line with %v", log, tt.err)
			}
		})
	}
}

const (
	limitWrong    = `{"parameter":"limit","detail":"must be a whole number in digits, at least 1"}`
	fetchWrong    = `{"parameter":"fetch_size","detail":"must be a whole number in digits, at least 1"}`
	filterWrong   = `{"parameter":"age_filter","detail":"must be a whole number in digits, at least 0"}`
	stateWrong    = `{"parameter":"page_state","detail":"is damaged or of another endpoint; start again without page_state"}`
	limitRepeated = `{"parameter":"limit","detail":"must be given once"}`
)

func badlyEscaped(escape string) string {
	return `{"parameter":"limit","detail":"must be percent-encoded: invalid URL escape \"` + escape + `\""}`
}

var badParameters = []struct{ name, query, errs string }{
	{"zero", "limit=0", limitWrong},
	{"negative", "limit=-1", limitWrong},
	{"negative and huge", "limit=-99999999999999999999", limitWrong},
	{"a plus", "limit=+5", limitWrong},
	{"an escaped plus", "limit=%2B5", limitWrong},
	{"a fraction", "limit=1.5", limitWrong},
	{"an exponent", "limit=1e3", limitWrong},
	{"hexadecimal", "limit=0x10", limitWrong},
	{"an underscore", "limit=1_0", limitWrong},
	{"Arabic digits", "limit=%D9%A3", limitWrong},
	{"words", "limit=ten", limitWrong},
	{"empty", "limit=", limitWrong},
	{"bare", "limit", limitWrong},
	{"a semicolon", "limit=1;fetch_size=2", limitWrong},
	{"a space", "limit=1%20", limitWrong},
	{"a zero byte", "limit=1%00", limitWrong},
	{"repeated", "limit=1&limit=1", limitRepeated},
	{"repeated often", "limit=1&limit=2&limit=3&limit", limitRepeated},
	{"repeated under an escaped name", "limit=1&%6cimit=2", limitRepeated},
	{"badly escaped", "limit=%zz", badlyEscaped("%zz")},
	{"escape cut off", "limit=5%2", badlyEscaped("%2")},
	{"all wrong at once", "fetch_size=0&limit=x&age_filter=-1", all(filterWrong, fetchWrong, limitWrong)},
	{"all wrong with a token", "page_state=x&fetch_size=0&age_filter=-1", all(filterWrong, fetchWrong, stateWrong)},
}

func TestBadParameters(t *testing.T) {
	for _, tt := range badParameters {
		t.Run(tt.name, func(t *testing.T) {
			wantProblem(t, call(t, "GET /users/stream/pages?"+tt.query, ""), 422, notValid, tt.errs)
			if strings.HasPrefix(tt.query, "limit") && !strings.Contains(tt.query, "page_state") {
				wantProblem(t, call(t, "GET /users?"+tt.query, ""), 422, notValid, tt.errs)
				wantProblem(t, call(t, "GET /users/stream?"+tt.query, ""), 422, notValid, tt.errs)
			}
		})
	}
}

// FuzzParameters holds a number in a query against what net/url makes of it.
func FuzzParameters(f *testing.F) {
	for _, tt := range badParameters {
		f.Add(tt.query)
	}
	f.Add("limit=5&fetch_size=7&Limit=x&%zz")
	f.Fuzz(func(t *testing.T, query string) {
		var given []string
		bad := false
		for pair := range strings.SplitSeq(query, "&") {
			key, value, _ := strings.Cut(pair, "=")
			if key, err := url.QueryUnescape(key); err != nil || key != "limit" {
				continue
			}
			text, err := url.QueryUnescape(value)
			given, bad = append(given, text), bad || err != nil
		}
		want := 10
		if len(given) > 0 {
			n, ok := new(big.Int).SetString(given[0], 10)
			bad = bad || len(given) > 1 || !ok || strings.Trim(given[0], "0123456789") != "" || n.Sign() < 1
			if !bad && n.Cmp(big.NewInt(100)) > 0 {
				want = 100
			} else if !bad {
				want = int(n.Int64())
			}
		}
		p := &parameters{query: query}
		if got := p.number("limit", 10, 1, 100); bad != (p.err() != nil) || !bad && got != want {
			t.Errorf("limit of %q = %d, %v; want %d, or an error: %t", query, got, p.errs, want, bad)
		}
		r := httptest.NewRequest("HEAD", "/users/stream", nil) // it does not ask Cassandra
		r.URL.RawQuery = query
		if a := record(service, r); a.status != 422 && (a.status != 200 || bad) {
			t.Errorf("HEAD /users/stream?%s: status = %d", query, a.status)
		}
	})
}

// FuzzTimeoutHeader holds X-Request-Timeout against exact arithmetic.
func FuzzTimeoutHeader(f *testing.F) {
	for _, value := range slices.Concat(goodTimeouts, badTimeouts) {
		f.Add(value)
	}
	form := regexp.MustCompile(`\A\d{1,9}(\.\d{1,9})?\z`)
	f.Fuzz(func(t *testing.T, value string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["X-Request-Timeout"] = []string{value}
		got, err := requestTimeout(r, false)
		exact, ok := new(big.Rat).SetString(value)
		if !ok || !form.MatchString(value) || exact.Sign() == 0 {
			if err == nil {
				t.Errorf("%q is taken as %s", value, got)
			}
			return
		}
		asked, _ := exact.Float64()
		want := min(asked*float64(time.Second), float64(maxTimeout))
		if err != nil || got <= 0 || math.Abs(float64(got)-want) > 1 {
			t.Errorf("%q = %s, %v; want %f ns", value, got, err, want)
		}
	})
}

func TestGoodParameters(t *testing.T) {
	aUser(t)
	for _, query := range []string{
		"limit=1", "limit=001", "limit=%31", "limit=101", "limit=99999999999999999999", "Limit=x", "nobody=%zz&%zz=1&&=&", "limit=1&fetch_size=99999999999999999999&age_filter=151", "age_filter=0",
	} {
		for _, path := range []string{"/users", "/users/stream", "/users/stream/pages"} {
			wantStatus(t, call(t, "GET "+path+"?"+query, ""), 200)
		}
	}
}

func TestShutdownIsForThisMachine(t *testing.T) {
	const local = "Shutdown is for a direct request from this machine"
	tests := []struct{ name, peer, host, header, detail string }{
		{"another peer", "10.0.0.1:5000", "localhost:8000", "", local},
		{"another peer over IPv6", "[2001:db8::1]:5000", "localhost:8000", "", local},
		{"no peer", "", "localhost:8000", "", local},
		{"a foreign host", "127.0.0.1:5000", "evil.example:8000", "", local},
		{"a host that begins well", "127.0.0.1:5000", "localhost.evil.example", "", local},
		{"an address that begins well", "127.0.0.1:5000", "127.0.0.1.evil.example", "", local},
		{"no host", "127.0.0.1:5000", "", "", local},
		{"any address", "127.0.0.1:5000", "0.0.0.0:8000", "", local},
		{"Forwarded", "127.0.0.1:5000", "localhost", "Forwarded: for=127.0.0.1", local},
		{"X-Forwarded-For", "127.0.0.1:5000", "localhost", "x-forwarded-for: 127.0.0.1", local},
		{"X-Forwarded-Host, empty", "127.0.0.1:5000", "localhost", "X-Forwarded-Host: ", local},
		{"X-Real-IP", "[::1]:5000", "[::1]:8000", "X-Real-IP: 127.0.0.1", local},
		{"Via", "127.0.0.1:5000", "localhost", "Via: 1.1 proxy", local},
		{"another origin", "127.0.0.1:5000", "localhost:8000", "Origin: http://localhost:3000", "Browsers may not write from a page of another origin"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest("POST", "/shutdown", nil)
			r.RemoteAddr, r.Host = tt.peer, tt.host
			if name, value, ok := strings.Cut(tt.header, ": "); ok {
				r.Header.Set(name, value)
			}
			wantProblem(t, record(service, r), 403, tt.detail)
		})
	}
	if life.draining.Load() {
		t.Fatal("one of them began the drain")
	}
}

func TestLoopbackAddresses(t *testing.T) {
	for _, address := range []string{"localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:80", "[::1]:80", "[::1]", "::1", "[::ffff:127.0.0.1]:80"} {
		if !isLoopback(address) {
			t.Errorf("isLoopback(%q) = false", address)
		}
	}
}

// holdOne has one GET /slow_query in flight and returns where its answer comes.
func (p *process) holdOne(t testing.TB) <-chan answer {
	t.Helper()
	answer := make(chan answer, 1)
	go func() { answer <- p.ask("GET /slow_query", "") }()
	if !waitUntil(func() bool { return p.metrics(t).RequestsInFlight == 2 }, 5*time.Second) {
		t.Fatal("the slow query did not begin")
	}
	return answer
}

// wantDraining checks what a service of the shared keyspace answers while it drains.
func (p *process) wantDraining(t *testing.T) {
	t.Helper()
	draining := func() bool { return p.ask("GET /health", "").status == 503 }
	if !waitUntil(draining, 3*time.Second) {
		t.Fatal("no drain began")
	}
	wantHealth(t, p.ask("GET /health", ""), "draining", true, os.Getenv("CASSANDRA_KEYSPACE"))
	for _, request := range []string{"GET /", "GET /users", "POST /users", "GET /metrics", "GET /nothing", "POST /shutdown"} {
		a := p.ask(request, "")
		wantProblem(t, a, 503, "The service is draining; send the request to another instance")
		if a.header.Get("Connection") != "close" {
			t.Errorf("%s: header = %v, want Connection: close", request, a.header)
		}
	}
}

func TestDrain(t *testing.T) {
	ways := map[string]func(t *testing.T, p *process){
		"SIGTERM": func(t *testing.T, p *process) { p.Process.Signal(syscall.SIGTERM) },
		"SIGINT":  func(t *testing.T, p *process) { p.Process.Signal(syscall.SIGINT) },
		"POST shutdown": func(t *testing.T, p *process) {
			if a := p.ask("POST /shutdown", ""); a.status != 200 || a.body != `{"message":"Shutdown initiated"}`+"\n" {
				t.Errorf("%s; want 200", a)
			}
		},
	}
	for name, stop := range ways {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startHealthy(t, sharedKeyspace())
			inFlight := p.holdOne(t)
			stop(t, p)
			p.wantDraining(t)
			if a := <-inFlight; a.status != 200 || !strings.Contains(a.body, "Slow query completed") {
				t.Errorf("in flight: %s; want 200", a)
			}
			p.wantExit(t, 0, 15*time.Second)
			if _, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")); err == nil {
				t.Error("the listener is still open")
			}
		})
	}
}

func TestDrainUnderLoad(t *testing.T) {
	p := startHealthy(t)
	var inFlight, late sync.WaitGroup
	for range 100 {
		inFlight.Go(func() {
			wantStatus(t, p.ask("GET /slow_query", ""), 200)
		})
	}
	if !waitUntil(func() bool { return p.metrics(t).RequestsInFlight > 100 }, 4*time.Second) {
		t.Error("the load did not start")
	}
	for range 16 {
		late.Go(func() {
			for {
				a := p.ask("POST /users", aBody)
				if a.status == 503 && a.header.Get("Retry-After") != "" && strings.Contains(a.body, "draining") {
					return
				}
				if a.status != 201 {
					t.Errorf("%s; want 201, or 503 when draining", a)
					return
				}
			}
		})
	}
	waitUntil(func() bool { return p.metrics(t).RequestsInFlight > 101 }, time.Second) // some of the others, too
	p.Process.Signal(syscall.SIGTERM)
	late.Wait()
	if a := p.ask("GET /health", ""); a.status != 503 || !strings.Contains(a.body, `"status":"draining"`) {
		t.Errorf("%s; want 503 draining", a)
	}
	inFlight.Wait()
	p.wantExit(t, 0, 15*time.Second)
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	p := startService(t, sharedKeyspace(), "DRAIN_DELAY=20s")
	p.Process.Signal(syscall.SIGTERM)
	if !waitUntil(func() bool { return strings.Contains(p.log.String(), "msg=draining") }, 5*time.Second) {
		t.Fatal("no drain began")
	}
	p.Process.Signal(syscall.SIGTERM)
	p.wantExit(t, -1, 3*time.Second)
}

func TestDrainDelay(t *testing.T) {
	t.Parallel()
	p := startService(t, sharedKeyspace(), "DRAIN_DELAY=1500ms")
	start := time.Now()
	p.Process.Signal(syscall.SIGTERM)
	p.wantExit(t, 0, 10*time.Second)
	if took := time.Since(start); took < 1500*time.Millisecond {
		t.Errorf("ended after %s with nothing in flight, want 1.5s at least", took)
	}
}

func TestShutdownTimeoutCutsStreamsVisibly(t *testing.T) {
	t.Parallel()
	p := startHealthy(t, "SHUTDOWN_TIMEOUT=1s")
	one := fmt.Sprintf(`{"name":%q,"email":"ada@example.com","age":36}`, strings.Repeat("𝄞", maxName))
	batch := "[" + strings.Repeat(one+",", 59) + one + "]"
	for range 25 {
		if a := p.ask("POST /users/batch", batch); a.status != 201 && a.status != 504 { // a busy node; some rows will do
			t.Fatalf("%s; want 201", a)
		}
	}
	conn := openReader(t, p.url, "/users/stream?fetch_size=200", 1000)
	start := time.Now()
	p.Process.Signal(syscall.SIGTERM)
	p.wantExit(t, 0, 6*time.Second) // a write that its client does not take would last for 30
	if took := time.Since(start); took < time.Second {
		t.Errorf("cut after %s, want 1s at least", took)
	}
	rest, _ := io.ReadAll(conn) // the end of an HTTP/1.1 chunked body is 0 CR LF CR LF
	if strings.HasSuffix(string(rest), "0\r\n\r\n") || len(rest) == 0 {
		t.Errorf("the stream looks whole: %d bytes, the last %q", len(rest), rest[max(0, len(rest)-20):])
	}
}

// Tests of health.go.

var measured = regexp.MustCompile(`"latency_ms":[0-9.e-]+,"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"`)

// wantHealth compares a whole answer of /health, its measurements aside.
func wantHealth(t testing.TB, a answer, verdict string, connected bool, keyspace string) {
	t.Helper()
	status, cassandra := 200, "connected"
	if verdict != "healthy" {
		status = 503
	}
	if !connected {
		cassandra = "disconnected"
	}
	want := fmt.Sprintf(`{"status":%q,"cassandra":%q,"cassandra_connected":%t,"keyspace":%q,measured}`+"\n", verdict, cassandra, connected, keyspace)
	if got := measured.ReplaceAllString(a.body, "measured"); a.status != status || got != want {
		t.Errorf("%s, want %d %s", a, status, want)
	}
	if a.header.Get("Content-Type") != "application/json" || (a.header.Get("Retry-After") == "1") != (status == 503) {
		t.Errorf("header = %v", a.header)
	}
}

func TestHealth(t *testing.T) {
	keyspace := os.Getenv("CASSANDRA_KEYSPACE")
	wantHealth(t, call(t, "GET /health", ""), "healthy", true, keyspace)
	wantHealth(t, call(t, "GET /health", "", "X-Request-Timeout: 0.000001"), "unhealthy", false, keyspace)
}

func TestServiceStartsWithoutCassandra(t *testing.T) {
	t.Parallel()
	addr, keyspace := closedAddress(t), newKeyspace(t)
	start := time.Now()
	p := startService(t, append(cassandraAt(addr), "CASSANDRA_KEYSPACE="+keyspace)...)
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("listening after %s, want within a second", took)
	}
	wantStatus(t, p.ask("GET /", ""), 200)
	for _, request := range []string{"GET /users", "GET /users/stream", "GET /users/stream/pages", "GET /users/" + uuid.NewString(), "DELETE /users/" + uuid.NewString(), "POST /users"} {
		a := p.ask(request, aBody)
		wantProblem(t, a, 503, notAvailable)
		if a.took > 6*time.Second {
			t.Errorf("%s; want it sooner", a)
		}
	}
	wantHealth(t, p.ask("GET /health", ""), "unhealthy", false, keyspace)
	startProxy(t, listen(t, addr))
	p.awaitHealthy(t, 15*time.Second)
	if a := p.ask("GET /users", ""); a.status != 200 || a.body != "[]\n" {
		t.Errorf("%s; want 200 and no users", a)
	}
}

func TestTestsWithoutCassandraSaySo(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), cassandraAt(closedAddress(t))...)
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "go run ./cassandra go test") || time.Since(start) > 15*time.Second {
		t.Errorf("%v after %s: %s", err, time.Since(start), out)
	}
}

func TestInstancesThatStartTogether(t *testing.T) {
	t.Parallel()
	keyspace := newKeyspace(t)
	var instances []*process
	for range 3 {
		instances = append(instances, startService(t, "CASSANDRA_KEYSPACE="+keyspace))
	}
	for _, p := range instances {
		p.awaitHealthy(t, 15*time.Second)
	}
	location := instances[0].ask("POST /users", aBody).header.Get("Location")
	for _, p := range instances {
		wantStatus(t, p.ask("GET "+location, ""), 200)
	}
}

func TestRestartKeepsUsers(t *testing.T) {
	t.Parallel()
	keyspace := newKeyspace(t)
	p := startHealthy(t, "CASSANDRA_KEYSPACE="+keyspace)
	kept := map[string]string{}
	for i := range 20 {
		a := p.ask("POST /users", fmt.Sprintf(`{"name":"Ada %d","email":"ada@example.com","age":36}`, i))
		kept[a.header.Get("Location")] = a.body
	}
	p.Process.Signal(syscall.SIGTERM)
	p.wantExit(t, 0, 10*time.Second)
	p = startHealthy(t, "CASSANDRA_KEYSPACE="+keyspace)
	for location, want := range kept {
		if a := p.ask("GET "+location, ""); a.body != want {
			t.Errorf("%s; want %s", a, want)
		}
	}
	if all := decode[[]userJSON](t, p.ask("GET /users?limit=100", ""), 200); len(all) != 20 {
		t.Errorf("%d users, want 20", len(all))
	}
}

func TestDriverSettings(t *testing.T) {
	s, err := loadSettings(environ("CASSANDRA_CONSISTENCY=QUORUM", "CASSANDRA_USERNAME=u", "CASSANDRA_PASSWORD=p"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.cluster.config(&countingDialer{})
	if want := (gocql.PasswordAuthenticator{Username: "u", Password: "p"}); !reflect.DeepEqual(cfg.Authenticator, want) {
		t.Errorf("authenticator = %+v, want %+v", cfg.Authenticator, want)
	}
	if cfg.Consistency != gocql.Quorum || cfg.SerialConsistency != gocql.LocalSerial || cfg.RetryPolicy != nil {
		t.Errorf("consistency %s, %s, retries %v", cfg.Consistency, cfg.SerialConsistency, cfg.RetryPolicy)
	}
}

func TestSettingsOfACluster(t *testing.T) {
	const warning = `no node is in CASSANDRA_DATACENTER, taking any" datacenter=nowhere`
	tests := []struct {
		setting string
		healthy bool
		log     string
	}{
		{"CASSANDRA_DATACENTER=datacenter1", true, ""},
		{"CASSANDRA_DATACENTER=nowhere", true, warning},
		{"CASSANDRA_CONSISTENCY=ONE", true, ""},
		{"CASSANDRA_CONSISTENCY=TWO", false, "Cannot achieve consistency level TWO"},
		{"CASSANDRA_REPLICATION=datacenter1:1", true, ""},
		{"CASSANDRA_REPLICATION=3", false, "Cannot achieve consistency level LOCAL_QUORUM"},
		{"CASSANDRA_REPLICATION=nowhere:1", false, "Unrecognized strategy option {nowhere}"},
	}
	for _, tt := range tests {
		t.Run(tt.setting, func(t *testing.T) {
			t.Parallel()
			p := startService(t, tt.setting)
			if tt.healthy {
				p.awaitHealthy(t, 30*time.Second)
			}
			if !waitUntil(func() bool {
				a := p.ask("POST /users", aBody)
				return a.status == 503 && !tt.healthy || a.status == 201
			}, 10*time.Second) {
				t.Error("neither 201 nor 503")
			}
			if !waitUntil(func() bool { p.ask("GET /users", ""); return strings.Contains(p.log.String(), tt.log) }, 20*time.Second) {
				t.Errorf("no %q in the log", tt.log)
			}
			if h := p.ask("GET /health", ""); (h.status == 200) != tt.healthy {
				t.Errorf("/health: status = %d, want healthy: %t", h.status, tt.healthy)
			}
			if tt.log != warning && strings.Contains(p.log.String(), "CASSANDRA_DATACENTER") {
				t.Errorf("a warning of the data centre:\n%s", p.log)
			}
		})
	}
}

// selfSigned returns a certificate for 127.0.0.1 that is its own CA, and the
// file that it is in.
func selfSigned(t testing.TB) (tls.Certificate, string) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(nil, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, file
}

func TestTLSIsVerified(t *testing.T) {
	certificate, ca := selfSigned(t)
	_, otherCA := selfSigned(t)
	proxy := startProxy(t, tls.NewListener(listen(t, anyPort), &tls.Config{Certificates: []tls.Certificate{certificate}}))
	startHealthy(t, append(proxy.settings(), "CASSANDRA_TLS_CA="+ca)...)
	startService(t, append(proxy.settings(), "CASSANDRA_TLS_CA="+otherCA)...).awaitRefusal(t, "certificate signed by unknown authority")
}

func TestOutageIsLoggedOnce(t *testing.T) {
	p := startService(t, cassandraAt(closedAddress(t))...)
	if !waitUntil(func() bool { return p.metrics(t).CassandraConnections.Failed > 4 }, logInterval*4/5) {
		t.Error("the service does not try on")
	}
	for _, line := range []string{"cannot connect to Cassandra, trying on", "driver: "} {
		if n := strings.Count(p.log.String(), line); n != 1 {
			t.Errorf("%d lines of %q, want 1", n, line)
		}
	}
}

func TestOverloadIsNoOutage(t *testing.T) {
	closed := openKeyspace(t, global.cluster)
	closed.Close()
	late := &session{Session: closed} // no ping will be answered here
	counters.lastAnswer.Store(time.Now().UnixNano())
	if !answers(t.Context(), late) {
		t.Error("an answer to others does not count")
	}
	counters.lastAnswer.Store(time.Now().Add(-deadAfter).UnixNano())
	if answers(t.Context(), late) {
		t.Error("an answer to others counts for ever")
	}
}

func TestSilentCassandraMeetsEveryDeadline(t *testing.T) {
	p, proxy := startBehindProxy(t)
	proxy.swallow(true)
	var health sync.WaitGroup
	health.Go(func() {
		if a := p.ask("GET /health", ""); a.status != 503 || a.took > 3*healthTimeout {
			t.Errorf("%s; want 503 after %s", a, healthTimeout)
		}
	})
	askEverything(p, func(a answer) {
		if a.status != 504 || !strings.Contains(a.body, `"detail":"timeout`) || a.took < 500*time.Millisecond || a.took > 1500*time.Millisecond {
			t.Errorf("%s; want 504 after 0.5 s", a)
		}
	}, "X-Request-Timeout: 0.5")
	if a := p.ask("GET /health", "", "X-Request-Timeout: 0.1"); a.status != 503 || a.took > 300*time.Millisecond {
		t.Errorf("%s; want 503 after 0.1 s", a)
	}
	for _, path := range []string{"/", "/metrics"} {
		if a := p.ask("GET "+path, ""); a.status != 200 || a.took > 300*time.Millisecond {
			t.Errorf("%s; want 200 at once", a)
		}
	}
	health.Wait()
	if m := p.metrics(t); m.RequestsInFlight != 1 || m.StreamsActive != 0 {
		t.Errorf("in flight = %d, streams = %d, want none but this request", m.RequestsInFlight, m.StreamsActive)
	}
	proxy.swallow(false)
	p.awaitHealthy(t, 15*time.Second)
}

// outage has a service's only Cassandra fail, and checks how quickly that is
// noticed, and how quickly its end is.
func outage(t *testing.T, p *process, fail, mend func()) {
	t.Helper()
	fail()
	start := time.Now()
	if !waitUntil(func() bool { return p.ask("GET /health", "").status == 503 }, 9*time.Second) {
		t.Error("still healthy after 9 s")
	}
	t.Logf("unhealthy after %s", time.Since(start).Round(time.Millisecond))
	mend()
	start = time.Now()
	p.awaitHealthy(t, 15*time.Second)
	t.Logf("healthy %s after Cassandra answered", time.Since(start).Round(time.Millisecond))
	if p.hasExited() {
		t.Fatal("the service has exited")
	}
}

func TestFrozenConnectionsAreReplaced(t *testing.T) {
	p, proxy := startBehindProxy(t)
	outage(t, p, proxy.freeze, func() {}) // which the driver alone ends after 96 s
	if a := p.ask("GET /context_manager_safety/status", ""); !strings.Contains(a.body, `"session_id":"2"`) {
		t.Errorf("the session was not replaced once: %s", a)
	}
}

// gone is the age of a user that is not there.
const gone = -1

// load is steady: each of its clients creates, reads, changes and deletes
// users of its own, one after another, and notes what the answers allow to be
// there afterwards.
type load struct {
	p       *process
	ctx     context.Context
	stop    context.CancelFunc
	clients sync.WaitGroup
	mu      sync.Mutex
	answers map[int]int             // by status; 0 is none
	failed  time.Time               // the last request that did
	users   map[string]map[int]bool // by name, the ages that it may have
	faults  []string
}

func startLoad(p *process, clients int) *load {
	l := &load{p: p, answers: map[int]int{}, users: map[string]map[int]bool{}}
	l.ctx, l.stop = context.WithCancel(context.Background())
	for n := range clients {
		l.clients.Go(func() {
			for i := 0; l.ctx.Err() == nil; i++ {
				l.live(fmt.Sprintf("client %d user %d", n, i), i%2 == 0)
				pause(l.ctx, 20*time.Millisecond)
			}
		})
	}
	return l
}

// live is the life of a user, up to the first request that fails.
func (l *load) live(name string, dies bool) {
	may := map[int]bool{gone: true}
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.users[name] = may
	}()
	fields := func(age int) string { return fmt.Sprintf(`{"name":%q,"email":"ada@example.com","age":%d}`, name, age) }
	var u userJSON
	a := l.send(may, "POST /users", fields(1), 201, 1)
	if a.status != 201 || json.Unmarshal([]byte(a.body), &u) != nil {
		return
	}
	for _, step := range lives[dies] {
		a := l.send(may, step.method+" /users/"+u.ID, fields(2), step.want, step.age)
		if a.status != step.want {
			return
		}
		if step.want == 200 && !strings.Contains(a.body, `"age":2,`) {
			l.fault("%s %s answered %s", step.method, name, a.body)
		}
	}
}

// lives are what follows at once on POST: a life, or a death.
var lives = map[bool][]struct {
	method    string
	age, want int
}{
	false: {{"PUT", 2, 200}, {"GET", 2, 200}},
	true:  {{"DELETE", gone, 204}, {"GET", gone, 404}},
}

// send asks, and takes down what the answer means for a user: done, surely not
// done (503), or perhaps (504).
func (l *load) send(may map[int]bool, request, body string, want, age int) answer {
	a := l.p.ask(request, body)
	isChange := !strings.HasPrefix(request, "GET ")
	switch {
	case a.err != nil:
		l.fault("%s", a)
		may[age] = true
	case a.status == want && isChange:
		clear(may)
		may[age] = true
	case a.status == 504 && isChange:
		may[age] = true
	case a.status != want && a.status != 503 && a.status != 504:
		l.fault("%s; want %d", a, want)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[a.status]++
	if a.status != want {
		l.failed = time.Now()
	}
	return a
}

func (l *load) fault(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, fmt.Sprintf(format, args...))
}

// stream has one more client read 300 users that nobody changes, again and
// again: what looks whole has to be.
func (l *load) stream(t testing.TB) {
	const elders = 300
	user := `{"name":"elder","email":"ada@example.com","age":150}`
	for range elders / maxBatch {
		if a := l.p.ask("POST /users/batch", "["+strings.Repeat(user+",", maxBatch-1)+user+"]"); a.status != 201 {
			t.Fatalf("%s; want 201", a)
		}
	}
	whole := 0
	l.clients.Go(func() {
		for ; l.ctx.Err() == nil; pause(l.ctx, 20*time.Millisecond) {
			a := l.p.ask("GET /users/stream?age_filter=150&fetch_size=10", "")
			if n := strings.Count(a.body, `"id"`); a.err == nil && a.status == 200 && n != elders {
				l.fault("a stream looks whole with %d of %d users", n, elders)
			} else if n == elders {
				whole++
			}
		}
		t.Logf("%d whole streams", whole)
	})
}

// created is how many users were.
func (l *load) created() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answers[201]
}

// lastFailure is when a request failed last.
func (l *load) lastFailure() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// check ends the load and compares what is there with what may be.
func (l *load) check(t testing.TB) {
	t.Helper()
	l.stop()
	l.clients.Wait()
	a := l.p.ask("GET /users/stream", "", "Accept: "+ndjson, "X-Request-Timeout: 60")
	if a.err != nil || a.status != 200 {
		t.Fatalf("%s; want 200", a)
	}
	there := map[string]int{}
	for line := range strings.Lines(a.body) {
		var u userJSON
		if err := json.Unmarshal([]byte(line), &u); err != nil || u.ID == "" {
			t.Fatalf("line %q: %v", line, err)
		}
		there[u.Name] = u.Age
	}
	for name, may := range l.users {
		age, ok := there[name]
		if !ok {
			age = gone
		}
		if !may[age] {
			l.fault("%s has age %d, may have %v (%d: gone)", name, age, may, gone)
		}
	}
	t.Logf("answers by status: %v; %d users there of %d", l.answers, len(there), len(l.users))
	if len(l.users) == 0 || len(l.faults) > 0 {
		t.Errorf("%d users, %d faults, of them: %s", len(l.users), len(l.faults), strings.Join(l.faults[:min(5, len(l.faults))], "\n"))
	}
}

func TestCutConnectionsLoseNothing(t *testing.T) {
	p, proxy := startBehindProxy(t)
	l := startLoad(p, 8)
	l.clients.Go(func() { // a cut is no verdict about the session
		for i := 0; l.ctx.Err() == nil; i++ {
			name := selfTests[i%len(selfTests)]
			if a := p.ask("POST /context_manager_safety/"+name, ""); a.status < 500 && (a.status != 200 || falseVerdict.MatchString(a.body)) || a.status == 500 {
				t.Error(a)
			}
		}
	})
	for range 12 {
		before := l.created()
		proxy.cut()
		if !waitUntil(func() bool { return l.created() > before+20 }, 15*time.Second) {
			t.Fatal("nothing was written after a cut")
		}
	}
	l.check(t)
}

// Tests of users.go.

const (
	nameWrong  = `{"pointer":"/name","detail":"must be text of 1 to 100 characters, not blank"}`
	emailWrong = `{"pointer":"/email","detail":"must be one plain address of at most 254 bytes, as in ada@example.com"}`
	ageWrong   = `{"pointer":"/age","detail":"must be a whole number from 0 to 150"}`
	ageOutside = `{"pointer":"/age","detail":"must be from 0 to 150"}`
	noName     = `{"pointer":"/name","detail":"is missing; it must be text of 1 to 100 characters, not blank"}`
	noEmail    = `{"pointer":"/email","detail":"is missing; it must be one plain address of at most 254 bytes, as in ada@example.com"}`
	noAge      = `{"pointer":"/age","detail":"is missing; it must be a whole number from 0 to 150"}`
	notObject  = `{"pointer":"","detail":"must be an object with ` + userFieldNames + `"}`
	notUTF8    = `{"pointer":"","detail":"must be valid UTF-8"}`
	noBody     = `{"pointer":"","detail":"must be JSON; it is empty"}`
)

func unknown(pointer string) string {
	return fmt.Sprintf(`{"pointer":%q,"detail":"is not a field of a user; those are %s, spelled so"}`, pointer, userFieldNames)
}

func repeated(pointer string) string {
	return fmt.Sprintf(`{"pointer":%q,"detail":"must come once"}`, pointer)
}

func notJSON(why string) string {
	return fmt.Sprintf(`{"pointer":"","detail":%q}`, "must be one JSON value: "+why)
}

// all joins errors.
func all(errs ...string) string { return strings.Join(errs, ",") }

func with(member string) string  { return strings.TrimSuffix(aBody, "}") + "," + member + "}" }
func named(name string) string   { return `{"name":` + name + `,"email":"ada@example.com","age":36}` }
func mailed(email string) string { return `{"name":"Ada","email":` + email + `,"age":36}` }
func aged(age string) string     { return `{"name":"Ada","email":"ada@example.com","age":` + age + `}` }

var badUsers = []struct{ name, body, errs string }{
	{"nothing given", `{}`, all(noName, noEmail, noAge)},
	{"all null", `{"name":null,"email":null,"age":null}`, all(nameWrong, emailWrong, ageWrong)},
	{"all of the wrong type", `{"name":1,"email":["a@b.c"],"age":"36"}`, all(nameWrong, emailWrong, ageWrong)},
	{"one wrong, one missing, one unknown, one repeated", `{"age":-1,"x":1,"name":"Ada","name":"Ada"}`, all(ageOutside, unknown("/x"), repeated("/name"), noEmail)},
	{"wrong and repeated", `{"name":1,"name":"Ada","email":"a@b.c","age":1}`, all(nameWrong, repeated("/name"))},
	{"empty name", named(`""`), nameWrong},
	{"blank name", named(`" \t\u00a0\u2003"`), nameWrong},
	{"name too long", named(`"` + strings.Repeat("𝄞", 101) + `"`), nameWrong},
	{"name an object", named(`{}`), nameWrong},
	{"name a boolean", named(`true`), nameWrong},
	{"high surrogate alone", named(`"a\ud83d"`), nameWrong},
	{"low surrogate alone", named(`"\uDE00a"`), nameWrong},
	{"surrogates in the wrong order", named(`"\ude00\ud83d"`), nameWrong},
	{"high surrogate before another escape", named(`"\ud83d\u0041"`), nameWrong},
	{"email a lone surrogate", mailed(`"\ud83d@example.com"`), emailWrong},
	{"no address", mailed(`"ada"`), emailWrong},
	{"empty email", mailed(`""`), emailWrong},
	{"no domain", mailed(`"ada@"`), emailWrong},
	{"no local part", mailed(`"@example.com"`), emailWrong},
	{"display name", mailed(`"Ada <ada@example.com>"`), emailWrong},
	{"angle brackets", mailed(`"<ada@example.com>"`), emailWrong},
	{"two addresses", mailed(`"ada@example.com, bob@example.com"`), emailWrong},
	{"a comment", mailed(`"ada@example.com (Ada)"`), emailWrong},
	{"a space around", mailed(`" ada@example.com"`), emailWrong},
	{"a line break after", mailed(`"ada@example.com\n"`), emailWrong},
	{"a header in it", mailed(`"ada@example.com\r\nBcc: b@c.d"`), emailWrong},
	{"two dots", mailed(`"a..b@example.com"`), emailWrong},
	{"email of 255 bytes", mailed(`"` + strings.Repeat("a", 243) + `@example.com"`), emailWrong},
	{"email of a megabyte", mailed(`"` + strings.Repeat("a ", 500_000) + `@example.com"`), emailWrong},
	{"age negative", aged(`-1`), ageOutside},
	{"age too large", aged(`151`), ageOutside},
	{"age huge", aged(`1e400`), ageOutside},
	{"age beyond any exponent", aged(`100e99999999999999999999`), ageOutside},
	{"age of a thousand digits", aged(strings.Repeat("9", 1000)), ageOutside},
	{"age a fraction", aged(`30.5`), ageWrong},
	{"age nearly whole", aged(`30.000000000000000000000001`), ageWrong},
	{"age a small fraction", aged(`1e-1`), ageWrong},
	{"age below any exponent", aged(`1.5e-99999999999999999999`), ageWrong},
	{"age text", aged(`"30"`), ageWrong},
	{"age true", aged(`true`), ageWrong},
	{"age an array", aged(`[30]`), ageWrong},
	{"unknown name", with(`"nick":"a"`), unknown("/nick")},
	{"unknown name to be escaped", with(`"a/b~c":1`), unknown("/a~1b~0c")},
	{"empty name of a member", with(`"":1`), unknown("/")},
	{"wrongly cased", `{"Name":"Ada","EMAIL":"ada@example.com","aGe":36}`, all(unknown("/Name"), unknown("/EMAIL"), unknown("/aGe"), noName, noEmail, noAge)},
	{"a letter that folds to k", with("\"\u212Aname\":1"), unknown("/\u212Aname")},
	{"repeated", with(`"age":36`), repeated("/age")},
	{"repeated under an escaped name", with(`"\u0061ge":36`), repeated("/age")},
	{"repeated and the server's", with(`"id":1,"id":2`), repeated("/id")},
	{"null", `null`, notObject},
	{"a number", `1`, notObject},
	{"a string", `"Ada"`, notObject},
	{"an array", `[` + aBody + `]`, notObject},
	{"only spaces", " \r\n\t", noBody},
	{"no JSON", `name=Ada`, notJSON("invalid character 'a' in literal null (expecting 'u')")},
	{"cut off", `{"name":"Ada"`, notJSON("unexpected end of JSON input")},
	{"trailing data", with(`"id":1`) + `{}`, notJSON("invalid character '{' after top-level value")},
	{"trailing comma", `{"name":"Ada",}`, notJSON("invalid character '}' looking for beginning of object key string")},
	{"a number as a name", `{1:2}`, notJSON("invalid character '1' looking for beginning of object key string")},
	{"NaN", aged(`NaN`), notJSON("invalid character 'N' looking for beginning of value")},
	{"leading zero", aged(`030`), notJSON("invalid character '3' after object key:value pair")},
	{"a raw line break", named("\"a\nb\""), notJSON(`invalid character '\n' in string literal`)},
	{"a byte order mark", "\xef\xbb\xbf{}", notJSON("invalid character 'ï' looking for beginning of value")},
	{"nested deeply", strings.Repeat("[", 500_000), notJSON("invalid character '[' exceeded max depth")},
	{"nested deeply in a member", with(`"id":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)), notJSON("invalid character '[' exceeded max depth")},
	{"broken UTF-8 in a name", named("\"Ad\xff\""), notUTF8},
	{"UTF-8 cut off", named("\"Ad\xe2\x82\""), notUTF8},
	{"UTF-8 of a surrogate", named("\"\xed\xa0\x80\""), notUTF8},
	{"UTF-16", "\xff\xfe{\x00}\x00", notUTF8},
}

func TestBadUsers(t *testing.T) {
	id := aUser(t).ID
	for _, tt := range badUsers {
		t.Run(tt.name, func(t *testing.T) {
			wantProblem(t, call(t, "POST /users", tt.body), 422, notValid, tt.errs)
			wantProblem(t, call(t, "PUT /users/"+id, tt.body), 422, notValid, tt.errs)
		})
	}
	t.Run("no body", func(t *testing.T) {
		wantProblem(t, call(t, "POST /users", ""), 422, notValid, noBody)
	})
	if a := call(t, "GET /users/"+id, ""); !strings.Contains(a.body, aBody[1:len(aBody)-1]) {
		t.Errorf("a refused PUT changed the user: %s", a.body)
	}
}

// FuzzBody posts anything. What is taken reads back as encoding/json reads the
// body, and what is not says why.
func FuzzBody(f *testing.F) {
	for _, tt := range badUsers {
		if len(tt.body) < 1000 {
			f.Add([]byte(tt.body))
		}
	}
	for _, tt := range usersAtTheLimits {
		f.Add([]byte(tt.body[:min(len(tt.body), 1000)]))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		a := call(t, "POST /users", string(body))
		if a.status != 201 {
			p := decode[problem](t, a, 422)
			for _, e := range p.Errors {
				if e.Pointer == nil || e.Detail == "" || !utf8.ValidString(*e.Pointer) {
					t.Errorf("error %+v in %s", e, a.body)
				}
			}
			if len(p.Errors) == 0 {
				t.Errorf("no errors in %s", a.body)
			}
			return
		}
		var meant struct {
			Name, Email string
			Age         json.Number
		}
		if err := json.Unmarshal(body, &meant); err != nil || !utf8.Valid(body) {
			t.Fatalf("%q is taken: %v", body, err)
		}
		got := decode[userJSON](t, call(t, "GET "+a.header.Get("Location"), ""), 200)
		age, _ := new(big.Rat).SetString(meant.Age.String())
		if got.Name != meant.Name || got.Email != meant.Email || age.Cmp(big.NewRat(int64(got.Age), 1)) != 0 {
			t.Errorf("%q reads back as %+v", body, got)
		}
		if got.Age < 0 || got.Age > maxAge || len(got.Email) > maxEmail || strings.TrimSpace(got.Name) == "" || utf8.RuneCountInString(got.Name) > maxName {
			t.Errorf("%+v is taken", got)
		}
	})
}

// FuzzWholeNumbers holds parseInteger against exact arithmetic.
func FuzzWholeNumbers(f *testing.F) {
	for _, number := range []string{"0", "-0", "30", "30.0", "3e1", "30.5", "300E-1", "1e9", "-1e9", "999999999", "1000000000", "0.1e1", "1e-0", "100e99", "1.50e-99"} {
		f.Add(number)
	}
	small := regexp.MustCompile(`\A[^eE]*([eE][+-]?\d{1,3})?\z`) // a larger exponent is a megabyte of digits
	f.Fuzz(func(t *testing.T, number string) {
		if number == "" || !strings.Contains("-0123456789", number[:1]) || !json.Valid([]byte(number)) || strings.TrimSpace(number) != number || !small.MatchString(number) {
			t.Skip()
		}
		exact, _ := new(big.Rat).SetString(number)
		n, ok := parseInteger(number)
		if ok != exact.IsInt() {
			t.Fatalf("parseInteger(%s) = %d, %t; it is whole: %t", number, n, ok, exact.IsInt())
		}
		if limit := big.NewRat(1_000_000_000, 1); exact.Cmp(limit) > 0 {
			exact = limit
		} else if limit.Neg(limit); exact.Cmp(limit) < 0 {
			exact = limit
		}
		if ok && exact.Cmp(big.NewRat(int64(n), 1)) != 0 {
			t.Errorf("parseInteger(%s) = %d, want %s", number, n, exact)
		}
	})
}

func TestBadPatches(t *testing.T) {
	const nothing = `{"pointer":"","detail":"must have at least one of ` + userFieldNames + `"}`
	tests := []struct{ name, body, errs string }{
		{"nothing", `{}`, nothing},
		{"only the server's fields", `{"id":"x","created_at":1,"updated_at":null}`, nothing},
		{"null", `{"name":null}`, nameWrong},
		{"all null", `{"name":null,"email":null,"age":null}`, all(nameWrong, emailWrong, ageWrong)},
		{"one right, two wrong", `{"name":"Bob","email":1,"age":1.5}`, all(emailWrong, ageWrong)},
		{"unknown", `{"nick":"a"}`, unknown("/nick")},
		{"an array of operations", `[{"op":"replace","path":"/age","value":1}]`, notObject},
	}
	id := aUser(t).ID
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantProblem(t, call(t, "PATCH /users/"+id, tt.body), 422, notValid, tt.errs)
		})
	}
}

func TestContentTypes(t *testing.T) {
	const asJSON = "Send the body as JSON: -H 'Content-Type: application/json'"
	id := aUser(t).ID
	for _, refused := range []string{"", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/json/x", "application/vnd.api+json", "json", "application/json; charset", "application/json, text/plain"} {
		t.Run("refused "+refused, func(t *testing.T) {
			for _, request := range []string{"POST /users", "POST /users/batch", "PUT /users/" + id, "PATCH /users/" + id} {
				wantProblem(t, call(t, request, aBody, "Content-Type: "+refused), 415, asJSON)
			}
		})
	}
	const patch = "Content-Type: application/merge-patch+json"
	wantProblem(t, call(t, "POST /users", aBody, patch), 415, asJSON)
	wantProblem(t, call(t, "PUT /users/"+id, aBody, patch), 415, asJSON)
	for _, taken := range []string{"Content-Type: application/json", patch, "Content-Type: Application/JSON", "Content-Type: application/json; charset=utf-8"} {
		wantStatus(t, call(t, "PATCH /users/"+id, aBody, taken), 200)
	}
}

func TestBadIDs(t *testing.T) {
	const id = "8b1a9953-c461-4d3c-9f3a-0123456789ab"
	for name, bad := range map[string]string{
		"words": "ada", "digits": "1", "bare": strings.ReplaceAll(id, "-", ""), "braces": "%7B" + id + "%7D", "a urn": "urn:uuid:" + id,
		"too short": id[1:], "too long": id + "0", "a letter too far": "g" + id[1:], "dashes misplaced": "8b1a-9953c461-4d3c-9f3a-0123456789ab",
		"a space": "%20" + id[1:], "a zero byte": id + "%00", "quoted": "%22" + id[2:] + "%22", "a dot": "%2e", "CQL": "1;DROP", "not ASCII": "%C3%A4" + id[1:],
	} {
		t.Run(name, func(t *testing.T) {
			for _, method := range []string{"GET", "PUT", "PATCH", "DELETE"} {
				wantProblem(t, call(t, method+" /users/"+bad, `{"age":1}`), 400, "Invalid UUID format")
			}
		})
	}
}

// usersAtTheLimits are valid; want is the body as it is answered, where it differs.
var usersAtTheLimits = []struct{ name, body, want string }{
	{"longest name", named(`"` + strings.Repeat("𝄞", 100) + `"`), ""},
	{"longest email", mailed(`"` + strings.Repeat("a", 242) + `@example.com"`), ""},
	{"shortest", `{"name":"a","email":"a@b","age":0}`, ""},
	{"oldest", aged(`150`), ""},
	{"age as a decimal", aged(`30.0`), aged(`30`)},
	{"age with an exponent", aged(`3e1`), aged(`30`)},
	{"age with a negative exponent", aged(`300000E-4`), aged(`30`)},
	{"age minus nothing", aged(`-0.0e5`), aged(`0`)},
	{"spaces kept", named(`" a "`), ""},
	{"any order", `{"age":36,"email":"ada@example.com","name":"Ada"}`, named(`"Ada"`)},
	{"spelled with escapes", `{"n\u0061me":"\u0041da","email":"ada@example.com","age":36}`, named(`"Ada"`)},
	{"Unicode", `{"name":"李 Зоя é👩‍🚀","email":"зоя@пример.рф","age":1}`, ""},
	{"surrogate pair", named(`"\ud83d\uDE00"`), named(`"😀"`)},
	{"surrogate spelled out", named(`"\\ud83d"`), ""},
	{"markup and control characters", named(`"<b>&\u0000\u2028\"\\"`), ""},
	{"the server's fields, ignored", with(`"id":[],"created_at":{"a":1},"updated_at":null`), aBody},
	{"spaces around", "\r\n\t " + aBody + " \n", aBody},
	{"body of a megabyte", aBody + strings.Repeat(" ", maxBody-len(aBody)), aBody},
}

func TestUsersAtTheLimits(t *testing.T) {
	made := regexp.MustCompile(`^[0-9a-f-]{14}4[0-9a-f]{3}-[89ab][0-9a-f-]{16} \S{23}Z$`)
	for _, tt := range usersAtTheLimits {
		t.Run(tt.name, func(t *testing.T) {
			var want userJSON
			if err := json.Unmarshal([]byte(cmp.Or(tt.want, tt.body)), &want); err != nil {
				t.Fatal(err)
			}
			posted := call(t, "POST /users", tt.body)
			got := decode[userJSON](t, posted, 201)
			want.ID, want.CreatedAt, want.UpdatedAt = got.ID, got.CreatedAt, got.CreatedAt
			if posted.body != want.encode() || !made.MatchString(got.ID+" "+got.CreatedAt) {
				t.Fatalf("body %s, want %s", posted.body, want.encode())
			}
			if location := posted.header.Get("Location"); location != "/users/"+got.ID {
				t.Errorf("Location = %q, want /users/%s", location, got.ID)
			}
			read := call(t, "GET /users/"+got.ID, "")
			if read.status != 200 || read.body != posted.body {
				t.Errorf("%s; want 200, %s", read, posted.body)
			}
			if stream := call(t, "GET /users/stream", ""); !strings.Contains(stream.body, strings.TrimSpace(posted.body)) {
				t.Errorf("the stream lacks %s", posted.body)
			}
			put := decode[userJSON](t, call(t, "PUT /users/"+got.ID, read.body), 200)
			if want.UpdatedAt = put.UpdatedAt; put != want {
				t.Errorf("PUT of what GET answered = %+v, want %+v", put, want)
			}
		})
	}
}

// encode writes a user as the service is to write it.
func (u userJSON) encode() string {
	var body strings.Builder
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	enc.Encode(u)
	return body.String()
}

func TestChangesOfAUser(t *testing.T) {
	u := aUser(t)
	tests := []struct {
		name, method, body string
		change             func(u *userJSON)
	}{
		{"put", "PUT", `{"name":"Bob","email":"bob@example.com","age":40}`, func(u *userJSON) { u.Name, u.Email, u.Age = "Bob", "bob@example.com", 40 }},
		{"patch of the name", "PATCH", `{"name":"Eve"}`, func(u *userJSON) { u.Name = "Eve" }},
		{"patch of the email", "PATCH", `{"email":"eve@example.com"}`, func(u *userJSON) { u.Email = "eve@example.com" }},
		{"patch of the age", "PATCH", `{"age":0}`, func(u *userJSON) { u.Age = 0 }},
		{"patch to the same", "PATCH", `{"age":0}`, func(*userJSON) {}},
		{"patch beside the server's fields", "PATCH", `{"id":"x","created_at":"x","updated_at":"x","age":7}`, func(u *userJSON) { u.Age = 7 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for last := now(); now() == last; { // the clock of updated_at moves in milliseconds
				time.Sleep(time.Millisecond)
			}
			a := call(t, tt.method+" /users/"+u.ID, tt.body)
			got := decode[userJSON](t, a, 200)
			tt.change(&u)
			if got.UpdatedAt <= u.UpdatedAt {
				t.Errorf("updated_at = %s, want it after %s", got.UpdatedAt, u.UpdatedAt)
			}
			u.UpdatedAt = got.UpdatedAt
			if got != u {
				t.Errorf("user = %+v, want %+v", got, u)
			}
			if read := call(t, "GET /users/"+u.ID, ""); read.body != a.body {
				t.Errorf("GET: %s, want %s", read.body, a.body)
			}
		})
	}
}

func TestMissingAndDeletedUsers(t *testing.T) {
	for name, id := range map[string]string{"deleted": aUser(t).ID, "never there": uuid.NewString()} {
		t.Run(name, func(t *testing.T) {
			target := "/users/" + id
			for range 2 {
				if a := call(t, "DELETE "+target, ""); a.status != 204 || len(a.body) > 0 {
					t.Errorf("%s; want 204 and no body", a)
				}
			}
			wantProblem(t, call(t, "PUT "+target, aBody), 404, "User not found")
			wantProblem(t, call(t, "PATCH "+target, `{"age":36}`), 404, "User not found")
			wantProblem(t, call(t, "GET "+target, ""), 404, "User not found")
			wantProblem(t, call(t, "GET /users/"+strings.ToUpper(id), ""), 404, "User not found")
			if row := readRow(t, uuid.MustParse(id)); row != nil {
				t.Errorf("a row, whole or not, is left: %q", row)
			}
		})
	}
}

// lostChanges makes n users by create, changes each of them at once, by PUT,
// PATCH or DELETE in turn, and counts the changes that were answered but lost.
func lostChanges(t *testing.T, n int, create func() (id string)) int {
	var lost atomic.Int64
	atOnce(n, func(i int) {
		target := "/users/" + create()
		method := []string{"PUT", "PATCH", "DELETE"}[i%3]
		body := []string{`{"name":"Eve","email":"eve@example.com","age":77}`, `{"age":77}`, ""}[i%3]
		if a := call(t, method+" "+target, body); a.status != []int{200, 200, 204}[i%3] {
			t.Error(a)
		}
		got := call(t, "GET "+target, "")
		kept := method == "DELETE" && got.status == 404 || method != "DELETE" && strings.Contains(got.body, `"age":77`)
		if !kept {
			lost.Add(1)
		}
	})
	return int(lost.Load())
}

func TestChangesRightAfterCreationAreKept(t *testing.T) {
	if lost := lostChanges(t, 900, func() string { return aUser(t).ID }); lost > 0 {
		t.Errorf("%d of 900 changes lost", lost)
	}
}

// The test above can fail: stamped 5 ms ahead, as a second coordinator's clock
// may be, an INSERT wins over what follows; further ahead on a machine so busy
// that 5 ms are over by then.
func TestChangesAreLostAfterAnInsertFromTheFuture(t *testing.T) {
	for ahead := 5 * time.Millisecond; ahead < time.Minute; ahead *= 5 {
		lost := lostChanges(t, 90, func() string {
			u := ada.newUser()
			stamp := time.Now().Add(ahead).UnixMicro()
			if err := global.session.Load().Query(insertUser, u.values()...).WithTimestamp(stamp).Exec(); err != nil {
				t.Error(err)
			}
			return u.ID.String()
		})
		if t.Logf("%d of 90 changes lost after an INSERT stamped %s ahead", lost, ahead); lost > 0 {
			return
		}
	}
	t.Error("none is ever lost: the test above shows nothing")
}

func TestManyCreationsAtOnce(t *testing.T) {
	var mu sync.Mutex
	created := map[string]string{}
	var running sync.WaitGroup
	for i := range 500 {
		running.Go(func() {
			a := call(t, "POST /users", fmt.Sprintf(`{"name":"n%d","email":"n%d@example.com","age":%d}`, i, i, i%150))
			mu.Lock()
			defer mu.Unlock()
			created[a.header.Get("Location")] = a.body
		})
	}
	running.Wait()
	if len(created) != 500 {
		t.Errorf("%d different users, want 500", len(created))
	}
	for location, want := range created {
		if got := call(t, "GET "+location, ""); got.status != 200 || got.body != want {
			t.Errorf("GET %s: %d %s, want %s", location, got.status, got.body, want)
		}
	}
}

func TestRacingChangesLeaveNoHalfRows(t *testing.T) {
	var sure atomic.Int64
	atOnce(500, func(int) {
		id := aUser(t).ID
		var racing sync.WaitGroup
		var unsure atomic.Bool // 504: the node gave up, and may do it later
		for method, body := range map[string]string{"PUT": `{"name":"Eve","email":"eve@example.com","age":77}`, "PATCH": `{"age":78}`, "DELETE": ""} {
			racing.Go(func() {
				switch a := call(t, method+" /users/"+id, body); a.status {
				case 200, 204, 404:
				case 504:
					unsure.Store(true)
				default:
					t.Error(a)
				}
			})
		}
		racing.Wait()
		row := readRow(t, uuid.MustParse(id))
		if slices.ContainsFunc(row, func(column rawText) bool { return column == nil }) {
			t.Errorf("half a row of %s is left: %q", id, row)
		}
		if !unsure.Load() {
			sure.Add(1)
			if row != nil {
				t.Errorf("a deleted row came back: %q", row)
			}
		}
	})
	if sure.Load() < 250 {
		t.Errorf("only %d of 500 races had a sure end", sure.Load())
	}
}

// readRow returns the columns of a user as they are stored, nil for null; none
// if there is no row.
func readRow(t *testing.T, id uuid.UUID) []rawText {
	t.Helper()
	rows := global.session.Load().Query(selectUser, gocql.UUID(id)).Iter()
	row, dest := make([]rawText, len(rows.Columns())), []any{}
	for i := range row {
		dest = append(dest, &row[i])
	}
	found := rows.Scan(dest...)
	if err := rows.Close(); err != nil {
		t.Fatal(err)
	}
	if !found {
		return nil
	}
	return row
}

func TestListGivesEveryUserOnce(t *testing.T) {
	t.Parallel()
	p := startHealthy(t)
	if a := p.ask("GET /users", ""); a.body != "[]\n" || a.header.Get("Link") != "" {
		t.Errorf("empty table: %s, Link %q", a.body, a.header.Get("Link"))
	}
	created := map[string]int{}
	for len(created) < 120 {
		created[decode[userJSON](t, p.ask("POST /users", aBody), 201).ID] = 1
	}
	for query, limit := range map[string]int{"": 10, "?limit=7": 7, "?limit=40": 40, "?limit=100": 100, "?limit=101": 100, "?limit=99999999999999999999": 100, "?limit=1": 1} {
		t.Run("query "+query, func(t *testing.T) {
			if times := walkList(t, p, "/users"+query, limit); !maps.Equal(times, created) {
				t.Errorf("how often each user came: %v, want each of %d once", times, len(created))
			}
		})
	}
}

// walkList follows the Links and returns how often each user came.
func walkList(t *testing.T, p *process, target string, limit int) map[string]int {
	t.Helper()
	times := map[string]int{}
	next := regexp.MustCompile(fmt.Sprintf(`^<(/users\?limit=%d&page_state=[A-Za-z0-9_-]+)>; rel="next"$`, limit))
	for {
		a := p.ask("GET "+target, "")
		users := decode[[]userJSON](t, a, 200)
		for _, u := range users {
			times[u.ID]++
		}
		link := a.header.Get("Link")
		if link == "" {
			return times
		}
		match := next.FindStringSubmatch(link)
		if match == nil || len(users) != limit {
			t.Fatalf("%d users and Link %s, want a limit of %d", len(users), link, limit)
		}
		target = match[1]
	}
}

// batchJSON is the answer of POST /users/batch as a client sees it.
type batchJSON struct {
	Count   int        `json:"count"`
	Created []userJSON `json:"created"`
}

// batchOf is the body of a batch of n users with a name and an email made by text.
func batchOf(n int, text func(i int) (name, email string)) string {
	elements := make([]string, n)
	for i := range elements {
		name, email := text(i)
		elements[i] = fmt.Sprintf(`{"name":%q,"email":%q,"age":%d}`, name, email, i)
	}
	return "[" + strings.Join(elements, ",") + "]"
}

func shortText(i int) (name, email string) {
	return fmt.Sprintf("Ada %d", i), fmt.Sprintf("ada%d@example.com", i)
}

// textOf returns a name of at most 100 characters, of four bytes each where
// they must be, and an email that have size bytes together.
func textOf(size int) (name, email string) {
	const domain = "@example.com"
	inEmail := min(size-1, maxEmail)
	inName := size - inEmail
	return strings.Repeat("𝔸", inName/4) + strings.Repeat("A", inName%4), strings.Repeat("e", inEmail-len(domain)) + domain
}

func TestBatchAnswersInTheOrderGiven(t *testing.T) {
	for _, n := range []int{1, maxBatch} {
		answer := decode[batchJSON](t, call(t, "POST /users/batch", batchOf(n, shortText)), 201)
		if answer.Count != n || len(answer.Created) != n {
			t.Fatalf("count = %d with %d users, want %d", answer.Count, len(answer.Created), n)
		}
		for i, u := range answer.Created {
			name, email := shortText(i)
			if u.Name != name || u.Email != email || u.Age != i {
				t.Errorf("created[%d] = %+v, want %s", i, u, name)
			}
			if got := decode[userJSON](t, call(t, "GET /users/"+u.ID, ""), 200); got != u {
				t.Errorf("GET answers %+v, the batch answered %+v", got, u)
			}
		}
	}
}

// element moves an error to an element of a batch.
func element(i int, err string) string {
	return strings.Replace(err, `"pointer":"`, fmt.Sprintf(`"pointer":"/%d`, i), 1)
}

const notBatch = `{"pointer":"","detail":"must be an array of 1 to 100 users"}`

func TestBatchThatIsRefusedWritesNothing(t *testing.T) {
	atLimits := func(int) (name, email string) { return textOf(4*maxName + maxEmail) }
	number, size := fill(maxBatchBytes + 1)
	tooMany := func(bytes int) string {
		return fmt.Sprintf("The users of a batch may have %d bytes in all, these have %d (%d a user besides its texts); send them in several", maxBatchBytes, bytes, userOverhead)
	}
	tests := []struct {
		name, body   string
		status       int
		detail, errs string
	}{
		{"the last of 100 is invalid", strings.Replace(batchOf(100, shortText), `"age":99`, `"age":151`, 1), 422, notValid, element(99, ageOutside)},
		{"some are invalid", `[` + aBody + `,null,{"name":"Ada","email":"x","age":151},[],{}]`, 422, notValid, all(
			element(1, notObject), element(2, emailWrong), element(2, ageOutside), element(3, notObject), element(4, noName), element(4, noEmail), element(4, noAge))},
		{"none", `[]`, 422, notValid, notBatch},
		{"101", batchOf(101, shortText), 422, notValid, notBatch},
		{"an object", aBody, 422, notValid, notBatch},
		{"null", `null`, 422, notValid, notBatch},
		{"100 at the limits of their fields", batchOf(100, atLimits), 413, tooMany(100 * (userOverhead + 4*maxName + maxEmail)), ""},
		{"one byte too many", batchOf(number, size), 413, tooMany(maxBatchBytes + 1), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := counters.queries.Load()
			wantProblem(t, call(t, "POST /users/batch", tt.body), tt.status, tt.detail, tt.errs)
			if sent := counters.queries.Load() - before; sent != 0 {
				t.Errorf("%d requests to Cassandra, want none", sent)
			}
		})
	}
}

// fill returns how many of the largest users fill a batch of size bytes, and
// their text; the last one has what is left.
func fill(size int) (n int, text func(i int) (name, email string)) {
	const largest = 4*maxName + maxEmail
	n = (size + userOverhead + largest - 1) / (userOverhead + largest)
	return n, func(i int) (name, email string) {
		if i == n-1 {
			return textOf(size - n*userOverhead - (n-1)*largest)
		}
		return textOf(largest)
	}
}

// Cassandra counts sizes in its own way: what is allowed must be less than what
// it refuses, whatever the users look like.
func TestLargestBatchIsTakenByCassandra(t *testing.T) {
	few, largest := fill(maxBatchBytes)
	tests := []struct {
		name string
		n    int
		text func(i int) (name, email string)
	}{
		{"as few users as can be", few, largest},
		{"100 users", maxBatch, func(int) (string, string) { return textOf(maxBatchBytes/maxBatch - userOverhead) }},
		{"small ones and large ones", maxBatch, func(i int) (string, string) { return textOf(32 + i%2*2*(maxBatchBytes/maxBatch-userOverhead-32)) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			size := 0
			for i := range tt.n {
				name, email := tt.text(i)
				size += user{Name: name, Email: email}.bytes()
			}
			if size != maxBatchBytes {
				t.Fatalf("the batch has %d bytes, want %d", size, maxBatchBytes)
			}
			answer := decode[batchJSON](t, call(t, "POST /users/batch", batchOf(tt.n, tt.text)), 201)
			if answer.Count != tt.n {
				t.Errorf("count = %d, want %d", answer.Count, tt.n)
			}
		})
	}
}

// Tests of stream.go.

// pageJSON is the answer of GET /users/stream/pages as a client sees it.
type pageJSON struct {
	Users     []userJSON `json:"users"`
	HasMore   bool       `json:"has_more"`
	PageState *string    `json:"page_state"`
}

// walkPages follows the page states from query on, with one fetch size after
// the other, and returns all users.
func walkPages(t testing.TB, query string, fetchSizes ...int) (all []userJSON) {
	t.Helper()
	for i := 0; ; i++ {
		size := fetchSizes[i%len(fetchSizes)]
		a := call(t, fmt.Sprintf("GET /users/stream/pages?%s&fetch_size=%d", query, size), "")
		p := decode[pageJSON](t, a, 200)
		if len(p.Users) > size || p.Users == nil || p.HasMore != (p.PageState != nil) {
			t.Fatalf("%d users at fetch_size %d, has_more %t, page_state %v", len(p.Users), size, p.HasMore, p.PageState)
		}
		if all = append(all, p.Users...); !p.HasMore {
			if link := a.header.Get("Link"); link != "" {
				t.Errorf("Link = %q at the end", link)
			}
			return all
		}
		query = "page_state=" + *p.PageState
		if link, want := a.header.Get("Link"), fmt.Sprintf(`</users/stream/pages?fetch_size=%d&%s>; rel="next"`, size, query); link != want {
			t.Errorf("Link = %q, want %q", link, want)
		}
	}
}

// stream returns all users of GET /users/stream.
func stream(t testing.TB, query string) []userJSON {
	t.Helper()
	return decode[[]userJSON](t, call(t, "GET /users/stream?"+query, ""), 200)
}

// wantCrowd fails unless the users are those of the crowd at least minAge old,
// each once.
func wantCrowd(t testing.TB, users []userJSON, minAge int) {
	t.Helper()
	seen := map[string]bool{}
	for _, u := range users {
		if age, known := crowd.ages[u.ID]; !known || age != u.Age || age < minAge || seen[u.ID] {
			t.Fatalf("%+v: known %t, of age %d, at least %d wanted, seen before %t", u, known, age, minAge, seen[u.ID])
		}
		seen[u.ID] = true
	}
	want := 0
	for _, age := range crowd.ages {
		if age >= minAge {
			want++
		}
	}
	if len(users) != want {
		t.Errorf("%d users, want %d", len(users), want)
	}
}

func TestEveryUserComesOnce(t *testing.T) {
	useCrowd(t)
	t.Run("stream", func(t *testing.T) { wantCrowd(t, stream(t, ""), 0) })
	t.Run("pages of changing sizes", func(t *testing.T) {
		wantCrowd(t, walkPages(t, "", 1000, 1, 999, 70, 5000), 0)
	})
	for _, age := range []int{1, 90, 99, 150} {
		t.Run(fmt.Sprintf("of age %d and older", age), func(t *testing.T) {
			wantCrowd(t, stream(t, fmt.Sprintf("fetch_size=500&age_filter=%d", age)), age)
			wantCrowd(t, walkPages(t, fmt.Sprintf("age_filter=%d", age), 1000, 100), age)
		})
	}
}

func TestNDJSONEqualsTheArray(t *testing.T) {
	useCrowd(t)
	for _, query := range []string{"", "?age_filter=150", "?limit=1"} {
		array := call(t, "GET /users/stream"+query, "")
		lines := call(t, "GET /users/stream"+query, "", "Accept: application/x-ndjson")
		want := strings.ReplaceAll(strings.Trim(array.body, "[]\n"), "},{", "}\n{") + "\n"
		if want == "\n" {
			want = ""
		}
		if lines.body != want {
			t.Errorf("%s: NDJSON of %d bytes differs from the array of %d bytes", query, len(lines.body), len(array.body))
		}
		if got := lines.header.Get("Content-Type") + array.header.Get("Content-Type"); got != ndjson+"application/json" {
			t.Errorf("%s: types %s", query, got)
		}
		if lines.header.Get("Vary") != "Accept" || array.header.Get("Vary") != "Accept" {
			t.Errorf("%s: without Vary: Accept", query)
		}
	}
}

func TestLimitIsExact(t *testing.T) {
	useCrowd(t)
	tests := []struct{ limit, fetchSize, minAge, want int }{
		{1, 1000, 0, 1},
		{1, 1, 0, 1},
		{999, 1000, 0, 999},
		{1000, 1000, 0, 1000},
		{2000, 1000, 0, 2000},
		{2001, 1000, 0, 2001},
		{20_000, 5000, 0, 12_000},
		{500, 100, 50, 500},
		{7, 3, 90, 7},
		{1200, 100, 90, 1200},
		{5000, 100, 99, 120},
	}
	for _, tt := range tests {
		query := fmt.Sprintf("limit=%d&age_filter=%d", tt.limit, tt.minAge)
		t.Run(fmt.Sprintf("%s&fetch_size=%d", query, tt.fetchSize), func(t *testing.T) {
			streamed := stream(t, fmt.Sprintf("%s&fetch_size=%d", query, tt.fetchSize))
			walked := walkPages(t, query, tt.fetchSize)
			if len(streamed) != tt.want || !slices.Equal(streamed, walked) {
				t.Errorf("%d users streamed, %d walked, want the same %d", len(streamed), len(walked), tt.want)
			}
		})
	}
}

const crowdPage = 250_000 // bytes, less than 1000 users of the crowd take in JSON, more than from Cassandra

func TestFirstUsersComeAfterOnePage(t *testing.T) {
	useCrowd(t)
	p, proxy := startBehindProxy(t, "CASSANDRA_KEYSPACE="+crowd.keyspace)
	proxy.holdAfter(crowdPage)
	answer, err := http.Get(p.url + "/users/stream?fetch_size=1000&limit=11000")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	users := json.NewDecoder(answer.Body)
	users.Token()
	for range 1000 { // would wait for ever if this took the second page
		if err := users.Decode(new(userJSON)); err != nil {
			t.Fatal(err)
		}
	}
	proxy.holdAfter(math.MaxInt)
	rest := 0
	for ; users.More(); rest++ {
		if err := users.Decode(new(userJSON)); err != nil {
			t.Fatal(err)
		}
	}
	if rest != 10_000 {
		t.Errorf("%d users after the first page, want 10000", rest)
	}
}

// streamByCurl starts a real curl that streams into a file, and returns once
// the first page is there.
func streamByCurl(t *testing.T, url string, args ...string) (curl *exec.Cmd, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "users")
	curl = exec.Command("curl", append(args, "--silent", "--no-buffer", "--output", file, url)...)
	if err := curl.Start(); err != nil {
		t.Fatal(err)
	}
	arrived := func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() >= crowdPage
	}
	if !waitUntil(arrived, 15*time.Second) {
		curl.Process.Kill()
		t.Fatal("no first page within 15 s")
	}
	return curl, file
}

// wantCut fails unless curl saw that its stream was cut, and NDJSON ends in a
// problem.
func wantCut(t *testing.T, curl *exec.Cmd, file string, isNDJSON bool) {
	t.Helper()
	curl.Wait()
	if code := curl.ProcessState.ExitCode(); code != 18 {
		t.Errorf("curl exits %d, want 18: partial file", code)
	}
	body, _ := os.ReadFile(file)
	if !isNDJSON {
		if json.Valid(body) {
			t.Errorf("what came of the array is valid JSON, with %d users", strings.Count(string(body), `"id"`))
		}
		return
	}
	lines := strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")
	var p problem
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &p); err != nil || p.Status != 503 || p.RequestID == "" {
		t.Errorf("the last line is %s, want a problem with status 503", lines[len(lines)-1])
	}
}

func TestCutStreamIsSeenAsCut(t *testing.T) {
	useCrowd(t)
	p, proxy := startBehindProxy(t, "CASSANDRA_KEYSPACE="+crowd.keyspace)
	for _, accept := range []string{"application/json", ndjson} {
		proxy.holdAfter(2 * crowdPage)
		curl, file := streamByCurl(t, p.url+"/users/stream?fetch_size=1000", "--header", "Accept: "+accept)
		waitUntil(proxy.isHolding, 5*time.Second) // between two pages a cut harms nobody
		proxy.cut()
		wantCut(t, curl, file, accept == ndjson)
		p.awaitHealthy(t, 15*time.Second)
		if users := decode[[]userJSON](t, p.ask("GET /users/stream", ""), 200); len(users) != len(crowd.ages) {
			t.Errorf("%d users after the cut, want %d", len(users), len(crowd.ages))
		}
	}
	if n := p.metrics(t).RequestsByRoute["GET /users/stream"]["aborted"]; n != 2 {
		t.Errorf("aborted streams = %d, want 2", n)
	}
}

func TestStreamThatFailsBeforeItsFirstPage(t *testing.T) {
	useCrowd(t)
	p, proxy := startBehindProxy(t, "CASSANDRA_KEYSPACE="+crowd.keyspace)
	tests := []struct {
		fail   func()
		status int
		detail string
	}{
		{func() { proxy.swallow(true) }, 504, tooLate},
		{func() { proxy.listener.Close(); proxy.cut() }, 503, notAvailable},
	}
	for _, tt := range tests {
		tt.fail()
		for _, target := range []string{"/users/stream", "/users/stream?age_filter=50", "/users/stream/pages"} {
			wantProblem(t, p.ask("GET "+target, "", "X-Request-Timeout: 0.5", "Accept: "+ndjson), tt.status, tt.detail)
		}
	}
}

// The later the part, the sooner it has its pages.
func TestPartsAreReadSideBySideInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var open, fetched atomic.Int64
		pages := make([]gocql.Iter, 20) // two for each of ten parts
		parts := func(yield func(nextPage) bool) {
			for i := 0; i < len(pages); i += 2 {
				next := i
				if !yield(func(context.Context) (page, error) {
					time.Sleep(time.Duration(len(pages)-i) * time.Second)
					fetched.Add(1)
					next++
					return page{rows: &pages[next-1], more: next < i+2}, nil
				}) {
					return
				}
			}
		}
		i := 0
		for got, err := range pagesAhead(t.Context(), &open, parts) {
			if got != &pages[i] || err != nil {
				t.Fatalf("page %d: %p, %v, want %p", i, got, err, &pages[i])
			}
			i++
			time.Sleep(time.Hour)
			if n := fetched.Load(); n > int64(i+sideBySide) {
				t.Errorf("%d pages fetched while the reader has taken %d, want at most %d ahead", n, i, sideBySide)
			}
			if i == 15 {
				break
			}
		}
		if open.Load() != 0 { // and no goroutine is left, or synctest would fail
			t.Errorf("%d walks are open", open.Load())
		}
	})
}

// Pages that were fetched before the end of a context can still be good: the
// walk must not look whole because of them.
func TestNoWalkLooksWholeAfterTheEndOfItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := func(context.Context) (page, error) { return page{rows: new(gocql.Iter)}, nil }
		for ends := range 6 { // after so many pages of five
			ctx, cancel := context.WithCancel(t.Context())
			var open atomic.Int64
			var last error
			pages := 0
			if ends == 0 {
				cancel()
			}
			for _, err := range pagesAhead(ctx, &open, slices.Values([]nextPage{one, one, one, one, one})) {
				if last = err; err != nil {
					break
				}
				if pages++; pages == ends {
					synctest.Wait() // what is fetched ahead is there
					cancel()
				}
			}
			if want := (pages < 5); (last == context.Canceled) != want {
				t.Errorf("cancelled after %d pages of 5: %d came, error = %v", ends, pages, last)
			}
			cancel()
		}
	})
}

func TestStreamPastItsDeadlineIsNotWhole(t *testing.T) {
	for _, query := range []string{"", "?limit=5", "?age_filter=1"} {
		for _, accept := range []string{"application/json", ndjson} {
			a := call(t, "GET /users/stream"+query, "", "Accept: "+accept, "X-Request-Timeout: 0.000000001")
			wantProblem(t, a, 504, "timeout: the deadline passed before the answer was there")
		}
	}
}

func TestFailedPartEndsTheWalkInItsPlace(t *testing.T) {
	boom := errors.New("boom")
	var got []error
	var open atomic.Int64
	parts := slices.Values([]nextPage{
		func(context.Context) (page, error) { return page{rows: new(gocql.Iter)}, nil },
		func(context.Context) (page, error) { return page{}, boom },
		func(context.Context) (page, error) { return page{rows: new(gocql.Iter)}, nil },
	})
	for _, err := range pagesAhead(t.Context(), &open, parts) {
		got = append(got, err)
	}
	if want := []error{nil, boom}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestStreamsLeaveNothingBehind(t *testing.T) {
	useCrowd(t)
	url := serve(t, service)
	goroutines := runtime.NumGoroutine() + 5 // the driver's own come and go
	checkGone := func(t *testing.T) {
		gone := func() bool {
			return counters.streams.Load() == 0 && counters.scans.Load() == 0 && counters.inFlight.Load() == 0 && runtime.NumGoroutine() <= goroutines
		}
		if !waitUntil(gone, 15*time.Second) {
			t.Errorf("%d streams, %d scans, %d requests, %d goroutines, want at most %d", counters.streams.Load(), counters.scans.Load(), counters.inFlight.Load(), runtime.NumGoroutine(), goroutines)
		}
	}
	t.Run("cancelled half way", func(t *testing.T) {
		for i := range 1000 {
			openReader(t, url, fmt.Sprintf("/users/stream?fetch_size=%d", 1+i), 1500).Close()
		}
		checkGone(t)
	})
	t.Run("readers that stop reading", func(t *testing.T) {
		var readers []net.Conn
		for range maxStreams {
			readers = append(readers, openReader(t, url, "/users/stream", 1))
		}
		if counters.streams.Load() != maxStreams || counters.scans.Load() != maxStreams {
			t.Errorf("%d streams and %d scans, want %d", counters.streams.Load(), counters.scans.Load(), maxStreams)
		}
		wantProblem(t, call(t, "GET /users/stream", ""), 503, "Too many streams at once; try again in a second")
		for _, reader := range readers {
			reader.Close()
		}
		checkGone(t)
	})
}

// firstToken returns the page_state after the first page of the query.
func firstToken(t testing.TB, query string) string {
	t.Helper()
	p := decode[pageJSON](t, call(t, "GET /users/stream/pages?"+query, ""), 200)
	if p.PageState == nil {
		t.Fatalf("no page_state after %s", query)
	}
	return *p.PageState
}

// wantStartAgain fails unless the answer says that page_state is not right.
func wantStartAgain(t testing.TB, what string, a answer) {
	t.Helper()
	var p problem
	json.Unmarshal([]byte(a.body), &p)
	if a.status != 422 || len(p.Errors) != 1 || p.Errors[0].Parameter != "page_state" || !strings.HasSuffix(p.Errors[0].Detail, "; start again without page_state") {
		t.Errorf("%s: %s", what, a)
	}
}

func TestDamagedPageTokens(t *testing.T) {
	useCrowd(t)
	const pages = "/users/stream/pages?page_state="
	token := firstToken(t, "fetch_size=10&age_filter=30")
	damaged := map[string]string{
		"doubled":          token + token,
		"with a line feed": token[:20] + "\n" + token[20:],
		"with CR and LF":   token + "\r\n",
		"padded":           token + "=",
		"with a space":     " " + token,
		"empty":            "",
		"not base64":       "%%%",
	}
	for i := range token {
		damaged[fmt.Sprintf("cut before byte %d", i)] = token[:i]
		damaged[fmt.Sprintf("without byte %d", i)] = token[:i] + token[i+1:]
		damaged[fmt.Sprintf("byte %d twice", i)] = token[:i+1] + token[i:]
		for _, c := range []byte{'A', '_', token[i] ^ 1, token[i] ^ 32, 0, 255} {
			if c != token[i] {
				damaged[fmt.Sprintf("byte %d changed to %q", i, c)] = token[:i] + string([]byte{c}) + token[i+1:]
			}
		}
	}
	for what, text := range damaged {
		wantStartAgain(t, what, call(t, "GET "+pages+url.QueryEscape(text), ""))
	}
	list := call(t, "GET /users", "").header.Get("Link")
	_, list, _ = strings.Cut(list, "page_state=")
	list, _, _ = strings.Cut(list, ">")
	wantStartAgain(t, "another age_filter", call(t, "GET "+pages+token+"&age_filter=31", ""))
	wantStartAgain(t, "age_filter=0", call(t, "GET "+pages+token+"&age_filter=0", ""))
	wantStartAgain(t, "of GET /users", call(t, "GET "+pages+list, ""))
	wantStartAgain(t, "at GET /users", call(t, "GET /users?page_state="+token, ""))
}

func TestPageTokenKeepsItsQuery(t *testing.T) {
	useCrowd(t)
	want := stream(t, "age_filter=30&limit=15")
	token := firstToken(t, "fetch_size=10&age_filter=30&limit=15")
	tests := []struct{ name, query string }{
		{"without age_filter", ""},
		{"with an equal one", "&age_filter=30"},
		{"with a limit, which is not looked at", "&limit=3"},
		{"with a bad limit", "&limit=x"},
		{"with another fetch_size", "&fetch_size=5000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := decode[pageJSON](t, call(t, "GET /users/stream/pages?page_state="+token+tt.query, ""), 200)
			if p.HasMore || !slices.Equal(p.Users, want[10:]) {
				t.Errorf("has_more %t, users %+v, want %+v", p.HasMore, p.Users, want[10:])
			}
		})
	}
	t.Run("at another instance", func(t *testing.T) {
		other := startHealthy(t, "CASSANDRA_KEYSPACE="+crowd.keyspace)
		p := decode[pageJSON](t, other.ask("GET /users/stream/pages?page_state="+token, ""), 200)
		if p.HasMore || !slices.Equal(p.Users, want[10:]) {
			t.Errorf("has_more %t, users %+v, want %+v", p.HasMore, p.Users, want[10:])
		}
	})
}

// A checksum is no signature: whoever reads the code can make a token. It may
// then lead to other rows, but never to a 500.
func TestForgedPageTokens(t *testing.T) {
	useCrowd(t)
	real := parseToken(firstToken(t, "fetch_size=10"), pagesEndpoint)
	tests := []struct {
		name   string
		forge  func(s *scan)
		status int
	}{
		{"as it was", func(*scan) {}, 200},
		{"no paging state", func(s *scan) { s.state = nil }, 200},
		{"a paging state of garbage", func(s *scan) { s.state = []byte("garbage") }, 422},
		{"a paging state cut short", func(s *scan) { s.state = s.state[:len(s.state)-1] }, 422},
		{"a paging state of one byte", func(s *scan) { s.state = []byte{255} }, 422},
		{"a paging state of 8 kB", func(s *scan) { s.state = bytes.Repeat([]byte{127}, 8<<10) }, 422},
		{"a place outside its range", func(s *scan) { s.after, s.upto = math.MaxInt64-1, math.MaxInt64 }, 200},
		{"a filter for a place without", func(s *scan) { s.minAge = 50 }, 200},
		{"the end before the start", func(s *scan) { s.after, s.upto = 1, 0 }, 422},
		{"an empty range", func(s *scan) { s.after, s.upto = 7, 7 }, 422},
		{"the end of the ring", func(s *scan) { s.after, s.upto = math.MaxInt64, math.MinInt64 }, 422},
		{"no rows left", func(s *scan) { s.left = 0 }, 422},
		{"fewer rows left than none", func(s *scan) { s.left = math.MinInt }, 422},
		{"an age of 151", func(s *scan) { s.minAge = 151 }, 422},
		{"a negative age", func(s *scan) { s.minAge = math.MinInt }, 422},
		{"a huge age", func(s *scan) { s.minAge = math.MaxInt }, 422},
	}
	for _, tt := range tests {
		s := *real
		tt.forge(&s)
		a := call(t, "GET /users/stream/pages?fetch_size=10&page_state="+s.token(pagesEndpoint), "")
		wantStatus(t, a, tt.status)
		if a.status == 422 {
			wantStartAgain(t, tt.name, a)
		}
	}
}

func TestForgedPagingStates(t *testing.T) {
	useCrowd(t)
	real := parseToken(firstToken(t, "fetch_size=10"), pagesEndpoint)
	for i := range 300 {
		s := *real
		s.state = bytes.Clone(real.state)
		if i == 0 { // a number of rows beyond 32 bits, which Cassandra takes for an error of its own
			copy(s.state[len(s.state)-6:], "\x58\xf3")
		}
		for range min(i, 1+rand.IntN(3)) { // a few bytes at random
			s.state[rand.IntN(len(s.state))] = byte(rand.IntN(256))
		}
		a := call(t, "GET /users/stream/pages?fetch_size=10&page_state="+s.token(pagesEndpoint), "")
		if a.status != 200 && a.status != 422 {
			t.Errorf("the paging state %x: %s", s.state, a)
		}
	}
}

// FuzzPageToken gives parseToken bytes under a checksum that is right: it must
// neither panic nor return a scan that can't go on.
func FuzzPageToken(f *testing.F) {
	for _, s := range []*scan{newScan(noAgeFilter, unlimited), newScan(30, 7), {minAge: 150, left: 1, after: -1, upto: 1, state: []byte("state")}} {
		b, _ := base64.RawURLEncoding.DecodeString(s.token(pagesEndpoint))
		f.Add(b[:len(b)-4])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
		s := parseToken(base64.RawURLEncoding.EncodeToString(b), pagesEndpoint)
		if s == nil {
			return
		}
		if end := s.nextBound(); !s.more() || s.after >= s.upto || end <= s.after {
			t.Errorf("%+v ends at %d", s, end)
		}
		if again := parseToken(s.token(pagesEndpoint), pagesEndpoint); again == nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%+v becomes %+v", s, again)
		}
	})
}

// FuzzUserRow holds the encoder of rows against encoding/json.
func FuzzUserRow(f *testing.F) {
	f.Add([]byte("0123456789abcdef"), "Ada", "ada@example.com", 36, int64(1767323045678), int64(0))
	f.Add([]byte{}, "\"\\/\b\f\n\r\t\x00\x1f\x7f<>&\u2028\u2029é漢𝔸\ufffd", "\xff\xfe", -1, int64(-1), int64(253402300799999))
	f.Add([]byte{255}, "\xe2\x80", "…", 150, int64(951782400000), int64(4107542399999))
	f.Fuzz(func(t *testing.T, id []byte, name, email string, age int, created, updated int64) {
		const yearZero, yearTenThousand = -62167219200000, 253402300800000 // RFC 3339 has four digits
		if min(created, updated) < yearZero || max(created, updated) >= yearTenThousand {
			t.Skip()
		}
		row := userRow{name: []byte(name), email: []byte(email), age: age, created: created, updated: updated}
		copy(row.id[:], id)
		var want bytes.Buffer
		enc := json.NewEncoder(&want)
		enc.SetEscapeHTML(false)
		enc.Encode(user{ID: uuid.UUID(row.id), Name: name, Email: email, Age: age, CreatedAt: timestamp(created), UpdatedAt: timestamp(updated)})
		if got := string(row.appendJSON(nil)) + "\n"; got != want.String() {
			t.Errorf("appendJSON = %s, encoding/json has %s", got, want.String())
		}
	})
}

// Tests of safety.go.

func TestSelfTests(t *testing.T) {
	row := func(n, age int) string { return fmt.Sprintf(`{"name":"user %d","age":%d}`, n, age) }
	stream := func(i, age int) string {
		var rows []string
		for n := i; n < 30; n += 3 {
			rows = append(rows, row(n, age))
		}
		return fmt.Sprintf(`{"age":%d,"count":10,"users":[%s]}`, age, strings.Join(rows, ","))
	}
	session, err := currentSession()
	if err != nil {
		t.Fatal(err)
	}
	const caught = `non_existent_table_xyz: table non_existent_table_xyz does not exist`
	tests := []struct{ request, want string }{
		{"POST query_error", `{"test":"query_error","error_caught":"running SELECT name, age FROM ` + caught + `","session_unchanged":true,"session_open":true,"session_still_works":true,MASKED}`},
		{"POST streaming_error", `{"test":"streaming_error","streaming_error_caught":true,"error_message":"reading a page of the scratch table: ` + caught[len("non_existent_table_xyz: "):] + `","session_unchanged":true,"session_open":true,"session_still_streams":true,"stream_completed":true,"rows_after_error":20}`},
		{"POST concurrent_streams", `{"test":"concurrent_streams","streams_completed":3,"all_streams_independent":true,"results":[` + stream(0, 20) + `,` + stream(1, 30) + `,` + stream(2, 40) + `],"session_still_open":true}`},
		{"POST nested_contexts", `{"test":"nested_contexts","events":["cluster_opened","session_opened","stream_opened","stream_closed","session_works_after_stream:5","session_closing","session_closed","cluster_works_after_session:True","cluster_closing","cluster_closed"],"correct_order":true,"row_count":5,"main_session_unaffected":true}`},
		{"POST cancellation", `{"test":"cancellation","rows_processed_before_cancel":5,"was_cancelled":true,"error_type":"context canceled","cleaned_up":true,"session_still_works":true,"session_open":true,"new_stream_worked":true,"total_rows":50}`},
		{"GET status", fmt.Sprintf(`{"session_open":true,"session_id":"%d","cluster_open":true,MASKED,"keyspace":%q}`, session.number, global.cluster.keyspace)},
	}
	mask := regexp.MustCompile(`"cassandra_version":"\d[^"]*"|"cluster_id":"[^"]+"`)
	for _, tt := range tests {
		t.Run(tt.request, func(t *testing.T) {
			a := call(t, strings.Replace(tt.request, " ", " /context_manager_safety/", 1), "")
			got := mask.ReplaceAllString(a.body, "MASKED")
			if a.status != 200 || got != tt.want+"\n" {
				t.Errorf("status = %d, body\n%s, want\n%s", a.status, got, tt.want)
			}
		})
	}
}

// falseVerdict finds a member of a self-test's answer that should be true.
var falseVerdict = regexp.MustCompile(`"\w+":false`)

func TestSelfTestsAtOnceHarmNobody(t *testing.T) {
	aUser(t)
	before := call(t, "GET /users/stream", "").body
	state, goroutines, open := observeSession(), runtime.NumGoroutine(), connections.open.Load()
	ctx, stopLoad := context.WithCancel(t.Context())
	var load, running sync.WaitGroup
	for range 2 {
		load.Go(func() {
			for ctx.Err() == nil {
				if a := call(t, "GET /users/stream", ""); a.status != 200 || a.body != before {
					t.Errorf("beside self-tests: %s; want %s", a, before)
				}
			}
		})
	}
	for i := range 50 {
		running.Go(func() {
			name := selfTests[i%len(selfTests)]
			if a := call(t, "POST /context_manager_safety/"+name, ""); a.status != 200 || falseVerdict.MatchString(a.body) {
				t.Error(a)
			}
		})
	}
	running.Wait()
	stopLoad()
	load.Wait()
	if after := observeSession(); !after.sameAs(state) {
		t.Errorf("session = %+v, want %+v", after, state)
	}
	back := func() bool { return runtime.NumGoroutine() <= goroutines && connections.open.Load() == open }
	if !waitUntil(back, 10*time.Second) {
		t.Errorf("goroutines = %d, connections = %d, want %d and %d", runtime.NumGoroutine(), connections.open.Load(), goroutines, open)
	}
}

func TestSessionVerdictSeesASwappedOrClosedSession(t *testing.T) {
	mine, err := currentSession()
	if err != nil {
		t.Fatal(err)
	}
	defer global.session.Store(mine)
	other := openKeyspace(t, global.cluster)
	before := observeSession()
	if !observeSession().sameAs(before) {
		t.Error("an untouched session counts as changed")
	}
	global.session.Store(&session{Session: other, number: mine.number + 1})
	swapped := observeSession()
	if !swapped.open || swapped.sameAs(before) {
		t.Errorf("swapped: %+v counts as %+v", swapped, before)
	}
	other.Close()
	if closed := observeSession(); closed.open || closed.sameAs(swapped) {
		t.Errorf("closed: %+v counts as %+v", closed, swapped)
	}
	wantStatus(t, call(t, "POST /context_manager_safety/query_error", ""), 503)
	global.session.Store(nil)
	if none := observeSession(); none.open || none.sameAs(none) {
		t.Errorf("no session: %+v counts as open", none)
	}
}

func TestStreamsVerdict(t *testing.T) {
	start := time.Now()
	sound := func() []observedStream {
		streams := make([]observedStream, 3)
		for i := range streams {
			age := 20 + 10*i
			streams[i] = observedStream{Age: age, Users: slices.Repeat([]scratchRow{{Age: age}}, 10), firstPage: start.Add(time.Duration(i) * time.Second), ended: start.Add(time.Minute)}
		}
		return streams
	}
	tests := []struct {
		name   string
		damage func(s []observedStream)
		want   bool
	}{
		{"sound", func([]observedStream) {}, true},
		{"a foreign row", func(s []observedStream) { s[1].Users[9].Age = 20 }, false},
		{"a row missing", func(s []observedStream) { s[2].Users = s[2].Users[:9] }, false},
		{"a row too many", func(s []observedStream) { s[0].Users = append(s[0].Users, s[0].Users[0]) }, false},
		{"one ended before the last began", func(s []observedStream) { s[0].ended = start.Add(time.Second) }, false},
		{"one never began", func(s []observedStream) { s[1] = observedStream{Age: 30} }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			streams := sound()
			tt.damage(streams)
			if got := areIndependent(streams); got != tt.want {
				t.Errorf("areIndependent = %t, want %t", got, tt.want)
			}
		})
	}
	if n := completed([]error{nil, gocql.ErrSessionClosed, nil}); n != 2 {
		t.Errorf("completed = %d, want 2", n)
	}
}

func TestOrderVerdict(t *testing.T) {
	swap := func(i, j int) []string {
		events := slices.Clone(nestedOrder)
		events[i], events[j] = events[j], events[i]
		return events
	}
	tests := []struct {
		name   string
		events []string
		want   bool
	}{
		{"sound", slices.Clone(nestedOrder), true},
		{"the session closed before its stream", swap(3, 6), false},
		{"the cluster closed before its session", swap(6, 9), false},
		{"the cluster never closed", nestedOrder[:9], false},
		{"the session lost a row", append(append(slices.Clone(nestedOrder[:4]), "session_works_after_stream:4"), nestedOrder[5:]...), false},
		{"nothing happened", nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := areInOrder(tt.events); got != tt.want {
				t.Errorf("areInOrder(%v) = %t, want %t", tt.events, got, tt.want)
			}
		})
	}
}

func TestCancellationVerdicts(t *testing.T) {
	tests := []struct {
		name      string
		err       error
		processed int
		want      bool
	}{
		{"cancelled halfway", failed(read, context.Canceled, "reading"), 5, true},
		{"not at all", nil, 5, false},
		{"at its end", context.Canceled, 50, false},
		{"failed otherwise", gocql.ErrNoConnections, 5, false},
		{"out of time", context.DeadlineExceeded, 5, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := wasCancelled(tt.err, tt.processed, 50); got != tt.want {
				t.Errorf("wasCancelled = %t, want %t", got, tt.want)
			}
		})
	}
	s, err := newScratch(t.Context(), slices.Repeat([]int{20}, 20))
	if err != nil {
		t.Fatal(err)
	}
	next, stop := iter.Pull2(pagesAhead(t.Context(), &s.open, alone(s.pages(selectScratch, s.run))))
	defer stop()
	if _, err, _ := next(); err != nil || s.allEnded() {
		t.Errorf("with an iteration left open: error %v, allEnded = %t, want false", err, s.allEnded())
	}
	stop()
	if !s.allEnded() {
		t.Error("with the iteration stopped: allEnded = false")
	}
}

func TestSelfTestWithoutCassandraIsNoVerdict(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want int
	}{
		{"no connection", failed(read, gocql.ErrNoConnections, "reading"), 503},
		{"out of time", failed(read, context.DeadlineExceeded, "reading"), 504},
		{"the session closed", failed(read, gocql.ErrSessionClosed, "reading"), 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := routed(1, func(w http.ResponseWriter, r *http.Request) error {
				return report(w, r, queryErrorReport{}, nil, tt.err)
			})
			wantStatus(t, callOn(t, h, "GET /test", ""), tt.want)
		})
	}
}

func TestSlowQueriesEndInTimeAndHoldUpNobody(t *testing.T) {
	p := startHealthy(t)
	median := func() time.Duration {
		times := make([]time.Duration, 100)
		for i := range times {
			a := p.ask("GET "+nobody, "")
			if times[i] = a.took; a.status != 404 {
				t.Fatalf("%s; want 404", a)
			}
		}
		slices.Sort(times)
		return times[50]
	}
	before := median()
	var slow sync.WaitGroup
	for range 100 {
		slow.Go(func() {
			a := p.ask("GET /slow_query", "", "X-Request-Timeout: 20")
			if a.status != 200 || !regexp.MustCompile(`^\{"message":"Slow query completed","duration":5\.\d+\}\n$`).MatchString(a.body) {
				t.Errorf("%s; want 200", a)
			}
		})
	}
	waitUntil(func() bool { return p.metrics(t).RequestsInFlight > 100 }, 3*time.Second)
	for _, path := range []string{"/slow_query", "/long_running_query"} {
		if a := p.ask("GET "+path, "", "X-Request-Timeout: 0.1"); a.status != 504 || !strings.Contains(a.body, "timeout") || a.took < 100*time.Millisecond || a.took > 300*time.Millisecond {
			t.Errorf("%s; want 504 after 0.1 s", a)
		}
	}
	if beside := median(); beside > 3*before+5*time.Millisecond {
		t.Errorf("a GET takes %s beside slow queries, %s without", beside, before)
	}
	slow.Wait()
}

// Tests of metrics.go.

// step is a request and what it makes the metrics count.
type step struct {
	request, body string
	headers       []string
	status        int
	pattern       string
	queries, errs int64
}

// steps are requests that Cassandra answers, after a first POST at location.
func steps(location string) []step {
	return []step{
		{"GET " + location, "", nil, 200, "GET /users/{id}", 1, 0},
		{"GET /users/" + uuid.NewString(), "", nil, 404, "GET /users/{id}", 1, 0},
		{"POST /users", "{}", nil, 422, "POST /users", 0, 0},
		{"POST /users/batch", batchOf(24, shortText), nil, 201, "POST /users/batch", 1, 0},
		{"GET /users/stream?fetch_size=10&limit=25", "", nil, 200, "GET /users/stream", 3, 0}, // 10, 10 and 5 users
		{"GET /users/stream/pages", "", nil, 200, "GET /users/stream/pages", 1, 0},
		{"GET /slow_query", "", []string{"X-Request-Timeout: 0.1"}, 504, "GET /slow_query", 0, 0},
		{"PUT " + location, aBody, nil, 200, "PUT /users/{id}", 2, 0},
		{"DELETE " + location, "", nil, 204, "DELETE /users/{id}", 1, 0},
		{"GET /nowhere", "", nil, 404, "none", 0, 0},
	}
}

func TestMetricsAreWhatHappened(t *testing.T) {
	p, proxy := startBehindProxy(t)
	before := p.metrics(t)
	want := map[string]map[string]int64{}
	queries, errs := before.TotalQueries, before.ErrorsCount
	expect := func(s step) {
		if want[s.pattern] == nil {
			want[s.pattern] = map[string]int64{}
		}
		want[s.pattern][strconv.Itoa(s.status)]++
		queries, errs = queries+s.queries, errs+s.errs
	}
	take := func(s step) (a answer) {
		a = p.ask(s.request, s.body, s.headers...)
		wantStatus(t, a, s.status)
		expect(s)
		return a
	}
	location := take(step{"POST /users", aBody, nil, 201, "POST /users", 1, 0}).header.Get("Location")
	for _, s := range steps(location) {
		take(s)
	}
	conn := dial(t, p.url)
	io.WriteString(conn, "GET /slow_query HTTP/1.1\r\nHost: localhost\r\n\r\n")
	waitUntil(func() bool { return p.metrics(t).RequestsInFlight == 2 }, 5*time.Second)
	conn.Close()
	expect(step{status: 499, pattern: "GET /slow_query"})
	proxy.swallow(true)
	take(step{"GET " + location, "", []string{"X-Request-Timeout: 0.2"}, 504, "GET /users/{id}", 1, 1})
	proxy.swallow(false)
	proxy.listener.Close()
	proxy.cut()
	take(step{"GET " + location, "", nil, 503, "GET /users/{id}", 1, 1})
	p.wantMetrics(t, want, queries, errs, before.RowsStreamed+25)
}

// wantMetrics waits until nothing is in flight and compares the counters; only
// the probes' own requests are left out.
func (p *process) wantMetrics(t *testing.T, byRoute map[string]map[string]int64, queries, errs, rows int64) {
	t.Helper()
	var m metrics
	if !waitUntil(func() bool { m = p.metrics(t); return m.RequestsInFlight == 1 }, 5*time.Second) {
		t.Errorf("requests in flight = %d, want 1", m.RequestsInFlight)
	}
	delete(m.RequestsByRoute, "GET /health")
	delete(m.RequestsByRoute, "GET /metrics")
	if !maps.EqualFunc(m.RequestsByRoute, byRoute, maps.Equal) {
		t.Errorf("requests by route = %v, want %v", m.RequestsByRoute, byRoute)
	}
	if m.TotalQueries != queries || m.ErrorsCount != errs || m.RowsStreamed != rows {
		t.Errorf("queries, errors, rows streamed = %d, %d, %d, want %d, %d, %d", m.TotalQueries, m.ErrorsCount, m.RowsStreamed, queries, errs, rows)
	}
	if q := m.QueryPerformance; q.P50 <= 0 || q.P95 < q.P50 || q.P99 < q.P95 || m.AverageQueryTimeMS <= 0 || m.QueriesPerSecond <= 0 {
		t.Errorf("query performance %+v, average %g, rate %g", q, m.AverageQueryTimeMS, m.QueriesPerSecond)
	}
	if m.StreamsActive != 0 || m.MemoryBytes < 1<<20 || m.MemoryBytes > 1<<30 || m.Goroutines < 5 || m.UptimeSeconds <= 0 {
		t.Errorf("metrics = %+v", m)
	}
}

func TestConnectionsAreCounted(t *testing.T) {
	listener := listen(t, anyPort)
	var dialer countingDialer
	conn, err := dialer.DialContext(t.Context(), "tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	counts := func() [3]int64 { return [3]int64{dialer.open.Load(), dialer.opened.Load(), dialer.failed.Load()} }
	if got, want := counts(), [3]int64{1, 1, 0}; got != want {
		t.Errorf("open, opened, failed = %v, want %v", got, want)
	}
	conn.Close()
	conn.Close() // the driver does so, too
	listener.Close()
	dialer.DialContext(t.Context(), "tcp", listener.Addr().String())
	if got, want := counts(), [3]int64{0, 1, 1}; got != want {
		t.Errorf("open, opened, failed = %v, want %v", got, want)
	}
}

func TestQueriesPerSecondLooksBackAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r rate
		start := time.Now()
		check := func(want float64) {
			t.Helper()
			if got := r.perSecond(start, time.Now()); got != want {
				t.Errorf("after %s: %g per second, want %g", time.Since(start), got, want)
			}
		}
		for range 10 {
			for range 6 {
				r.add(time.Now())
			}
			time.Sleep(time.Second)
		}
		check(6)
		time.Sleep(20 * time.Second)
		check(2)
		time.Sleep(29 * time.Second)
		check(60. / 59)
		time.Sleep(6 * time.Second) // the first six seconds are over a minute ago
		check(24. / 60)
		time.Sleep(time.Minute)
		check(0)
		r.add(time.Now())
		check(1. / 60)
	})
}

func TestQuantilesLieWithinTheirBucket(t *testing.T) {
	var h histogram
	if got := h.quantile(.5); got != 0 {
		t.Errorf("quantile of nothing = %g, want 0", got)
	}
	for i := range 100 {
		h.observe(time.Duration(i+1) * time.Millisecond)
	}
	for _, tt := range []struct{ q, low, high float64 }{{.5, 49, 51}, {.95, 94, 96}, {.99, 98, 100}} {
		if got := h.quantile(tt.q); got < tt.low || got > tt.high {
			t.Errorf("quantile %g = %g ms, want %g to %g", tt.q, got, tt.low, tt.high)
		}
	}
	h.observe(time.Hour)
	if got := h.quantile(1); got != 60_000 {
		t.Errorf("quantile 1 = %g ms, want the last bound", got)
	}
}

func TestPrometheusText(t *testing.T) {
	aUser(t)
	call(t, "GET /users/"+uuid.NewString(), "")
	for _, accept := range []string{"text/plain", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"} {
		if got := call(t, "GET /metrics", "", "Accept: "+accept).header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
			t.Errorf("Accept %s: Content-Type %s", accept, got)
		}
	}
	m := collect()
	var creations int64
	for _, n := range m.RequestsByRoute["POST /users"] {
		creations += n
	}
	samples := readPrometheus(t, m.prometheus())
	for name, want := range map[string]float64{
		"cassandra_queries_total":      float64(m.TotalQueries),
		"cassandra_query_errors_total": float64(m.ErrorsCount),
		"cassandra_connections_open":   float64(m.CassandraConnections.Open),
		"rows_streamed_total":          float64(m.RowsStreamed),
		"memory_bytes":                 float64(m.MemoryBytes),
		`http_requests_total{route="GET /users/{id}",status="404"}`:           float64(m.RequestsByRoute["GET /users/{id}"]["404"]),
		`http_request_duration_seconds_count{route="POST /users"}`:            float64(creations),
		`http_request_duration_seconds_bucket{route="POST /users",le="+Inf"}`: float64(creations),
		`cassandra_query_duration_seconds_bucket{le="+Inf"}`:                  samples["cassandra_query_duration_seconds_count{}"],
	} {
		if got, there := samples[name]; !there || got != want {
			t.Errorf("%s = %g, want %g", name, got, want)
		}
	}
}

// readPrometheus returns the samples by name and labels, each of which must come
// once and belong to a family with a TYPE.
func readPrometheus(t *testing.T, text []byte) map[string]float64 {
	t.Helper()
	samples, families := map[string]float64{}, map[string]bool{}
	sample := regexp.MustCompile(`^([a-z_]+?)(_bucket|_sum|_count)?(\{(?:[a-z]+="[^"]*",?)*\})? (\S+)$`)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if family, isType := strings.CutPrefix(line, "# TYPE "); isType {
			families[strings.Fields(family)[0]] = true
			continue
		}
		if strings.HasPrefix(line, "# HELP ") {
			continue
		}
		parts := sample.FindStringSubmatch(line)
		if parts == nil || !families[parts[1]] {
			t.Errorf("not a sample of a family: %s", line)
			continue
		}
		value, err := strconv.ParseFloat(parts[4], 64)
		name := parts[1] + parts[2] + parts[3]
		if _, twice := samples[name]; err != nil || twice {
			t.Errorf("wrong or repeated: %s", line)
		}
		samples[name] = value
	}
	return samples
}

func TestPerformanceFiguresAddUp(t *testing.T) {
	aUser(t)
	for _, mode := range []string{"async", "sync"} {
		p := decode[performance](t, call(t, "GET /performance/"+mode+"?requests=500", ""), 200)
		if p.Mode != mode || p.Requests != 500 || p.SuccessfulRequests != 500 || p.FailedRequests != 0 {
			t.Errorf("%+v", p)
		}
		if math.Abs(p.RequestsPerSecond*p.TotalTime-500) > 1e-6 || math.Abs(p.AvgTimePerRequest*500-p.TotalTime) > 1e-9 {
			t.Errorf("figures do not add up: %+v", p)
		}
		if p.P50 <= 0 || p.P95 < p.P50 || p.P99 < p.P95 || p.P99 > 1000*p.TotalTime {
			t.Errorf("percentiles: %+v", p)
		}
		if atOnce := p.P50*250 > 1000*p.TotalTime; atOnce != (mode == "async") { // half of the reads took P50 or more
			t.Errorf("reads overlapped: %t, %+v", atOnce, p)
		}
	}
	if p := decode[performance](t, call(t, "GET /performance/sync?requests=1", ""), 200); p.Requests != 1 || p.P50 != p.P99 {
		t.Errorf("one read: %+v", p)
	}
}

func TestPerformanceWhenCassandraGoesAway(t *testing.T) {
	p, proxy := startBehindProxy(t)
	start := p.metrics(t).TotalQueries
	answer := make(chan answer, 1)
	go func() { answer <- p.ask("GET /performance/sync?requests=1000", "") }()
	waitUntil(func() bool { return p.metrics(t).TotalQueries > start+20 }, 10*time.Second)
	proxy.listener.Close()
	proxy.cut()
	got := decode[performance](t, <-answer, 200)
	if got.FailedRequests == 0 || got.SuccessfulRequests < 20 || got.FailedRequests+got.SuccessfulRequests != 1000 {
		t.Errorf("%+v", got)
	}
}

func TestPerformanceRunEndsWithItsCaller(t *testing.T) {
	p := startHealthy(t)
	before := p.metrics(t)
	p.ask("GET /performance/sync?requests=1000", "", "X-Request-Timeout: 0.05")
	queries := p.metrics(t).TotalQueries - before.TotalQueries
	if queries > 900 {
		t.Errorf("%d queries in a run of 50 ms", queries)
	}
	p.awaitQuiet(t, before)
}

// Tests of docs and README.md.

// TestReadme follows the README: it starts the service by its first command and
// types what stands behind each "$ " of its sh blocks. What is printed must be
// what stands there, but for ids, times, durations and tokens.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllSubmatch(text, -1)
	p := startProcess(t, exec.Command("sh", "-c", "exec "+strings.TrimPrefix(string(blocks[0][1]), "$ ")))
	p.awaitHealthy(t, 15*time.Second)
	shell := startShell(t)
	var want, got strings.Builder
	for _, block := range blocks[2:] {
		for line := range strings.Lines(string(block[1])) {
			want.WriteString(line)
			command, isCommand := strings.CutPrefix(line, "$ ")
			if !isCommand {
				continue
			}
			got.WriteString(line + shell(strings.ReplaceAll(command, "localhost:8000", strings.TrimPrefix(p.url, "http://"))))
		}
	}
	printed, promised := strings.Split(mask(got.String()), "\n"), strings.Split(mask(want.String()), "\n")
	for i := range min(len(printed), len(promised)) {
		if printed[i] != promised[i] {
			t.Errorf("the tour printed\n%s\nthe README has\n%s\nIf what was printed is right, paste it there.", printed[i], promised[i])
		}
	}
	if len(printed) != len(promised) {
		t.Errorf("the tour printed %d lines, the README has %d", len(printed), len(promised))
	}
	p.wantExit(t, 0, 30*time.Second)
}

// mask hides what differs from run to run: ids, times, durations, tokens.
func mask(text string) string {
	for _, varying := range []string{
		`[0-9a-f]{8}-[0-9a-f-]{27}`, `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z`, `Date: .*`, `X-Request-Id: .*`,
		`"(request_id|cassandra_version|keyspace)":"[^"]*"`, `"(duration|latency_ms)":[0-9.e-]+`, `page_state=[\w-]+`,
	} {
		text = regexp.MustCompile(varying).ReplaceAllString(text, "…")
	}
	return text
}

// startShell returns what runs a command line and returns its output.
func startShell(t *testing.T) func(command string) string {
	t.Helper()
	const end = "end of this command's output"
	cmd := exec.CommandContext(t.Context(), "bash")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	return func(command string) (output string) {
		fmt.Fprintf(in, "%s\nprintf '\\n%%s\\n' %q\n", strings.TrimSpace(command), end)
		for lines.Scan() && lines.Text() != end {
			output += strings.TrimSuffix(lines.Text(), "\r") + "\n"
		}
		return strings.TrimSuffix(output, "\n")
	}
}

// apiOperation is what the tests read of an operation in openapi.json, with its
// references followed.
type apiOperation struct {
	Parameters []struct {
		Name, In string
		Example  any
	}
	RequestBody apiContent
	Responses   map[string]struct {
		apiContent
		Headers map[string]struct{ Required bool }
	}
}

// apiContent holds an example for each media type.
type apiContent struct {
	Content map[string]struct {
		Example  json.RawMessage
		Examples map[string]struct{ Value json.RawMessage }
	}
}

// mediaTypes returns at least one; "" stands for no content.
func (c apiContent) mediaTypes() []string {
	if c.Content == nil {
		return []string{""}
	}
	return slices.Sorted(maps.Keys(c.Content))
}

func (c apiContent) example(mediaType string) json.RawMessage {
	for _, example := range c.Content[mediaType].Examples {
		return example.Value
	}
	return c.Content[mediaType].Example
}

// readOpenAPI returns the operations that GET /openapi.json documents, by the
// pattern of their route, as in "GET /users/{id}".
func readOpenAPI(t testing.TB) map[string]apiOperation {
	t.Helper()
	root := decode[map[string]any](t, call(t, "GET /openapi.json", ""), 200)
	operations := map[string]apiOperation{}
	for path, item := range followRefs(root, root["paths"]).(map[string]any) {
		shared := item.(map[string]any)["parameters"].([]any)
		delete(item.(map[string]any), "parameters")
		for method, value := range item.(map[string]any) {
			value := value.(map[string]any)
			own, _ := value["parameters"].([]any)
			value["parameters"] = slices.Concat(own, shared)
			text, _ := json.Marshal(value)
			var operation apiOperation
			if err := json.Unmarshal(text, &operation); err != nil {
				t.Fatalf("%s %s: %v", method, path, err)
			}
			operations[strings.ToUpper(method)+" "+path] = operation
		}
	}
	return operations
}

// followRefs returns the node with what its references name in their place.
func followRefs(root map[string]any, node any) any {
	switch node := node.(type) {
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			var target any = root
			for _, name := range strings.Split(ref, "/")[1:] {
				target = target.(map[string]any)[name]
			}
			return followRefs(root, target)
		}
		followed := map[string]any{}
		for name, value := range node {
			followed[name] = followRefs(root, value)
		}
		return followed
	case []any:
		followed := []any{}
		for _, value := range node {
			followed = append(followed, followRefs(root, value))
		}
		return followed
	}
	return node
}

func TestOpenAPIHasTheRoutesAndNoOthers(t *testing.T) {
	documented := slices.Sorted(maps.Keys(readOpenAPI(t)))
	routes := slices.Sorted(slices.Values(service.(*router).endpoints))
	for _, route := range routes {
		if !slices.Contains(documented, route) {
			t.Errorf("docs/openapi.json lacks %s", route)
		}
	}
	for _, route := range documented {
		if !slices.Contains(routes, route) {
			t.Errorf("docs/openapi.json has %s, newRouter has not", route)
		}
	}
}

func TestExamplesOfOpenAPIWork(t *testing.T) {
	slow := []string{"GET /slow_query", "GET /long_running_query"}
	for pattern, operation := range readOpenAPI(t) {
		status := slices.Min(slices.Collect(maps.Keys(operation.Responses)))
		if pattern == "POST /shutdown" {
			status = "403" // the test's peer is not loopback
		}
		for _, contentType := range operation.RequestBody.mediaTypes() {
			for _, accept := range operation.Responses[status].mediaTypes() {
				t.Run(strings.Join([]string{pattern, contentType, accept}, " "), func(t *testing.T) {
					if slices.Contains(slow, pattern) {
						needsLong(t)
					}
					a := operation.callExample(t, pattern, contentType, accept)
					if got := strconv.Itoa(a.status); got != status {
						t.Fatalf("%s; want %s", a, status)
					}
					operation.wantDocumented(t, a, status, accept)
				})
			}
		}
	}
}

// callExample sends the examples of all parameters and of the body; only the
// id is a real user's.
func (o apiOperation) callExample(t *testing.T, pattern, contentType, accept string) answer {
	t.Helper()
	headers := []string{"Accept: " + accept, "Content-Type: " + contentType}
	query := url.Values{}
	for _, p := range o.Parameters {
		switch p.In {
		case "query":
			query.Set(p.Name, fmt.Sprint(p.Example))
		case "header":
			headers = append(headers, fmt.Sprintf("%s: %v", p.Name, p.Example))
		}
	}
	method, path, _ := strings.Cut(pattern, " ")
	if collection, isItem := strings.CutSuffix(path, "/{id}"); isItem {
		example := readOpenAPI(t)["POST "+collection].RequestBody.example("application/json")
		path = call(t, "POST "+collection, string(example)).header.Get("Location")
	}
	return call(t, method+" "+path+"?"+query.Encode(), string(o.RequestBody.example(contentType)), headers...)
}

// wantDocumented compares an answer with its documentation: type, required
// headers, and the names of its members with those of the example.
func (o apiOperation) wantDocumented(t *testing.T, a answer, status, mediaType string) {
	t.Helper()
	if got, _, _ := strings.Cut(a.header.Get("Content-Type"), ";"); got != mediaType {
		t.Errorf("Content-Type = %q, want %q", got, mediaType)
	}
	for name, header := range o.Responses[status].Headers {
		if header.Required && a.header.Get(name) == "" {
			t.Errorf("no header %s", name)
		}
	}
	want := memberNames(o.Responses[status].example(mediaType))
	if got := memberNames([]byte(a.body)); want != nil && got != nil && !slices.Equal(got, want) {
		t.Errorf("the answer has the members %q, its example in docs/openapi.json %q", got, want)
	}
}

// memberNames returns those of a JSON object, or of the first one in an array;
// nil for anything else.
func memberNames(text []byte) []string {
	var objects []map[string]any
	if json.Unmarshal(text, &objects) != nil {
		objects = make([]map[string]any, 1)
		json.Unmarshal(text, &objects[0])
	}
	if len(objects) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(objects[0]))
}

func TestDocsPageLoadsNothingFromElsewhere(t *testing.T) {
	a := call(t, "GET /docs", "")
	page, policy := a.body, a.header.Get("Content-Security-Policy")
	for _, element := range []string{"style", "script"} {
		inline := regexp.MustCompile(`(?s)<`+element+`\b[^>]*>(.*?)</`+element+`>`).FindAllStringSubmatch(page, -1)
		if len(inline) != 1 {
			t.Fatalf("%d <%s> elements, want 1", len(inline), element)
		}
		sum := sha256.Sum256([]byte(inline[0][1]))
		want := fmt.Sprintf("; %s-src 'sha256-%s';", element, base64.StdEncoding.EncodeToString(sum[:]))
		if !strings.Contains(policy, want) {
			t.Errorf("policy %q lacks %q", policy, want)
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none';") || strings.Contains(policy, "unsafe") {
		t.Errorf("policy = %q", policy)
	}
	if found := regexp.MustCompile(`https?://|\ssrc=|@import|\burl\(|<[^>]+\son[a-z]+=|<[^>]+\sstyle=`).FindAllString(page, -1); found != nil {
		t.Errorf("the page has %q", found)
	}
}

// Tests of the launcher. With CASSANDRA_HOSTS set it starts no node, so that what
// it does for COMMAND is seen at once.

// buildLauncher builds the launcher once.
var buildLauncher = sync.OnceValues(func() (string, error) {
	file := filepath.Join(binaries, "cassandra")
	if out, err := exec.Command("go", "build", "-o", file, "./cassandra").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return file, nil
})

// launcher returns the command, not yet started, with a temporary folder of its own that must be empty at the end.
func launcher(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	file, err := buildLauncher()
	if err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	t.Cleanup(func() {
		if left, _ := os.ReadDir(tmp); len(left) > 0 {
			t.Errorf("the launcher left %v", left)
		}
	})
	cmd := exec.Command(file, args...)
	cmd.Env = append(os.Environ(), "CASSANDRA_HOSTS=192.0.2.1", "TMPDIR="+tmp)
	return cmd
}

// startCommand starts a launcher whose COMMAND is a shell script that says "ready" first, and returns what comes after.
func startCommand(t *testing.T, script string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := launcher(t, "sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "ready\n" {
		t.Fatalf("COMMAND said %q (%v), want ready", line, err)
	}
	return cmd, lines
}

func TestLauncherStatus(t *testing.T) {
	tests := []struct {
		name string
		args []string
		in   string
		want int
		out  string
	}{
		{"COMMAND's own", []string{"sh", "-c", "exit 7"}, "", 7, ""},
		{"a signal", []string{"sh", "-c", "kill -9 $$"}, "", 137, ""},
		{"no such COMMAND", []string{"/nowhere/at/all"}, "", 127, ""},
		{"piped input", []string{"cat"}, "hello", 0, "hello"},
		{"CASSANDRA_HOSTS stays", []string{"sh", "-c", "echo $CASSANDRA_HOSTS"}, "", 0, "192.0.2.1\n"},
		{"flags of COMMAND", []string{"echo", "-nodes", "3"}, "", 0, "-nodes 3\n"},
		{"no nodes", []string{"-nodes", "0", "true"}, "", 2, ""},
		{"no such port", []string{"-port", "65536", "true"}, "", 2, ""},
		{"no address", []string{"-rpc-address", "example", "true"}, "", 2, ""},
		{"no such flag", []string{"-x"}, "", 2, ""},
		{"help", []string{"-h"}, "", 0, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := launcher(t, tt.args...)
			cmd.Stdin = strings.NewReader(tt.in)
			out, _ := cmd.Output()
			if got := cmd.ProcessState.ExitCode(); got != tt.want {
				t.Errorf("status = %d, want %d", got, tt.want)
			}
			if string(out) != tt.out {
				t.Errorf("output = %q, want %q", out, tt.out)
			}
		})
	}
}

func TestLauncherPassesSignalsOnce(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			cmd, out := startCommand(t, `trap 'echo signal' INT TERM HUP; echo ready
				i=0; while [ $i -lt 10 ]; do sleep 0.1; i=$((i+1)); done; exit 9`)
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			rest, _ := io.ReadAll(out)
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != 9 {
				t.Errorf("status = %d, want 9", got)
			}
			if string(rest) != "signal\n" {
				t.Errorf("COMMAND saw %q, want one signal", rest)
			}
		})
	}
}

// A signal ends `go run` before its child: the launcher has to wait for that one too.
func TestLauncherWaitsForTheGroup(t *testing.T) {
	cmd, out := startCommand(t, `(trap 'sleep 0.5; echo drained; exit' TERM; echo ready; while :; do sleep 0.1; done) & wait`)
	cmd.Process.Signal(syscall.SIGTERM)
	rest, _ := io.ReadAll(out) // before Wait, which closes the pipe
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 143 {
		t.Errorf("status = %d, want 143", got)
	}
	if string(rest) != "drained\n" {
		t.Errorf("COMMAND's child said %q, want drained", rest)
	}
}

// What COMMAND runs holds its output open: the end of that is the end of every process.
func TestLauncherLeavesNoProcess(t *testing.T) {
	const script = `trap 'echo asked; exit' TERM; echo ready; while :; do sleep 0.1; done`
	t.Run("when it is killed", func(t *testing.T) {
		cmd, out := startCommand(t, script)
		cmd.Process.Kill()
		if rest, _ := io.ReadAll(out); string(rest) != "asked\n" {
			t.Errorf("COMMAND said %q, want asked", rest)
		}
		cmd.Wait()
	})
	t.Run("when its parent is killed", func(t *testing.T) {
		cmd := launcher(t)
		parent := exec.Command("sh", "-c", `"$@" & wait`, "sh", cmd.Path, "sh", "-c", script)
		parent.Env = cmd.Env
		pipe, _ := parent.StdoutPipe()
		if err := parent.Start(); err != nil {
			t.Fatal(err)
		}
		out := bufio.NewReader(pipe)
		out.ReadString('\n')
		parent.Process.Kill()
		if rest, _ := io.ReadAll(out); string(rest) != "asked\n" {
			t.Errorf("COMMAND said %q, want asked", rest)
		}
		parent.Wait()
	})
}

// Tests that take minutes: -long runs them.

func TestSlowSendersAreCutOff(t *testing.T) {
	needsLong(t)
	p := startHealthy(t)
	const head = "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
	tests := []struct {
		name, at string // what is sent at once, before a byte a second
		within   time.Duration
	}{
		{"header", head + "X-Slow: ", headerTimeout},
		{"body", head + "Content-Length: 1000\r\n\r\n", defaultTimeout},
		{"body with a deadline", head + "X-Request-Timeout: 2\r\nContent-Length: 1000\r\n\r\n", 2 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var senders sync.WaitGroup
			for range 1100 {
				conn := dial(t, p.url)
				senders.Go(func() { sendSlowly(t, conn, tt.at, 3*tt.within) })
			}
			ended := make(chan struct{})
			go func() { senders.Wait(); close(ended) }()
			for running := true; running; {
				if a := p.ask("POST /users", aBody); a.status != 201 || a.took > 5*time.Second {
					t.Errorf("beside slow senders: %s; want 201 at once", a)
				}
				select {
				case <-ended:
					running = false
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
}

// sendSlowly sends a byte a second until the service cuts the connection.
func sendSlowly(t testing.TB, conn net.Conn, at string, within time.Duration) {
	start := time.Now()
	io.WriteString(conn, at)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ; ctx.Err() == nil; pause(ctx, time.Second) {
			io.WriteString(conn, " ")
		}
	}()
	conn.SetDeadline(start.Add(within + 10*time.Second))
	got, err := io.ReadAll(conn)
	if took := time.Since(start); errors.Is(err, os.ErrDeadlineExceeded) || took > within {
		t.Errorf("cut off after %s with %q, want within %s", took, got, within)
	}
}

func TestOverload(t *testing.T) {
	needsLong(t)
	p := startHealthy(t)
	before := p.metrics(t)
	ctx, stop := context.WithCancel(t.Context())
	var statuses [600]atomic.Int64
	var slowest time.Duration // of /health
	var probes, clients sync.WaitGroup
	probes.Go(func() {
		for ; ctx.Err() == nil; pause(ctx, 50*time.Millisecond) {
			a := p.ask("GET /health", "")
			if slowest = max(slowest, a.took); a.status != 200 && a.status != 503 {
				t.Errorf("%s; want 200 or 503", a)
			}
		}
	})
	for range 2000 {
		clients.Go(func() {
			for range 10 {
				a := p.ask("POST /users", aBody)
				statuses[a.status].Add(1)
				if a.status == 503 && a.header.Get("Retry-After") != "1" {
					t.Errorf("503 with Retry-After %q", a.header.Get("Retry-After"))
				}
			}
		})
	}
	clients.Wait()
	stop()
	probes.Wait()
	created, refused, memory := statuses[201].Load(), statuses[503].Load(), p.metrics(t).MemoryBytes
	t.Logf("%d answers, %d immediate 503, /health took %s at most, memory %d MB", created, refused, slowest, memory>>20)
	if created+refused != 20_000 || created < 1000 {
		t.Errorf("answers = %d, immediate 503 = %d, want 20000 in all", created, refused)
	}
	if p.awaitQuiet(t, before); memory > 256<<20 {
		t.Errorf("memory = %d bytes", memory)
	}
}

func TestCredentialsAreChecked(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-auth")
	startHealthy(t, append(cassandraAt(n.addr), "CASSANDRA_USERNAME=cassandra", "CASSANDRA_PASSWORD=cassandra")...)
	for _, tt := range []struct{ name, user, password, why string }{
		{"a wrong password", "cassandra", "s3cret-typo", "Provided username cassandra and/or password are incorrect"},
		{"a wrong user", "nobody", "s3cret-typo", "Provided username nobody and/or password are incorrect"},
		{"none", "", "", "authentication required"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startService(t, append(cassandraAt(n.addr), "CASSANDRA_USERNAME="+tt.user, "CASSANDRA_PASSWORD="+tt.password)...)
			p.awaitRefusal(t, tt.why)
			if strings.Contains(p.log.String(), "s3cret-typo") {
				t.Error("the log has the password")
			}
		})
	}
}

func TestSilentCassandraLeavesNothingBehind(t *testing.T) {
	needsLong(t)
	p, proxy := startBehindProxy(t)
	before := p.metrics(t)
	proxy.swallow(true)
	askEverything(p, func(a answer) {
		if a.status != 504 || a.took > defaultTimeout+time.Second {
			t.Errorf("%s; want 504 within %s", a, defaultTimeout)
		}
	})
	proxy.swallow(false)
	p.awaitHealthy(t, 15*time.Second)
	p.awaitQuiet(t, before)
}

func TestOutages(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "2s")
	p := startHealthy(t, cassandraAt(n.addr)...)
	l := startLoad(p, 32)
	for range 3 {
		outage(t, p, func() { n.signal(t, 0, syscall.SIGKILL) }, func() { n.awaitAnswer(t, "127.0.0.1") })
		time.Sleep(2 * time.Second) // of load
	}
	stopped := func() { n.signal(t, 0, syscall.SIGSTOP) }
	outage(t, p, stopped, func() { time.Sleep(20 * time.Second); n.signal(t, 0, syscall.SIGCONT) })
	n.signal(t, 0, syscall.SIGKILL)
	second := startService(t, cassandraAt(n.addr)...) // while it is not there
	second.awaitRefusal(t, "unable to connect to initial hosts")
	n.awaitAnswer(t, "127.0.0.1")
	p.awaitHealthy(t, 15*time.Second)
	second.awaitHealthy(t, 15*time.Second)
	l.check(t)
}

func TestUnreachableAnnouncedAddress(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "2s", "-rpc-address", "203.0.113.7") // for documentation: nobody is there
	p := startHealthy(t, cassandraAt(n.addr)...)
	l := startLoad(p, 32)
	for range 2 {
		outage(t, p, func() { n.signal(t, 0, syscall.SIGKILL) }, func() { n.awaitAnswer(t, "127.0.0.1") })
		back := time.Now()
		time.Sleep(15 * time.Second) // of load; a session that answers once can still die
		if late := l.lastFailure().Sub(back); late > 5*time.Second {
			t.Errorf("a request failed %s after Cassandra was back", late)
		}
	}
	l.check(t)
}

func TestThreeNodes(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-nodes", "3", "-restart", "10s")
	p := startHealthy(t, append(cassandraAt(n.addr), "CASSANDRA_REPLICATION=3")...)
	l := startLoad(p, 4)
	l.stream(t)
	time.Sleep(5 * time.Second) // of load
	n.signal(t, 2, syscall.SIGKILL)
	killed := time.Now()
	startHealthy(t, append(cassandraAt(n.addr), "CASSANDRA_REPLICATION=3")...) // its schema is one the dead node cannot agree to
	t.Logf("a service that starts without one node is healthy after %s", time.Since(killed))
	n.awaitAnswer(t, "127.0.0.3")
	back := l.created()
	if !waitUntil(func() bool { return l.created() > max(1000, back+200) }, 3*time.Minute) { // while it catches up
		t.Errorf("%d users were created and then changed or deleted at once, want 1000", l.created())
	}
	l.check(t)
	total, failures := 0, 0
	for status, count := range l.answers {
		total += count
		if status == 503 || status == 504 {
			failures += count
		}
	}
	t.Logf("%d of %d requests failed, the last %s after the death", failures, total, l.lastFailure().Sub(killed))
	if failures*100 > total || l.lastFailure().Sub(killed) > 30*time.Second {
		t.Errorf("%d of %d requests failed, the last %s after the death", failures, total, l.lastFailure().Sub(killed))
	}
}

// Batches are sent all the time while their node is killed 20 times. In the end
// each is there whole or not at all, as its answer said.
func TestBatchIsAtomicWhenItsNodeIsKilled(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "1s")
	const keyspace = "batches"
	db := n.open(t, keyspace)
	p := startService(t, append(cassandraAt(n.addr), "CASSANDRA_KEYSPACE="+keyspace)...)
	var mu sync.Mutex
	answers := map[string]int{} // status by the name of all users of the batch
	for try := range 20 {
		p.awaitHealthy(t, 3*time.Minute)
		created := make(chan bool, 1000)
		var senders sync.WaitGroup
		for sender := range 4 {
			senders.Go(func() {
				for i, status := 0, 201; status == 201; i++ {
					name := fmt.Sprintf("%d-%d-%d", try, sender, i)
					status = p.ask("POST /users/batch", batchOf(maxBatch, func(int) (string, string) { return name, "a@example.com" })).status
					mu.Lock()
					answers[name] = status
					mu.Unlock()
					created <- status == 201
				}
			})
		}
		<-created
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond) // any moment will do
		n.signal(t, 0, syscall.SIGKILL)
		senders.Wait()
	}
	p.awaitHealthy(t, 3*time.Minute)
	replayed := func() bool {
		var left int
		return db.Query(`SELECT count(*) FROM system.batches`).Scan(&left) == nil && left == 0
	}
	if !waitUntil(replayed, 3*time.Minute) {
		t.Fatal("the batchlog is not empty after three minutes")
	}
	wantWholeBatches(t, answers, decode[[]userJSON](t, p.ask("GET /users/stream", ""), 200))
}

// wantWholeBatches fails unless the users are whole batches, as the answers said.
func wantWholeBatches(t *testing.T, answers map[string]int, users []userJSON) {
	t.Helper()
	written, outcomes := map[string]int{}, map[string]int{}
	for _, u := range users {
		written[u.Name]++
	}
	for name, status := range answers {
		switch n := written[name]; {
		case status == 0:
			t.Errorf("batch %s got no answer", name)
		case n != 0 && n != maxBatch:
			t.Errorf("batch %s, answered %d: %d users, want all or none", name, status, n)
		case status == 201 && n == 0, status == 503 && n != 0:
			t.Errorf("batch %s, answered %d: %d users", name, status, n)
		default:
			outcomes[fmt.Sprintf("%d with %d users", status, n)]++
		}
	}
	t.Logf("answers: %v", outcomes)
}

// One million users, 260 MB of JSON: resident memory is bounded by fetch_size.
// A fresh process for each reading, built without the race detector.
func TestMemoryIsBounded(t *testing.T) {
	needsLong(t)
	binary := filepath.Join(t.TempDir(), "service")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	keyspace := useMillions(t, 1_000_000, func(i int) int { return i % 100 })
	const fullSpeed = math.MaxInt32
	tests := []struct {
		name    string
		streams int
		query   string
		rate    int // bytes a second
		limit   int // MB
	}{
		{"100 000 users", 1, "?limit=100000", fullSpeed, 40},
		{"a million users", 1, "", fullSpeed, 40},
		{"a minute of a million users at 1 MB/s", 1, "", 1 << 20, 40},
		{"20 at once", 20, "", fullSpeed, 150},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := startProcess(t, exec.Command(binary), "CASSANDRA_KEYSPACE="+keyspace)
			p.awaitHealthy(t, 15*time.Second)
			start := time.Now()
			var readers sync.WaitGroup
			for range tt.streams {
				readers.Go(func() { readStream(t, p.url+"/users/stream"+tt.query, tt.rate) })
			}
			readers.Wait()
			peak := float64(p.peakMemory(t)) / (1 << 20)
			t.Logf("at most %.1f MB resident, in %.1f s", peak, time.Since(start).Seconds())
			if peak > float64(tt.limit) {
				t.Errorf("%.1f MB resident, want at most %d", peak, tt.limit)
			}
		})
	}
}

// peakMemory is the most memory in bytes that the process ever had resident.
func (p *process) peakMemory(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Skip("needs Linux's /proc:", err)
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	peak, _, _ = strings.Cut(peak, "kB")
	kilobytes, _ := strconv.Atoi(strings.TrimSpace(peak))
	return kilobytes << 10
}

// readStream reads a stream to the end, but for a minute at most.
func readStream(t *testing.T, url string, rate int) {
	answer, err := http.Get(url)
	if err != nil {
		t.Error(err)
		return
	}
	defer answer.Body.Close()
	n, err := readSlowly(answer.Body, rate, time.Minute)
	if n < 20_000_000 || err != nil && err != io.EOF {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// readSlowly reads until the end, or for as long as it may, at most rate bytes
// a second, and returns how many came.
func readSlowly(r io.Reader, rate int, atMost time.Duration) (n int64, err error) {
	for start := time.Now(); time.Since(start) < atMost && err == nil; time.Sleep(time.Duration(n)*time.Second/time.Duration(rate) - time.Since(start)) {
		var more int64
		more, err = io.CopyN(io.Discard, r, int64(rate/10))
		n += more
	}
	return n, err
}

func TestSlowReaders(t *testing.T) {
	needsLong(t)
	useCrowd(t)
	url := serve(t, service)
	var readers sync.WaitGroup
	for _, target := range []string{"/users/stream?fetch_size=5000&limit=5000", "/users/stream/pages?fetch_size=5000"} {
		readers.Go(func() { // at 20 kB/s this takes more than a minute
			whole := len(call(t, "GET "+target, "").body)
			conn := openReader(t, url, target, 1)
			conn.SetReadDeadline(time.Now().Add(5 * time.Minute))
			fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") // so that the connection ends
			if n, err := readSlowly(conn, 20_000, 5*time.Minute); int(n) < whole || err != io.EOF {
				t.Errorf("%s: %d bytes of at least %d, %v", target, n, whole, err)
			}
		})
	}
	readers.Wait()
	start := time.Now()
	openReader(t, url, "/users/stream", 1)
	cut := waitUntil(func() bool { return counters.streams.Load() == 0 && counters.scans.Load() == 0 }, 3*writeTimeout)
	if took := time.Since(start); !cut || took < writeTimeout/2 {
		t.Errorf("a reader that takes nothing is cut: %t, after %s, want about %s", cut, took, writeTimeout)
	}
}

// useMillions makes the handler in process serve n users in a keyspace of their
// own. Without the commit log they are written several times as fast.
func useMillions(t testing.TB, n int, age func(i int) int) (keyspace string) {
	t.Helper()
	keyspace = newKeyspace(t)
	useKeyspace(t, keyspace)
	db := openKeyspace(t, global.cluster)
	if err := db.Query(`ALTER KEYSPACE "` + keyspace + `" WITH durable_writes = false`).Exec(); err != nil {
		t.Fatal(err)
	}
	insertUsers(t, db, n, age)
	return keyspace
}

// Of five million users none, or ten, are that old: Cassandra alone would run
// into its timeout looking for them.
func TestFilterOverFiveMillionUsers(t *testing.T) {
	needsLong(t)
	useMillions(t, 5_000_000, func(i int) int {
		if i%500_000 == 0 {
			return 120
		}
		return 20 + i%10
	})
	url := serve(t, service)
	for age, want := range map[int]int{120: 10, 121: 0} {
		wantFilteredStream(t, url, age, want)
		wantFilteredPages(t, age, want)
	}
}

func wantFilteredStream(t *testing.T, url string, age, want int) {
	t.Helper()
	start := time.Now()
	answer, err := http.Get(fmt.Sprintf("%s/users/stream?age_filter=%d", url, age))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	first := time.Since(start)
	var users []userJSON
	err = json.NewDecoder(answer.Body).Decode(&users)
	if err != nil || len(users) != want || first > 3*sliceTime {
		t.Errorf("age_filter=%d: %d users, want %d; %v; the status after %s", age, len(users), want, err, first)
	}
	t.Logf("age_filter=%d: the status after %s, all of the stream after %s", age, first, time.Since(start))
}

func wantFilteredPages(t *testing.T, age, want int) {
	t.Helper()
	var slowest time.Duration
	users, pages := 0, 0
	for query, more := fmt.Sprintf("age_filter=%d", age), true; more; pages++ {
		start := time.Now()
		p := decode[pageJSON](t, call(t, "GET /users/stream/pages?"+query, ""), 200)
		slowest = max(slowest, time.Since(start))
		if users, more = users+len(p.Users), p.HasMore; more {
			query = "page_state=" + *p.PageState
		}
	}
	if users != want || slowest > 3*pageTime {
		t.Errorf("age_filter=%d: %d users in %d pages, want %d; the slowest took %s", age, users, pages, want, slowest)
	}
	t.Logf("age_filter=%d: %d pages, the slowest took %s", age, pages, slowest)
}

func TestStreamWhoseNodeIsKilled(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "1s")
	const keyspace, users = "killed", 60_000
	insertUsers(t, n.open(t, keyspace), users, func(i int) int { return i % 100 })
	p := startService(t, append(cassandraAt(n.addr), "CASSANDRA_KEYSPACE="+keyspace)...)
	for _, accept := range []string{"application/json", ndjson} {
		p.awaitHealthy(t, 3*time.Minute)
		curl, file := streamByCurl(t, p.url+"/users/stream", "--header", "Accept: "+accept, "--limit-rate", "500k")
		n.signal(t, 0, syscall.SIGKILL)
		wantCut(t, curl, file, accept == ndjson)
		p.awaitHealthy(t, 3*time.Minute)
		if got := len(decode[[]userJSON](t, p.ask("GET /users/stream", ""), 200)); got != users {
			t.Errorf("%d users after the restart, want %d", got, users)
		}
	}
}

// One start, about 10 s: an own node on a port of its own, killed, back with its data, stopped, gone.
func TestLauncherRestartsANode(t *testing.T) {
	needsLong(t)
	pids := filepath.Join(t.TempDir(), "pids")
	cmd := launcher(t, "-pid", pids, "-restart", "1s", "-auth", "sh", "-c", `
		test "$CASSANDRA_HOSTS $CASSANDRA_USERNAME $CASSANDRA_PASSWORD" = "127.0.0.1 cassandra cassandra" || exit 1
		first=$(cat "$0"); kill -9 $first
		i=0; while [ "$(cat "$0")" = $first ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
		second=$(cat "$0"); echo $second; kill -STOP $second`, pids)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &said)
	}
	second, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil || !errors.Is(syscall.Kill(second, 0), syscall.ESRCH) {
		t.Errorf("node %d, started again and then stopped, is still there (%v)", second, err)
	}
	if _, err := os.Stat(pids); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of ids: %v, want none", err)
	}
}

// Benchmarks. Each does the same work in several ways, in turn, in one run, and
// reports the ratios of their rates: those last, while a machine's absolute
// figures don't. One iteration is the whole comparison, so -benchtime is 1x.

// way is one way to do the work: do does it once and returns how many rows it
// moved.
type way struct {
	name string
	do   func() (rows int, err error)
}

const (
	benchRounds = 15                     // of all ways, after one to warm up
	benchTime   = 300 * time.Millisecond // of one way in one round, at least
)

// compare reports the median rate of each way, and the median of its ratios to
// the first way's rate in the same round. The order changes from round to round,
// since a way leaves something to do for the next: garbage, a table to flush.
func compare(b *testing.B, clients int, ways []way) {
	b.Helper()
	defer debug.SetGCPercent(debug.SetGCPercent(gcPercent)) // as run does
	for b.Loop() {
		rates, ratios := make([][]float64, len(ways)), make([][]float64, len(ways))
		for round := range benchRounds + 1 {
			rate := make([]float64, len(ways))
			for _, i := range rand.Perm(len(ways)) {
				rate[i] = rateOf(b, clients, ways[i].do)
			}
			for i := range ways {
				if round > 0 {
					rates[i], ratios[i] = append(rates[i], rate[i]), append(ratios[i], rate[i]/rate[0])
				}
			}
		}
		for i, w := range ways {
			b.ReportMetric(median(rates[i]), w.name+"/s")
			if i > 0 {
				b.ReportMetric(median(ratios[i]), w.name+":"+ways[0].name)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

// rateOf runs do by so many clients at once and returns rows per second.
func rateOf(b *testing.B, clients int, do func() (int, error)) float64 {
	var rows atomic.Int64
	var running sync.WaitGroup
	start := time.Now()
	for range clients {
		running.Go(func() {
			for time.Since(start) < benchTime {
				n, err := do()
				if err != nil {
					b.Error(err)
					return
				}
				rows.Add(int64(n))
			}
		})
	}
	running.Wait()
	return float64(rows.Load()) / time.Since(start).Seconds()
}

// benchClient keeps a connection for each client, and reads answers to the end.
var benchClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}

// request makes a request that can be sent again and again.
func request(method, url, body string) *http.Request {
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Content-Type", "application/json")
	return r
}

func copyOf(r *http.Request) *http.Request {
	c := r.WithContext(context.Background())
	c.Body, _ = r.GetBody()
	return c
}

func overHTTP(r *http.Request, wantStatus int) error {
	answer, err := benchClient.Do(copyOf(r))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		return err
	}
	if answer.StatusCode != wantStatus {
		return fmt.Errorf("status = %d, want %d", answer.StatusCode, wantStatus)
	}
	return nil
}

// inProcess calls the real handler without a network.
func inProcess(r *http.Request, wantStatus int) error {
	w := &discardWriter{header: http.Header{}}
	service.ServeHTTP(w, copyOf(r))
	if w.status != wantStatus {
		return fmt.Errorf("status = %d, want %d", w.status, wantStatus)
	}
	return nil
}

// discardWriter is a http.ResponseWriter that keeps only the status. It takes
// deadlines as a connection does.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header              { return w.header }
func (w *discardWriter) WriteHeader(status int)           { w.status = status }
func (w *discardWriter) Flush()                           {}
func (w *discardWriter) Write(p []byte) (int, error)      { return len(p), nil }
func (w *discardWriter) SetReadDeadline(time.Time) error  { return nil }
func (w *discardWriter) SetWriteDeadline(time.Time) error { return nil }

// The naive handlers are what one would write first: no deadline, no cap, no
// ids, no metrics, no problem answers.
func getNaively(w http.ResponseWriter, r *http.Request) {
	id, err := gocql.ParseUUID(r.PathValue("id"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	u := user{ID: uuid.UUID(id)}
	if err := global.session.Load().Query(selectUser, id).Scan(u.columns()...); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(u)
}

func postNaively(w http.ResponseWriter, r *http.Request) {
	var u user
	if err := json.NewDecoder(r.Body).Decode(&u); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	u.ID, u.CreatedAt, u.UpdatedAt = uuid.New(), now(), now()
	if err := global.session.Load().Query(insertUser, u.values()...).Exec(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(u)
}

// servers starts the naive handlers and the real one over loopback HTTP.
func servers(b *testing.B) (naive, real string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /users/{id}", getNaively)
	mux.HandleFunc("POST /users", postNaively)
	n, r := httptest.NewServer(mux), httptest.NewServer(service)
	b.Cleanup(func() { n.Close(); r.Close() })
	return n.URL, r.URL
}

func atClients(b *testing.B, bench func(b *testing.B, clients int)) {
	for _, clients := range []int{1, 32, 128} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) { bench(b, clients) })
	}
}

func BenchmarkReads(b *testing.B) {
	naive, real := servers(b)
	id := aUser(b).ID
	get, naiveGet := request("GET", real+"/users/"+id, ""), request("GET", naive+"/users/"+id, "")
	parsed := gocql.UUID(uuid.MustParse(id))
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				var u user
				return 1, db.Query(selectUser, parsed).Scan(u.columns()...)
			}},
			{"deadline", func() (int, error) { // what the driver takes for a context, which the handler must have
				ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
				defer cancel()
				_, err := readUser(ctx, uuid.UUID(parsed))
				return 1, err
			}},
			{"handler", func() (int, error) { return 1, inProcess(get, 200) }},
			{"naive", func() (int, error) { return 1, overHTTP(naiveGet, 200) }},
			{"http", func() (int, error) { return 1, overHTTP(get, 200) }},
		})
	})
}

func BenchmarkCreates(b *testing.B) {
	naive, real := servers(b)
	post, naivePost := request("POST", real+"/users", aBody), request("POST", naive+"/users", aBody)
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				return 1, db.Query(insertUser, ada.newUser().values()...).Exec()
			}},
			{"deadline", func() (int, error) {
				ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
				defer cancel()
				return 1, createUser(ctx, ada.newUser())
			}},
			{"handler", func() (int, error) { return 1, inProcess(post, 201) }},
			{"naive", func() (int, error) { return 1, overHTTP(naivePost, 201) }},
			{"http", func() (int, error) { return 1, overHTTP(post, 201) }},
		})
	})
}

// BenchmarkUpdates changes one of many users at a time: lightweight transactions
// on the same one would wait for each other.
func BenchmarkUpdates(b *testing.B) {
	_, real := servers(b)
	var ids []gocql.UUID
	var puts []*http.Request
	for range 1000 {
		id := aUser(b).ID
		ids = append(ids, gocql.UUID(uuid.MustParse(id)))
		puts = append(puts, request("PUT", real+"/users/"+id, aBody))
	}
	put := func() *http.Request { return puts[rand.IntN(len(puts))] }
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				id := ids[rand.IntN(len(ids))]
				if _, err := db.Query(updateUser, append(ada.values(), int64(now()), id)...).ScanCAS(); err != nil {
					return 0, err
				}
				var u user
				return 1, db.Query(selectUser, id).Scan(u.columns()...)
			}},
			{"handler", func() (int, error) { return 1, inProcess(put(), 200) }},
			{"http", func() (int, error) { return 1, overHTTP(put(), 200) }},
		})
	})
}

func BenchmarkLists(b *testing.B) {
	_, real := servers(b)
	list := request("GET", real+"/users?limit=100", "")
	loadUsers(b, 100_000)
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) { return bareScan(100, 1) }},
			{"handler", func() (int, error) { return 100, inProcess(list, 200) }},
			{"http", func() (int, error) { return 100, overHTTP(list, 200) }},
		})
	})
}

func BenchmarkBatches(b *testing.B) {
	_, real := servers(b)
	post := request("POST", real+"/users/batch", "["+strings.TrimSuffix(strings.Repeat(aBody+",", maxBatch), ",")+"]")
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, min(clients, 32), []way{
			{"bare", func() (int, error) {
				batch := db.NewBatch(gocql.LoggedBatch)
				for range maxBatch {
					batch.Query(insertUser, ada.newUser().values()...)
				}
				return maxBatch, db.ExecuteBatch(batch)
			}},
			{"handler", func() (int, error) { return maxBatch, inProcess(post, 201) }},
			{"http", func() (int, error) { return maxBatch, overHTTP(post, 201) }},
		})
	})
}

// BenchmarkStreams reads whole tables, of a million users with -long.
func BenchmarkStreams(b *testing.B) {
	_, real := servers(b)
	sizes := []int{100_000}
	if *long {
		sizes = append(sizes, 1_000_000)
	}
	for _, size := range sizes {
		loadUsers(b, size)
		for _, fetchSize := range []int{100, 1000, 5000} {
			b.Run(fmt.Sprintf("users=%d/page=%d", size, fetchSize), func(b *testing.B) {
				stream := request("GET", fmt.Sprintf("%s/users/stream?fetch_size=%d", real, fetchSize), "")
				compare(b, 1, []way{
					{"bare", func() (int, error) { return bareScan(fetchSize, math.MaxInt32) }},
					{"handler", func() (int, error) { return size, inProcess(stream, 200) }},
					{"http", func() (int, error) { return size, overHTTP(stream, 200) }},
				})
				reportMemory(b, func() int { inProcess(stream, 200); return size })
			})
		}
	}
}

// reportMemory reports what a row costs in allocations, and the highest heap
// seen while do ran.
func reportMemory(b *testing.B, do func() (rows int)) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	done, highest := make(chan struct{}), make(chan uint64)
	go func() {
		var high uint64
		for {
			select {
			case <-done:
				highest <- high
				return
			case <-time.After(5 * time.Millisecond):
				high = max(high, memoryBytes())
			}
		}
	}()
	rows := do()
	close(done)
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(rows), "allocs/row")
	b.ReportMetric(float64(<-highest)/(1<<20), "peak-MB")
}

// bareScan reads so many pages of the users table with nothing but the driver.
func bareScan(pageSize, pages int) (rows int, err error) {
	var id gocql.UUID
	var name, email string
	var age int
	var created, updated time.Time
	it := global.session.Load().Query(`SELECT id, name, email, age, created_at, updated_at FROM users`).PageSize(pageSize).Iter()
	for rows < pageSize*pages && it.Scan(&id, &name, &email, &age, &created, &updated) {
		rows++
	}
	return rows, it.Close()
}

// loadUsers makes the table of the shared keyspace hold exactly n users.
func loadUsers(b testing.TB, n int) {
	if err := admin.Query(`TRUNCATE "` + global.cluster.keyspace + `".users`).Exec(); err != nil {
		b.Fatal(err)
	}
	insertUsers(b, global.session.Load().Session, n, func(i int) int { return i % 100 })
}

// BenchmarkCounting shows what the metrics cost a request: one query, one
// route, both with their histograms.
func BenchmarkCounting(b *testing.B) {
	stats := statsOf("GET /benchmark")
	b.ReportAllocs()
	for b.Loop() {
		at := time.Now()
		countQuery(at, at.Add(time.Millisecond), nil)
		stats.count(200, time.Millisecond)
	}
}

// BenchmarkFilters prints what decided how age_filter is answered: slices of the
// token range, side by side or one after the other, every row filtered here, and
// an SAI index. Five million users with -long.
func BenchmarkFilters(b *testing.B) {
	n := 200_000
	if *long {
		n = 5_000_000
	}
	keyspace := useMillions(b, n, func(i int) int {
		if i%(n/10) == 0 {
			return 120
		}
		return 20 + i%10
	})
	ways := []struct {
		name  string
		parts func(minAge int) iter.Seq[nextPage]
	}{
		{"slices", func(minAge int) iter.Seq[nextPage] { return newScan(minAge, unlimited).parts(defaultFetch) }},
		{"in-turn", func(minAge int) iter.Seq[nextPage] { return newScan(minAge, unlimited-1).parts(defaultFetch) }}, // a limit is not divided
		{"here", func(int) iter.Seq[nextPage] { return newScan(noAgeFilter, unlimited).parts(defaultFetch) }},
		{"index", func(minAge int) iter.Seq[nextPage] {
			s := newScan(minAge, unlimited-1)
			s.upto = s.end
			return s.parts(defaultFetch)
		}},
	}
	for _, w := range ways {
		if w.name == "index" {
			createIndex(b, keyspace)
		}
		for _, minAge := range []int{121, 120, 25, 20} {
			b.Run(fmt.Sprintf("%s/age=%d", w.name, minAge), func(b *testing.B) { benchmarkFilter(b, w.parts, minAge) })
		}
	}
}

func benchmarkFilter(b *testing.B, parts func(minAge int) iter.Seq[nextPage], minAge int) {
	var first time.Duration
	matching := 0
	for b.Loop() {
		start, pages, row := time.Now(), 0, newUserRow()
		matching = 0
		for rows, err := range pagesAhead(b.Context(), &counters.scans, parts(minAge)) {
			if err != nil {
				b.Fatal(err)
			}
			if pages++; pages == 1 {
				first = time.Since(start)
			}
			for rows.Scan(row.dest...) {
				if row.age >= minAge {
					matching++
				}
			}
		}
	}
	b.ReportMetric(float64(matching), "users")
	b.ReportMetric(milliseconds(first), "ms-to-first-page")
}

// createIndex creates an SAI index and waits until it answers.
func createIndex(b *testing.B, keyspace string) {
	if err := admin.Query(`CREATE INDEX users_age ON "` + keyspace + `".users (age) USING 'sai'`).Exec(); err != nil {
		b.Fatal(err)
	}
	queryable := func() (is bool) {
		admin.Query(`SELECT is_queryable FROM system_views.sai_column_indexes WHERE keyspace_name = ? AND index_name = 'users_age'`, keyspace).Scan(&is)
		return is
	}
	if !waitUntil(queryable, 10*time.Minute) {
		b.Fatal("the index is not there after ten minutes")
	}
}
