// These tests run the launcher as its users do. By default they need neither Java nor Cassandra: CASSANDRA_HOSTS is set,
// or shell scripts replace java and mvn. With -long they start real nodes.

package main

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
)

var long = flag.Bool("long", false, "also run tests that take minutes")
var binary string // the launcher, built by TestMain

func TestMain(m *testing.M) {
	dir, err1 := os.MkdirTemp("", "launcher-test-")
	defer os.RemoveAll(dir)
	binary = dir + "/cassandra"
	build := exec.Command("go", "build", "-o", binary)
	if info, ok := debug.ReadBuildInfo(); ok && strings.Contains(fmt.Sprint(info.Settings), "{-race true}") {
		build.Args = append(build.Args, "-race")
	}
	out, err2 := build.CombinedOutput()
	if err := errors.Join(err1, err2); err != nil {
		log.Fatalf("%v\n%s", err, out)
	}
	m.Run()
}

// launch returns a launcher, not yet started, for an existing Cassandra. Its temporary folder must be empty at the end.
func launch(t *testing.T, args ...string) *exec.Cmd {
	tmp := t.TempDir()
	t.Cleanup(func() {
		if left, _ := os.ReadDir(tmp); len(left) > 0 {
			t.Errorf("the launcher left %v", left)
		}
	})
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "CASSANDRA_HOSTS=192.0.2.1", "TMPDIR="+tmp, "GORACE=atexit_sleep_ms=0")
	return cmd
}

func must(t *testing.T, errs ...error) {
	if t.Helper(); errors.Join(errs...) != nil {
		t.Fatal(errors.Join(errs...))
	}
}

// await starts cmd and returns its standard output after the line "ready". Nobody reads its standard error, as when
// Ctrl-C also ends the tee of `2>&1 | tee log`.
func await(t *testing.T, cmd *exec.Cmd) io.Reader {
	t.Helper()
	out, err1 := cmd.StdoutPipe()
	reader, stderr, err2 := os.Pipe()
	reader.Close()
	cmd.Stderr = stderr
	must(t, err1, err2, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	line := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, line); string(line) != "ready\n" {
		t.Fatalf("output = %q (%v), want ready", line, err)
	}
	return out
}

// finish checks the exit status and the rest of the output, which ends with the last process that can write to it.
func finish(t *testing.T, cmd *exec.Cmd, out io.Reader, wantStatus int, wantOut string) {
	t.Helper()
	rest, _ := io.ReadAll(out) // before Wait, which closes the pipe
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != wantStatus || string(rest) != wantOut {
		t.Errorf("status = %d, output = %q, want %d, %q", got, rest, wantStatus, wantOut)
	}
}

func TestStatus(t *testing.T) {
	for _, tt := range []struct {
		name    string
		args    []string
		want    int
		wantOut string
	}{
		{"of COMMAND", []string{"sh", "-c", "exit 7"}, 7, ""}, {"signal", []string{"sh", "-c", "kill -9 $$"}, 137, ""},
		{"SIGPIPE", []string{"sh", "-c", "kill -PIPE $$"}, 141, ""},
		{"missing COMMAND", []string{"/nowhere/at/all"}, 127, ""}, {"no COMMAND", nil, 0, ""},
		{"piped input", []string{"cat"}, 0, "hello"},
		{"CASSANDRA_HOSTS", []string{"sh", "-c", "echo $CASSANDRA_HOSTS"}, 0, "192.0.2.1\n"},
		{"flags of COMMAND", []string{"echo", "-nodes", "3"}, 0, "-nodes 3\n"},
		{"invalid -nodes", []string{"-nodes", "0", "true"}, 2, ""}, {"invalid -port", []string{"-port", "65536", "true"}, 2, ""},
		{"invalid -rpc-address", []string{"-rpc-address", "example", "true"}, 2, ""},
		{"unknown flag", []string{"-x"}, 2, ""}, {"help", []string{"-h"}, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := launch(t, tt.args...)
			cmd.Stdin = strings.NewReader("hello")
			out, _ := cmd.Output()
			finish(t, cmd, strings.NewReader(string(out)), tt.want, tt.wantOut)
		})
	}
}

func TestSignals(t *testing.T) {
	const loop = "; exec 2> /dev/null; echo ready; i=0; while [ $i -lt 10 ]; do sleep 0.1; i=$((i+1)); done; exit 9"
	for _, tt := range []struct {
		name, script, wantOut string
		signal                syscall.Signal
		want                  int
	}{
		{"SIGINT is forwarded once", "trap 'echo signal' INT" + loop, "signal\n", syscall.SIGINT, 9},
		{"SIGTERM is forwarded once", "trap 'echo signal' TERM" + loop, "signal\n", syscall.SIGTERM, 9},
		{"SIGHUP is forwarded once", "trap 'echo signal' HUP" + loop, "signal\n", syscall.SIGHUP, 9},
		{"child of go run drains", "(trap 'sleep 0.5; echo drained; exit' TERM" + loop + ") & wait", "drained\n", syscall.SIGTERM, 143},
		{"launcher killed", "trap 'echo asked; exit' TERM" + loop, "asked\n", syscall.SIGKILL, -1},
		{"parent killed", "trap 'echo asked; exit' TERM" + loop, "asked\n", syscall.SIGKILL, -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cmd := launch(t, "sh", "-c", tt.script)
			if tt.name == "parent killed" {
				cmd.Path, cmd.Args = "/bin/sh", append([]string{"sh", "-c", `"$@" & wait`, "sh"}, cmd.Args...)
			}
			out := await(t, cmd)
			cmd.Process.Signal(tt.signal)
			finish(t, cmd, out, tt.want, tt.wantOut)
		})
	}
}

func TestForeignPIDFile(t *testing.T) {
	dir := t.TempDir()
	foreign := dir + "/foreign"
	must(t, os.WriteFile(foreign, []byte("12\nprecious\n"), 0o644), os.Symlink("pids", dir+"/link"))
	for _, name := range []string{dir, foreign, dir + "/link", os.DevNull} {
		cmd := launch(t, "-pid", name, "-data", dir+"/data", "true")
		out, _ := cmd.CombinedOutput()
		finish(t, cmd, strings.NewReader(string(out)), 2, fmt.Sprintf("cassandra: invalid -pid %q; it exists and is not a list of PIDs\n", name))
	}
	if files, _ := os.ReadDir(dir); len(files) != 2 || read(foreign) != "12\nprecious\n" {
		t.Errorf("the launcher touched %v, %q", files, read(foreign))
	}
}

func read(file string) string {
	text, _ := os.ReadFile(file)
	return string(text)
}

// fake returns a private launcher with scripts as java and mvn in dir/bin. Each records its PID and surroundings, then runs a snippet.
func fake(t *testing.T, node, maven string, args ...string) (cmd *exec.Cmd, dir string) {
	dir = t.TempDir()
	java := `#!/bin/sh
		case $* in *-version) printf ' java.home = %s\n java.specification.version = 17\n' "$JAVA_HOME"; exit;; esac
		cd "$JAVA_HOME"; echo $$ >> pids; echo "$CLASSPATH" > classpath; ` + node
	mvn := `#!/bin/sh
		echo $$ >> "$JAVA_HOME/pids"; echo $(ls -d .mvn) "${1%cassandra-*}" > "$JAVA_HOME/maven"; ` + maven + `
		printf %s "$JAVA_HOME/bin/java" > classpath`
	must(t, os.Mkdir(dir+"/bin", 0o755), os.WriteFile(dir+"/bin/java", []byte(java), 0o755),
		os.WriteFile(dir+"/bin/mvn", []byte(mvn), 0o755))
	cmd = launch(t, args...)
	cmd.Env = append(cmd.Env, "JAVA_HOME="+dir, "HOME="+dir, "XDG_CACHE_HOME=", "PATH="+dir+"/bin:"+os.Getenv("PATH"))
	t.Cleanup(func() { wantGone(t, read(dir+"/pids")) })
	return cmd, dir
}

func wantGone(t *testing.T, pids string) {
	t.Helper()
	for _, pid := range strings.Fields(pids) {
		if exec.Command("kill", "-0", pid).Run() == nil {
			t.Errorf("process %s is left", pid)
		}
	}
}

// startUntil starts cmd and waits until a script has written a file.
func startUntil(cmd *exec.Cmd, file string) {
	cmd.Start()
	for deadline := time.Now().Add(20 * time.Second); read(file) == "" && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
}

const stopSlow = "trap 'sleep 0.5; exit' TERM; echo > up; while :; do sleep 0.1; done"

func TestCtrlC(t *testing.T) {
	for _, tt := range []struct{ name, node, maven, file string }{
		{"resolving", "", "exec sleep 1000", "/maven"}, {"starting", "exec sleep 1000", "", "/classpath"},
		{"stopping", stopSlow, "", "/up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cmd, dir := fake(t, tt.node, tt.maven, "-auth", "true")
			startUntil(cmd, dir+tt.file)
			for range 3 {
				cmd.Process.Signal(syscall.SIGINT)
				time.Sleep(50 * time.Millisecond)
			}
			finish(t, cmd, strings.NewReader(""), 130, "")
		})
	}
}

func TestDataIsLocked(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	first, dir := fake(t, "until [ -s "+data+"/pids ]; do sleep 0.1; done; "+stopSlow, "", "-data", data, "-pid", data+"/pids")
	startUntil(first, dir+"/up")
	second, _ := fake(t, "", "", "-data", data, "-pid", data+"/pids")
	out, _ := second.CombinedOutput()
	want := "cassandra: " + data + "/lock is in use by another launcher: resource temporarily unavailable\n"
	finish(t, second, strings.NewReader(string(out)), 2, want)
	if got, want := read(data+"/pids"), read(dir+"/pids"); !strings.HasSuffix(want, "\n"+got) || got == "" {
		t.Errorf("PID file = %q, want the last of %q", got, want)
	}
	first.Process.Kill()
	first.Wait()
	awaitUnlock(t, data)
}

// awaitUnlock checks that a killed launcher's data is locked until its node has stopped, and its PID file is removed.
func awaitUnlock(t *testing.T, data string) {
	t.Helper()
	lock, err1 := os.Open(data + "/lock")
	err2 := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	err3 := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
	if lock.Close(); err1 != nil || err2 != syscall.EWOULDBLOCK || err3 != nil || read(data+"/pids") != "" {
		t.Errorf("locking = %v, %v, %v, PID file = %q", err1, err2, err3, read(data+"/pids"))
	}
}

func TestClasspathCache(t *testing.T) {
	t.Parallel()
	fakes, dir := fake(t, "exit 1", "", "-auth")
	tmp := t.TempDir()
	poison := fmt.Sprintf("%s/cassandra-classpath-%x", tmp, sha256.Sum256(pom)) // as another user may put it into /tmp
	must(t, os.WriteFile(poison, []byte("/etc/hostname\n"), 0o644))
	run := func(home string) (maven string) {
		os.Remove(dir + "/maven")
		cmd := exec.Command(binary, "-auth")
		cmd.Env = append(fakes.Env, "TMPDIR="+tmp, "HOME="+home)
		cmd.Run()
		finish(t, cmd, strings.NewReader(read(dir+"/classpath")), 1, dir+"/bin/java\n")
		return read(dir + "/maven")
	}
	// Without .mvn, Maven would search the parent folders for options.
	want := ".mvn -B\n" + ".mvn -Dmaven.repo.local=" + tmp + "/\n"
	got := run(dir) + run(dir) + run("") // the second run uses the cache
	if left, _ := os.ReadDir(tmp); got != want || len(left) != 1 {
		t.Errorf("mvn %q, want %q; the temporary folder has %v", got, want, left)
	}
}

// TestNode starts a real node, restarts it after SIGKILL, and starts another on the same data.
func TestNode(t *testing.T) {
	if !*long {
		t.Skip("needs -long")
	}
	data := t.TempDir()
	const restart = `first=$(cat "$0"); kill -9 $first
		i=0; while [ "$(cat "$0")" = $first ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done; kill -STOP $(cat "$0")`
	const script = `
		test "$CASSANDRA_HOSTS $CASSANDRA_USERNAME $CASSANDRA_PASSWORD" = "127.0.0.1 cassandra cassandra" || exit 1
		trap 'sleep 0.3; echo drained; exit 7' INT; trap 'echo asked; exit' TERM; exec 2> /dev/null
		echo ready; while :; do sleep 0.1; done`
	pids := data + "/pids"
	args := []string{"-data", data, "-pid", pids, "-restart", "1s", "-auth", "sh", "-c"}
	first := launch(t, append(args, restart+script, pids)...)
	out, node := await(t, first), read(pids)
	first.Process.Signal(syscall.SIGINT)
	finish(t, first, out, 7, "drained\n")
	wantGone(t, node)
	second := launch(t, append(args, script, pids)...)
	out, node = await(t, second), read(pids)
	second.Process.Kill()
	finish(t, second, out, -1, "asked\n")
	awaitUnlock(t, data)
	wantGone(t, node)
}
