// This file sends result sets of any size in bounded memory: as one JSON array,
// as NDJSON, or page by page. It shows a scan in token order that can resume
// behind any row, slices read concurrently and returned in order, back-pressure,
// cancellation, and why a failed stream aborts its connection.

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
	maxStreams    = 64      // streams and pages that are being sent
	maxPages      = 4       // of one stream in memory: three are read while one is sent; more are no faster
	defaultFetch  = 1000    // rows in a Cassandra page, where throughput has nearly levelled off
	maxFetch      = 5000    // rows; as JSON a page of the longest users then has 4 MB
	maxAhead      = 1 << 20 // bytes of JSON in a page that is read ahead
	minCount      = 100     // rows from which the density of a table is estimated
	sampleSize    = 1000    // rows that are counted before a filtered scan
	filterRows    = 100_000 // rows examined by one filtered query: 0.2 s, while a node's timeout is 5 s
	narrowing     = 16      // divides a slice for which Cassandra ran out of time
	maxNarrowings = 3       // of one slice; after that the failure is returned
	pageTime      = 2 * time.Second
	ndjson        = "application/x-ndjson"
	unlimited     = math.MaxInt
	listToken     = "list"   // the kind of page token of GET /users
	streamToken   = "stream" // of GET /users/stream and /users/stream/pages
	startAgain    = "; start again without page_state"
)

var streams = make(gate, maxStreams)

// table is what a scan needs to know of a table whose key is a random UUID.
type table struct {
	name           string
	selectRange    string // rows from one token to another
	selectFiltered string // the same, with a minimum age
	newRow         func() row
}

// row is a row of a table. A page reuses one for all rows.
type row interface {
	columns() []any // Scan destinations
	key() uuid.UUID
	appendJSON(b []byte) []byte
}

// streamUsers handles GET /users/stream.
func streamUsers(w http.ResponseWriter, r *http.Request) error { return stream(w, r, usersTable) }

// getUsersPage handles GET /users/stream/pages.
func getUsersPage(w http.ResponseWriter, r *http.Request) error { return getPage(w, r, usersTable) }

// stream sends a table as a JSON array or as NDJSON and flushes it page by page.
// It reads the first page before it sends the status line, so an early failure has
// its own status. After a later one only an aborted connection can show that the
// body is incomplete.
func stream(w http.ResponseWriter, r *http.Request, t *table) error {
	s, fetchSize, err := newParameters(r).fetch(t)
	if err != nil {
		return err
	}
	if !r.ProtoAtLeast(1, 1) { // it has no framing that shows a truncated body
		w.Header().Set("Upgrade", "HTTP/1.1")
		const detail = "Streams need HTTP/1.1; for nginx set proxy_http_version 1.1"
		return &problem{Status: http.StatusUpgradeRequired, Detail: detail}
	}
	contentType := preferred(r, "application/json", ndjson)
	w.Header().Set("Vary", "Accept")
	w.Header().Set("Content-Type", contentType)
	if r.Method == http.MethodHead {
		return nil
	}
	before, end := "[", "[]\n"
	for p, err := range s.pages(r.Context(), fetchSize) {
		if err != nil {
			return &streamError{error: err, pageState: s.token(streamToken)}
		}
		text := p.json
		if contentType != ndjson && p.rows > 0 {
			io.WriteString(w, before) // its error comes again with the next write
			text, before, end = p.array(), ",", "]\n"
		}
		if _, err := w.Write(text); err != nil {
			return err
		}
		counters.rowsStreamed.Add(int64(p.rows))
		if err := http.NewResponseController(w).Flush(); err != nil {
			return err
		}
	}
	if contentType != ndjson {
		_, err = io.WriteString(w, end)
	}
	return err
}

// streamError is a failed stream and the position behind the last row it sent.
type streamError struct {
	error
	pageState string
}

func (e *streamError) Unwrap() error { return e.error }

// getPage sends one page of a table and a token for the next.
func getPage(w http.ResponseWriter, r *http.Request, t *table) error {
	s, fetchSize, err := newParameters(r).fetch(t)
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", "application/json")
		return nil
	}
	p, err := s.page(r.Context(), fetchSize)
	if err != nil {
		return err
	}
	next := "null"
	if token := s.token(streamToken); s.more() {
		next = strconv.Quote(token)
		linkNext(w, fmt.Sprintf("%s?fetch_size=%d&page_state=%s", r.URL.Path, fetchSize, token))
	}
	tail := fmt.Sprintf(`],"has_more":%t,"page_state":%s}`+"\n", s.more(), next)
	return writeBody(w, http.StatusOK, "application/json", []byte(`{"`+t.name+`":[`), p.array(), []byte(tail))
}

func linkNext(w http.ResponseWriter, target string) {
	w.Header().Set("Link", "<"+target+`>; rel="next"`)
}

// page is some rows of a scan as JSON, each with a newline behind it.
type page struct {
	json []byte
	rows int
}

// array returns the rows separated by commas, in the memory of the page. JSON text
// has no other newlines.
func (p page) array() []byte {
	text := bytes.TrimSuffix(p.json, []byte("\n"))
	for rest, found := text, 0; ; rest = rest[found+1:] {
		if found = bytes.IndexByte(rest, '\n'); found < 0 {
			return text
		}
		rest[found] = ','
	}
}

// scan is a resumable scan of a table in token order. Cassandra hashes each key
// to a token from -2^63 to 2^63-1 and stores rows in the order of their tokens,
// the ring, which is divided among the nodes. Random keys are spread evenly over
// it. So a scan can be cut into slices of equal width, and can resume behind any
// row, in a narrower slice if need be. A paging state of Cassandra, which could be
// neither narrowed nor checked, never leaves this file.
type scan struct {
	*table
	minAge   int       // 0: all rows
	left     int       // rows still to be returned; 0 at the end of the scan
	from     int64     // rows with a lower token have been returned
	behind   uuid.UUID // of the rows with this token, those up to this key, too
	upto     int64     // the last token of the slice being read
	end      int64     // the last token of the scan
	width    uint64    // tokens of a slice; 0 until it is known
	rowBytes int       // mean size of a row's JSON; 0 until it is known
}

func newScan(t *table) *scan {
	return &scan{table: t, left: unlimited, from: math.MinInt64, upto: math.MaxInt64, end: math.MaxInt64}
}

// more reports whether rows remain and the scan has not reached its end.
func (s *scan) more() bool { return s.left > 0 }

// firstPage is the first page of a slice.
type firstPage struct {
	page
	err   error
	slice *scan
}

// pages yields the rest of the scan page by page. As soon as it knows how wide a
// slice may be, it reads the first pages of several concurrently, and returns them
// in order. Its goroutines have ended when it returns.
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
		var reading sync.WaitGroup
		defer reading.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		rest, queue := *s, []chan firstPage{}
		for s.more() {
			for rest.more() && len(queue) < maxPages {
				first, slice := make(chan firstPage, 1), rest.cut()
				reading.Go(func() {
					p, err := slice.next(ctx, size)
					first <- firstPage{p, err, slice}
				})
				queue = append(queue, first)
			}
			f := <-queue[0]
			queue = queue[1:]
			for p, err := f.page, f.err; ; p, err = f.slice.next(ctx, size) {
				if !yield(s.take(f.slice, p, err)) || err != nil || !s.more() {
					return
				}
				if !f.slice.more() {
					break
				}
			}
		}
	}
}

// cut cuts the next slice off the scan.
func (s *scan) cut() *scan {
	slice := *s
	slice.left, slice.upto, slice.end = unlimited, s.bound(), s.bound()
	s.skip(slice.end)
	return &slice
}

// skip moves the scan behind a token.
func (s *scan) skip(token int64) {
	s.from, s.behind = token, uuid.Max
	if token == s.end {
		s.left = 0
	}
	s.upto = s.bound()
}

// take moves the scan behind a page of one of its slices. It drops rows beyond the
// limit.
func (s *scan) take(slice *scan, p page, err error) (page, error) {
	if err != nil {
		return p, err
	}
	if p.rows > s.left {
		lines := bytes.SplitAfterN(p.json, []byte("\n"), s.left+1)
		p.json, p.rows = p.json[:len(p.json)-len(lines[s.left])], s.left
	}
	s.left -= p.rows
	if s.from, s.behind = slice.from, slice.behind; !slice.more() {
		s.skip(slice.end)
	}
	return p, nil
}

// page reads at most size rows. It returns those found so far after pageTime, or
// after half of the time that ctx has left.
func (s *scan) page(ctx context.Context, size int) (all page, err error) {
	start, budget := time.Now(), pageTime
	if deadline, ok := ctx.Deadline(); ok {
		budget = min(budget, time.Until(deadline)/2)
	}
	if all, err = s.next(ctx, size); err != nil {
		return all, err
	}
	ctx, cancel := context.WithDeadline(ctx, start.Add(budget*3/2)) // leaves time to send what was found so far
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
// Cassandra runs out of time, it tries a narrower slice.
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

// errNoRows is a page without rows that is not the last one.
var errNoRows = errors.New("page without rows")

// isTooWide reports that a node ran out of time, or met too many tombstones.
func isTooWide(err error) bool {
	code := codeOf(err)
	return code == gocql.ErrCodeReadTimeout || code == gocql.ErrCodeReadFailure || err == errNoRows
}

// read reads one page of the slice and moves the scan behind it. It asks for one
// row more: the one behind which it resumes, or one that shows that more follow.
func (s *scan) read(ctx context.Context, size int) (p page, err error) {
	statement, values := s.selectRange, []any{s.from, s.upto}
	if s.minAge > 0 {
		statement, values = s.selectFiltered, append(values, s.minAge)
	}
	anyNode := uuid.New() // without a routing key the driver looks for one, under a lock that ignores deadlines
	query := currentSession().Query(statement, values...).WithContext(ctx).RoutingKey(anyNode[:])
	rows := query.PageSize(size + 1).PageState(nil).Iter()
	more, last, row := len(rows.PageState()) > 0, s.behind, s.newRow()
	p.json = make([]byte, 0, rows.NumRows()*(s.rowBytes+s.rowBytes/16))
	for columns := row.columns(); rows.Scan(columns...); {
		key := row.key()
		if bytes.Compare(key[:], s.behind[:]) <= 0 && tokenOf(key) == s.from {
			continue // returned before
		}
		if p.rows == size {
			more = true
			break
		}
		p.json, p.rows, last = append(row.appendJSON(p.json), '\n'), p.rows+1, key
	}
	if err := rows.Close(); err != nil {
		return page{}, err
	}
	if more && p.rows == 0 {
		return page{}, errNoRows
	}
	if s.left -= p.rows; more {
		s.from, s.behind = tokenOf(last), last
	} else {
		s.skip(s.upto)
	}
	if p.rows > 0 {
		s.rowBytes = len(p.json) / p.rows
	}
	return p, nil
}

// pageSize returns size, or fewer rows if that many would exceed a limit.
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

// setWidth makes slices so wide that they have the wanted number of rows, judging
// by the rows that lie between a token and the scan's position.
func (s *scan) setWidth(from int64, rows, wanted int) {
	tokens := float64(uint64(s.from)-uint64(from)) / float64(max(1, rows)) * float64(wanted)
	s.width = uint64(max(1, min(tokens, 1<<63)))
	s.upto = s.bound()
}

// token returns the position of the scan as URL-safe text. It contains no secret
// and needs no key, so every instance accepts it. The checksum covers the names of
// keyspace and table, too.
func (s *scan) token(kind string) string {
	position := fmt.Sprintf("%s.%d.%d.%d.%s.%d", kind, s.minAge, s.left, s.from, s.behind, s.width)
	sum := crc32.ChecksumIEEE([]byte(position + "." + global.cluster.keyspace + "." + s.name))
	return fmt.Sprintf("%s.%08x", position, sum)
}

// parseToken returns the scan at a token's position. It ignores errors in the
// fields: damaged text is not what the result formats to.
func (t *table) parseToken(text, kind string) (s *scan, ok bool) {
	s = newScan(t)
	fields := strings.Split(text+"......", ".")
	s.minAge, _ = strconv.Atoi(fields[1])
	s.left, _ = strconv.Atoi(fields[2])
	s.from, _ = strconv.ParseInt(fields[3], 10, 64)
	s.behind, _ = uuid.Parse(fields[4])
	s.width, _ = strconv.ParseUint(fields[5], 10, 64)
	s.upto = s.bound()
	return s, text == s.token(kind) && s.more() && 0 <= s.minAge && s.minAge <= maxAge
}

// tokenOf returns the token of a key, as Cassandra's Murmur3Partitioner computes
// it: the first half of the MurmurHash3 x64 128 of the key's 16 bytes.
func tokenOf(key uuid.UUID) int64 {
	const c1, c2 = 0x87c37b91114253d5, 0x4cf5ad432745937f
	k1, k2 := binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])
	h1 := bits.RotateLeft64(bits.RotateLeft64(k1*c1, 31)*c2, 27)*5 + 0x52dce729
	h2 := (bits.RotateLeft64(bits.RotateLeft64(k2*c2, 33)*c1, 31)+h1)*5 + 0x38495ab5
	h1, h2 = h1^16, h2^16
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
	url.Values
	errs []fieldError
}

func newParameters(r *http.Request) *parameters {
	values, err := url.ParseQuery(r.URL.RawQuery) // r.URL.Query drops bad parameters silently
	p := &parameters{Values: values}
	if err != nil {
		p.reject("query string", "must be percent-encoded: "+err.Error())
	}
	return p
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

// number returns a whole number clamped to high, or fallback if it is missing.
func (p *parameters) number(name string, fallback, low, high int) int {
	if !p.Has(name) {
		return fallback
	}
	n, err := strconv.ParseUint(p.Get(name), 10, 63) // returns the maximum for more
	if len(p.Values[name]) > 1 || err != nil && !errors.Is(err, strconv.ErrRange) || int(n) < low {
		p.reject(name, fmt.Sprintf("must be one whole number in plain digits, at least %d", low))
	}
	return min(int(n), high)
}

// scan returns a new scan of the table, or the one that page_state continues.
func (p *parameters) scan(t *table, kind string) *scan {
	if !p.Has("page_state") {
		return newScan(t)
	}
	s, ok := t.parseToken(p.Get("page_state"), kind)
	if !ok || len(p.Values["page_state"]) > 1 {
		p.reject("page_state", "is corrupt or belongs to another endpoint"+startAgain)
	}
	return s
}

// fetch reads the parameters of a stream or a page. With page_state, limit is
// unused, and age_filter must be missing or the same.
func (p *parameters) fetch(t *table) (s *scan, fetchSize int, err error) {
	s = p.scan(t, streamToken)
	fetchSize = p.number("fetch_size", defaultFetch, 1, maxFetch)
	limit, minAge := p.number("limit", unlimited, 1, unlimited), p.number("age_filter", s.minAge, 0, maxAge)
	if !p.Has("page_state") {
		s.left, s.minAge = limit, minAge
	} else if minAge != s.minAge && p.errs == nil {
		p.reject("page_state", "was made with another age_filter"+startAgain)
	}
	return s, fetchSize, p.err()
}
