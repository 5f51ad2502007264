"""Read, check, encode and count the rows of a task before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audited import AuditOf, longest_allowed
from peftkit.data.findings.finding import Role
from peftkit.data.findings.told import counts, heed, tell, token_line
from peftkit.data.overlap import ngram_overlap
from peftkit.data.tasks.contents import plain_text
from peftkit.data.tasks.encode import Encoded, encode
from peftkit.data.tasks.findings import examine, far, losses, unseen
from peftkit.data.tasks.heads import labels_in
from peftkit.data.tasks.sides import read_sides
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskPart, TaskRow
from peftkit.events import Note, Report, Table, silent


@dataclass(frozen=True, kw_only=True)
class TaskAudit(AuditOf[TaskPart]):
    """Rows of a task, and the head that they ask for; images have no overlap."""

    head: Head

    @property
    def labels(self) -> dict[str, tuple[int, int]]:
        """Of every label how many training and held-out rows have it; of a tag, how many words."""
        parts = (self.train, self.held_out)
        found = [Counter(label for row in part.rows for label in labels_in(row.target)) for part in parts]
        return {label: (found[0][label], found[1][label]) for label in self.head.labels if label in found[0] | found[1]}

    def record(self) -> dict[str, Any]:
        """What `audit.json` of a run holds. Its excerpts come from the rows, so it stays in the run's folder."""
        labels = {label: list(counts) for label, counts in self.labels.items()}
        return {"head": self.head.record(), "labels": labels, **super().record()}


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
    heed(result.findings, report)
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
    length = longest_allowed(spec.max_length, limit, report)
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
    found = (*tally.findings(spec.accept), *unseen(gathered, sum(len(part.rows) for part in parts)))
    new_number = head is None and sides.head.problem == "regression"  # a head that is continued has learned its own
    findings = (*found, *far(sides.train)) if new_number and sides.train else found
    result = TaskAudit(head=sides.head, train=parts[0], held_out=parts[1], overlap=overlap, findings=findings)
    _report_counts(result, report)
    return result


def _overlap(held_out: Sequence[TaskRow], train: Sequence[TaskRow]) -> float:
    texts, learned = [plain_text(row) for row in held_out], [plain_text(row) for row in train]
    return ngram_overlap(texts, learned).highest if any(texts) else 0.0


def _report_counts(data: TaskAudit, report: Report) -> None:
    parts = (data.train, data.held_out)
    report(counts(parts, learned="targets"))
    if data.labels:
        report(Table("labels", ("label", "train", "held-out"), tuple((k, *v) for k, v in data.labels.items())))
    elif data.head.problem == "regression":
        report(Table("numbers", ("data", "least", "mean", "most"), tuple(map(_numbers, parts))))
    elif data.head.kind == "span":
        none = tuple((part.role.replace("_", "-"), sum(not row.target for row in part.rows)) for part in parts)
        report(Table("questions", ("data", "without an answer"), none))
    if data.head.kind != "image":
        report(token_line(data.tokens))
        report(Note(f"highest word 8-gram overlap of a held-out text with the training texts: {data.overlap:.2f}"))
    tell(data.findings, report)


def _numbers(part: TaskPart) -> tuple[str, float, float, float]:
    numbers = np.array([row.target for row in part.rows], dtype=np.float64)
    return part.role.replace("_", "-"), float(numbers.min()), float(numbers.mean()), float(numbers.max())
