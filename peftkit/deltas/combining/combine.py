"""Several adapters → one adapter: combined on the true ΔW one tensor at a time, and brought to a rank by SVD."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.base.dense import Dense
from peftkit.deltas.combining.dense_time import dense_time
from peftkit.deltas.combining.holdable import homeless, listed, refuse, square
from peftkit.deltas.combining.lineup import Block, Lineup, Part, Tensor, Untouched, line_up
from peftkit.deltas.combining.methods import How
from peftkit.deltas.delta import Added, Delta, Deltas, LowRank, Place, Rows, Stacked
from peftkit.deltas.spectrum import dense_svd, relative, svd
from peftkit.errors import DeltaError
from peftkit.events import Note, Phase, Progress, Report, Warned, silent
from peftkit.render import duration

LEFT_OUT = "left out"
"""Kind of a tensor that no LoRA adapter can hold, and that nobody wanted to keep."""


@dataclass(frozen=True)
class Measured:
    """One tensor of a combined adapter."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    """Columns of its factors; 0 for a bias."""
    norm: float
    """‖result‖ before it was brought to a rank."""
    error: float
    """‖result − factors‖."""

    @property
    def residual(self) -> float:
        """error / norm."""
        return relative(self.error, self.norm)


@dataclass(frozen=True)
class Combined:
    """The adapter that several became, and what bringing it to a rank has cost."""

    deltas: Deltas
    how: How
    parents: tuple[tuple[str, float], ...]
    """Reference and weight of each."""
    rank: int | None
    max_residual: float
    tensors: tuple[Measured, ...]
    converted: Mapping[str, str]
    """Parts that had no factors and were taken as dense ΔW on this base: `tensor of adapter` → their kind."""

    @property
    def changes(self) -> Mapping[str, Delta]:
        """Tensor → its ΔW: LowRank, Stacked or Added."""
        return self.deltas.changes

    @property
    def places(self) -> Mapping[str, Place]:
        """Tensor → where PEFT keeps it."""
        return self.deltas.places

    @property
    def norm(self) -> float:
        """√Σ ‖result‖²."""
        return math.hypot(*(tensor.norm for tensor in self.tensors))

    @property
    def residual(self) -> float:
        """√Σ error² / √Σ norm²: the relative error of all ΔWs together."""
        return relative(math.hypot(*(tensor.error for tensor in self.tensors)), self.norm)

    def as_record(self) -> dict[str, Any]:
        """What a receipt keeps, as plain JSON."""
        return {
            **self.how.as_record(),
            "parents": [{"reference": reference, "weight": weight} for reference, weight in self.parents],
            "rank": self.rank,
            "norm": self.norm,
            "residual": self.residual,
            "max_residual": self.max_residual,
            "converted": dict(self.converted),
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "shape": list(t.shape),
                    "rank": t.rank,
                    "norm": t.norm,
                    "residual": t.residual,
                }
                for t in self.tensors
            ],
        }


def combine(
    parents: Sequence[Deltas],
    weights: Sequence[float],
    how: How,
    base: Mapping[str, Dense],
    *,
    rank: int | None = None,
    max_residual: float = 0.05,
    drop: bool = False,
    report: Report = silent,
) -> Combined:
    """Combine adapters of one base into one whose deltas are LoRA factors and biases, float64.

    `exact` keeps all factors and takes no rank. The others are brought to `rank`, each tensor in the best way (Eckart
    and Young, 1936); kinds without factors count as their dense ΔW on `base`. With `drop`, what no LoRA adapter can
    hold is left out, and is part of the error. Raises DeltaError, naming all tensors, when adapters do not fit
    together, when one cannot be part of a LoRA adapter or not exactly, and when the relative error of all ΔWs is above
    `max_residual`.
    """
    _check_rank(how, rank, max_residual)
    lineup, left_out = _holdable(line_up(parents, weights, how, base), how, drop)
    if left_out:
        report(Warned(f"{len(left_out)} tensors are left out, as no LoRA can hold them: {_some(left_out)}"))
    converted = {f"{tensor.name} of {part.reference}": part.delta.kind for tensor, part in _without_factors(lineup)}
    if converted:
        kinds = ", ".join(sorted(set(converted.values())))
        report(Note(f"{len(converted)} tensors ({kinds}) have no LoRA factors: their ΔW on this base was taken"))
    _tell_time(lineup, how, report)
    report(Phase("combining", len(lineup.tensors), "tensors"))
    changes, measured, spectra = {}, left_out, []
    for done, (name, tensor) in enumerate(lineup.tensors.items(), 1):
        changes[name], found, values = _combined(tensor, how, rank, lineup.bases[name])
        measured.append(found)
        spectra += values
        report(Progress(done, {"residual": found.residual}))
    named = tuple((parent.reference, float(weight)) for parent, weight in zip(parents, weights, strict=True))
    places = {name: tensor.place for name, tensor in lineup.tensors.items()}
    deltas = Deltas(_reference(named, how), changes, places, lineup.sources, lineup.shared)
    combined = Combined(deltas, how, named, rank, max_residual, tuple(measured), converted)
    if combined.residual > max_residual:
        raise _too_far(combined, spectra)
    return combined


def _tell_time(lineup: Lineup, how: How, report: Report) -> None:
    """Say beforehand how long a method takes that needs every entry of ΔW."""
    if how.entry.factored is not None:
        return
    tensors = [tensor for tensor in lineup.tensors.values() if not tensor.vector]
    seconds = dense_time([(*tensor.matrix, len(tensor.parts)) for tensor in tensors]).seconds
    report(Note(f"{how.method} computes every entry of ΔW: about {duration(seconds)} on this machine"))


def _combined(tensor: Tensor, how: How, rank: int | None, base: Rows) -> tuple[Delta, Measured, list[torch.Tensor]]:
    """(ΔW, its figures, the singular values of its blocks)."""
    if tensor.vector:
        values = tensor.combined(tensor.blocks[0], how, base)
        added = Added(tensor.shape, values)
        norm = float(torch.linalg.vector_norm(values))
        return added, Measured(tensor.name, added.kind, tensor.shape, 0, norm, 0.0), []
    blocks, spectra = [], []
    for block in tensor.blocks:
        factors, values = _factored(tensor, block, how, rank, base)
        blocks.append(factors)
        spectra.append(values)
    energy = [values.square() for values in spectra]
    norm = math.sqrt(math.fsum(float(values.sum()) for values in energy))
    cut = [float(values[delta.rank :].sum()) for values, delta in zip(energy, blocks, strict=True)]
    whole: Delta = Stacked(tensor.shape, tuple(blocks)) if tensor.fused else blocks[0]
    most = max(block.rank for block in blocks)
    figures = Measured(tensor.name, whole.kind, tensor.shape, most, norm, math.sqrt(math.fsum(cut)))
    return whole, figures, spectra


def _factored(tensor: Tensor, block: Block, how: How, rank: int | None, base: Rows) -> tuple[LowRank, torch.Tensor]:
    """(factors of the result, its singular values): from the parts' factors where that is possible."""
    result = tensor.factored(block, how)
    if result is not None and rank is None:
        return result, svd(result).values
    found = dense_svd(tensor.combined(block, how, base)) if result is None else svd(result)
    root = found.values[:rank].sqrt()
    return LowRank(block.shape, found.left[:, :rank] * root, found.right[:rank] * root[:, None]), found.values


def _without_factors(lineup: Lineup) -> Iterator[tuple[Tensor, Part]]:
    for tensor in lineup.tensors.values():
        known = (LowRank, Stacked, Untouched, Added) if tensor.vector else (LowRank, Stacked, Untouched)
        yield from ((tensor, part) for part in tensor.parts if not isinstance(part.delta, known))


def _check_rank(how: How, rank: int | None, max_residual: float) -> None:
    if how.entry.ranked and rank is None:
        raise DeltaError(
            f"{how.method} needs the rank that its result is brought to",
            expected="a rank, or a merge, which needs none",
            hint="--rank 64, or --method exact",
        )
    if rank is not None and not how.entry.ranked:
        raise DeltaError(
            f"{how.method} keeps the sum of the ranks, and rank {rank} was given", hint=f"--method svd --rank {rank}"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise DeltaError(f"the rank is {rank!r}", expected="a whole number of at least 1")
    if not 0 <= max_residual < math.inf:
        raise DeltaError(f"max_residual is {max_residual!r}", expected="a number of at least 0, such as 0.05")


def _holdable(lineup: Lineup, how: How, drop: bool) -> tuple[Lineup, list[Measured]]:
    """What a LoRA adapter can hold, and the figures of what is left out; `exact` takes factors alone."""
    lost = homeless(lineup, alone=not drop)
    if lost and (not drop or len(lost) == len(lineup.tensors)):
        raise refuse(lost, lineup)
    kept = replace(lineup, tensors={name: each for name, each in lineup.tensors.items() if name not in lost})
    inexact = [] if how.entry.ranked else list(_without_factors(kept))
    if inexact:
        raise DeltaError(
            f"{how.method} cannot keep " + listed(inexact),
            expected="LoRA factors, whose ΔW is the same on every base",
            hint="--method svd --rank R takes their ΔW on this base and states the error; or merge them directly",
        )
    norms = {name: math.sqrt(square(tensor, lineup.bases[name])) for name, tensor in lost.items()}
    return kept, [Measured(name, LEFT_OUT, lost[name].shape, 0, norm, norm) for name, norm in norms.items()]


def _too_far(combined: Combined, spectra: Sequence[torch.Tensor]) -> DeltaError:
    worst = sorted(combined.tensors, key=lambda tensor: -tensor.residual)[:3]
    named = ", ".join(f"{tensor.name} {tensor.residual:.1%}" for tensor in worst)
    missing = math.fsum(tensor.error**2 for tensor in combined.tensors if tensor.kind == LEFT_OUT)
    room = (combined.norm * combined.max_residual) ** 2 - missing
    enough = _rank_enough(spectra, math.sqrt(room)) if room > 0 else None
    at = f"at rank {combined.rank} " if combined.rank else ""
    wider = f"--max-residual {math.ceil(100 * combined.residual) / 100:g}"
    said = f"rank {enough} is enough" if enough else "what is left out is more than that"
    return DeltaError(
        f"{at}the result of {combined.how.method} is off by {combined.residual:.1%} of ‖ΔW‖; worst: {named}",
        expected=f"at most {combined.max_residual:.1%} (--max-residual); {said}",
        hint=f"--rank {enough}, or merge directly, which needs no rank" if enough else f"{wider}, or merge directly",
    )


def _some(left_out: Sequence[Measured]) -> str:
    names = [tensor.name for tensor in left_out]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rank_enough(spectra: Sequence[torch.Tensor], error: float) -> int:
    """The smallest rank of all tensors at which √Σ_{i>rank} σᵢ² is at most `error`."""
    energy = torch.zeros(max(values.numel() for values in spectra) + 1, dtype=torch.float64)
    for values in spectra:
        energy[: values.numel()] += values.square()
    tail = energy.flip(0).cumsum(0).flip(0)  # tail[k]: what rank k leaves out
    return int((tail > error**2).sum())


def _reference(parents: Sequence[tuple[str, float]], how: How) -> str:
    return f"{how.method}({', '.join(f'{reference}:{weight:g}' for reference, weight in parents)})"
