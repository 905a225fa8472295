package e2e

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	post   = "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
	http11 = "Streams need HTTP/1.1; for nginx set proxy_http_version 1.1"
)

// Each client sends a space every 0.2 s until the service closes the connection.
func TestSlowAndHugeRequests(t *testing.T) {
	t.Parallel()
	s := startHealthy(t, useCrowd(t))
	for _, tt := range []struct {
		seconds             time.Duration
		name, request, want string
	}{
		{10, "slow header", "GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ", "^$|^HTTP/1.1 408 "},
		{1, "huge header", "GET / HTTP/1.1\r\nHost: a\r\nX-Huge: " + strings.Repeat("x", 16<<10) + "\r\n\r\n", " 431 "},
		{1, "slow body", post + "X-Request-Timeout: 1\r\nContent-Length: 50\r\n\r\n", "(?s) 408 .*The body did not arrive in time"},
		{1, "any target", "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nX-Request-Timeout: 1\r\nContent-Length: 50\r\n\r\n", " 408 "},
		{1, "HTTP/1.0", "GET /users/stream HTTP/1.0\r\nHost: localhost\r\n\r\n", "(?s) 426 .*Upgrade: HTTP/1.1\r\n.*" + http11},
		{1, "pages over HTTP/1.0", "GET /users/stream/pages HTTP/1.0\r\nHost: localhost\r\n\r\n", " 200 OK"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn, began := s.dial(t, tt.request, 0), time.Now()
			conn.SetDeadline(began.Add((3*tt.seconds + 1) * time.Second))
			go func() {
				for err := error(nil); err == nil; _, err = io.WriteString(conn, " ") {
					time.Sleep(200 * time.Millisecond)
				}
			}()
			got, _ := io.ReadAll(conn)
			took, ok := time.Since(began), regexp.MustCompile(tt.want).Match(got)
			check(t, ok && took <= 3*tt.seconds*time.Second, "response %q after %s, want %q within %d s", got, took, tt.want, tt.seconds)
		})
	}
}

// wantHealthy checks that /health responds while do runs. A few probes may be slow, since the clients keep the machine busy.
func (s *service) wantHealthy(t *testing.T, do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	for probes, healthy := 1, 0; ; probes++ {
		r := s.do("GET /health", "")
		if r.status == 200 && r.took < 2*time.Second {
			healthy++
		}
		select {
		case <-done:
			check(t, 2*healthy > probes, "%d of %d probes are 200 within 2 s, want most of them", healthy, probes)
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestMemoryInProportionToRequests(t *testing.T) {
	var members strings.Builder
	for i := 0; members.Len() < 1<<20-100; i++ {
		fmt.Fprintf(&members, `"%x":1,`, i)
	}
	hostile := "{" + members.String() + `"age":1}`
	s := startCommand(t, exec.Command(buildPlain()), useCrowd(t), "MAX_IN_FLIGHT=200")
	s.awaitHealthy(t, 15*time.Second)
	times := func(clients int, do func()) func() { return func() { concurrently(clients, func(int) { do() }) } }
	allowed := []int{422, 503}
	attacks := map[string]func(){
		"unknown members": times(60, func() {
			r := s.do("POST /users", hostile)
			check(t, slices.Contains(allowed, r.status) && len(r.body) <= 64<<10, "%s; want a small %v", r, allowed)
		}),
		"bodies with GET": times(400, func() { s.do("GET "+missingUser, hostile) }),
		"bodies that never end": times(4000, func() {
			s.dial(t, fmt.Sprintf("%sX-Request-Timeout: 2\r\nContent-Length: 63000\r\n\r\n%62999s", post, ""), 1<<20)
		}),
		"readers that read nothing": times(160, func() {
			conn := s.dial(t, rawGet("/users/stream/pages?fetch_size=5000"), 1)
			time.Sleep(2 * time.Second)
			conn.Close()
		}),
	}
	all := slices.Collect(maps.Values(attacks))
	attacks["all at once"] = func() {
		allowed = []int{0, 422, 503} // a refused client may still be writing when its connection is closed
		concurrently(len(all), func(i int) { all[i]() })
		allowed = []int{422, 503}
	}
	for name, attack := range attacks {
		t.Run(name, func(t *testing.T) {
			s.wantHealthy(t, attack)
			s.wantMemory(t, 300)
		})
	}
}

func TestBehindNginx(t *testing.T) {
	t.Parallel()
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("needs nginx; on Debian and Ubuntu: apt-get install nginx-light")
	}
	s, proxy := startBehindProxy(t, useCrowd(t), "SHUTDOWN_ENDPOINT=off")
	dir, first, second := t.TempDir(), closedAddress(), closedAddress()
	config := fmt.Sprintf(`daemon off; master_process off; pid pid; error_log stderr; events {}
		http {
			access_log off; client_body_temp_path 1; proxy_temp_path 2; fastcgi_temp_path 3; uwsgi_temp_path 4; scgi_temp_path 5;
			server { listen %s; location / { proxy_pass %s; } }
			server { listen %s; location / { proxy_pass %[2]s; proxy_http_version 1.1; } }
		}`, first, s.url, second)
	cmd := exec.Command(nginx, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	must(t, cmp.Or(os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(config), 0o600), cmd.Start()))
	defer cmd.Process.Kill()
	byDefault, by11 := &service{url: "http://" + first}, &service{url: "http://" + second}
	await(t, 10*time.Second, "reachable through nginx", func() bool { return by11.do("GET /", "").status == 200 })
	want(t, byDefault.do("GET /users/stream", ""), 426, http11)
	users, _ := byDefault.pages(t, "fetch_size=5000")
	wantSeeded(t, users, crowdSize, 0)
	wantSeeded(t, by11.stream(t, ""), crowdSize, 0)
	want(t, byDefault.do("POST /shutdown", ""), 403, "turned off; see SHUTDOWN_ENDPOINT")
	wantAborted(t, by11, proxy, "application/json")
}
