package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	postHead = "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
	in1s     = "X-Request-Timeout: 1\r\n"
	cross    = "Sec-Fetch-Site: cross-site\r\n"
	chunks   = "Transfer-Encoding: chunked\r\n\r\n"
)

// Requests that end by their size, or that send a byte every 0.2 s and never end.
func TestSlowAndHugeRequests(t *testing.T) {
	t.Parallel()
	s := startHealthy(t, useCrowd(t))
	const late, large = "The body did not arrive in time", "The body is too large; the limit is 1048576 bytes"
	for _, tt := range []struct {
		name, request string
		within        time.Duration
		parts         []string
	}{
		{"slow header", "GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ", 10 * time.Second, nil},
		{"huge header", "GET / HTTP/1.1\r\nHost: a\r\nX-Huge: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", time.Second, []string{" 431 "}},
		{"slow body", postHead + in1s + "Content-Length: 50\r\n\r\n", time.Second, []string{" 408 ", late}},
		{"slow chunks", postHead + in1s + chunks + "32\r\n", time.Second, []string{" 408 ", late}},
		{"slow body of a refused request", postHead + cross + in1s + "Content-Length: 50\r\n\r\n", time.Second, []string{" 403 ", "Cross-origin"}},
		{"slow chunks of a refused request", postHead + cross + in1s + chunks + "32\r\n", time.Second, []string{" 403 ", "Cross-origin"}},
		{"slow body after a bad header", postHead + "X-Request-Timeout: x\r\nContent-Length: 999\r\n\r\n", 30 * time.Second, []string{" 422 ", "X-Request-Timeout"}},
		{"large body", postHead + "Content-Length: 1048577\r\n\r\n" + strings.Repeat(" ", 1<<20), time.Second, []string{" 413 ", large}},
		{"endless chunks", postHead + chunks + "ffffffff\r\n" + strings.Repeat(" ", 1<<20+1), time.Second, []string{" 413 ", large}},
		{"a stream over HTTP/1.0", "GET /users/stream HTTP/1.0\r\nHost: localhost\r\n\r\n", time.Second, []string{" 426 ", "\r\nUpgrade: HTTP/1.1\r\n", http11}},
		{"a page over HTTP/1.0", "GET /users/stream/pages?fetch_size=1 HTTP/1.0\r\nHost: localhost\r\n\r\n", time.Second, []string{" 200 OK\r\n"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn, began := s.dial(t, "", 0), time.Now()
			go func() {
				for _, err := io.WriteString(conn, tt.request); err == nil; _, err = io.WriteString(conn, " ") {
					time.Sleep(200 * time.Millisecond)
				}
			}()
			got, _ := io.ReadAll(conn)
			for _, part := range tt.parts {
				if !strings.Contains(string(got), part) {
					t.Errorf("response %q lacks %q", got, part)
				}
			}
			if took := time.Since(began); took > 3*tt.within {
				t.Errorf("closed after %s, want it within %s", took, tt.within)
			}
		})
	}
}

func TestAllowedHosts(t *testing.T) {
	t.Parallel()
	for settings, hosts := range map[string]struct{ allowed, refused []string }{
		"ADDR=127.0.0.1:0": {[]string{"localhost:8000", "[::1]:8000"}, []string{"evil.example", "localhost.evil.example"}},
		"ADDR=0.0.0.0:0":   {[]string{"evil.example"}, nil},
		"ALLOWED_HOSTS=users.example.com,127.0.0.1": {[]string{"users.example.com:80"}, []string{"evil.example", "localhost"}},
	} {
		s := start(t, useCrowd(t), settings)
		for _, host := range hosts.allowed {
			want(t, s.do("GET /docs", "", "Host: "+host), 200)
		}
		for _, host := range hosts.refused {
			want(t, s.do("GET /docs", "", "Host: "+host), 421, "Host not allowed; see ALLOWED_HOSTS")
		}
	}
}

// whileHealthy runs clients concurrently and checks that /health responds meanwhile, with one of the statuses.
func (s *service) whileHealthy(t *testing.T, clients int, do func(i int), statuses string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		concurrently(clients, do)
	}()
	for {
		if r := s.do("GET /health", ""); !strings.Contains(statuses, fmt.Sprint(r.status)) || r.took > 6*time.Second {
			t.Errorf("%s; want %s within 2 s", r, statuses)
		}
		select {
		case <-done:
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
	share := 4 // of the clients, without -long
	if *long {
		share = 1
	}
	for name, tt := range map[string]struct {
		clients int
		do      func(t *testing.T, s *service)
	}{
		"unknown members": {60, func(t *testing.T, s *service) {
			if r := s.do("POST /users", hostile); r.status != 422 && r.status != 503 || len(r.body) > 64<<10 {
				t.Errorf("%s; want a small 422 or 503, not %d bytes", r, len(r.body))
			}
		}},
		"bodies with GET": {400 / share, func(t *testing.T, s *service) { s.do("GET "+missingUser, hostile) }},
		"bodies that never end": {4000 / share, func(t *testing.T, s *service) {
			s.dial(t, fmt.Sprintf("%sX-Request-Timeout: 2\r\nContent-Length: 63000\r\n\r\n%62999s", postHead, ""), 1<<20)
		}},
		"readers that read nothing": {160, func(t *testing.T, s *service) {
			s.dial(t, rawGet("/users/stream/pages?fetch_size=5000"), 1)
			time.Sleep(2 * time.Second)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := startCommand(t, exec.Command(buildPlain()), useCrowd(t))
			s.awaitHealthy(t, 15*time.Second)
			s.whileHealthy(t, tt.clients, func(int) { tt.do(t, s) }, "200")
			s.wantMemory(t, 300)
		})
	}
}

func TestOverload(t *testing.T) {
	needsLong(t)
	s := startHealthy(t)
	before := s.metrics(t)
	var created, refused atomic.Int64
	s.whileHealthy(t, 2000, func(int) {
		for range 10 {
			if r := s.do("POST /users", ada); r.status == 201 {
				created.Add(1)
			} else if want(t, r, 503) {
				refused.Add(1)
			}
		}
	}, "200 503")
	if t.Logf("%d users created, %d requests refused", created.Load(), refused.Load()); created.Load() < 1000 {
		t.Errorf("%d users created, want at least 1000", created.Load())
	}
	s.awaitQuiet(t, before)
}

const http11 = "Streams need HTTP/1.1; for nginx set proxy_http_version 1.1"

func TestBehindNginx(t *testing.T) {
	t.Parallel()
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("needs nginx; on Debian and Ubuntu: apt-get install nginx-light")
	}
	s, proxy := startBehindProxy(t, useCrowd(t), "SHUTDOWN_ENDPOINT=off")
	dir, first, second := t.TempDir(), closedAddress(t), closedAddress(t)
	config := fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log stderr;
		events {}
		http {
			access_log off; client_body_temp_path %[1]s/1; proxy_temp_path %[1]s/2;
			fastcgi_temp_path %[1]s/3; uwsgi_temp_path %[1]s/4; scgi_temp_path %[1]s/5;
			server { listen %[2]s; location / { proxy_pass %[4]s; } }
			server { listen %[3]s; location / { proxy_pass %[4]s; proxy_http_version 1.1; } }
		}`, dir, first, second, s.url)
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(nginx, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	byDefault, by11 := &service{url: "http://" + first}, &service{url: "http://" + second}
	await(t, 10*time.Second, "reachable through nginx", func() bool { return by11.do("GET /", "").status == 200 })
	want(t, byDefault.do("GET /users/stream", ""), 426, http11)
	users, _ := byDefault.pages(t, "fetch_size=5000")
	wantSeeded(t, users, crowdSize, 0)
	wantSeeded(t, by11.stream(t, ""), crowdSize, 0)
	for _, n := range []*service{byDefault, by11} {
		want(t, n.do("POST /shutdown", ""), 403, "POST /shutdown is turned off; see SHUTDOWN_ENDPOINT")
	}
	wantAborted(t, by11, proxy, "application/json")
}
