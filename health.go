// This file manages the connection to Cassandra: the driver's settings, the meaning of failed queries, and GET /health.
// It opens, watches and replaces the one global session that every request uses.

package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	healthTimeout  = 2 * time.Second             // of the query behind /health
	pingInterval   = time.Second                 // also while idle, when no request would notice an outage
	pingTimeout    = 3 * time.Second             // three times the slowest round trip that is expected
	deadAfter      = 3 * time.Second             // without a successful ping: open another session
	retryInterval  = time.Second                 // between attempts, so one succeeds within 5 s of Cassandra's return
	dialTimeout    = 2 * time.Second             // for a TCP connection
	connectTimeout = 4 * time.Second             // for each response while a connection starts
	sessionTimeout = 30 * time.Second            // to create a session, which takes about 15 round trips
	agreeTimeout   = 2 * time.Second             // for schema agreement; a node that is down never agrees
	logInterval    = 10 * time.Second            // between log lines about an outage
	queryTimeout   = 12 * time.Second            // of one page, longer than a node's own timeouts of 5 or 10 s
	maxSkew        = 5 * time.Second             // between the clocks of service and node before it is logged
	maxPending     = 1 << 20                     // bytes of requests on one connection that are not sent yet
	maxSilence     = time.Second                 // of a host, before queries prefer other hosts
	backAfter      = 3 * time.Second             // without silence, until a host counts as back
	hostInterval   = time.Second / 10            // between checks of the hosts
	hedgeDelay     = maxSilence + 2*hostInterval // then a silent host counts as lagging

	selectKeyspace = `SELECT keyspace_name FROM system_schema.keyspaces WHERE keyspace_name = ?`
	selectTables   = `SELECT table_name FROM system_schema.tables WHERE keyspace_name = ?`
	createKeyspace = `CREATE KEYSPACE IF NOT EXISTS "%s" WITH replication = `
	selectNow      = `SELECT toUnixTimestamp(now()) FROM system.local WHERE key = 'local'`
)

// createTables maps each table's name to the statement that creates it; %s is the keyspace.
var createTables = map[string]string{
	"users":            createUsersTable,
	"idempotency_keys": createKeysTable,
	"scratch":          createScratchTable,
}

var errNotConnected = queryErrorf(read, gocql.ErrNoConnections, "not connected to Cassandra yet")

// cluster is the configuration of the connection to Cassandra.
type cluster struct {
	hosts                    []string
	port                     int
	keyspace, datacenter     string // datacenter: "" is any
	consistency, replication string // replication: a CQL map, for a missing keyspace
	username, password       string // "" is no authentication
	tlsCA                    string // a file of PEM certificates; "" is no TLS
}

// global holds the session shared by all requests, which is safe for concurrent use.
var global struct {
	session atomic.Pointer[gocql.Session] // nil before the first connection
	cluster cluster                       // set once, before the first request
}

// currentSession returns the global session. No handler that needs it is called before it exists.
func currentSession() *gocql.Session { return global.session.Load() }

// keepConnected keeps the global session connected until the returned function closes it.
func keepConnected(c cluster) (disconnect func()) {
	global.cluster = c
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { watch(ctx, c) })
	watching.Go(func() { sampleCounters(ctx) })
	return func() {
		cancel()
		watching.Wait()
		if s := currentSession(); s != nil {
			go s.Close() // in a goroutine, here and elsewhere, since it can hang
		}
	}
}

// watch opens a session, pings it, and replaces it if it does not respond for a while. The driver reconnects to a
// lost node by itself. But after a longer outage its session may stay dead, if a node's new address can't be reached.
func watch(ctx context.Context, c cluster) {
	for s := c.openWithRetry(ctx); s != nil; s = c.openWithRetry(ctx) {
		counters.connected.Store(true)
		slog.Info("connected to Cassandra", "session", counters.sessions.Add(1), "keyspace", c.keyspace)
		if old := global.session.Swap(s); old != nil {
			time.AfterFunc(queryTimeout, old.Close) // by then its last query has finished
		}
		for last := time.Now(); time.Since(last) < deadAfter && ctx.Err() == nil; sleep(ctx, pingInterval) {
			if c.ping(ctx, s) {
				last = time.Now()
			}
		}
	}
}

// ping reads the node's clock and recreates missing tables. Its queries are not counted. It reports whether it or any
// other query within pingTimeout succeeded, since under overload a ping alone may time out.
func (c cluster) ping(ctx context.Context, s *gocql.Session) bool {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	start := time.Now()
	node, err := hedge(ctx, true, func(ctx context.Context) (now int64, err error) {
		err = s.Query(selectNow).WithContext(ctx).Consistency(gocql.One).Observer(pingObserver{}).Scan(&now)
		return now, queryErrorf(read, err, "pinging")
	})
	if err == nil {
		recordSkew(time.UnixMilli(node).Sub(start.Add(time.Since(start) / 2)))
		err = c.createMissing(ctx, s, selectTables, createTables)
	}
	ok := err == nil || elapsed(counters.lastResponse.Load()) < pingTimeout
	counters.connected.Store(ok)
	return ok
}

// openWithRetry opens a session, or returns nil if ctx ends first.
func (c cluster) openWithRetry(ctx context.Context) *gocql.Session {
	var logged time.Time
	for ; ctx.Err() == nil; sleep(ctx, retryInterval) {
		s, err := c.open(ctx)
		if err == nil {
			return s
		}
		if ctx.Err() == nil && time.Since(logged) >= logInterval {
			slog.Warn("cannot connect to Cassandra; retrying",
				"hosts", c.hosts, "port", c.port, "datacenter", c.datacenter, "error", err)
			logged = time.Now()
		}
	}
	return nil
}

// open returns a new session for the keyspace, with all tables in place.
func (c cluster) open(ctx context.Context) (*gocql.Session, error) {
	s, err := createSession(ctx, c.config(&counters.connections))
	if errors.Is(err, gocql.ErrNoConnectionsStarted) { // also the driver's error for a missing keyspace
		unbound := c.config(&counters.connections)
		unbound.Keyspace = ""
		if s, err = createSession(ctx, unbound); err == nil {
			err = c.createMissing(ctx, s, selectKeyspace, map[string]string{c.keyspace: createKeyspace + c.replication})
			go s.Close()
		}
		if err == nil {
			s, err = createSession(ctx, c.config(&counters.connections))
		}
	}
	if err != nil {
		return nil, err
	}
	if err = c.createMissing(ctx, s, selectTables, createTables); err != nil {
		go s.Close()
		return nil, err
	}
	var preparing sync.WaitGroup // else the first requests would take twice as long
	sendNothing := func(*gocql.QueryInfo) ([]any, error) { return nil, errors.New("prepared") }
	for _, statement := range []string{insertUser, selectUser, usersTable.selectRange, usersTable.selectFiltered} {
		preparing.Go(func() { s.Bind(statement, sendNothing).WithContext(ctx).Observer(nil).Exec() })
	}
	preparing.Wait()
	return s, nil
}

// createMissing looks the names up and creates only the missing ones, so a role without CREATE works. Instances that
// start together rarely create a table twice, which could leave the nodes with conflicting schemas.
func (c cluster) createMissing(ctx context.Context, s *gocql.Session, lookup string, create map[string]string) error {
	missing, name := maps.Clone(create), ""
	rows := s.Query(lookup, c.keyspace).WithContext(ctx).Consistency(gocql.One).Observer(pingObserver{}).Iter()
	for rows.Scan(&name) {
		delete(missing, name)
	}
	if err := rows.Close(); err != nil {
		return fmt.Errorf("looking up the schema: %w", err)
	}
	for name, statement := range missing {
		slog.Info("creating a missing keyspace or table", "name", name)
		if err := s.Query(fmt.Sprintf(statement, c.keyspace)).WithContext(ctx).Exec(); err != nil {
			return fmt.Errorf("creating the schema: %w", err)
		}
		if err := s.AwaitSchemaAgreement(ctx); err != nil { // never reached while a node is down
			slog.Warn("no schema agreement between nodes; continuing", "error", err)
		}
	}
	return nil
}

// config returns the driver's settings for one session.
func (c cluster) config(dialer *countingDialer) *gocql.ClusterConfig {
	cfg := gocql.NewCluster(c.hosts...)
	cfg.Consistency = gocql.ParseConsistency(c.consistency)
	cfg.SerialConsistency = gocql.LocalSerial // transactions stay in this data centre
	cfg.Port, cfg.Keyspace, cfg.Dialer = c.port, c.keyspace, dialer
	cfg.ConnectTimeout, cfg.Timeout, cfg.MaxWaitSchemaAgreement = connectTimeout, queryTimeout, agreeTimeout
	cfg.ProtoVersion = 4                    // 5 fails with this driver, 0 costs a connection to find out
	cfg.NumConns = 1                        // reads are 10 to 27 % faster than over two, creates no slower
	cfg.WriteCoalesceWaitTime = 0           // the default of 200 µs costs a lone query over a millisecond
	cfg.ReconnectInterval = time.Second     // the default of a minute would prolong every outage
	cfg.Events.DisableSchemaEvents = true   // nothing reads the driver's schema metadata
	cfg.Logger = log.New(io.Discard, "", 0) // errors are logged where they are handled
	cfg.ReconnectionPolicy = &gocql.ConstantReconnectionPolicy{MaxRetries: 1, Interval: 200 * time.Millisecond}
	cfg.PoolConfig.HostSelectionPolicy = policy{gocql.TokenAwareHostPolicy(gocql.RoundRobinHostPolicy()), dialer}
	if dialer == &counters.connections { // the queries of a self-test's own session are not counted
		cfg.QueryObserver, cfg.BatchObserver = observer{}, observer{}
	}
	if c.datacenter != "" { // else the driver silently uses remote nodes, too
		cfg.HostFilter = gocql.DataCentreHostFilter(c.datacenter)
	}
	if c.username != "" {
		cfg.Authenticator = gocql.PasswordAuthenticator{Username: c.username, Password: c.password}
	}
	if c.tlsCA != "" {
		cfg.SslOpts = &gocql.SslOptions{CaPath: c.tlsCA, EnableHostVerification: true} // off by default
	}
	return cfg // no RetryPolicy: the driver's policies also retry writes, which may then be applied twice
}

// policy is the driver's policy, which prefers replicas, except that lagging hosts come last. It reads the
// replication in the background, which takes 14 round trips.
type policy struct {
	gocql.HostSelectionPolicy
	dialer *countingDialer
}

func (p policy) KeyspaceChanged(e gocql.KeyspaceUpdateEvent) {
	go p.HostSelectionPolicy.KeyspaceChanged(e)
}

// Pick returns an iterator over the hosts for a query.
func (p policy) Pick(query gocql.ExecutableQuery) gocql.NextHost {
	next := p.HostSelectionPolicy.Pick(query)
	if !p.dialer.lagging.Load() {
		return next
	}
	var last []gocql.SelectedHost
	return func() (h gocql.SelectedHost) {
		for h = next(); h != nil && p.dialer.host(h.Info().ConnectAddressAndPort()).lags(); h = next() {
			last = append(last, h)
		}
		if h == nil && len(last) > 0 {
			h, last = last[0], last[1:]
		}
		return h
	}
}

// hedge runs a query. It repeats a query once, on another host, if the first host refused it without writing anything.
// It also repeats an idempotent query if the first host is slow or does not complete it.
func hedge[T any](ctx context.Context, isIdempotent bool, query func(context.Context) (T, error)) (T, error) {
	dialer := &counters.connections
	if dialer.hosts.Load() < 2 {
		return query(ctx)
	}
	again := sync.OnceValues(func() (T, error) { return query(ctx) })
	first, cancel := context.WithCancel(ctx)
	defer cancel()
	defer time.AfterFunc(hedgeDelay, func() {
		for ; isIdempotent && first.Err() == nil; sleep(first, hostInterval) {
			if dialer.lagging.Load() {
				if _, err := again(); outcomeOf(err) <= late { // else the first attempt may still succeed
					cancel()
				}
			}
		}
	}).Stop()
	value, err := query(first)
	isIncomplete := err != nil && first.Err() != nil || outcomeOf(err) > late && !isTooWide(err)
	if ctx.Err() == nil && (isUnavailable(err) || isIdempotent && isIncomplete) {
		if other, errAgain := again(); outcomeOf(errAgain) <= late || isUnavailable(err) {
			return other, errAgain
		}
	}
	return value, err
}

// createSession calls gocql's CreateSession, which may panic or hang, and adds a deadline.
func createSession(ctx context.Context, cfg *gocql.ClusterConfig) (*gocql.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	var s *gocql.Session
	created := make(chan error, 1)
	go func() {
		var err error
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("panic: %v", v)
			}
			created <- err
		}()
		s, err = cfg.CreateSession()
	}()
	select {
	case err := <-created:
		return s, err
	case <-ctx.Done():
		go func() {
			if <-created == nil { // too late
				s.Close()
			}
		}()
		return nil, fmt.Errorf("creating a session: %w", ctx.Err())
	}
}

// countingDialer counts connections, since the driver doesn't report when it closes one, and tracks which hosts lag.
type countingDialer struct {
	open, opened, failed atomic.Int64 // connections
	byAddress            sync.Map     // of *host
	hosts, silent        atomic.Int64 // hosts with an open connection, and the silent ones among them
	lagging              atomic.Bool  // whether any host may lag
}

func (d *countingDialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	tcp, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
	if err != nil {
		d.failed.Add(1)
		return nil, err
	}
	d.open.Add(1)
	d.opened.Add(1)
	c := &conn{Conn: tcp, dialer: d, host: d.host(addr), wake: make(chan struct{}, 1)}
	c.host.open.Add(1)
	c.sent.L = &c.mu
	go c.send()
	return c, nil
}

// host returns the shared host at an address.
func (d *countingDialer) host(addr string) *host {
	h, _ := d.byAddress.LoadOrStore(addr, new(host))
	return h.(*host)
}

// conn is a connection that coalesces writes. The driver makes a system call for each request, which limits its rate.
// Here Write only appends to a buffer and wakes send, which sends everything that has arrived by then. No request waits
// for a timer, and under load many share one call. An accepted request that fails may have been sent, so its write is
// in doubt.
type conn struct {
	net.Conn
	dialer  *countingDialer
	host    *host
	wake    chan struct{} // closed by Close
	mu      sync.Mutex
	sent    sync.Cond // signals that send took pending, or that the connection is closed
	pending []byte    // accepted, but not sent
	closed  bool
}

// Write accepts a request. It waits only while maxPending bytes are not sent.
func (c *conn) Write(request []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.pending) >= maxPending && !c.closed {
		c.sent.Wait()
	}
	if c.closed {
		return 0, net.ErrClosed
	}
	c.pending = append(c.pending, request...)
	c.host.waiting.CompareAndSwap(0, int64(uptime()))
	select {
	case c.wake <- struct{}{}:
	default: // awake already
	}
	return len(request), nil
}

// Read reads what the host sends, which ends its silence.
func (c *conn) Read(response []byte) (int, error) {
	n, err := c.Conn.Read(response)
	if n > 0 {
		c.host.waiting.Store(0)
	}
	return n, err
}

// send sends what Write accepts until the connection is closed. If that fails, it closes the connection, so the
// driver fails all requests that await a response.
func (c *conn) send() {
	var requests []byte
	for range c.wake {
		runtime.Gosched() // so that requests about to be written join this call
		c.mu.Lock()
		c.pending, requests = requests[:0], c.pending // two buffers take turns
		c.sent.Broadcast()
		c.mu.Unlock()
		c.Conn.SetWriteDeadline(time.Now().Add(pingTimeout))
		if _, err := c.Conn.Write(requests); err != nil {
			c.Close()
		}
	}
}

// SetWriteDeadline does nothing: send sets the deadline.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// Close closes the connection, and counts that once.
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		close(c.wake)
		c.sent.Broadcast()
		c.dialer.open.Add(-1)
		if c.host.open.Add(-1) == 0 {
			c.host.waiting.Store(0)
		}
	}
	return c.Conn.Close()
}

// queryError is a failed query. Every function that queries Cassandra for a request returns its failures as one.
type queryError struct {
	error // "inserting user 1b4e…: the driver's error"
	kind  queryKind
}

func (e *queryError) Unwrap() error { return errors.Unwrap(e.error) }

// queryErrorf describes a failed query. It returns nil if err is nil.
func queryErrorf(kind queryKind, err error, doing string, args ...any) error {
	if err == nil {
		return nil
	}
	return &queryError{fmt.Errorf(doing+": %w", append(args, err)...), kind}
}

// queryKind decides what a failure guarantees.
type queryKind int

const (
	read        queryKind = iota
	insert                // a plain INSERT
	batchInsert           // a logged batch
	edit                  // a lightweight transaction
)

// outcome is what the failure of a query means.
type outcome int

const (
	final      outcome = iota // no error, or one that neither a retry nor a recovered Cassandra would fix
	late                      // a read that took too long
	notWritten                // Cassandra was not reached, or it refused the query before it wrote anything
	inDoubt                   // the write may or may not have been applied, now or later
)

// outcomeOf classifies an error. Anything that is neither a response from Cassandra, nor a wrong value, nor the end of
// a context, is a failed connection. Overloaded can also come after a batch was logged or a transaction proposed
// (mutateAtomically and commitPaxos in Cassandra's StorageProxy).
func outcomeOf(err error) outcome {
	query, _ := errors.AsType[*queryError](err)
	_, cannotMarshal := errors.AsType[gocql.MarshalError](err)
	_, cannotUnmarshal := errors.AsType[gocql.UnmarshalError](err)
	code := codeOf(err)
	isInvalid := code == gocql.ErrCodeProtocol || gocql.ErrCodeSyntax <= code && code <= gocql.ErrCodeAlreadyExists
	isOverloaded := code == gocql.ErrCodeOverloaded || code == gocql.ErrCodeBootstrapping
	switch {
	case query == nil, cannotMarshal, cannotUnmarshal, isInvalid:
		return final
	case isUnreachable(err), isUnavailable(query), isOverloaded && (query.kind == read || query.kind == insert):
		return notWritten
	case query.kind != read:
		return inDoubt
	case code == gocql.ErrCodeReadTimeout, errors.Is(err, gocql.ErrTimeoutNoResponse),
		errors.Is(err, context.DeadlineExceeded):
		return late
	}
	return notWritten
}

// isUnavailable reports whether a host did nothing, since it could not reach enough replicas. A transaction did nothing
// only if the error names a serial consistency; after its proposal the error names another one.
func isUnavailable(err error) bool {
	refusal, ok := errors.AsType[*gocql.RequestErrUnavailable](err)
	if query, isQuery := errors.AsType[*queryError](err); ok && isQuery && query.kind == edit {
		level := gocql.SerialConsistency(refusal.Consistency)
		return level == gocql.LocalSerial || level == gocql.Serial
	}
	return ok
}

// isUnreachable reports whether a query was never sent.
func isUnreachable(err error) bool {
	return errors.Is(err, gocql.ErrNoConnections) || errors.Is(err, gocql.ErrNoStreams) ||
		errors.Is(err, gocql.ErrSessionClosed)
}

// codeOf returns the code of Cassandra's error response, or 0 if there is none.
func codeOf(err error) int {
	if response, ok := errors.AsType[gocql.RequestError](err); ok {
		return response.Code()
	}
	return 0
}

// inDoubtDetail says that a write may have been applied, and what to do.
func inDoubtDetail(err error) string {
	query, _ := errors.AsType[*queryError](err)
	return "timeout: " + map[queryKind]string{
		insert:      "the user may or may not have been created; GET its Location, and retry only with an Idempotency-Key",
		batchInsert: "the users may or may not have been created; retry only with an Idempotency-Key",
		edit:        "the change may or may not have been applied; GET the user with Cache-Control: no-cache to find out",
	}[query.kind]
}

// loadCluster reads the settings of the connection.
func loadCluster(env *environment) cluster {
	c := cluster{
		hosts: setting(env, "CASSANDRA_HOSTS", "localhost",
			"host names or addresses without ports, separated by commas", parseHosts),
		port: setting(env, "CASSANDRA_PORT", "9042", "a port from 1 to 65535", wholeNumber(1, 65535)),
		keyspace: setting(env, "CASSANDRA_KEYSPACE", "test_keyspace",
			"1 to 48 letters, digits or underscores (the prefix system is reserved)", parseKeyspace),
		datacenter: setting(env, "CASSANDRA_DATACENTER", "",
			"the name of a data centre: letters, digits, dots, dashes or underscores", matching(`^[\w.-]*$`)),
		consistency: setting(env, "CASSANDRA_CONSISTENCY", "LOCAL_QUORUM", // with less, a read could miss a write
			"LOCAL_QUORUM, QUORUM or ALL", matching(`^(LOCAL_QUORUM|QUORUM|ALL)$`)),
		replication: setting(env, "CASSANDRA_REPLICATION", "1",
			"a number of replicas from 1 to 99, or one per data centre, such as dc1:3,dc2:3", parseReplication),
		username: env.getenv("CASSANDRA_USERNAME"),
		password: env.getenv("CASSANDRA_PASSWORD"),
		tlsCA:    setting(env, "CASSANDRA_TLS_CA", "", "a readable file of PEM certificates", parseCertificates),
	}
	if (c.username == "") != (c.password == "") {
		env.reject("CASSANDRA_USERNAME and CASSANDRA_PASSWORD must be set together")
	}
	return c
}

func parseAddr(text string) (string, bool) {
	_, port, err := net.SplitHostPort(text)
	_, ok := wholeNumber(0, 65535)(port)
	return text, err == nil && ok
}

func wholeNumber(low, high int) func(string) (int, bool) {
	return func(text string) (int, bool) {
		n, err := strconv.ParseUint(text, 10, 31)
		return int(n), err == nil && low <= int(n) && int(n) <= high
	}
}

func parseDuration(text string) (time.Duration, bool) {
	d, err := time.ParseDuration(text)
	return d, err == nil && d >= 0
}

func matching(pattern string) func(string) (string, bool) {
	return func(text string) (string, bool) { return text, regexp.MustCompile(pattern).MatchString(text) }
}

func parseHosts(text string) ([]string, bool) {
	name, hosts := regexp.MustCompile(`^[\w.-]+$`), regexp.MustCompile(`\s*,\s*`).Split(strings.TrimSpace(text), -1)
	return hosts, !slices.ContainsFunc(hosts, func(h string) bool { return !name.MatchString(h) && net.ParseIP(h) == nil })
}

// parseKeyspace rejects names that begin with "system" in upper or lower case, as all of Cassandra's own names do.
func parseKeyspace(text string) (string, bool) {
	return text, regexp.MustCompile(`^\w{1,48}$`).MatchString(text) && !strings.HasPrefix(strings.ToLower(text), "system")
}

// parseReplication turns "1" or "dc1:3,dc2:3" into a CQL map.
func parseReplication(text string) (string, bool) {
	if !strings.Contains(text, ":") {
		text = "replication_factor:" + text // in every data centre
	}
	ok := regexp.MustCompile(`^[\w.-]+:[1-9]\d?(,[\w.-]+:[1-9]\d?)*$`).MatchString(text)
	name := regexp.MustCompile(`([\w.-]+):`)
	names := slices.Sorted(slices.Values(append(name.FindAllString(text, -1), "class:"))) // the map has class already
	text = "{'class': 'NetworkTopologyStrategy', " + name.ReplaceAllString(text, "'$1': ") + "}"
	return text, ok && len(slices.Compact(names)) == len(names)
}

func parseCertificates(file string) (string, bool) {
	pem, err := os.ReadFile(file)
	return file, file == "" || err == nil && x509.NewCertPool().AppendCertsFromPEM(pem)
}

// getHealth handles GET /health, the readiness probe. It reads the users table, as a request would.
func getHealth(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), healthTimeout)
	defer cancel()
	start, err := time.Now(), errNotConnected
	if currentSession() != nil {
		_, err = readUser(ctx, uuid.Nil, false)
	}
	status, health, cassandra := http.StatusOK, "healthy", "connected"
	if err != nil && !errors.Is(err, errNoUser) { // nobody has the nil UUID
		status, health, cassandra = http.StatusServiceUnavailable, "unhealthy", "disconnected"
	}
	if shutdown.draining.Load() {
		status, health = http.StatusServiceUnavailable, "draining"
	}
	return writeJSON(w, status, map[string]any{
		"status": health, "cassandra": cassandra, "cassandra_connected": cassandra == "connected",
		"keyspace": global.cluster.keyspace, "latency_ms": milliseconds(time.Since(start)),
		"timestamp": start.UTC().Format("2006-01-02T15:04:05.000Z"),
	})
}
