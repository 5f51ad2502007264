"""Read, check, encode and count the rows of a task before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audit import refusal
from peftkit.data.findings.finding import Finding, Role
from peftkit.data.overlap import ngram_overlap
from peftkit.data.tasks.contents import plain_text
from peftkit.data.tasks.encode import Encoded, encode, policy_of
from peftkit.data.tasks.findings import examine, losses, unseen
from peftkit.data.tasks.heads import labels_in
from peftkit.data.tasks.sides import read_sides
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskExample, TaskPart, TaskRow
from peftkit.events import Note, Report, Table, Warned, silent
from peftkit.render import sparkline

_BINS = 24


@dataclass(frozen=True)
class TaskAudit:
    """The data of a task's run, ready to train on and to measure with."""

    head: Head
    train: TaskPart
    held_out: TaskPart
    overlap: float
    """Highest share of a held-out text's word 8-grams that occur anywhere in the training texts; 0 for images."""
    findings: tuple[Finding, ...] = ()
    """What is wrong or worth knowing: errors first."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that stop a run."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def tokens(self) -> dict[str, Any]:
        """Tokens per sequence: counts between edges, equally wide; one more edge than counts."""
        tokens = _lengths((*self.train.examples, *self.held_out.examples))
        most = int(tokens.max(initial=1))
        width = max(1, -(-most // _BINS))
        edges = list(range(0, most + width, width))
        counts = np.bincount(np.maximum(tokens - 1, 0) // width, minlength=len(edges) - 1)
        return {"edges": edges, "counts": counts.tolist()}

    @property
    def labels(self) -> dict[str, tuple[int, int]]:
        """Of every label how many training and held-out rows have it; of a tag, how many words."""
        found = [Counter(label for row in part.rows for label in labels_in(row.target)) for part in self._parts]
        return {label: (found[0][label], found[1][label]) for label in self.head.labels if label in found[0] | found[1]}

    @property
    def _parts(self) -> tuple[TaskPart, TaskPart]:
        return self.train, self.held_out

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds. Its excerpts come from the rows, so it stays in the run's folder."""
        return {
            "head": self.head.record(),
            "findings": [finding.record() for finding in self.findings],
            "tokens": self.tokens,
            "labels": {label: list(counts) for label, counts in self.labels.items()},
            "parts": [part.record() for part in self._parts],
            "overlap": self.overlap,
        }


def audit_task(
    spec: TaskSpec,
    tokenizer: Tokenizer | None,
    limit: int | None,
    report: Report = silent,
    *,
    positions: int = 1,
    head: Head | None = None,
) -> TaskAudit:
    """Read, encode and examine training and held-out rows of a task.

    `limit` is the base's longest sequence, `positions` how large an image is to it; images need no tokenizer. With a
    `head`, of an adapter to go on with, rows may have its labels only. Raises DataError with every problem of the rows
    and for findings that make the run certainly wrong, ConfigError for settings that do not go together.
    """
    result = inspect_task(spec, tokenizer, limit, report, positions=positions, head=head)
    for finding in result.findings:
        if finding.severity == "warning":
            places = ", ".join(seen.where for seen in finding.examples)
            rest = finding.count - len(finding.examples)
            more = f" and {rest:,} more" if rest > 0 and places else ""
            report(Warned(f"{finding.text}: {places}{more}" if places else finding.text, finding.mend))
    if result.errors:
        raise refusal(result.errors)
    return result


def inspect_task(
    spec: TaskSpec,
    tokenizer: Tokenizer | None,
    limit: int | None,
    report: Report = silent,
    *,
    positions: int = 1,
    head: Head | None = None,
) -> TaskAudit:
    """As `audit_task`, but findings that would stop a run are returned with the others."""
    sides = read_sides(spec, report, head)
    length = policy_of(spec, limit).length
    if spec.max_length and limit and spec.max_length > limit:
        report(Warned(f"data.max_length={spec.max_length} is above the base's longest sequence, so {limit} holds"))
    tally = examine(sides.written, sides.held_out, sides.head)
    parts: list[TaskPart] = []
    gathered: list[Encoded] = []
    given: tuple[tuple[Role, Any, Sequence[TaskRow]], ...] = (
        ("train", sides.train_set, sides.train),
        ("held_out", sides.held_set, sides.held_out),
    )
    for role, source, rows in given:
        encoded = encode(rows, sides.head, tokenizer, limit, spec, positions=positions)
        losses(encoded, role, source.source, spec, length, tally)
        lost = encoded.dropped, encoded.truncated
        parts.append(TaskPart(role, source.source, source.sha256, tuple(rows), encoded.examples, *lost, spec.license))
        gathered.append(encoded)
    overlap = _overlap(sides.held_out, sides.written)
    findings = (*tally.findings(spec.accept), *unseen(gathered, sum(len(part.rows) for part in parts)))
    result = TaskAudit(sides.head, parts[0], parts[1], overlap, findings)
    _report_counts(result, report)
    return result


def _overlap(held_out: Sequence[TaskRow], train: Sequence[TaskRow]) -> float:
    texts, learned = [plain_text(row) for row in held_out], [plain_text(row) for row in train]
    return ngram_overlap(texts, learned).highest if any(texts) else 0.0


def _lengths(examples: Sequence[TaskExample]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.fromiter((len(example.input_ids) for example in examples), np.int64, len(examples))


def _report_counts(data: TaskAudit, report: Report) -> None:
    parts = (data.train, data.held_out)
    rows = tuple(
        (
            part.role.replace("_", "-"),
            len(part.rows),
            len(part.examples),
            part.tokens,
            part.answer_tokens,
            int(_lengths(part.examples).max(initial=0)),
            len(part.dropped),
            len(part.truncated),
        )
        for part in parts
    )
    columns = ("data", "rows", "sequences", "tokens", "targets", "longest", "left out", "cut")
    report(Table("data", columns, rows))
    if data.labels:
        report(Table("labels", ("label", "train", "held-out"), tuple((k, *v) for k, v in data.labels.items())))
    elif data.head.problem == "regression":
        report(Table("numbers", ("data", "least", "mean", "most"), tuple(map(_numbers, parts))))
    elif data.head.kind == "span":
        none = tuple((part.role.replace("_", "-"), sum(not row.target for row in part.rows)) for part in parts)
        report(Table("questions", ("data", "without an answer"), none))
    if data.head.kind != "image":
        tokens = data.tokens
        report(Note(f"tokens per sequence, 0 to {tokens['edges'][-1]:,}: {sparkline(tokens['counts'])}"))
        report(Note(f"highest word 8-gram overlap of a held-out text with the training texts: {data.overlap:.2f}"))
    if data.findings:
        found = tuple(
            (
                one.severity,
                one.rule,
                one.count,
                f"{one.share:.1%}",
                one.examples[0].where if one.examples else None,
                one.text,
            )
            for one in data.findings
        )
        report(Table("findings", ("severity", "rule", "count", "share", "first", "what"), found))


def _numbers(part: TaskPart) -> tuple[str, float, float, float]:
    numbers = np.array([row.target for row in part.rows], dtype=np.float64)
    return part.role.replace("_", "-"), float(numbers.min()), float(numbers.mean()), float(numbers.max())
