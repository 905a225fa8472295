// This file is the connection to Cassandra: it holds the one global session that
// every handler uses, connects it, creates what is missing of the schema, watches
// it once a second, and replaces it when it stays dead. Up to the handlers it
// leans on queryError, queryKind, read and isDigits of main.go, on the dialer, the
// observer and the counters of metrics.go, and on the CREATE statements of
// users.go and safety.go; the handlers also on readUser, timestamp and now of
// users.go, milliseconds of metrics.go, and life, router, version, problem, isBug
// and writeJSON of main.go.

package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gocql/gocql"
	"github.com/google/uuid"
)

const (
	healthTimeout  = 2 * time.Second        // of the query behind /health
	pingInterval   = time.Second            // also while idle: nobody else may ask for minutes
	pingTimeout    = time.Second            // of one ping
	deadAfter      = 3 * time.Second        // without a successful ping: try another session
	connectTimeout = 2 * time.Second        // to dial a node and to be greeted by it
	tryTimeout     = 10 * time.Second       // to create or close a session; both can hang
	firstRetry     = 250 * time.Millisecond // between two tries to connect, doubled each time
	lastRetry      = time.Second            // the longest of them: Cassandra is to be found within 5 s
	agreeTimeout   = 2 * time.Second        // for the nodes to agree on the schema; one that is down does not
	logInterval    = 10 * time.Second       // between two lines of the driver, 4 a second in an outage
	queryTimeout   = 12 * time.Second       // of one page, above the node's own for a range: 5 s, or 10
)

const (
	selectKeyspace = `SELECT keyspace_name FROM system_schema.keyspaces WHERE keyspace_name = ?`
	selectTable    = `SELECT table_name FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?`
	createKeyspace = `CREATE KEYSPACE IF NOT EXISTS "%s" WITH replication = %s`
	selectVersion  = `SELECT release_version FROM system.local WHERE key = 'local'`
	selectLocalDC  = `SELECT data_center FROM system.local WHERE key = 'local'`
	selectOtherDCs = `SELECT data_center FROM system.peers`
)

// errNotConnected says that there is no session yet.
var errNotConnected = errors.New("not connected to Cassandra yet")

// cluster is how to reach Cassandra.
type cluster struct {
	hosts       []string
	port        int
	keyspace    string
	datacenter  string // none: any
	consistency gocql.Consistency
	replication string // a CQL map, for a missing keyspace
	username    string
	password    string
	tlsCA       string // a file of PEM certificates; none: no TLS
}

// global is the holder of the one session that serves everybody. The session
// is nil until Cassandra was reached for the first time.
var global struct {
	session atomic.Pointer[session]
	cluster cluster   // set once, before the first request
	log     driverLog // one for all sessions: each new try would start it afresh
}

// session is a gocql session, safe for concurrent use, that knows its number:
// 1 for the first of this process, one more for each that replaced another.
type session struct {
	*gocql.Session
	number int64
}

// currentSession returns the one session that serves everybody, or an error
// that wraps errNotConnected.
func currentSession() (*session, error) {
	if s := global.session.Load(); s != nil {
		return s, nil
	}
	return nil, failed(read, errNotConnected, "looking for the session")
}

// failed describes a failed request to Cassandra, and counts it if it never
// reached the driver's observers. A nil err stays nil.
func failed(kind queryKind, err error, doing string, args ...any) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, errNotConnected) || errors.Is(err, gocql.ErrNoConnections) || errors.Is(err, gocql.ErrSessionClosed) {
		countUnsent(err)
	}
	return &queryError{doing: fmt.Sprintf(doing, args...), kind: kind, err: err}
}

// keepConnected connects the global session in the background and watches over
// it until the returned function closes it.
func keepConnected(c cluster) (closeAll func()) {
	global.cluster = c
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { watch(ctx, c) })
	return func() {
		cancel()
		watching.Wait()
		if s := global.session.Swap(nil); s != nil {
			closeSession(s.Session)
		}
	}
}

// watch pings the session once a second. When there is none, or none that has
// answered for a while, it opens a fresh one and swaps it in. The driver
// reconnects a cut node by itself; but after a longer outage its session may be
// dead for good, or answer once and then die, where a node came back under an
// address that cannot be reached.
func watch(ctx context.Context, c cluster) {
	var lastAnswer time.Time
	for number := int64(1); ctx.Err() == nil; {
		old := global.session.Load()
		if old != nil && answers(ctx, old) {
			lastAnswer = time.Now()
			pause(ctx, pingInterval)
			continue
		}
		if time.Since(lastAnswer) < deadAfter {
			pause(ctx, firstRetry)
			continue
		}
		fresh := c.openAtLast(ctx)
		if fresh == nil {
			return
		}
		slog.Info("connected to Cassandra", "session", number, "keyspace", c.keyspace)
		global.session.Store(&session{Session: fresh, number: number})
		lastAnswer = time.Now()
		number++
		if old != nil {
			time.AfterFunc(queryTimeout, func() { closeSession(old.Session) }) // nothing is under way there by then
		}
	}
}

// openAtLast tries until a session is open, or returns nil at the end of ctx.
func (c cluster) openAtLast(ctx context.Context) *gocql.Session {
	var lastError string
	var lastLine time.Time
	for wait := firstRetry; ctx.Err() == nil; wait = min(2*wait, lastRetry) {
		s, err := c.open(ctx)
		if err == nil {
			return s
		}
		if err.Error() != lastError && time.Since(lastLine) >= logInterval && ctx.Err() == nil {
			slog.Warn("cannot connect to Cassandra, trying on", "hosts", c.hosts, "port", c.port, "error", err)
			lastError, lastLine = err.Error(), time.Now()
		}
		pause(ctx, wait)
	}
	return nil
}

// answers pings, uncounted: the metrics are about the service's work. Under
// overload a ping can come too late while others get their answers.
func answers(ctx context.Context, s *session) bool {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	err := s.Query(selectVersion).WithContext(ctx).Observer(nil).Exec()
	return err == nil || time.Since(time.Unix(0, counters.lastAnswer.Load())) < pingTimeout
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// open returns a new session of the keyspace, with the schema in place.
func (c cluster) open(ctx context.Context) (*gocql.Session, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	if err := c.ensureSchema(ctx); err != nil {
		return nil, err
	}
	cfg := c.config(&connections)
	cfg.Keyspace = c.keyspace // for token-aware routing; a missing one would fail the session
	cfg.QueryObserver, cfg.BatchObserver = observer{}, observer{}
	return createSession(ctx, cfg)
}

// ensureSchema creates what is missing of the schema. It looks first: so a role
// that may not create anything can serve, and instances that start together
// rarely create the same thing twice, which a cluster may not sort out.
func (c cluster) ensureSchema(ctx context.Context) error {
	s, err := createSession(ctx, c.config(&connections))
	if err != nil {
		return err
	}
	defer closeSession(s)
	create := func(statement, lookup string, args ...any) error {
		switch err := s.Query(lookup, args...).WithContext(ctx).Scan(nil); {
		case err == nil:
			return nil
		case !errors.Is(err, gocql.ErrNotFound):
			return fmt.Errorf("looking up the schema: %w", err)
		}
		if err := s.Query(statement).WithContext(ctx).Exec(); err != nil {
			return fmt.Errorf("creating the schema: %w", err)
		}
		return nil
	}
	if err := create(fmt.Sprintf(createKeyspace, c.keyspace, c.replication), selectKeyspace, c.keyspace); err != nil {
		return err
	}
	for table, statement := range map[string]string{"users": createUsersTable, "scratch": createScratchTable} {
		if err := create(fmt.Sprintf(statement, c.keyspace), selectTable, c.keyspace, table); err != nil {
			return err
		}
	}
	if err := s.AwaitSchemaAgreement(ctx); err != nil { // while a node is down or of another version, it may never come
		slog.Warn("the nodes do not agree on the schema, going on", "error", err)
	}
	return c.checkDatacenter(ctx, s)
}

// checkDatacenter warns of a data centre that no node is in: the driver then
// takes any node in silence, however far away.
func (c cluster) checkDatacenter(ctx context.Context, s *gocql.Session) error {
	if c.datacenter == "" {
		return nil
	}
	var name string
	found := map[string]bool{}
	for _, statement := range []string{selectLocalDC, selectOtherDCs} {
		rows := s.Query(statement).WithContext(ctx).Iter()
		for rows.Scan(&name) {
			found[name] = true
		}
		if err := rows.Close(); err != nil {
			return fmt.Errorf("looking up the data centres: %w", err)
		}
	}
	if !found[c.datacenter] {
		slog.Warn("no node is in CASSANDRA_DATACENTER, taking any", "datacenter", c.datacenter, "there_are", slices.Sorted(maps.Keys(found)))
	}
	return nil
}

// config is how the driver is set up, for one session: a policy object must not
// be shared. Where it departs from the defaults, it says why.
func (c cluster) config(dialer gocql.Dialer) *gocql.ClusterConfig {
	cfg := gocql.NewCluster(c.hosts...)
	cfg.Port = c.port
	cfg.ProtoVersion = 4 // 5 fails with this driver, 0 costs a dial to find out
	cfg.Consistency = c.consistency
	cfg.SerialConsistency = gocql.LocalSerial // lightweight transactions stay in this data centre
	cfg.ConnectTimeout = connectTimeout
	cfg.Timeout = queryTimeout
	cfg.NumConns = 1                      // reads are 10 to 27 % faster than over two, creates no slower
	cfg.WriteCoalesceWaitTime = 0         // the default 200 µs cost a lone query over a millisecond
	cfg.ReconnectInterval = time.Second   // the default minute is the length of an outage
	cfg.Events.DisableSchemaEvents = true // nobody here reads the driver's schema metadata
	cfg.MaxWaitSchemaAgreement = agreeTimeout
	cfg.ReconnectionPolicy = &gocql.ConstantReconnectionPolicy{MaxRetries: 1, Interval: 200 * time.Millisecond}
	cfg.Dialer = dialer
	cfg.Logger = &global.log
	policy := gocql.RoundRobinHostPolicy()
	if c.datacenter != "" {
		policy = gocql.DCAwareRoundRobinPolicy(c.datacenter)
	}
	cfg.PoolConfig.HostSelectionPolicy = gocql.TokenAwareHostPolicy(policy, gocql.ShuffleReplicas())
	if c.username != "" {
		cfg.Authenticator = gocql.PasswordAuthenticator{Username: c.username, Password: c.password}
	}
	if c.tlsCA != "" {
		cfg.SslOpts = &gocql.SslOptions{CaPath: c.tlsCA, EnableHostVerification: true} // without it any certificate would do
	}
	return cfg // no RetryPolicy: the driver's would also retry writes, which may then be applied twice
}

// createSession is CreateSession, which can panic and on rare occasions hang,
// with a deadline.
func createSession(ctx context.Context, cfg *gocql.ClusterConfig) (*gocql.Session, error) {
	type result struct {
		session *gocql.Session
		err     error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if v := recover(); v != nil {
				r.err = fmt.Errorf("creating a session: panic: %v", v)
			}
			done <- r
		}()
		r.session, r.err = cfg.CreateSession()
	}()
	select {
	case r := <-done:
		return r.session, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.session != nil {
				r.session.Close()
			}
		}()
		return nil, fmt.Errorf("creating a session: %w", ctx.Err())
	}
}

// closeSession is Close, which can hang on rare occasions, with a deadline.
func closeSession(s *gocql.Session) {
	done := make(chan struct{})
	go func() {
		s.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(tryTimeout):
		slog.Warn("a session did not close in time")
	}
}

// driverLog lets a line of the driver through now and then.
type driverLog struct {
	mu     sync.Mutex
	last   time.Time
	folded int
}

func (l *driverLog) Print(v ...any)                 { l.log(fmt.Sprint(v...)) }
func (l *driverLog) Printf(format string, v ...any) { l.log(fmt.Sprintf(format, v...)) }
func (l *driverLog) Println(v ...any)               { l.log(fmt.Sprintln(v...)) }

func (l *driverLog) log(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.last) < logInterval {
		l.folded++
		return
	}
	slog.Warn("driver: "+strings.TrimSpace(line), "lines_left_out", l.folded)
	l.last, l.folded = time.Now(), 0
}

func parseHosts(text string) ([]string, bool) {
	hosts := strings.Split(text, ",")
	for i, host := range hosts {
		hosts[i] = strings.TrimSpace(host)
		if !regexp.MustCompile(`^[\w.:-]+$`).MatchString(hosts[i]) {
			return nil, false
		}
	}
	return hosts, true
}

// parseKeyspace takes what is safe within CQL and not Cassandra's own, which all
// begin with "system".
func parseKeyspace(text string) (string, bool) {
	return text, regexp.MustCompile(`^\w{1,48}$`).MatchString(text) && !strings.HasPrefix(text, "system")
}

func parseConsistency(text string) (gocql.Consistency, bool) {
	consistency, err := gocql.ParseConsistencyWrapper(text)
	return consistency, err == nil && consistency != gocql.Any // ANY is for writes only
}

// parseReplication turns "1" or "dc1:3,dc2:3" into the map that CQL wants.
func parseReplication(text string) (string, bool) {
	options := []string{"'class': 'NetworkTopologyStrategy'"}
	if isDigits(text) {
		text = "replication_factor:" + text // in every data centre there is
	}
	seen := map[string]bool{}
	for option := range strings.SplitSeq(text, ",") {
		name, factor, _ := strings.Cut(option, ":")
		if seen[name] || !regexp.MustCompile(`^[\w.-]+:[1-9][0-9]?$`).MatchString(option) {
			return "", false
		}
		seen[name] = true
		options = append(options, fmt.Sprintf("'%s': %s", name, factor))
	}
	return "{" + strings.Join(options, ", ") + "}", true
}

func parseCertificates(file string) (string, bool) {
	if file == "" {
		return "", true
	}
	pem, err := os.ReadFile(file)
	return file, err == nil && x509.NewCertPool().AppendCertsFromPEM(pem)
}

// root is the answer of GET /.
type root struct {
	Message   string   `json:"message"`
	Version   string   `json:"version"`
	Endpoints []string `json:"endpoints"`
}

// getRoot answers GET /, the liveness probe: it never touches Cassandra.
func (rt *router) getRoot(w http.ResponseWriter, r *http.Request) error {
	return writeJSON(w, http.StatusOK, root{"cassandra-service-go is running!", version, rt.endpoints})
}

// health is the answer of GET /health.
type health struct {
	Status             string    `json:"status"`
	Cassandra          string    `json:"cassandra"`
	CassandraConnected bool      `json:"cassandra_connected"`
	Keyspace           string    `json:"keyspace"`
	LatencyMS          float64   `json:"latency_ms"`
	Timestamp          timestamp `json:"timestamp"`
}

// getHealth answers GET /health, the readiness probe, by one real read of the
// users table: what it reports is what the next request will meet.
func getHealth(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), healthTimeout)
	defer cancel()
	start := time.Now()
	_, err := readUser(ctx, uuid.Nil)
	if p, ok := errors.AsType[*problem](err); ok && p.Status == http.StatusNotFound {
		err = nil // nobody has the nil UUID, and Cassandra said so
	}
	h := health{Status: "healthy", Cassandra: "connected", CassandraConnected: err == nil, Keyspace: global.cluster.keyspace, LatencyMS: milliseconds(time.Since(start)), Timestamp: now()}
	status := http.StatusOK
	if isBug(err) { // a table without one of the columns, say: that is no outage
		slog.Error("the health check cannot read the users table", "error", err)
	}
	if err != nil {
		status, h.Status, h.Cassandra = http.StatusServiceUnavailable, "unhealthy", "disconnected"
	}
	if life.draining.Load() {
		status, h.Status = http.StatusServiceUnavailable, "draining"
	}
	if status != http.StatusOK {
		w.Header().Set("Retry-After", "1")
	}
	return writeJSON(w, status, h)
}
