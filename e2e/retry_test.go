package e2e

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// startTwo starts two instances together on one new keyspace.
func startTwo(t testing.TB, settings ...string) [2]*service {
	t.Helper()
	settings = append(settings, inKeyspace+newKeyspace())
	both := [2]*service{start(t, settings...), start(t, settings...)}
	both[0].awaitHealthy(t, 30*time.Second)
	both[1].awaitHealthy(t, 30*time.Second)
	return both
}

func TestConcurrentRetriesCreateOnce(t *testing.T) {
	both := startTwo(t)
	for request, body := range map[string]string{"POST /users": ada, "POST /users/batch": batchOf(50, ada)} {
		before := len(both[0].stream(t, ""))
		responses, originals := make([]response, 64), 0
		concurrently(64, func(i int) {
			responses[i] = both[i%2].do(request, body, "Idempotency-Key: "+strings.ReplaceAll(request, " ", ""))
		})
		for _, r := range responses {
			if !want(t, r, 201) || r.body != responses[0].body || r.header.Get("Location") != responses[0].header.Get("Location") {
				t.Errorf("%s differs from %s", r, responses[0])
			}
			if r.header.Get("Idempotency-Replayed") != "true" {
				originals++
			}
		}
		created, wanted := len(both[1].stream(t, ""))-before, strings.Count(body, "name")
		if created != wanted || originals != 1 {
			t.Errorf("%s: %d users and %d original responses, want %d and 1", request, created, originals, wanted)
		}
	}
}

func TestRetryUndoesNothing(t *testing.T) {
	both := startTwo(t)
	const key, reused = "Idempotency-Key: k", `"errors":[{"header":"Idempotency-Key","detail":"was used for a different request"}]`
	first := both[0].do("POST /users", ada, key)
	want(t, first, 201)
	path := first.header.Get("Location")
	retry := func() {
		t.Helper()
		r := both[1].do("POST /users", ada, key)
		if r.status != 201 || r.body != first.body || r.header.Get("Location") != path || r.header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("%s; want the first response, %s", r, first)
		}
	}
	want(t, both[1].do("PATCH "+path, `{"age":77}`), 200)
	retry()
	want(t, both[0].do("GET "+path, ""), 200, `"age":77,`)
	want(t, both[1].do("DELETE "+path, ""), 204)
	retry()
	want(t, both[0].do("GET "+path, ""), 404)
	want(t, both[0].do("POST /users", strings.Replace(ada, "36", "37", 1), key), 422, reused)
	want(t, both[0].do("POST /users/batch", batchOf(1, ada), key), 422, reused)
}

// Cassandra is killed and restarted half way through 500 keys. Every client repeats its request until the response is 201.
func TestRetriesAcrossAnOutageCreateOnce(t *testing.T) {
	needsLong(t)
	n := startNode(t, "-restart", "2s")
	both := startTwo(t, cassandraAt(n.addr)...)
	var next, done atomic.Int64
	concurrently(32, func(int) {
		for i := next.Add(1); i <= 500; i = next.Add(1) {
			body, key := fmt.Sprintf(`{"name":"%d","email":"a@example.com","age":1}`, i), fmt.Sprint("Idempotency-Key: ", i)
			for tries, status := int64(0), 0; status != 201; tries++ {
				r := both[(i+tries)%2].do("POST /users", body, key)
				if status = r.status; status != 201 && status != 503 && status != 504 {
					t.Error(r)
				}
				time.Sleep(20 * time.Millisecond)
			}
			if done.Add(1) == 250 {
				n.signal(t, "KILL", 1)
			}
		}
	})
	created := map[string]int{}
	for _, u := range both[0].stream(t, "") {
		if created[u.Name]++; created[u.Name] > 1 {
			t.Errorf("%d users for key %s", created[u.Name], u.Name)
		}
	}
	if len(created) != 500 {
		t.Errorf("%d users, want 500", len(created))
	}
}

// Each of 32 clients adds one to the age until it succeeds.
func TestConditionalEditsLoseNoAddition(t *testing.T) {
	both := startTwo(t)
	path := both[0].createUser(t)
	var added, unsure atomic.Int64
	concurrently(32, func(i int) {
		for status := 412; status == 412; {
			current := both[i%2].do("GET "+path, "")
			var u user
			json.Unmarshal([]byte(current.body), &u)
			body := strings.Replace(current.body, fmt.Sprintf(`"age":%d,`, u.Age), fmt.Sprintf(`"age":%d,`, u.Age+1), 1)
			r := both[(i+1)%2].do("PUT "+path, body, "If-Match: "+current.header.Get("ETag"))
			switch status = r.status; status {
			case 200:
				added.Add(1)
			case 504:
				unsure.Add(1)
			default:
				want(t, r, 412)
			}
		}
	})
	u := decode[user](t, both[0].do("GET "+path, "", "Cache-Control: no-cache"), 200)
	if sum := int64(u.Age) - 36; sum < added.Load() || sum > added.Load()+unsure.Load() || added.Load() < 30 {
		t.Errorf("%d additions, want %d of the 32 and at most %d more", sum, added.Load(), unsure.Load())
	}
}

func TestConcurrentPatchesOfDifferentFields(t *testing.T) {
	both := startTwo(t)
	for range 20 {
		path, patches := both[0].createUser(t), []string{`"name":"Eve"`, `"email":"eve@example.com"`, `"age":77`}
		concurrently(3, func(i int) { want(t, both[i%2].do("PATCH "+path, "{"+patches[i]+"}"), 200) })
		want(t, both[0].do("GET "+path, ""), 200, strings.Join(patches, ","))
	}
}

func TestHotUser(t *testing.T) {
	both := startTwo(t)
	path := both[0].createUser(t)
	var applied, late atomic.Int64
	concurrently(64, func(i int) {
		for age := range 10 {
			if r := both[i%2].do("PATCH "+path, fmt.Sprintf(`{"age":%d}`, age)); r.status == 200 {
				applied.Add(1)
			} else if want(t, r, 504) {
				late.Add(1)
			}
		}
	})
	if t.Logf("%d of 640 are 200, %d are 504", applied.Load(), late.Load()); late.Load() > 32 {
		t.Errorf("%d of 640 are 504, want at most 32", late.Load())
	}
}

// buildShifted builds the service with a time.Now that adds CLOCK_SHIFT seconds.
var buildShifted = sync.OnceValue(func() string {
	original, shifted := filepath.Join(runtime.GOROOT(), "src/time/time.go"), filepath.Join(binaries, "time.go")
	text, _ := os.ReadFile(original)
	changed := strings.NewReplacer(
		`"math/bits"`, `"math/bits"; "syscall"`,
		"sec, nsec, mono := runtimeNow()\n", "sec, nsec, mono := runtimeNow(); sec += clockShift\n",
	).Replace(string(text)) + `
var clockShift = func() int64 { text, _ := syscall.Getenv("CLOCK_SHIFT"); n, _ := atoi(text); return int64(n) }()
`
	overlay := filepath.Join(binaries, "overlay.json")
	os.WriteFile(shifted, []byte(changed), 0o600)
	os.WriteFile(overlay, fmt.Appendf(nil, `{"Replace":{%q:%q}}`, original, shifted), 0o600)
	return build("shifted", "-overlay", overlay, ".")
})

// The service's clock is an hour ahead of the node's or behind it.
func TestClockSkew(t *testing.T) {
	needsLong(t)
	for _, shift := range []int{3600, -3600} {
		s := startCommand(t, exec.Command(buildShifted()), fmt.Sprint("CLOCK_SHIFT=", shift))
		s.awaitHealthy(t, 15*time.Second)
		concurrently(300, func(i int) {
			path := s.createUser(t)
			want(t, s.do("PATCH "+path, `{"age":77}`), 200)
			want(t, s.do("GET "+path, ""), 200, `"age":77,`)
			want(t, s.do("DELETE "+path, ""), 204)
			want(t, s.do("GET "+path, ""), 404)
		})
		if skew := s.metrics(t).Cassandra.ClockSkew; math.Abs(skew+1000*float64(shift)) > 3000 {
			t.Errorf("clock_skew_ms = %g, want about %d", skew, -1000*shift)
		}
	}
}
