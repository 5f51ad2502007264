"""Arguments that stand one by one between tags, as plain text: `<parameter=city>`, `Paris`, `</parameter>`."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peftkit.serving.openai.typed import declared, properties, typed


@dataclass(frozen=True)
class Marks:
    """Where values end in a text."""

    text: str
    pairs: Mapping[int, re.Match[str] | None]
    """By where an argument's name begins: the tag that closes it, where whatever it opens in between is closed too;
    None where the call cannot go on behind that tag."""
    ends: Sequence[re.Match[str]]
    """All that may end a value, from left to right: its own tag, the line of the next argument, the call's end."""
    begins: Sequence[int]
    """Where calls may begin."""

    def ends_after(self, at: int) -> Iterator[re.Match[str]]:
        """What may end a value from a place on."""
        for found in range(bisect_left(self.ends, at, key=re.Match.start), len(self.ends)):
            yield self.ends[found]

    def begun_after(self, at: int) -> int:
        """Where the next call may begin; the text's length where none does."""
        found = bisect_left(self.begins, at)
        return self.begins[found] if found < len(self.begins) else len(self.text)


@dataclass(frozen=True)
class Tags:
    """What a template writes around arguments and their names. Nothing in values is escaped."""

    begin: str
    """Before the name of the function."""
    opening: str
    """Before an argument's name."""
    named: str
    """Between a name and its value."""
    closing: str
    """After a value."""
    end: str
    """After the last argument: a call without it is not whole."""
    apart: str = ""
    """Spaces between two arguments."""
    margins: tuple[str, str] = ("", "")
    """Spaces before and after a value that are no part of it."""

    def marks(self, text: str) -> Marks:
        """Where values end in a text, looked for once: it may hold thousands of calls that come to nothing."""
        ends = list(self._over.finditer(text))
        closing = {end.start(): end for end in ends if end["closing"]}
        opened, pairs = list[int](), dict[int, re.Match[str] | None]()
        for tag in self._tag.finditer(text):
            if tag["opening"]:
                opened.append(tag.end())
            elif opened:
                pairs[opened.pop()] = closing.get(tag.start())
        return Marks(text, pairs, ends, [begin.start() for begin in re.finditer(re.escape(self.begin), text)])

    def read(self, marks: Marks, at: int, schema: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
        """The arguments from `at` on with types by `schema`, and where the text goes on behind their end; None when
        they do not end, or one is given twice, and what comes behind those that are whole."""
        text, arguments = marks.text, dict[str, Any]()
        known, given = properties(schema), set[str]()
        while opened := self._opened.match(text, at):
            twice = opened["name"] in given
            given.add(opened["name"])
            closed = self._closed(marks, opened, known, given)
            if closed is None:
                return None, at
            at = closed.end() if closed["closing"] else closed.start()
            if twice:
                return None, at
            value = text[opened.end() : closed.start()].removeprefix(self.margins[0]).removesuffix(self.margins[1])
            arguments[opened["name"]] = typed(value, declared(schema, opened["name"]), schema)
        ended = self._ended.match(text, at)
        return (None, at) if ended is None else (arguments, ended.end())

    def _closed(
        self, marks: Marks, opened: re.Match[str], known: Container[str], given: Container[str]
    ) -> re.Match[str] | None:
        """What ends a value.

        A value may quote calls. So first comes the tag that closes it when those in the value close each other, if the
        call can go on there; then the first one behind which it can. One that was left out (models do that) is where
        the line of an argument begins that is known and not given yet, or the end stands, unless another call or
        another argument has begun before.
        """
        if (paired := marks.pairs.get(opened.start("name"))) is not None:
            return paired
        quoting, begun = False, marks.begun_after(opened.end())
        for end in marks.ends_after(opened.end()):
            if end["closing"]:
                return end
            last = end["name"] is None or (end["name"] in known and end["name"] not in given)
            if begun < end.start() or (last and quoting):
                return None
            if last:
                return end
            quoting = True
        return None

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile(f"(?P<opening>{_loose(self.opening)})|{_loose(self.closing)}")

    @cached_property
    def _opened(self) -> re.Pattern[str]:
        return re.compile(rf"\s*{_loose(self.opening)}(?P<name>[^\n<>]+?){_loose(self.named)}")

    @cached_property
    def _ended(self) -> re.Pattern[str]:
        return re.compile(rf"\s*{_loose(self.end)}")

    @cached_property
    def _over(self) -> re.Pattern[str]:
        opening, end = _loose(self.opening), _loose(self.end)
        return re.compile(
            rf"(?P<closing>{_loose(self.closing)})(?=\s*(?:{opening}|{end}))"
            rf"|{self.apart}{opening}(?P<name>[^\n<>]+?){_loose(self.named)}|{end}"
        )


def _loose(words: str) -> str:
    """A pattern of words, however many spaces stand between them."""
    return r"\s*".join(map(re.escape, words.split()))
