// This file sends result sets of any size in bounded memory: as one JSON array, as NDJSON, or page by page. It shows a
// resumable scan, concurrent reads in order, cancellation, and why a failed stream aborts its connection.

package main

import (
	"bytes"
	"cmp"
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
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxStreams    = 64      // streams and pages that are being sent
	maxPages      = 4       // of one stream in memory: three are read while one is sent; more are no faster
	defaultFetch  = 1000    // rows in a Cassandra page, where throughput has nearly levelled off
	maxFetch      = 5000    // rows; as JSON a page of the longest users is then 4 MB
	maxAhead      = 1 << 20 // bytes of JSON in a page that is read ahead
	minCount      = 100     // rows from which the density of a table is estimated
	filterRows    = 100_000 // rows examined by one filtered query: 0.2 s, while a node's timeout is 5 s
	narrowing     = 4       // bits by which a slice is narrowed if Cassandra runs out of time
	maxNarrowings = 3       // of one slice; after that the failure is returned
	pageTime      = 2 * time.Second
	ndjson        = "application/x-ndjson"
	unlimited     = math.MaxInt
	listToken     = "list"   // the kind of page token of GET /users
	streamToken   = "stream" // of GET /users/stream and /users/stream/pages
)

var streams = make(gate, maxStreams)

// table describes a table for scans; its key is a random UUID.
type table struct {
	name           string
	selectRange    string // rows after one token, up to and including another
	selectFiltered string // the same, with a minimum age
	maxFilter      int    // the highest minimum; 0 if there is no filter
	newRow         func() row
}

// row is a row of a table. A page reuses one for all rows.
type row interface {
	columns() []any // Scan destinations; the first is the key
	appendJSON(b []byte) []byte
}

// stream handles GET /users/stream: it sends a table as a JSON array or as NDJSON and flushes it page by page. It
// reads the first page before it sends the status line, so an early failure has its own status. Only an aborted
// connection can show that a later failure left the body incomplete.
func (t *table) stream(w http.ResponseWriter, r *http.Request) error {
	s, fetchSize, err := newParameters(r).fetch(t)
	if err != nil {
		return err
	}
	if !r.ProtoAtLeast(1, 1) { // HTTP/1.0 has no framing that shows truncation
		w.Header().Set("Upgrade", "HTTP/1.1")
		return refuse(http.StatusUpgradeRequired, "Streams need HTTP/1.1; for nginx set proxy_http_version 1.1")
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
		if contentType != ndjson {
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

// streamError is a failed stream and the position after the last row it sent.
type streamError struct {
	error
	pageState string
}

func (e *streamError) Unwrap() error { return e.error }

// getPage handles GET /users/stream/pages: it sends a page and a token for the next.
func (t *table) getPage(w http.ResponseWriter, r *http.Request) error {
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
		w.Header().Set("Link", fmt.Sprintf(`<%s?fetch_size=%d&page_state=%s>; rel="next"`, r.URL.Path, fetchSize, token))
	}
	tail := fmt.Sprintf(`],"has_more":%t,"page_state":%s}`+"\n", s.more(), next)
	return writeBody(w, http.StatusOK, "application/json", []byte(`{"`+t.name+`":[`), p.array(), []byte(tail))
}

// page is some rows of a scan as JSON, each followed by a newline.
type page struct {
	json []byte
	rows int
}

// array returns the rows separated by commas, which it writes over the newlines. The rows contain no other newlines.
func (p page) array() []byte {
	for line := range bytes.Lines(p.json) {
		line[len(line)-1] = ','
	}
	return bytes.TrimSuffix(p.json, []byte(","))
}

// scan is a resumable scan of a table. Cassandra hashes each key to a token above -2^63 and stores rows in the order
// of their tokens, over which random keys are spread evenly. So a scan can be cut into slices of equal width, and can
// resume after any token, in a narrower slice if need be. Cassandra's paging state, which can be neither narrowed
// nor checked, is not used.
type scan struct {
	*table
	minAge   int    // 0: all rows
	left     int    // rows still to be returned
	from     int64  // the token up to which all rows have been returned
	end      int64  // the last token of the scan
	width    uint64 // tokens of a slice; 0 until it is known
	narrow   int    // bits by which slices are narrower for now
	rowBytes int    // mean size of a row's JSON; 0 until it is known
}

func newScan(t *table) *scan {
	return &scan{table: t, left: unlimited, from: math.MinInt64, end: math.MaxInt64}
}

// more reports whether rows remain and the scan has not reached its end.
func (s *scan) more() bool { return s.left > 0 && s.from < s.end }

// fetched is a page of a slice, or the error that prevented it.
type fetched struct {
	page
	err   error
	slice *scan
}

// pages yields the rest of the scan in order, without empty pages. It reads slices concurrently once it knows a width.
func (s *scan) pages(ctx context.Context, size int) iter.Seq2[page, error] {
	return func(yield func(page, error) bool) {
		var reading sync.WaitGroup
		defer reading.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		rest, queue := *s, []chan fetched{}
		for s.more() {
			for rest.more() && len(queue) < maxPages {
				slice := rest
				slice.end, rest.from = rest.bound(), rest.bound()
				queue = append(queue, slice.readAhead(ctx, size, &reading))
			}
			f, from := <-queue[0], s.from
			if f.rows > s.left {
				beyond := bytes.SplitAfterN(f.json, []byte("\n"), s.left+1)[s.left]
				f.page = page{bytes.TrimSuffix(f.json, beyond), s.left}
			}
			s.from, s.left, s.rowBytes = f.slice.from, s.left-f.rows, f.slice.rowBytes
			s.width, s.narrow = f.slice.width, f.slice.narrow
			if (f.rows > 0 || f.err != nil) && !yield(f.page, f.err) || f.err != nil || !s.more() {
				return
			}
			if s.width == 0 && f.rows >= minCount {
				s.setWidth(from, f.rows, 1+s.pageSize(size)*4/5)
			}
			if len(queue) > 1 && f.slice.more() {
				queue[0] = f.slice.readAhead(ctx, size, &reading)
			} else if queue = queue[1:]; len(queue) == 0 {
				rest = *s
			}
		}
	}
}

// readAhead starts to read a page of a slice.
func (s *scan) readAhead(ctx context.Context, size int, reading *sync.WaitGroup) chan fetched {
	next := make(chan fetched, 1)
	reading.Go(func() {
		p, err := s.next(ctx, size)
		next <- fetched{p, err, s}
	})
	return next
}

// page reads about size rows, or those found within pageTime or half of ctx's remaining time.
func (s *scan) page(ctx context.Context, size int) (all page, err error) {
	start, budget := time.Now(), pageTime
	if deadline, ok := ctx.Deadline(); ok {
		budget = min(budget, time.Until(deadline)/2)
	}
	all, err = s.next(ctx, size)
	ctx, cancel := context.WithDeadline(ctx, start.Add(budget*3/2)) // leaves time to send what was found so far
	defer cancel()
	for failed := err; failed == nil && s.more() && all.rows < size && time.Since(start) < budget; {
		var p page
		p, failed = s.next(ctx, size-all.rows) // failed is not returned: if it persists, the next request returns it
		all.json, all.rows = append(all.json, p.json...), all.rows+p.rows
	}
	return all, err
}

// next reads a page of about size rows, perhaps none, and moves the scan past it. It tries a narrower slice if
// Cassandra runs out of time, and widens later ones again. A filtered scan first counts rows without its filter.
func (s *scan) next(ctx context.Context, size int) (p page, err error) {
	if s.minAge > 0 && s.width == 0 {
		all := *s
		all.minAge, all.left = 0, unlimited
		if p, err = all.next(ctx, defaultFetch); err == nil {
			all.setWidth(s.from, p.rows, filterRows)
			s.width, s.narrow, s.rowBytes = all.width, all.narrow, all.rowBytes
		}
		return page{}, err
	}
	for range maxNarrowings + 1 {
		slice, f := *s, fetched{} // a copy, since a hedged attempt can outlive this one
		f, err = hedge(ctx, true, func(ctx context.Context) (fetched, error) { return slice.read(ctx, slice.pageSize(size)) })
		if err == nil {
			*s, p = *f.slice, f.page
			s.narrow = max(0, s.narrow-1)
		}
		if !isTooWide(err) {
			break
		}
		s.narrow += narrowing
	}
	return p, err
}

// isTooWide reports whether a node ran out of time, or met too many tombstones.
func isTooWide(err error) bool {
	return slices.Contains([]int{gocql.ErrCodeReadTimeout, gocql.ErrCodeReadFailure}, codeOf(err))
}

// read reads a page of the next slice and returns it with the scan after it. It requests one row more than size to find
// out whether more follow. Rows with the same token, which random keys hardly ever have, share a page.
func (s scan) read(ctx context.Context, size int) (fetched, error) {
	p, end := page{}, s.bound()
	statement, args := s.selectRange, []any{s.from, end}
	if s.minAge > 0 {
		statement, args = s.selectFiltered, append(args, s.minAge)
	}
	anyNode := uuid.New() // without a routing key the driver looks for one, under a lock that ignores deadlines
	query := currentSession().Query(statement, args...).WithContext(ctx).RoutingKey(anyNode[:])
	rows := query.PageSize(size + 1).Prefetch(0).Iter()
	p.json = make([]byte, 0, rows.NumRows()*(s.rowBytes+s.rowBytes/16))
	row, last := s.newRow(), s.from
	columns := row.columns()
	for key := columns[0].(*gocql.UUID); rows.Scan(columns...); p.rows++ {
		token := tokenOf(uuid.UUID(*key))
		if p.rows >= size && token != last || p.rows == s.left {
			end = last
			break
		}
		p.json, last = append(row.appendJSON(p.json), '\n'), token
	}
	s.from, s.left, s.rowBytes = end, s.left-p.rows, cmp.Or(len(p.json)/max(1, p.rows), s.rowBytes)
	return fetched{page: p, slice: &s}, queryErrorf(read, rows.Close(), "scanning %s", s.name)
}

// pageSize returns size, or fewer rows if that many would exceed a limit.
func (s *scan) pageSize(size int) int {
	return min(size, s.left, max(1, maxAhead/max(1, s.rowBytes)))
}

// bound returns the last token of a slice that begins where the scan is.
func (s *scan) bound() int64 {
	width := max(1, cmp.Or(s.width, math.MaxUint64)>>s.narrow)
	if width >= uint64(s.end)-uint64(s.from) {
		return s.end
	}
	return s.from + int64(width)
}

// setWidth makes slices wide enough for the wanted number of rows, extrapolated from the rows read since token from.
func (s *scan) setWidth(from int64, rows, wanted int) {
	s.width = math.MaxUint64
	if tokens := float64(uint64(s.from)-uint64(from)) / float64(max(1, rows)) * float64(wanted); tokens < 1<<64 {
		s.width = max(1, uint64(tokens))
	}
}

// token encodes the scan's position as URL-safe text, valid on every instance. The checksum covers keyspace and table.
func (s *scan) token(kind string) string {
	position := fmt.Sprintf("%s.%d.%d.%d.%d", kind, s.minAge, s.left, s.from, s.width)
	sum := crc32.ChecksumIEEE([]byte(position + "." + global.cluster.keyspace + "." + s.name))
	return fmt.Sprintf("%s.%08x", position, sum)
}

// parseToken returns the scan at a token's position. The text is valid only if that scan has exactly this token.
func (t *table) parseToken(text, kind string) (s *scan, ok bool) {
	s = newScan(t)
	fmt.Sscanf(text, kind+".%d.%d.%d.%d", &s.minAge, &s.left, &s.from, &s.width)
	return s, text == s.token(kind) && s.more() && 0 <= s.minAge && s.minAge <= t.maxFilter
}

// tokenOf returns the token of a key, as Cassandra's Murmur3Partitioner computes it: the first half of the
// MurmurHash3 x64 128 of the key's 16 bytes.
func tokenOf(key uuid.UUID) int64 {
	const c1, c2 = 0x87c37b91114253d5, 0x4cf5ad432745937f
	k1, k2 := binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])
	h1 := bits.RotateLeft64(bits.RotateLeft64(k1*c1, 31)*c2, 27)*5 + 0x52dce729
	h2 := (bits.RotateLeft64(bits.RotateLeft64(k2*c2, 33)*c1, 31)+h1)*5 + 0x38495ab5
	h1, h2 = h1^16, h2^16
	if token := int64(mix(h1+h2) + mix(h1+2*h2)); token != math.MinInt64 {
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

// parameters reads a query string and collects its errors.
type parameters struct {
	url.Values
	errs []fieldError
	err  error // the response to errs
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
	p.err = invalid(p.errs...)
}

// number returns a whole number clamped to high, or fallback if it is missing.
func (p *parameters) number(name string, fallback, low, high int) int {
	if !p.Has(name) {
		return fallback
	}
	n, err := strconv.ParseUint(p.Get(name), 10, 63) // the maximum if out of range
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
		p.reject("page_state", "is empty, repeated, corrupt or from another endpoint; start again without page_state")
	}
	return s
}

// fetch reads the parameters of a stream or a page. With page_state, limit is unused and age_filter can't change.
func (p *parameters) fetch(t *table) (s *scan, fetchSize int, err error) {
	s, fetchSize = p.scan(t, streamToken), p.number("fetch_size", defaultFetch, 1, maxFetch)
	limit, minAge := p.number("limit", unlimited, 1, unlimited), p.number("age_filter", s.minAge, 0, t.maxFilter)
	if !p.Has("page_state") {
		s.left, s.minAge = limit, minAge
	} else if minAge != s.minAge && p.err == nil {
		p.reject("page_state", "was made with another age_filter; start again without page_state")
	}
	return s, fetchSize, p.err
}
