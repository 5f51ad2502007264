"""Read, render, check and count the data of a run before anything is trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audited import AuditOf, longest_allowed
from peftkit.data.encoded_key import digest_rows
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.finding import Seen, Tally
from peftkit.data.findings.told import counts, heed, tell, token_line
from peftkit.data.formats import load_rows
from peftkit.data.overlap import highest_overlap
from peftkit.data.part import Encoding, Part, attempt, encode
from peftkit.data.sides import divide, read_sides
from peftkit.data.spec import DataSpec, recorded_rendering
from peftkit.data.template import Rendering
from peftkit.events import Note, Report, silent


@dataclass(frozen=True, kw_only=True)
class Audit(AuditOf[Part]):
    """Conversations and texts, and how they are rendered."""

    rendering: Rendering


def audit(
    spec: DataSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent, cache: Path | None = None
) -> Audit:
    """Read, encode and examine training and held-out rows; `limit` is the base's longest sequence.

    What takes long is kept below the folder `cache`, if one is given, and found there the next time; not with
    `spec.cache` switched off.

    Raises DataError listing every finding that makes the run certainly wrong, unless `data.accept` names its rule.
    """
    result = inspect(spec, tokenizer, limit, report, cache)
    heed(result.findings, report)
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
    length = longest_allowed(spec.max_length, limit, report)
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
        losses(encoding, spec, length, tally)
    check_all([(rows.part.rows, rows.part.examples) for rows in (train, held)], tokenizer, tally)
    parts = {"train": train.part, "held_out": held.part}
    result = Audit(**parts, rendering=spec.rendering, overlap=overlap, findings=tally.findings(spec.accept))
    report_counts(result, report)
    return result


def losses(encoding: Encoding, spec: DataSpec, length: int | None, tally: Tally) -> None:
    """Count rows that did not come through encoding whole."""
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


def report_counts(data: Audit, report: Report) -> None:
    """Report how much data there is, and what was found in it."""
    report(counts((data.train, data.held_out)))
    report(token_line(data.tokens))
    learned = data.train.answer_tokens / max(1, data.train.tokens)
    report(Note(f"the loss falls on {learned:.0%} of the training tokens"))
    report(Note(f"highest word 8-gram overlap of a held-out prompt with the training prompts: {data.overlap:.2f}"))
    tell(data.findings, report)


__all__ = [
    "Audit",
    "DataSpec",
    "Part",
    "audit",
    "divide",
    "encode",
    "inspect",
    "recorded_rendering",
]
