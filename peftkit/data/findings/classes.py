"""Answers from a short list: is it balanced, spelt alike, and the same on both sides?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from peftkit.data.findings.finding import Hit, RowText, Tally

_ENOUGH = 20  # rows; with fewer a share says little
_LONGEST = 40  # characters of a label
_MOST = 50  # distinct labels
_IMBALANCE = 0.9
_RARE = 2
_PLAIN = re.compile(r"[\W_]+")


def check_all(train: Sequence[RowText], held_out: Sequence[RowText], tally: Tally) -> None:
    """Look at the labels, where the answers are labels."""
    labels = [row.answers[-1] for row in train if len(row.answers) == 1]
    counts = Counter(labels)
    # A quarter of the rows may be misspelt and the answers still be labels.
    common = sum(count for count in counts.values() if count > _RARE)
    if len(labels) < max(_ENOUGH, 0.9 * len(train)) or max(map(len, counts)) > _LONGEST:
        return
    if len(counts) > _MOST or common < 0.75 * len(labels):
        return
    most, count = counts.most_common(1)[0]
    if len(counts) == 1:
        tally.say("one_answer", len(labels), repr(most))
    elif count >= _IMBALANCE * len(labels):
        tally.say("imbalance", count, repr(most))
    usual = _usual(counts)
    for row in (*train, *held_out):
        if len(row.answers) != 1:
            continue
        label = row.answers[0]
        start = row.whole.rindex(label) if label else 0
        hit = (start, start + len(label))
        spelling = usual.get(_plain(label), label)
        if spelling != label:
            tally.add(row, [Hit("label_variant", *hit, said=f"{label!r}, mostly {spelling!r}")])
        elif row.role == "held_out" and _plain(label) not in usual:
            tally.add(row, [Hit("label_unseen", *hit, said=repr(label))])
        elif row.role == "train" and counts[label] <= _RARE:
            tally.add(row, [Hit("label_rare", *hit, said=repr(label))])


def _usual(counts: Counter[str]) -> dict[str, str]:
    """The commonest spelling of each label, apart from case, spaces and punctuation."""
    usual: dict[str, str] = {}
    for label, _ in counts.most_common():
        usual.setdefault(_plain(label), label)
    return usual


def _plain(label: str) -> str:
    return _PLAIN.sub("", label.casefold()) or label
