"""What a setting may give up to fit into memory: the values of each field, and the words for a change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftkit.planning.setting import Setting
from peftkit.render import size

FIELDS = (
    "micro_batch",
    "gradient_checkpointing",
    "checkpointed_blocks",
    "optim",
    "activation_offloading",
    "bits",
    "evaluation_batch",
)
"""Fields that may change without consent; none of them changes the effective batch or the rows."""

_BITS: dict[int, tuple[Any, ...]] = {32: (32, 8, 4), 16: (16, 8, 4), 8: (8, 4), 4: (4,)}
_OPTIM: dict[str, tuple[Any, ...]] = {
    "adamw_torch": ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
    "adamw_torch_fused": ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"),
    "adamw_8bit": ("adamw_8bit", "paged_adamw_8bit"),
}
BITS_OF: dict[str, tuple[int, ...]] = {"loftq": (4, 8), "loha": (8, 16, 32), "lokr": (8, 16, 32), "full": (16, 32)}
"""Bits that a method trains over, where not all: those of `tuning.methods.METHODS`, which no plan imports."""

_REASONS = {
    "micro_batch": "micro-batch {was} → {now}: {gain}, {rate}, keeps the effective batch {rows}",
    "gradient_checkpointing": "checkpointing {state}: {gain}, {rate}, the same gradients",
    "checkpointed_blocks": "checkpointing of {blocks}: {gain}, {rate}, the same gradients",
    "optim": "optimizer {was} → {now}: {gain}, {rate}, its states are rounded to 8 bits",
    "activation_offloading": "offloading of activations to host memory {state}: {gain}, {rate}, the same gradients",
    "bits": "weights of {was} → {now} bits: {gain}, {rate}, the base is rounded",
    "evaluation_batch": "evaluation batch {was} → {now}: {gain} in evaluation, its {rate}, the same figures",
    "longest": "rows of at most {was:,} → {now:,} tokens: {gain}, {rate}, longer rows are cut",
}


@dataclass(frozen=True)
class Concession:
    """One field that was changed to fit, or to use memory that was free."""

    field: str
    before: Any
    after: Any
    bytes_saved: int
    """High estimate of the stage it is about, before less after; negative where free memory is used."""
    time_factor: float
    """Time of a step (of an evaluation, for evaluation_batch) after over before."""
    reason: str


def choices(setting: Setting, name: str, fixed: frozenset[str]) -> tuple[Any, ...]:
    """Values of a field that may be tried for a setting, the most welcome first.

    Micro-batches divide the effective batch. Bits are those that the method trains over; prefix tuning goes with no
    checkpointing; 8-bit and paged states and offloading need CUDA.
    """
    asked = getattr(setting, name)
    on_card = setting.device == "cuda"
    if name in fixed:
        return (asked,)
    if name == "micro_batch":
        rows = setting.rows_per_step
        return tuple(count for count in range(rows, 0, -1) if rows % count == 0)
    if name == "gradient_checkpointing":  # which drops the cache that virtual tokens come in
        return (False, True) if setting.method != "prefix_tuning" else (asked,)
    if name == "checkpointed_blocks":  # `fit` finds the fewest that suffice
        return (None,)
    if name == "activation_offloading":
        return (False, True) if on_card else (asked,)
    if name == "optim":
        return _OPTIM.get(asked, (asked,)) if on_card else (asked,)
    if name == "bits":
        fine = BITS_OF.get(setting.method, _BITS[32])
        return tuple(bits for bits in _BITS[asked] if bits == asked or bits in fine)
    return tuple(_halved(asked))


def reason(name: str, after: Setting, was: Any, now: Any, saved: int, factor: float) -> str:
    """Why a field changed, with what it brings; `saved` in bytes, `factor` of time."""
    gain = f"{size(saved)} less" if saved >= 0 else f"{size(-saved)} more"
    rows, state = after.rows_per_step, "on" if now else "off"
    blocks = "all blocks" if now is None else "the lowest block alone" if now == 1 else f"the lowest {now} blocks alone"
    rate = f"time × {factor:.2f}"
    return _REASONS[name].format(was=was, now=now, state=state, gain=gain, rate=rate, rows=rows, blocks=blocks)


def _halved(count: int) -> Iterator[int]:
    while count > 1:
        yield count
        count //= 2
    yield 1
