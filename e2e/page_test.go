package e2e

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

var picture = flag.String("picture", "", "write a picture of the live panel during an outage to this file")

// browser is a headless Chromium with one page, driven by the DevTools protocol over pipes: JSON messages that end in a zero byte.
type browser struct {
	t        *testing.T
	commands *os.File
	pipe     *os.File // of the results and events
	messages *bufio.Reader
	session  any // the page's; nil is the browser's
	calls    int
	failures []string // uncaught errors, and violations of the Content-Security-Policy
	picture  string   // the file to write, if any
}

// startBrowser skips the test if there is no Chromium.
func startBrowser(t *testing.T) *browser {
	program, err := exec.LookPath("google-chrome")
	for _, name := range []string{"chromium", "chromium-browser"} {
		if err != nil {
			program, err = exec.LookPath(name)
		}
	}
	if err != nil {
		t.Skip("no browser: install chromium or google-chrome")
	}
	profile, _ := os.MkdirTemp(binaries, "")
	cmd := exec.CommandContext(t.Context(), program, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
		"--remote-debugging-pipe", "--user-data-dir="+profile)
	input, commands, _ := os.Pipe()
	pipe, output, _ := os.Pipe()
	cmd.ExtraFiles = []*os.File{input, output} // 3 and 4
	must(t, cmd.Start())
	input.Close()
	output.Close()
	b := &browser{t: t, commands: commands, pipe: pipe, messages: bufio.NewReader(pipe)}
	t.Cleanup(func() {
		cmd.Wait()
		check(t, b.failures == nil, "errors of the page: %s", b.failures)
	})
	target := b.call("Target.createTarget", object{"url": "about:blank"})["targetId"]
	b.session = b.call("Target.attachToTarget", object{"targetId": target, "flatten": true})["sessionId"]
	b.call("Runtime.enable", nil)
	b.call("Log.enable", nil)
	return b
}

func (b *browser) call(method string, params object) object {
	b.t.Helper()
	b.calls++
	command := object{"id": b.calls, "method": method, "params": params, "sessionId": b.session}
	maps.DeleteFunc(command, func(_ string, value any) bool { return value == nil })
	text, _ := json.Marshal(command)
	b.commands.Write(append(text, 0))
	b.pipe.SetReadDeadline(time.Now().Add(2 * time.Minute))
	for {
		line, err := b.messages.ReadBytes(0)
		var m object
		if err != nil || json.Unmarshal(line[:len(line)-1], &m) != nil || m["error"] != nil {
			b.t.Fatalf("%.500s: %v, %v", text, err, m)
		}
		if m["method"] == "Runtime.exceptionThrown" || at[string](m, "params", "entry", "source") == "security" {
			b.failures = append(b.failures, fmt.Sprint(m["params"]))
		}
		if m["id"] == float64(b.calls) {
			return at[object](m, "result")
		}
	}
}

// eval returns the value of a JavaScript expression or of its promise.
func (b *browser) eval(expression string) any {
	b.t.Helper()
	result := b.call("Runtime.evaluate", object{"expression": expression, "awaitPromise": true, "returnByValue": true})
	check(b.t, result["exceptionDetails"] == nil, "%.300s: %v", expression, result)
	return at[any](result, "result", "value")
}

// await waits until a JavaScript condition is true.
func (b *browser) await(condition string) {
	b.t.Helper()
	b.eval("new Promise(done => { const check = () => " + condition + " ? done() : setTimeout(check, 50); check() })")
}

func (b *browser) click(selector string) {
	b.eval(fmt.Sprintf("document.querySelector(%q).click()", selector))
}

// awaitText waits until the text of an element matches a JavaScript regular expression.
func (b *browser) awaitText(selector, pattern string) {
	b.t.Helper()
	b.await(fmt.Sprintf("new RegExp(%q).test(document.querySelector(%q)?.textContent)", pattern, selector))
}

func (b *browser) show(width int, scheme string) {
	b.call("Emulation.setDeviceMetricsOverride", object{"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": false})
	b.call("Emulation.setEmulatedMedia", object{"features": []object{{"name": "prefers-color-scheme", "value": scheme}}})
}

// open opens the address that a newcomer types, which leads to the page.
func (b *browser) open(s *service) {
	b.show(1280, "light")
	b.call("Page.navigate", object{"url": s.url})
	b.await("location.pathname === '/docs' && document.querySelector('#errors')")
}

func TestPage(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	s, proxy := startBehindProxy(t)
	seed(t, admin, s.keyspace, 10_000)
	b.open(s)
	b.click("#create")
	b.awaitText("#postUser output", "^201 Created$")
	b.click("#getUser [type=submit]") // the new id is in its form
	b.awaitText("#getUser output", "^200 OK$")
	b.eval(`document.querySelector('#postUser textarea').value = '{"name":"Ada","email":"ada@example.com","age":151}'`)
	b.click("#postUser [type=submit]")
	b.awaitText("#postUser textarea[aria-invalid=true] ~ .fault", "^/age must be a whole number from 0 to 150$")
	b.click("#stream") // ten thousand pages
	b.awaitText("#streamUsers .counter", "[1-9][0-9]+ rows .* rows/s")
	b.click("#halt")
	b.awaitText("#streamUsers output", "^Stopped by you after [0-9,]+ rows$")
	await(t, 10*time.Second, "ending the stream", func() bool { return s.metrics(t).Streams == 0 })
	b.watchOutage(func() { proxy.credit.Store(0) }, proxy.cut)
	t.Run("accessibility", b.wantAccessible)
	silent := b.eval("stateOf({ cassandra: { connected: true, hosts: 3, hosts_silent: 1 } })[1]")
	check(t, silent == "Connected to Cassandra (silent hosts: 1 of 3)", "state of a silent host: %v", silent)
	active := s.slowQuery(t)
	s.Process.Signal(syscall.SIGTERM)
	b.awaitText("#state.warn", "^Draining: active requests finish, new ones get 503$")
	want(t, <-active, 200)
	b.awaitText("#state.bad", "^The service does not respond$")
}

// watchOutage follows an outage of Cassandra under load in the live panel.
func (b *browser) watchOutage(fail, mend func()) {
	b.awaitText("#state", `^Connected to Cassandra \(session 1\)$`)
	b.click("#reads")
	b.click("#streams")
	for tile := range 6 {
		b.awaitText(fmt.Sprintf("figure:nth-child(%d) strong", tile+1), "[1-9]")
	}
	b.awaitPicture()
	fail()
	b.awaitText("#state.bad", "^No connection to Cassandra; the service is reconnecting$")
	b.awaitText("figure .bad", "failures$")
	mend()
	b.awaitText("#state.good", `^Connected to Cassandra \(session [2-9]\)$`)
	b.awaitText("figure:nth-child(2) strong", "[1-9]")
	b.awaitText("#changes", `session [2-9]\) after [0-9]+ s.*No connection.* after [0-9]+ s.*session 1\)$`)
	outage := b.eval("document.querySelector('#tiles .outage').getAttribute('d')").(string)
	check(b.t, strings.HasPrefix(outage, "M"), "the outage is not in the chart: %q", outage)
	b.awaitPicture()
	b.click("#reads")
	b.click("#streams")
}

// awaitPicture waits until the last 20 samples have one state, and writes the picture. Without a file it does nothing.
func (b *browser) awaitPicture() {
	if b.picture == "" {
		return
	}
	b.await("samples.length > 20 && new Set(samples.slice(-20).map(s => s.connected)).size === 1")
	clip := b.eval("(({ x, y, width, height }) => ({ x: x - 24, y, width: width + 48, height, scale: 2 }))(live.getBoundingClientRect())")
	shot := b.call("Page.captureScreenshot", object{"clip": clip, "captureBeyondViewport": true})
	png, _ := base64.StdEncoding.DecodeString(at[string](shot, "data"))
	must(b.t, os.WriteFile(b.picture, png, 0o644))
}

// wantAccessible checks the page with axe-core, everything unfolded, on a phone and a desktop, light and dark.
func (b *browser) wantAccessible(t *testing.T) {
	npm := exec.Command("npm", "pack", "--fetch-retries=0", "axe-core@4")
	npm.Dir = t.TempDir()
	if out, err := npm.CombinedOutput(); err != nil {
		t.Skipf("axe-core cannot be downloaded: %v\n%s", err, out)
	}
	script, _ := exec.Command("sh", "-c", "tar -xzOf "+npm.Dir+"/axe-core-*.tgz package/axe.min.js").Output()
	b.eval(string(script) + "; document.querySelectorAll('details').forEach(folded => { folded.open = true })")
	for _, width := range []int{390, 1280} {
		for _, scheme := range []string{"light", "dark"} {
			b.show(width, scheme)
			found := b.eval("axe.run().then(found => JSON.stringify(found.violations.map(v => [v.help, v.nodes[0].html])))")
			check(t, found == "[]", "%d px, %s: %s", width, scheme, found)
		}
		wide := b.eval("document.documentElement.scrollWidth")
		check(t, wide == float64(width), "the page is %v px wide, the window %d", wide, width)
	}
}

func TestPageWhileCassandraIsKilled(t *testing.T) {
	if *picture == "" {
		needsLong(t)
	}
	b := startBrowser(t)
	b.picture = *picture
	n := startNode(t, "-restart", "3s")
	s := startHealthy(t, cassandraAt(n.addr)...)
	seed(t, n.awaitResponse(t, "127.0.0.1"), s.keyspace, 20_000)
	b.open(s)
	b.watchOutage(func() { n.signal(t, "KILL", 1) }, func() {})
}
