"""Read, render, check and count the data of a run before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.encoded import lengths
from peftkit.data.encoded_key import digest_rows
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.finding import Finding, Seen, Tally
from peftkit.data.formats import load_rows
from peftkit.data.overlap import highest_overlap
from peftkit.data.part import Encoding, Part, attempt, encode
from peftkit.data.sides import divide, read_sides
from peftkit.data.spec import DataSpec, recorded_rendering
from peftkit.data.template import Rendering
from peftkit.errors import DataError
from peftkit.events import Note, Report, Table, Warned, silent
from peftkit.render import sparkline


@dataclass(frozen=True)
class Audit:
    """The data of a run, ready to train on and to measure with."""

    train: Part
    held_out: Part
    rendering: Rendering
    overlap: float
    """Highest share of a held-out prompt's word 8-grams that occur anywhere in the training prompts."""
    findings: tuple[Finding, ...] = ()
    """What is wrong or worth knowing: errors first."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop a run."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens per sequence: counts between edges."""
        from peftkit.data.findings.lengths import histogram

        return histogram(self.train.examples, self.held_out.examples)

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds. Its excerpts come from the rows, so it stays in the run's folder."""
        return {
            "findings": [finding.record() for finding in self.findings],
            "tokens": self.tokens,
            "parts": [self.train.record(), self.held_out.record()],
            "overlap": self.overlap,
        }


def audit(
    spec: DataSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent, cache: Path | None = None
) -> Audit:
    """Read, encode and examine training and held-out rows; `limit` is the base's longest sequence.

    What takes long is kept below the folder `cache`, if one is given, and found there the next time; not with
    `spec.cache` switched off.

    Raises DataError listing every finding that makes the run certainly wrong, unless `data.accept` names its rule.
    """
    result = inspect(spec, tokenizer, limit, report, cache)
    for finding in result.findings:
        if finding.severity == "warning":
            report(Warned(f"{finding.text}: {_places(finding)}" if finding.examples else finding.text, finding.mend))
    if result.errors:
        raise refusal(result.errors)
    return result


def inspect(
    spec: DataSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent, cache: Path | None = None
) -> Audit:
    """As `audit`, but findings that would stop a run are returned with the others."""
    from peftkit.data.findings.kept import examine
    from peftkit.data.findings.lengths import check_all

    sides = read_sides(spec, report)
    train_rows, held_rows = sides.train, sides.held_out
    against = load_rows(spec.against) if spec.against else None
    length = min(filter(None, (spec.max_length, limit)), default=None)
    if spec.max_length and limit and spec.max_length > limit:
        report(Warned(f"data.max_length={spec.max_length} is above the base's longest sequence, so {limit} holds"))
    other = (Path(against.source).name, against.rows) if against else None
    store = EncodedStore(cache, report) if cache is not None and spec.cache else None
    digests = (digest_rows(train_rows), digest_rows(held_rows)) if store is not None else ("", "")
    asked = partial(highest_overlap, held_rows, train_rows)
    examined = examine(sides.distinct, held_rows, tokenizer.control, other, asked, store, digests)
    train = attempt(train_rows, sides.train_set, "train", tokenizer, spec, length, store=store, sha256=digests[0])
    held = attempt(held_rows, sides.held_set, "held_out", tokenizer, spec, length, store=store, sha256=digests[1])
    tally, overlap = examined()
    for dataset in sides.read:
        problems = [
            Seen(str(problem.where), str(problem).removeprefix(f"{problem.where}: ")) for problem in dataset.problems
        ]
        if problems:
            tally.say("unreadable", len({problem.where.index for problem in dataset.problems}), "", problems)
    for encoding in (train, held):
        _losses(encoding, spec, length, tally)
    check_all([(rows.part.rows, rows.part.examples) for rows in (train, held)], tokenizer, tally)
    result = Audit(train.part, held.part, spec.rendering, overlap, tally.findings(spec.accept))
    _report_counts(result, report)
    return result


def refusal(errors: Sequence[Finding]) -> DataError:
    """One error for all findings that stop a run."""
    listed = "\n".join(f"- {describe(finding)}" for finding in errors)
    many = "1 finding stops" if len(errors) == 1 else f"{len(errors)} findings stop"
    return DataError(f"{many} this run:\n{listed}", hint=consent(errors))


def consent(errors: Sequence[Finding]) -> str | None:
    """The setting that lets a run start all the same, where there is one."""
    rules = [finding.rule for finding in errors if not finding.final]
    return f"if it is meant so: data.accept=[{','.join(rules)}]" if rules else None


def describe(finding: Finding) -> str:
    """A finding with its examples and how to mend it, in several lines."""
    examples = [f"\n    {seen.where}: {seen.excerpt}" for seen in finding.examples]
    rest = finding.count - len(examples)
    more = f"\n    and {rest:,} more" if examples and rest > 0 else ""
    accepted = " (accepted)" if finding.accepted else ""
    mend = f"\n    to mend it: {finding.mend}" if finding.mend else ""
    return f"{finding.rule}{accepted}: {finding.text}{''.join(examples)}{more}{mend}"


def _losses(encoding: Encoding, spec: DataSpec, length: int | None, tally: Tally) -> None:
    """Findings about rows that did not come through encoding whole."""
    part, limit = encoding.part, f"{length} tokens"
    if encoding.refused:
        facts = [Seen(place, error.fact.removeprefix(f"{place}: ")) for place, error in encoding.refused]
        tally.say("unusable", len(facts), encoding.refused[0][1].hint or "", facts)
    if encoding.too_long and spec.too_long in ("raise", "split"):
        tokens = [Seen(place, f"{count} tokens") for place, count in encoding.too_long.items()]
        tally.say("too_long", len(tokens), limit, tokens)
    elif part.dropped:
        above = "longer than" if spec.too_long == "drop" else "their answer begins after"
        tally.say(
            "left_out",
            len(part.dropped),
            f"{above} {limit}",
            [Seen(place, f"{above} {limit}") for place in part.dropped],
        )
    if part.truncated:
        tally.say("cut", len(part.truncated), limit, [Seen(place, f"cut at {limit}") for place in part.truncated])
    if not part.examples:
        tally.say("nothing_to_learn", 1, f"{part.role} row of {part.source}")


def _report_counts(data: Audit, report: Report) -> None:
    parts = (data.train, data.held_out)
    rows = tuple(
        (
            part.role.replace("_", "-"),
            len(part.rows),
            len(part.examples),
            part.tokens,
            part.answer_tokens,
            int(lengths(part.examples).max(initial=0)),
            len(part.dropped),
            len(part.truncated),
        )
        for part in parts
    )
    columns = ("data", "rows", "sequences", "tokens", "learned tokens", "longest", "left out", "cut")
    report(Table("data", columns, rows))
    tokens = data.tokens
    report(Note(f"tokens per sequence, 0 to {tokens['edges'][-1]:,}: {sparkline(tokens['counts'])}"))
    learned = data.train.answer_tokens / max(1, data.train.tokens)
    report(Note(f"the loss falls on {learned:.0%} of the training tokens"))
    report(Note(f"highest word 8-gram overlap of a held-out prompt with the training prompts: {data.overlap:.2f}"))
    if data.findings:
        found = tuple((f.severity, f.rule, f.count, f"{f.share:.1%}", _first(f), f.text) for f in data.findings)
        report(Table("findings", ("severity", "rule", "count", "share", "first", "what"), found))


def _first(finding: Finding) -> str | None:
    return Path(finding.examples[0].where).name if finding.examples else None


def _places(finding: Finding) -> str:
    rest = finding.count - len(finding.examples)
    return ", ".join(seen.where for seen in finding.examples) + (f" and {rest:,} more" if rest > 0 else "")


__all__ = [
    "Audit",
    "DataSpec",
    "Part",
    "audit",
    "consent",
    "describe",
    "divide",
    "encode",
    "inspect",
    "recorded_rendering",
    "refusal",
]
