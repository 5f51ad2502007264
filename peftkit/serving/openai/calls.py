"""Calls of tools in answers: what of a text is one, and the answer that must be one."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.generation.requests import Completion
from peftkit.serving.openai.tagged import Marks, Tags
from peftkit.serving.openai.turns import Tools

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Schemas = Mapping[str, Mapping[str, Any]]
_DECODER = json.JSONDecoder(parse_constant=lambda name: _refuse(name))


@dataclass(frozen=True)
class Call:
    """A function that an answer wants to be called."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True)
class Inside:
    """A call is one JSON object, or a list of them: where its name and its arguments stand in it."""

    name: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How a chat template writes calls: what stands before the first, between two, and after the last."""

    begin: str
    """Without spaces at its ends, as all of them; empty where an answer that begins with `{` or `[` is a call."""
    between: str
    end: str
    inside: Inside | None = None
    """None: the name stands in the text, and the arguments after `after_name`."""
    after_name: str = ""
    tags: Tags | None = None
    """How arguments are written behind a name; None: as JSON."""
    lead: str = ""
    """What the template writes before `begin`, and a model may leave out, as Qwen3-Coder does with `<tool_call>`."""
    control: tuple[str, ...] = ()
    """Control tokens, which are not in an answer's text: where there are any, calls are read off its tokens."""
    short_ids: bool = False
    """Whether the template takes ids of nine letters and digits only, as Mistral's do."""

    def read(self, text: str, schemas: Schemas) -> tuple[str, list[Call]]:
        """The text of an answer without its calls, and the calls. What is no whole call of one of the functions, given
        with their arguments' schemas, stays text, and so does what it has in whole arguments: that is quoted there.

        Without calls the text is as it was.
        """
        kept, calls, at = list[str](), list[Call](), 0
        marks = None if self.tags is None else self.tags.marks(text)
        while (start := self._next(text, at)) is not None:
            found, stop = self._block(text, start, schemas, marks)
            stop = max(stop, start + 1)
            kept.append(self._before(text[at:start]) if found else text[at:stop])
            calls += found
            at = stop
        if not calls:
            return text, []
        return ("".join(kept) + text[at:]).rstrip(), calls

    def held(self, text: str) -> int:
        """From which character on a text that goes on may hold a call; its length when it cannot."""
        if self.control:
            return 0
        if not self.begin:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        found = min(_may_begin(text, mark) for mark in (self.lead or self.begin, self.begin))
        return len(text[:found].rstrip())

    def _before(self, text: str) -> str:
        """The text before a call, without what leads to the call."""
        bare = text.rstrip()
        return bare.removesuffix(self.lead) if self.lead and bare.endswith(self.lead) else text

    def _next(self, text: str, at: int) -> int | None:
        if self.begin:
            return found if (found := text.find(self.begin, at)) >= 0 else None
        return 0 if at == 0 and text.lstrip()[:1] in ("{", "[") else None

    def _block(self, text: str, start: int, schemas: Schemas, marks: Marks | None) -> tuple[list[Call], int]:
        """Calls from `start` on, where `begin` stands, and where they end; none where something is not a call, and
        where to look on."""
        calls, at = list[Call](), start
        found, stop = self._one(text, start + len(self.begin), schemas, marks)
        while found:
            calls, at = calls + found, stop
            after = _literal(text, at, self.between) if self.between else None
            found, stop = ([], at) if after is None else self._one(text, after, schemas, marks)
        if not calls:
            return [], stop
        closed = _literal(text, at, self.end)
        return calls, at if closed is None else closed

    def _one(self, text: str, at: int, schemas: Schemas, marks: Marks | None) -> tuple[list[Call], int]:
        """The call or the list of calls that stands at `at`, and where it ends; none, and where to look on: behind the
        arguments that it has whole."""
        at, behind = _skip(text, at), 0
        if self.inside is not None:
            value, end = json_at(text, at)
            listed = value if isinstance(value, list) else [value]
            said = [(_within(each, self.inside.name), _within(each, self.inside.arguments)) for each in listed]
        else:
            named = _NAME.match(text, at)
            after = None if named is None else _literal(text, named.end(), self.after_name)
            if named is None or after is None or named.group() not in schemas:
                return [], behind
            if self.tags is None or marks is None:
                value, end = json_at(text, _skip(text, after))
            else:
                value, end = self.tags.read(marks, after, schemas[named.group()])
                behind = end
            said = [(named.group(), value)]
        made = [self._made(name, arguments) for name, arguments in said if isinstance(name, str) and name in schemas]
        calls = [call for call in made if call is not None]
        return (calls, end) if calls and len(calls) == len(said) else ([], behind)

    def _made(self, name: str, arguments: Any) -> Call | None:
        if isinstance(arguments, str):
            arguments, _ = json_at(arguments, 0)
        said = _object(arguments)
        return None if said is None else Call(new_id(short=self.short_ids), name, said)


class Reading:
    """One answer while it comes: text that is certain to be no call, and at its end the rest, and the calls."""

    def __init__(self, tools: Tools, form: Form | None, *, short_ids: bool = False) -> None:
        """`form` says how calls are written, where the answer may have some; one that must be a call is JSON by
        `forced_schema`."""
        self._tools, self._form, self._short_ids = tools, form, short_ids
        self._held, self._given = "", False

    def add(self, piece: str) -> str:
        """What may be given out, now that there is one more piece."""
        self._held += piece
        end = self._certain()
        given, self._held = self._held[:end], self._held[end:]
        self._given = self._given or bool(given)
        return given

    def finish(self, completion: Completion, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls. `stop` is what else ended the answer."""
        if self._tools.choice == "required":
            call = forced_call(self._held, self._tools.names, short=self._short_ids)
            return (self._held, []) if call is None else ("", [call])
        form = self._form
        if form is None or self._certain() == len(self._held) != 0:
            return self._held, []
        written = _written(completion, tokenizer, stop) if form.control else self._held
        rest, calls = form.read(written, self._tools.parameters)
        if not calls:
            return self._held, []
        for token in tokenizer.control if form.control else ():
            rest = rest.replace(token, "")
        return rest, calls if self._tools.parallel else calls[:1]

    def _certain(self) -> int:
        """How many characters of the held text can be in no call."""
        if self._tools.choice == "required":
            return 0
        if self._form is None or (self._given and not self._form.begin and not self._form.control):
            return len(self._held)
        return self._form.held(self._held)


def new_id(*, short: bool = False) -> str:
    """An id of a call."""
    letters = string.ascii_letters + string.digits
    return ("" if short else "call_") + "".join(secrets.choice(letters) for _ in range(9 if short else 24))


def forced_schema(tools: Tools) -> dict[str, Any]:
    """What an answer follows that must call one of the functions."""
    several = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": _moved(schema, f"#/anyOf/{at}/properties/arguments")},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for at, (name, schema) in enumerate(tools.parameters.items())
    ]
    return {"anyOf": several}


def forced_call(text: str, names: frozenset[str], *, short: bool = False) -> Call | None:
    """The call that an answer by `forced_schema` is; None when it was cut off before its end."""
    value, end = json_at(text, _skip(text, 0))
    if not isinstance(value, Mapping) or text[end:].strip() or value.get("name") not in names:
        return None
    said = _object(value.get("arguments"))
    return None if said is None else Call(new_id(short=short), value["name"], said)


def _object(arguments: Any) -> str | None:
    """A call's arguments as JSON; None when they are none."""
    if not isinstance(arguments, dict):
        return None
    try:
        return json.dumps(arguments, allow_nan=False)  # 1e999 is JSON, and no number any more
    except (ValueError, RecursionError):
        return None


def _written(completion: Completion, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """An answer with its control tokens, up to what ended it."""
    text = tokenizer.decode(completion.ids, skip_special_tokens=False)
    ends = [at for at in (text.find(each) for each in stop) if at >= 0]
    return text[: min(ends)] if ends else text


def _moved(schema: Any, to: str) -> Any:
    """A schema that stands inside another one: references to its own root are references to its new place."""
    if isinstance(schema, Mapping):
        return {
            key: to + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, to)
            for key, value in schema.items()
        }
    return [_moved(each, to) for each in schema] if isinstance(schema, list) else schema


def _within(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that stands at `at`, and where it ends; None, and `at`, when none does."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at
    return value, end


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _may_begin(text: str, mark: str) -> int:
    """Where `mark` stands in a text that goes on, or may come to stand; its length when nowhere yet."""
    found = text.find(mark)
    if found >= 0:
        return found
    longest = min(len(text), len(mark) - 1)
    return len(text) - next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


def _literal(text: str, at: int, wanted: str) -> int | None:
    """Where a text goes on after `wanted`, with any spaces before it; None when it does not stand there."""
    at = _skip(text, at)
    return at + len(wanted) if text.startswith(wanted, at) else None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
