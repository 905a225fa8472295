package e2e

import (
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// slowQuery starts a request that lasts 5 s and returns the channel of its response.
func (s *service) slowQuery(t *testing.T) <-chan response {
	done := make(chan response, 1)
	go func() { done <- s.do("GET /slow_query", "") }()
	s.awaitInFlight(t, 1)
	return done
}

func TestDrainUnderLoad(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, 0} { // 0: POST /shutdown
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			s := startHealthy(t)
			active := s.slowQuery(t)
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() {
					r := s.do("POST /users", ada)
					for r.status == 201 {
						r = s.do("POST /users", ada)
					}
					want(t, r, 503, "draining")
				})
			}
			await(t, 10*time.Second, "creating users", func() bool { return s.metrics(t).ByRoute["POST /users"]["201"] > 20 })
			if sig != 0 {
				s.Process.Signal(sig)
			} else {
				want(t, s.do("POST /shutdown", ""), 200, `{"message":"Shutdown initiated"}`+"\n")
			}
			clients.Wait()
			s.wantDraining(t)
			want(t, <-active, 200, "Slow query completed")
			s.wantExit(t, 0, 3*time.Second)
			_, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			check(t, err != nil, "the listener is still open")
		})
	}
}

// wantDraining checks the responses of a service that drains with an active request.
func (s *service) wantDraining(t *testing.T) {
	want(t, s.do("GET /health", ""), 503, `"status":"draining"`, `"cassandra":"connected"`, `"cassandra_connected":true`, s.keyspace)
	want(t, s.do("GET /", ""), 200)
	want(t, s.do("GET /metrics", ""), 200)
	for _, request := range []string{"GET /users", "POST /users", "GET /users/stream", "GET /docs", "GET /nothing", "POST /shutdown"} {
		r := s.do(request, "")
		want(t, r, 503, "The service is draining; send the request to another instance")
		check(t, r.header.Get("Connection") == "close", "%s; want Connection: close", r)
	}
}

func TestDrainDelayAndSecondSignal(t *testing.T) {
	t.Parallel()
	s := start(t, useCrowd(t), "DRAIN_DELAY=1s")
	began := time.Now()
	s.Process.Signal(syscall.SIGTERM)
	s.wantExit(t, 0, 6*time.Second)
	check(t, time.Since(began) >= time.Second, "exited after %s without an active request, want at least 1s", time.Since(began))
	s = start(t, useCrowd(t), "DRAIN_DELAY=20s", "LOG_FORMAT=json")
	s.Process.Signal(syscall.SIGTERM)
	await(t, 5*time.Second, "draining", func() bool { return strings.Contains(s.log(), `"level":"INFO","msg":"draining","active":0`) })
	s.Process.Signal(syscall.SIGTERM)
	s.wantExit(t, -1, 3*time.Second)
}

func TestShutdownTimeoutAbortsStreams(t *testing.T) {
	t.Parallel()
	s := startHealthy(t, useCrowd(t), "SHUTDOWN_TIMEOUT=1s")
	active := s.slowQuery(t)
	conn := s.dial(t, rawGet("/users/stream?fetch_size=200"), 1000)
	began := time.Now()
	s.Process.Signal(syscall.SIGTERM)
	s.wantExit(t, 0, 6*time.Second) // a write to a client that has stopped reading would last 30 s
	check(t, time.Since(began) >= time.Second, "aborted after %s, want at least 1s", time.Since(began))
	want(t, <-active, 503, "The service is shutting down")
	rest, _ := io.ReadAll(conn)
	complete := strings.HasSuffix(string(rest), "0\r\n\r\n") // the end of a chunked body
	check(t, len(rest) > 0 && !complete, "the stream looks complete: %d bytes, the last %q", len(rest), rest[max(0, len(rest)-20):])
}

// With a silent Cassandra every probe of /health takes its 2 s, so that one of them is always active.
func TestProbesDoNotDelayDrain(t *testing.T) {
	t.Parallel()
	s, proxy := startBehindProxy(t, useCrowd(t))
	proxy.credit.Store(0)
	for _, path := range []string{"/health", "/health", "/", "/metrics"} {
		go func() {
			for s.do("GET "+path, "").err == nil {
			}
		}()
	}
	await(t, 15*time.Second, "disconnected", func() bool { return !s.metrics(t).Cassandra.Connected })
	s.Process.Signal(syscall.SIGTERM)
	s.wantExit(t, 0, 9*time.Second)
}

// The log's reader ends after the first line, as tee does in 2>&1 | tee log at Ctrl-C.
func TestDeadLogReader(t *testing.T) {
	t.Parallel()
	s := startCommand(t, exec.Command("bash", "-c", `exec "$0" 2> >(head -n 1 >&2)`, buildService()), useCrowd(t))
	s.awaitHealthy(t, 30*time.Second)
	active := s.slowQuery(t)
	s.Process.Signal(syscall.SIGINT)
	want(t, <-active, 200)
	s.wantExit(t, 0, 10*time.Second)
}
