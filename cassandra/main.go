// Command cassandra runs COMMAND against a real Cassandra, without Docker:
//
//	go run ./cassandra [flags] [COMMAND …]
//
// If CASSANDRA_HOSTS names a Cassandra, or one answers on localhost:9042, that is used. Failing that, and with any flag,
// it starts a Cassandra 5.0 of its own, on port 9042 or another, with Java 17 or 21 and Maven, which it installs on Debian
// and Ubuntu as root; without COMMAND that runs until Ctrl-C. COMMAND finds it by CASSANDRA_HOSTS and CASSANDRA_PORT, with
// -nodes also CASSANDRA_REPLICATION, with -auth also CASSANDRA_USERNAME and CASSANDRA_PASSWORD. MAX_HEAP_SIZE sets the
// heap of a node (1G alone, 512M in a cluster).
//
// SIGINT, SIGTERM and SIGHUP are passed on to COMMAND, and its exit status is the launcher's, 128+n if signal n ended it.
// COMMAND can read what is piped to the launcher, but not from the terminal. However the launcher ends, it leaves no
// process and no temporary file behind.
package main

import (
	"bufio"
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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gocql/gocql"
)

const (
	usualPort        = 9042
	usualStoragePort = 7000
	superuser        = "cassandra" // the user that a new Cassandra has, and the password

	startTimeout = 3 * time.Minute  // a node takes 8 s on an idle machine, and several times that on a busy one
	graceTimeout = 30 * time.Second // for what COMMAND leaves running; the service drains for 20 s at most by default
	stopTimeout  = 10 * time.Second // a node ends within 3 s of its SIGTERM, unless it hangs
)

// What Cassandra wants opened in Java, as its own start script has it.
const (
	javaExports = `java.base/jdk.internal.misc java.base/jdk.internal.ref java.base/sun.nio.ch java.base/java.lang.ref
		java.management.rmi/com.sun.jmx.remote.internal.rmi java.rmi/sun.rmi.registry java.rmi/sun.rmi.server
		java.sql/java.sql jdk.unsupported/sun.misc`
	javaOpens = `java.base/java.lang java.base/java.lang.module java.base/java.lang.reflect java.base/java.io
		java.base/java.net java.base/java.nio java.base/java.util java.base/java.util.concurrent
		java.base/java.util.concurrent.atomic java.base/sun.nio.ch java.base/jdk.internal.loader
		java.base/jdk.internal.ref java.base/jdk.internal.reflect java.base/jdk.internal.math
		java.base/jdk.internal.module java.base/jdk.internal.util.jar jdk.management/com.sun.management.internal`
)

const howToInstall = `Cassandra needs Java 17 or 21, and Maven to fetch it:
  Debian, Ubuntu:  sudo apt-get update && sudo apt-get install -y openjdk-17-jre-headless maven
                   (openjdk-21-jre-headless where there is no 17)
  macOS:           brew install openjdk@17 maven
Or start it in Docker, and run COMMAND against that:
  docker run -d -p 9042:9042 cassandra:5`

// Where to look for Java beyond JAVA_HOME and the PATH.
var javaFolders = []string{
	"/usr/lib/jvm/*/bin",
	"/Library/Java/JavaVirtualMachines/*/Contents/Home/bin",
	"/opt/homebrew/opt/openjdk@*/bin",
	"/usr/local/opt/openjdk@*/bin",
	"$HOME/.sdkman/candidates/java/*/bin",
}

// What java says of itself when asked for its properties.
var (
	javaHomeLine    = regexp.MustCompile(`(?m)^\s*java\.home = (.+)$`)
	javaVersionLine = regexp.MustCompile(`(?m)^\s*java\.specification\.version = (17|21)$`)
)

//go:embed pom.xml
var pom []byte

//go:embed cassandra.yaml
var yaml string

func main() {
	if os.Args[0] == reaperName {
		reap(os.Stdin)
		return
	}
	os.Exit(run(os.Args[1:]))
}

type options struct {
	nodes    int
	port     int
	data     string
	restart  time.Duration
	announce string
	pidFile  string
	auth     bool
	own      bool // any flag was given: all of them are about an own Cassandra
	command  []string
}

// launcher is one run of this command.
type launcher struct {
	options
	reaper  *reaper
	signals chan os.Signal
	orphan  <-chan struct{}
}

func run(args []string) (status int) {
	opts, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2 // parse has said why
	}
	l := &launcher{options: opts, signals: make(chan os.Signal, 4), orphan: watchParent()}
	signal.Notify(l.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if l.reaper, err = startReaper(); err != nil {
		say("%v", err)
		return 1
	}
	defer l.reaper.close()

	if !l.own {
		if settings, found := existing(); found {
			return l.runCommand(settings)
		}
	}
	return l.runOwn()
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("cassandra", flag.ContinueOnError)
	fs.IntVar(&o.nodes, "nodes", 1, "start a cluster of `N` nodes on 127.0.0.1 to 127.0.0.N (Linux)")
	fs.IntVar(&o.port, "port", 0, "answer CQL on `PORT` (default 9042, or another if that is taken)")
	fs.StringVar(&o.data, "data", "", "keep data and logs in `DIR` (default: in a temporary folder)")
	fs.DurationVar(&o.restart, "restart", 0, "start a node that died again after `DURATION`, on its port, with its data")
	fs.StringVar(&o.announce, "rpc-address", "", "announce `ADDR` to the clients, though the node is at 127.0.0.1")
	fs.StringVar(&o.pidFile, "pid", "", "keep the process ids of the nodes in `FILE`, one a line in the order of the nodes")
	fs.BoolVar(&o.auth, "auth", false, "ask clients for a user and a password; both are cassandra")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "usage: go run ./cassandra [flags] [COMMAND …]\n\n"+
			"Without flags a Cassandra that is there is used, with any flag an own one is started:")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	o.own, o.command = fs.NFlag() > 0, fs.Args()
	var err error
	switch {
	case o.nodes < 1 || o.nodes > 9:
		err = errors.New("-nodes must be 1 to 9")
	case o.port < 0 || o.port > 65535:
		err = errors.New("-port must be 1 to 65535")
	case o.announce != "" && (o.nodes > 1 || net.ParseIP(o.announce) == nil):
		err = errors.New("-rpc-address must be an IP address, and needs a single node")
	}
	if err != nil {
		say("%v", err)
	}
	return o, err
}

// watchParent returns a channel that is closed when the parent has ended. A signal can end `go run` without reaching
// what it runs, and all that can be seen of it from here is that the parent's id changes.
func watchParent() <-chan struct{} {
	orphan, parent := make(chan struct{}), os.Getppid()
	go func() {
		for os.Getppid() == parent {
			time.Sleep(200 * time.Millisecond)
		}
		close(orphan)
	}()
	return orphan
}

// existing finds a Cassandra that need not be started, and what COMMAND has to be told about it.
func existing() (settings []string, found bool) {
	if hosts := os.Getenv("CASSANDRA_HOSTS"); hosts != "" {
		say("using the Cassandra at %s, as CASSANDRA_HOSTS says", hosts)
		return nil, true
	}
	session, err := connect("localhost", usualPort, os.Getenv("CASSANDRA_USERNAME"), os.Getenv("CASSANDRA_PASSWORD"))
	if err != nil {
		return nil, false
	}
	session.Close()
	say("using the Cassandra at localhost:%d", usualPort)
	return []string{"CASSANDRA_HOSTS=localhost", fmt.Sprint("CASSANDRA_PORT=", usualPort)}, true
}

// connect returns a session only if a Cassandra answers CQL and lets the user in.
func connect(host string, port int, user, password string) (*gocql.Session, error) {
	cluster := gocql.NewCluster(host)
	cluster.Port = port
	cluster.ProtoVersion = 4
	cluster.ConnectTimeout = 2 * time.Second // what listens there may not be a Cassandra at all
	cluster.NumConns = 1
	cluster.DisableInitialHostLookup = true // it would go on to the address that the node announces
	cluster.Logger = log.New(io.Discard, "", 0)
	if user != "" {
		cluster.Authenticator = gocql.PasswordAuthenticator{Username: user, Password: password}
	}
	return cluster.CreateSession()
}

// runOwn runs COMMAND against a Cassandra of its own; without COMMAND it waits to be told to end.
func (l *launcher) runOwn() (status int) {
	c := &cluster{options: l.options, reaper: l.reaper}
	started := make(chan error, 1)
	go func() { started <- c.start() }()
	select {
	case err := <-started:
		if err != nil {
			say("%v", err)
			return 1
		}
	case s := <-l.signals:
		say("stopping")
		return 128 + int(s.(syscall.Signal))
	case <-l.orphan:
		return 1
	}

	defer say("stopping") // the reaper does it
	if len(l.command) > 0 {
		return l.runCommand(c.settings())
	}
	say("%s", strings.Join(c.settings(), " "))
	select {
	case <-l.signals:
	case <-l.orphan:
	}
	return 0
}

// runCommand runs COMMAND in a process group of its own: Ctrl-C reaches the launcher's whole group, so that a COMMAND
// in it would get each signal twice.
func (l *launcher) runCommand(settings []string) (status int) {
	if len(l.command) == 0 {
		return 0 // the Cassandra is there, and nobody's to stop
	}
	cmd := exec.Command(l.command[0], l.command[1:]...)
	cmd.Env = append(os.Environ(), settings...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Only the foreground group may read from a terminal; any other is stopped when it tries.
	if in, err := os.Stdin.Stat(); err == nil && in.Mode()&os.ModeCharDevice == 0 {
		cmd.Stdin = os.Stdin
	}
	if err := l.reaper.start(cmd); err != nil {
		say("%v", err)
		return 127
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	l.waitForGroup(cmd.Process.Pid, ended)

	<-ended
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return cmd.ProcessState.ExitCode()
}

// waitForGroup passes signals on until the group is empty, which can be later than its leader's end: a signal ends
// `go run` at once, while what it ran still drains.
func (l *launcher) waitForGroup(group int, ended <-chan struct{}) {
	var grace <-chan time.Time
	orphan, told := l.orphan, false
	for syscall.Kill(-group, 0) == nil {
		select {
		case s := <-l.signals:
			syscall.Kill(-group, s.(syscall.Signal))
			told = true
		case <-orphan:
			if !told { // whoever ended the parent often means both; a second signal would cut the drain short
				syscall.Kill(-group, syscall.SIGTERM)
			}
			orphan, grace = nil, time.After(graceTimeout)
		case <-ended:
			ended, grace = nil, time.After(graceTimeout)
		case <-grace:
			syscall.Kill(-group, syscall.SIGKILL)
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// cluster is the Cassandra of this launcher, one node or several.
type cluster struct {
	options
	reaper      *reaper
	javaHome    string
	classpath   string
	cqlPort     int
	storagePort int
	nodes       []*node
	mu          sync.Mutex // guards the cmd of the nodes and the file of their ids
}

type node struct {
	address string
	dir     string
	cmd     *exec.Cmd
	ended   chan struct{} // closed when cmd has ended
}

// settings tells COMMAND where the cluster is.
func (c *cluster) settings() []string {
	var hosts []string
	for _, n := range c.nodes {
		hosts = append(hosts, n.address)
	}
	env := []string{"CASSANDRA_HOSTS=" + strings.Join(hosts, ","), fmt.Sprint("CASSANDRA_PORT=", c.cqlPort)}
	if c.options.nodes > 1 {
		env = append(env, fmt.Sprint("CASSANDRA_REPLICATION=", c.options.nodes))
	}
	if c.auth {
		env = append(env, "CASSANDRA_USERNAME="+superuser, "CASSANDRA_PASSWORD="+superuser)
	}
	return env
}

// start returns when every node answers CQL.
func (c *cluster) start() error {
	if err := c.resolve(); err != nil {
		return err
	}
	if err := c.makeFolders(); err != nil {
		return err
	}
	began := time.Now()
	err := c.startNodes(usualPort, usualStoragePort)
	for tries := 1; err != nil && tries < 3 && c.lostPort(); tries++ {
		say("another process took the port first; trying others")
		err = c.startNodes(0, 0)
	}
	if err != nil {
		return err
	}
	for _, n := range c.nodes {
		go c.watch(n)
	}
	kept := "data is temporary"
	if c.data != "" {
		kept = "data is kept in " + c.data
	}
	say("ready in %.0f s; %s", time.Since(began).Seconds(), kept)
	return nil
}

// makeFolders gives each node a folder for its settings, its data and its log.
func (c *cluster) makeFolders() (err error) {
	dir := c.data
	if dir == "" {
		if dir, err = os.MkdirTemp("", "cassandra-"); err != nil {
			return err
		}
		c.reaper.tell("remove", dir)
	} else if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if c.pidFile != "" {
		c.reaper.tell("remove", c.pidFile)
	}
	for i := range c.options.nodes {
		n := &node{address: fmt.Sprint("127.0.0.", i+1), dir: filepath.Join(dir, fmt.Sprint("node", i+1))}
		if err := os.MkdirAll(n.dir, 0o700); err != nil {
			return err
		}
		c.nodes = append(c.nodes, n)
	}
	return nil
}

// startNodes starts one node after another: nodes that join at the same moment trip over each other.
func (c *cluster) startNodes(port, storagePort int) error {
	if err := c.takePorts(port, storagePort); err != nil {
		return err
	}
	for _, n := range c.nodes {
		say("starting Cassandra on %s:%d", n.address, c.cqlPort)
		if err := c.startNode(n); err != nil {
			c.kill()
			return err
		}
	}
	return nil
}

// kill clears the way for another try.
func (c *cluster) kill() {
	for _, n := range c.nodes {
		if n.cmd != nil {
			n.cmd.Process.Kill()
			<-n.ended
		}
	}
}

// takePorts chooses the two ports, the same for every node, as one CASSANDRA_PORT has to do for all. Only a port that
// a flag asks for can't be replaced by another.
func (c *cluster) takePorts(port, storagePort int) (err error) {
	if c.cqlPort, err = c.freePort(cmp.Or(c.port, port)); err != nil && c.port == 0 {
		c.cqlPort, err = c.freePort(0)
	}
	if err != nil {
		return err
	}
	if c.storagePort, err = c.freePort(storagePort); err != nil {
		c.storagePort, err = c.freePort(0)
	}
	return err
}

// freePort returns port, or any port if that is 0, when it is free on the address of every node.
func (c *cluster) freePort(port int) (int, error) {
	for _, n := range c.nodes {
		l, err := net.Listen("tcp", net.JoinHostPort(n.address, fmt.Sprint(port)))
		if err != nil {
			return 0, err
		}
		defer l.Close()
		port = l.Addr().(*net.TCPAddr).Port
	}
	return port, nil
}

// lostPort is asked when the nodes have failed and are gone: who has their ports now, took them in the seconds between
// takePorts and a node's own bind.
func (c *cluster) lostPort() bool {
	_, cql := c.freePort(c.cqlPort)
	_, storage := c.freePort(c.storagePort)
	return errors.Join(cql, storage) != nil
}

// watch reports when a node has died, and starts it again if that is asked for.
func (c *cluster) watch(n *node) {
	for {
		<-n.ended
		if c.reaper.closed.Load() {
			return
		}
		if c.restart == 0 {
			say("the node on %s died; its log ends with\n%s", n.address, n.lastWords())
			return
		}
		say("the node on %s died; starting it again in %s", n.address, c.restart)
		time.Sleep(c.restart)
		if err := c.startNode(n); err == nil {
			say("the node on %s is back", n.address)
		} else if !c.reaper.closed.Load() {
			say("%v", err)
		}
	}
}

// startNode returns when the node answers CQL.
func (c *cluster) startNode(n *node) error {
	if err := c.launch(n); err != nil {
		return err
	}
	timeout := time.After(startTimeout)
	for !c.answers(n) {
		select {
		case <-n.ended:
			return fmt.Errorf("the node ended while it started; its log ends with\n%s", n.lastWords())
		case <-timeout:
			return fmt.Errorf("the node did not answer within %s; its log ends with\n%s", startTimeout, n.lastWords())
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// answers tells whether it is this node that answers on its port, and not one that took the port before it.
func (c *cluster) answers(n *node) bool {
	session, err := connect(n.address, c.cqlPort, superuser, superuser) // without -auth any user is let in
	if err != nil {
		return false
	}
	defer session.Close()
	var dir string
	err = session.Query(`SELECT value FROM system_views.system_properties WHERE name = 'cassandra.storagedir'`).Scan(&dir)
	return err == nil && dir == n.dir
}

// launch starts the process of a node, now or again.
func (c *cluster) launch(n *node) error {
	config := filepath.Join(n.dir, "cassandra.yaml")
	if err := os.WriteFile(config, []byte(c.config(n)), 0o600); err != nil {
		return err
	}
	out, err := os.OpenFile(n.log(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(c.javaHome, "bin", "java"), c.javaArgs(n, config)...)
	cmd.Env = append(os.Environ(), "CLASSPATH="+c.classpath)
	cmd.Dir, cmd.Stdout, cmd.Stderr = n.dir, out, out

	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.reaper.start(cmd); err != nil {
		return err
	}
	n.cmd, n.ended = cmd, make(chan struct{})
	go func() {
		c.reaper.wait(cmd)
		close(n.ended)
	}()
	return c.writePids()
}

// config fills in cassandra.yaml.
func (c *cluster) config(n *node) string {
	authenticator := "AllowAllAuthenticator"
	if c.auth {
		authenticator = "PasswordAuthenticator"
	}
	return strings.NewReplacer(
		"${ADDRESS}", n.address,
		"${ANNOUNCED}", cmp.Or(c.announce, n.address),
		"${AUTHENTICATOR}", authenticator,
		"${CQL_PORT}", fmt.Sprint(c.cqlPort),
		"${SEED}", fmt.Sprintf("%s:%d", c.nodes[0].address, c.storagePort),
		"${STORAGE_PORT}", fmt.Sprint(c.storagePort),
	).Replace(yaml)
}

func (c *cluster) javaArgs(n *node, config string) []string {
	heap := "512M"
	timing := []string{"-Dcassandra.ring_delay_ms=5000"}
	if c.options.nodes == 1 { // there is nobody to wait for
		heap = "1G"
		timing = []string{"-Dcassandra.ring_delay_ms=100", "-Dcassandra.skip_wait_for_gossip_to_settle=0"}
	}
	args := append(timing,
		"-Dcassandra-foreground=yes",
		"-Dcassandra.config="+(&url.URL{Scheme: "file", Path: config}).String(),
		"-Dcassandra.storagedir="+n.dir,
		"-Dcassandra.commitlog.ignorereplayerrors=true", // a SIGKILL can tear what was not acknowledged yet
		"-Dcassandra.superuser_setup_delay_ms=0",
		"-Dcassandra.shutdown_announce_in_ms=0",
		"-Dorg.slf4j.simpleLogger.showDateTime=true",
		"-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
		"-Djdk.attach.allowAttachSelf=true",
		"-Djava.security.manager=allow", // for Java 21
		"-Djava.io.tmpdir="+n.dir,       // a killed node can't remove the libraries it unpacked there
		"-Djna.tmpdir="+n.dir,
		"-XX:+PerfDisableSharedMem",
		"-XX:+ExitOnOutOfMemoryError",
		"-Xmx"+cmp.Or(os.Getenv("MAX_HEAP_SIZE"), heap))
	for _, name := range strings.Fields(javaExports) {
		args = append(args, "--add-exports="+name+"=ALL-UNNAMED")
	}
	for _, name := range strings.Fields(javaOpens) {
		args = append(args, "--add-opens="+name+"=ALL-UNNAMED")
	}
	return append(args, "org.apache.cassandra.service.CassandraDaemon")
}

// writePids replaces the file at once, so that nobody reads half of it.
func (c *cluster) writePids() error {
	if c.pidFile == "" {
		return nil
	}
	var pids bytes.Buffer
	for _, n := range c.nodes {
		if n.cmd != nil {
			fmt.Fprintln(&pids, n.cmd.Process.Pid)
		}
	}
	if err := os.WriteFile(c.pidFile+".new", pids.Bytes(), 0o644); err != nil {
		return err
	}
	return os.Rename(c.pidFile+".new", c.pidFile)
}

func (n *node) log() string { return filepath.Join(n.dir, "system.log") }

// lastWords returns the end of the node's log, without stack traces.
func (n *node) lastWords() string {
	text, _ := os.ReadFile(n.log())
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(text)), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "\tat ") || strings.HasPrefix(line, "\t... ")
	})
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// resolve finds Java, and the jars of Cassandra: Maven is asked for them once, as long as they stay where it put them.
func (c *cluster) resolve() (err error) {
	c.javaHome, err = find("Java 17 or 21", javaHome, "openjdk-17-jre-headless", "openjdk-21-jre-headless")
	if err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	cache = filepath.Join(cache, fmt.Sprintf("cassandra-launcher-%x", sha256.Sum256(pom)))
	if c.classpath = readClasspath(cache); c.classpath != "" {
		return nil
	}
	mvn, err := find("Maven", maven, "maven")
	if err != nil {
		return err
	}
	say("resolving Cassandra with Maven; the first time takes a minute")
	if err := c.askMaven(mvn, cache); err != nil {
		return err
	}
	if c.classpath = readClasspath(cache); c.classpath == "" {
		return errors.New("mvn gave no complete classpath")
	}
	return nil
}

// readClasspath returns "" unless all the jars are there.
func readClasspath(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for _, jar := range filepath.SplitList(string(text)) {
		if _, err := os.Stat(jar); err != nil {
			return ""
		}
	}
	return string(text)
}

// askMaven leaves the classpath in file.
func (c *cluster) askMaven(mvn, file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(file), "maven-")
	if err != nil {
		return err
	}
	c.reaper.tell("remove", work)
	project, result := filepath.Join(work, "pom.xml"), filepath.Join(work, "classpath")
	if err := os.WriteFile(project, pom, 0o600); err != nil {
		return err
	}
	var out bytes.Buffer
	cmd := exec.Command(mvn, "-B", "-q", "-f", project, "dependency:build-classpath", "-Dmdep.outputFile="+result)
	cmd.Env = append(os.Environ(), "JAVA_HOME="+c.javaHome)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := c.reaper.start(cmd); err != nil {
		return err
	}
	if err := c.reaper.wait(cmd); err != nil {
		return fmt.Errorf("mvn failed: %w\n%s", err, strings.TrimSpace(out.String()))
	}
	return os.Rename(result, file)
}

// find looks for what is needed, and installs one of the packages if it is nowhere.
func find(what string, look func() string, packages ...string) (string, error) {
	if path := look(); path != "" {
		return path, nil
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return "", fmt.Errorf("%s was not found.\n%s", what, howToInstall)
	}
	say("%s was not found; installing it with apt-get", what)
	said, _ := exec.Command(apt, "update").CombinedOutput()
	for _, name := range packages { // until one is in this release
		cmd := exec.Command(apt, "install", "-y", "--no-install-recommends", name)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		out, err := cmd.CombinedOutput()
		if err == nil {
			break
		}
		said = append(said, out...)
	}
	if path := look(); path != "" {
		return path, nil
	}
	return "", fmt.Errorf("apt-get failed:\n%s\n%s", said, howToInstall)
}

// javaHome returns the home of the first Java that can run Cassandra, or "". The java on the PATH is often another.
func javaHome() string {
	dirs := append([]string{filepath.Join(os.Getenv("JAVA_HOME"), "bin")}, filepath.SplitList(os.Getenv("PATH"))...)
	for _, pattern := range javaFolders {
		found, _ := filepath.Glob(os.ExpandEnv(pattern))
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		if !filepath.IsAbs(dir) {
			continue // an empty JAVA_HOME, and what could be anything in this folder
		}
		out, err := exec.Command(filepath.Join(dir, "java"), "-XshowSettings:properties", "-version").CombinedOutput()
		home := javaHomeLine.FindSubmatch(out)
		if err == nil && home != nil && javaVersionLine.Match(out) {
			return string(home[1])
		}
	}
	return ""
}

func maven() string {
	mvn, _ := exec.LookPath("mvn")
	return mvn
}

// reaper ends what the launcher started, however the launcher itself ends. It is this program once more, reading from a
// pipe that the kernel closes when the launcher is gone, in a session that no signal to the launcher's group reaches.
type reaper struct {
	cmd    *exec.Cmd
	pipe   io.WriteCloser
	closed atomic.Bool
}

const reaperName = "cassandra-reaper"

func startReaper() (*reaper, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r := &reaper{cmd: exec.Command(exe)}
	r.cmd.Args = []string{reaperName}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if r.pipe, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return r, r.cmd.Start()
}

// start starts cmd in a process group that the reaper will end. Until the reaper knows of it, it is a shell that waits
// for a line: a launcher killed in between would leave it behind.
func (r *reaper) start(cmd *exec.Cmd) error {
	if cmd.Err != nil { // there is no such command
		return cmd.Err
	}
	hold, release, err := os.Pipe()
	if err != nil {
		return err
	}
	defer release.Close()
	defer hold.Close()
	cmd.Args = append([]string{"sh", "-c", `read -r line <&3 && exec "$@" 3<&-`, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.ExtraFiles = []*os.File{hold} // is 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := r.tell("end", cmd.Process.Pid); err != nil { // closed meanwhile, and the shell ends with release
		go cmd.Wait()
		return err
	}
	_, err = fmt.Fprintln(release, "go")
	return err
}

// wait waits for a process that leaves no other behind in its group.
func (r *reaper) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.tell("forget", cmd.Process.Pid)
	return err
}

// tell has the reaper note what there is to end, or to forget as it has ended, or to remove.
func (r *reaper) tell(verb string, what any) error {
	_, err := fmt.Fprintln(r.pipe, verb, what)
	return err
}

// close returns when everything has ended.
func (r *reaper) close() {
	r.closed.Store(true)
	r.pipe.Close()
	r.cmd.Wait()
}

// reap is the life of the reaper.
func reap(orders io.Reader) {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	groups, paths := map[int]bool{}, []string{}
	for lines := bufio.NewScanner(orders); lines.Scan(); {
		verb, what, _ := strings.Cut(lines.Text(), " ")
		pid, _ := strconv.Atoi(what)
		switch verb {
		case "end":
			groups[pid] = true
		case "forget":
			delete(groups, pid)
		case "remove":
			paths = append(paths, what)
		}
	}
	var ending sync.WaitGroup
	for group := range groups {
		ending.Go(func() { endGroup(group) })
	}
	ending.Wait()
	for _, path := range paths {
		os.RemoveAll(path)
	}
}

// endGroup asks a process group to end, and then makes it end.
func endGroup(group int) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		syscall.Kill(-group, sig)
		syscall.Kill(-group, syscall.SIGCONT) // a stopped process would not hear of it
		for deadline := time.Now().Add(stopTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if syscall.Kill(-group, 0) != nil {
				return
			}
		}
	}
}

// say reports on standard error: standard output is COMMAND's.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "cassandra: "+format+"\n", args...)
}
