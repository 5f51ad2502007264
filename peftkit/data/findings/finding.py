"""What checks look at, what they hit, and what becomes of the hits: counted findings with a few redacted examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from peftkit.data.findings.rules import RULES, Severity
from peftkit.data.formats import Row

LISTED = 5  # examples kept for each rule; all hits are counted
Role = Literal["train", "held_out"]
_WINDOW = 72  # characters of an excerpt


@dataclass(frozen=True)
class RowText:
    """The words of one row, apart by who says them."""

    row: Row
    role: Role
    index: int
    """Position among the rows of its role."""

    @property
    def where(self) -> str:
        """File and line."""
        return str(self.row.where)

    @cached_property
    def prompt(self) -> str:
        """What the user and tools say; empty for a row of plain text."""
        said = (m.get("content") for m in self.row.messages if m["role"] not in ("assistant", "system"))
        return "\n".join(str(text or "") for text in said)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says, turn by turn; none for a row of plain text."""
        said = (m.get("content") for m in self.row.messages if m["role"] == "assistant")
        return tuple(str(text or "") for text in said)

    @cached_property
    def whole(self) -> str:
        """Every text of the row; what spans count in."""
        if self.row.text is not None:
            return self.row.text
        return "\n".join(text for message in self.row.messages for text in _said(message))

    @cached_property
    def chars(self) -> frozenset[str]:
        """The distinct characters of `whole`: most checks need one that a row does not have."""
        return frozenset(self.whole)


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "content"):
        if message.get(key):
            yield str(message[key])
    for call in message.get("tool_calls") or ():
        yield str(call["function"].get("arguments") or "")


class Hit(NamedTuple):
    """One row breaks one rule; the span, counted in `RowText.whole`, is what an example shows."""

    rule: str
    start: int = 0
    end: int = 0
    said: str = ""
    """Shown before the excerpt, such as the place of the other row."""


@dataclass(frozen=True)
class Seen:
    """One example of a finding."""

    where: str
    excerpt: str
    """Some of the row, with everything private masked."""


@dataclass(frozen=True)
class Finding:
    """What was found by one rule."""

    rule: str
    severity: Severity
    count: int
    share: float
    """Of the rows that the rule looks at."""
    examples: tuple[Seen, ...]
    text: str
    mend: str
    final: bool = False
    """`data.accept` does not help."""
    accepted: bool = False
    """`data.accept` names the rule: it is reported, and neither stops the run nor warns."""

    def record(self) -> dict[str, Any]:
        """The finding as plain values."""
        kept = asdict(self)
        del kept["final"]
        return {**kept, "examples": [asdict(seen) for seen in self.examples]}


class Tally:
    """Counts hits by rule and keeps the first few as examples."""

    def __init__(self, train: int, held_out: int) -> None:
        self.totals: dict[str, int] = {"rows": train + held_out, "training rows": train, "held-out rows": held_out}
        """How many rows there are of each kind that `Rule.of` names."""
        self._counts: Counter[str] = Counter()
        self._details: dict[str, str] = {}
        self._examples: dict[str, list[Seen]] = {}
        self._last: dict[str, tuple[str, int]] = {}

    def add(self, row: RowText, hits: Iterable[Hit]) -> None:
        """Count what a row hits, each rule once."""
        for hit in hits:
            if self._last.get(hit.rule) == (row.role, row.index):
                continue
            self._last[hit.rule] = (row.role, row.index)
            self._counts[hit.rule] += 1
            examples = self._examples.setdefault(hit.rule, [])
            if len(examples) < LISTED:
                examples.append(Seen(row.where, excerpt(row.whole, hit)))

    def say(self, rule: str, count: int, detail: str = "", examples: Iterable[Seen] = ()) -> None:
        """Count something of the set as a whole, or give the words that go with what was counted by row."""
        self._counts[rule] += int(count)  # not an integer of numpy, which JSON does not take
        self._details[rule] = detail
        kept = self._examples.setdefault(rule, [])
        kept.extend(list(examples)[: LISTED - len(kept)])

    def as_record(self) -> dict[str, Any]:
        """What was counted, as plain JSON values. Which row was last is not in it: add no hits of rules it has."""
        examples = {rule: [[seen.where, seen.excerpt] for seen in kept] for rule, kept in self._examples.items()}
        return {"totals": self.totals, "counts": self._counts, "details": self._details, "examples": examples}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Tally:
        """The tally that `as_record` wrote."""
        tally = cls(0, 0)
        tally.totals, tally._details = dict(record["totals"]), dict(record["details"])
        tally._counts = Counter(record["counts"])
        tally._examples = {rule: [Seen(*pair) for pair in kept] for rule, kept in record["examples"].items()}
        return tally

    def findings(self, accept: Iterable[str] = ()) -> tuple[Finding, ...]:
        """Every rule that was hit: errors first, then in the order of the table."""
        found = [self._finding(rule, rule in set(accept)) for rule in RULES if self._counts[rule]]
        order = ("error", "warning", "note")
        return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))

    def _finding(self, name: str, accepted: bool) -> Finding:
        rule, count = RULES[name], self._counts[name]
        share = min(1.0, count / max(1, self.totals[rule.of]))
        severity: Severity = rule.severity
        if rule.error_from is not None and share >= rule.error_from:
            severity = "error"
        accepted = accepted and not rule.final
        if accepted:
            severity = "note"
        of = "rows" if rule.of == "sample" else rule.of
        rows = f"{count:,} {of if count != 1 else of.removesuffix('s')}"
        text = rule.says.format(rows=rows, share=f"{share:.1%}", detail=self._details.get(name, ""))
        return Finding(name, severity, count, share, tuple(self._examples[name]), text, rule.mend, rule.final, accepted)


def excerpt(text: str, hit: Hit) -> str:
    """The span of a hit with some of what stands around it, on one line; nothing private is shown."""
    from peftkit.data.findings.private import masked

    around = max(0, _WINDOW - (hit.end - hit.start)) // 2 if hit.end else 0
    first = max(0, min(hit.start - around, len(text) - _WINDOW))
    shown = _plain(masked(text)[first : first + _WINDOW])
    shown = f"{'…' if first else ''}{shown}{'…' if first + _WINDOW < len(text) else ''}"
    return f"{hit.said}: {shown}" if hit.said and hit.end > hit.start else hit.said or shown


def _plain(text: str) -> str:
    """One line that shows what is invisible: "⏎" for a line end, <U+200B> for a character without a shape."""
    shown = []
    for char in text:
        if char == "\n":
            shown.append("⏎")
        elif char.isprintable():
            shown.append(char)
        else:
            shown.append(f"<U+{ord(char):04X}>")
    return "".join(shown)
