"""Which shortcuts are right for a model: each is tried on a few made-up rows, and taken when it changes nothing.

Whether a model can be called with rows laid flat, and what it does to its head's output, is not looked up by its name:
its plain pass says what is right. Rows are flat only where each row's states are those of the row on its own, and do
not move when the row before it is another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.backbone.quiet import quiet
from peftkit.errors import OutOfMemory
from peftkit.events import Report, silent
from peftkit.generation.forward import autocast, pad
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.passes.flat import (
    attends_by_row,
    attention_by_row,
    lay_flat,
    longest_flat,
    place_of_starts,
)
from peftkit.training.passes.head import Head, amplified, states_before
from peftkit.training.passes.paths import Paths, told
from peftkit.training.spec import TrainSpec
from peftkit.tuning.fused import fused_lora
from peftkit.tuning.tuned import Tuned

_LENGTHS = (5, 11, 8)
_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from the plain pass, relative to the largest number: some hundred roundings of the dtype."""
_UNMOVED = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.0, torch.float16: 0.0}
"""Largest change of a row's states when another row changes, in the same units."""


def find_paths(
    tuned: Tuned, *, rows_as_batch: bool = False, logits: bool = False, sharded: bool = False, report: Report = silent
) -> Paths:
    """The shortcuts that are right for a model, tried in a few passes of at most 33 tokens in evaluation mode.

    `rows_as_batch`: something needs the rows side by side (noise on embeddings, a cached trunk); `logits`: the loss
    needs them whole (R-Drop); `sharded`: FSDP gathers weights by module calls, so the model's own ways are kept.
    """
    virtual: int = getattr(tuned.model, "virtual_tokens", False)
    if sharded or virtual:
        why = "FSDP gathers weights as the model calls its modules" if sharded else "virtual tokens stand before rows"
        return told(Paths(virtual_tokens=int(virtual), reasons=(why,)), report)
    mode = tuned.model.training
    tuned.model.eval()
    try:
        with quiet(), torch.no_grad(), autocast(tuned.backbone.device, tuned.backbone.placement.compute_dtype):
            found = _tried(tuned, rows_as_batch=rows_as_batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory in a pass of {sum(_LENGTHS)} tokens, which tries what is right for this model",
            expected="room for the shortest step",
            hint="hold the base in fewer bits (quant.bits=4)",
        ) from error
    finally:
        tuned.model.train(mode)
    if logits:
        found = replace(found, head=None, reasons=(*found.reasons, "the loss compares whole distributions"))
    with fused_lora(tuned.model) as layers:
        found = replace(found, fused=layers > 0)
    return told(found, report)


def side_by_side(spec: TrainSpec) -> bool:
    """Whether something in a run needs its rows side by side: a cached trunk, noise on embeddings, R-Drop."""
    return bool(spec.trunk_cache or spec.regularize.on_embeddings or spec.regularize.r_drop)


def paths_for(tuned: Tuned, spec: TrainSpec, *, sharded: bool = False, report: Report = silent) -> Paths:
    """The shortcuts of a run with these settings."""
    return find_paths(
        tuned,
        rows_as_batch=side_by_side(spec),
        logits=bool(spec.regularize.r_drop),
        sharded=sharded,
        report=report,
    )


@dataclass(frozen=True)
class _Row:
    input_ids: list[int]
    labels: list[int]


def _tried(tuned: Tuned, *, rows_as_batch: bool) -> Paths:
    model, inner, device = tuned.model, tuned.inner, tuned.backbone.device
    accepted = inspect.signature(inner.forward).parameters
    keeps_some = "logits_to_keep" in accepted
    vocabulary = int(inner.config.get_text_config().vocab_size)
    rows = [_made(length, at, vocabulary) for at, length in enumerate(_LENGTHS)]
    batch = pad(rows, 0, device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    plain = model(**inputs, use_cache=False).logits
    head, why = _head(model, inner, inputs, plain)
    if head is None:
        return Paths(keeps_some=keeps_some, reasons=(why,))
    found = Paths(head=head, keeps_some=keeps_some)
    if rows_as_batch:
        return replace(found, reasons=("something needs the rows side by side",))
    if "position_ids" not in accepted:
        return replace(found, reasons=("the model takes no position_ids",))
    if not attends_by_row(inner):
        return replace(found, reasons=("eager attention would score all pairs of all rows' tokens",))
    wanted = _of_rows(states_before(head.module, model, **inputs), batch["attention_mask"])
    why = _flat_differs(model, inner, head, rows, wanted, device)
    if why:
        return replace(found, reasons=(why,))
    return replace(found, flat=True, longest=longest_flat(inner))


def _head(model: Any, inner: Any, inputs: dict[str, Any], plain: torch.Tensor) -> tuple[Head | None, str]:
    """The head whose logits are the model's, among the few things that models do to them."""
    module = inner.get_output_embeddings()
    if module is None:
        return None, "the model names no head"
    try:
        states = states_before(module, model, **inputs)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return None, f"the head's input cannot be read ({_line(error)})"
    # What caps large logits does nothing to small ones, so large ones are compared too.
    factor = float(100 / plain.abs().max().clamp(min=1e-6))
    with amplified(module, factor):
        large = model(**inputs, use_cache=False).logits
    for head in _candidates(module, plain.shape[-1], inner.config.get_text_config()):
        if _close(head.logits(states), plain, _CLOSE) and _close(head.logits(states * factor), large, _CLOSE):
            return head, ""
    return None, "the model does something of its own to its head's output"


def _candidates(module: torch.nn.Module, vocabulary: int, config: Any) -> Iterator[Head]:
    """What models do to their head's output: nothing, a factor, a cap, or both."""
    scales: list[Any] = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    scales.append(1 / divisor if (divisor := getattr(config, "logits_scaling", None)) else None)
    for cap in dict.fromkeys((None, getattr(config, "final_logit_softcapping", None))):
        for scale in dict.fromkeys((1.0, *(float(scale) for scale in scales if scale))):
            yield Head(module, vocabulary, scale, cap)


def _flat_differs(
    model: Any, inner: Any, head: Head, rows: list[_Row], wanted: list[torch.Tensor], device: torch.device
) -> str:
    """Why rows cannot be laid flat; empty where they can."""
    vocabulary = head.vocabulary
    others = [_made(len(rows[0].input_ids), 7, vocabulary), *rows[1:]]
    try:
        place = place_of_starts(inner, device)
        with attention_by_row(inner):
            found, moved = (_flat_states(model, head, some, device, place) for some in (rows, others))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"it cannot be called with rows laid flat ({_line(error)})"
    if not all(_close(one, right, _CLOSE) for one, right in zip(found, wanted, strict=True)):
        return "its states of rows laid flat are not those of the rows"
    if not all(_close(one, again, _UNMOVED) for one, again in zip(found[1:], moved[1:], strict=True)):
        return "rows laid flat see one another"
    return ""


def _flat_states(
    model: Any, head: Head, rows: list[_Row], device: torch.device, place: torch.device | None
) -> list[torch.Tensor]:
    batch = lay_flat(rows, device, starts_on=place)
    labels = batch.pop("labels")
    states = states_before(head.module, model, **batch)[0]
    assert states.shape[0] == labels.shape[1]
    return list(states.split([len(row.input_ids) for row in rows]))


def _of_rows(states: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[: int(length)] for row, length in zip(states, mask.sum(dim=1), strict=True)]


def _made(length: int, seed: int, vocabulary: int) -> _Row:
    """A row of made-up tokens, all over the vocabulary."""
    ids = [(7919 * (at + 1) + 104729 * seed) % vocabulary for at in range(length)]
    return _Row(ids, ids)


def _close(one: torch.Tensor, other: torch.Tensor, within: dict[torch.dtype, float]) -> bool:
    if one.shape != other.shape or not torch.isfinite(one).all():
        return False
    apart = (one.double() - other.double()).abs().max()
    # In 32 bits a state may have been through 16-bit products: autocast's dtype is what was rounded to.
    dtype = torch.get_autocast_dtype(one.device.type) if torch.is_autocast_enabled(one.device.type) else one.dtype
    return bool(apart <= within[dtype] * other.double().abs().max().clamp(min=1e-12))


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:120]
