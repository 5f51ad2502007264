"""Modelfiles: the Go template must give the ids of the base's Jinja template, or there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, GEMMA2, GEMMA3, LAST_TURN_OPEN, LLAMA3, SMOLLM
from tiny_families import write_bpe, write_family

from peftkit.base.tokenizer import load_tokenizer
from peftkit.errors import DeltaError
from peftkit.release.export import gotemplate
from peftkit.release.export.chat_turns import Turns, turns_of
from peftkit.release.export.gguf_model import write_model_gguf
from peftkit.release.export.ollama import checked_template, write_modelfile

NUMBERED = "{% for m in messages %}{{ loop.index|string + m['role'] + m['content'] + '\n' }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}"


def tokenizer(folder: Path, template: str | None) -> Any:
    write_bpe(folder, template=template)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "notes"),
    [
        (CHATML, ()),
        (SMOLLM, ()),
        (LLAMA3, ("strips spaces around assistant and system and user",)),
        (GEMMA2, ("strips spaces around assistant and user", "takes no system message")),
        (GEMMA3, ()),
        (LAST_TURN_OPEN, ()),
    ],
    ids=["chatml", "smollm", "llama3", "gemma2", "gemma3", "last-turn-open"],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_templates_of_the_field_are_matched(
    template: str, notes: tuple[str, ...], adds_bos: bool, tmp_path: Path
) -> None:
    base = tokenizer(tmp_path, template)
    if adds_bos and "bos_token" not in template:
        with pytest.raises(DeltaError, match="token 0: Ollama would have"):
            checked_template(base, adds_bos=True)
        return
    found = checked_template(base, adds_bos=adds_bos)
    assert found.conversations == (15 if template == GEMMA2 else 21)
    assert len(found.notes) == len(notes)
    assert all(words in note for words, note in zip(notes, found.notes, strict=True))
    assert ("<|endoftext|>" in found.go) == ("bos_token" in template and not adds_bos)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('<|im_end|>\n{{ else if eq $m.Role "user"', '<|im_end|>{{ else if eq $m.Role "user"'),
        ("assistant\n", "assistant"),
        ('(ne $m.Role "system")', '(eq $m.Role "system")'),
        ("user\n{{ $m", "user\n {{ $m"),
    ],
)
def test_a_planted_difference_is_caught(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, true = tokenizer(tmp_path, SMOLLM), Turns.go
    assert right in turns_of(base).go()
    monkeypatch.setattr(Turns, "go", lambda self: true(self).replace(right, wrong))
    with pytest.raises(DeltaError, match="no Go template gives the token ids") as caught:
        checked_template(base, adds_bos=False)
    assert "token " in caught.value.fact
    assert caught.value.expected not in caught.value.fact


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        (TWICE, "writes a message 2 times"),
        (NUMBERED, "no Go template gives the token ids"),
        (CHATML + "{{ strftime_now('%d') }}", "today's date"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "writes a message 0 times"),
        (CHATML.replace("message['content']", "message['content'].replace('  ', ' ')"), "lines and spaces"),
    ],
)
def test_other_templates_are_refused_by_name(template: str | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=words):
        checked_template(tokenizer(tmp_path, template), adds_bos=False)


def test_the_modelfile(tmp_path: Path) -> None:
    write_family(tmp_path / "hf", "qwen2")
    model = write_model_gguf(tmp_path / "hf", tmp_path / "merged.gguf", "f16").path
    out = tmp_path / "out" / "Modelfile"
    out.parent.mkdir()
    written = write_modelfile(out, model, tmp_path / "hf")
    lines = out.read_text().splitlines()
    assert lines[0].startswith("# Token ids compared with the base's chat template: 21 conversations")
    assert lines[1].endswith("checked against Go's text/template; not run in Ollama.")
    assert lines[2] == "FROM ../merged.gguf"
    assert lines[3].startswith('TEMPLATE """{{ range $i, $m := .Messages }}')
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    assert written.stops == ("<|im_end|>",)
    with pytest.raises(DeltaError, match="exists"):
        write_modelfile(out, model, tmp_path / "hf")
    with pytest.raises(DeltaError, match="a GGUF model"):
        write_modelfile(tmp_path / "M", model, tmp_path / "hf", adapter=model)
    (tmp_path / "no.gguf").write_text("no")
    with pytest.raises(DeltaError, match="is no GGUF file"):
        write_modelfile(tmp_path / "M", tmp_path / "no.gguf", tmp_path / "hf")
    write_bpe(tmp_path / "hf", template=NUMBERED)
    with pytest.raises(DeltaError, match="no Go template"):
        write_modelfile(tmp_path / "M", model, tmp_path / "hf")
    assert not (tmp_path / "M").exists()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {{ .S }} b", "a x b"),
        ("a \n{{- .S -}}\n b", "axb"),
        ("{{ range $i, $m := .L }}{{ $i }}{{ $m.R }},{{ end }}", "0u,1a,"),
        ('{{ if eq .S "y" }}1{{ else if ne .S "x" }}2{{ else }}3{{ end }}', "3"),
        ('{{ if and .S (not .E) }}{{ or .E "z" }}{{ end }}', "z"),
        ('{{ "{{" }}{{ "\\n" }}', "{{\n"),
        ("{{ len .L }}", "2"),
    ],
)
def test_go_subset(template: str, expected: str) -> None:
    assert gotemplate.render(template, {"S": "x", "E": "", "L": [{"R": "u"}, {"R": "a"}]}) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ .S", "{{ if .S }}", "{{ end }}", "{{ else }}", "{{ range .L }}{{ end }}", "{{ printf .S }}", "{{ .No }}",
        "{{ $x }}", "{{ .S | len }}", "{{ if .S }}{{ else }}{{ else }}{{ end }}", "{{ (.S }}", "{{ }}", "{{ .S.T }}",
        "{{ 'a' }}",
    ],
)  # fmt: skip
def test_what_go_would_refuse_or_read_otherwise_is_an_error(template: str) -> None:
    with pytest.raises(DeltaError, match="cannot be rendered"):
        gotemplate.render(template, {"S": "x", "L": []})
