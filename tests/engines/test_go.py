"""Our interpreter of Go templates against Go itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from tiny_families import write_bpe

from peftkit.base.tokenizer import load_tokenizer
from peftkit.errors import DeltaError
from peftkit.release.export import gotemplate, ollama
from peftkit.release.export.chat_turns import turns_of

pytestmark = pytest.mark.engines

SUBSET = [
    "a \n{{- .System -}}\n b",
    "{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }},{{ .Content }}{{ end }}",
    '{{ if eq .System "y" }}1{{ else if ne .System "" }}2{{ else }}3{{ end }}',
    '{{ if and .System (not .Messages) }}x{{ else }}{{ or .System "z" }}{{ end }}',
    '{{ "{{" }}{{ "\\n\\t\\"" }}{{ len .Messages }}',
    '{{ if or (eq .System "a") (and .System (ne .System "b")) }}{{ .System }}{{ end }}',
]
BROKEN = [
    "{{ .System",
    "{{ if .System }}",
    "{{ end }}",
    "{{ else }}",
    "{{ $x }}",
    "{{ }}",
    "{{ (.System }}",
    "{{ 'aa' }}",
]


def test_go_renders_what_we_render(engine: Callable[[str], Any], record: Callable[..., None], tmp_path: Path) -> None:
    go = engine("go")
    sources, folder = list(SUBSET), tmp_path
    for number, template in enumerate(TEMPLATES.values()):
        write_bpe(folder / str(number), template=template)
        sources.append(turns_of(load_tokenizer(folder / str(number))).go())
    values = [ollama.values(messages) for _, messages in ollama.probes(with_system=True)]
    request = [{"Source": source, "Values": values} for source in [*sources, *BROKEN]]
    answer = go.ask(Templates=request)
    rendered = [[gotemplate.render(source, value) for value in values] for source in sources]
    assert answer["rendered"][: len(sources)] == rendered
    for source, text in zip(BROKEN, answer["rendered"][len(sources) :], strict=True):
        assert text is None, source
        with pytest.raises(DeltaError):
            gotemplate.render(source, values[0])
    counts = {"templates": len(sources), "conversations": len(values), "refused_by_both": len(BROKEN)}
    record("go", answer["version"], "text/template", **counts, equal=sum(map(len, rendered)))
