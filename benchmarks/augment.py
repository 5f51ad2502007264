"""Does augmentation help where rows are few? One JSON line per data set, number of rows and seed.

    python benchmarks/augment.py > benchmarks/results/augment.jsonl        # minutes; PEFTKIT_TEST_DATA

TF-IDF (words and pairs of words) with logistic regression, its C picked by 3-fold cross-validation over the original
rows of the draw; the same held-out rows for every draw. `plain` are the rows alone, `augmented` four copies of each
beside them (Wei & Zou 2019 take 8 to 16 at these sizes), `repeated` the rows five times, which is what more copies
change by their number alone; `edits` are the same copies by one edit each. Copies are in no fold's measured part.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftkit.data.augment import AugmentSpec, EditName, augment
from peftkit.data.mixture import drawn
from peftkit.data.readers import Where
from peftkit.data.tasks.task import TaskRow

SIZES = (16, 32, 64, 128, 256, 512, 1024)
SEEDS = range(5)
TIMES = 4
C = (0.3, 1.0, 3.0, 10.0, 30.0)
ARMS: dict[str, tuple[EditName, ...] | None] = {
    "augmented": None,
    "delete": ("delete",),
    "swap": ("swap",),
    "typo": ("typo",),
}


def sst2(folder: Path) -> tuple[list[TaskRow], list[TaskRow]]:
    """The training file, and `dev`."""

    def read(name: str) -> list[TaskRow]:
        lines = (folder / "sst2" / name).read_text(encoding="utf-8").splitlines()
        split = [line.rsplit("\t", 1) for line in lines if line]
        return [TaskRow(Where(name, at + 1, at), text=text, target=label) for at, (text, label) in enumerate(split)]

    return read("train.tsv"), read("dev.tsv")


def ag_news(folder: Path) -> tuple[list[TaskRow], list[TaskRow]]:
    """The test file: every other row is held out."""
    with open(folder / "ag_news" / "test.csv", encoding="utf-8", newline="") as file:
        rows = [
            TaskRow(Where("test.csv", at + 1, at), text=f"{title}. {text}", target=label)
            for at, (label, title, text) in enumerate(csv.reader(file))
        ]
    return rows[::2], rows[1::2]


def balanced(rows: Sequence[TaskRow], count: int, seed: int) -> list[TaskRow]:
    """So many rows, the same number of every label."""
    labels = sorted({row.target for row in rows})
    return [
        row
        for label in labels
        for row in drawn([one for one in rows if one.target == label], count // len(labels), seed)
    ]


def accuracy(train: Sequence[TaskRow], best: float, held_out: Sequence[TaskRow]) -> float:
    """Share of the held-out rows that TF-IDF with logistic regression gets right after these rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=best, max_iter=2000))
    model.fit([row.text for row in train], [row.target for row in train])
    return float(model.score([row.text for row in held_out], [row.target for row in held_out]))


def pick(rows: Sequence[TaskRow], spec: AugmentSpec) -> float:
    """The C with the best accuracy over three folds; each fold's training rows are augmented on their own."""
    folds = [rows[at::3] for at in range(3)]

    def score(c: float) -> float:
        found = 0.0
        for at, fold in enumerate(folds):
            others = [row for other, each in enumerate(folds) if other != at for row in each]
            found += accuracy(augment(others, spec, "text_classification", held_out=fold)[0], c, fold)
        return found

    return max(C, key=score)


def measured(
    name: str, rows: Sequence[TaskRow], held_out: Sequence[TaskRow], count: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The lines of one draw of rows."""
    few = balanced(rows, count, seed)
    arms = {"plain": AugmentSpec(), "repeated": AugmentSpec()}
    arms |= {arm: AugmentSpec(times=TIMES, edits=chosen, seed=seed) for arm, chosen in ARMS.items()}
    for arm, spec in arms.items():
        best = pick(few, spec)
        train, counts = augment(few, spec, "text_classification", held_out=held_out)
        if arm == "repeated":
            train = train * (1 + TIMES)
        yield {
            "data": name, "n": count, "seed": seed, "arm": arm, "c": best, **counts,
            "accuracy": round(accuracy(train, best, held_out), 5),
        }  # fmt: skip


def main() -> None:
    """Print all lines, data set by data set."""
    folder = Path(os.environ["PEFTKIT_TEST_DATA"])
    for name, read in (("sst2", sst2), ("ag_news", ag_news)):
        rows, held_out = read(folder)
        for count in SIZES:
            for seed in SEEDS:
                for line in measured(name, rows, held_out, count, seed):
                    print(json.dumps(line), flush=True)
                print(name, count, seed, file=sys.stderr)


if __name__ == "__main__":
    main()
