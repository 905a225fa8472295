// Command cassandra runs COMMAND against a real Cassandra, without Docker:
//
//	go run ./cassandra [flags] [COMMAND …]
//
// Without flags it uses the Cassandra in CASSANDRA_HOSTS, or one that accepts CQL on localhost:9042. If there is
// neither, or with any flag, it starts a private Cassandra 5.0, which needs Java 17 or 21 and Maven. As root on Debian
// or Ubuntu it installs these if missing. Without COMMAND, the private Cassandra runs until Ctrl-C.
//
// COMMAND finds Cassandra through CASSANDRA_HOSTS and CASSANDRA_PORT. For a private Cassandra, the launcher also sets
// CASSANDRA_REPLICATION, and with -auth CASSANDRA_USERNAME and CASSANDRA_PASSWORD. MAX_HEAP_SIZE is the heap of a node
// (default 1G, or 512M in a cluster).
//
// SIGINT, SIGTERM and SIGHUP are forwarded to COMMAND. The end of the launcher's parent process, such as `go run` or a
// script, counts as SIGTERM. The launcher exits with COMMAND's status, or 128+n if signal n ended it. COMMAND can read
// piped input, but not the terminal. No process and no temporary file is left behind, even if the launcher is killed.
package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gocql/gocql"
)

const (
	defaultPort        = 9042
	defaultStoragePort = 7000
	superuser          = "cassandra" // user name and password in a new Cassandra

	startTimeout = 3 * time.Minute  // a node takes 8 s on an idle machine, and several times that on a busy one
	graceTimeout = 30 * time.Second // for the rest of COMMAND's group; by default the service drains for 20 s at most
	stopTimeout  = 10 * time.Second // a node exits within 3 s of SIGTERM, unless it hangs

	reaperName = "cassandra-reaper" // the reaper's os.Args[0]
	orphaned   = syscall.Signal(0)  // the launcher receives this when its parent has ended
)

const installHelp = `A private Cassandra needs Java 17 or 21, and Maven to download it:
  Debian, Ubuntu:  sudo apt-get update && sudo apt-get install maven openjdk-17-jre-headless (or openjdk-21-…)
  macOS:           brew install openjdk@17 maven
Or start Cassandra in Docker, then run the launcher again without flags:
  docker run -d -p 9042:9042 cassandra:5`

// javaFolders is a PATH-style list of glob patterns. The java in PATH itself is often another version.
const javaFolders = "$JAVA_HOME/bin:$PATH:/usr/lib/jvm/*/bin:/Library/Java/JavaVirtualMachines/*/Contents/Home/bin:" +
	"/opt/homebrew/opt/openjdk@*/bin:/usr/local/opt/openjdk@*/bin:$HOME/.sdkman/candidates/java/*/bin"

// javaProperties matches the sorted properties of a Java that can run Cassandra.
var javaProperties = regexp.MustCompile(`(?s)\sjava\.home = ([^\n]+)\n.*\sjava\.specification\.version = (?:17|21)\n`)

var quiet atomic.Bool // the launcher is stopping

//go:embed pom.xml
var pom []byte

//go:embed cassandra.yaml
var yaml string

//go:embed jvm.options
var jvmOptions []byte

type launcher struct {
	size, port                int // number of nodes, and their CQL port or 0
	data, pidFile, rpcAddress string
	restart                   time.Duration
	auth, periodic            bool
	private                   bool // start a Cassandra, as every flag implies
	command                   []string

	signals  chan os.Signal
	reaper   *exec.Cmd
	reports  *os.File    // a pipe to the reaper
	dir      string      // temporary
	kept     string      // where the data is kept, with -data
	locks    [2]*os.File // of -pid and -data, nil without the flag
	reserved []io.Closer // ports

	javaHome, classpath  string
	cqlPort, storagePort int
	nodes                []*node
	mu                   sync.Mutex // guards each node's pid, the PID file, and the closing of reports
}

type node struct {
	address, dir string
	advertised   string          // the address for clients
	pid          int             // 0 before the first start
	ended        <-chan struct{} // closed when the process has ended
}

func main() {
	// A handler makes a write to a closed pipe return an error instead of killing the launcher: in `2>&1 | tee log`,
	// Ctrl-C also ends tee. COMMAND does not inherit a handler, but would inherit signal.Ignore.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if os.Args[0] == reaperName {
		reap(os.Args[1], os.Args[2])
		return
	}
	os.Exit(run(os.Args[1:]))
}

func run(args []string) (status int) {
	l := &launcher{signals: make(chan os.Signal, 4)}
	go l.watchParent(os.Getppid())
	if err := l.parse(args); err != nil {
		say("%v", err)
		return 2
	}
	l.private = l.private || !useExisting()
	signal.Notify(l.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if err := l.prepare(); err != nil {
		say("%v", err)
		return 2
	}
	defer l.end()
	if l.private {
		return l.runPrivate()
	}
	return l.runCommand(nil)
}

// parse reads the flags. It exits after an unknown flag, and after -h.
func (l *launcher) parse(args []string) error {
	fs := flag.NewFlagSet("cassandra", flag.ExitOnError)
	fs.IntVar(&l.size, "nodes", 1, "start a cluster of `N` nodes on 127.0.0.1 to 127.0.0.N (Linux)")
	fs.IntVar(&l.port, "port", 0, "accept CQL on `PORT` (default 9042, or a free port if 9042 is taken)")
	fs.StringVar(&l.data, "data", "", "keep data and logs in `DIR` (default: a temporary folder)")
	fs.DurationVar(&l.restart, "restart", 0, "restart a dead node after `DURATION`, such as 5s, on the same port and data")
	fs.StringVar(&l.rpcAddress, "rpc-address", "", "advertise `ADDR` to clients, and the next addresses for further nodes")
	fs.StringVar(&l.pidFile, "pid", "", "write the process ids of the nodes to `FILE`, one per line")
	fs.BoolVar(&l.auth, "auth", false, "require a user name and password; both are cassandra")
	fs.BoolVar(&l.periodic, "periodic", false, "acknowledge writes before they are on disk, for benchmarks")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "usage: go run ./cassandra [flags] [COMMAND …]\n\n"+
			"Runs COMMAND against the Cassandra in CASSANDRA_HOSTS, or one that is running on localhost:9042. If there\n"+
			"is neither, or with any flag, it starts a private one, which stops with COMMAND or on Ctrl-C.")
		fs.PrintDefaults()
	}
	fs.Parse(args)
	l.private, l.command = fs.NFlag() > 0, fs.Args()
	switch {
	case l.size < 1 || l.size > 9:
		return fmt.Errorf("invalid -nodes %d; it must be 1 to 9", l.size)
	case l.port < 0 || l.port > 65535:
		return fmt.Errorf("invalid -port %d; it must be 1 to 65535", l.port)
	case l.rpcAddress != "" && net.ParseIP(l.rpcAddress) == nil:
		return fmt.Errorf("invalid -rpc-address %q; it must be an IP address", l.rpcAddress)
	case !isPIDFile(l.pidFile):
		return fmt.Errorf("invalid -pid %q; it exists and is not a list of PIDs", l.pidFile)
	}
	return nil
}

// isPIDFile reports whether name can be overwritten: it is empty, a missing file or a list of PIDs.
func isPIDFile(name string) bool {
	info, err := os.Lstat(name)
	if err != nil || !info.Mode().IsRegular() || info.Size() > 1<<10 { // nine PIDs need less than 100 bytes
		return name == "" || errors.Is(err, os.ErrNotExist)
	}
	text, err := os.ReadFile(name)
	return err == nil && strings.Trim(string(text), "0123456789\n") == ""
}

// watchParent sends orphaned when the parent has ended, and SIGKILL after graceTimeout. A signal can end `go run`
// without reaching the launcher, which can only observe that its parent's id changes.
func (l *launcher) watchParent(parent int) {
	for os.Getppid() == parent {
		time.Sleep(200 * time.Millisecond)
	}
	l.signals <- orphaned
	time.Sleep(graceTimeout)
	l.signals <- syscall.SIGKILL
}

// useExisting reports whether to use an existing Cassandra, and sets COMMAND's environment for it.
func useExisting() bool {
	if hosts := os.Getenv("CASSANDRA_HOSTS"); hosts != "" {
		say("using the existing Cassandra at %s (CASSANDRA_HOSTS)", hosts)
		return true
	}
	session, err := connect("localhost", defaultPort, os.Getenv("CASSANDRA_USERNAME"), os.Getenv("CASSANDRA_PASSWORD"))
	if err != nil {
		return false
	}
	session.Close()
	say("using the existing Cassandra at localhost:%d", defaultPort)
	os.Setenv("CASSANDRA_HOSTS", "localhost")
	os.Setenv("CASSANDRA_PORT", fmt.Sprint(defaultPort))
	return true
}

// connect fails if nothing accepts CQL there, or if the user is refused.
func connect(host string, port int, user, password string) (*gocql.Session, error) {
	cluster := gocql.NewCluster(net.JoinHostPort(host, fmt.Sprint(port)))
	cluster.ProtoVersion = 4
	cluster.ConnectTimeout = 2 * time.Second // the port may belong to something that never responds
	cluster.DisableInitialHostLookup = true  // or the driver would dial the address that the node advertises
	cluster.Logger = log.New(io.Discard, "", 0)
	cluster.Authenticator = gocql.PasswordAuthenticator{Username: user, Password: password}
	return cluster.CreateSession()
}

// prepare takes the locks, makes the temporary folder and starts the reaper. The reaper is this program again, in its
// own session, so that signals to the launcher's terminal and group don't reach it. It shares the locks, and reads from
// a pipe that the kernel closes when the launcher has ended.
func (l *launcher) prepare() (err error) {
	if l.data != "" {
		os.MkdirAll(l.data, 0o700) // if this fails, so does openLocked
		if l.locks[1], err = openLocked(filepath.Join(l.data, "lock")); err != nil {
			return err
		}
		l.kept = "kept in " + l.data
	}
	if l.pidFile != "" {
		if l.locks[0], err = openLocked(l.pidFile); err != nil {
			return err
		}
		l.locks[0].Truncate(0)
	}
	exe, _ := os.Executable() // if this fails, so does Start
	stdin, reports, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	if l.private {
		if l.dir, err = os.MkdirTemp("", "cassandra-"); err != nil {
			return err
		}
	}
	l.reports, l.reaper = reports, exec.Command(exe)
	l.reaper.Args = []string{reaperName, l.dir, l.pidFile}
	l.reaper.Stdin, l.reaper.ExtraFiles = stdin, l.locks[:]
	l.reaper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err = l.reaper.Start(); err != nil {
		os.Remove(l.dir)
	}
	return err
}

// openLocked opens or creates a file that only one launcher can have open.
func openLocked(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s is in use by another launcher: %w", name, err)
	}
	return f, nil
}

// end silences the launcher, and returns when the reaper has ended all processes.
func (l *launcher) end() {
	quiet.Store(true)
	l.mu.Lock()
	l.reports.Close()
	l.mu.Unlock()
	l.reaper.Wait()
}

// runPrivate runs COMMAND against a private Cassandra.
func (l *launcher) runPrivate() (status int) {
	defer say("stopping")
	started := make(chan error, 1)
	go func() { started <- l.startCluster() }()
	select {
	case err := <-started:
		if err != nil {
			say("%v", err)
			return 1
		}
	case s := <-l.signals:
		return 128 + int(s.(syscall.Signal))
	}
	return l.runCommand(l.settings())
}

// settings returns the environment variables that describe the cluster.
func (l *launcher) settings() []string {
	hosts := "127.0.0.1"
	for _, n := range l.nodes[1:] {
		hosts += "," + n.address
	}
	env := []string{"CASSANDRA_HOSTS=" + hosts, fmt.Sprint("CASSANDRA_PORT=", l.cqlPort)}
	env = append(env, fmt.Sprint("CASSANDRA_REPLICATION=", l.size))
	if l.auth {
		env = append(env, "CASSANDRA_USERNAME="+superuser, "CASSANDRA_PASSWORD="+superuser)
	}
	return env
}

// runCommand runs COMMAND with additional settings and returns its exit status. COMMAND has a process group of its own,
// since Ctrl-C reaches the launcher's whole group and the launcher forwards it.
func (l *launcher) runCommand(settings []string) (status int) {
	if len(l.command) == 0 {
		if l.private {
			say("running until Ctrl-C; connect with %s", strings.Join(settings, " "))
			<-l.signals
		}
		return 0
	}
	say("running %s (Ctrl-C stops it)", strings.Join(l.command, " "))
	cmd := exec.Command(l.command[0], l.command[1:]...)
	cmd.Env = append(os.Environ(), settings...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// A background process group is stopped when it reads from the terminal.
	if in, err := os.Stdin.Stat(); err == nil && in.Mode()&os.ModeCharDevice == 0 {
		cmd.Stdin = os.Stdin
	}
	ended, err := l.start(cmd)
	if err != nil {
		say("%v", err)
		return 127
	}
	l.waitForGroup(cmd.Process.Pid, ended)
	<-ended
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return cmd.ProcessState.ExitCode()
}

// waitForGroup forwards signals until the group is empty. The group can outlive its leader: a signal ends `go run`
// immediately, while its child still drains.
func (l *launcher) waitForGroup(group int, ended <-chan struct{}) {
	var grace <-chan time.Time
	signalled := false
	for syscall.Kill(-group, 0) == nil {
		select {
		case s := <-l.signals:
			if s == orphaned && !signalled { // a second signal would abort COMMAND's drain
				s = syscall.SIGTERM
			}
			syscall.Kill(-group, s.(syscall.Signal))
			signalled = true
		case <-ended:
			ended, grace = nil, time.After(graceTimeout)
		case <-grace:
			syscall.Kill(-group, syscall.SIGKILL)
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// startCluster returns when every node accepts CQL.
func (l *launcher) startCluster() error {
	if err := l.resolve(); err != nil {
		return err
	}
	dir, err1 := filepath.Abs(cmp.Or(l.data, l.dir))
	for i := range l.size {
		n := &node{address: fmt.Sprint("127.0.0.", i+1), dir: filepath.Join(dir, fmt.Sprint("node", i+1))}
		n.advertised = n.address
		if ip := net.ParseIP(l.rpcAddress); ip != nil {
			ip[len(ip)-1] += byte(i)
			n.advertised = ip.String()
		}
		l.nodes = append(l.nodes, n)
	}
	began := time.Now()
	cqlPort, err2 := l.reservePort(cmp.Or(l.port, defaultPort), l.port == 0)
	storagePort, err3 := l.reservePort(defaultStoragePort, true)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	l.cqlPort, l.storagePort = cqlPort, storagePort
	for _, n := range l.nodes { // one after another, since nodes that join simultaneously conflict
		say("starting a private Cassandra 5.0 on %s:%d; this takes about 15 s", n.address, l.cqlPort)
		if err := l.startNode(n); err != nil {
			return err
		}
		go l.watch(n)
	}
	say("ready in %.0f s; data is %s", time.Since(began).Seconds(), cmp.Or(l.kept, "temporary"))
	return nil
}

// reservePort returns port if it is free on every node's address, or else a free one if orAny is set. The UDP port of
// the same number, which nothing else uses, keeps other launchers away while no node listens.
func (l *launcher) reservePort(port int, orAny bool) (reserved int, err error) {
	defer func() {
		if err != nil && orAny {
			reserved, err = l.reservePort(0, false)
		}
	}()
	for _, n := range l.nodes {
		tcp, err := net.Listen("tcp", net.JoinHostPort(n.address, fmt.Sprint(port)))
		if err != nil {
			return 0, err
		}
		defer tcp.Close()
		port = tcp.Addr().(*net.TCPAddr).Port
	}
	udp, err := net.ListenPacket("udp", fmt.Sprint("127.0.0.1:", port))
	l.reserved = append(l.reserved, udp) // or the garbage collector would close it
	return port, err
}

// watch reports when a node dies, and restarts it if -restart is set.
func (l *launcher) watch(n *node) {
	for {
		<-n.ended
		if l.restart == 0 {
			say("the node on %s died; its log ends with\n%s", n.address, n.logTail())
			return
		}
		say("the node on %s died; restarting it in %s", n.address, l.restart)
		time.Sleep(l.restart)
		if err := l.startNode(n); err != nil {
			say("%v", err)
		} else {
			say("the node on %s is back", n.address)
		}
	}
}

// startNode returns when the node accepts CQL.
func (l *launcher) startNode(n *node) error {
	if err := l.launch(n); err != nil {
		return err
	}
	timeout := time.After(startTimeout)
	for !l.responds(n) {
		select {
		case <-n.ended:
			return fmt.Errorf("the node died while starting; its log ends with\n%s", n.logTail())
		case <-timeout:
			return fmt.Errorf("the node did not respond within %s; its log ends with\n%s", startTimeout, n.logTail())
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// responds reports whether it is this node that accepts CQL, not another Cassandra that took the port first.
func (l *launcher) responds(n *node) bool {
	session, err := connect(n.address, l.cqlPort, superuser, superuser) // without -auth, any user is accepted
	if err != nil {
		return false
	}
	defer session.Close()
	var dir string
	err = session.Query(`SELECT value FROM system_views.system_properties WHERE name = 'cassandra.storagedir'`).Scan(&dir)
	return err == nil && dir == n.dir
}

// launch starts the process of a node and updates the PID file.
func (l *launcher) launch(n *node) error {
	os.Mkdir(n.dir, 0o700) // if this fails, so does WriteFile
	err1 := os.WriteFile(n.file("cassandra.yaml"), []byte(l.config(n)), 0o600)
	err2 := os.WriteFile(n.file("jvm.options"), jvmOptions, 0o600)
	out, err3 := os.OpenFile(n.file("system.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(l.javaHome, "bin", "java"), l.javaArgs(n)...)
	cmd.Env = append(os.Environ(), "CLASSPATH="+l.classpath)
	cmd.Dir, cmd.Stdout, cmd.Stderr = n.dir, out, out
	ended, err := l.start(cmd)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n.pid, n.ended = cmd.Process.Pid, ended
	if l.pidFile == "" {
		return nil
	}
	var pids bytes.Buffer
	for _, n := range l.nodes {
		if n.pid != 0 {
			fmt.Fprintln(&pids, n.pid)
		}
	}
	_, err = l.locks[0].WriteAt(pids.Bytes(), 0)
	return errors.Join(err, l.locks[0].Truncate(int64(pids.Len())))
}

// config fills in cassandra.yaml.
func (l *launcher) config(n *node) string {
	return strings.NewReplacer(
		"${ADDRESS}", n.address,
		"${ADVERTISED}", n.advertised,
		"${AUTHENTICATOR}", map[bool]string{false: "AllowAllAuthenticator", true: "PasswordAuthenticator"}[l.auth],
		"${COMMITLOG_SYNC}", map[bool]string{false: "batch", true: "periodic\ncommitlog_sync_period: 1s"}[l.periodic],
		"${CQL_PORT}", fmt.Sprint(l.cqlPort),
		"${STORAGE_PORT}", fmt.Sprint(l.storagePort),
	).Replace(yaml)
}

func (l *launcher) javaArgs(n *node) []string {
	heap := "512M"
	timing := []string{"-Dcassandra.ring_delay_ms=5000"}
	if l.size == 1 { // there are no peers to wait for
		heap = "1G"
		timing = []string{"-Dcassandra.ring_delay_ms=100", "-Dcassandra.skip_wait_for_gossip_to_settle=0"}
	}
	return append(timing,
		"@"+n.file("jvm.options"),
		"-Dcassandra.config="+(&url.URL{Scheme: "file", Path: n.file("cassandra.yaml")}).String(),
		"-Dcassandra.storagedir="+n.dir,
		"-Djava.io.tmpdir="+n.dir, // a killed node can't remove the libraries that it unpacked there
		"-Djna.tmpdir="+n.dir,
		"-Xmx"+cmp.Or(os.Getenv("MAX_HEAP_SIZE"), heap),
		"org.apache.cassandra.service.CassandraDaemon")
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// logTail returns the end of the node's log, without stack traces.
func (n *node) logTail() string {
	text, _ := os.ReadFile(n.file("system.log"))
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(text)), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "\tat ") || strings.HasPrefix(line, "\t... ")
	})
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// resolve finds Java and Cassandra's jars. It caches the classpath, since Maven takes seconds even without downloads.
// Without a home folder, it uses the temporary folder instead: other users can't write to either of them.
func (l *launcher) resolve() (err error) {
	l.javaHome, err = l.find("Java 17 or 21", l.findJava, "openjdk-17-jre-headless", "openjdk-21-jre-headless")
	if err != nil {
		return err
	}
	message, args := "; this takes about a minute the first time", []string(nil)
	cache, err := os.UserCacheDir()
	if err == nil {
		err = os.MkdirAll(cache, 0o700)
	}
	if err != nil {
		message, cache = fmt.Sprintf(" for this run only; set HOME to keep it (%v)", err), l.dir
		args = []string{"-Dmaven.repo.local=" + filepath.Join(l.dir, "repository")}
	}
	cache = filepath.Join(cache, fmt.Sprintf("cassandra-classpath-%x", sha256.Sum256(pom)))
	text, _ := os.ReadFile(cache)
	jars, complete := strings.CutSuffix(string(text), "\n")
	if l.classpath = jars; complete && !slices.ContainsFunc(filepath.SplitList(jars), isMissing) {
		return nil
	}
	findMaven := func() string { mvn, _ := exec.LookPath("mvn"); return mvn }
	mvn, err := l.find("Maven", findMaven, "maven")
	if err != nil {
		return err
	}
	say("downloading Cassandra 5.0 with Maven%s", message)
	if l.classpath, err = l.runMaven(mvn, args...); err != nil {
		return err
	}
	os.WriteFile(cache, []byte(l.classpath+"\n"), 0o600) // if this fails, the next launcher runs Maven again
	return nil
}

func isMissing(path string) bool {
	_, err := os.Stat(path)
	return err != nil
}

// runMaven returns the classpath of pom.xml.
func (l *launcher) runMaven(mvn string, args ...string) (classpath string, err error) {
	project, result := filepath.Join(l.dir, "pom.xml"), filepath.Join(l.dir, "classpath")
	err1 := os.WriteFile(project, pom, 0o600)
	err2 := os.Mkdir(filepath.Join(l.dir, ".mvn"), 0o700) // or Maven would accept options from a .mvn in /tmp
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	args = append(args, "-B", "-q", "-f", project, "dependency:build-classpath", "-Dmdep.outputFile="+result)
	cmd := exec.Command(mvn, args...)
	cmd.Dir, cmd.Env = l.dir, append(os.Environ(), "JAVA_HOME="+l.javaHome)
	out := l.output(cmd)
	text, err := os.ReadFile(result)
	if err != nil || len(text) == 0 {
		return "", fmt.Errorf("mvn failed:\n%s", out)
	}
	return string(text), nil
}

// find returns the path that look finds. As root it installs one of the packages if necessary.
func (l *launcher) find(what string, look func() string, packages ...string) (string, error) {
	if path := look(); path != "" {
		return path, nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil || os.Geteuid() != 0 {
		return "", fmt.Errorf("%s not found\n%s", what, installHelp)
	}
	say("%s not found; installing it with apt-get", what)
	const script = `export DEBIAN_FRONTEND=noninteractive
		apt-get update; for p; do apt-get install -y --no-install-recommends $p && break; done`
	out := l.output(exec.Command("sh", append([]string{"-c", script, "sh"}, packages...)...))
	if path := look(); path != "" {
		return path, nil
	}
	return "", fmt.Errorf("%s not found, and apt-get failed:\n%s\n%s", what, out, installHelp)
}

// findJava returns the home of the first Java that can run Cassandra, or "".
func (l *launcher) findJava() string {
	for _, dir := range filepath.SplitList(os.ExpandEnv(javaFolders)) {
		candidates, _ := filepath.Glob(filepath.Join("/", dir, "java")) // never in the current folder
		for _, java := range candidates {
			out := l.output(exec.Command(java, "-XshowSettings:properties", "-version"))
			if home := javaProperties.FindStringSubmatch(out); home != nil {
				return home[1]
			}
		}
	}
	return ""
}

// output runs cmd and returns its output.
func (l *launcher) output(cmd *exec.Cmd) string {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	ended, err := l.start(cmd)
	if err != nil {
		return err.Error()
	}
	<-ended
	return out.String()
}

// start starts cmd in a process group that the reaper will end. A shell reports the group before it becomes cmd. It
// holds the pipe open until then, so that the reaper also ends a group that starts while the launcher is killed.
func (l *launcher) start(cmd *exec.Cmd) (ended <-chan struct{}, err error) {
	cmd.Args = append([]string{"sh", "-c", `echo $$ >&3 && exec "$@" 3>&-`, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = []*os.File{l.reports} // file descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		if group := cmd.Process.Pid; syscall.Kill(-group, 0) != nil { // its id may be used again
			fmt.Fprintln(l.reports, -group)
		}
		close(done)
	}()
	return done, nil
}

// reap ends the process groups that are left when the launcher has ended, and removes the files that it made.
func reap(dir, pidFile string) {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	groups := map[int]bool{}
	for group := 0; ; groups[max(group, -group)] = group > 0 {
		if _, err := fmt.Fscan(os.Stdin, &group); err != nil {
			break
		}
	}
	var ending sync.WaitGroup
	for group, running := range groups {
		if running {
			ending.Go(func() { endGroup(group) })
		}
	}
	ending.Wait()
	own, _ := os.NewFile(3, "pids").Stat()
	if found, _ := os.Lstat(pidFile); os.SameFile(own, found) { // nobody has replaced it
		os.Remove(pidFile)
	}
	os.RemoveAll(dir)
}

// endGroup sends SIGTERM to a process group, and SIGKILL after stopTimeout.
func endGroup(group int) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		syscall.Kill(-group, sig)
		syscall.Kill(-group, syscall.SIGCONT) // a stopped process handles no SIGTERM
		for deadline := time.Now().Add(stopTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if syscall.Kill(-group, 0) != nil {
				return
			}
		}
	}
}

// say writes to standard error, since standard output is COMMAND's.
func say(format string, args ...any) {
	if !quiet.Load() {
		fmt.Fprintf(os.Stderr, "cassandra: "+format+"\n", args...)
	}
}
