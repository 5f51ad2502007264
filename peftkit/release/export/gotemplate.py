"""Go's text/template as far as peftkit writes it: enough to know what Ollama will render, and nothing more.

Text, `{{ value }}`, `if`, `else if`, `else`, `range $i, $m := list`, `end`, and the functions eq, ne, and, or, not, len
and index. Anything else is an error here, never a guess. Reference: https://pkg.go.dev/text/template; the engines tests
compare this file with Go itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.errors import DeltaError

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\\n]|\\.)*"|:=|[(),]|-?\d+|[$.]?[\w$.]*[\w.$]')


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Value:
    words: tuple[str, ...]


@dataclass(frozen=True)
class _If:
    branches: tuple[tuple[tuple[str, ...] | None, tuple[Any, ...]], ...]
    """(condition, body); None is `else`."""


@dataclass(frozen=True)
class _Range:
    index: str
    item: str
    words: tuple[str, ...]
    body: tuple[Any, ...]


Node = _Text | _Value | _If | _Range
Scope = dict[str, Any]


def quoted(text: str) -> str:
    """Plain text as template source: braces that would begin an action become strings."""
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, data: Mapping[str, Any]) -> str:
    """What Go renders for `data`. Raises DeltaError for syntax outside the subset, or a value that is not there."""
    pieces = list(_pieces(template))
    body, end = _body(pieces, 0)
    if end != len(pieces):
        raise _unreadable(" ".join(pieces[end][1]), "an `end` or `else` without its beginning")
    return "".join(_rendered(body, {"$": data, ".": data}))


def _pieces(template: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(text, words): plain text with no words, or an action's words with no text; `{{-` and `-}}` trim their sides."""
    last, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[last : found.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if found[1] else text
        if text:
            yield text, ()
        yield "", _words(found[2])
        last, trim = found.end(), bool(found[3])
    text = template[last:].lstrip(" \t\r\n") if trim else template[last:]
    if "{{" in text:
        raise _unreadable(text[:40], "an action that does not end")
    if text:
        yield text, ()


def _words(action: str) -> tuple[str, ...]:
    words = tuple(_WORD.findall(action))
    if not words or "".join(words) != re.sub(r'("(?:[^"\\\n]|\\.)*")|\s+', lambda found: found[1] or "", action):
        raise _unreadable(action, "it cannot be read")
    return words


def _body(pieces: list[tuple[str, tuple[str, ...]]], start: int) -> tuple[tuple[Node, ...], int]:
    """Nodes from `start` up to the `end` or `else` that closes this body, and where that stands."""
    nodes: list[Node] = []
    at = start
    while at < len(pieces):
        text, words = pieces[at]
        if not words:
            nodes.append(_Text(text))
        elif words[0] in ("end", "else"):
            break
        elif words[0] == "if":
            node, at = _if(pieces, at)
            nodes.append(node)
        elif words[0] == "range":
            if len(words) < 6 or words[2] != "," or words[4] != ":=":
                raise _unreadable(" ".join(words), "`range $i, $m := list` is the only form")
            body, at = _body(pieces, at + 1)
            _expect_end(pieces, at)
            nodes.append(_Range(words[1], words[3], words[5:], body))
        else:
            nodes.append(_Value(words))
        at += 1
    return tuple(nodes), at


def _if(pieces: list[tuple[str, tuple[str, ...]]], at: int) -> tuple[_If, int]:
    branches: list[tuple[tuple[str, ...] | None, tuple[Any, ...]]] = []
    condition: tuple[str, ...] | None = pieces[at][1][1:]
    while True:
        body, at = _body(pieces, at + 1)
        branches.append((condition, body))
        words = pieces[at][1] if at < len(pieces) else ()
        if words[:2] == ("else", "if") and condition is not None:
            condition = words[2:]
        elif words == ("else",) and condition is not None:
            condition = None
        else:
            _expect_end(pieces, at)
            return _If(tuple(branches)), at


def _expect_end(pieces: list[tuple[str, tuple[str, ...]]], at: int) -> None:
    if at >= len(pieces) or pieces[at][1] != ("end",):
        raise _unreadable("if or range", "it has no `end`")


def _rendered(nodes: Sequence[Node], scope: Scope) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, _Text):
            yield node.text
        elif isinstance(node, _Value):
            yield str(_value(node.words, scope))
        elif isinstance(node, _If):
            for condition, body in node.branches:
                if condition is None or _value(condition, scope):
                    yield from _rendered(body, scope)
                    break
        else:
            for number, item in enumerate(_value(node.words, scope)):
                yield from _rendered(node.body, {**scope, node.index: number, node.item: item, ".": item})


def _value(words: Sequence[str], scope: Scope) -> Any:
    value, end = _term(words, 0, scope, arguments=True)
    if end != len(words):
        raise _unreadable(" ".join(words), f"{words[end]!r} is too much")
    return value


def _term(words: Sequence[str], at: int, scope: Scope, *, arguments: bool = False) -> tuple[Any, int]:
    """The operand at `at`, or with `arguments` a function call that takes everything up to a bracket."""
    word = words[at] if at < len(words) else ""
    if word == "(":
        value, at = _term(words, at + 1, scope, arguments=True)
        if words[at : at + 1] != (")",):
            raise _unreadable(" ".join(words), "a bracket does not close")
        return value, at + 1
    if word in _FUNCTIONS and arguments:
        values: list[Any] = []
        at += 1
        while at < len(words) and words[at] != ")":
            value, at = _term(words, at, scope)
            values.append(value)
        return _FUNCTIONS[word](*values), at
    if word.startswith('"'):
        return json.loads(word), at + 1
    if re.fullmatch(r"-?\d+", word):
        return int(word), at + 1
    return _field(word, scope), at + 1


def _field(word: str, scope: Scope) -> Any:
    """`.Role`, `$m.Role`, `$.Messages`, `$m` or `.`."""
    start, *names = word.split(".")
    value = scope.get(start or ".", scope) if start or word.startswith(".") else scope
    if value is scope:
        raise _unreadable(word, "no such name")
    for name in filter(None, names):
        if not isinstance(value, Mapping) or name not in value:
            raise _unreadable(word, f"no {name}")
        value = value[name]
    return value


def _all(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _any(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "and": _all,
    "or": _any,
    "not": lambda value: not value,
    "len": len,
    "index": lambda value, at: value[at],
}


def _unreadable(where: str, why: str) -> DeltaError:
    return DeltaError(f"this Go template cannot be rendered: {where!r}: {why}", expected="the subset in gotemplate.py")
