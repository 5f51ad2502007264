"""What a preview holds: figures for each tensor and for all of them, as values, JSON and text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftkit.deltas.combining.dense_time import DenseTime
from peftkit.deltas.previewing.signs import Estimate
from peftkit.deltas.spectrum import Angles
from peftkit.events import Table
from peftkit.render import duration, number, size

DESCRIPTIVE = (
    "These figures describe the delta weights; they do not say how good the combined adapter answers. Measure that."
)
_MOST_ROWS = 10
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Pair:
    """How two adapters stand to each other; None where one of them changes nothing, or has no spaces there."""

    one: str
    other: str
    cosine: float | None
    write: Angles | None
    """Of the column spaces: what they write to."""
    read: Angles | None
    """Of the row spaces: what they read from."""


@dataclass(frozen=True)
class Figures:
    """What is known of one tensor, or of all together."""

    norms: tuple[float | None, ...]
    """‖ΔW‖ of each adapter without its weight; None where it leaves the tensor alone."""
    separate_norm: float
    """Σ ‖weight · ΔW‖: what the combination would have if no delta opposed another."""
    combined_norm: float
    """‖Σ weight · ΔW‖."""
    pairs: tuple[Pair, ...]
    sign_conflict: Estimate | None
    """Share of the |weight · ΔW| mass on entries where signs disagree."""
    outvoted: Estimate | None
    """Share of that mass whose sign is the weaker one of its entry."""
    cancellation: float | None
    """1 − ‖Σ weight · ΔW‖ / Σ ‖weight · ΔW‖: 0 for parallel deltas, 1 where nothing is left."""
    linear_error: float | None
    """‖(Σ √w B)(Σ √w A) − Σ w B A‖ / ‖Σ w B A‖ of averaged factors, as PEFT's `linear`; None where ranks differ."""


@dataclass(frozen=True)
class TensorPreview:
    """One tensor of the base."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    figures: Figures
    rank_95: int
    """The rank that keeps 95 % of the energy of the combination."""


@dataclass(frozen=True)
class NotShown:
    """A delta without factors, which no figure includes."""

    reference: str
    tensor: str
    kind: str
    reason: str
    norm: float | None
    """‖ΔW‖ where it needs no base."""


@dataclass(frozen=True)
class Preview:
    """What combining adapters with these weights would do, from their factors."""

    references: tuple[str, ...]
    weights: tuple[float, ...]
    dense: DenseTime
    tensors: tuple[TensorPreview, ...]
    overall: Figures
    spectrum: tuple[float, ...]
    """At place k, √Σ σₖ² over all tensors: what rank k of every tensor holds of the combination."""
    ranks: Mapping[int, int]
    """Percent of the energy → the smallest rank that keeps it when every tensor has the same."""
    residuals: Mapping[int, float | None]
    """Rank → ‖combination − its best approximation of that rank‖ / ‖combination‖."""
    exact_rank: int
    """The largest rank of the exact combination, whose factors stand behind one another."""
    exact_bytes: int
    """Its size, in the widest dtype of the parents."""
    sampled: int
    """Entries that the sign figures are estimated on."""
    not_shown: tuple[NotShown, ...]

    @property
    def dense_seconds(self) -> float:
        """About how long `ties` and other dense methods with a result of factors take on this machine."""
        return self.dense.seconds

    def as_record(self) -> dict[str, Any]:
        """All figures as plain JSON; what is not defined is null."""
        found: dict[str, Any] = _plain(asdict(self))
        return {"descriptive": DESCRIPTIVE, "dense_seconds": self.dense_seconds, **found}

    def tables(self) -> tuple[Table, ...]:
        """The figures for people; a table without rows is left out."""
        found = (self._facts(), self._adapters(), self._pairs(), self._ranks(), self._tensors(), self._missing())
        return tuple(table for table in found if table.rows)

    def _facts(self) -> Table:
        every = self.overall
        rows = (
            ("dense methods (ties, dare, …)", f"about {duration(self.dense_seconds)} on this machine, "
             f"{duration(self.dense.entries_seconds)} of it without factors at the end"),
            ("sign conflict", f"{_estimate(every.sign_conflict)} of the mass, sampled on {self.sampled:,} entries"),
            ("outvoted mass", f"{_estimate(every.outvoted)}, on the same entries"),
            ("cancellation", _percent(every.cancellation)),
            ("averaged factors (PEFT linear)", _linear(every.linear_error)),
            ("exact combination", self._exact()),
            ("rank for 95 % / 99 % of the energy", f"{self.ranks[95]} / {self.ranks[99]}"),
            ("note", DESCRIPTIVE),
        )  # fmt: skip
        return Table("preview, from the factors", ("", ""), rows)

    def _exact(self) -> str:
        without = len({(missing.reference, missing.tensor) for missing in self.not_shown})
        if without:
            return f"refuses these adapters: {without} tensors have no factors"
        return f"rank {self.exact_rank}, {size(self.exact_bytes)}, error 0"

    def _adapters(self) -> Table:
        largest = max((norm for norm in self.overall.norms if norm), default=0.0)
        touched = [
            sum(tensor.ranks[index] is not None for tensor in self.tensors) for index in range(len(self.weights))
        ]
        rows = tuple(
            (reference, weight, norm, (norm or 0) / largest if largest else None, abs(weight) * (norm or 0), count)
            for reference, weight, norm, count in zip(
                self.references, self.weights, self.overall.norms, touched, strict=True
            )
        )
        return Table("adapters", ("adapter", "weight", "‖ΔW‖", "of the largest", "weighted", "tensors"), rows)

    def _pairs(self) -> Table:
        columns = ("A", "B", "cosine", "write, mean", "write, max", "read, mean", "read, max")
        rows = tuple((pair.one, pair.other, pair.cosine, *spread(pair)) for pair in self.overall.pairs)
        return Table("pairs: cosine of ΔW, cosines of the principal angles (mean over tensors)", columns, rows)

    def _ranks(self) -> Table:
        rows = tuple((rank, _percent(residual)) for rank, residual in self.residuals.items())
        return Table("error of the combination cut to a rank", ("rank", "‖error‖ / ‖ΔW‖"), rows)

    def _tensors(self) -> Table:
        rows = tuple(tensor_row(tensor) for tensor in most_cancelled(self.tensors)[:_MOST_ROWS])
        more = f" ({_MOST_ROWS} of {len(self.tensors)}; --json has all)" if len(self.tensors) > _MOST_ROWS else ""
        return Table(f"tensors that lose the most norm{more}", TENSOR_COLUMNS, rows)

    def _missing(self) -> Table:
        rows = tuple(
            (f"not shown: {each.tensor}", each.reference, each.kind, each.norm, each.reason) for each in self.not_shown
        )
        return Table("without factors, in no figure", ("tensor", "adapter", "kind", "‖ΔW‖", "reason"), rows)


TENSOR_COLUMNS = ("tensor", "norms", "lowest cosine", "cancellation", "conflict", "PEFT linear", "rank 95 %")


def tensor_row(tensor: TensorPreview) -> tuple[Any, ...]:
    """A tensor's line of a table, under `TENSOR_COLUMNS`."""
    figures = tensor.figures
    cosines = [pair.cosine for pair in figures.pairs if pair.cosine is not None]
    return (
        tensor.name,
        ", ".join(map(number, figures.norms)),
        min(cosines, default=None),
        _percent(figures.cancellation),
        _estimate(figures.sign_conflict),
        _percent(figures.linear_error),
        tensor.rank_95,
    )


def most_cancelled(tensors: Sequence[TensorPreview]) -> list[TensorPreview]:
    """Those with the most norm lost first: Σ ‖weight · ΔW‖ − ‖Σ weight · ΔW‖."""
    return sorted(tensors, key=lambda each: (each.figures.combined_norm - each.figures.separate_norm, each.name))


def spread(pair: Pair) -> tuple[float | None, float | None, float | None, float | None]:
    """The four cosines of a pair: write mean and max, read mean and max."""
    write, read = pair.write, pair.read
    if write is None or read is None:
        return None, None, None, None
    return write.mean, write.max, read.mean, read.max


def _linear(error: float | None) -> str:
    if error is None:
        return "refuses these adapters: their ranks differ"
    return f"{_percent(error)} off the sum of ΔW (rsLoRA: √r besides)"


def _percent(share: float | None) -> str:
    if share is None:
        return "undefined"
    return f"{100 * share:.3g} %" if abs(share) > _ROUNDING else "0 %"


def _estimate(found: Estimate | None) -> str:
    return "undefined" if found is None else f"{100 * found.share:.1f} % ± {100 * found.error:.1f}"


def _plain(value: Any) -> Any:
    """JSON has no infinity and no keys but text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
