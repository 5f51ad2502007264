"""Read, render, check and count the preferences of a run before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audited import AuditOf, longest_allowed
from peftkit.data.encoded_key import digest_rows
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.finding import Finding, Seen, Tally
from peftkit.data.findings.told import counts, heed, heed_measured, tell
from peftkit.data.formats import Row
from peftkit.data.overlap import highest_overlap
from peftkit.data.preference.encode import PreferenceEncoding, contrasted, encode_preferences
from peftkit.data.preference.example import PreferenceExample, PreferencePart
from peftkit.data.preference.rows import PreferenceRow, PreferenceSet, load_preferences
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.data.split import split
from peftkit.data.template import Rendering
from peftkit.errors import DataError
from peftkit.events import Note, Report, silent

_MOSTLY_LONGER = 0.65
"""Share of pairs from which on "prefer the longer answer" is the rule that is easiest to learn (arXiv 2403.19159)."""
_FEWEST = 20
"""Pairs from which on such a share says anything."""


@dataclass(frozen=True, kw_only=True)
class PreferenceAudit(AuditOf[PreferencePart]):
    """Preferences, and how they are rendered; the words that are looked at are those of the better answers."""

    rendering: Rendering
    lengths: dict[str, float]
    """Of the training rows: mean answer tokens of both sides, and the share of pairs whose better answer is longer."""

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens per sequence, of which a pair has two: counts between edges."""
        from peftkit.data.findings.lengths import histogram

        parts = (self.train, self.held_out)
        return histogram(*([s for example in part.examples for s in example.sequences] for part in parts))

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds. Its excerpts come from the rows, so it stays in the run's folder."""
        return {**super().record(), "lengths": self.lengths}


def audit_preference(
    spec: PreferenceSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent, cache: Path | None = None
) -> PreferenceAudit:
    """Read, encode and examine training and held-out preferences; `limit` is the base's longest sequence.

    What was found in the words of many rows is kept below the folder `cache`, if one is given. Raises DataError listing
    every finding that makes the run certainly wrong, unless `data.accept` names its rule.
    """
    result = inspect_preference(spec, tokenizer, limit, report, cache)
    heed(result.findings, report)
    return result


def inspect_preference(
    spec: PreferenceSpec, tokenizer: Tokenizer, limit: int | None, report: Report = silent, cache: Path | None = None
) -> PreferenceAudit:
    """As `audit_preference`, but findings that would stop a run are returned with the others."""
    from peftkit.data.findings.kept import examine
    from peftkit.data.findings.lengths import check_all

    sides = _sides(spec, report)
    length = longest_allowed(spec.max_length, limit, report)
    better, better_held = (_better(rows) for rows, _ in sides)
    store = EncodedStore(cache, report) if cache is not None else None
    digests = (digest_rows(better), digest_rows(better_held)) if store is not None else ("", "")
    asked = partial(highest_overlap, better_held, better)
    examined = examine(better, better_held, tokenizer.control, None, asked, store, digests)
    train = contrasted(encode_preferences(*sides[0], "train", tokenizer, spec, length), spec, length)
    held = contrasted(encode_preferences(*sides[1], "held_out", tokenizer, spec, length), spec, length)
    tally, overlap = examined()
    for source in {id(source): source for _, source in sides}.values():
        _unreadable(source, tally)
    for encoding in (train, held):
        _losses(encoding, spec, length, tally)
    parts = [
        ([row.chosen for row in encoding.part.rows], [example.chosen for example in encoding.part.examples])
        for encoding in (train, held)
    ]
    check_all(parts, tokenizer, tally)
    lengths = answer_lengths(train.part.examples)
    found = [_not_cut(finding) for finding in tally.findings(spec.accept)]
    findings = tuple(sorted((*found, *_length_bias(lengths)), key=_order))
    result = PreferenceAudit(
        train=train.part,
        held_out=held.part,
        rendering=spec.rendering,
        overlap=overlap,
        lengths=lengths,
        findings=findings,
    )
    _report_counts(result, report)
    return result


def encode_measured(
    spec: PreferenceSpec, found: PreferenceSet, tokenizer: Tokenizer, limit: int | None, report: Report = silent
) -> PreferencePart:
    """Encode rows that are measured alone, as `audit_preference` does held-out rows.

    Raises DataError with every row that cannot be used.
    """
    length = longest_allowed(spec.max_length, limit)
    encoding = encode_preferences(found.rows, found, "held_out", tokenizer, spec, length)
    tally = Tally(0, len(found.rows))
    _unreadable(found, tally)
    _losses(encoding, spec, length, tally)
    heed_measured(tally.findings(spec.accept), report, "--too-long drop leaves them out")
    return encoding.part


def answer_lengths(examples: Sequence[PreferenceExample]) -> dict[str, float]:
    """Mean answer tokens of the better and the worse answers, and of pairs the share whose better one is longer."""
    if not examples:
        return {}
    if examples[0].rejected is None:
        wanted, unwanted = (
            [example.answer_tokens for example in examples if example.desirable is flag] for flag in (True, False)
        )
        return {
            name: float(np.mean(tokens))
            for name, tokens in (("desirable", wanted), ("undesirable", unwanted))
            if tokens
        }
    chosen = np.array([example.chosen.answer_tokens for example in examples])
    rejected = np.array([example.rejected.answer_tokens for example in examples if example.rejected is not None])
    return {
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "chosen_longer": float((chosen > rejected).mean()),
        "pairs": float(len(examples)),
    }


def _sides(
    spec: PreferenceSpec, report: Report
) -> tuple[tuple[Sequence[PreferenceRow], PreferenceSet], tuple[Sequence[PreferenceRow], PreferenceSet]]:
    """Training rows and held-out rows, each with the set they come from; rows of one prompt stay on one side."""
    if spec.train is None:
        raise DataError(
            "data.train is not set", expected="a file of preferences", hint="peftkit train … data.train=pairs.jsonl"
        )
    found = load_preferences(spec.train, spec.kind)
    report(Note(f"{found.source}: {len(found.rows)} rows, format {found.format} ({found.reason})"))
    if spec.held_out:
        held = load_preferences(spec.held_out, spec.kind)
        report(Note(f"{held.source}: {len(held.rows)} held-out rows, format {held.format}"))
        return (found.rows[: spec.max_train_rows], found), (held.rows[: spec.max_held_out_rows], held)
    prompts = {repr(row.prompt) for row in found.rows}
    parts = split(
        found.rows,
        spec.held_out_share,
        spec.seed,
        key=lambda row: repr(row.prompt if len(prompts) > 1 else row.chosen.messages),
    )
    report(Note(f"no data.held_out: {len(parts.held_out)} rows set aside with seed {spec.seed}"))
    return (parts.train[: spec.max_train_rows], found), (parts.held_out[: spec.max_held_out_rows], found)


def _better(rows: Sequence[PreferenceRow]) -> list[Row]:
    """The conversations whose answers are to be given; all of them where none is wanted."""
    return [row.chosen for row in rows if row.desirable is not False] or [row.chosen for row in rows]


def _unreadable(source: PreferenceSet, tally: Tally) -> None:
    if source.problems:
        seen = [Seen(str(each.where), str(each).removeprefix(f"{each.where}: ")) for each in source.problems]
        tally.say("unreadable", len({each.where.index for each in source.problems}), "", seen)


def _losses(encoding: PreferenceEncoding, spec: PreferenceSpec, length: int | None, tally: Tally) -> None:
    """Findings about rows that did not come through encoding whole."""
    part = encoding.part
    if encoding.refused:
        facts = [Seen(place, error.fact.removeprefix(f"{place}: ")) for place, error in encoding.refused]
        tally.say("unusable", len(facts), "", facts)
    if encoding.too_long:
        rule, limit = "too_long" if spec.too_long == "raise" else "left_out", f"{length} tokens"
        detail = limit if spec.too_long == "raise" else f"longer than {limit} with one of its answers"
        tally.say(
            rule, len(encoding.too_long), detail, [Seen(at, f"{tokens} tokens") for at, tokens in encoding.too_long]
        )
    if not part.examples:
        tally.say("nothing_to_learn", 1, f"{part.role} row of {part.source}")


def _length_bias(lengths: dict[str, float]) -> tuple[Finding, ...]:
    """That the better answers are mostly the longer ones, which is then what a run learns first."""
    share, pairs = lengths.get("chosen_longer", 0.0), int(lengths.get("pairs", 0))
    if pairs < _FEWEST or share < _MOSTLY_LONGER:
        return ()
    text = (
        f"the better answer is the longer one in {share:.0%} of {pairs:,} training pairs (mean {lengths['chosen']:.0f} "
        f"tokens against {lengths['rejected']:.0f}), so that length alone can be learned"
    )
    mend = "read the accuracy per token beside the plain one; balance the lengths if long answers are not the aim"
    return (Finding("length_bias", "warning", round(share * pairs), share, (), text, mend),)


def _not_cut(finding: Finding) -> Finding:
    """The same advice as for supervised rows, without the cut that preferences do not get."""
    if finding.rule != "too_long":
        return finding
    return replace(finding, mend="set data.max_length higher, or choose data.too_long=drop")


def _order(finding: Finding) -> int:
    return ("error", "warning", "note").index(finding.severity)


def _report_counts(data: PreferenceAudit, report: Report) -> None:
    report(counts((data.train, data.held_out), examples="used"))
    if data.lengths:
        sides = " · ".join(f"{name} {value:.4g}" for name, value in data.lengths.items())
        report(Note(f"answer tokens on average: {sides}"))
    report(Note(f"highest word 8-gram overlap of a held-out prompt with the training prompts: {data.overlap:.2f}"))
    tell(data.findings, report)
