package e2e

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestReadme follows the README: it starts the service by the first command and types every line after a "$ " of the sh
// blocks. The output must be the README's, apart from ids, times, durations and tokens.
func TestReadme(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	cmd := exec.Command("sh", "-c", "exec "+strings.TrimPrefix(blocks[0][1], "$ "))
	cmd.Dir = ".."
	s := startCommand(t, cmd)
	s.awaitHealthy(t, 15*time.Second)
	promised, script := "", ""
	for _, block := range blocks[2:] {
		promised += block[1]
		for line := range strings.Lines(block[1]) {
			if command, isCommand := strings.CutPrefix(line, "$ "); isCommand {
				command = strings.ReplaceAll(command, "localhost:8000", strings.TrimPrefix(s.url, "http://"))
				script += "printf %s '" + strings.ReplaceAll(line, "'", `'\''`) + "'\n" + command
			}
		}
	}
	printed, err := exec.Command("bash", "-c", script).Output()
	if got, want := mask(strings.ReplaceAll(string(printed), "\r", "")), mask(promised); got != want {
		t.Errorf("%v; the tour printed\n%s\nthe README has\n%s\nIf the output is right, paste it there.", err, got, want)
	}
	s.wantExit(t, 0, 30*time.Second)
}

// mask hides everything that differs from run to run.
func mask(text string) string {
	return regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z|(Date|ETag|Etag|X-Request-Id): .*|`+
		`"(request_id|cassandra_version|keyspace)":"[^"]*"|"(duration|latency_ms)":[0-9.e-]+|page_state=[\w.-]+`).ReplaceAllString(text, "…")
}

// at returns the part of a JSON document at a path, or nil.
func at(node any, path ...string) any {
	for _, name := range path {
		object, _ := node.(map[string]any)
		node = object[name]
	}
	return node
}

func membersAt(node any, path ...string) map[string]any {
	object, _ := at(node, path...).(map[string]any)
	return object
}

func listAt(node any, path ...string) []any {
	list, _ := at(node, path...).([]any)
	return list
}

// resolve replaces references by their targets.
func resolve(root, node any) any {
	switch node := node.(type) {
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			return resolve(root, at(root, strings.Split(ref, "/")[1:]...))
		}
		for name, value := range node {
			node[name] = resolve(root, value)
		}
	case []any:
		for i, value := range node {
			node[i] = resolve(root, value)
		}
	}
	return node
}

// examples returns an example of each media type; "" stands for no content.
func examples(content map[string]any) map[string]string {
	found := map[string]string{}
	for mediaType, c := range content {
		example := at(c, "example")
		for _, e := range membersAt(c, "examples") {
			example = at(e, "value")
		}
		text, _ := json.Marshal(example)
		found[mediaType] = string(text)
	}
	if len(found) == 0 {
		found[""] = ""
	}
	return found
}

func TestOpenAPI(t *testing.T) {
	t.Parallel()
	s := startHealthy(t)
	root, operations := decode[any](t, s.do("GET /openapi.json", ""), 200), map[string]any{} // by pattern, such as "GET /users/{id}"
	for path, item := range membersAt(resolve(root, root), "paths") {
		for method, operation := range membersAt(item) {
			if method != "parameters" {
				operations[strings.ToUpper(method)+" "+path] = operation
			}
		}
	}
	endpoints := decode[struct{ Endpoints []string }](t, s.do("GET /", ""), 200).Endpoints
	slices.Sort(endpoints)
	if documented := slices.Sorted(maps.Keys(operations)); !slices.Equal(documented, endpoints) {
		t.Errorf("openapi.json has %q, GET / lists %q", documented, endpoints)
	}
	for pattern, o := range operations {
		if pattern == "POST /shutdown" || strings.HasSuffix(pattern, "_query") && !*long {
			continue
		}
		status := slices.Min(slices.Collect(maps.Keys(membersAt(o, "responses"))))
		for contentType, body := range examples(membersAt(o, "requestBody", "content")) {
			for accept, example := range examples(membersAt(o, "responses", status, "content")) {
				r := s.tryExample(t, pattern, o, body, "Accept: "+accept, "Content-Type: "+contentType)
				if fmt.Sprint(r.status) != status || !strings.HasPrefix(r.header.Get("Content-Type"), accept) {
					t.Errorf("%s; want %s %s", r, status, accept)
				}
				for name, header := range membersAt(o, "responses", status, "headers") {
					if at(header, "required") == true && r.header.Get(name) == "" {
						t.Errorf("%s; want the header %s", r, name)
					}
				}
				if got, want := memberNames(r.body), memberNames(example); want != nil && got != nil && !slices.Equal(got, want) {
					t.Errorf("the response has the members %q, its example %q", got, want)
				}
			}
		}
	}
	s.wantSchemas(t, operations)
}

// tryExample sends the examples of all parameters and of the body. Only page_state has none.
func (s *service) tryExample(t *testing.T, pattern string, operation any, body string, headers ...string) response {
	query := url.Values{}
	for _, p := range listAt(operation, "parameters") {
		if name, example := fmt.Sprint(at(p, "name")), at(p, "example"); at(p, "in") == "query" && example != nil {
			query.Set(name, fmt.Sprint(example))
		} else if at(p, "in") == "header" && !strings.HasPrefix(name, "If-") {
			headers = append(headers, fmt.Sprintf("%s: %v", name, example))
		}
	}
	pattern = strings.Replace(pattern, "/users/{id}", s.createUser(t), 1)
	return s.do(pattern+"?"+query.Encode(), body, headers...)
}

// memberNames returns those of a JSON object, or of the first object in an array; nil for anything else.
func memberNames(text string) []string {
	var object map[string]any
	json.NewDecoder(strings.NewReader(strings.TrimPrefix(text, "["))).Decode(&object)
	return slices.Sorted(maps.Keys(object))
}

// addMembers adds the names of a schema's properties and of the required ones.
func addMembers(schema any, properties, required map[string]any) {
	maps.Copy(properties, membersAt(schema, "properties"))
	for _, name := range listAt(schema, "required") {
		required[name.(string)] = true
	}
	for _, part := range listAt(schema, "allOf") {
		addMembers(part, properties, required)
	}
}

// wantSchemas compares the schemas of a user with a real one, and with the members that the service requires.
func (s *service) wantSchemas(t *testing.T, operations map[string]any) {
	actual, properties, required := memberNames(s.do("GET "+s.createUser(t), "").body), map[string]any{}, map[string]any{}
	addMembers(at(operations, "GET /users/{id}", "responses", "200", "content", "application/json", "schema"), properties, required)
	if p, r := slices.Sorted(maps.Keys(properties)), slices.Sorted(maps.Keys(required)); !slices.Equal(p, actual) || !slices.Equal(r, actual) {
		t.Errorf("schema of a user: properties %q, required %q, a user has %q", p, r, actual)
	}
	for _, pattern := range []string{"POST /users", "PUT /users/{id}"} {
		required := map[string]any{}
		addMembers(at(operations, pattern, "requestBody", "content", "application/json", "schema"), properties, required)
		r := s.do(strings.Replace(pattern, "/users/{id}", missingUser, 1), "{}")
		for name := range properties {
			if strings.Contains(r.body, fmt.Sprintf(`"/%s","detail":"is missing;`, name)) != (required[name] != nil) {
				t.Errorf("%s: openapi.json requires %v, the service %s", pattern, required, r)
			}
		}
	}
}

func TestDocsPageLoadsNothingFromElsewhere(t *testing.T) {
	t.Parallel()
	s := start(t, useCrowd(t), "ALLOWED_HOSTS=users.example.com")
	want(t, s.do("GET /docs", ""), 421, "Host not allowed; see ALLOWED_HOSTS")
	r := s.do("GET /docs", "", "Host: users.example.com:80")
	policy := r.header.Get("Content-Security-Policy")
	for _, element := range regexp.MustCompile(`(?s)<(?:style|script)\b[^>]*>(.*?)</(style|script)>`).FindAllStringSubmatch(r.body, -1) {
		sum := sha256.Sum256([]byte(element[1]))
		if !strings.Contains(policy, fmt.Sprintf("%s-src 'sha256-%s'", element[2], base64.StdEncoding.EncodeToString(sum[:]))) {
			t.Errorf("the policy %q does not allow the page's <%s>", policy, element[2])
		}
	}
	elsewhere := regexp.MustCompile(`https?://|\ssrc=|@import|\burl\(|<[^>]+\son[a-z]+=|<[^>]+\sstyle=`).FindAllString(r.body, -1)
	if !strings.HasPrefix(policy, "default-src 'none';") || strings.Contains(policy, "unsafe") || elsewhere != nil {
		t.Errorf("policy = %q; the page has %q", policy, elsewhere)
	}
}
