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

// TestReadme starts the service with the README's first command and runs every sh block of its tour. The outputs must be the
// README's, apart from ids, times, durations and tokens. An indented line continues the one before.
func TestReadme(t *testing.T) {
	t.Parallel()
	text, _ := os.ReadFile("../README.md")
	tour := regexp.MustCompile("(?s)\n## A tour.*?\n## ").FindString(string(text))
	blocks := regexp.MustCompile("(?s)```(sh|text|json)\n(.*?)```")
	cmd := exec.Command("sh", "-c", "exec "+blocks.FindStringSubmatch(string(text))[2])
	cmd.Dir = ".."
	s := startCommand(t, cmd)
	s.awaitHealthy(t, time.Minute)
	promised, script := "", ""
	for _, block := range blocks.FindAllStringSubmatch(tour, -1) {
		if promised += block[2]; block[1] == "sh" {
			script += "cat << 'END'\n" + block[2] + "END\n" + strings.ReplaceAll(block[2], "localhost:8000", strings.TrimPrefix(s.url, "http://"))
		}
	}
	printed, err := exec.Command("bash", "-c", script).Output()
	unwrap := strings.NewReplacer("\r", "", "\n ", "")
	got, want := mask(unwrap.Replace(string(printed))), mask(unwrap.Replace(promised))
	check(t, got == want, "%v; the tour printed\n%s\nthe README has\n%s\nIf the output is right, paste it there.", err, got, want)
	s.wantExit(t, 0, 30*time.Second)
}

// mask hides everything that differs from run to run.
func mask(text string) string {
	return regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z|(Date|ETag|Etag|X-Request-Id): .*|`+
		`"(request_id|keyspace)":"[^"]*"|"(latency_ms|requests_per_second)":[0-9.e-]+|page_state=[\w.-]+`).ReplaceAllString(text, "…")
}

// TestReference compares the settings and the limits in docs/reference.md with the code.
func TestReference(t *testing.T) {
	t.Parallel()
	reference, _ := os.ReadFile("../docs/reference.md")
	code, _ := exec.Command("sh", "-c", "cat ../*.go | tr -s '[:space:]' ' '").Output()
	help, _ := exec.Command(buildLauncher(), "-h").CombinedOutput()
	check(t, strings.Contains(string(reference), string(help)), "docs/reference.md lacks\n%s", help)
	settings := regexp.MustCompile(`(?:setting\(env, |env.getenv\()"(\w+)"(?:, "([^"]*)")?`).FindAllStringSubmatch(string(code), -1)
	for _, s := range settings {
		row := strings.TrimSuffix(fmt.Sprintf("\n| `%s` | `%s`", s[1], s[2]), "``")
		check(t, strings.Contains(string(reference), row), "docs/reference.md lacks %q", row)
	}
	rows := regexp.MustCompile("\n\\| `[A-Z_]+` ").FindAllString(string(reference), -1)
	check(t, len(rows) == len(settings), "docs/reference.md has the settings %q, the code %q", rows, settings)
	units := strings.NewReplacer(" << 20", " MiB", " << 10", " KiB", " * time.Second", " s", " * time.Minute", " min", "_", ",")
	for _, l := range regexp.MustCompile("([0-9,]+(?: \\w+)?) \\| `(\\w+)` \\|").FindAllStringSubmatch(string(reference), -1) {
		check(t, strings.Contains(units.Replace(string(code)), l[2]+" = "+l[1]+" "), "the code's %s is not %s", l[2], l[1])
	}
}

type object = map[string]any

var openAPI any // docs/openapi.json

// at returns the part of openapi.json at a path from node, or a zero value. It follows references.
func at[T any](node any, path ...string) T {
	members, _ := node.(object)
	if ref, ok := members["$ref"].(string); ok {
		return at[T](openAPI, append(strings.Split(ref, "/")[1:], path...)...)
	}
	if len(path) > 0 {
		return at[T](members[path[0]], path[1:]...)
	}
	value, _ := node.(T)
	return value
}

// examples returns an example of each media type; "" stands for no content.
func examples(content object) map[string]string {
	found := map[string]string{}
	for mediaType, c := range content {
		example := at[any](c, "example")
		for _, e := range at[object](c, "examples") {
			example = at[any](e, "value")
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
	openAPI = decode[any](t, s.do("GET /openapi.json", ""), 200)
	operations := object{} // by pattern, such as "GET /users/{id}"
	for path, item := range at[object](openAPI, "paths") {
		for method, operation := range at[object](item) {
			if method != "parameters" {
				operations[strings.ToUpper(method)+" "+path] = operation
			}
		}
	}
	endpoints := slices.Sorted(slices.Values(decode[struct{ Endpoints []string }](t, s.do("GET /", ""), 200).Endpoints))
	documented := slices.Sorted(maps.Keys(operations))
	check(t, slices.Equal(documented, endpoints), "openapi.json has %q, GET / lists %q", documented, endpoints)
	for pattern, o := range operations {
		if pattern == "POST /shutdown" || strings.HasSuffix(pattern, "_query") && !*long {
			continue
		}
		status := slices.Min(slices.Collect(maps.Keys(at[object](o, "responses"))))
		for contentType, body := range examples(at[object](o, "requestBody", "content")) {
			for accept, example := range examples(at[object](o, "responses", status, "content")) {
				r := s.tryExample(t, pattern, o, body, "Accept: "+accept, "Content-Type: "+contentType)
				check(t, fmt.Sprint(r.status) == status && strings.HasPrefix(r.header.Get("Content-Type"), accept), "%s; want %s %s", r, status, accept)
				for name, header := range at[object](o, "responses", status, "headers") {
					check(t, at[any](header, "required") != true || r.header.Get(name) != "", "%s; want the header %s", r, name)
				}
				got, want := memberNames(r.body), memberNames(example)
				check(t, want == nil || got == nil || slices.Equal(got, want), "%s: members of the response %q, of its example %q", pattern, got, want)
			}
		}
	}
	s.wantSchemas(t, operations)
}

// tryExample sends the examples of the body and of the operation's own parameters but If-Match and If-None-Match. Only page_state has none.
func (s *service) tryExample(t *testing.T, pattern string, operation any, body string, headers ...string) response {
	query := url.Values{}
	for _, p := range at[[]any](operation, "parameters") {
		if name, example := fmt.Sprint(at[any](p, "name")), at[any](p, "example"); at[any](p, "in") == "query" && example != nil {
			query.Set(name, fmt.Sprint(example))
		} else if at[any](p, "in") == "header" && !strings.HasPrefix(name, "If-") {
			headers = append(headers, fmt.Sprintf("%s: %v", name, example))
		}
	}
	pattern = strings.Replace(pattern, "/users/{id}", s.createUser(t), 1)
	return s.do(pattern+"?"+query.Encode(), body, headers...)
}

// memberNames returns the member names of a JSON object, or of the first object in an array; nil for anything else.
func memberNames(text string) []string {
	var object object
	json.NewDecoder(strings.NewReader(strings.TrimPrefix(text, "["))).Decode(&object)
	return slices.Sorted(maps.Keys(object))
}

// addMembers adds the names of a schema's properties and of the required ones.
func addMembers(schema any, properties, required object) {
	maps.Copy(properties, at[object](schema, "properties"))
	for _, name := range at[[]any](schema, "required") {
		required[name.(string)] = true
	}
	for _, part := range at[[]any](schema, "allOf") {
		addMembers(part, properties, required)
	}
}

// wantSchemas compares the schemas of a user with a real one, and with the members that the service requires.
func (s *service) wantSchemas(t *testing.T, operations object) {
	actual, properties, required := memberNames(s.do("GET "+s.createUser(t), "").body), object{}, object{}
	addMembers(at[any](operations, "GET /users/{id}", "responses", "200", "content", "application/json", "schema"), properties, required)
	p, r := slices.Sorted(maps.Keys(properties)), slices.Sorted(maps.Keys(required))
	check(t, slices.Equal(p, actual) && slices.Equal(r, actual), "schema of a user: properties %q, required %q, a user has %q", p, r, actual)
	for _, pattern := range []string{"POST /users", "PUT /users/{id}"} {
		required := object{}
		addMembers(at[any](operations, pattern, "requestBody", "content", "application/json", "schema"), properties, required)
		r := s.do(strings.Replace(pattern, "/users/{id}", missingUser, 1), "{}")
		for name := range properties {
			isRequired := strings.Contains(r.body, fmt.Sprintf(`"/%s","detail":"is missing;`, name))
			check(t, isRequired == (required[name] != nil), "%s: openapi.json requires %v, the service %s", pattern, required, r)
		}
	}
}

func TestDocsPageLoadsNothingFromElsewhere(t *testing.T) {
	t.Parallel()
	r := start(t, useCrowd(t)).do("GET /docs", "")
	policy := r.header.Get("Content-Security-Policy")
	for _, element := range regexp.MustCompile(`(?s)<(?:style|script)\b[^>]*>(.*?)</(style|script)>`).FindAllStringSubmatch(r.body, -1) {
		sum := sha256.Sum256([]byte(element[1]))
		source := fmt.Sprintf("%s-src 'sha256-%s'", element[2], base64.StdEncoding.EncodeToString(sum[:]))
		check(t, strings.Contains(policy, source), "the policy %q lacks %s", policy, source)
	}
	elsewhere := regexp.MustCompile(`https?://|\ssrc=|@import|\burl\(|<[^>]+\son[a-z]+=|<[^>]+\sstyle=`).FindAllString(r.body, -1)
	strict := strings.HasPrefix(policy, "default-src 'none';") && !strings.Contains(policy, "unsafe")
	check(t, strict && elsewhere == nil, "policy = %q; the page has %q", policy, elsewhere)
}
