"""What the rows of a task show: repeated and leaked rows, labels that contradict, lack or outweigh each other."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from peftkit.base.head import Head
from peftkit.data.findings import private, text
from peftkit.data.findings.finding import LISTED, Finding, Hit, Role, RowText, Seen, Tally
from peftkit.data.formats import Row
from peftkit.data.tasks.contents import asked, plain_text
from peftkit.data.tasks.encode import Encoded
from peftkit.data.tasks.heads import labels_in
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskRow

_IMBALANCE = 0.9
_RARE = 2
_FAR = 10
"""Numbers whose mean, or whose deviation either way, is so many times 1: a head begins at numbers around 0, and its
rates are for steps of that size."""
_PLAIN = re.compile(r"[\W_]+")


def examine(train: Sequence[TaskRow], held_out: Sequence[TaskRow], head: Head) -> Tally:
    """Look at the rows, the training rows each once; rules are those of `data.findings.rules`."""
    tally = Tally(len(train), len(held_out))
    sides: tuple[tuple[Role, Sequence[TaskRow]], ...] = (("train", train), ("held_out", held_out))
    writes = head.kind == "seq2seq"
    seen = {role: [_text(row, role, at, writes=writes) for at, row in enumerate(rows)] for role, rows in sides}
    for row in (*seen["train"], *seen["held_out"]):
        if row.whole:
            tally.add(row, private.check(row))
            tally.add(row, text.check(row))
    _repeated(train, held_out, seen, tally)
    if head.labels and head.problem != "regression":
        _labels(train, held_out, seen, head, tally)
    return tally


def _text(row: TaskRow, role: Role, index: int, *, writes: bool) -> RowText:
    """A row as the checks of words take it; a text that is to be written counts too."""
    whole = "\n".join(filter(None, (plain_text(row), row.target if writes else "")))
    return RowText(Row((), whole, None, {}, {}, row.where), role, index)


def _repeated(
    train: Sequence[TaskRow], held_out: Sequence[TaskRow], seen: dict[Role, list[RowText]], tally: Tally
) -> None:
    first: dict[str, int] = {}
    conflicts: list[tuple[int, int]] = []
    for at, key in enumerate(map(asked, train)):
        twin = first.setdefault(key, at)
        if twin != at and train[twin].target == train[at].target:
            tally.add(seen["train"][at], [Hit("duplicate", said=f"like {train[twin].where}", end=60)])
        elif twin != at:
            conflicts.append((at, twin))
    # Where most rows ask what others ask (several captions of one picture), that is the task.
    if len(conflicts) < 0.5 * len(first):
        for at, twin in conflicts:
            said = f"{_said(train[at])}, and {_said(train[twin])} at {train[twin].where}"
            tally.add(seen["train"][at], [Hit("conflict", said=said, end=60)])
    targets: dict[str, set[str]] = {}
    for row in train:
        targets.setdefault(asked(row), set()).add(repr(row.target))
    for at, row in enumerate(held_out):
        key = asked(row)
        if key in first:
            rule = "leak" if repr(row.target) in targets[key] else "leak_prompt"
            tally.add(seen["held_out"][at], [Hit(rule, said=f"like {train[first[key]].where}", end=60)])


def _said(row: TaskRow) -> str:
    return f"{row.target!r:.40}"


def _labels(
    train: Sequence[TaskRow], held_out: Sequence[TaskRow], seen: dict[Role, list[RowText]], head: Head, tally: Tally
) -> None:
    counts = Counter(label for row in train for label in set(labels_in(row.target)))
    if head.kind in ("sequence", "image") and head.problem == "single_label" and counts:
        most, count = counts.most_common(1)[0]
        if len(counts) == 1:
            tally.say("one_answer", len(train), repr(most))
        elif count >= _IMBALANCE * len(train):
            tally.say("imbalance", count, repr(most))
    usual: dict[str, str] = {}
    for label, _ in counts.most_common():
        usual.setdefault(_PLAIN.sub("", label.casefold()) or label, label)
    for role, rows in (("train", train), ("held_out", held_out)):
        for at, row in enumerate(rows):
            hits = [hit for label in labels_in(row.target) if (hit := _label(label, role, counts, usual)) is not None]
            tally.add(seen["train" if role == "train" else "held_out"][at], hits[:1])


def _label(label: str, role: str, counts: Counter[str], usual: dict[str, str]) -> Hit | None:
    spelling = usual.get(_PLAIN.sub("", label.casefold()) or label, label)
    if spelling != label:
        return Hit("label_variant", said=f"{label!r}, mostly {spelling!r}")
    if role == "held_out":
        return None if counts[label] else Hit("label_unseen", said=repr(label))
    return Hit("label_rare", said=repr(label)) if counts[label] <= _RARE else None


def losses(encoded: Encoded, role: Role, source: str, spec: TaskSpec, length: int | None, tally: Tally) -> None:
    """Count rows that did not come through encoding whole."""
    limit = f"{length} tokens"
    if encoded.too_long:
        places = [Seen(place, f"{count} tokens") for place, count in encoded.too_long.items()]
        tally.say("too_long", len(places), limit, places)
    if encoded.dropped:
        why = f"longer than {limit}, or nothing of them is a token" if length else "nothing of them is a token"
        tally.say("left_out", len(encoded.dropped), why, [Seen(place, "") for place in encoded.dropped])
    if encoded.truncated:
        tally.say("cut", len(encoded.truncated), limit, [Seen(place, f"cut at {limit}") for place in encoded.truncated])
    if not encoded.examples:
        tally.say("nothing_to_learn", 1, f"{role} row of {source}")


def unseen(parts: Sequence[Encoded], rows: int) -> tuple[Finding, ...]:
    """The finding of words that the tokenizer makes no token of, where there are any."""
    found = [Seen(place, words) for one in parts for place, words in one.unseen.items()]
    if not found:
        return ()
    what = "1 row has words" if len(found) == 1 else f"{len(found):,} rows have words"
    said = f"{what} that the tokenizer makes no token of: they are neither learned nor predicted"
    mend = "remove characters without a shape (control characters, joiners) from these rows"
    share = len(found) / max(1, rows)
    return (Finding("word_unseen", "warning", len(found), share, tuple(found[:LISTED]), said, mend),)


def far(rows: Sequence[TaskRow]) -> tuple[Finding, ...]:
    """The finding of numbers that a regression begins far away from, where they are."""
    numbers = np.array([row.target for row in rows], dtype=np.float64)
    largest = float(np.abs(numbers).max()) or 1.0  # so that the squares of no number overflow
    mean, deviation = largest * float((numbers / largest).mean()), largest * float((numbers / largest).std())
    if abs(mean) <= _FAR and 1 / _FAR <= deviation <= _FAR:
        return ()
    center = f"{round(mean, 2 - math.floor(math.log10(deviation))):.15g}" if deviation else f"{mean:g}"
    said = f"the numbers are {center} ± {deviation:.3g}, are learned as they are, and a head begins at 0 ± 1"
    formula = f"(number - {center}) / {deviation:.3g}" if deviation else "numbers around 0 that differ by about 1"
    mend = f"train on {formula}, and turn what is predicted back"
    return (Finding("far_numbers", "warning", len(numbers), 1.0, (), said, mend),)
