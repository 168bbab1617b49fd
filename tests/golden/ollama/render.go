// Renders conversations with a TEMPLATE as Ollama does: the same engine (text/template of Go), the same data, the same
// functions. Written after its description in the docs of Ollama and what template/template.go does there (August 2026).
//
// stdin:  {"template": "...", "conversations": [[{"role": "user", "content": "..."}, ...], ...]}
// stdout: {"rendered": ["...", ...]}
package main

import (
	"bytes"
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
	"time"
)

// Turn has the fields of a message that a template can ask for.
type Turn struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	Thinking   string
	Images     [][]byte
	ToolCalls  []struct{}
	ToolName   string
	ToolCallID string
}

type task struct {
	Template      string   `json:"template"`
	Conversations [][]Turn `json:"conversations"`
}

type answer struct {
	Rendered []string `json:"rendered"`
}

func day(back int) func(...string) string {
	return func(...string) string { return time.Now().AddDate(0, 0, -back).Format("2006-01-02") }
}

func asJSON(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}

func anyType(any) string { return "any" }

// together joins turns of one role that follow each other, and collects what the system says.
func together(turns []Turn) (string, []*Turn) {
	var system []string
	var joined []*Turn
	for _, turn := range turns {
		turn := turn
		if turn.Role == "system" {
			system = append(system, turn.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == turn.Role && turn.Role != "tool" {
			joined[last].Content += "\n\n" + turn.Content
			continue
		}
		joined = append(joined, &turn)
	}
	return strings.Join(system, "\n\n"), joined
}

func main() {
	log.SetFlags(0)
	var given task
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		log.Fatal(err)
	}
	functions := template.FuncMap{
		"json": asJSON, "currentDate": day(0), "yesterdayDate": day(1), "toTypeScriptType": anyType,
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(given.Template)
	if err != nil {
		log.Fatal(err)
	}
	made := answer{Rendered: []string{}}
	for _, turns := range given.Conversations {
		system, joined := together(turns)
		var out bytes.Buffer
		err := parsed.Execute(&out, map[string]any{
			"System": system, "Messages": joined, "Tools": nil, "Response": "",
			"Think": false, "ThinkLevel": "", "IsThinkSet": false,
		})
		if err != nil {
			log.Fatal(err)
		}
		made.Rendered = append(made.Rendered, out.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(made); err != nil {
		log.Fatal(err)
	}
}
