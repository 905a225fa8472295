package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gocql/gocql"
)

const crowdPage = 250_000 // bytes: less than the JSON of 1000 users of the crowd, more than Cassandra sends for them

// pages follows page_state and returns all users and the number of responses.
func (s *service) pages(t testing.TB, query string, headers ...string) (users []user, responses int) {
	for state := ""; ; state = "&page_state=" + state {
		r := s.do("GET /users/stream/pages?"+query+state, "", headers...)
		p := decode[struct {
			Users     []user
			HasMore   bool    `json:"has_more"`
			PageState *string `json:"page_state"`
		}](t, r, 200)
		if p.Users == nil || p.HasMore != (p.PageState != nil) || p.HasMore != (r.header.Get("Link") != "") {
			t.Fatalf("%s: inconsistent end", r)
		}
		users = append(users, p.Users...)
		if responses++; !p.HasMore {
			return users, responses
		}
		state = *p.PageState
	}
}

func (s *service) stream(t testing.TB, query string) []user {
	return decode[[]user](t, s.do("GET /users/stream?"+query, ""), 200)
}

// wantSeeded fails unless users has each of the first n seeded users of at least minAge exactly once, and no others.
func wantSeeded(t testing.TB, users []user, n, minAge int) {
	got, want := map[user]int{}, map[user]int{}
	for i := range n {
		if u := seeded(i); u.Age >= minAge {
			want[u] = 1
		}
	}
	for _, u := range users {
		got[u]++
	}
	check(t, maps.Equal(got, want), "%d users, %d different ones, want each of %d once", len(users), len(got), len(want))
}

func TestFirstUsersComeAfterOnePage(t *testing.T) {
	s, proxy := startBehindProxy(t, useCrowd(t))
	proxy.credit.Store(3000) // for a page of 5 users, perhaps a few, not for the 4 kB of JSON that net/http buffers
	conn := s.dial(t, rawGet("/users/stream?fetch_size=5"), 0)
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	var body bytes.Buffer
	_, err := io.CopyN(&body, conn, 1000)
	proxy.credit.Store(math.MaxInt64)
	check(t, err == nil, "%v after %d bytes, want 1000 before Cassandra sends more", err, body.Len())
	_, err = io.Copy(&body, conn)
	check(t, err == nil && bytes.Count(body.Bytes(), []byte(`"age"`)) == crowdSize, "%v after %d bytes, want all users", err, body.Len())
}

// wantAborted streams with curl while the proxy cuts the connections to Cassandra, and checks that curl sees the truncation.
func wantAborted(t *testing.T, s *service, proxy *proxy, accept string) {
	proxy.cutAfter(2 * crowdPage)
	body, err := exec.Command("curl", "-s", "-H", "Accept: "+accept, s.url+"/users/stream").Output()
	n := strings.Count(string(body), `"age"`)
	truncated := n > 0 && n < crowdSize && !json.Valid(body)
	check(t, fmt.Sprint(err) == "exit status 18" && truncated, "curl: %v after %d users, want exit status 18 after some", err, n)
}

// export reads NDJSON until a stream is complete, resuming each aborted one at its page_state.
func (s *service) export(t testing.TB, query string) (users []user, aborted int) {
	for state := ""; ; aborted++ {
		s.awaitHealthy(t, 3*time.Minute)
		r := s.do("GET /users/stream?"+query+state, "", "Accept: application/x-ndjson")
		var last struct {
			user
			Status    int
			PageState string `json:"page_state"`
		}
		for line := range strings.Lines(r.body) {
			if json.Unmarshal([]byte(line), &last) == nil && last.Status == 0 {
				users = append(users, last.user)
			}
		}
		if r.err == nil && r.status == 200 && last.Status == 0 {
			return users, aborted
		} else if r.err == nil || last.PageState == "" {
			t.Fatalf("%s: last line %+v", r, last)
		}
		state = "&page_state=" + last.PageState
	}
}

func TestAbortedStreams(t *testing.T) {
	s, proxy := startBehindProxy(t, useCrowd(t))
	wantAborted(t, s, proxy, "application/json")
	s.awaitHealthy(t, 15*time.Second)
	wantAborted(t, s, proxy, "application/x-ndjson")
	check(t, s.metrics(t).ByRoute["GET /users/stream"]["aborted"] == 2, "requests = %v, want 2 aborted streams", s.metrics(t).ByRoute)
	for query, minAge := range map[string]int{"fetch_size=1000": 0, "fetch_size=1000&age_filter=50": 50} {
		proxy.cutAfter(2 * crowdPage)
		users, aborted := s.export(t, query)
		wantSeeded(t, users, crowdSize, minAge)
		check(t, aborted > 0, "%s was never aborted", query)
	}
}

// A node is killed ten times during an export, which resumes each time.
func TestNodeIsKilledDuringExport(t *testing.T) {
	needsLong(t)
	const size = 300_000
	n := startNode(t, "-restart", "1s")
	s := startHealthy(t, cassandraAt(n.addr)...)
	seed(t, n.awaitResponse(t, "127.0.0.1"), s.keyspace, size)
	killing := make(chan bool)
	go func() {
		defer close(killing)
		for range 10 {
			s.awaitHealthy(t, 3*time.Minute)
			before := s.metrics(t).Rows
			await(t, 3*time.Minute, "streaming", func() bool { return s.metrics(t).Rows > before })
			n.signal(t, "KILL", 1)
			await(t, time.Minute, "dying", func() bool { return s.do("GET /health", "").status == 503 })
		}
	}()
	users, aborted := s.export(t, "")
	wantSeeded(t, users, size, 0)
	<-killing
	check(t, aborted >= 10, "aborted %d times, want 10", aborted)
}

func TestStreamsAreCompleteAndLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	s := startHealthy(t, useCrowd(t))
	queries := s.metrics(t).Queries
	wantSeeded(t, s.stream(t, "fetch_size=1000"), crowdSize, 0)
	before := s.metrics(t)
	check(t, before.Queries-queries <= 14, "%d queries for a stream of 10 pages, want at most 14", before.Queries-queries)
	for i := range 400 {
		s.dial(t, rawGet(fmt.Sprint("/users/stream?fetch_size=", 1+i)), 1500).Close()
	}
	s.awaitQuiet(t, before)
	var readers []net.Conn
	for range 32 {
		readers = append(readers, s.dial(t, rawGet("/users/stream"), 1), s.dial(t, rawGet("/users/stream/pages?fetch_size=5000"), 1))
	}
	want(t, s.do("GET /users/stream", ""), 503, "Too many concurrent streams; try again in a second")
	want(t, s.do("GET /users/stream/pages", ""), 503, "Too many concurrent streams; try again in a second")
	want(t, s.do("GET /users", ""), 200)
	for _, reader := range readers {
		reader.Close()
	}
	s.awaitQuiet(t, before)
}

func TestSlowNetwork(t *testing.T) {
	t.Parallel()
	const roundTrip = 520 * time.Millisecond
	near := startHealthy(t)
	want(t, near.do("POST /users/batch", batchOf(20, ada)), 201)
	slow := startProxy(t, anyPort, cassandraAddress())
	slow.delay.Store(int64(roundTrip / 2))
	far := cassandraAt(slow.addr)
	many, size, pages := useCrowd(t), crowdSize, 25
	if *long {
		keyspace := startHealthy(t).keyspace
		many, size, pages = inKeyspace+keyspace, 100_000, 100
		seed(t, admin, keyspace, size)
	}
	small, large := start(t, append(far, inKeyspace+near.keyspace)...), start(t, append(far, many)...)
	small.awaitHealthy(t, 3*20*roundTrip)
	large.awaitHealthy(t, 3*20*roundTrip)
	for _, query := range []string{"", "age_filter=30", "limit=20"} {
		began := time.Now()
		n := len(small.stream(t, query))
		check(t, n == 20 && time.Since(began) < 9*time.Second, "stream?%s: %d users after %s, want 20 within 3 s", query, n, time.Since(began))
	}
	users, responses := small.pages(t, "age_filter=30")
	check(t, len(users) == 20 && responses == 1, "%d users in %d pages, want 20 in 1", len(users), responses)
	users, _ = large.pages(t, "age_filter=99", "X-Request-Timeout: 2")
	wantSeeded(t, users, size, 99)
	before := large.metrics(t).QueryTimes
	r := large.do(fmt.Sprint("GET /users/stream?fetch_size=", size/pages), "")
	wantSeeded(t, decode[[]user](t, r, 200), size, 0)
	after := large.metrics(t).QueryTimes
	queries, milliseconds := after["count"]-before["count"], after["sum_ms"]-before["sum_ms"]
	roundTrips := 1000 * r.took.Seconds() / (milliseconds / queries) // each as long as the mean query of this stream
	ok := queries <= float64(pages)*1.4 && roundTrips <= float64(pages)/3+4
	check(t, ok, "%d pages took %g queries (at most 1.4 per page) and %g round trips (at most 1/3 per page + 4)", pages, queries, roundTrips)
}

func TestTombstones(t *testing.T) {
	n, remove := 150_000, "DELETE name FROM %s.users WHERE id = ?" // a scan of all meets more of these than Cassandra allows
	if *long {
		n, remove = 4_000_000, "DELETE FROM %s.users WHERE id = ?" // or runs into its timeout
	}
	s := startHealthy(t)
	seed(t, admin, s.keyspace, 5)
	beside := startHealthy(t)
	seed(t, admin, beside.keyspace, n/8)
	inBatches(t, admin, n, func(b *gocql.Batch, i int) { b.Query(fmt.Sprintf(remove, s.keyspace), userID(i+5)) })
	for age := range 2 {
		query := fmt.Sprint("age_filter=", age)
		wantSeeded(t, s.stream(t, query), 5, age)
		users, _ := s.pages(t, query)
		wantSeeded(t, users, 5, age)
	}
	var users []user
	for target := "/users?limit=2"; target != ""; { // a response that found nothing within 2 s is empty
		r := s.do("GET "+target, "")
		users = append(users, decode[[]user](t, r, 200)...)
		link, _, _ := strings.Cut(r.header.Get("Link"), ">")
		target = strings.TrimPrefix(link, "<")
	}
	wantSeeded(t, users, 5, 0)
	before := beside.metrics(t).QueryTimes["count"]
	wantSeeded(t, beside.stream(t, ""), n/8, 0)
	queries := beside.metrics(t).QueryTimes["count"] - before
	check(t, queries <= float64(n)/8/1000*1.4+2, "%d users beside the tombstones take %g queries, want one per page", n/8, queries)
}

// One client stops reading for good, another pauses for 20 s four times in the last megabyte.
func TestSlowReaders(t *testing.T) {
	needsLong(t)
	s := startHealthy(t, useCrowd(t))
	size := int64(len(s.do("GET /users/stream", "").body))
	s.dial(t, rawGet("/users/stream"), 1)
	conn := s.dial(t, rawGet("/users/stream"), size-1<<20)
	for pause := range 4 {
		time.Sleep(20 * time.Second)
		io.CopyN(io.Discard, conn, 240<<10)
		gone := s.metrics(t).ByRoute["GET /users/stream"]["499"]
		ok := (pause > 0 || gone == 0) && (pause < 3 || gone == 1)
		check(t, ok, "%d disconnected clients after %d pauses, want one after 30 s", gone, pause+1)
	}
	rest, err := io.ReadAll(conn)
	check(t, strings.HasSuffix(string(rest), "]\n\r\n0\r\n\r\n"), "%d bytes, %v; want the end of an array", len(rest), err)
}

// Resident memory is bounded by fetch_size, never by the number of rows.
func TestMemoryOfStreams(t *testing.T) {
	needsLong(t)
	s, longest := startHealthy(t), startHealthy(t).keyspace
	seed(t, admin, s.keyspace, 1_000_000)
	more := "INSERT INTO " + s.keyspace + ".users (id, age) VALUES (?, ?)" // four million small users: seeding all takes twice as long
	inBatches(t, admin, 4_000_000, func(b *gocql.Batch, i int) { b.Query(more, userID(i+1_000_000), i%100) })
	want(t, s.do("POST /users", strings.Replace(ada, "36", "149", 1)), 201)
	for query, n := range map[string]int{"age_filter=150": 0, "age_filter=100": 1} { // none or few match
		users, _ := s.pages(t, query)
		check(t, len(users) == n && len(s.stream(t, query)) == n, "%s: %d users in pages, want %d there and in a stream", query, len(users), n)
	}
	inBatches(t, admin, 10_000, func(b *gocql.Batch, i int) {
		b.Query("UPDATE "+longest+".users SET name = ?, email = ? WHERE id = ?", strings.Repeat("𝄞", 100), strings.Repeat("e", 254), userID(i))
	})
	for _, tt := range []struct {
		keyspace, target string
		readers          int
		bytes            int64 // then a reader stops for 20 s
		megabytes        int
	}{
		{s.keyspace, "/users/stream", 1, math.MaxInt64, 60}, {s.keyspace, "/users/stream?fetch_size=5000", 64, 4 << 20, 500},
		{longest, "/users/stream?fetch_size=5000", 160, 100, 500}, {longest, "/users/stream/pages?fetch_size=5000", 160, 100, 500},
	} {
		s := startCommand(t, exec.Command(buildPlain()), inKeyspace+tt.keyspace)
		s.awaitHealthy(t, 15*time.Second)
		concurrently(tt.readers, func(int) {
			if s.dial(t, rawGet(tt.target), tt.bytes); tt.readers > 1 {
				time.Sleep(20 * time.Second)
			}
		})
		s.wantMemory(t, tt.megabytes)
	}
}
