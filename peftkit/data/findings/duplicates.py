"""Rows that stand twice: among the training rows, on both sides of the split, or in a file that must not be learned.

Near duplicates are looked for by MinHash (Broder 1997) over runs of three words, in rensa's locality-sensitive index,
and each candidate is measured: two rows are near when they share `_NEAR` of their runs (Jaccard). A row near an earlier
one is not compared with later ones, so that ten thousand copies cost no more than ten thousand rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peftkit.data.findings.finding import Hit, RowText, Tally
from peftkit.data.overlap import Shared, shared_runs, words

_NEAR = 0.8
_FEWEST = 10  # words; below, one changed word is a large part of the row
_PERMUTATIONS, _BANDS = 128, 32  # 32 bands of 4: a pair at 0.8 is a candidate with probability 1 - 1e-7
_CANDIDATES = 20  # measured for one row; the index rarely gives more than two
_SHARE = 0.5  # of a held-out prompt's runs of eight words in one training prompt


def check_all(train: Sequence[RowText], held_out: Sequence[RowText], tally: Tally) -> None:
    """Duplicates and conflicts among the training rows, leaks from them into the held-out rows."""
    single = _repeated(train, tally)
    unleaked = _leaked(single, held_out, tally)
    _near(single, unleaked, tally)


def check_against(train: Sequence[RowText], other: Sequence[RowText], name: str, tally: Tally) -> None:
    """Training rows that hold a row of a file that must not be learned, such as a benchmark."""
    questions = [row.prompt or row.whole for row in other]
    exact = {_key(question): row for question, row in zip(questions, other, strict=True)}
    found: dict[int, tuple[RowText, float]] = {}
    for at, row in enumerate(train):
        same = exact.get(_key(row.prompt or row.whole))
        if same is not None:
            found[at] = same, 1.0
    for at, best in shared_runs(questions, [row.whole for row in train]).items():
        if best.share > _SHARE:
            found.setdefault(best.index, (other[at], best.share))
    for at in sorted(found):
        row, share = found[at]
        tally.add(train[at], [Hit("contaminated", said=f"{share:.0%} of {row.where}", end=60)])
    tally.say("contaminated", 0, name)


def _repeated(train: Sequence[RowText], tally: Tally) -> list[RowText]:
    """Count repeated rows, and questions with several answers; returns the rows that repeat none."""
    first: dict[bytes, RowText] = {}
    asked: dict[bytes, RowText] = {}
    conflicts: list[tuple[RowText, RowText]] = []
    for row in train:
        key, question = _key(row.whole), _key(_question(row))
        if key in first:
            tally.add(row, [Hit("duplicate", said=f"like {first[key].where}", end=60)])
            continue
        first[key] = row
        if row.answers and question in asked:
            conflicts.append((row, asked[question]))
        asked.setdefault(question, row)
    # Where most rows ask what others ask (several captions of one picture), that is the task.
    if len(conflicts) < 0.5 * len(first):
        for row, other in conflicts:
            tally.add(row, [Hit("conflict", said=f"like {other.where}", end=60)])
    return list(first.values())


def _leaked(train: Sequence[RowText], held_out: Sequence[RowText], tally: Tally) -> list[RowText]:
    """Count held-out rows that stand in training, whole or by their question; returns the others."""
    rows = {_key(row.whole): row for row in train}
    asked = {_key(row.prompt): row for row in train if row.prompt.strip()}
    often = Counter(_key(row.prompt) for row in train)
    rest = []
    for row in held_out:
        twin, same = rows.get(_key(row.whole)), asked.get(_key(row.prompt))
        if twin is not None:
            tally.add(row, [Hit("leak", said=f"like {twin.where}", end=60)])
        elif same is not None and often[_key(row.prompt)] <= max(10, len(train) // 100):  # "Continue." is no leak
            tally.add(row, [Hit("leak_prompt", said=f"like {same.where}", end=60)])
        else:
            rest.append(row)
    runs = shared_runs([row.prompt or row.whole for row in rest], [row.prompt or row.whole for row in train])
    near = {at: best for at, best in runs.items() if best.share > _SHARE}
    for at, best in near.items():
        tally.add(rest[at], [Hit("leak_near", said=f"{best.share:.0%} of it in {train[best.index].where}", end=60)])
    return [row for at, row in enumerate(rest) if at not in near]


def _near(train: Sequence[RowText], held_out: Sequence[RowText], tally: Tally) -> None:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=_NEAR, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    kept: list[RowText] = []
    for row in (*train, *held_out):
        runs = _runs(row.whole)
        if len(runs) < _FEWEST - 2:
            continue
        hashed = RMinHash(num_perm=_PERMUTATIONS, seed=1)
        hashed.update(runs)
        near = _nearest(row, set(runs), index.query(hashed), kept)
        if near is not None:
            rule = "near_duplicate" if row.role == "train" else "leak_near"
            tally.add(row, [Hit(rule, said=f"{near.share:.0%} like {kept[near.index].where}", end=60)])
        elif row.role == "train":
            index.insert(len(kept), hashed)
            kept.append(row)


def _nearest(row: RowText, runs: set[str], candidates: Sequence[int], kept: Sequence[RowText]) -> Shared | None:
    """The first candidate that shares enough; the index alone promises nothing."""
    for at in sorted(candidates)[:_CANDIDATES]:
        other = set(_runs(kept[at].whole))
        share = len(runs & other) / len(runs | other)
        if share >= _NEAR and (row.role == "held_out" or _answers_alike(row, kept[at])):
            return Shared(at, share)
    return None


def _answers_alike(one: RowText, other: RowText) -> bool:
    """Whether two rows answer the same: two questions about one page are near, and both worth learning."""
    first, second = (set(words(" ".join(row.answers))) for row in (one, other))
    return first == second or len(first & second) >= 0.6 * len(first | second)


def _runs(text: str) -> list[str]:
    found = words(text)
    return list(map(" ".join, zip(found, found[1:], found[2:], strict=False)))


def _question(row: RowText) -> str:
    """Everything that stands before the last answer."""
    given: list[Any] = [message.get("content") for message in row.row.messages[:-1]]
    return "\n".join(map(str, [row.row.tools or "", *given]))


def _key(text: str) -> bytes:
    """Equal for texts that differ in case and spaces alone."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()
