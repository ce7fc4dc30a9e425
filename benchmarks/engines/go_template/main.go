// Chats as Ollama's own kind of template renders them: go_template MODELFILE REQUEST.json ANSWER.json
//
// Go's text/template, given what Ollama (server/prompt.go, template/template.go, August 2026) gives to it: neighbours of one role
// joined by an empty line, all system messages in .System, and the functions that it adds. Of the request, `chats` are answered;
// `options.family` is the architecture in the GGUF file, on which Ollama's server cuts thoughts out of earlier answers.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"text/template"
	"time"
	"unicode"
)

type message struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	Thinking   string `json:"thinking"`
	Images     [][]byte
	ToolCalls  []any
	ToolName   string
	ToolCallID string
}

type request struct {
	Chats   [][]message `json:"chats"`
	Options struct {
		Family string `json:"family"`
	} `json:"options"`
}

type answer struct {
	Engine   string   `json:"engine"`
	Version  string   `json:"version"`
	Rendered []string `json:"rendered"`
}

func main() {
	if len(os.Args) != 4 {
		fail(fmt.Errorf("usage: go_template MODELFILE REQUEST.json ANSWER.json"))
	}
	source, err := os.ReadFile(os.Args[1])
	fail(err)
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions()).Parse(templateOf(string(source)))
	fail(err)
	asked, err := os.ReadFile(os.Args[2])
	fail(err)
	var wanted request
	fail(json.Unmarshal(asked, &wanted))
	found := answer{Engine: "go_template", Version: runtime.Version(), Rendered: []string{}}
	for _, chat := range wanted.Chats {
		if wanted.Options.Family == "qwen3" {
			chat = withoutThoughts(chat)
		}
		system, turns := joined(chat)
		var text strings.Builder
		fail(parsed.Execute(&text, map[string]any{
			"System": system, "Messages": turns, "Tools": nil, "Response": "",
			"Think": false, "ThinkLevel": "", "IsThinkSet": false,
		}))
		found.Rendered = append(found.Rendered, text.String())
	}
	written, err := json.Marshal(found)
	fail(err)
	fail(os.WriteFile(os.Args[3], written, 0o644))
}

// functions are those that Ollama adds to the ones of text/template, as far as they concern text.
func functions() template.FuncMap {
	day := func(back int) func(...string) string {
		return func(...string) string { return time.Now().AddDate(0, 0, back).Format("2006-01-02") }
	}
	return template.FuncMap{
		"json":          func(value any) (string, error) { text, err := json.Marshal(value); return string(text), err },
		"currentDate":   day(0),
		"yesterdayDate": day(-1),
	}
}

// templateOf returns the TEMPLATE of a Modelfile as Ollama reads it: quotes taken off, characters that do not print left out.
func templateOf(modelfile string) string {
	_, rest, found := strings.Cut("\n"+modelfile, "\nTEMPLATE ")
	if !found {
		fail(fmt.Errorf("%s: has no TEMPLATE", os.Args[1]))
	}
	quote := "\n"
	for _, mark := range []string{`"""`, `"`} {
		if strings.HasPrefix(rest, mark) {
			rest, quote = rest[len(mark):], mark
			break
		}
	}
	text, _, found := strings.Cut(rest, quote)
	if !found {
		fail(fmt.Errorf("%s: the quotes of TEMPLATE are not closed", os.Args[1]))
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || strings.ContainsRune("\n\r\t", r) {
			return r
		}
		return -1
	}, text)
}

// withoutThoughts cuts what stands between <think> and </think> out of the answers before the last question.
func withoutThoughts(chat []message) []message {
	last := -1
	for at, one := range chat {
		if one.Role == "user" {
			last = at
		}
	}
	for at := range chat {
		thoughts, said, closed := strings.Cut(chat[at].Content, "</think>")
		if at < last && chat[at].Role == "assistant" && closed &&
			strings.HasPrefix(strings.TrimLeftFunc(thoughts, unicode.IsSpace), "<think>") {
			chat[at].Content = strings.TrimLeftFunc(said, unicode.IsSpace)
		}
	}
	return chat
}

// joined returns all system messages as one text, and the chat with neighbours of one role made one message.
func joined(chat []message) (string, []*message) {
	var system []string
	var turns []*message
	for at := range chat {
		one := &chat[at]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if count := len(turns); count > 0 && turns[count-1].Role == one.Role && one.Role != "tool" {
			turns[count-1].Content += "\n\n" + one.Content
		} else {
			turns = append(turns, one)
		}
	}
	return strings.Join(system, "\n\n"), turns
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
