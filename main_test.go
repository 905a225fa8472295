// The tests talk to a real Cassandra, through the real routes and middleware.
// Most use the handler in process, on one keyspace that is thrown away. What
// needs an empty table, other settings, an outage or a memory reading starts
// the test binary again as the service, with a keyspace of its own.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
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

// useKeyspace makes the handler in process serve another keyspace for a test.
func useKeyspace(t testing.TB, name string) *session {
	t.Helper()
	c := global.cluster
	c.keyspace = name
	db, err := c.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	usual := global.session.Load()
	s := &session{Session: db, number: usual.number}
	global.session.Store(s)
	t.Cleanup(func() {
		global.session.Store(usual)
		closeSession(db)
	})
	return s
}

// insertUsers writes n users past the service and returns their ages by id.
// Their names have 100 characters: a thousand are a quarter of a megabyte.
func insertUsers(t testing.TB, db *session, n int, age func(i int) int) map[string]int {
	t.Helper()
	var next atomic.Int64
	var failure atomic.Value
	ids := make([]uuid.UUID, n)
	var writers sync.WaitGroup
	for range 64 {
		writers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && failure.Load() == nil; i = int(next.Add(1)) - 1 {
				u := user{ID: uuid.New(), Name: fmt.Sprintf("%0100d", i), Email: fmt.Sprintf("user%d@example.com", i), Age: age(i), CreatedAt: now(), UpdatedAt: now()}
				ids[i] = u.ID
				if err := db.Query(insertUser, u.columns()...).Exec(); err != nil {
					failure.Store(err)
				}
			}
		})
	}
	writers.Wait()
	if err := failure.Load(); err != nil {
		t.Fatal(err)
	}
	ages := make(map[string]int, n)
	for i, id := range ids {
		ages[id.String()] = age(i)
	}
	return ages
}

// crowd is a keyspace of 12 000 users that some tests read and none changes.
var crowd = struct {
	keyspace string
	once     sync.Once
	ages     map[string]int // by id; 120 users of each age from 0 to 99
}{keyspace: newKeyspaceName() + "_crowd"}

// useCrowd makes the handler in process serve the crowd, and returns it.
func useCrowd(t testing.TB) map[string]int {
	t.Helper()
	db := useKeyspace(t, crowd.keyspace)
	crowd.once.Do(func() { crowd.ages = insertUsers(t, db, 12_000, func(i int) int { return i % 100 }) })
	return crowd.ages
}

// listen puts the handler in process behind a real listener, as run does.
func listen(t testing.TB) (url string) {
	server := httptest.NewUnstartedServer(service)
	server.Config.ConnContext = limitSendBuffer
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return server.URL
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
	credit   int        // bytes that still pass
	changed  *sync.Cond // the credit
	conns    map[net.Conn]bool
}

// startProxy returns a proxy to target, a host:port.
func startProxy(t testing.TB, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: target, credit: math.MaxInt, conns: map[net.Conn]bool{}}
	p.changed = sync.NewCond(&p.mu)
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
		for p.credit <= 0 {
			p.changed.Wait()
		}
		p.credit -= n
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

// holdAfter lets about n more bytes pass and holds back all others until it is
// called again, or the connections are cut.
func (p *proxy) holdAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.credit = n
	p.changed.Broadcast()
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
		answer := decode[batchJSON](t, call(t, "POST", "/users/batch", batchOf(n, shortText), jsonHeader), http.StatusCreated)
		if answer.Count != n || len(answer.Created) != n {
			t.Fatalf("count = %d with %d users, want %d", answer.Count, len(answer.Created), n)
		}
		for i, u := range answer.Created {
			name, email := shortText(i)
			if u.Name != name || u.Email != email || u.Age != i {
				t.Errorf("created[%d] = %+v, want %s", i, u, name)
			}
			if got := decode[userJSON](t, call(t, "GET", "/users/"+u.ID, ""), http.StatusOK); got != u {
				t.Errorf("GET answers %+v, the batch answered %+v", got, u)
			}
		}
	}
}

func TestBatchThatIsRefusedWritesNothing(t *testing.T) {
	atLimits := func(int) (name, email string) { return textOf(4*maxName + maxEmail) }
	number, size := fill(maxBatchBytes + 1)
	tests := []struct {
		name, body string
		status     int
		want       string
	}{
		{"the last of 100 is invalid", strings.Replace(batchOf(100, shortText), `"age":99`, `"age":151`, 1), 422, `"errors":[{"pointer":"/99/age","detail":"must be from 0 to 150"}]`},
		{"two are invalid", `[{"name":"A","email":"a@b.c","age":1},{"name":"","email":"a@b.c","age":1},7]`, 422, `"errors":[{"pointer":"/1/name","detail":"must be text of 1 to 100 characters, not blank"},{"pointer":"/2","detail":"must be an object with name, email and age"}]`},
		{"none", `[]`, 422, `"errors":[{"pointer":"","detail":"must be an array of 1 to 100 users"}]`},
		{"101", batchOf(101, shortText), 422, `"errors":[{"pointer":"","detail":"must be an array of 1 to 100 users"}]`},
		{"100 at the limits of their fields", batchOf(100, atLimits), 413, `"detail":"The users of a batch may have 48000 bytes in all, these have 82400 (170 a user besides name and email); send them in several"`},
		{"one byte too many", batchOf(number, size), 413, `"detail":"The users of a batch may have 48000 bytes in all, these have 48001 (170 a user besides name and email); send them in several"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := counters.queries.Load()
			w := call(t, "POST", "/users/batch", tt.body, jsonHeader)
			if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
				t.Errorf("answer %d %s, want %d with %s", w.Code, w.Body, tt.status, tt.want)
			}
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
			answer := decode[batchJSON](t, call(t, "POST", "/users/batch", batchOf(tt.n, tt.text), jsonHeader), http.StatusCreated)
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
		w := call(t, "GET", fmt.Sprintf("/users/stream/pages?%s&fetch_size=%d", query, size), "")
		p := decode[pageJSON](t, w, http.StatusOK)
		if len(p.Users) > size || p.Users == nil || p.HasMore != (p.PageState != nil) {
			t.Fatalf("%d users at fetch_size %d, has_more %t, page_state %v", len(p.Users), size, p.HasMore, p.PageState)
		}
		if all = append(all, p.Users...); !p.HasMore {
			if link := w.Header().Get("Link"); link != "" {
				t.Errorf("Link = %q at the end", link)
			}
			return all
		}
		query = "page_state=" + *p.PageState
		if link, want := w.Header().Get("Link"), fmt.Sprintf(`</users/stream/pages?fetch_size=%d&%s>; rel="next"`, size, query); link != want {
			t.Errorf("Link = %q, want %q", link, want)
		}
	}
}

// walkList follows the Links of GET /users and returns all users.
func walkList(t testing.TB) (all []userJSON) {
	t.Helper()
	for target := "/users?limit=100"; target != ""; {
		w := call(t, "GET", target, "")
		all = append(all, decode[[]userJSON](t, w, http.StatusOK)...)
		target, _ = strings.CutPrefix(w.Header().Get("Link"), "<")
		target, _, _ = strings.Cut(target, ">")
	}
	return all
}

// stream returns all users of GET /users/stream.
func stream(t testing.TB, query string) []userJSON {
	t.Helper()
	return decode[[]userJSON](t, call(t, "GET", "/users/stream?"+query, ""), http.StatusOK)
}

// checkOnce fails unless the users are those of the crowd at least minAge old,
// each once.
func checkOnce(t testing.TB, users []userJSON, minAge int) {
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
	t.Run("stream", func(t *testing.T) { checkOnce(t, stream(t, ""), 0) })
	t.Run("pages of changing sizes", func(t *testing.T) {
		checkOnce(t, walkPages(t, "", 1000, 1, 999, 70, 5000), 0)
	})
	t.Run("lists", func(t *testing.T) { checkOnce(t, walkList(t), 0) })
	for _, age := range []int{1, 90, 99, 150} {
		t.Run(fmt.Sprintf("of age %d and older", age), func(t *testing.T) {
			checkOnce(t, stream(t, fmt.Sprintf("fetch_size=500&age_filter=%d", age)), age)
			checkOnce(t, walkPages(t, fmt.Sprintf("age_filter=%d", age), 1000, 100), age)
		})
	}
}

func TestNDJSONEqualsTheArray(t *testing.T) {
	useCrowd(t)
	for _, query := range []string{"", "?age_filter=150", "?limit=1"} {
		array := call(t, "GET", "/users/stream"+query, "")
		lines := call(t, "GET", "/users/stream"+query, "", "Accept: application/x-ndjson")
		want := strings.ReplaceAll(strings.Trim(array.Body.String(), "[]\n"), "},{", "}\n{") + "\n"
		if want == "\n" {
			want = ""
		}
		if lines.Body.String() != want {
			t.Errorf("%s: NDJSON of %d bytes differs from the array of %d bytes", query, lines.Body.Len(), array.Body.Len())
		}
		if got := lines.Header().Get("Content-Type") + array.Header().Get("Content-Type"); got != ndjson+"application/json" {
			t.Errorf("%s: types %s", query, got)
		}
		if lines.Header().Get("Vary") != "Accept" || array.Header().Get("Vary") != "Accept" {
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

// startBehindProxy runs the service over the crowd, with a proxy to fail it.
func startBehindProxy(t *testing.T) (*process, *proxy) {
	t.Helper()
	useCrowd(t)
	p := startProxy(t, cassandraAddress())
	s := startService(t, append(p.settings(), "CASSANDRA_KEYSPACE="+crowd.keyspace)...)
	s.awaitHealthy(t, 15*time.Second)
	return s, p
}

const crowdPage = 250_000 // bytes, less than 1000 users of the crowd take in JSON, more than from Cassandra

func TestFirstUsersComeAfterOnePage(t *testing.T) {
	s, p := startBehindProxy(t)
	p.holdAfter(crowdPage)
	answer, err := http.Get(s.url + "/users/stream?fetch_size=1000&limit=11000")
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
	p.holdAfter(math.MaxInt)
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

// checkCut fails unless curl saw that its stream was cut, and NDJSON ends in a
// problem.
func checkCut(t *testing.T, curl *exec.Cmd, file string, isNDJSON bool) {
	t.Helper()
	curl.Wait()
	if code := curl.ProcessState.ExitCode(); code != 18 {
		t.Errorf("curl exits %d, want 18: partial file", code)
	}
	body, _ := os.ReadFile(file)
	if !isNDJSON {
		if json.Valid(body) {
			t.Errorf("what came of the array is valid JSON")
		}
		return
	}
	lines := strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")
	var p problem
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &p); err != nil || p.Status != http.StatusServiceUnavailable || p.RequestID == "" {
		t.Errorf("the last line is %s, want a problem with status 503", lines[len(lines)-1])
	}
}

func TestCutStreamIsSeenAsCut(t *testing.T) {
	s, p := startBehindProxy(t)
	for _, accept := range []string{"application/json", ndjson} {
		p.holdAfter(2 * crowdPage)
		curl, file := streamByCurl(t, s.url+"/users/stream?fetch_size=1000", "--header", "Accept: "+accept)
		p.cut()
		checkCut(t, curl, file, accept == ndjson)
		s.awaitHealthy(t, 15*time.Second)
		if users := s.stream(t); len(users) != len(crowd.ages) {
			t.Errorf("%d users after the cut, want %d", len(users), len(crowd.ages))
		}
	}
}

// stream returns all that the process streams.
func (p *process) stream(t testing.TB) (users []userJSON) {
	t.Helper()
	answer, err := http.Get(p.url + "/users/stream")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if err := json.NewDecoder(answer.Body).Decode(&users); err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("status = %d, %v", answer.StatusCode, err)
	}
	return users
}

func TestStreamThatFailsBeforeItsFirstPage(t *testing.T) {
	s, p := startBehindProxy(t)
	tests := []struct {
		name   string
		fail   func()
		status int
		detail string
	}{
		{"Cassandra is silent", func() { p.swallow(true) }, http.StatusGatewayTimeout, "timeout: the deadline passed before the answer was there"},
		{"Cassandra is gone", func() { p.listener.Close(); p.cut() }, http.StatusServiceUnavailable, "Cassandra is not available; try again in a moment"},
	}
	for _, tt := range tests {
		tt.fail()
		for _, target := range []string{"/users/stream", "/users/stream?age_filter=50", "/users/stream/pages"} {
			r, _ := http.NewRequest("GET", s.url+target, nil)
			r.Header.Set("X-Request-Timeout", "0.5")
			r.Header.Set("Accept", ndjson)
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			var p problem
			err = json.NewDecoder(answer.Body).Decode(&p)
			if err != nil || answer.StatusCode != tt.status || p.Detail != tt.detail || answer.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s: %s answers %d %+v, %v; want %d %q", tt.name, target, answer.StatusCode, p, err, tt.status, tt.detail)
			}
		}
	}
}

// openReader sends a GET and reads n bytes of the answer, with a small buffer:
// what it leaves the service has to keep.
func openReader(t testing.TB, url, target string, n int64) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.(*net.TCPConn).SetReadBuffer(4096)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", target)
	if _, err := io.CopyN(io.Discard, conn, n); err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestStreamsLeaveNothingBehind(t *testing.T) {
	useCrowd(t)
	url := listen(t)
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
		w := call(t, "GET", "/users/stream", "")
		if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), "Too many streams at once") {
			t.Errorf("one stream more: %d %s", w.Code, w.Body)
		}
		for _, reader := range readers {
			reader.Close()
		}
		checkGone(t)
	})
}

// firstToken returns the page_state after the first page of the query.
func firstToken(t testing.TB, query string) string {
	t.Helper()
	p := decode[pageJSON](t, call(t, "GET", "/users/stream/pages?"+query, ""), http.StatusOK)
	if p.PageState == nil {
		t.Fatalf("no page_state after %s", query)
	}
	return *p.PageState
}

// checkStartAgain fails unless the answer says that page_state is not right.
func checkStartAgain(t testing.TB, what string, w *httptest.ResponseRecorder) {
	t.Helper()
	var p problem
	json.Unmarshal(w.Body.Bytes(), &p)
	if w.Code != http.StatusUnprocessableEntity || len(p.Errors) != 1 || p.Errors[0].Parameter != "page_state" || !strings.HasSuffix(p.Errors[0].Detail, "; start again without page_state") {
		t.Errorf("%s: answer %d %s", what, w.Code, w.Body)
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
		checkStartAgain(t, what, call(t, "GET", pages+url.QueryEscape(text), ""))
	}
	list := call(t, "GET", "/users", "").Header().Get("Link")
	_, list, _ = strings.Cut(list, "page_state=")
	list, _, _ = strings.Cut(list, ">")
	checkStartAgain(t, "another age_filter", call(t, "GET", pages+token+"&age_filter=31", ""))
	checkStartAgain(t, "age_filter=0", call(t, "GET", pages+token+"&age_filter=0", ""))
	checkStartAgain(t, "of GET /users", call(t, "GET", pages+list, ""))
	checkStartAgain(t, "at GET /users", call(t, "GET", "/users?page_state="+token, ""))
	checkStartAgain(t, "with 422 for HEAD", call(t, "HEAD", pages+"x", ""))
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
			p := decode[pageJSON](t, call(t, "GET", "/users/stream/pages?page_state="+token+tt.query, ""), http.StatusOK)
			if p.HasMore || !slices.Equal(p.Users, want[10:]) {
				t.Errorf("has_more %t, users %+v, want %+v", p.HasMore, p.Users, want[10:])
			}
		})
	}
	t.Run("at another instance", func(t *testing.T) {
		other := startService(t, "CASSANDRA_KEYSPACE="+crowd.keyspace)
		other.awaitHealthy(t, 15*time.Second)
		answer, err := http.Get(other.url + "/users/stream/pages?page_state=" + token)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		var p pageJSON
		if err := json.NewDecoder(answer.Body).Decode(&p); err != nil || p.HasMore || !slices.Equal(p.Users, want[10:]) {
			t.Errorf("status %d, %v, users %+v, want %+v", answer.StatusCode, err, p.Users, want[10:])
		}
	})
}

// A checksum is no signature: whoever reads the code can make a token. It may
// then lead to other rows, but never to a 500.
func TestForgedPageTokens(t *testing.T) {
	useCrowd(t)
	real := parseToken(firstToken(t, "fetch_size=10"), pagesToken)
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
		w := call(t, "GET", "/users/stream/pages?fetch_size=10&page_state="+s.token(pagesToken), "")
		if w.Code != tt.status {
			t.Errorf("%s: status = %d, want %d; %s", tt.name, w.Code, tt.status, w.Body)
		}
		if w.Code == http.StatusUnprocessableEntity {
			checkStartAgain(t, tt.name, w)
		}
	}
	for range 300 { // a few bytes of the paging state at random
		s := *real
		s.state = bytes.Clone(real.state)
		for range 1 + rand.IntN(3) {
			s.state[rand.IntN(len(s.state))] = byte(rand.IntN(256))
		}
		w := call(t, "GET", "/users/stream/pages?fetch_size=10&page_state="+s.token(pagesToken), "")
		if w.Code != http.StatusOK && w.Code != http.StatusUnprocessableEntity {
			t.Errorf("the paging state %x: %d %s", s.state, w.Code, w.Body)
		}
	}
}

// FuzzPageToken gives parseToken bytes under a checksum that is right: it must
// neither panic nor return a scan that can't go on.
func FuzzPageToken(f *testing.F) {
	for _, s := range []*scan{newScan(noAgeFilter, unlimited), newScan(30, 7), {minAge: 150, left: 1, after: -1, upto: 1, state: []byte("state")}} {
		b, _ := base64.RawURLEncoding.DecodeString(s.token(pagesToken))
		f.Add(b[:len(b)-4])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
		s := parseToken(base64.RawURLEncoding.EncodeToString(b), pagesToken)
		if s == nil {
			return
		}
		if end := s.nextBound(); !s.more() || s.after >= s.upto || end <= s.after {
			t.Errorf("%+v ends at %d", s, end)
		}
		if again := parseToken(s.token(pagesToken), pagesToken); again == nil || !reflect.DeepEqual(again, s) {
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
