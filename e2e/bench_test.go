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

// compare runs all variants in turn, for 0.3 s each, 15 rounds after one to warm up. It reports the rate of the first one and
// the others' ratios to it: ratios last, unlike the absolute figures of a machine. The order is random, since a variant leaves
// garbage and a table to flush for the next one. -benchtime is 1x.
func compare(b *testing.B, clients int, variants ...variant) {
	rates := make([]float64, len(variants))
	for b.Loop() {
		for round := range 16 {
			for _, i := range rand.Perm(len(variants)) {
				if rate := rateOf(b, clients, variants[i].do); round > 0 {
					rates[i] += rate / 15
				}
			}
		}
	}
	b.ReportMetric(rates[0], variants[0].name+"/s")
	for i, v := range variants[1:] {
		b.ReportMetric(rates[i+1]/rates[0], v.name+":"+variants[0].name)
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

// over returns a variant that sends a request and reads the response. A request that ends in a slash is for any user.
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

// table does the service's work with nothing but the driver.
type table string

func (t table) scan(where string, pageSize, most int, values ...any) (rows int, err error) {
	var id gocql.UUID
	var name, email string
	var age int
	var created, updated time.Time
	query := `SELECT id, name, email, age, created_at, updated_at FROM ` + string(t) + where
	it := admin.Query(query, values...).PageSize(pageSize).Iter()
	for rows < most && it.Scan(&id, &name, &email, &age, &created, &updated) {
		rows++
	}
	return rows, it.Close()
}

func (t table) get() (int, error) { return t.scan(` WHERE id = ?`, 1, 1, userID(rand.IntN(1000))) }

func (t table) insert() *gocql.Query {
	return admin.Query(`INSERT INTO `+string(t)+` (id, name, email, age, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)`,
		gocql.UUID(uuid.New()), "Ada Lovelace", "ada@example.com", 36, time.Now(), time.Now())
}

func (t table) post() (int, error) { return 1, t.insert().Exec() }

func (t table) postBatch() (int, error) {
	batch := admin.NewBatch(gocql.LoggedBatch)
	for range 100 {
		insert := t.insert()
		batch.Query(insert.Statement(), insert.Values()...)
	}
	return 100, admin.ExecuteBatch(batch)
}

func (t table) put() (int, error) {
	_, err := admin.Query(`UPDATE `+string(t)+` SET name = ?, email = ?, age = ?, updated_at = ? WHERE id = ? IF EXISTS`,
		"Ada Lovelace", "ada@example.com", 36, time.Now(), userID(rand.IntN(1000))).ScanCAS()
	return 1, err
}

// startNaive serves users as one would at first: without deadlines, limits, ids, metrics and problem responses.
func (t table) startNaive(b *testing.B) (url string) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var u user
		do := t.get
		if json.NewDecoder(r.Body).Decode(&u) == nil {
			do = t.post
		}
		if _, err := do(); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		json.NewEncoder(w).Encode(u)
	}))
	b.Cleanup(server.Close)
	return server.URL
}

// BenchmarkService compares the service with the bare driver and a naive handler. The last ones add users.
func BenchmarkService(b *testing.B) {
	const users = 200_000
	s := startCommand(b, exec.Command(buildPlain()))
	s.awaitHealthy(b, 15*time.Second)
	seed(b, admin, s.keyspace, users)
	t := table(s.keyspace + ".users")
	naive := t.startNaive(b)
	for _, size := range []int{100, 1000, 5000} {
		stream := fmt.Sprint("GET /users/stream?fetch_size=", size)
		b.Run(fmt.Sprint("streams/page=", size), func(b *testing.B) {
			compare(b, 1, variant{"bare", func() (int, error) { return t.scan("", size, math.MaxInt) }},
				over("http", s.url, stream, "", users), over("limit", s.url, stream+"&limit=100000", "", 100_000))
		})
	}
	for _, clients := range []int{1, 32, 128} {
		run := func(name string, variants ...variant) {
			b.Run(fmt.Sprint(name, "/clients=", clients), func(b *testing.B) { compare(b, clients, variants...) })
		}
		run("lists", variant{"bare", func() (int, error) { return t.scan("", 100, 100) }}, over("http", s.url, "GET /users?limit=100", "", 100))
		run("reads", variant{"bare", t.get}, over("naive", naive, "GET /users/", "", 1), over("http", s.url, "GET /users/", "", 1),
			over("no-cache", s.url, "GET /users/", "", 1, "Cache-Control: no-cache"))
		run("updates", variant{"bare", t.put}, over("http", s.url, "PUT /users/", ada, 1),
			over("if-match", s.url, "PUT /users/", ada, 1, "If-Match: *"))
		run("creates", variant{"bare", t.post}, over("naive", naive, "POST /users", ada, 1), over("http", s.url, "POST /users", ada, 1),
			variant{"key", func() (int, error) {
				return over("", s.url, "POST /users", ada, 1, "Idempotency-Key: "+uuid.NewString()).do()
			}})
		run("batches", variant{"bare", t.postBatch}, over("http", s.url, "POST /users/batch", batchOf(100, ada), 100))
	}
}
