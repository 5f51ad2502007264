"""The turns of a conversation, as files hold them → messages in OpenAI's shape, and what is wrong with them."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from peftkit.data.json_records import parse_json
from peftkit.data.readers import Where

Turn = dict[str, Any]
Turns = list[tuple[str, Turn]]  # each with the field it came from

OPENAI = {role: role for role in ("system", "user", "assistant", "tool")}
"""The roles that speakers in `messages` stand for; `SHAREGPT`: those in `conversations`."""
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "observation": "tool", "function_call": "assistant"}  # fmt: skip
_MEANT = {"bot": "assistant", "model": "assistant", "developer": "system", "function": "tool", **SHAREGPT}
_TURN = ("role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Problem:
    """One thing that makes a row unusable."""

    where: Where
    field: str
    found: str
    expected: str
    nearest: str | None = None

    def __str__(self) -> str:
        nearest = f" ({self.nearest})" if self.nearest else ""
        return f"{self.where}: {self.field}: found {self.found}, expected {self.expected}{nearest}"


class TurnReader:
    """Turns what one record says into messages; notes each problem, and goes on with a stand-in after it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: Counter[str] = Counter()
        self.where = Where("", None, 0)

    def wrong(self, field: str, found: str, expected: str, nearest: str | None = None) -> None:
        self.problems.append(Problem(self.where, field, found, expected, nearest))

    def text(self, value: Any, field: str, blank: bool = False) -> str:
        """Return a text exactly as it is; a stand-in where it was refused, so that one problem is not told twice."""
        if not isinstance(value, str):
            self.wrong(field, show(value), "a text")
        elif not blank and not value.strip():
            self.wrong(field, f"an empty text ({value!r:.20})", "some text")
        elif not _encodes(value):
            self.wrong(field, "half a surrogate pair, which is no character", "text that UTF-8 can hold")
        else:
            return value
        return "?"

    def parsed(self, value: Any, field: str, kind: type[list[Any] | dict[str, Any]], needed: bool = False) -> Any:
        """Return a list or object, also from JSON in a string (csv cannot nest); empty if refused or absent."""
        if not needed and value in (None, ""):
            return kind()
        parsed = value
        if isinstance(value, str):
            try:
                parsed = parse_json(value)
            except (ValueError, RecursionError):
                parsed = None
        if isinstance(parsed, kind):
            return parsed
        name = "a list" if kind is list else "an object"
        self.wrong(field, show(value), f"{name}, or {name} as JSON in a string")
        return kind()

    def turns(self, value: Any, field: str, keys: tuple[str, str], roles: dict[str, str]) -> Turns:
        told = len(self.problems)
        turns = self.parsed(value, field, list, needed=True)
        if len(self.problems) > told:
            return [(field, {"role": None, "content": "?"})]
        return [(f"{field}[{at}]", self.turn(raw, f"{field}[{at}]", keys, roles)) for at, raw in enumerate(turns)]

    def turn(self, raw: Any, field: str, keys: tuple[str, str], roles: dict[str, str]) -> Turn:
        """Return one message, its role None where it cannot be known."""
        said, held = keys
        if not isinstance(raw, dict) or said not in raw:
            other = {"role": "messages", "from": "sharegpt"}
            like = next((name for key, name in other.items() if isinstance(raw, dict) and key in raw), None)
            column = "messages" if like == "messages" else "conversations"
            nearest = f"nearest format: {like}; rename the column to {column!r}" if like else None
            self.wrong(field, show(raw), f"an object with {said!r} and {held!r}", nearest)
            return {"role": None, "content": "?"}
        speaker = raw[said]
        role = roles.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            role = _meant(speaker)
            near = next((name for name, plain in roles.items() if plain == role), None)
            self.wrong(
                f"{field}.{said}", show(speaker), f"one of {', '.join(roles)}", near and f"did you mean {near!r}?"
            )
        extra = {key: value for key, value in raw.items() if key not in keys and value is not None}
        for key in extra:
            self.entry(key, field, raw, role)
        turn: Turn = {**extra, "role": role, "content": ""}
        content = raw.get(held)
        if speaker == "function_call" and roles is SHAREGPT:
            kind: Any = dict if isinstance(content, dict) or str(content).lstrip().startswith("{") else list
            calls = self.parsed(content, f"{field}.{held}", kind, needed=True)
            turn["tool_calls"] = calls if isinstance(calls, list) else [calls]
        if turn.get("tool_calls"):
            calls = self.parsed(turn["tool_calls"], f"{field}.tool_calls", list)
            turn["tool_calls"] = [self.call(call, f"{field}.tool_calls[{at}]") for at, call in enumerate(calls)]
        if speaker != "function_call" and not (content is None and turn.get("tool_calls")):
            blank = role in ("system", "tool") or bool(turn.get("tool_calls"))
            turn["content"] = self.content(content, f"{field}.{held}", blank)
        return turn

    def entry(self, key: str, field: str, raw: dict[str, Any], role: str | None) -> None:
        """Check one entry of a message beside its speaker and content."""
        if key in ("name", "tool_call_id", "reasoning_content"):
            self.text(raw[key], f"{field}.{key}", blank=True)
        elif key in ("role", "content"):
            self.wrong(f"{field}.{key}", f"an entry {key!r} beside 'from' and 'value'", "one spelling, not both")
        elif key == "tool_calls" and role != "assistant":
            self.wrong(f"{field}.{key}", f"tool calls by {role}", "tool calls by the assistant only")
        elif key == "function_call":
            self.wrong(f"{field}.{key}", show(raw[key]), "'tool_calls', which took its place")
        elif key not in _TURN:
            if meant := misspelt(key, tuple(name for name in _TURN if name not in raw)):
                self.wrong(field, f"an entry {key!r}", f"one of {', '.join(_TURN)}", f"did you mean {meant!r}?")
            self.notes[f"messages keep an entry {key!r}, which only a chat template may read"] += 1

    def content(self, content: Any, field: str, blank: bool) -> str:
        """Return a message's text, its text parts joined; images and sounds are refused by name."""
        if not isinstance(content, list):
            return self.text(content, field, blank)
        texts = []
        for at, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                texts.append(self.text(part.get("text"), f"{field}[{at}].text", blank=True))
            else:
                found = f"a part of type {kind!r}" if kind else show(part)
                self.wrong(f"{field}[{at}]", found, "parts of type 'text': peftkit learns from text only")
                texts.append("?")
        return self.text("".join(texts), field, blank)

    def call(self, call: Any, field: str) -> dict[str, Any]:
        """Return one tool call in OpenAI's shape, its arguments an object."""
        outer = dict(call) if isinstance(call, dict) else {}
        inner = outer.pop("function", None)
        if inner is None:
            inner = {key: outer.pop(key) for key in ("name", "arguments") if key in outer}
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            self.wrong(field, show(call), "{'function': {'name': …, 'arguments': {…}}} with a name")
            return {"type": "function", "function": {"name": "?", "arguments": {}}}
        given = inner.get("arguments")
        arguments = {} if given is None else self.parsed(given, f"{field}.function.arguments", dict, needed=True)
        outer = {key: value for key, value in outer.items() if value is not None}
        return {**outer, "type": "function", "function": {**inner, "arguments": arguments}}

    def sequence(self, turns: Turns) -> None:
        """Check who speaks after whom, and that there is an answer to learn, unless a speaker is unknown."""
        calls: set[str] = set()
        before: str | None = None
        for at, (field, turn) in enumerate(turns):
            role = turn["role"]
            if role is None:
                return
            if role == "system" and at:
                first = turns[0][1]["role"] == "system"
                found = "a second system message" if first else f"a system message as message {at + 1}"
                self.wrong(field, found, "one system message, and that first")
            elif role == before and role in ("user", "assistant"):
                self.wrong(field, f"two {role} messages in a row", "user and assistant in turn")
            elif role == "tool" and before not in ("assistant", "tool"):
                self.wrong(field, f"a tool result after {before or 'nothing'}", "a tool result after the assistant")
            if role == "assistant":
                calls |= {str(call["id"]) for call in turn.get("tool_calls", ()) if "id" in call}
            elif turn.get("tool_call_id") and str(turn["tool_call_id"]) not in calls:
                among = ", ".join(map(repr, sorted(calls))) or "none, as no call before it has an id"
                self.wrong(f"{field}.tool_call_id", repr(turn["tool_call_id"]), f"the id of a call: {among}")
            before = role
        if not any(turn["role"] == "assistant" for _, turn in turns):
            self.wrong(_column(turns), "no assistant message (nothing to learn)", "at least one answer")
        elif before != "assistant":
            self.wrong(turns[-1][0], f"a {before} message at the end, unanswered", "an assistant message as the last")


@lru_cache(maxsize=4096)
def misspelt(name: str, missing: tuple[str, ...]) -> str | None:
    """Return the missing name that a name was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, missing, n=1, cutoff=0.8)), None)


def show(value: Any) -> str:
    """Return a value as a message shows it: short, and null as JSON spells it."""
    return "null" if value is None else f"{value!r:.60}"


def _column(turns: Turns) -> str:
    return turns[-1][0].partition("[")[0] if turns else "messages"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _meant(speaker: Any) -> str | None:
    """Return the role that an unknown speaker most likely stands for."""
    near = difflib.get_close_matches(str(speaker).lower(), _MEANT, n=1, cutoff=0.6)
    return _MEANT[near[0]] if near else None
