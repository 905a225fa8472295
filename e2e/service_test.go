// Package e2e tests the built service as its users meet it: over HTTP, against a real Cassandra. This file builds and
// starts the service, sends requests, and breaks networks and nodes; the tests are in the other files.
package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

var (
	long      = flag.Bool("long", false, "also run the tests that take minutes")
	client    = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4000}}
	admin     *gocql.Session // for statements that the service never executes
	keyspaces atomic.Int64   // their number so far
	binaries  string         // the folder of everything that the tests build
)

func TestMain(m *testing.M) {
	var err error
	if admin, err = connect(cassandraAddress()); err == nil {
		binaries, err = os.MkdirTemp("", "e2e-")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v\nThe tests need Cassandra. This command starts it: go run ./cassandra go test -p 1 ./...\n", err)
		os.Exit(1)
	}
	flag.Set("test.parallel", "8") // parallel tests mostly wait
	m.Run()
	os.RemoveAll(binaries)
	for i := range keyspaces.Load() {
		admin.Query(fmt.Sprintf("DROP KEYSPACE IF EXISTS e2e_%d_%d", os.Getpid(), i+1)).Exec()
	}
}

// openSources opens all sources, since Go's test cache tracks the files that tests open.
func openSources() {
	for _, pattern := range []string{"../*.go", "../go.mod", "../README.md", "../docs/*", "../cassandra/*"} {
		files, _ := filepath.Glob(pattern)
		for _, name := range files {
			os.ReadFile(name)
		}
	}
}

func needsLong(t testing.TB) {
	if !*long {
		t.Skip("takes minutes; run with -long")
	}
}

func build(name string, args ...string) string {
	file := filepath.Join(binaries, name)
	out, err := exec.Command("go", append([]string{"build", "-C", "..", "-o", file}, args...)...).CombinedOutput()
	if err != nil {
		panic(fmt.Sprintf("%v\n%s", err, out))
	}
	return file
}

// buildService uses the race detector if the tests do; buildPlain never does, since that takes several times the memory.
var (
	buildService = sync.OnceValue(func() string {
		info, _ := debug.ReadBuildInfo()
		race := slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
		return build("service", fmt.Sprint("-race=", race), ".")
	})
	buildPlain    = sync.OnceValue(func() string { return build("plain", ".") })
	buildLauncher = sync.OnceValue(func() string { return build("launcher", "./cassandra") })
)

type service struct {
	*exec.Cmd
	url      string
	keyspace string // by default
	logFile  string
	exited   context.Context // done at the exit; ProcessState is set then
}

// start runs the service with settings such as MAX_IN_FLIGHT=5 and waits until it listens. By default it has a free port
// and a new keyspace. It is killed after the test if it is still running.
func start(t testing.TB, settings ...string) *service {
	return startCommand(t, exec.Command(buildService()), settings...)
}

func startCommand(t testing.TB, cmd *exec.Cmd, settings ...string) *service {
	openSources()
	exited, exit := context.WithCancel(context.Background())
	s := &service{Cmd: cmd, keyspace: newKeyspace(), logFile: filepath.Join(t.TempDir(), "log"), exited: exited}
	s.Env = slices.Concat(os.Environ(), []string{"ADDR=" + anyPort, inKeyspace + s.keyspace}, cassandraAt(cassandraAddress()), settings)
	stderr, _ := os.Create(s.logFile)
	defer stderr.Close()
	s.Stderr = stderr
	must(t, s.Start())
	go func() {
		s.Wait()
		exit()
	}()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the service:\n%s%s", s.log(), s.do("GET /metrics", ""))
		}
		s.Process.Kill()
		<-exited.Done()
	})
	var addr []string
	await(t, 30*time.Second, "listening", func() bool {
		addr = regexp.MustCompile(`addr"?[=:]\S+:(\d+)`).FindStringSubmatch(s.log())
		return addr != nil
	})
	s.url = "http://127.0.0.1:" + addr[1]
	return s
}

func startHealthy(t testing.TB, settings ...string) *service {
	s := start(t, settings...)
	s.awaitHealthy(t, 30*time.Second)
	return s
}

func (s *service) log() string {
	text, _ := os.ReadFile(s.logFile)
	return string(text)
}

func (s *service) awaitHealthy(t testing.TB, within time.Duration) {
	await(t, within, "healthy", func() bool { return s.do("GET /health", "").status == 200 })
}

// wantExit waits for the exit of the process; the status of a signal is -1.
func (s *service) wantExit(t testing.TB, status int, within time.Duration) {
	await(t, within, "exited", func() bool { return s.exited.Err() != nil })
	got := s.ProcessState.ExitCode()
	check(t, got == status, "exit status = %d (%s), want %d", got, s.ProcessState, status)
}

type response struct {
	request string // such as "GET /users"
	status  int
	header  http.Header
	body    string
	took    time.Duration
	err     error
}

func (r response) String() string {
	return fmt.Sprintf("%s: status = %d after %s, error %v, header %v, body %.300s", r.request, r.status, r.took, r.err, r.header, r.body)
}

// do sends a request such as "GET /users" with headers such as "Accept: text/plain". By default the body is JSON.
func (s *service) do(request, body string, headers ...string) response {
	start := time.Now()
	got, err := client.Do(newRequest(request, s.url, body, headers))
	if err != nil {
		return response{request: request, took: time.Since(start), err: err}
	}
	defer got.Body.Close()
	if got.Close { // net/http removes the header
		got.Header.Set("Connection", "close")
	}
	text, err := io.ReadAll(got.Body)
	return response{request, got.StatusCode, got.Header, string(text), time.Since(start), err}
}

func newRequest(request, url, body string, headers []string) *http.Request {
	method, target, _ := strings.Cut(request, " ")
	r, _ := http.NewRequest(method, url+target, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	for _, h := range headers {
		if name, value, ok := strings.Cut(h, ": "); name == "Host" {
			r.Host = value
		} else if ok {
			r.Header.Set(name, value)
		}
	}
	return r
}

// want checks the status of a response, parts of its body, and the members and headers of every problem response.
func want(t testing.TB, r response, status int, parts ...string) bool {
	t.Helper()
	ok := r.status == status && r.err == nil && (r.header.Get("Retry-After") != "") == (status == 503)
	if status >= 400 && !strings.HasSuffix(r.request, "/health") {
		ok = ok && r.header.Get("Content-Type") == "application/problem+json"
		parts = append(parts, fmt.Sprintf(`{"title":%q,"status":%d,"detail":`, http.StatusText(status), status),
			fmt.Sprintf(`"request_id":%q`, r.header.Get("X-Request-Id")))
	}
	for _, part := range parts {
		ok = ok && strings.Contains(r.body, part)
	}
	check(t, ok, "%s, want %d with %q", r, status, parts)
	return ok
}

func check(t testing.TB, ok bool, format string, args ...any) {
	if t.Helper(); !ok {
		t.Errorf(format, args...)
	}
}

func must(t testing.TB, err error) {
	if t.Helper(); err != nil {
		t.Fatal(err)
	}
}

func decode[T any](t testing.TB, r response, status int) (value T) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.body), &value); err != nil || !want(t, r, status) {
		t.Fatalf("%s: %v", r, err)
	}
	return value
}

type user struct {
	ID, Name, Email string
	Age             int
}

const (
	anyPort      = "127.0.0.1:0"
	crowdSize    = 10_000
	inKeyspace   = "CASSANDRA_KEYSPACE="
	ada          = `{"name":"Ada Lovelace","email":"ada@example.com","age":36}`
	missingUser  = "/users/7c9e6679-7425-40de-944b-e07fc1f90ae7"
	notAvailable = "Cassandra is not available; try again in a moment"
)

func (s *service) createUser(t testing.TB) string {
	r := s.do("POST /users", ada)
	want(t, r, 201)
	return r.header.Get("Location")
}

func batchOf(n int, user string) string { return "[" + strings.Repeat(user+",", n-1) + user + "]" }

type metrics struct {
	Queries     int64                              `json:"total_queries"`
	QueryTimes  map[string]float64                 `json:"query_times"`
	Errors      int64                              `json:"errors_count"`
	Connections struct{ Open, Opened, Failed int } `json:"cassandra_connections"`
	InFlight    int                                `json:"requests_in_flight"`
	ByRoute     map[string]map[string]int64        `json:"requests_by_route"`
	Cassandra   struct {
		Connected      bool
		Session, Hosts int
		Silent         int     `json:"hosts_silent"`
		ClockSkew      float64 `json:"clock_skew_ms"`
	}
	Streams    int   `json:"streams_active"`
	Rows       int64 `json:"rows_streamed"`
	Goroutines int
	Memory     int64 `json:"memory_bytes"`
}

func (s *service) metrics(t testing.TB) metrics {
	return decode[metrics](t, s.do("GET /metrics", ""), 200)
}

// awaitInFlight waits until n requests are active besides the one that reads the metrics.
func (s *service) awaitInFlight(t testing.TB, n int) {
	await(t, 10*time.Second, fmt.Sprintf("handling %d requests", n), func() bool { return s.metrics(t).InFlight == n+1 })
}

// awaitQuiet waits until goroutines, connections and streams are back to the levels in m.
func (s *service) awaitQuiet(t testing.TB, m metrics) {
	await(t, 20*time.Second, fmt.Sprintf("back to %+v", m), func() bool {
		client.CloseIdleConnections()
		now := s.metrics(t)
		return now.InFlight == 1 && now.Streams == 0 && now.Goroutines <= m.Goroutines+4 && now.Connections.Open <= m.Connections.Open
	})
}

func (s *service) wantMemory(t testing.TB, megabytes int) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Process.Pid))
	_, peak, _ := strings.Cut(string(status), "VmHWM:") // the largest resident size so far
	var kilobytes int
	fmt.Sscan(peak, &kilobytes)
	check(t, kilobytes > 0 && kilobytes>>10 <= megabytes, "%d kB resident, want at most %d MB", kilobytes, megabytes)
	t.Logf("at most %d MB resident", kilobytes>>10)
}

// dial sends a raw request and reads n bytes of the response. The buffer is so small that any later read of 240 kB empties it.
func (s *service) dial(t testing.TB, request string, n int64) net.Conn {
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(5 * time.Minute))
	conn.(*net.TCPConn).SetReadBuffer(64 << 10)
	io.WriteString(conn, request)
	io.CopyN(io.Discard, conn, n)
	return conn
}

func rawGet(target string) string {
	return "GET " + target + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
}

func await(t testing.TB, within time.Duration, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not %s within %s", what, within)
		}
	}
}

func concurrently(n int, do func(i int)) {
	var running sync.WaitGroup
	for i := range n {
		running.Go(func() { do(i) })
	}
	running.Wait()
}

func cassandraAddress() string {
	host, _, _ := strings.Cut(cmp.Or(os.Getenv("CASSANDRA_HOSTS"), "127.0.0.1"), ",")
	return net.JoinHostPort(host, cmp.Or(os.Getenv("CASSANDRA_PORT"), "9042"))
}

func closedAddress() string { // where nothing listens
	listener, _ := net.Listen("tcp", anyPort)
	defer listener.Close()
	return listener.Addr().String()
}

// cassandraAt returns the settings that connect a service to Cassandra at host:port.
func cassandraAt(addr string) []string {
	host, port, _ := net.SplitHostPort(addr)
	return []string{"CASSANDRA_HOSTS=" + host, "CASSANDRA_PORT=" + port}
}

// connect opens a session to the Cassandra at host:port and to no other node.
func connect(addr string) (*gocql.Session, error) {
	host, port, _ := net.SplitHostPort(addr)
	cfg := gocql.NewCluster(host)
	cfg.Port, _ = strconv.Atoi(port)
	cfg.ProtoVersion, cfg.Timeout, cfg.ConnectTimeout, cfg.WriteCoalesceWaitTime = 4, time.Minute, 4*time.Second, 0
	cfg.DisableInitialHostLookup = true                                                           // an advertised address may be unreachable
	cfg.Authenticator = gocql.PasswordAuthenticator{Username: "cassandra", Password: "cassandra"} // if it is needed
	cfg.Logger = log.New(io.Discard, "", 0)
	return cfg.CreateSession()
}

// newKeyspace names a keyspace that is dropped after all tests.
func newKeyspace() string { return fmt.Sprintf("e2e_%d_%d", os.Getpid(), keyspaces.Add(1)) }

func userID(i int) gocql.UUID { return gocql.UUID(uuid.NewSHA1(uuid.Nil, fmt.Append(nil, i))) }

// seeded returns the i-th user that seed writes. Its name is its number in 100 digits: a thousand users are a quarter of a megabyte.
func seeded(i int) user {
	return user{userID(i).String(), fmt.Sprintf("%0100d", i), fmt.Sprintf("user%d@example.com", i), i % 100}
}

// seed writes n users, bypassing the service.
func seed(t testing.TB, db *gocql.Session, keyspace string, n int) {
	insert, now := "INSERT INTO "+keyspace+".users (id, name, email, age, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)", time.Now()
	inBatches(t, db, n, func(b *gocql.Batch, i int) {
		u := seeded(i)
		b.Query(insert, userID(i), u.Name, u.Email, u.Age, now, now)
	})
}

// inBatches executes n statements in unlogged batches, which is several times as fast as one at a time.
func inBatches(t testing.TB, db *gocql.Session, n int, add func(b *gocql.Batch, i int)) {
	const size = 50
	var next atomic.Int64
	concurrently(8, func(int) {
		for from := int(next.Add(size)) - size; from < n && !t.Failed(); from = int(next.Add(size)) - size {
			b := db.NewBatch(gocql.UnloggedBatch)
			for i := from; i < min(from+size, n); i++ {
				add(b, i)
			}
			err := db.ExecuteBatch(b)
			for try := 0; err != nil && try < 9; try++ { // a busy node times out
				err = db.ExecuteBatch(b)
			}
			check(t, err == nil, "%v", err)
		}
	})
}

var seedCrowd, crowd = new(sync.Once), newKeyspace()

// useCrowd returns the setting for a keyspace of crowdSize seeded users that no test changes.
func useCrowd(t testing.TB) string {
	seedCrowd.Do(func() {
		startHealthy(t, inKeyspace+crowd)
		seed(t, admin, crowd, crowdSize)
	})
	return inKeyspace + crowd
}

// proxy stands between a service and Cassandra and can fail as networks do.
type proxy struct {
	addr   string
	delay  atomic.Int64 // nanoseconds, in each direction
	credit atomic.Int64 // bytes that still pass; the others wait
	passed atomic.Int64 // bytes
	conns  sync.Map     // net.Conn to bool: whether its bytes are dropped
}

// startProxy starts a proxy to a Cassandra, with TLS if certificates are given.
func startProxy(t testing.TB, addr, cassandra string, certificates ...tls.Certificate) *proxy {
	listener, err := net.Listen("tcp", addr)
	must(t, err)
	if certificates != nil {
		listener = tls.NewListener(listener, &tls.Config{Certificates: certificates})
	}
	p := &proxy{addr: listener.Addr().String()}
	p.credit.Store(math.MaxInt64)
	t.Cleanup(func() {
		listener.Close()
		p.cut()
	})
	go func() {
		for client, err := listener.Accept(); err == nil; client, err = listener.Accept() {
			server, err := net.Dial("tcp", cassandra)
			if err != nil { // a dead node
				client.Close()
				continue
			}
			go p.pump(client, server)
			go p.pump(server, client)
		}
	}()
	return p
}

func startBehindProxy(t testing.TB, settings ...string) (*service, *proxy) {
	p := startProxy(t, anyPort, cassandraAddress())
	return startHealthy(t, append(settings, cassandraAt(p.addr)...)...), p
}

func (p *proxy) pump(from, to net.Conn) {
	type chunk struct {
		at   time.Time
		data []byte
	}
	delayed := make(chan chunk, 1000)
	go func() {
		defer to.Close()
		for c := range delayed {
			time.Sleep(time.Until(c.at))
			to.Write(c.data)
			p.passed.Add(int64(len(c.data)))
		}
	}()
	defer close(delayed)
	p.conns.Store(from, false)
	for buf := make([]byte, 32<<10); ; {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		for p.credit.Load() <= 0 {
			time.Sleep(time.Millisecond)
		}
		p.credit.Add(int64(-n))
		if frozen, _ := p.conns.Load(from); frozen != true {
			delayed <- chunk{time.Now().Add(time.Duration(p.delay.Load())), bytes.Clone(buf[:n])}
		}
	}
}

// cut closes all connections; new ones work.
func (p *proxy) cut() {
	for conn := range p.conns.Range {
		conn.(net.Conn).Close()
		p.conns.Delete(conn)
	}
	p.credit.Store(math.MaxInt64)
}

// cutAfter closes all connections once about n more bytes have passed.
func (p *proxy) cutAfter(n int64) {
	p.credit.Store(n)
	go func() {
		for p.credit.Load() > 0 {
			time.Sleep(time.Millisecond)
		}
		p.cut()
	}()
}

// freeze drops all bytes on the open connections; new ones work.
func (p *proxy) freeze() {
	for conn := range p.conns.Range {
		p.conns.Store(conn, true)
	}
}

type node struct {
	addr    string // host:port
	pidFile string // one line for each node
}

// startNode runs the launcher with flags such as "-restart", "3s", and waits for the first node.
func startNode(t testing.TB, flags ...string) *node {
	n := &node{addr: closedAddress(), pidFile: filepath.Join(t.TempDir(), "pid")}
	_, port, _ := net.SplitHostPort(n.addr)
	cmd := exec.Command(buildLauncher(), append(flags, "-port", port, "-pid", n.pidFile, "sleep", "3600")...)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	n.awaitResponse(t, "127.0.0.1")
	return n
}

// signal sends a signal such as "KILL" to a node, counted from 1.
func (n *node) signal(t testing.TB, signal string, number int) {
	out, err := exec.Command("sh", "-c", fmt.Sprintf("kill -%s $(sed -n %dp %s)", signal, number, n.pidFile)).CombinedOutput()
	check(t, err == nil, "signalling node %d: %v, %s", number, err, out)
}

// awaitResponse waits until the node at a host of the cluster responds to CQL, and returns a session.
func (n *node) awaitResponse(t testing.TB, host string) (db *gocql.Session) {
	_, port, _ := net.SplitHostPort(n.addr)
	await(t, 3*time.Minute, "responding at "+host, func() bool {
		var err error
		db, err = connect(net.JoinHostPort(host, port))
		return err == nil
	})
	t.Cleanup(db.Close)
	return db
}
