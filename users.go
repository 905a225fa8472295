// This file defines the user: its type, rules, CQL and JSON. It shows prepared statements, lightweight transactions, a
// logged batch, idempotent retries, conditional edits and strict JSON. A copy of it is a second resource.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/mail"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxName       = 100    // characters
	maxEmail      = 254    // bytes, the longest address that SMTP carries
	maxAge        = 150    // years
	maxBatch      = 100    // users
	maxBatchBytes = 44_000 // of response JSON; Cassandra counts about as much and rejects batches above 50 KiB
	defaultList   = 10     // users in a response of GET /users
	maxList       = 100    // users
	maxMemberName = 100    // bytes; longer names are not echoed
	userSize      = 256    // bytes of JSON, enough for most users

	// insertAge is how far in the past an INSERT is stamped, and how far clocks may differ. A later transaction carries
	// a ballot from a node's clock. If that lay before the INSERT's timestamp, the change would be reported as applied
	// and silently lost. The id is new, so no older write shadows the row, and repeating the INSERT is harmless.
	insertAge = 24 * time.Hour
)

const (
	userColumns      = `id, created_at, updated_at, name, email, age` // in the order of user.columns
	createUsersTable = `CREATE TABLE IF NOT EXISTS "%s".users
		(id uuid PRIMARY KEY, created_at timestamp, updated_at timestamp, name text, email text, age int)`
	insertUser  = `INSERT INTO users (` + userColumns + `) VALUES (?, ?, ?, ?, ?, ?)`
	selectUser  = `SELECT ` + userColumns + ` FROM users WHERE id = ?`
	updateUser  = `UPDATE users SET updated_at = ?, name = ?, email = ?, age = ? WHERE id = ? IF `
	deleteUser  = `DELETE FROM users WHERE id = ? IF `
	ifUnchanged = `updated_at = ?`
	ifExists    = `EXISTS`

	createKeysTable = `CREATE TABLE IF NOT EXISTS "%s".idempotency_keys
		(key text PRIMARY KEY, created_at timestamp, fingerprint blob, ids frozen<list<uuid>>)
		WITH default_time_to_live = 86400`
	insertKey = `INSERT INTO idempotency_keys (key, created_at, fingerprint, ids) VALUES (?, ?, ?, ?) IF NOT EXISTS`
)

// usersTable describes the users table for scans.
var usersTable = &table{
	name:        "users",
	maxFilter:   maxAge,
	selectRange: `SELECT ` + userColumns + ` FROM users WHERE token(id) > ? AND token(id) <= ?`,
	selectFiltered: `SELECT ` + userColumns + ` FROM users WHERE token(id) > ? AND token(id) <= ? AND age >= ?
		ALLOW FILTERING`,
	newRow: func() row { return new(user) },
}

const errNoUser = notFound("User not found")

var errTagMismatch, errKeyReused = errors.New("If-Match does not match"), errors.New("idempotency key was reused")

// user is a row of the users table. Null columns, which this service never writes, read as zero values.
type user struct {
	record
	Name, Email string
	Age         int
}

// columns returns pointers to the fields in the order of userColumns. Scan fills them, an INSERT binds what they
// point to, and updateUser sets the third and later ones.
func (u *user) columns() []any {
	return []any{(*gocql.UUID)(&u.ID), &u.CreatedAt, &u.UpdatedAt, &u.Name, &u.Email, &u.Age}
}

// fields returns the fields that a client may set.
func (u *user) fields() []field {
	return []field{
		{"name", "must be text of 1 to 100 characters, at least one of them visible, without control characters or U+FFFD",
			func(v json.RawMessage) bool { return readText(v, &u.Name) && isName(u.Name) }},
		{"email", "must be one plain address of at most 254 bytes, such as ada@example.com",
			func(v json.RawMessage) bool { return readText(v, &u.Email) && isAddress(u.Email) }},
		{"age", "must be a whole number from 0 to 150",
			func(v json.RawMessage) bool { return readInteger(v, &u.Age) && 0 <= u.Age && u.Age <= maxAge }},
	}
}

// newUsers returns n users with new ids and the current time.
func newUsers(n int) []user {
	users := make([]user, n)
	now := time.Now().UnixMilli()
	for i := range users {
		users[i].record = record{uuid.New(), now, now}
	}
	return users
}

// postUser handles POST /users.
func postUser(w http.ResponseWriter, r *http.Request) error {
	body, key, errs, err := readPost(r)
	if err != nil {
		return err
	}
	users := newUsers(1)
	u := &users[0]
	if errs = append(errs, readFields(u.fields(), body, "", true)...); errs != nil {
		return invalid(errs...)
	}
	err = createUsers(w, r, insert, key, users)
	w.Header().Set("Location", "/users/"+u.ID.String()) // also sent with a 504: the user may exist
	if err != nil {
		return err
	}
	return writeUser(w, http.StatusCreated, u)
}

// postBatch handles POST /users/batch. It writes nothing unless all elements are valid and small enough together.
func postBatch(w http.ResponseWriter, r *http.Request) error {
	body, key, errs, err := readPost(r)
	if err != nil {
		return err
	}
	var elements []json.RawMessage
	for _, element := range members(body) {
		if elements = append(elements, element); len(elements) > maxBatch {
			break
		}
	}
	if body[0] != '[' || len(elements) == 0 || len(elements) > maxBatch {
		return invalid(append(errs, inBody("", fmt.Sprintf("must be an array of 1 to %d users", maxBatch)))...)
	}
	users := newUsers(len(elements))
	for i := 0; i < len(elements) && len(errs) < maxErrors; i++ {
		errs = append(errs, readFields(users[i].fields(), elements[i], "/"+strconv.Itoa(i), true)...)
	}
	if errs != nil {
		return invalid(errs...)
	}
	if n := len(appendBatch(users)); n > maxBatchBytes {
		detail := fmt.Sprintf("Batch too large: %d bytes of response JSON, limit %d; split it", n, maxBatchBytes)
		return refuse(http.StatusRequestEntityTooLarge, detail)
	}
	if err := createUsers(w, r, batchInsert, key, users); err != nil {
		return err
	}
	return writeBody(w, http.StatusCreated, "application/json", appendBatch(users))
}

// appendBatch returns the response of POST /users/batch.
func appendBatch(users []user) []byte {
	b := fmt.Appendf(nil, `{"count":%d,"created":[`, len(users))
	for i := range users {
		b = append(users[i].appendJSON(b), ',')
	}
	return append(b[:len(b)-1], "]}\n"...)
}

// getUser handles GET /users/{id}. With Cache-Control: no-cache it first settles an unfinished transaction on the user.
func getUser(w http.ResponseWriter, r *http.Request, id uuid.UUID) error {
	caching := strings.ToLower(strings.Join(r.Header["Cache-Control"], ","))
	u, err := readUser(r.Context(), id, strings.Contains(caching, "no-cache"))
	if err != nil {
		return err
	}
	if tags := r.Header["If-None-Match"]; tags != nil && (matches(tags, u.etag()) || matches(tags, "W/"+u.etag())) {
		w.Header().Set("ETag", u.etag())
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeUser(w, http.StatusOK, &u)
}

// editUser handles PUT and PATCH /users/{id}.
func editUser(w http.ResponseWriter, r *http.Request, id uuid.UUID) error {
	mediaTypes, replace := []string{"application/json"}, r.Method == http.MethodPut
	if !replace {
		mediaTypes = append(mediaTypes, "application/merge-patch+json")
	}
	body, err := readJSON(r, mediaTypes...)
	if err != nil {
		return err
	}
	if errs := readFields(new(user).fields(), body, "", replace); errs != nil {
		return invalid(errs...)
	}
	u, err := changeUser(r.Context(), id, r.Header["If-Match"], func(u *user) {
		if replace {
			*u = user{record: u.record}
		}
		readFields(u.fields(), body, "", replace)
	})
	if err != nil {
		w.Header().Set("ETag", u.etag()) // sent with 412
		return err
	}
	return writeUser(w, http.StatusOK, &u)
}

// removeUser handles DELETE /users/{id}. Deleting a missing user is not an error, unless the request has If-Match.
func removeUser(w http.ResponseWriter, r *http.Request, id uuid.UUID) (err error) {
	var u user
	if tags := r.Header["If-Match"]; tags == nil {
		_, err = runTransaction(r.Context(), id, deleteUser+ifExists, gocql.UUID(id))
	} else if u, err = changeUser(r.Context(), id, tags, nil); errors.Is(err, errNoUser) {
		return errTagMismatch
	}
	if err != nil {
		w.Header().Set("ETag", u.etag()) // sent with 412
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// createUsers writes new users, or the same ones again. A logged batch writes all or, eventually, none, but a reader
// may see some of them for a moment.
func createUsers(w http.ResponseWriter, r *http.Request, kind queryKind, key string, users []user) (err error) {
	isReplay := false
	if key != "" {
		records, sent := make([]*record, len(users)), []byte("users")
		for i, u := range users { // u is a copy, here without id and times
			records[i], u.record = &users[i].record, record{}
			sent = u.appendJSON(sent)
		}
		if isReplay, err = recordKey(r.Context(), key, kind, sent, records); err != nil {
			return err
		}
	}
	_, err = hedge(r.Context(), true, func(ctx context.Context) (none struct{}, err error) {
		u, db := &users[0], currentSession()
		stamp := time.UnixMilli(u.CreatedAt).Add(-insertAge).UnixMicro()
		if kind == insert {
			query := db.Query(insertUser, u.columns()...).WithContext(ctx).RoutingKey(u.ID[:])
			return none, queryErrorf(insert, query.WithTimestamp(stamp).Exec(), "inserting user %s", u.ID)
		}
		batch := db.NewBatch(gocql.LoggedBatch).WithContext(ctx).WithTimestamp(stamp)
		for i := range users {
			batch.Bind(insertUser, values(users[i].columns()...))
		}
		return none, queryErrorf(batchInsert, db.ExecuteBatch(batch), "inserting a batch of %d users", len(users))
	})
	if isReplay && err == nil {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	return err
}

// readUser returns a user or errNoUser. A linearizable read first settles a transaction that was proposed but left
// unfinished, so that it can't change the user later. A transaction that is not proposed yet still can.
func readUser(ctx context.Context, id uuid.UUID, linearizable bool) (user, error) {
	return hedge(ctx, true, func(ctx context.Context) (u user, err error) {
		query := currentSession().Query(selectUser, gocql.UUID(id)).WithContext(ctx).RoutingKey(id[:])
		if linearizable {
			query.Consistency(gocql.Consistency(gocql.LocalSerial))
		}
		err = query.Scan(u.columns()...)
		if errors.Is(err, gocql.ErrNotFound) {
			return u, errNoUser
		}
		return u, queryErrorf(read, err, "reading user %s", id)
	})
}

// changeUser applies a change to the current user and returns the user as written. It deletes the user if change is
// nil. It returns the current user and errTagMismatch if ifMatch is not nil and does not match.
func changeUser(ctx context.Context, id uuid.UUID, ifMatch []string, change func(*user)) (u user, err error) {
	lock := lockOf(string(id[:]))
	if err := lock.wait(ctx); err != nil {
		return u, err
	}
	defer lock.leave()
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		if u, err = readUser(ctx, id, false); err != nil {
			return u, err
		}
		if ifMatch != nil && !matches(ifMatch, u.etag()) {
			return u, errTagMismatch
		}
		if applied, err := compareAndSet(ctx, &u, change); applied || err != nil {
			return u, err
		}
		sleep(ctx, rand.N(pause)) // an edit on another instance came first
	}
}

// compareAndSet writes the change if the user is still as it was read.
func compareAndSet(ctx context.Context, u *user, change func(*user)) (applied bool, err error) {
	condition, args := ifUnchanged, []any{gocql.UUID(u.ID), u.UpdatedAt}
	if u.UpdatedAt == 0 { // null: IF updated_at = null also holds for a missing user, and would create half of one
		condition, args = ifExists, args[:1]
	}
	if change == nil {
		return runTransaction(ctx, u.ID, deleteUser+condition, args...)
	}
	change(u)
	u.UpdatedAt = max(time.Now().UnixMilli(), u.UpdatedAt+1) // each version of a user has its own
	return runTransaction(ctx, u.ID, updateUser+condition, append(u.columns()[2:], args...)...)
}

func writeUser(w http.ResponseWriter, status int, u *user) error {
	w.Header().Set("ETag", u.etag())
	return writeBody(w, status, "application/json", append(u.appendJSON(make([]byte, 0, userSize)), '\n'))
}

// appendJSON appends the user as JSON: the same bytes in every response.
func (u *user) appendJSON(b []byte) []byte {
	b = append(append(b, `{"id":"`...), u.ID.String()...)
	b = appendString(append(b, `","name":`...), u.Name)
	b = appendString(append(b, `,"email":`...), u.Email)
	b = strconv.AppendInt(append(b, `,"age":`...), int64(u.Age), 10)
	b = appendTime(append(b, `,"created_at":`...), u.CreatedAt)
	b = appendTime(append(b, `,"updated_at":`...), u.UpdatedAt)
	return append(b, '}')
}

func isName(text string) bool {
	isLegal := utf8.RuneCountInString(text) <= maxName && !strings.ContainsFunc(text, unicode.IsControl)
	return isLegal && strings.ContainsFunc(text, isVisible)
}

// isAddress reports whether the text is an address, without display name or comment.
func isAddress(text string) bool {
	if len(text) > maxEmail { // net/mail takes a second for a megabyte
		return false
	}
	address, err := mail.ParseAddress(text)
	return err == nil && address.Address == text && strings.TrimLeftFunc(text, isVisible) == ""
}

// The rest of this file serves every resource.

// record holds the columns that the table of every resource has.
type record struct {
	ID                   uuid.UUID
	CreatedAt, UpdatedAt int64 // milliseconds since 1970, the precision of Cassandra's timestamp
}

// etag returns the row's entity tag, which every change changes.
func (r *record) etag() string { return `"` + strconv.FormatInt(r.UpdatedAt, 10) + `"` }

// list handles GET of a table's path: some rows, and a link to the next ones.
func (t *table) list(w http.ResponseWriter, r *http.Request) error {
	params := newParameters(r)
	limit := params.number("limit", defaultList, 1, maxList)
	s := params.scan(t, listToken)
	if params.err != nil {
		return params.err
	}
	p, err := s.page(r.Context(), limit)
	if err != nil {
		return err
	}
	if s.more() {
		w.Header().Set("Link", fmt.Sprintf(`<%s?limit=%d&page_state=%s>; rel="next"`, r.URL.Path, limit, s.token(listToken)))
	}
	return writeBody(w, http.StatusOK, "application/json", []byte("["), p.array(), []byte("]\n"))
}

// recordKey records the ids and time of new rows under an idempotency key. If the key exists, it copies the recorded
// ids and time to the rows, or returns errKeyReused if the key was used for a different request.
func recordKey(ctx context.Context, key string, kind queryKind, sent []byte, rows []*record) (replay bool, err error) {
	lock := lockOf(key)
	if err := lock.wait(ctx); err != nil {
		return false, err
	}
	defer lock.leave()
	ids := make([]gocql.UUID, len(rows))
	for i, row := range rows {
		ids[i] = gocql.UUID(row.ID)
	}
	sum, now := sha256.Sum256(append(sent, byte(kind))), rows[0].CreatedAt
	first, err := hedge(ctx, true, func(ctx context.Context) (map[string]any, error) {
		first := map[string]any{}
		query := currentSession().Query(insertKey, key, now, sum[:], ids).WithContext(ctx)
		_, err := query.RoutingKey([]byte(key)).MapScanCAS(first)
		return first, queryErrorf(kind, err, "recording an idempotency key")
	})
	if len(first) == 0 || err != nil { // an INSERT that was applied returns no row
		return false, err
	}
	if !bytes.Equal(first["fingerprint"].([]byte), sum[:]) {
		return false, errKeyReused
	}
	recorded, created := first["ids"].([]gocql.UUID), first["created_at"].(time.Time).UnixMilli()
	for i, row := range rows {
		*row = record{uuid.UUID(recorded[i]), created, created}
	}
	return recorded[0] != ids[0], nil // equal: the first attempt of this very INSERT recorded them
}

// runTransaction runs a lightweight transaction on one row.
func runTransaction(ctx context.Context, id uuid.UUID, statement string, args ...any) (applied bool, err error) {
	return hedge(ctx, false, func(ctx context.Context) (bool, error) {
		query := currentSession().Query(statement, args...).WithContext(ctx).RoutingKey(id[:])
		applied, err := query.ScanCAS(new(int64))
		return applied, queryErrorf(edit, err, "editing %s", id)
	})
}

// values binds the values of a statement in a batch. Batch.Query would make the driver look for a routing key, under
// a lock that ignores deadlines.
func values(list ...any) func(*gocql.QueryInfo) ([]any, error) {
	return func(*gocql.QueryInfo) ([]any, error) { return list, nil }
}

// rowLocks serialize edits of a user and uses of a key, since concurrent transactions on a row time out. Few rows share
// a lock, and clients can't choose which.
var lockSeed, rowLocks = maphash.MakeSeed(), func() (gates [4096]gate) {
	for i := range gates {
		gates[i] = make(gate, 1)
	}
	return gates
}()

func lockOf(row string) gate { return rowLocks[maphash.String(lockSeed, row)%uint64(len(rowLocks))] }

// field is a field that a client may set. set reads a JSON value into it and reports whether it follows the rule.
type field struct {
	name, rule string
	set        func(value json.RawMessage) bool
}

// readFields reads the members of a JSON object into fields and returns all errors; at is the object's JSON Pointer.
// If all is false, fields may be missing. Read-only fields are ignored, so a GET response can be edited and PUT back.
func readFields(fields []field, object json.RawMessage, at string, all bool) (errs []fieldError) {
	if object[0] != '{' {
		return []fieldError{inBody(at, "must be an object; its fields are "+namesOf(fields))}
	}
	seen := map[string]bool{}
	for name, value := range members(object) {
		pointer, rule := at+"/"+pointerEscaper.Replace(name), ""
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == name })
		switch {
		case len(errs) >= maxErrors:
			return errs
		case len(name) > maxMemberName:
			pointer, rule = at, fmt.Sprintf("has a member name of more than %d bytes", maxMemberName)
		case seen[name]:
			rule = "appears more than once"
		case i >= 0 && !fields[i].set(value):
			rule = fields[i].rule
		case i < 0 && !slices.Contains([]string{"id", "created_at", "updated_at"}, name): // read-only: ignored
			rule = "unknown field; the fields are " + namesOf(fields) + " (case-sensitive)"
		}
		if seen[name] = true; rule != "" {
			errs = append(errs, inBody(pointer, rule))
		}
	}
	isSeen := func(f field) bool { return seen[f.name] }
	for _, f := range fields {
		if all && !isSeen(f) && !f.set(json.RawMessage("null")) { // an optional field accepts null
			errs = append(errs, inBody(at+"/"+f.name, "is missing; it "+f.rule))
		}
	}
	if errs == nil && !slices.ContainsFunc(fields, isSeen) {
		errs = append(errs, inBody(at, "must have at least one of "+namesOf(fields)))
	}
	return errs
}

// namesOf returns a list such as "name, email and age".
func namesOf(fields []field) string {
	list := fields[0].name
	for _, f := range fields[1:] {
		list += ", " + f.name
	}
	last := strings.LastIndex(list, ", ")
	return list[:last] + " and " + list[last+2:]
}

// readJSON returns the body, which must be one JSON value of one of the media types.
func readJSON(r *http.Request, mediaTypes ...string) (json.RawMessage, error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(mediaTypes, mediaType) {
		return nil, refuse(http.StatusUnsupportedMediaType, "Send the body as JSON: -H 'Content-Type: "+mediaTypes[0]+"'")
	}
	body := r.Body.(receivedBody).Bytes()
	if len(bytes.TrimSpace(body)) == 0 {
		return nil, invalid(inBody("", "must be JSON; it is empty"))
	}
	if json.Valid(body) {
		return bytes.TrimSpace(body), nil
	}
	err = json.Unmarshal(body, new(json.RawMessage))
	return nil, invalid(inBody("", "must be one JSON value: "+err.Error()))
}

func inBody(pointer, detail string) fieldError { return fieldError{Pointer: &pointer, Detail: detail} }

// pointerEscaper makes a member's name a part of a JSON Pointer.
var pointerEscaper = strings.NewReplacer("~", "~0", "/", "~1")

// members yields the members of a valid JSON object, or the elements of an array. encoding/json alone would match
// NAME to name and drop duplicates.
func members(value json.RawMessage) iter.Seq2[string, json.RawMessage] {
	return func(yield func(string, json.RawMessage) bool) {
		decoder := json.NewDecoder(bytes.NewReader(value))
		start, _ := decoder.Token()
		for name := json.Token(""); decoder.More(); {
			if start == json.Delim('{') {
				name, _ = decoder.Token()
			}
			var value json.RawMessage
			if decoder.Decode(&value) != nil || !yield(name.(string), value) {
				return
			}
		}
	}
}

// readText reads a JSON string and rejects U+FFFD, which encoding/json uses for invalid UTF-8 and lone surrogates.
func readText(value json.RawMessage, to *string) bool {
	return value[0] == '"' && json.Unmarshal(value, to) == nil && !strings.ContainsRune(*to, utf8.RuneError)
}

// readInteger reads a JSON number with an integer value, such as 30, 30.0 or 3e1.
func readInteger(value json.RawMessage, to *int) bool {
	var n float64
	ok := value[0] != 'n' && json.Unmarshal(value, &n) == nil && n == math.Trunc(n) && math.Abs(n) <= math.MaxInt32
	*to = int(n)
	return ok
}

func isVisible(r rune) bool { return unicode.IsGraphic(r) && !unicode.IsSpace(r) }

// withID parses the {id} of the path. uuid.Parse alone also accepts braces, a urn: prefix and 32 bare digits.
func withID(h func(w http.ResponseWriter, r *http.Request, id uuid.UUID) error) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		id, err := uuid.Parse(r.PathValue("id"))
		if err != nil || len(r.PathValue("id")) != 36 {
			return refuse(http.StatusBadRequest, "Invalid UUID format")
		}
		return h(w, r, id)
	}
}

// readPost returns the body, the Idempotency-Key or "", and their errors.
func readPost(r *http.Request) (body json.RawMessage, key string, errs []fieldError, err error) {
	body, err = readJSON(r, "application/json")
	keys := r.Header["Idempotency-Key"]
	if key = strings.Join(keys, " "); keys != nil && !visibleASCII.MatchString(key) {
		const rule = "must be a single value of 1 to 255 visible ASCII characters"
		errs = []fieldError{{Header: "Idempotency-Key", Detail: rule}}
	}
	return body, key, errs, err
}

var (
	visibleASCII = regexp.MustCompile(`^[!-~]{1,255}$`)
	entityTag    = regexp.MustCompile(`(W/)?"[^"]*"`)
	tagList      = regexp.MustCompile(`^(W/)?"[^"]*"(\s*,\s*(W/)?"[^"]*")*$`)
)

// matches reports whether a list of entity tags has the tag or is *. A malformed list has no tags.
func matches(header []string, tag string) bool {
	list := strings.TrimSpace(strings.Join(header, ","))
	return list == "*" || tagList.MatchString(list) && slices.Contains(entityTag.FindAllString(list, -1), tag)
}

// appendTime appends milliseconds since 1970 as RFC 3339 text. The time package is three times as fast with its own
// layout as with one that has milliseconds.
func appendTime(b []byte, milliseconds int64) []byte {
	at := time.UnixMilli(milliseconds).UTC()
	b = at.AppendFormat(append(b, '"'), time.RFC3339)
	ms := at.Nanosecond() / int(time.Millisecond)
	return append(b[:len(b)-1], '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z', '"')
}

// appendString appends text as JSON. encoding/json takes ten times as long, so it only gets text that needs escaping.
func appendString(b []byte, text string) []byte {
	plain := utf8.ValidString(text)
	for i := range len(text) {
		c := text[i]
		plain = plain && c >= ' ' && c != '"' && c != '\\' && c != 0xE2 // 0xE2 begins U+2028 and U+2029
	}
	if plain {
		return append(append(append(b, '"'), text...), '"')
	}
	var quoted bytes.Buffer
	encoder := json.NewEncoder(&quoted)
	encoder.SetEscapeHTML(false)
	encoder.Encode(text) // a string always encodes
	return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
}
