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
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
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
	benchRounds = 5                      // of all ways in turn; the median counts
	benchTime   = 400 * time.Millisecond // of one way in one round, at least
)

// compare reports the rate of each way, and its ratio to that of the first.
func compare(b *testing.B, clients int, ways []way) {
	b.Helper()
	for b.Loop() {
		rates := make([][]float64, len(ways))
		for range benchRounds {
			for i, w := range ways {
				rates[i] = append(rates[i], rateOf(b, clients, w.do))
			}
		}
		for i, w := range ways {
			slices.Sort(rates[i])
			b.ReportMetric(median(rates[i]), w.name+"/s")
			if i > 0 {
				b.ReportMetric(median(rates[i])/median(rates[0]), w.name+":"+ways[0].name)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

func median(sorted []float64) float64 { return sorted[len(sorted)/2] }

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

func overHTTP(method, url, body string, wantStatus int) error {
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := benchClient.Do(r)
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
func inProcess(method, target, body string, wantStatus int) error {
	r, err := http.NewRequest(method, target, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body == "" {
		r.Body = http.NoBody // as the server has it
	}
	r.Header.Set("Content-Type", "application/json")
	w := &discardWriter{header: http.Header{}}
	service.ServeHTTP(w, r)
	if w.status != wantStatus {
		return fmt.Errorf("status = %d, want %d", w.status, wantStatus)
	}
	return nil
}

// discardWriter is a http.ResponseWriter that keeps only the status.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header         { return w.header }
func (w *discardWriter) WriteHeader(status int)      { w.status = status }
func (w *discardWriter) Flush()                      {}
func (w *discardWriter) Write(p []byte) (int, error) { return len(p), nil }

// The naive handlers are what one would write first: no deadline, no cap, no
// ids, no metrics, no problem answers.
func naiveGet(w http.ResponseWriter, r *http.Request) {
	id, err := gocql.ParseUUID(r.PathValue("id"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	u := user{ID: uuid.UUID(id)}
	if err := global.session.Load().Query(selectUser, id).Scan(&u.Name, &u.Email, &u.Age, (*int64)(&u.CreatedAt), (*int64)(&u.UpdatedAt)); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(u)
}

func naivePost(w http.ResponseWriter, r *http.Request) {
	var u struct {
		Name, Email string
		Age         int
	}
	if err := json.NewDecoder(r.Body).Decode(&u); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	id, at := gocql.MustRandomUUID(), time.Now()
	if err := global.session.Load().Query(insertUser, id, u.Name, u.Email, u.Age, at, at).Exec(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(map[string]any{"id": id, "name": u.Name, "email": u.Email, "age": u.Age, "created_at": at, "updated_at": at})
}

// servers starts the naive handlers and the real one over loopback HTTP.
func servers(b *testing.B) (naive, real string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /users/{id}", naiveGet)
	mux.HandleFunc("POST /users", naivePost)
	n, r := httptest.NewServer(mux), httptest.NewServer(service)
	b.Cleanup(func() { n.Close(); r.Close() })
	return n.URL, r.URL
}

const aBody = `{"name":"Ada Lovelace","email":"ada@example.com","age":36}`

func atClients(b *testing.B, bench func(b *testing.B, clients int)) {
	for _, clients := range []int{1, 32, 128} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) { bench(b, clients) })
	}
}

func BenchmarkReads(b *testing.B) {
	naive, real := servers(b)
	id := aUser(b).ID
	parsed := gocql.UUID(uuid.MustParse(id))
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				var u user
				return 1, db.Query(selectUser, parsed).Scan(&u.Name, &u.Email, &u.Age, (*int64)(&u.CreatedAt), (*int64)(&u.UpdatedAt))
			}},
			{"handler", func() (int, error) { return 1, inProcess("GET", "/users/"+id, "", 200) }},
			{"naive", func() (int, error) { return 1, overHTTP("GET", naive+"/users/"+id, "", 200) }},
			{"http", func() (int, error) { return 1, overHTTP("GET", real+"/users/"+id, "", 200) }},
		})
	})
}

func BenchmarkCreates(b *testing.B) {
	naive, real := servers(b)
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				at := time.Now()
				return 1, db.Query(insertUser, gocql.UUID(uuid.New()), "Ada Lovelace", "ada@example.com", 36, at, at).Exec()
			}},
			{"handler", func() (int, error) { return 1, inProcess("POST", "/users", aBody, 201) }},
			{"naive", func() (int, error) { return 1, overHTTP("POST", naive+"/users", aBody, 201) }},
			{"http", func() (int, error) { return 1, overHTTP("POST", real+"/users", aBody, 201) }},
		})
	})
}

// BenchmarkUpdates changes one of many users at a time: lightweight transactions
// on the same one would wait for each other.
func BenchmarkUpdates(b *testing.B) {
	_, real := servers(b)
	var ids []string
	for range 1000 {
		ids = append(ids, aUser(b).ID)
	}
	one := func() string { return ids[rand.IntN(len(ids))] }
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) {
				id := gocql.UUID(uuid.MustParse(one()))
				if _, err := db.Query(updateUser, "Ada", "ada@example.com", 36, time.Now(), id).ScanCAS(); err != nil {
					return 0, err
				}
				var u user
				return 1, db.Query(selectUser, id).Scan(&u.Name, &u.Email, &u.Age, (*int64)(&u.CreatedAt), (*int64)(&u.UpdatedAt))
			}},
			{"handler", func() (int, error) { return 1, inProcess("PUT", "/users/"+one(), aBody, 200) }},
			{"http", func() (int, error) { return 1, overHTTP("PUT", real+"/users/"+one(), aBody, 200) }},
		})
	})
}

func BenchmarkLists(b *testing.B) {
	_, real := servers(b)
	loadUsers(b, 100_000)
	atClients(b, func(b *testing.B, clients int) {
		compare(b, clients, []way{
			{"bare", func() (int, error) { return bareScan(100, 1) }},
			{"handler", func() (int, error) { return 100, inProcess("GET", "/users?limit=100", "", 200) }},
			{"http", func() (int, error) { return 100, overHTTP("GET", real+"/users?limit=100", "", 200) }},
		})
	})
}

func BenchmarkBatches(b *testing.B) {
	_, real := servers(b)
	body := "[" + strings.TrimSuffix(strings.Repeat(aBody+",", maxBatch), ",") + "]"
	db := global.session.Load()
	atClients(b, func(b *testing.B, clients int) {
		compare(b, min(clients, 32), []way{
			{"bare", func() (int, error) {
				batch := db.NewBatch(gocql.LoggedBatch)
				for range maxBatch {
					batch.Query(insertUser, gocql.UUID(uuid.New()), "Ada Lovelace", "ada@example.com", 36, time.Now(), time.Now())
				}
				return maxBatch, db.ExecuteBatch(batch)
			}},
			{"handler", func() (int, error) { return maxBatch, inProcess("POST", "/users/batch", body, 201) }},
			{"http", func() (int, error) { return maxBatch, overHTTP("POST", real+"/users/batch", body, 201) }},
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
				target := fmt.Sprintf("/users/stream?fetch_size=%d", fetchSize)
				compare(b, 1, []way{
					{"bare", func() (int, error) { return bareScan(fetchSize, math.MaxInt32) }},
					{"handler", func() (int, error) { return size, inProcess("GET", target, "", 200) }},
					{"http", func() (int, error) { return size, overHTTP("GET", real+target, "", 200) }},
				})
				reportMemory(b, func() int { inProcess("GET", target, "", 200); return size })
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
	var next atomic.Int64
	var loading sync.WaitGroup
	for range 64 {
		loading.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				at := now()
				u := user{ID: uuid.New(), Name: fmt.Sprintf("User %d", i), Email: fmt.Sprintf("user%d@example.com", i), Age: int(i % 100), CreatedAt: at, UpdatedAt: at}
				if err := createUser(b.Context(), u); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	loading.Wait()
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
