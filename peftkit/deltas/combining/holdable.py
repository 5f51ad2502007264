"""What no LoRA adapter can hold, such as norms: refused by name with its share of ‖ΔW‖², or left out on request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from peftkit.deltas.combining.lineup import Lineup, Part, Tensor
from peftkit.deltas.delta import Rows
from peftkit.errors import DeltaError

_NAMED = 40
"""As many tensors of one kind are named in a message."""
_PIECE = 1 << 20
"""Entries of ΔW in memory at once."""


def homeless(lineup: Lineup, *, alone: bool = True) -> dict[str, Tensor]:
    """Tensors that no layer of PEFT's LoRA has: norms, other parameters, and the biases of layers without factors.

    Unless each is taken `alone`, all biases beside an adapted embedding too: PEFT has no adapter for both (`lora_bias`,
    peft 0.21).
    """
    matrices = [tensor.place for tensor in lineup.tensors.values() if not tensor.vector]
    adapted = {place.module for place in matrices if place.layer != "other"}
    biases = alone or not any(place.layer in ("embedding", "experts") for place in matrices)

    def held(tensor: Tensor) -> bool:
        if tensor.vector:
            return biases and tensor.place.layer == "bias" and tensor.place.module in adapted
        return tensor.place.layer != "other"

    return {name: tensor for name, tensor in lineup.tensors.items() if not held(tensor)}


def refuse(lost: Mapping[str, Tensor], lineup: Lineup) -> DeltaError:
    """The error that names what cannot be held, and how much of Σ wᵢ ΔWᵢ that is."""
    squares = {name: square(tensor, lineup.bases[name]) for name, tensor in lineup.tensors.items()}
    whole = math.fsum(squares.values())
    share = math.fsum(squares[name] for name in lost) / whole if whole else 0.0
    some = "--drop leaves them out and counts them in the error; or " if len(lost) < len(lineup.tensors) else ""
    named = listed([(tensor, part) for tensor in lost.values() for part in tensor.parts])
    return DeltaError(
        f"no LoRA adapter can hold {named}; that is {share:.2g} of ‖ΔW‖²",
        expected="matrices, and the biases of layers whose weight changes too",
        hint=f"{some}merge the adapters directly: peftkit merge takes every kind",
    )


def square(tensor: Tensor, base: Rows) -> float:
    """‖Σ wᵢ ΔWᵢ‖² of one tensor, by rows of a bounded size."""
    rows, columns = tensor.matrix
    step, found = max(1, _PIECE // max(columns, 1)), 0.0
    for first in range(0, rows, step):
        last = min(first + step, rows)
        total = torch.zeros(last - first, columns, dtype=torch.float64)
        for part in tensor.parts:
            total += tensor.change(part, first, last, base) * part.weight
        found += float(total.square().sum())
    return found


def listed(found: Sequence[tuple[Tensor, Part]]) -> str:
    """The tensors by adapter and kind: `DoRA of a@1: x, y`."""
    ordered = sorted(found, key=lambda pair: (pair[1].reference, pair[1].delta.kind, pair[0].name))
    groups = []
    for (reference, kind), pairs in groupby(ordered, key=lambda pair: (pair[1].reference, pair[1].delta.kind)):
        names = [tensor.name for tensor, _ in pairs]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        groups.append(f"{kind} of {reference}: {', '.join(names[:_NAMED])}{more}")
    return "; ".join(groups)
