// This file is the user: what one is, which bodies are valid, and the CQL that
// creates, reads, changes, deletes and lists them. It shows prepared statements,
// lightweight transactions and a logged batch, and why an INSERT is stamped in
// the past.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/mail"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	maxName       = 100       // characters
	maxEmail      = 254       // bytes, the longest that SMTP carries
	maxAge        = 150       // years
	maxBatch      = 100       // users
	maxBatchBytes = 48 * 1000 // as user.bytes counts; Cassandra refuses batches above 50 KiB
	defaultList   = 10        // users in an answer of GET /users
	maxList       = 100
)

// insertAge is how far in the past an INSERT is stamped. A later UPDATE or
// DELETE … IF EXISTS carries a ballot of the coordinator's clock, in whole
// milliseconds; one that lies before the INSERT's stamp is answered "applied"
// and lost without a word. The id is new, so nothing older can shadow the row.
const insertAge = 10 * time.Second

const (
	createUsersTable = `CREATE TABLE IF NOT EXISTS "%s".users (id uuid PRIMARY KEY, name text, email text, age int, created_at timestamp, updated_at timestamp)`
	insertUser       = `INSERT INTO users (id, name, email, age, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)`
	selectUser       = `SELECT name, email, age, created_at, updated_at FROM users WHERE id = ?`
	updateUser       = `UPDATE users SET name = ?, email = ?, age = ?, updated_at = ? WHERE id = ? IF EXISTS`
	removeUser       = `DELETE FROM users WHERE id = ? IF EXISTS`
)

// user is a row of the users table and its JSON.
type user struct {
	ID        uuid.UUID `json:"id"`
	Name      string    `json:"name"`
	Email     string    `json:"email"`
	Age       int       `json:"age"`
	CreatedAt timestamp `json:"created_at"`
	UpdatedAt timestamp `json:"updated_at"`
}

// timestamp is milliseconds since 1970, all that Cassandra keeps of a time.
type timestamp int64

func now() timestamp { return timestamp(time.Now().UnixMilli()) }

// AppendText appends RFC 3339 in UTC with exactly three digits of a second. The
// time package is three times as fast with its own layout as with ours.
func (t timestamp) AppendText(b []byte) ([]byte, error) {
	at := time.UnixMilli(int64(t)).UTC()
	b = at.AppendFormat(b, time.RFC3339)
	ms := at.Nanosecond() / int(time.Millisecond)
	return append(b[:len(b)-1], '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10), 'Z'), nil
}

// MarshalText is what encoding/json asks for.
func (t timestamp) MarshalText() ([]byte, error) { return t.AppendText(make([]byte, 0, 24)) }

// postUser answers POST /users.
func postUser(w http.ResponseWriter, r *http.Request) error {
	body, err := readJSON(r, "application/json")
	if err != nil {
		return err
	}
	given, errs := parseUserFields(body, "", true)
	if errs != nil {
		return invalid(errs...)
	}
	u := given.newUser()
	if err := createUser(r.Context(), u); err != nil {
		return err
	}
	w.Header().Set("Location", "/users/"+u.ID.String())
	return writeJSON(w, http.StatusCreated, u)
}

// listUsers answers GET /users.
func listUsers(w http.ResponseWriter, r *http.Request) error {
	params := &parameters{query: r.URL.RawQuery}
	limit := params.number("limit", defaultList, 1, maxList)
	s, given := params.pageState(listEndpoint)
	if !given {
		s = newScan(noAgeFilter, unlimited)
	}
	if err := params.err(); err != nil {
		return err
	}
	users, err := s.readPage(r.Context(), limit)
	if err != nil {
		return err
	}
	if s.more() {
		linkNext(w, fmt.Sprintf("/users?limit=%d&page_state=%s", limit, s.token(listEndpoint)))
	}
	return writeJSON(w, http.StatusOK, users)
}

// batchAnswer is the answer of POST /users/batch.
type batchAnswer struct {
	Count   int    `json:"count"`
	Created []user `json:"created"`
}

// postBatch answers POST /users/batch. Nothing is written before every element
// is valid and all of them together are small enough.
func postBatch(w http.ResponseWriter, r *http.Request) error {
	body, err := readJSON(r, "application/json")
	if err != nil {
		return err
	}
	var elements []json.RawMessage
	if json.Unmarshal(body, &elements) != nil || len(elements) == 0 || len(elements) > maxBatch {
		return invalid(inBody("", fmt.Sprintf("must be an array of 1 to %d users", maxBatch)))
	}
	var errs []fieldError
	users := make([]user, len(elements))
	size := 0
	for i, element := range elements {
		given, wrong := parseUserFields(element, "/"+strconv.Itoa(i), true)
		if errs = append(errs, wrong...); errs == nil {
			users[i] = given.newUser()
			size += users[i].bytes()
		}
	}
	if errs != nil {
		return invalid(errs...)
	}
	if size > maxBatchBytes {
		return &problem{Status: http.StatusRequestEntityTooLarge, Detail: fmt.Sprintf("The users of a batch may have %d bytes in all, these have %d (%d a user besides its texts); send them in several", maxBatchBytes, size, userOverhead)}
	}
	if err := createUsersAtOnce(r.Context(), users); err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, batchAnswer{Count: len(users), Created: users})
}

// getUser answers GET /users/{id}.
func getUser(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	u, err := readUser(r.Context(), id)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, u)
}

// putUser answers PUT /users/{id}.
func putUser(w http.ResponseWriter, r *http.Request) error {
	return changeUser(w, r, true, "application/json")
}

// patchUser answers PATCH /users/{id}.
func patchUser(w http.ResponseWriter, r *http.Request) error {
	return changeUser(w, r, false, "application/json", "application/merge-patch+json")
}

func changeUser(w http.ResponseWriter, r *http.Request, whole bool, mediaTypes ...string) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	body, err := readJSON(r, mediaTypes...)
	if err != nil {
		return err
	}
	given, errs := parseUserFields(body, "", whole)
	if errs == nil && given == (userFields{}) {
		errs = []fieldError{inBody("", "must have at least one of "+userFieldNames)}
	}
	if errs != nil {
		return invalid(errs...)
	}
	u, err := updateUserAndRead(r.Context(), id, given)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, u)
}

// deleteUser answers DELETE /users/{id}.
func deleteUser(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	if err := removeUserRow(r.Context(), id); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func userNotFound() *problem {
	return &problem{Status: http.StatusNotFound, Detail: "User not found"}
}

// createUser writes a new user.
func createUser(ctx context.Context, u user) error {
	db, err := currentSession()
	if err != nil {
		return err
	}
	err = db.Query(insertUser, u.values()...).WithContext(ctx).WithTimestamp(insertStamp()).Exec()
	return failed(write, err, "inserting user %s", u.ID)
}

// createUsersAtOnce writes all of the users or, in the end, none: a logged
// batch is atomic, but for a moment a reader may see some of them.
func createUsersAtOnce(ctx context.Context, users []user) error {
	db, err := currentSession()
	if err != nil {
		return err
	}
	batch := db.NewBatch(gocql.LoggedBatch).WithContext(ctx).WithTimestamp(insertStamp())
	for _, u := range users {
		batch.Query(insertUser, u.values()...)
	}
	return failed(write, db.ExecuteBatch(batch), "inserting a batch of %d users", len(users))
}

func insertStamp() int64 { return time.Now().Add(-insertAge).UnixMicro() }

// readUser reads a user; its error is a 404 *problem when there is none.
func readUser(ctx context.Context, id uuid.UUID) (user, error) {
	db, err := currentSession()
	if err != nil {
		return user{}, err
	}
	u := user{ID: id}
	err = db.Query(selectUser, gocql.UUID(id)).WithContext(ctx).Scan(u.columns()...)
	if errors.Is(err, gocql.ErrNotFound) {
		return user{}, userNotFound()
	}
	return u, failed(read, err, "reading user %s", id)
}

// updateUserAndRead changes the given fields and returns the whole user, which an
// UPDATE … IF EXISTS does not; its error is a 404 *problem when there is none.
func updateUserAndRead(ctx context.Context, id uuid.UUID, given userFields) (user, error) {
	db, err := currentSession()
	if err != nil {
		return user{}, err
	}
	values := append(given.values(), int64(now()), gocql.UUID(id))
	applied, err := db.Query(updateUser, values...).WithContext(ctx).ScanCAS()
	if err != nil {
		return user{}, failed(conditionalWrite, err, "updating user %s", id)
	}
	if !applied {
		return user{}, userNotFound()
	}
	u, err := readUser(ctx, id)
	if cause, ok := errors.AsType[*queryError](err); ok {
		cause.kind = readBack
	}
	return u, err
}

// removeUserRow deletes a user; that there is none is no error.
func removeUserRow(ctx context.Context, id uuid.UUID) error {
	db, err := currentSession()
	if err != nil {
		return err
	}
	_, err = db.Query(removeUser, gocql.UUID(id)).WithContext(ctx).ScanCAS()
	return failed(conditionalWrite, err, "deleting user %s", id)
}

// values are what insertUser takes.
func (u user) values() []any {
	return []any{gocql.UUID(u.ID), u.Name, u.Email, u.Age, int64(u.CreatedAt), int64(u.UpdatedAt)}
}

// columns are where selectUser's go.
func (u *user) columns() []any {
	return []any{&u.Name, &u.Email, &u.Age, (*int64)(&u.CreatedAt), (*int64)(&u.UpdatedAt)}
}

// userOverhead is what Cassandra 5.0 counts of a user in a batch besides the
// name and the email: the other values, and the header of every column. A new
// column adds to it; TestLargestBatchIsTakenByCassandra tells.
const userOverhead = 170 // bytes

// bytes is the user's size in a batch as Cassandra counts it.
func (u user) bytes() int { return userOverhead + len(u.Name) + len(u.Email) }

// userFields are those that a client may set; nil where it did not.
type userFields struct {
	name, email *string
	age         *int
}

// newUser makes a user with a fresh id of fields that are all given.
func (f userFields) newUser() user {
	created := now()
	return user{ID: uuid.New(), Name: *f.name, Email: *f.email, Age: *f.age, CreatedAt: created, UpdatedAt: created}
}

// values are the first that updateUser takes. An unset one leaves its column
// alone; nil would write a tombstone.
func (f userFields) values() []any {
	values := []any{gocql.UnsetValue, gocql.UnsetValue, gocql.UnsetValue}
	if f.name != nil {
		values[0] = *f.name
	}
	if f.email != nil {
		values[1] = *f.email
	}
	if f.age != nil {
		values[2] = *f.age
	}
	return values
}

const (
	userFieldNames = "name, email and age"
	nameRule       = "must be text of 1 to 100 characters, not blank"
	emailRule      = "must be one plain address of at most 254 bytes, as in ada@example.com"
	ageRule        = "must be a whole number from 0 to 150"
)

// parseUserFields reads a user at a JSON Pointer of the body and returns all that
// is wrong with it. Where whole is set, no field may be missing.
func parseUserFields(raw json.RawMessage, at string, whole bool) (userFields, []fieldError) {
	var given userFields
	var errs []fieldError
	reject := func(name, detail string) {
		errs = append(errs, inBody(at+"/"+pointerEscaper.Replace(name), detail))
	}
	members, ok := objectMembers(raw)
	if !ok {
		return given, []fieldError{inBody(at, "must be an object with "+userFieldNames)}
	}
	seen := map[string]bool{}
	for _, m := range members {
		if seen[m.name] {
			reject(m.name, "must come once")
			continue
		}
		seen[m.name] = true
		if rule := given.set(m); rule != "" {
			reject(m.name, rule)
		}
	}
	if whole {
		for _, f := range []struct{ name, rule string }{{"name", nameRule}, {"email", emailRule}, {"age", ageRule}} {
			if !seen[f.name] {
				reject(f.name, "is missing; it "+f.rule)
			}
		}
	}
	return given, errs
}

// set takes over a member, or returns the rule that it breaks.
func (f *userFields) set(m member) (rule string) {
	switch m.name {
	case "name":
		if f.name = parseText(m.value); f.name == nil || utf8.RuneCountInString(*f.name) > maxName || strings.TrimSpace(*f.name) == "" {
			return nameRule
		}
	case "email":
		if f.email = parseText(m.value); f.email == nil || !isAddress(*f.email) {
			return emailRule
		}
	case "age":
		n, ok := parseInteger(string(m.value))
		if !ok {
			return ageRule
		}
		if n < 0 || n > maxAge {
			return "must be from 0 to 150"
		}
		f.age = &n
	case "id", "created_at", "updated_at": // the server's: what GET answered can be PUT back
	default:
		return "is not a field of a user; those are " + userFieldNames + ", spelled so"
	}
	return ""
}

// isAddress takes what the whole text is: no display name, no angle brackets.
func isAddress(text string) bool {
	if len(text) > maxEmail { // the parser takes a second for a megabyte
		return false
	}
	address, err := mail.ParseAddress(text)
	return err == nil && address.Address == text
}
