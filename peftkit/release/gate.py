"""The gate: does a combined adapter still do what each of its parents was trained for.

Every parent has rows of its own that it never saw. On them the base, the parent and the candidate are measured, and
the candidate passes when the lower end of the interval of the share it keeps reaches what was asked for, on every
task. The lower end, because a gate is a promise: with the point alone, half of all candidates that are just below
the mark would pass by the luck of the rows, and few rows would pass more of them than many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peftkit.data.part import Part
from peftkit.errors import ConfigError
from peftkit.evaluation.compare import Interval, mean_nll, paired_nll
from peftkit.events import Phase, Report, Table, silent
from peftkit.generation.forward import autocast, row_nll
from peftkit.registry.manifest import Version
from peftkit.release.measured import LEAST_TOKENS, NotMeasured, interval_record, too_few
from peftkit.release.rows import HeldOut
from peftkit.release.shares import share_kept
from peftkit.tuning.attach import Attached

COLUMNS = ("task", "base NLL", "parent", "combined", "share kept", "95 %", "verdict")


@dataclass(frozen=True)
class Task:
    """One parent's rows, measured; nats per answer token."""

    name: str
    base: Interval
    parent: Interval
    candidate: Interval
    lost: Interval
    """NLL of the candidate minus that of the parent: above 0 something was lost."""
    kept: Interval
    """The share of the parent's gain over the base that the candidate keeps."""
    rows: int
    answer_tokens: int
    sha256: str

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        nll = {"base": self.base, "parent": self.parent, "combined": self.candidate, "lost": self.lost}
        return {
            "measured": True,
            "rows": self.rows,
            "answer_tokens": self.answer_tokens,
            "rows_sha256": self.sha256,
            "nll": {name: interval_record(interval) for name, interval in nll.items()},
            "kept": interval_record(self.kept),
        }


@dataclass(frozen=True)
class GateResult:
    """What the gate found, by parent (`name@version`), and what was asked of it."""

    keep: float
    tasks: Mapping[str, Task | NotMeasured]

    @property
    def failed(self) -> tuple[str, ...]:
        """Parents whose task keeps too little, or was not measured."""
        return tuple(name for name, task in self.tasks.items() if not self._holds(task))

    @property
    def passed(self) -> bool:
        """Whether every task was measured and keeps its share."""
        return bool(self.tasks) and not self.failed

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table that a user reads; its columns are COLUMNS."""
        return tuple(self._line(name, task) for name, task in self.tasks.items())

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        return {
            "keep": self.keep,
            "passed": self.passed,
            "tasks": {name: task.record() for name, task in self.tasks.items()},
        }

    def describe(self) -> str:
        """One line per task, for messages."""
        return "".join(f"\n- {name}: {self._said(task)}" for name, task in self.tasks.items())

    def tell(self, report: Report) -> None:
        """Report the table."""
        report(Table(f"gate: every task keeps at least {self.keep:.0%}", COLUMNS, self.rows()))

    def _holds(self, task: Task | NotMeasured) -> bool:
        return isinstance(task, Task) and task.kept.low >= self.keep

    def _said(self, task: Task | NotMeasured) -> str:
        if isinstance(task, NotMeasured):
            return task.reason + (f" ({task.hint})" if task.hint else "")
        kept = f"keeps {task.kept.point:.1%} ({task.kept.low:.1%} to {task.kept.high:.1%}) of its gain"
        return f"{kept}, {'enough' if self._holds(task) else f'the lower end must reach {self.keep:.0%}'}"

    def _line(self, name: str, task: Task | NotMeasured) -> tuple[str, ...]:
        if isinstance(task, NotMeasured):
            return name, "", "", "", "", "", task.reason
        nll = (f"{interval.point:.4f}" for interval in (task.base, task.parent, task.candidate))
        between = f"{task.kept.low:.1%} to {task.kept.high:.1%}"
        return name, *nll, f"{task.kept.point:.1%}", between, "keeps" if self._holds(task) else "loses"


def check_keep(keep: float) -> None:
    """Raise ConfigError unless `keep` is a share above 0 and at most 1."""
    if not 0 < keep <= 1:
        raise ConfigError([f"gate: {keep:g} is no share to keep; it is above 0 and at most 1, such as 0.9"])


def gate(
    host: Attached,
    parents: Sequence[Version],
    candidate: Version,
    rows_by_parent: Mapping[str, HeldOut | NotMeasured],
    keep: float,
    *,
    min_tokens: int = LEAST_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    other_base: bool = False,
    report: Report = silent,
) -> GateResult:
    """Measure base, parent and candidate on each parent's own rows (by `name@version`), all on one backbone.

    Passes only when every task's lower interval end reaches `keep`. A task without rows, with fewer than `min_tokens`
    answer tokens, or whose parent is not better than the base beyond its interval, is not measured, and does not pass.
    Parents are attached one at a time. Raises ConfigError for a `keep` that is no share, BaseMismatch and TuningError
    as `attach` does, DataError for rows that cannot be used.
    """
    check_keep(keep)
    judge = _Judge(host, candidate, batch_size, seed, other_base, report)
    tasks: dict[str, Task | NotMeasured] = {}
    with beside(host, candidate, other_base):
        for parent in parents:
            rows = rows_by_parent.get(parent.reference) or NotMeasured("no held-out rows are named for it")
            if isinstance(rows, NotMeasured):
                tasks[parent.reference] = rows
                continue
            part = rows.part(host.backbone.base.folder, report)
            tasks[parent.reference] = too_few(part.answer_tokens, min_tokens) or judge.task(parent, part)
    result = GateResult(keep, tasks)
    result.tell(report)
    return result


@dataclass(frozen=True)
class _Judge:
    """What all tasks of one gate share."""

    host: Attached
    candidate: Version
    batch_size: int
    seed: int
    other_base: bool
    report: Report

    def task(self, parent: Version, part: Part) -> Task | NotMeasured:
        self.report(Phase(f"gate: {parent.name}", None, "models"))
        base = likelihoods(self.host, None, part, self.batch_size)
        with beside(self.host, parent, self.other_base):
            own = likelihoods(self.host, parent.reference, part, self.batch_size)
        counts = [example.answer_tokens for example in part.examples]
        groups = [str(example.row) for example in part.examples]
        options: dict[str, Any] = {"groups": groups, "seed": self.seed}
        gained = paired_nll(base, own, counts, **options)
        if not gained.high < 0:
            change = f"its NLL changes by {gained.point:+.4f} ({gained.low:+.4f} to {gained.high:+.4f})"
            return NotMeasured(f"the parent did not improve its own task: {change}", "name rows of its task")
        combined = likelihoods(self.host, self.candidate.reference, part, self.batch_size)
        return Task(
            parent.name,
            mean_nll(base, counts, **options),
            mean_nll(own, counts, **options),
            mean_nll(combined, counts, **options),
            paired_nll(own, combined, counts, **options),
            share_kept(base, own, combined, **options),
            len(set(groups)),
            part.answer_tokens,
            part.sha256,
        )


def likelihoods(host: Attached, name: str | None, part: Part, batch_size: int) -> list[float]:
    """Summed answer NLL of every example, with one attached adapter active, or none."""
    backbone = host.backbone
    with host.using(name) as model, autocast(backbone.device, backbone.placement.compute_dtype):
        return row_nll(
            model,
            part.examples,
            pad_id=backbone.tokenizer.pad_id,
            device=backbone.device,
            batch_size=batch_size,
        )


@contextmanager
def beside(host: Attached, version: Version, other_base: bool) -> Iterator[None]:
    """Attach a version under its reference for a block, unless it is there already."""
    there = version.reference in host.versions
    if not there:
        host.attach(version, version.reference, other_base=other_base)
    try:
        yield
    finally:
        if not there:
            host.detach(version.reference)
