package e2e

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

type pair [2]*service

// startTwo starts two instances together on one new keyspace.
func startTwo(t testing.TB, settings ...string) pair {
	settings = append(settings, inKeyspace+newKeyspace())
	p := pair{start(t, settings...), start(t, settings...)}
	p[0].awaitHealthy(t, 30*time.Second)
	p[1].awaitHealthy(t, 30*time.Second)
	return p
}

func (p pair) count(t testing.TB, route, status string) int {
	return int(p[0].metrics(t).ByRoute[route][status] + p[1].metrics(t).ByRoute[route][status])
}

func TestConcurrentRetriesCreateOnce(t *testing.T) {
	both := startTwo(t)
	for request, body := range map[string]string{"POST /users": ada, "POST /users/batch": batchOf(50, ada)} {
		before := len(both[0].stream(t, ""))
		responses, originals, key := make([]response, 64), 0, "Idempotency-Key: "+strings.ReplaceAll(request, " ", "")
		concurrently(64, func(i int) { responses[i] = both[i%2].do(request, body, key) })
		for _, r := range responses {
			want(t, r, 201, responses[0].body)
			check(t, r.header.Get("Location") == responses[0].header.Get("Location"), "%s differs from %s", r, responses[0])
			if r.header.Get("Idempotency-Replayed") != "true" {
				originals++
			}
		}
		created, wanted := len(both[1].stream(t, ""))-before, strings.Count(body, "name")
		check(t, created == wanted && originals == 1, "%s: %d users, %d original responses, want %d, 1", request, created, originals, wanted)
	}
}

// Each of 32 clients adds one to the age and tries again after a 412. Then 64 clients set the age without a condition.
func TestConcurrentEdits(t *testing.T) {
	both := startTwo(t)
	path := both[0].createUser(t)
	concurrently(32, func(i int) {
		for status := 412; status == 412; {
			current := both[i%2].do("GET "+path, "")
			age := decode[user](t, current, 200).Age
			body := strings.Replace(current.body, fmt.Sprintf(`"age":%d,`, age), fmt.Sprintf(`"age":%d,`, age+1), 1)
			status = both[(i+1)%2].do("PUT "+path, body, "If-Match: "+current.header.Get("ETag")).status
		}
	})
	sum := decode[user](t, both[0].do("GET "+path, "", "Cache-Control: no-cache"), 200).Age - 36
	added, unsure := both.count(t, "PUT /users/{id}", "200"), both.count(t, "PUT /users/{id}", "504")
	check(t, sum >= added && sum <= added+unsure && added >= 30, "%d additions, want %d (at least 30) and at most %d more", sum, added, unsure)
	concurrently(64, func(i int) {
		for age := range 10 {
			both[i%2].do("PATCH "+path, fmt.Sprintf(`{"age":%d}`, age))
		}
	})
	applied, late := both.count(t, "PATCH /users/{id}", "200"), both.count(t, "PATCH /users/{id}", "504")
	check(t, applied+late == 640 && late <= 32, "of 640 PATCHes of one user %d are 200 and %d are 504, want at most 32", applied, late)
}

// buildShifted builds the service with a time.Now that adds CLOCK_SHIFT seconds.
var buildShifted = sync.OnceValue(func() string {
	root, _ := exec.Command("go", "env", "GOROOT").Output()
	original, shifted := filepath.Join(strings.TrimSpace(string(root)), "src/time/time.go"), filepath.Join(binaries, "time.go")
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
		skew := s.metrics(t).Cassandra.ClockSkew
		check(t, math.Abs(skew+1000*float64(shift)) < 3000, "clock_skew_ms = %g, want about %d", skew, -1000*shift)
	}
}
