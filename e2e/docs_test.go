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

// operation is an operation of openapi.json with its references resolved.
type operation struct {
	Parameters []struct {
		Name, In string
		Example  any
	}
	RequestBody content
	Responses   map[string]struct {
		content
		Headers map[string]struct{ Required bool }
	}
}

type content struct {
	Content map[string]struct { // by media type
		Schema   schema
		Example  json.RawMessage
		Examples map[string]struct{ Value json.RawMessage }
	}
}

type schema struct {
	Properties map[string]any
	Required   []string
	AllOf      []schema
}

// members returns the sorted names of the properties and of the required ones.
func (s schema) members() (properties, required []string) {
	properties, required = slices.Collect(maps.Keys(s.Properties)), slices.Clone(s.Required)
	for _, part := range s.AllOf {
		p, r := part.members()
		properties, required = append(properties, p...), append(required, r...)
	}
	slices.Sort(properties)
	slices.Sort(required)
	return slices.Compact(properties), slices.Compact(required)
}

// examples returns one for each media type; "" stands for no content.
func (c content) examples() map[string]string {
	examples := map[string]string{}
	for mediaType, content := range c.Content {
		examples[mediaType] = string(content.Example)
		for _, example := range content.Examples {
			examples[mediaType] = string(example.Value)
		}
	}
	if len(examples) == 0 {
		examples[""] = ""
	}
	return examples
}

// openAPI returns the operations of GET /openapi.json by pattern, such as "GET /users/{id}".
func (s *service) openAPI(t testing.TB) map[string]operation {
	t.Helper()
	root := decode[map[string]any](t, s.do("GET /openapi.json", ""), 200)
	paths := resolve(root, root["paths"]).(map[string]any)
	for _, item := range paths {
		delete(item.(map[string]any), "parameters") // of all its operations
	}
	text, _ := json.Marshal(paths)
	var byPath map[string]map[string]operation
	if err := json.Unmarshal(text, &byPath); err != nil {
		t.Fatal(err)
	}
	operations := map[string]operation{}
	for path, item := range byPath {
		for method, o := range item {
			operations[strings.ToUpper(method)+" "+path] = o
		}
	}
	return operations
}

// resolve replaces references by their targets.
func resolve(root map[string]any, node any) any {
	switch node := node.(type) {
	case map[string]any:
		if ref, ok := node["$ref"].(string); ok {
			var target any = root
			for _, name := range strings.Split(ref, "/")[1:] {
				target = target.(map[string]any)[name]
			}
			return resolve(root, target)
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

func TestOpenAPI(t *testing.T) {
	t.Parallel()
	s := startHealthy(t)
	operations := s.openAPI(t)
	endpoints := decode[struct{ Endpoints []string }](t, s.do("GET /", ""), 200).Endpoints
	listed := strings.Split(strings.ReplaceAll(strings.Join(endpoints, "\n"), "{$}", ""), "\n")
	slices.Sort(listed)
	if documented := slices.Sorted(maps.Keys(operations)); !slices.Equal(documented, listed) {
		t.Errorf("openapi.json has %q, GET / lists %q", documented, listed)
	}
	for pattern, o := range operations {
		status := slices.Min(slices.Collect(maps.Keys(o.Responses)))
		for contentType, body := range o.RequestBody.examples() {
			for accept, example := range o.Responses[status].examples() {
				t.Run(strings.Join([]string{pattern, contentType, accept}, " "), func(t *testing.T) {
					if !strings.HasSuffix(pattern, "_query") && pattern != "POST /shutdown" || *long {
						r := s.tryExample(t, operations, pattern, body, "Accept: "+accept, "Content-Type: "+contentType)
						if fmt.Sprint(r.status) != status || !strings.HasPrefix(r.header.Get("Content-Type"), accept) {
							t.Errorf("%s; want %s %s", r, status, accept)
						}
						for name, header := range o.Responses[status].Headers {
							if header.Required && r.header.Get(name) == "" {
								t.Errorf("%s lacks %s", r, name)
							}
						}
						if got, want := memberNames(r.body), memberNames(example); want != nil && got != nil && !slices.Equal(got, want) {
							t.Errorf("the response has the members %q, its example %q", got, want)
						}
					}
				})
			}
		}
	}
	s.wantSchemas(t, operations)
}

// tryExample sends the examples of all parameters and of the body.
func (s *service) tryExample(t *testing.T, operations map[string]operation, pattern, body string, headers ...string) response {
	query := url.Values{}
	for _, p := range operations[pattern].Parameters {
		if p.In == "query" && p.Example != nil { // page_state is only valid for its own table
			query.Set(p.Name, fmt.Sprint(p.Example))
		} else if p.In == "header" && !strings.HasPrefix(p.Name, "If-") {
			headers = append(headers, fmt.Sprintf("%s: %v", p.Name, p.Example))
		}
	}
	if strings.Contains(pattern, "{id}") {
		pattern = strings.Replace(pattern, "/users/{id}", s.createUser(t), 1)
	}
	return s.do(pattern+"?"+query.Encode(), body, headers...)
}

// memberNames returns those of a JSON object, or of the first object in an array; nil for anything else.
func memberNames(text string) []string {
	var object map[string]any
	if json.NewDecoder(strings.NewReader(strings.TrimPrefix(text, "["))).Decode(&object) != nil {
		return nil
	}
	return slices.Sorted(maps.Keys(object))
}

// wantSchemas compares the schemas of a user with a real one, and with the members that the service requires.
func (s *service) wantSchemas(t *testing.T, operations map[string]operation) {
	t.Helper()
	members := memberNames(s.do("GET "+s.createUser(t), "").body)
	properties, required := operations["GET /users/{id}"].Responses["200"].Content["application/json"].Schema.members()
	if !slices.Equal(properties, members) || !slices.Equal(required, members) {
		t.Errorf("schema of a user: properties %q, required %q, a user has %q", properties, required, members)
	}
	for _, pattern := range []string{"POST /users", "PUT /users/{id}"} {
		_, required := operations[pattern].RequestBody.Content["application/json"].Schema.members()
		r := s.do(strings.Replace(pattern, "/users/{id}", missingUser, 1), "{}")
		var missing []string
		for _, match := range regexp.MustCompile(`"/(\w+)","detail":"is missing;`).FindAllStringSubmatch(r.body, -1) {
			missing = append(missing, match[1])
		}
		if slices.Sort(missing); !slices.Equal(missing, required) {
			t.Errorf("%s: openapi.json requires %q, the service %q", pattern, required, missing)
		}
	}
}

func TestDocsPageLoadsNothingFromElsewhere(t *testing.T) {
	t.Parallel()
	r := start(t, useCrowd(t)).do("GET /docs", "")
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
