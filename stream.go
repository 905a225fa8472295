// This file sends result sets of any size in bounded memory, as one JSON array,
// as NDJSON, or page by page. It shows a scan in token order that can resume
// behind any row, slices that are read concurrently and returned in order,
// back-pressure, cancellation, and why a failed stream aborts its connection. It
// serves every table that has a range statement, a row type and a name.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math"
	"math/bits"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxStreams    = 64      // streams and pages that are being sent; each holds up to four pages
	concurrency   = 3       // slices that a stream reads concurrently; four were no faster
	defaultFetch  = 1000    // rows in a Cassandra page; throughput has nearly levelled off there
	maxFetch      = 5000    // rows; as JSON a page of the longest users then has 4 MB
	maxAhead      = 1 << 20 // bytes of JSON in a page that is read ahead
	writeSize     = 32 << 10
	minCount      = 100     // rows in a page from which the size of a table is estimated
	sampleSize    = 1000    // rows counted before a filtered scan
	filterRows    = 100_000 // rows examined by one filtered query: 0.2 s, while a node's timeout is 5 s
	narrowing     = 16      // divides a slice that Cassandra had no time for
	maxNarrowings = 5       // of one slice; after that the failure is returned
	pageTime      = 2 * time.Second
	ndjson        = "application/x-ndjson"
	unlimited     = math.MaxInt
	listToken     = "list"   // kind of the page tokens of GET /users
	streamToken   = "stream" // of GET /users/stream and /users/stream/pages
	startAgain    = "; start again without page_state"
)

// streams limits the streams and pages that are being sent.
var streams = make(gate, maxStreams)

// table is what a scan needs to know of a table with a UUID as its key.
type table struct {
	name           string
	selectRange    string // rows from one token to another
	selectFiltered string // the same, at least so old; "" if there is no filter
	newRow         func() row
}

// row is a row of a table. A scan reuses it for all rows.
type row interface {
	columns() []any // Scan destinations
	key() uuid.UUID
	appendJSON(b []byte) []byte
}

// streamUsers handles GET /users/stream.
func streamUsers(w http.ResponseWriter, r *http.Request) error { return stream(w, r, usersTable) }

// getUsersPage handles GET /users/stream/pages.
func getUsersPage(w http.ResponseWriter, r *http.Request) error { return getPage(w, r, usersTable) }

// stream sends a table as a JSON array or as NDJSON. It fetches the first page
// before it sends the status line, so an early failure has its own status.
func stream(w http.ResponseWriter, r *http.Request, t *table) error {
	params := newParameters(r)
	fetchSize := params.number("fetch_size", defaultFetch, 1, maxFetch)
	s := params.scan(t, streamToken)
	if err := params.err(); err != nil {
		return err
	}
	if !r.ProtoAtLeast(1, 1) { // it has no framing that shows a truncated body
		w.Header().Set("Upgrade", "HTTP/1.1")
		return &problem{Status: http.StatusUpgradeRequired, Detail: "Streams need HTTP/1.1; for nginx set proxy_http_version 1.1"}
	}
	contentType := preferred(r, "application/json", ndjson)
	w.Header().Set("Vary", "Accept")
	w.Header().Set("Content-Type", contentType)
	if r.Method == http.MethodHead {
		return nil
	}
	if !streams.enter() {
		return unavailable("Too many concurrent streams; try again in a second")
	}
	defer streams.leave()
	out := &pageWriter{w: w, lines: contentType == ndjson}
	for p, err := range s.pages(r.Context(), fetchSize) {
		if err != nil {
			return &streamError{error: err, pageState: s.token(streamToken)}
		}
		if err := out.write(p); err != nil {
			return err
		}
	}
	return out.close()
}

// streamError is a failed stream and the position behind the last row it sent.
type streamError struct {
	error
	pageState string
}

func (e *streamError) Unwrap() error { return e.error }

// pageWriter writes pages as one JSON array, or as lines.
type pageWriter struct {
	w     http.ResponseWriter
	lines bool
	pages int
	rows  int
}

// write sends a page and flushes it. The first one sends the status line.
func (o *pageWriter) write(p page) error {
	rows := p.json
	if !o.lines {
		if o.pages == 0 {
			io.WriteString(o.w, "[")
		}
		if o.rows > 0 && p.rows > 0 {
			io.WriteString(o.w, ",")
		}
		rows = asArray(rows)
	}
	if _, err := o.w.Write(rows); err != nil { // also if a write above failed
		return err
	}
	o.pages, o.rows = o.pages+1, o.rows+p.rows
	counters.rowsStreamed.Add(int64(p.rows))
	return http.NewResponseController(o.w).Flush()
}

// close closes the array. Without it, on an aborted connection, no client can
// mistake the body for a complete one.
func (o *pageWriter) close() error {
	if o.lines {
		return nil
	}
	_, err := io.WriteString(o.w, "]\n")
	return err
}

// getPage sends one page of a table and a token for the next.
func getPage(w http.ResponseWriter, r *http.Request, t *table) error {
	params := newParameters(r)
	fetchSize := params.number("fetch_size", defaultFetch, 1, maxFetch)
	s := params.scan(t, streamToken)
	if err := params.err(); err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", "application/json")
		return nil
	}
	if !streams.enter() {
		return unavailable("Too many concurrent streams; try again in a second")
	}
	defer streams.leave()
	p, err := s.page(r.Context(), fetchSize)
	if err != nil {
		return err
	}
	pageState := "null"
	if s.more() {
		pageState = strconv.Quote(s.token(streamToken))
		linkNext(w, fmt.Sprintf("%s?fetch_size=%d&page_state=%s", r.URL.Path, fetchSize, s.token(streamToken)))
	}
	head, tail := fmt.Appendf(nil, `{"%s":[`, t.name), fmt.Appendf(nil, `],"has_more":%t,"page_state":%s}`+"\n", s.more(), pageState)
	return writeBody(w, http.StatusOK, "application/json", head, asArray(p.json), tail)
}

func linkNext(w http.ResponseWriter, target string) {
	w.Header().Set("Link", "<"+target+`>; rel="next"`)
}

// page is some rows of a scan as JSON, each with a newline behind it: in JSON
// text a newline can't be anything else.
type page struct {
	json []byte
	rows int
}

// asArray turns the newlines into commas, in place, except for the last.
func asArray(rows []byte) []byte {
	rows = bytes.TrimSuffix(rows, []byte("\n"))
	for at := 0; ; at++ {
		n := bytes.IndexByte(rows[at:], '\n')
		if n < 0 {
			return rows
		}
		at += n
		rows[at] = ','
	}
}

// scan is a resumable scan of a table in token order. Cassandra hashes each key
// to a token from -2^63 to 2^63-1 and stores rows in the order of their tokens,
// which forms a ring that is divided among the nodes. Random keys are spread
// evenly over it. So the scan can be cut into slices of equal width, and it can
// resume behind any row, in a narrower slice if need be.
type scan struct {
	*table
	minAge   int       // 0: all rows
	left     int       // rows still to be returned; 0 at the end of the scan
	from     int64     // the first token that may have rows left
	behind   uuid.UUID // of the rows with that token, those up to this key have been returned
	upto     int64     // the last token of the slice being read
	end      int64     // the last token of the scan
	width    uint64    // tokens of a slice; 0 until it is known
	rowBytes int       // mean size of a row's JSON; 0 until it is known
}

// more reports whether rows remain and the scan has not reached its end.
func (s *scan) more() bool { return s.left > 0 }

// pages yields the rest of the scan, page by page. As soon as the first pages
// show how many rows a slice has, it reads several slices concurrently and
// returns them in order. Its goroutines have ended when it returns.
func (s *scan) pages(ctx context.Context, size int) iter.Seq2[page, error] {
	return func(yield func(page, error) bool) {
		for s.more() && s.width == 0 {
			from := s.from
			p, err := s.next(ctx, size)
			if !yield(p, err) || err != nil {
				return
			}
			if p.rows >= minCount && s.width == 0 {
				s.setWidth(from, p.rows, s.pageSize(size)*4/5)
			}
		}
		if !s.more() {
			return
		}
		var running sync.WaitGroup
		defer running.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		for result := range s.ahead(ctx, &running, size) {
			p := s.take(result)
			if !yield(p, result.err) || result.err != nil || !s.more() {
				return
			}
		}
	}
}

// result is a page of a slice, or an error, and the position behind it.
type result struct {
	page
	err error
	at  scan
}

// ahead yields the pages of all slices in order, while up to concurrency slices
// read one page each. If ctx ends, its last result is an error.
func (s *scan) ahead(ctx context.Context, running *sync.WaitGroup, size int) iter.Seq[result] {
	slices := make(chan chan result, concurrency-2) // besides the one being returned and the one being sent here
	running.Go(func() {
		defer close(slices)
		for slice := range s.slices() {
			results := make(chan result)
			running.Go(func() { slice.readAll(ctx, size, results) })
			select {
			case slices <- results:
			case <-ctx.Done():
				return
			}
		}
	})
	return func(yield func(result) bool) {
		for results := range slices {
			for r := range results {
				if !yield(r) {
					return
				}
			}
			if ctx.Err() != nil {
				break
			}
		}
		if err := ctx.Err(); err != nil {
			yield(result{err: queryErrorf(read, err, "scanning %s", s.name), at: *s})
		}
	}
}

// slices yields the slices of the rest of the scan.
func (s *scan) slices() iter.Seq[*scan] {
	return func(yield func(*scan) bool) {
		for next := *s; s.more(); next.from, next.behind = next.upto, uuid.Max {
			next.left, next.end = unlimited, s.end
			next.upto = next.bound()
			next.end = next.upto
			slice := next
			if !yield(&slice) || slice.upto == s.end {
				return
			}
		}
	}
}

// readAll reads a slice page by page, one page ahead of the receiver.
func (s *scan) readAll(ctx context.Context, size int, results chan<- result) {
	defer close(results)
	for s.more() {
		p, err := s.next(ctx, size)
		select {
		case results <- result{p, err, *s}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// take moves the scan behind a page of one of its slices. It returns no more
// rows of it than are left.
func (s *scan) take(r result) page {
	if r.err != nil {
		return page{}
	}
	s.from, s.behind = r.at.from, r.at.behind
	if r.rows > s.left {
		lines := bytes.SplitAfterN(r.json, []byte("\n"), s.left+1)
		r.json, r.rows = r.json[:len(r.json)-len(lines[s.left])], s.left
	}
	s.left -= r.rows
	if !r.at.more() && r.at.end == s.end {
		s.left = 0
	}
	return r.page
}

// page reads at most size rows. It returns those found so far after pageTime, or
// after half of the time that ctx has left.
func (s *scan) page(ctx context.Context, size int) (all page, err error) {
	budget := pageTime
	if deadline, ok := ctx.Deadline(); ok {
		budget = min(budget, time.Until(deadline)/2)
	}
	start := time.Now()
	if all, err = s.next(ctx, size); err != nil {
		return all, err
	}
	ctx, cancel := context.WithDeadline(ctx, start.Add(budget*3/2)) // leaves time to send the rows found so far
	defer cancel()
	for s.more() && all.rows < size && time.Since(start) < budget {
		p, err := s.next(ctx, size-all.rows)
		if err != nil {
			break // the next page meets it again, if it lasts
		}
		all.json, all.rows = append(all.json, p.json...), all.rows+p.rows
	}
	return all, nil
}

// next reads at most size rows, perhaps none, and moves the scan behind them. If
// Cassandra has no time for the slice, next tries a narrower one.
func (s *scan) next(ctx context.Context, size int) (p page, err error) {
	if s.minAge > 0 && s.width == 0 {
		return page{}, s.sample(ctx)
	}
	for range maxNarrowings + 1 {
		p, err = s.read(ctx, s.pageSize(size))
		if !isTooWide(err) {
			break
		}
		s.width = max(1, (uint64(s.upto)-uint64(s.from))/narrowing)
		s.upto = s.bound()
	}
	return p, queryErrorf(read, err, "scanning %s", s.name)
}

// errNoProgress is a page without a row that is not the last one.
var errNoProgress = errors.New("page without rows")

// isTooWide reports that a node ran out of time, or met too many tombstones.
func isTooWide(err error) bool {
	code := codeOf(err)
	return code == gocql.ErrCodeReadTimeout || code == gocql.ErrCodeReadFailure || err == errNoProgress
}

// sample counts rows without the filter, and so finds how wide a slice may be in
// which Cassandra has to examine each row.
func (s *scan) sample(ctx context.Context) error {
	all := *s
	all.minAge, all.left = 0, unlimited
	p, err := all.next(ctx, sampleSize)
	if err != nil {
		return err
	}
	s.rowBytes, s.width = all.rowBytes, math.MaxUint64
	if all.more() {
		all.setWidth(s.from, p.rows, filterRows)
		s.width = all.width
	}
	s.upto = s.bound()
	return nil
}

// read reads one page of the slice.
func (s *scan) read(ctx context.Context, size int) (p page, err error) {
	db, err := currentSession()
	if err != nil {
		return p, err
	}
	statement, values := s.selectRange, []any{s.from, s.upto}
	if s.minAge > 0 {
		statement, values = s.selectFiltered, append(values, s.minAge)
	}
	// One row more: the one behind which the scan resumes, or one that shows that more follow.
	anyNode := uuid.New() // without a routing key the driver would look for one under a lock that ignores deadlines
	rows := db.Query(statement, values...).WithContext(ctx).RoutingKey(anyNode[:]).PageSize(size + 1).PageState(nil).Iter()
	scanned, last, row := 0, s.behind, s.newRow()
	p.json = make([]byte, 0, rows.NumRows()*(s.rowBytes+s.rowBytes/16))
	for columns := row.columns(); p.rows < size && rows.Scan(columns...); {
		scanned++
		if key := row.key(); bytes.Compare(key[:], s.behind[:]) > 0 || tokenOf(key) != s.from {
			p.json, p.rows, last = append(row.appendJSON(p.json), '\n'), p.rows+1, key
		}
	}
	more := scanned < rows.NumRows() || len(rows.PageState()) > 0
	if err := rows.Close(); err != nil {
		return page{}, err
	}
	if more && p.rows == 0 {
		return page{}, errNoProgress
	}
	s.move(p, last, more)
	return p, nil
}

// move moves the scan behind a page, whose last row has the key last. more
// reports whether rows of the slice remain.
func (s *scan) move(p page, last uuid.UUID, more bool) {
	s.left -= p.rows
	if p.rows > 0 {
		s.rowBytes = len(p.json) / p.rows
	}
	switch {
	case more:
		s.from, s.behind = tokenOf(last), last
	case s.upto == s.end:
		s.from, s.behind, s.left = s.upto, uuid.Max, 0
	default:
		s.from, s.behind = s.upto, uuid.Max
		s.upto = s.bound()
	}
}

// pageSize returns the number of rows to read: size, or fewer if those would
// take more than maxAhead bytes.
func (s *scan) pageSize(size int) int {
	if s.rowBytes > 0 {
		size = max(1, min(size, maxAhead/s.rowBytes))
	}
	return min(size, s.left)
}

// bound returns the last token of a slice that begins where the scan is.
func (s *scan) bound() int64 {
	if s.width == 0 || s.width >= uint64(s.end)-uint64(s.from) {
		return s.end
	}
	return s.from + int64(s.width)
}

// setWidth makes slices so wide that they have the wanted number of rows,
// judging by the rows that lie between a token and the scan's position.
func (s *scan) setWidth(from int64, rows, wanted int) {
	tokens := float64(uint64(s.from)-uint64(from)) / float64(max(1, rows)) * float64(wanted)
	s.width = uint64(max(1, min(tokens, 1<<63)))
	s.upto = s.bound()
}

// token returns the position of the scan as URL-safe text. It contains no secret
// and needs no key, so every instance accepts it. The checksum covers the names
// of keyspace and table, too.
func (s *scan) token(kind string) string {
	position := fmt.Sprintf("%s.%d.%d.%d.%s.%d", kind, s.minAge, s.left, s.from, s.behind, s.width)
	return fmt.Sprintf("%s.%08x", position, crc32.ChecksumIEEE([]byte(position+"."+global.cluster.keyspace+"."+s.name)))
}

// parseToken returns the scan at a token's position. It reads the fields without
// looking at errors: damaged text is not what the result formats to.
func (t *table) parseToken(text, kind string) (s *scan, ok bool) {
	s = newScan(t)
	fields := strings.Split(text, ".")
	if len(fields) != 7 {
		return nil, false
	}
	s.minAge, _ = strconv.Atoi(fields[1])
	s.left, _ = strconv.Atoi(fields[2])
	s.from, _ = strconv.ParseInt(fields[3], 10, 64)
	s.behind, _ = uuid.Parse(fields[4])
	s.width, _ = strconv.ParseUint(fields[5], 10, 64)
	s.upto = s.bound()
	return s, text == s.token(kind) && s.more() && 0 <= s.minAge && s.minAge <= maxAge
}

func newScan(t *table) *scan {
	return &scan{table: t, left: unlimited, from: math.MinInt64, upto: math.MaxInt64, end: math.MaxInt64}
}

// tokenOf returns the token of a key, as Cassandra's Murmur3Partitioner computes
// it: the first half of the MurmurHash3 x64 128 of the key's 16 bytes.
func tokenOf(key uuid.UUID) int64 {
	const c1, c2 = 0x87c37b91114253d5, 0x4cf5ad432745937f
	k1, k2 := binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])
	h1 := bits.RotateLeft64(bits.RotateLeft64(k1*c1, 31)*c2, 27)*5 + 0x52dce729
	h2 := (bits.RotateLeft64(bits.RotateLeft64(k2*c2, 33)*c1, 31)+h1)*5 + 0x38495ab5
	h1 ^= 16
	h2 ^= 16
	h1 += h2
	h2 += h1
	if token := int64(mix(h1) + mix(h2)); token != math.MinInt64 {
		return token
	}
	return math.MaxInt64
}

// mix is the finalizer of MurmurHash3.
func mix(h uint64) uint64 {
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// parameters reads a query string and collects what is wrong with it.
type parameters struct {
	values url.Values
	errs   []fieldError
}

func newParameters(r *http.Request) *parameters {
	values, err := url.ParseQuery(r.URL.RawQuery) // r.URL.Query drops bad parameters silently
	p := &parameters{values: values}
	if err != nil {
		p.reject("query string", "must be percent-encoded: "+err.Error())
	}
	return p
}

// number returns a whole number clamped to high, or fallback if it is missing.
func (p *parameters) number(name string, fallback, low, high int) int {
	given, ok := p.values[name]
	if !ok {
		return fallback
	}
	n, err := strconv.ParseUint(given[0], 10, 63) // beyond that it returns the maximum
	if len(given) > 1 || err != nil && !errors.Is(err, strconv.ErrRange) || int(n) < low {
		p.reject(name, fmt.Sprintf("must be one whole number in plain digits, at least %d", low))
		return fallback
	}
	return min(int(n), high)
}

// scan returns a new scan of the table, or the one that page_state continues.
// Then limit is unused, and age_filter must be missing or the same.
func (p *parameters) scan(t *table, kind string) *scan {
	s, resumed := newScan(t), p.values["page_state"]
	if resumed != nil {
		parsed, ok := t.parseToken(resumed[0], kind)
		if !ok || len(resumed) > 1 {
			p.reject("page_state", "is corrupt or belongs to another endpoint"+startAgain)
			resumed = nil
		} else {
			s = parsed
		}
	}
	if kind == listToken {
		return s
	}
	minAge, limit := p.number("age_filter", s.minAge, 0, maxAge), p.number("limit", unlimited, 1, unlimited)
	if resumed == nil {
		s.minAge, s.left = minAge, limit
	} else if minAge != s.minAge {
		p.reject("page_state", "was made with another age_filter"+startAgain)
	}
	return s
}

func (p *parameters) reject(name, detail string) {
	p.errs = append(p.errs, fieldError{Parameter: name, Detail: detail})
}

// err returns the response to what was rejected, or nil.
func (p *parameters) err() error {
	if p.errs == nil {
		return nil
	}
	return invalid(p.errs...)
}
