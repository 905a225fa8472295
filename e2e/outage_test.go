package e2e

import (
	"encoding/pem"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestStartWithoutCassandra(t *testing.T) {
	t.Parallel()
	addr, began := closedAddress(), time.Now()
	s := start(t, cassandraAt(addr)...)
	check(t, time.Since(began) < 3*time.Second, "listening after %s, want within a second", time.Since(began))
	want(t, s.do("GET /", ""), 200)
	for range 5 {
		s.doEverything(func(r response) { want(t, r, 503, notAvailable) })
	}
	want(t, s.do("GET /health", ""), 503, `"status":"unhealthy"`, `"cassandra":"disconnected"`, `"cassandra_connected":false`)
	await(t, 8*time.Second, "retrying", func() bool { return s.metrics(t).Connections.Failed > 4 })
	n, lines := strings.Count(s.log(), `msg="cannot connect to Cassandra; retrying"`), strings.Count(s.log(), "\n")
	check(t, n == 1 && lines <= 4, "%d lines about the outage, want one per 10 s and none per request:\n%s", n, s.log())
	startProxy(t, addr, cassandraAddress())
	s.awaitHealthy(t, 15*time.Second)
	want(t, s.do("GET /users", ""), 200, "[]\n")
}

var selfTests = []string{"query_error", "streaming_error", "concurrent_streams", "nested_contexts", "cancellation"}

// doEverything concurrently sends requests to all endpoints that need Cassandra, except the slow queries.
func (s *service) doEverything(verify func(response), headers ...string) {
	requests := []string{
		"GET /users", "GET /users/stream", "GET /users/stream?age_filter=30", "GET /users/stream/pages", "GET " + missingUser,
		"POST /users " + ada, "POST /users/batch " + batchOf(2, ada), "PUT " + missingUser + " " + ada, "PATCH " + missingUser + " " + ada,
		"DELETE " + missingUser, "GET /performance/async", "GET /performance/sync", "GET /context_manager_safety/status",
	}
	for _, name := range selfTests {
		requests = append(requests, "POST /context_manager_safety/"+name)
	}
	concurrently(len(requests), func(i int) {
		parts := append(strings.SplitN(requests[i], " ", 3), "")
		verify(s.do(parts[0]+" "+parts[1], parts[2], headers...))
	})
}

func TestDroppedTableIsCreatedAgain(t *testing.T) {
	t.Parallel()
	s := startHealthy(t)
	for _, drop := range []string{"DROP TABLE " + s.keyspace + ".users", "DROP KEYSPACE " + s.keyspace} {
		must(t, admin.Query(drop).Exec())
		await(t, 15*time.Second, "writing again", func() bool { return s.do("POST /users", ada).status == 201 })
		s.awaitHealthy(t, 15*time.Second)
	}
}

func TestSettingsOfACluster(t *testing.T) {
	t.Parallel()
	for setting, healthy := range map[string]bool{
		"CASSANDRA_DATACENTER=datacenter1": true, "CASSANDRA_DATACENTER=nowhere": false, "CASSANDRA_REPLICATION=datacenter1:1": true,
		"CASSANDRA_REPLICATION=3": false, "CASSANDRA_REPLICATION=nowhere:1": false, "CASSANDRA_CONSISTENCY=ALL": true,
	} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			s := start(t, setting)
			if healthy {
				s.awaitHealthy(t, 30*time.Second)
				s.createUser(t)
				return
			}
			reason := regexp.MustCompile(`level=(WARN|ERROR) .*(filtered|nowhere|LOCAL_QUORUM)`)
			await(t, time.Minute, "logging a reason", func() bool {
				return want(t, s.do("POST /users", ada), 503) && reason.MatchString(s.log())
			})
			want(t, s.do("GET /health", ""), 503)
		})
	}
	cmd := exec.Command(buildService())
	cmd.Env = append(os.Environ(), "CASSANDRA_CONSISTENCY=ONE")
	out, _ := cmd.CombinedOutput()
	named := strings.HasPrefix(string(out), `cassandra-service-go: CASSANDRA_CONSISTENCY must be `)
	check(t, named && cmd.ProcessState.ExitCode() == 1, "%s; output %s", cmd.ProcessState, out)
}

func TestTLSIsVerified(t *testing.T) {
	t.Parallel()
	server := httptest.NewTLSServer(nil) // its certificate is for 127.0.0.1 and its own CA
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600)
	at := append(cassandraAt(startProxy(t, anyPort, cassandraAddress(), server.TLS.Certificates...).addr), "CASSANDRA_TLS_CA="+ca)
	startHealthy(t, at...)
	start(t, append(at, "CASSANDRA_HOSTS=localhost")...).awaitRefusal(t, "certificate is valid for example.com, *.example.com, not localhost")
}

// awaitRefusal waits until the log says why the service cannot connect.
func (s *service) awaitRefusal(t testing.TB, reason string) {
	line := regexp.MustCompile(`level=WARN msg="cannot connect to Cassandra; retrying" hosts=.* error=".*` + regexp.QuoteMeta(reason))
	await(t, 30*time.Second, "logging "+reason, func() bool { return line.MatchString(s.log()) })
	want(t, s.do("GET /health", ""), 503)
	want(t, s.do("GET /users", ""), 503)
}

func TestDeadlinesWithSilentCassandra(t *testing.T) {
	s, proxy := startBehindProxy(t)
	before := s.metrics(t)
	proxy.credit.Store(0)
	wantWithin := func(r response, status int, least, most time.Duration) {
		check(t, want(t, r, status) && r.took >= least && r.took <= most, "%s; want it after %s to %s", r, least, most)
	}
	var others sync.WaitGroup
	others.Go(func() { s.do("DELETE "+missingUser, "", "X-Request-Timeout: 5") }) // prepares a statement that others need, too
	others.Go(func() { wantWithin(s.do("GET /health", ""), 503, 0, 6*time.Second) })
	s.awaitInFlight(t, 2)
	s.doEverything(func(r response) {
		wantWithin(r, 504, 500*time.Millisecond, 1500*time.Millisecond)
		want(t, r, 504, `"detail":"timeout`)
	}, "X-Request-Timeout: 0.5")
	wantWithin(s.do("GET /health", "", "X-Request-Timeout: 0.1"), 503, 0, 300*time.Millisecond)
	wantWithin(s.do("GET /", ""), 200, 0, 300*time.Millisecond)
	wantWithin(s.do("GET /metrics", ""), 200, 0, 300*time.Millisecond)
	others.Wait()
	proxy.credit.Store(math.MaxInt64)
	t.Parallel() // the rest waits until the service closes the old session
	s.awaitHealthy(t, 15*time.Second)
	s.awaitQuiet(t, before)
}

// outage fails a service's only Cassandra and checks how quickly the service detects the failure and the recovery.
func outage(t *testing.T, s *service, fail, mend func()) {
	fail()
	await(t, 9*time.Second, "unhealthy", func() bool { return s.do("GET /health", "").status == 503 })
	mend()
	s.awaitHealthy(t, 15*time.Second)
}

func TestFrozenConnectionsAreReplaced(t *testing.T) {
	t.Parallel()
	s, proxy := startBehindProxy(t)
	outage(t, s, proxy.freeze, func() {}) // the driver alone closes such connections after 96 s
	m := s.metrics(t)
	check(t, m.Cassandra.Session == 2 && m.Cassandra.Connected, "cassandra = %+v, want the second session", m.Cassandra)
}

const absent = -1 // the age of a user that does not exist

// load is a steady load. Each client creates, reads, changes and deletes users of its own, one after another, and records
// which states the responses allow.
type load struct {
	t       testing.TB
	s       *service
	name    string
	stopped atomic.Bool
	clients sync.WaitGroup
	failed  atomic.Int64 // when a request last failed, in nanoseconds
	ages    sync.Map     // by name: the ages that a user may have
	tallies map[string]*tally
}

type tally struct{ requests, failed, slow atomic.Int64 }

func startLoad(t testing.TB, s *service, clients int) *load {
	l := &load{t: t, s: s, name: fmt.Sprint("load-", time.Now().UnixNano()), tallies: map[string]*tally{
		"GET /users/stream": {}, "POST /users": {}, "GET /users": {}, "PUT /users": {}, "DELETE /users": {},
	}}
	for n := range clients {
		l.clients.Go(func() {
			for i := 0; !l.stopped.Load(); i++ {
				l.userLifecycle(fmt.Sprintf("%s-%d-%d", l.name, n, i), i%2 == 0, i%4 < 2)
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return l
}

// do sends a request, which may fail with 503 or 504.
func (l *load) do(request, body string, status int, headers ...string) response {
	r := l.s.do(request, body, headers...)
	tally := l.tallies[regexp.MustCompile("[A-Z]+ /users(/stream)?").FindString(request)]
	tally.requests.Add(1)
	if r.took > 3*time.Second {
		tally.slow.Add(1)
	}
	if r.status != status {
		check(l.t, r.status == 503 || r.status == 504, "%s; want %d", r, status)
		tally.failed.Add(1)
		l.failed.Store(time.Now().UnixNano())
	}
	return r
}

// userLifecycle creates and reads a user, and then deletes or changes it. A POST with a key is repeated until it succeeds.
func (l *load) userLifecycle(name string, deletes, hasKey bool) {
	ages, header := []int{absent}, ""
	if hasKey {
		header = "Idempotency-Key: " + name
	}
	change := func(request string, age, status int) (path string, ok bool) {
		r := l.do(request, fmt.Sprintf(`{"name":%q,"email":"ada@example.com","age":%d}`, name, age), status, header)
		switch r.status {
		case status:
			ages = []int{age}
		case 504: // perhaps done
			ages = append(ages, age)
		}
		return r.header.Get("Location"), r.status == status
	}
	path, ok := change("POST /users", 1, 201)
	for hasKey && !ok && !l.t.Failed() {
		time.Sleep(20 * time.Millisecond)
		path, ok = change("POST /users", 1, 201)
	}
	if ok {
		l.do("GET "+path, "", 200)
		if deletes {
			change("DELETE "+path, absent, 204)
		} else {
			change("PUT "+path, 2, 200)
		}
	}
	l.ages.Store(name, ages)
}

func (l *load) created() int64 { return l.s.metrics(l.t).ByRoute["POST /users"]["201"] }

// check ends the load and compares every user with the states that its responses allow.
func (l *load) check() {
	l.stopped.Store(true)
	l.clients.Wait()
	stored := map[string]int{}
	for _, u := range decode[[]user](l.t, l.s.do("GET /users/stream", "", "X-Request-Timeout: 60"), 200) {
		_, isTwice := stored[u.Name]
		check(l.t, !isTwice, "%s was created twice", u.Name)
		stored[u.Name] = u.Age
	}
	for name, ages := range l.ages.Range {
		age, exists := stored[name.(string)]
		if !exists {
			age = absent
		}
		check(l.t, slices.Contains(ages.([]int), age), "%s has age %d, want one of %v (%d: absent)", name, age, ages, absent)
	}
}

func TestCutConnectionsLoseNothing(t *testing.T) {
	s, proxy := startBehindProxy(t)
	l := startLoad(t, s, 8)
	l.clients.Go(func() { // a cut proves nothing about the session
		for i := 0; !l.stopped.Load(); i++ {
			r := s.do("POST /context_manager_safety/"+selfTests[i%len(selfTests)], "")
			check(t, r.status == 503 || r.status == 504 || r.status == 200 && !strings.Contains(r.body, ":false"), "%s", r)
		}
	})
	for range 12 {
		before := l.created()
		proxy.cut()
		await(t, 15*time.Second, "writing after a cut", func() bool { return l.created() > before+20 })
	}
	l.check()
}

func TestCredentialsAreChecked(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-auth")
	at := append(cassandraAt(n.addr), "CASSANDRA_USERNAME=cassandra", "CASSANDRA_PASSWORD=cassandra")
	startHealthy(t, at...)
	start(t, append(at, "CASSANDRA_USERNAME=", "CASSANDRA_PASSWORD=")...).awaitRefusal(t, "authentication required")
	s := start(t, append(at, "CASSANDRA_PASSWORD=s3cret-typo")...)
	s.awaitRefusal(t, "Provided username cassandra and/or password are incorrect")
	check(t, !strings.Contains(s.log(), "s3cret-typo"), "the log has the password")
}

// The only node is killed and later suspended under load, and advertises its address or one that is reserved for documentation.
func TestOnlyNodeFails(t *testing.T) {
	needsLong(t)
	for _, flags := range [][]string{{"-restart", "2s"}, {"-restart", "2s", "-rpc-address", "203.0.113.7"}} {
		n := startNode(t, flags...)
		s := startHealthy(t, cassandraAt(n.addr)...)
		l := startLoad(t, s, 32)
		kill := func() { n.signal(t, "KILL", 1) }
		mend := func() { n.awaitResponse(t, "127.0.0.1") }
		for range 3 {
			outage(t, s, kill, mend)
			back := time.Now()
			time.Sleep(12 * time.Second) // of load: a session that responds once can still die
			late := time.Unix(0, l.failed.Load()).Sub(back)
			check(t, late < 5*time.Second, "a request failed %s after Cassandra's first response", late)
		}
		outage(t, s, func() { n.signal(t, "STOP", 1) }, func() {
			time.Sleep(20 * time.Second)
			n.signal(t, "CONT", 1)
		})
		kill()
		second := start(t, cassandraAt(n.addr)...) // during the outage
		second.awaitRefusal(t, "unable to connect to initial hosts")
		mend()
		s.awaitHealthy(t, 15*time.Second)
		second.awaitHealthy(t, 15*time.Second)
		l.check()
	}
}

// withstand puts a service under a load of all kinds of requests, of which few may fail or be slow. It returns their rate.
func (s *service) withstand(t testing.TB, during time.Duration) (perSecond float64) {
	l := startLoad(t, s, 12)
	for end := time.Now().Add(during); time.Now().Before(end); {
		l.do("GET /users/stream?limit=100", "", 200)
	}
	l.check()
	for endpoint, tally := range l.tallies {
		n, failed, slow := tally.requests.Load(), tally.failed.Load(), tally.slow.Load()
		t.Logf("%s: %d requests, %d failed, %d took over 3 s", endpoint, n, failed, slow)
		check(t, failed*50 <= n && slow*50 <= n, "%s: more than 2 %% failed or were slow", endpoint)
		perSecond += float64(n) / during.Seconds()
	}
	return perSecond
}

type hostFailure struct {
	name       string
	host       int
	during     time.Duration
	logged     int // lines
	fail, mend func()
}

// wantShare waits 3 s, then checks that a host gets its share of the requests again.
func (s *service) wantShare(t *testing.T, host int, proxies [3]*proxy) {
	time.Sleep(3 * time.Second)
	for _, p := range proxies {
		p.passed.Store(0)
	}
	s.withstand(t, 3*time.Second)
	share, all := proxies[host].passed.Load(), proxies[0].passed.Load()+proxies[1].passed.Load()+proxies[2].passed.Load()
	check(t, share*10 > all, "3 s later host %d gets %d of %d bytes, want about a third", host, share, all)
}

// One of three nodes hangs or is killed, or its network stalls or delays everything. The others take over.
func TestSilentHosts(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-nodes", "3", "-rpc-address", "127.0.0.11", "-restart", "1m")
	n.awaitResponse(t, "127.0.0.3")
	_, port, _ := net.SplitHostPort(n.addr)
	var proxies [3]*proxy
	for i := range proxies {
		proxies[i] = startProxy(t, fmt.Sprintf("127.0.0.%d:%s", 11+i, port), fmt.Sprintf("127.0.0.%d:%s", 1+i, port))
	}
	settings := append(cassandraAt(proxies[0].addr), "CASSANDRA_REPLICATION=3")
	s := startHealthy(t, settings...)
	await(t, time.Minute, "connecting to three hosts", func() bool { return s.metrics(t).Cassandra.Hosts == 3 })
	normal := s.withstand(t, 10*time.Second)
	stop := func(signal string, i int) func() { return func() { n.signal(t, signal, i+1) } }
	pass := func(i int, bytes int64) func() { return func() { proxies[i].credit.Store(bytes) } }
	delay := func(i int, d time.Duration) func() { return func() { proxies[i].delay.Store(int64(d)) } }
	awaitRestart := func() {
		startHealthy(t, settings...) // creates a keyspace without schema agreement, since one node is dead
		n.awaitResponse(t, "127.0.0.3")
		time.Sleep(20 * time.Second) // until the nodes know each other again
	}
	for _, f := range []hostFailure{
		{"hangs", 1, 30 * time.Second, 1, stop("STOP", 1), stop("CONT", 1)},
		{"hangs", 2, 20 * time.Second, 1, stop("STOP", 2), stop("CONT", 2)},
		{"is stalled", 0, 20 * time.Second, 1, pass(0, 0), pass(0, math.MaxInt64)},
		{"is delayed", 1, 20 * time.Second, 1, delay(1, time.Second), delay(1, 0)},
		{"is killed", 2, 20 * time.Second, 0, stop("KILL", 2), awaitRestart}, // its connections close
	} {
		logged := func() int { return strings.Count(s.log(), `msg="a host does not respond"`) }
		before := logged()
		f.fail()
		rate := s.withstand(t, f.during)
		t.Logf("host %d %s: %.0f requests/s, %.0f before", f.host, f.name, rate, normal)
		check(t, rate > .4*normal && logged() >= before+f.logged, "want 40 %% of the normal rate, and %d lines in the log", f.logged)
		f.mend()
		s.wantShare(t, f.host, proxies)
	}
	check(t, s.metrics(t).Cassandra.Session == 1, "a session was replaced")
}

// The only node is far away, from the start or only later. It is slow, but healthy, and no query is sent twice.
func TestFarNode(t *testing.T) {
	needsLong(t)
	keyspace := inKeyspace + startHealthy(t).keyspace
	for _, roundTrip := range []time.Duration{300 * time.Millisecond, 600 * time.Millisecond, time.Second} {
		for _, isFarFirst := range []bool{true, false} {
			p := startProxy(t, anyPort, cassandraAddress())
			p.delay.Store(map[bool]int64{true: int64(roundTrip / 2)}[isFarFirst])
			s := start(t, append(cassandraAt(p.addr), keyspace)...)
			s.awaitHealthy(t, 3*20*roundTrip)
			p.delay.Store(int64(roundTrip / 2))
			time.Sleep(10 * time.Second) // of pings
			before := s.metrics(t).Queries
			concurrently(11, func(i int) { want(t, s.do([]string{"GET /users/stream", "GET /users"}[min(i, 1)], ""), 200) })
			m := s.metrics(t)
			sent, session := m.Queries-before, m.Cassandra.Session
			check(t, sent == 11 && session == 1, "11 requests took %d queries in session %d, want 11 in 1", sent, session)
		}
	}
}

// A node that clients can reach, but that is cut off from the other two, refuses queries. The test runs itself and the
// nodes in a network namespace, in which routes to one node can be blocked.
func TestNodeIsCutOff(t *testing.T) {
	needsLong(t)
	if os.Getenv("IN_NAMESPACE") == "" {
		cmd := exec.Command("unshare", "--net", "sh", "-c", "ip link set lo up && ip rule add pref 9 lookup local && ip rule del pref 0 && "+
			`exec "$@"`, "sh", buildLauncher(), "-nodes", "3", os.Args[0], "-test.run=^TestNodeIsCutOff$", "-test.v", "-long")
		cmd.Env = append(os.Environ(), "IN_NAMESPACE=yes")
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), "ready in") {
			t.Skipf("network namespaces need root and iproute2: %v, %s", err, out)
		}
		check(t, err == nil, "%s", out)
		return
	}
	s := startHealthy(t)
	await(t, time.Minute, "connecting to three hosts", func() bool { return s.metrics(t).Cassandra.Hosts == 3 })
	s.withstand(t, 10*time.Second)
	for _, rule := range []string{"to 127.0.0.2 dport 7000", "from 127.0.0.2 dport 7000", "from 127.0.0.2 sport 7000"} {
		out, err := exec.Command("sh", "-c", "ip rule add pref 5 ipproto tcp blackhole "+rule).CombinedOutput()
		check(t, err == nil, "%v: %s", err, out)
	}
	s.withstand(t, 40*time.Second)
	exec.Command("sh", "-c", "while ip rule del pref 5; do :; done").Run()
	s.withstand(t, 10*time.Second)
}

// Batches are sent while their node is killed 20 times. In the end every batch exists completely or not at all.
func TestBatchIsAtomicWhenItsNodeIsKilled(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "1s")
	s := startHealthy(t, cassandraAt(n.addr)...)
	var statuses sync.Map // by the name of all users of a batch
	for try := range 20 {
		s.awaitHealthy(t, 3*time.Minute)
		time.AfterFunc(500*time.Millisecond+rand.N(100*time.Millisecond), func() { n.signal(t, "KILL", 1) })
		concurrently(4, func(sender int) {
			for i, status := 0, 201; status == 201; i++ {
				name := fmt.Sprintf("%d-%d-%d", try, sender, i)
				status = s.do("POST /users/batch", batchOf(100, fmt.Sprintf(`{"name":%q,"email":"a@example.com","age":1}`, name))).status
				statuses.Store(name, status)
			}
		})
	}
	s.awaitHealthy(t, 3*time.Minute)
	db, left := n.awaitResponse(t, "127.0.0.1"), 1
	await(t, 3*time.Minute, "replaying the batchlog", func() bool {
		return db.Query(`SELECT count(*) FROM system.batches`).Scan(&left) == nil && left == 0
	})
	written := map[string]int{}
	for _, u := range decode[[]user](t, s.do("GET /users/stream", ""), 200) {
		written[u.Name]++
	}
	for name, status := range statuses.Range {
		n := written[name.(string)]
		check(t, n == 100 && status != 503 || n == 0 && status != 201, "batch %s, status %d: %d users", name, status, n)
	}
}

// Edits that end with 504 while a node hangs, or after it was killed, may be applied by the next transaction on the row. A serial
// read settles all that were proposed. Edits that a slow node has not proposed yet may be applied until the user's next edit.
func TestSerialReadSettlesEdits(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-nodes", "3", "-restart", "3s")
	n.awaitResponse(t, "127.0.0.3")
	s := startHealthy(t, append(cassandraAt(n.addr), "CASSANDRA_REPLICATION=3", "CASSANDRA_HOSTS=127.0.0.1,127.0.0.2,127.0.0.3")...)
	var cases, changes [2]atomic.Int64 // of plain reads, of serial reads
	var stopped atomic.Bool
	var clients sync.WaitGroup
	until200 := func(request, body, header string) user {
		r := s.do(request, body, header)
		for ; r.status != 200; r = s.do(request, body, header) {
			time.Sleep(100 * time.Millisecond) // the node still hangs
		}
		return decode[user](t, r, 200)
	}
	for range 100 {
		path := s.createUser(t)
		clients.Go(func() {
			for i := 0; !stopped.Load(); i++ {
				if s.do("PATCH "+path, fmt.Sprintf(`{"age":%d}`, i%150), "X-Request-Timeout: 2").status != 504 {
					continue
				}
				kind := i % 2
				read := until200("GET "+path, "", []string{"Accept: */*", "Cache-Control: no-cache"}[kind])
				patched := until200("PATCH "+path, fmt.Sprintf(`{"name":"edit %d"}`, i), "Accept: */*")
				check(t, until200("GET "+path, "", "Cache-Control: no-cache") == patched, "%s changed after an edit", path)
				cases[kind].Add(1)
				if patched.Age != read.Age {
					changes[kind].Add(1)
				}
			}
		})
	}
	for round := 0; round < 20 && cases[1].Load() < 200; round++ {
		if number := 1 + round%3; round%4 == 3 {
			n.signal(t, "KILL", number)
			time.Sleep(5 * time.Second) // until the launcher restarts it
			n.awaitResponse(t, fmt.Sprint("127.0.0.", number))
		} else {
			n.signal(t, "STOP", number)
			time.Sleep(5 * time.Second) // of edits that hang
			n.signal(t, "CONT", number)
		}
		time.Sleep(3 * time.Second)
	}
	stopped.Store(true)
	clients.Wait()
	t.Logf("of %d plain reads %d changed later, of %d serial reads %d", cases[0].Load(), changes[0].Load(), cases[1].Load(), changes[1].Load())
	check(t, cases[1].Load() >= 200 && changes[1].Load()*5 < changes[0].Load(), "want 200 serial reads, of which few changed later")
}
