// This file sends result sets of any size in bounded memory: as one JSON array
// (or NDJSON) row by row, or page by page with a token for the next. It shows
// token ranges read side by side, back-pressure, cancellation, and why a stream
// that fails must abort its connection. It leans on main.go (parameters,
// preferred, invalid, unavailable, fieldError, writeJSON, read; and for the abort
// and the deadline of each write on route.ServeHTTP, recorder and
// limitSendBuffer), health.go (currentSession, failed), users.go (timestamp,
// maxAge) and three counters of metrics.go.

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"math"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gocql/gocql"
)

const (
	maxStreams   = 64       // at once; each holds up to sideBySide+1 pages
	sideBySide   = 3        // parts of the table that one stream reads at once
	defaultFetch = 1000     // rows in a Cassandra page, where throughput has nearly levelled off
	maxFetch     = 5000     // rows; a page of the longest users is then some 3 MB
	writeSize    = 32 << 10 // bytes in one write to the client
	maxRow       = 4 << 10  // bytes of one user's JSON, more than any can have
	ndjson       = "application/x-ndjson"
	unlimited    = math.MaxInt
	noAgeFilter  = -1
)

// A stream reads slices of the token range side by side, each wide enough for
// most of a page. A filter makes Cassandra look through rows that it does not
// return, some 500 000 a second, so a page that finds too little runs into the
// node's 5 s timeout at about 2.5 million rows: there a slice is also no wider
// than can be looked through in sliceTime. BenchmarkFilters compares, over five
// million users of which none, half and all match: slices side by side take 8, 17
// and 21 s, one after the other 13, 27 and 37 s, and an SAI index, which every
// write pays for, 0.2, 149 and 140 s.
const (
	firstSlice = 1 << 52                // of 2^64 tokens: a 4096th of the table
	maxGrowth  = 16                     // from one slice to the next
	sliceTime  = 500 * time.Millisecond // for the node to look through one
	pageTime   = 2 * time.Second        // after which a page is answered with what was found
)

const (
	selectRange      = `SELECT id, name, email, age, created_at, updated_at FROM users WHERE token(id) > ? AND token(id) <= ?`
	selectRangeByAge = selectRange + ` AND age >= ? ALLOW FILTERING`
)

// streamUsers answers GET /users/stream. The status line is sent with the first
// rows, so a failure of the first page still gets its own status.
func streamUsers(w http.ResponseWriter, r *http.Request) error {
	params := &parameters{query: r.URL.RawQuery}
	s := newScan(params.ageFilter(), params.number("limit", unlimited, 1, unlimited))
	fetchSize := params.number("fetch_size", defaultFetch, 1, maxFetch)
	if err := params.err(); err != nil {
		return err
	}
	out := newRowWriter(w, preferred(r, "application/json", ndjson))
	if r.Method == http.MethodHead {
		return nil
	}
	defer counters.streams.Add(-1)
	if counters.streams.Add(1) > maxStreams {
		return unavailable("Too many streams at once; try again in a second")
	}
	for rows, err := range pagesAhead(r.Context(), &counters.scans, s.parts(fetchSize)) {
		if err != nil {
			return err
		}
		if err := out.writeRows(rows); err != nil {
			return err
		}
	}
	return out.end()
}

// pageOfUsers is the answer of GET /users/stream/pages.
type pageOfUsers struct {
	Users     json.RawMessage `json:"users"`
	HasMore   bool            `json:"has_more"`
	PageState *string         `json:"page_state"`
}

// getPage answers GET /users/stream/pages.
func getPage(w http.ResponseWriter, r *http.Request) error {
	params := &parameters{query: r.URL.RawQuery}
	age := params.ageFilter()
	fetchSize := params.number("fetch_size", defaultFetch, 1, maxFetch)
	s, given := params.pageState(pagesEndpoint)
	switch {
	case !given:
		s = newScan(age, params.number("limit", unlimited, 1, unlimited))
	case s != nil && age != noAgeFilter && age != s.minAge:
		params.reject("page_state", "was made for another age_filter; "+startAgain)
	}
	if err := params.err(); err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", "application/json")
		return nil
	}
	users, err := s.readPage(r.Context(), fetchSize)
	if err != nil {
		return err
	}
	answer := pageOfUsers{Users: users, HasMore: s.more()}
	if s.more() {
		answer.PageState = new(s.token(pagesEndpoint))
		linkNext(w, fmt.Sprintf("/users/stream/pages?fetch_size=%d&page_state=%s", fetchSize, *answer.PageState))
	}
	return writeJSON(w, http.StatusOK, answer)
}

func linkNext(w http.ResponseWriter, target string) {
	w.Header().Set("Link", "<"+target+`>; rel="next"`)
}

func (p *parameters) ageFilter() int { return p.number("age_filter", noAgeFilter, 0, maxAge) }

// page is some rows of a scan, and whether more may follow.
type page struct {
	rows *gocql.Iter
	more bool
}

// nextPage fetches one page of a walk after the other.
type nextPage func(context.Context) (page, error)

// alone is the one part of a walk that is not divided.
func alone(next nextPage) iter.Seq[nextPage] {
	return func(yield func(nextPage) bool) { yield(next) }
}

// fetched is a page, or why there is none.
type fetched struct {
	page
	err error
}

// fetchAll fetches page after page until the last one or an error, each while
// the one before waits for its reader, who must read to the end. What comes after
// the end of ctx is an error, so that no walk looks whole that isn't.
func (next nextPage) fetchAll(ctx context.Context) chan fetched {
	pages := make(chan fetched)
	go func() {
		defer close(pages)
		for more := true; more; {
			p, err := next(ctx)
			if err == nil {
				err = ctx.Err()
			}
			more = p.more && err == nil
			pages <- fetched{p, err}
		}
	}()
	return pages
}

// pagesAhead yields all pages of one part after the other while it fetches those
// to come, of so many parts at once as sideBySide says. It ends what is under
// way when the reader stops or ctx ends; open counts it from its start to its
// end.
func pagesAhead(ctx context.Context, open *atomic.Int64, parts iter.Seq[nextPage]) iter.Seq2[*gocql.Iter, error] {
	return func(yield func(*gocql.Iter, error) bool) {
		open.Add(1)
		defer open.Add(-1)
		ctx, cancel := context.WithCancel(ctx)
		begun := make(chan chan fetched, sideBySide-2) // besides the one being read and the one being put here
		go func() {
			defer close(begun)
			for part := range parts {
				ended := ctx.Err() != nil // then this part fails, and is the last
				begun <- part.fetchAll(ctx)
				if ended {
					return
				}
			}
		}()
		pages := <-begun
		defer func() {
			cancel()
			for ; pages != nil; pages = <-begun { // nil once all are read
				for range pages {
				}
			}
		}()
		for ; pages != nil; pages = <-begun {
			for p := range pages {
				if !yield(p.rows, p.err) || p.err != nil {
					return
				}
			}
		}
	}
}

// scan is a walk through the users table, and the place where it stands.
// Cassandra hashes each key to a token from -2^63 to 2^63-1 and keeps rows in
// the order of their tokens, the ring; the walk goes from the lowest up, a slice
// of the ring at a time.
type scan struct {
	minAge int           // noAgeFilter, or 0 to 150
	left   int           // rows still to be given
	after  int64         // the slice being read begins behind this
	upto   int64         // and ends with this
	state  []byte        // Cassandra's paging state within it, empty at its start
	rows   int           // read of it so far
	took   time.Duration // to read them
	width  uint64        // of the next slice, in tokens
	end    int64         // of the walk
}

func newScan(minAge, limit int) *scan {
	s := &scan{minAge: minAge, left: limit, after: math.MinInt64, end: math.MaxInt64, width: math.MaxUint64}
	if s.isFiltered() {
		s.width = firstSlice
	}
	s.upto = s.nextBound()
	return s
}

// parts divides a walk that has not begun into slices, to be read side by side;
// one with a limit is not divided, for nobody knows how many slices it takes.
func (s *scan) parts(size int) iter.Seq[nextPage] {
	if s.left < unlimited {
		return alone(func(ctx context.Context) (page, error) { return s.fetch(ctx, size) })
	}
	return func(yield func(nextPage) bool) {
		var width atomic.Uint64 // as the part that ended last found it
		width.Store(firstSlice)
		for after := s.after; after < s.end; {
			part := &scan{minAge: s.minAge, left: unlimited, after: after, end: s.end, width: width.Load()}
			part.upto = part.nextBound()
			part.end, after = part.upto, part.upto
			if !yield(func(ctx context.Context) (page, error) {
				p, err := part.fetch(ctx, size)
				if !p.more {
					width.Store(part.width)
				}
				return p, err
			}) {
				return
			}
		}
	}
}

func (s *scan) isFiltered() bool { return s.minAge > 0 }

// more says whether rows remain to be given and the scan is not at its end.
func (s *scan) more() bool { return s.left > 0 && s.after < s.end }

// nextBound is the end of the slice that begins at after.
func (s *scan) nextBound() int64 {
	if rest := uint64(s.end) - uint64(s.after); s.width >= rest {
		return s.end
	}
	return s.after + int64(s.width)
}

// fetch reads the next page, of at most size rows and perhaps none, and moves
// the scan behind it.
func (s *scan) fetch(ctx context.Context, size int) (page, error) {
	db, err := currentSession()
	if err != nil {
		return page{}, err
	}
	statement, values := selectRange, []any{s.after, s.upto}
	if s.isFiltered() {
		statement, values = selectRangeByAge, append(values, s.minAge)
	}
	start := time.Now()
	rows := db.Query(statement, values...).WithContext(ctx).PageSize(min(size, s.left)).PageState(s.state).Iter()
	if rows.NumRows() == 0 { // as after every failure; Close would take away rows that are there
		if err := rows.Close(); err != nil {
			return s.retryNarrower(ctx, size, err)
		}
	}
	s.left -= rows.NumRows()
	s.rows += rows.NumRows()
	s.took += time.Since(start)
	s.state = rows.PageState()
	if len(s.state) == 0 {
		s.endSlice(size)
	}
	return page{rows: rows, more: s.more()}, nil
}

// endSlice moves the walk to the next slice, and makes that as wide as this one
// should have been to have four fifths of a page, within sliceTime.
func (s *scan) endSlice(size int) {
	growth := min(.8*float64(size)/float64(s.rows), sliceTime.Seconds()/s.took.Seconds(), maxGrowth)
	tokens := growth * float64(uint64(s.upto)-uint64(s.after))
	s.width = uint64(max(1, min(tokens, 1<<63)))
	s.after = s.upto
	s.upto = s.nextBound()
	s.rows, s.took = 0, 0
}

// retryNarrower tries half the slice when the node ran out of time in it, as it
// can when others keep it busy. Cassandra 5 calls that a failure.
func (s *scan) retryNarrower(ctx context.Context, size int, err error) (page, error) {
	var refused gocql.RequestError
	errors.As(err, &refused)
	tooWide := refused != nil && (refused.Code() == gocql.ErrCodeReadTimeout || refused.Code() == gocql.ErrCodeReadFailure)
	if tooWide && s.isFiltered() && len(s.state) == 0 && s.width > firstSlice {
		s.width /= 2
		s.upto = s.nextBound()
		return s.fetch(ctx, size)
	}
	isForeign := len(s.state) > 0 && s.took == 0 // the paging state came with the request
	if refused != nil && isForeign && (refused.Code() == gocql.ErrCodeProtocol || refused.Code() == gocql.ErrCodeServer) {
		return page{}, invalid(fieldError{Parameter: "page_state", Detail: "is not a place in this table; " + startAgain})
	}
	return page{}, failed(read, err, "reading a page of users")
}

// readPage reads at most size users as a JSON array. It goes on over pages that
// are not full, but not for much longer than pageTime.
func (s *scan) readPage(ctx context.Context, size int) (json.RawMessage, error) {
	array := []byte{'['}
	row := newUserRow()
	for start := time.Now(); s.more() && size > 0 && time.Since(start) < pageTime; {
		page, err := s.fetch(ctx, size)
		if err != nil {
			return nil, err
		}
		size -= page.rows.NumRows()
		for page.rows.Scan(row.dest...) {
			if len(array) > 1 {
				array = append(array, ',')
			}
			array = row.appendJSON(array)
		}
		if err := page.rows.Close(); err != nil {
			return nil, failed(read, err, "reading a page of users")
		}
	}
	return append(array, ']'), nil
}

// Page tokens are bound to what they were made for: Cassandra takes a paging
// state of another query in silence and answers with wrong rows.
const (
	listEndpoint  = 'l' // of GET /users
	pagesEndpoint = 'p' // of GET /users/stream/pages
	startAgain    = "start again without page_state"
)

// token packs the place of the scan into URL-safe text: endpoint, filter, rows
// left, range, paging state, checksum. It holds no secret and needs no key, so
// every instance takes it.
func (s *scan) token(endpoint byte) string {
	b := []byte{endpoint}
	for _, n := range []int64{int64(s.minAge), int64(s.left), s.after, s.upto} {
		b = binary.AppendVarint(b, n)
	}
	b = append(b, s.state...)
	b = binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	return base64.RawURLEncoding.EncodeToString(b)
}

// parseToken returns the scan that token packed, or nil for any other text.
func parseToken(text string, endpoint byte) *scan {
	b, err := base64.RawURLEncoding.DecodeString(text)
	// The decoder skips line breaks and ignores stray bits at the end.
	if err != nil || len(b) < 5 || base64.RawURLEncoding.EncodeToString(b) != text {
		return nil
	}
	b, sum := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if crc32.ChecksumIEEE(b) != sum || b[0] != endpoint {
		return nil
	}
	b = b[1:]
	var numbers [4]int64
	for i := range numbers {
		n, size := binary.Varint(b)
		if size <= 0 {
			return nil
		}
		numbers[i], b = n, b[size:]
	}
	s := newScan(int(numbers[0]), int(numbers[1]))
	s.after, s.upto, s.state = numbers[2], numbers[3], b
	if s.minAge < noAgeFilter || s.minAge > maxAge || s.left < 1 || s.after >= s.upto {
		return nil
	}
	return s
}

// pageState returns the scan to go on with, nil if it is rejected, and whether
// one was given.
func (p *parameters) pageState(endpoint byte) (s *scan, given bool) {
	faults := len(p.errs)
	text, given := p.text("page_state")
	if !given || len(p.errs) > faults {
		return nil, given
	}
	if s = parseToken(text, endpoint); s == nil {
		p.reject("page_state", "is damaged or of another endpoint; "+startAgain)
	}
	return s, true
}

// rowWriter writes users as a JSON array, or one a line, in writes of writeSize.
type rowWriter struct {
	w     http.ResponseWriter
	row   *userRow
	buf   []byte
	array bool
	rows  int // appended to buf so far
}

func newRowWriter(w http.ResponseWriter, contentType string) *rowWriter {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Vary", "Accept")
	return &rowWriter{w: w, row: newUserRow(), array: contentType != ndjson}
}

// writeRows writes a page and flushes it; the first one sends the status line.
func (o *rowWriter) writeRows(rows *gocql.Iter) error {
	if o.buf == nil {
		o.buf = make([]byte, 0, writeSize)
		o.w.WriteHeader(http.StatusOK)
		if o.array {
			o.buf = append(o.buf, '[')
		}
	}
	for rows.Scan(o.row.dest...) {
		if o.array && o.rows > 0 {
			o.buf = append(o.buf, ',')
		}
		o.buf = o.row.appendJSON(o.buf)
		if !o.array {
			o.buf = append(o.buf, '\n')
		}
		o.rows++
		if len(o.buf) > writeSize-maxRow {
			if err := o.write(); err != nil {
				return err
			}
		}
	}
	if err := rows.Close(); err != nil {
		return failed(read, err, "streaming users")
	}
	if err := o.write(); err != nil {
		return err
	}
	counters.rowsStreamed.Add(int64(rows.NumRows()))
	return http.NewResponseController(o.w).Flush()
}

// end closes the array. Without it, and with the connection cut, no client can
// take what it got for a whole one.
func (o *rowWriter) end() error {
	if o.array {
		o.buf = append(o.buf, "]\n"...)
	}
	return o.write()
}

func (o *rowWriter) write() error {
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

// userRow is one row, scanned again and again without an allocation: Scan into
// strings makes two or three a row.
type userRow struct {
	id               gocql.UUID
	name, email      rawText
	age              int
	created, updated int64 // milliseconds since 1970
	dest             []any // the destinations for Scan, in the order of the CQL
}

func newUserRow() *userRow {
	row := new(userRow)
	row.dest = []any{&row.id, &row.name, &row.email, &row.age, &row.created, &row.updated}
	return row
}

// rawText is a text column in the driver's buffer of its page, which the driver
// does not use again.
type rawText []byte

// UnmarshalCQL keeps the bytes without copying them.
func (t *rawText) UnmarshalCQL(_ gocql.TypeInfo, data []byte) error {
	*t = data
	return nil
}

// appendJSON appends the same bytes that encoding/json makes of a user.
func (row *userRow) appendJSON(b []byte) []byte {
	b = append(b, `{"id":"`...)
	b = appendUUID(b, row.id)
	b = append(b, `","name":`...)
	b = appendString(b, row.name)
	b = append(b, `,"email":`...)
	b = appendString(b, row.email)
	b = append(b, `,"age":`...)
	b = strconv.AppendInt(b, int64(row.age), 10)
	b = append(b, `,"created_at":"`...)
	b, _ = timestamp(row.created).AppendText(b)
	b = append(b, `","updated_at":"`...)
	b, _ = timestamp(row.updated).AppendText(b)
	return append(b, `"}`...)
}

func appendUUID(b []byte, id gocql.UUID) []byte {
	b = hex.AppendEncode(b, id[:4])
	for _, part := range [][]byte{id[4:6], id[6:8], id[8:10], id[10:]} {
		b = hex.AppendEncode(append(b, '-'), part)
	}
	return b
}

// appendString appends text as JSON. The rare text that needs escaping goes
// through encoding/json, which takes ten times as long.
func appendString(b, text []byte) []byte {
	plain := utf8.Valid(text)
	for _, c := range text {
		// 0xE2 begins U+2028 and U+2029, which encoding/json escapes.
		plain = plain && c >= ' ' && c != '"' && c != '\\' && c != 0xE2
	}
	if plain {
		b = append(b, '"')
		b = append(b, text...)
		return append(b, '"')
	}
	var quoted bytes.Buffer
	enc := json.NewEncoder(&quoted)
	enc.SetEscapeHTML(false)
	enc.Encode(string(text)) // a string always encodes
	return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
}
