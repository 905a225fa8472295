package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

// variant is one way to do a benchmark's work: do does it once and returns the number of rows.
type variant struct {
	name string
	do   func() (rows int, err error)
}

// compare runs all variants in turn, for 0.3 s each, 15 rounds after one to warm up. It reports the median rate of each, and
// the median of its ratios to the first one in the same round: ratios last, unlike the absolute figures of a machine. The
// order is random, since a variant leaves garbage and a table to flush for the next one. -benchtime is 1x.
func compare(b *testing.B, clients int, variants []variant) {
	const rounds = 15
	rates, ratios := make([][]float64, len(variants)), make([][]float64, len(variants))
	for b.Loop() {
		for round := range rounds + 1 {
			rate := make([]float64, len(variants))
			for _, i := range rand.Perm(len(variants)) {
				rate[i] = rateOf(b, clients, variants[i].do)
			}
			for i := range rate {
				if round > 0 {
					rates[i], ratios[i] = append(rates[i], rate[i]), append(ratios[i], rate[i]/rate[0])
				}
			}
		}
	}
	for i, v := range variants {
		slices.Sort(rates[i])
		slices.Sort(ratios[i])
		b.ReportMetric(rates[i][len(rates[i])/2], v.name+"/s")
		b.ReportMetric(ratios[i][len(ratios[i])/2], v.name+":"+variants[0].name)
	}
	b.ReportMetric(0, "ns/op")
}

// rateOf returns the rows per second of concurrent clients.
func rateOf(b *testing.B, clients int, do func() (int, error)) float64 {
	var rows atomic.Int64
	start := time.Now()
	concurrently(clients, func(int) {
		for time.Since(start) < 300*time.Millisecond && !b.Failed() {
			n, err := do()
			if rows.Add(int64(n)); err != nil {
				b.Error(err)
			}
		}
	})
	return float64(rows.Load()) / time.Since(start).Seconds()
}

// over returns a variant that sends a request, to a user of random id if it ends in a slash, and reads the response.
func over(name, url, request, body string, rows int, headers ...string) variant {
	return variant{name, func() (int, error) {
		target := request
		if target[len(target)-1] == '/' {
			target += userID(rand.IntN(1000)).String()
		}
		r, err := client.Do(newRequest(target, url, body, headers))
		if err != nil {
			return 0, err
		}
		defer r.Body.Close()
		if _, err := io.Copy(io.Discard, r.Body); err != nil || r.StatusCode >= 300 {
			return 0, fmt.Errorf("%s: %s, %v", target, r.Status, err)
		}
		return rows, nil
	}}
}

// bare does the service's work with nothing but the driver.
type bare struct{ table string }

func (t bare) get(id gocql.UUID) (u user, err error) {
	var created, updated time.Time
	query := `SELECT id, name, email, age, created_at, updated_at FROM ` + t.table + ` WHERE id = ?`
	return u, admin.Query(query, id).Scan(&id, &u.Name, &u.Email, &u.Age, &created, &updated)
}

func (t bare) post(n int) error {
	batch := admin.NewBatch(gocql.LoggedBatch)
	for range n {
		batch.Query(`INSERT INTO `+t.table+` (id, name, email, age, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)`,
			gocql.UUID(uuid.New()), "Ada Lovelace", "ada@example.com", 36, time.Now(), time.Now())
	}
	if n == 1 {
		return admin.Query(batch.Entries[0].Stmt, batch.Entries[0].Args...).Exec()
	}
	return admin.ExecuteBatch(batch)
}

func (t bare) put(id gocql.UUID) error {
	if _, err := t.get(id); err != nil {
		return err
	}
	query := `UPDATE ` + t.table + ` SET name = ?, email = ?, age = ?, updated_at = ? WHERE id = ? IF EXISTS`
	_, err := admin.Query(query, "Ada Lovelace", "ada@example.com", 36, time.Now(), id).ScanCAS()
	return err
}

func (t bare) scan(pageSize, most int) (rows int, err error) {
	var id gocql.UUID
	var u user
	var created, updated time.Time
	it := admin.Query(`SELECT id, name, email, age, created_at, updated_at FROM ` + t.table).PageSize(pageSize).Iter()
	for rows < most && it.Scan(&id, &u.Name, &u.Email, &u.Age, &created, &updated) {
		rows++
	}
	return rows, it.Close()
}

// startNaive serves users as one would at first: without deadlines, limits, ids, metrics and problem responses.
func (t bare) startNaive(b *testing.B) (url string) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) {
		if id, err := gocql.ParseUUID(r.PathValue("id")); err == nil {
			u, _ := t.get(id)
			json.NewEncoder(w).Encode(u)
		}
	})
	mux.HandleFunc("POST /users", func(w http.ResponseWriter, r *http.Request) {
		var u user
		if json.NewDecoder(r.Body).Decode(&u) == nil && t.post(1) == nil {
			json.NewEncoder(w).Encode(u)
		}
	})
	server := httptest.NewServer(mux)
	b.Cleanup(server.Close)
	return server.URL
}

// BenchmarkService compares the service with the bare driver and a naive handler. Streams and lists come first, since the
// others add users.
func BenchmarkService(b *testing.B) {
	const users = 200_000
	s := startCommand(b, exec.Command(buildPlain()))
	s.awaitHealthy(b, 15*time.Second)
	seed(b, admin, s.keyspace, users)
	t := bare{s.keyspace + ".users"}
	naive := t.startNaive(b)
	one := func(do func(id gocql.UUID) error) func() (int, error) {
		return func() (int, error) { return 1, do(userID(rand.IntN(1000))) }
	}
	for _, fetchSize := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprintf("streams/page=%d", fetchSize), func(b *testing.B) {
			stream := fmt.Sprint("GET /users/stream?fetch_size=", fetchSize)
			compare(b, 1, []variant{
				{"bare", func() (int, error) { return t.scan(fetchSize, math.MaxInt) }},
				over("http", s.url, stream, "", users), over("limit", s.url, stream+"&limit=100000", "", 100_000),
			})
		})
	}
	for _, work := range []struct {
		name     string
		variants []variant
	}{
		{"lists", []variant{{"bare", func() (int, error) { return t.scan(100, 100) }}, over("http", s.url, "GET /users?limit=100", "", 100)}},
		{"reads", []variant{
			{"bare", one(func(id gocql.UUID) error { _, err := t.get(id); return err })}, over("naive", naive, "GET /users/", "", 1),
			over("http", s.url, "GET /users/", "", 1), over("no-cache", s.url, "GET /users/", "", 1, "Cache-Control: no-cache"),
		}},
		{"updates", []variant{
			{"bare", one(t.put)}, over("http", s.url, "PUT /users/", ada, 1), over("if-match", s.url, "PUT /users/", ada, 1, "If-Match: *"),
		}},
		{"creates", []variant{
			{"bare", one(func(gocql.UUID) error { return t.post(1) })}, over("naive", naive, "POST /users", ada, 1),
			over("http", s.url, "POST /users", ada, 1), {"key", func() (int, error) {
				return over("key", s.url, "POST /users", ada, 1, "Idempotency-Key: "+uuid.NewString()).do()
			}},
		}},
		{"batches", []variant{{"bare", func() (int, error) { return 100, t.post(100) }}, over("http", s.url, "POST /users/batch", batchOf(100, ada), 100)}},
	} {
		for _, clients := range []int{1, 32, 128} {
			b.Run(fmt.Sprintf("%s/clients=%d", work.name, clients), func(b *testing.B) { compare(b, clients, work.variants) })
		}
	}
}
