// The tests talk to a real Cassandra, through the real routes and middleware.
// Most use the handler in process, on one keyspace that is thrown away. What
// needs an empty table, other settings, an outage or a memory reading starts
// the test binary again as the service, with a keyspace of its own.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gocql/gocql"
)

var long = flag.Bool("long", false, "also run the tests that take minutes")

// service is the handler in process that most tests call.
var service http.Handler

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

func runTests(m *testing.M) int {
	keyspace := newKeyspaceName()
	os.Setenv("CASSANDRA_KEYSPACE", keyspace)
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	closeCassandra := keepConnected(cfg.cluster)
	defer closeCassandra()
	if !waitUntil(func() bool { return global.session.Load() != nil }, 4*time.Second) {
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

// needsLong skips a test that takes minutes unless -long is given.
func needsLong(t testing.TB) {
	if !*long {
		t.Skip("takes minutes; run with -long")
	}
}

const jsonHeader = "Content-Type: application/json"

// call sends a request to the handler in process. Headers are "Name: value".
func call(t testing.TB, method, target, body string, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	r := httptest.NewRequestWithContext(t.Context(), method, target, reader)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	service.ServeHTTP(w, r)
	return w
}

// decode reads an answer's JSON body, after checking its status.
func decode[T any](t testing.TB, w *httptest.ResponseRecorder, status int) (value T) {
	t.Helper()
	if w.Code != status {
		t.Fatalf("status = %d, want %d; body: %s", w.Code, status, w.Body)
	}
	if err := json.Unmarshal(w.Body.Bytes(), &value); err != nil {
		t.Fatalf("body %q: %v", w.Body, err)
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

// aUser creates a user in the shared keyspace.
func aUser(t testing.TB) userJSON {
	t.Helper()
	return decode[userJSON](t, call(t, "POST", "/users", `{"name":"Ada","email":"ada@example.com","age":36}`, jsonHeader), http.StatusCreated)
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
	return startBinary(t, os.Args[0], settings...)
}

func startBinary(t testing.TB, binary string, settings ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(binary), log: &logBuffer{}, exited: make(chan struct{})}
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
	if !waitUntil(func() bool { return strings.Contains(p.log.String(), "addr=") || p.hasExited() }, 10*time.Second) || p.hasExited() {
		t.Fatalf("the service did not start: %s", p.log)
	}
	_, addr, _ := strings.Cut(p.log.String(), "addr=")
	addr, _, _ = strings.Cut(addr, "\n")
	p.url = "http://" + addr
	return p
}

func (p *process) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// awaitHealthy waits until /health is 200.
func (p *process) awaitHealthy(t testing.TB, within time.Duration) {
	t.Helper()
	healthy := func() bool {
		answer, err := http.Get(p.url + "/health")
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	}
	if !waitUntil(healthy, within) {
		t.Fatalf("not healthy within %s", within)
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

// cassandraAddress is where the tests' Cassandra answers.
func cassandraAddress() string {
	host, _, _ := strings.Cut(cmp.Or(os.Getenv("CASSANDRA_HOSTS"), "127.0.0.1"), ",")
	return net.JoinHostPort(host, cmp.Or(os.Getenv("CASSANDRA_PORT"), "9042"))
}

// proxy stands between a service and Cassandra and can fail as networks do.
type proxy struct {
	listener net.Listener
	target   string
	mu       sync.Mutex
	silent   bool
	conns    map[net.Conn]bool
}

// startProxy returns a proxy to target, a host:port.
func startProxy(t testing.TB, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: target, conns: map[net.Conn]bool{}}
	t.Cleanup(func() { listener.Close(); p.cut() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns[client], p.conns[server] = true, true
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
		silent := p.silent
		p.mu.Unlock()
		if silent {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// cut breaks all connections; new ones may be made.
func (p *proxy) cut() {
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

// settings make a service use the proxy, for all its connections: the driver
// learns Cassandra's address from it, but keeps to the port it was given.
func (p *proxy) settings() []string {
	host, port, _ := net.SplitHostPort(p.listener.Addr().String())
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
	launcher := filepath.Join(t.TempDir(), "launcher")
	if out, err := exec.Command("go", "build", "-o", launcher, "./cassandra").CombinedOutput(); err != nil {
		t.Fatalf("building the launcher: %v\n%s", err, out)
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

// settings make a service use the node.
func (n *node) settings() []string {
	host, port, _ := net.SplitHostPort(n.addr)
	return []string{"CASSANDRA_HOSTS=" + host, "CASSANDRA_PORT=" + port}
}

// Tests of main.go.

func TestServiceStarts(t *testing.T) {
	startService(t).awaitHealthy(t, 5*time.Second)
}

// Tests of health.go.

// Tests of users.go.

func TestUserReadsBackAsItWasAnswered(t *testing.T) {
	posted := call(t, "POST", "/users", `{"name":"Ada","email":"ada@example.com","age":36}`, jsonHeader)
	got := call(t, "GET", posted.Header().Get("Location"), "")
	if posted.Code != http.StatusCreated || got.Code != http.StatusOK || posted.Body.String() != got.Body.String() {
		t.Errorf("POST answered %d %s, GET %d %s", posted.Code, posted.Body, got.Code, got.Body)
	}
}

// Tests of stream.go.

// Tests of safety.go.

// Tests of metrics.go.

// Tests of docs.

// Tests of outages, overload and drain.

// Tests of the launcher.

// Benchmarks.
