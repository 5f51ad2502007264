"""How far one model's predictions lie from another's at the same answer tokens; one of the two is in memory at a time.

The first model's logits wait in a temporary file while it gives way to the second, because two models of a size that
fits once do not fit twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax

from peftkit.data.part import Part
from peftkit.errors import DeltaError
from peftkit.evaluation.compare import Interval, mean_nll, paired_nll
from peftkit.events import Phase, Progress, Report, silent
from peftkit.release.measured import NotMeasured, interval_record
from peftkit.release.positions import Loaded, answers
from peftkit.release.scratch import scratch_folder
from peftkit.render import size
from peftkit.training.memory import release

POSITIONS = 64
"""Positions compared at once: 64 × 150,000 float64 numbers are 77 MB, and a few such tensors are alive."""


@dataclass(frozen=True)
class Side:
    """One of two models: what it is called, and how to load it for as long as a block lasts."""

    name: str
    open: Callable[[], AbstractContextManager[Loaded]]


@dataclass(frozen=True)
class Drift:
    """The second model against the first on the same answer tokens; likelihoods in nats per token."""

    first: Interval
    second: Interval
    change: Interval
    """NLL of the second minus that of the first, with its paired bootstrap interval over rows."""
    kl_mean: float
    """KL(first ‖ second) in nats per answer token."""
    kl_p95: float
    kl_max: float
    logit_mean: float
    """Mean |Δlogit| over all entries of the vocabulary."""
    logit_max: float
    agreement: float
    """Share of the answer tokens at which both give the same token the highest logit."""
    rows: int
    answer_tokens: int
    sha256: str
    """Of the file that the rows stand in."""
    first_nll: tuple[float, ...] = ()
    """Summed over each row's answer tokens; not part of the record."""
    second_nll: tuple[float, ...] = ()

    @property
    def worse(self) -> bool:
        """Whether the second model's NLL is higher beyond the interval."""
        return self.change.low > 0

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        return {
            "measured": True,
            "rows": self.rows,
            "answer_tokens": self.answer_tokens,
            "rows_sha256": self.sha256,
            "nll_attached": interval_record(self.first),
            "nll_merged": interval_record(self.second),
            "nll_change": interval_record(self.change),
            "kl": {"mean": self.kl_mean, "p95": self.kl_p95, "max": self.kl_max},
            "logits": {"mean": self.logit_mean, "max": self.logit_max},
            "top1_agreement": self.agreement,
        }


def drift(
    first: Side,
    second: Side,
    part: Part,
    *,
    pad_id: int,
    scratch: Path,
    batch_size: int = 8,
    seed: int = 0,
    report: Report = silent,
) -> Drift | NotMeasured:
    """Measure `second` against `first` on the examples of `part`; logits wait in a file below `scratch`.

    The file takes answer tokens × vocabulary × 4 bytes; where there is no room for it, nothing is measured. Raises
    DeltaError for vocabularies of different sizes and for logits that are not finite.
    """
    with scratch_folder(scratch, "logits") as folder:
        run = _Passes(part, pad_id, batch_size, folder / "logits.f32", report)
        missing = run.first(first)
        if missing is not None:
            return missing
        return run.second(second, seed)


class _Passes:
    """Both passes over the same examples; a pass lets go of its model before it returns."""

    def __init__(self, part: Part, pad_id: int, batch_size: int, file: Path, report: Report) -> None:
        self.part, self.examples = part, part.examples
        self.pad_id, self.batch_size, self.file, self.report = pad_id, batch_size, file, report
        counts = [example.answer_tokens for example in part.examples]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self.tokens = int(self.starts[-1])
        self.nll = np.zeros(len(counts))
        self.vocabulary = 0

    def first(self, side: Side) -> NotMeasured | None:
        device = self._write(side)
        if isinstance(device, NotMeasured):
            return device
        release(device)
        return None

    def _write(self, side: Side) -> torch.device | NotMeasured:
        self.report(Phase(f"measure {side.name}", len(self.examples), "rows"))
        kept: Any = None
        with side.open() as loaded:
            for done, (index, logits, targets) in enumerate(self._rows(loaded, side), 1):
                if kept is None:
                    need, free = self.tokens * self.vocabulary * 4, shutil.disk_usage(self.file.parent).free
                    if need > free:
                        where = self.file.parent.parent
                        return NotMeasured(f"needs {size(need)} of disk in {where}, {size(free)} are free")
                    kept = np.memmap(self.file, dtype=np.float32, mode="w+", shape=(self.tokens, self.vocabulary))
                kept[self.starts[index] : self.starts[index + 1]] = logits.float().cpu().numpy()
                self.nll[index] = _nll(logits, targets)
                self.report(Progress(done, {}))
            kept.flush()
            return loaded.device

    def second(self, side: Side, seed: int) -> Drift:
        tally, nll = _Tally(), np.zeros(len(self.examples))
        device = self._compare(side, tally, nll)
        release(device)
        counts = np.diff(self.starts)
        groups = [str(example.row) for example in self.examples]
        options: dict[str, Any] = {"groups": groups, "seed": seed}
        return Drift(
            mean_nll(self.nll, counts, **options),
            mean_nll(nll, counts, **options),
            paired_nll(self.nll, nll, counts, **options),
            *tally.kl_figures(),
            tally.logit_sum / (self.tokens * self.vocabulary),
            tally.logit_max,
            tally.same / self.tokens,
            len(set(groups)),
            self.tokens,
            self.part.sha256,
            tuple(self.nll.tolist()),
            tuple(nll.tolist()),
        )

    def _compare(self, side: Side, tally: _Tally, nll: Any) -> torch.device:
        self.report(Phase(f"measure {side.name}", len(self.examples), "rows"))
        kept = np.memmap(self.file, dtype=np.float32, mode="r", shape=(self.tokens, self.vocabulary))
        with side.open() as loaded:
            for done, (index, logits, targets) in enumerate(self._rows(loaded, side), 1):
                nll[index] = _nll(logits, targets)
                before = kept[self.starts[index] : self.starts[index + 1]]
                for start in range(0, len(before), POSITIONS):
                    own = slice(start, start + POSITIONS)
                    tally.add(torch.from_numpy(np.array(before[own])).to(logits.device), logits[own])
                self.report(Progress(done, {}))
            return loaded.device

    def _rows(self, loaded: Loaded, side: Side) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for found in answers(loaded, self.examples, pad_id=self.pad_id, batch_size=self.batch_size):
            self.vocabulary = self.vocabulary or found.logits.shape[1]
            if found.logits.shape[1] != self.vocabulary:
                raise DeltaError(
                    f"{side.name} gives {found.logits.shape[1]} logits, the other model {self.vocabulary}",
                    expected="the same vocabulary",
                )
            yield found.index, found.logits, found.targets


class _Tally:
    """Sums over positions, so that no more than a few of them are in memory."""

    def __init__(self) -> None:
        self.kl: list[torch.Tensor] = []
        self.logit_sum, self.logit_max, self.same = 0.0, 0.0, 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Both of shape (positions, vocabulary); differences and divergences in float64."""
        one, other = before.double(), after.double()
        apart = (one - other).abs()
        self.logit_sum += float(apart.sum())
        self.logit_max = max(self.logit_max, float(apart.max()))
        self.same += int((one.argmax(dim=1) == other.argmax(dim=1)).sum())
        first, second = log_softmax(one, dim=1), log_softmax(other, dim=1)
        # Exactly zero for equal logits; rounding can make it -1e-17 for nearly equal ones.
        self.kl.append((first.exp() * (first - second)).sum(dim=1).clamp(min=0.0).cpu())

    def kl_figures(self) -> tuple[float, float, float]:
        values = torch.cat(self.kl)
        return float(values.mean()), float(np.quantile(values.numpy(), 0.95)), float(values.max())


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float(cross_entropy(logits, targets, reduction="none").double().sum())
