"""A Modelfile for Ollama whose TEMPLATE gives the token ids that the base's own chat template gives.

Ollama does not run Jinja, its templates are Go's. Ours is derived by rendering the base's template, and checked: probe
conversations are rendered by both and compared token by token. A template that cannot be matched is refused.
Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from peftkit.atomic import replace_file
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import DeltaError
from peftkit.release.export.chat_turns import Message, Turns, jinja, takes_system, turns_of
from peftkit.release.export.gguf_file import check_new
from peftkit.release.export.gotemplate import render

_CONTENTS = (
    ("plain", "What is 12 + 30?", "It is 42.", "And 7 less?"),
    ("lines and spaces", "one\n\ntwo  three\tfour", "a\n  b\n\n\nc", "x  =  1;\r\ny"),
    ("padded", "  question \n", "\n answer  ", " again\n\n"),
    ("braces and marks", '{{ .Role }} {% if %} "quoted" \\n', "</s> <b> {{- end }}", "}} `{{`"),
    ("other scripts", "Grüße, 東京 – مرحبا 🙂", "naïve café 🧪", "e\u0301 \u200b?"),
)
NOT_RUN = "Rendered by peftkit's interpreter, which was checked against Go's text/template; not run in Ollama."
_SYSTEM = {"plain": "Answer in one word.", "lines and spaces": "Be\n\n  brief.", "padded": " \n Be kind. \n"}


@dataclass(frozen=True)
class Template:
    """A checked template."""

    go: str
    conversations: int
    """How many probes gave equal token ids."""
    notes: tuple[str, ...]
    """What the base's template does and Ollama's cannot."""


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile on disk."""

    path: Path
    template: Template
    stops: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What was checked, and what was not."""
        return [*self.template.notes, _compared(self.template), NOT_RUN]


def write_modelfile(out: Path, model: Path, tokenizer_folder: Path, *, adapter: Path | None = None) -> Modelfile:
    """Write a Modelfile for `model`, a GGUF of a base or of a merged model, with a LoRA GGUF on it where one is given.

    Raises DeltaError, and writes nothing, when `out` exists, a file is not the GGUF it should be, or the base's chat
    template has no equal in Ollama.
    """
    check_new(out)
    fields = _fields(model, "model")
    if adapter is not None:
        theirs = _fields(adapter, "adapter")["general.architecture"].contents()
        ours = fields["general.architecture"].contents()
        if theirs != ours:
            raise DeltaError(f"{adapter} is for the architecture {theirs}, {model} is {ours}", expected="the same")
    tokenizer = load_tokenizer(tokenizer_folder)
    flag = fields.get(gguf.Keys.Tokenizer.ADD_BOS)
    template = checked_template(tokenizer, adds_bos=bool(flag.contents()) if flag is not None else False)
    stops = tuple(str(tokenizer.hf.convert_ids_to_tokens(number)) for number in tokenizer.stop_ids)
    replace_file(out, _text(out, model, adapter, template, stops))
    return Modelfile(out, template, stops)


def _fields(path: Path, kind: str) -> Any:
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise DeltaError(f"{path} is no GGUF file: {error}", expected=f"a GGUF {kind}") from None
    found = fields["general.type"].contents() if "general.type" in fields else "model"
    if found != kind:
        raise DeltaError(f"{path} is a GGUF {found}", expected=f"a GGUF {kind}")
    return fields


def checked_template(tokenizer: Tokenizer, *, adds_bos: bool) -> Template:
    """Ollama's template for a base, compared with the base's own; `adds_bos` says whether the engine puts a BOS first.

    Raises DeltaError, showing the first difference, when any probe's token ids differ.
    """
    _check_date(tokenizer)
    turns = turns_of(tokenizer)
    bos = str(tokenizer.hf.bos_token or "")
    if adds_bos and bos:  # the engine writes it
        system = turns.system and (turns.system[0].removeprefix(bos), turns.system[1])
        turns = replace(turns, head=turns.head.removeprefix(bos), system=system)
    template = turns.go()
    trimmed = _trimmed(tokenizer)
    talks = probes(takes_system(tokenizer))
    for name, messages in talks:
        given = [{**m, "content": m["content"].strip()} if m["role"] in trimmed else m for m in messages]
        _compare(tokenizer, template, name, given, bos if adds_bos else "")
    return Template(template, len(talks), tuple(_notes(tokenizer, turns, trimmed)))


def values(messages: list[Message]) -> dict[str, Any]:
    """What Ollama hands to a template (template.go, `Execute` and `collate`)."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}


def probes(with_system: bool) -> list[tuple[str, list[Message]]]:
    """Conversations as an engine meets them: they end with a question."""
    found: list[tuple[str, list[Message]]] = []
    for name, question, answer, second in _CONTENTS:
        roles = ("user", question), ("assistant", answer), ("user", second), ("assistant", question), ("user", answer)
        talk = [{"role": role, "content": content} for role, content in roles]
        found += [(f"{name}, {turns} turns", talk[:turns]) for turns in (1, 3, 5)]
        if with_system and name in _SYSTEM:
            system = {"role": "system", "content": _SYSTEM[name]}
            found += [(f"{name}, system and {turns} turns", [system, *talk[:turns]]) for turns in (1, 3)]
    return found


def _compare(tokenizer: Tokenizer, template: str, name: str, messages: list[Message], bos: str) -> None:
    expected = tokenizer.encode(jinja(tokenizer, messages, prompt=True))
    found = tokenizer.encode(bos + render(template, values(messages)))
    if expected == found:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(map(len, (expected, found)))
    )
    shown = [tokenizer.decode(ids[max(at - 4, 0) : at + 6], skip_special_tokens=False) for ids in (expected, found)]
    raise DeltaError(
        f"no Go template gives the token ids of the base's chat template: {name}, token {at}: Ollama would have"
        f" {shown[1]!r}",
        expected=repr(shown[0]),
        hint="serve the merged GGUF with llama.cpp's --jinja, which runs the base's own template",
    )


def _trimmed(tokenizer: Tokenizer) -> frozenset[str]:
    """Roles whose messages the base's template strips of spaces at both ends, which Go's templates in Ollama cannot."""
    talk = [{"role": role, "content": f"  Q{role}Q  "} for role in ("user", "assistant")]
    talk.append({"role": "user", "content": "x"})
    rendered = jinja(tokenizer, talk, prompt=True)
    if takes_system(tokenizer):
        system = {"role": "system", "content": "  QsystemQ  "}
        rendered += jinja(tokenizer, [system, {"role": "user", "content": "x"}], prompt=True)
    found = [role for role in ("system", "user", "assistant") if f"Q{role}Q" in rendered]
    return frozenset(role for role in found if f"  Q{role}Q  " not in rendered)


def _check_date(tokenizer: Tokenizer) -> None:
    source = tokenizer.hf.chat_template
    if "strftime_now" in str(source):
        raise DeltaError(
            "the base's chat template writes today's date, which a Modelfile would freeze",
            expected="a template that renders alike every day",
            hint="serve the merged GGUF with llama.cpp's --jinja, which runs the base's own template",
        )


def _notes(tokenizer: Tokenizer, turns: Turns, trimmed: frozenset[str]) -> list[str]:
    notes = []
    if trimmed:
        roles = " and ".join(sorted(trimmed))
        notes.append(f"The base strips spaces around {roles} messages; Ollama cannot: send them stripped.")
    if turns.system is None:
        notes.append("The base takes no system message; Ollama leaves it out.")
    if "</think>" in str(tokenizer.hf.chat_template):
        notes.append("The base's template treats <think> blocks in earlier answers; Ollama's repeats them as they are.")
    if "tools" in str(tokenizer.hf.chat_template):
        notes.append("Tools are not part of this template; only system, user and assistant turns were compared.")
    return notes


def _compared(template: Template) -> str:
    return f"Token ids compared with the base's chat template: {template.conversations} conversations, all equal."


def _text(out: Path, model: Path, adapter: Path | None, template: Template, stops: tuple[str, ...]) -> str:
    quotes = '"""'
    for text in (template.go, *stops, str(model), str(adapter)):
        if quotes in text or any(ord(character) < 32 and character not in "\n\t" for character in text):
            raise DeltaError(f"a Modelfile cannot hold {text!r}", expected="no triple quotes or control characters")
    lines = [f"# {note}" for note in (*template.notes, _compared(template), NOT_RUN)]
    lines.append(f"FROM {_beside(model, out)}")
    if adapter is not None:
        lines.append(f"ADAPTER {_beside(adapter, out)}")
    lines.append(f"TEMPLATE {quotes}{template.go}{quotes}")
    for stop in stops:
        mark = quotes if '"' in stop else '"'
        lines.append(f"PARAMETER stop {mark}{stop}{mark}")
    return "\n".join(lines) + "\n"


def _beside(path: Path, out: Path) -> str:
    """A path that Ollama finds from the Modelfile's folder; without a dot or slash in front it would name a model."""
    relative = os.path.relpath(path, out.parent)
    return relative if relative.startswith("..") else f"./{relative}"
