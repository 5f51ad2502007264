"""From base, deltas and settings to the list of tensors that a merge writes; what cannot be merged is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbone.converted import converted_weights, quantization_config
from peftkit.backbone.roundtrip import Format
from peftkit.base.dense import Dense, EightBit, FourBit, dense_tensors
from peftkit.base.raw import Stored
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.layout import NAMES, TORCH
from peftkit.deltas.merging.product import Copied, Given, Product, Rounded
from peftkit.deltas.merging.requantized import Requantized, RowMajor
from peftkit.deltas.merging.settings import MergeSettings
from peftkit.deltas.merging.weight import Weight
from peftkit.errors import DeltaError


@dataclass(frozen=True)
class Task:
    """The base, the deltas, and what was asked."""

    folder: Path
    config: Mapping[str, Any]
    """config.json of the base."""
    merged_config: Mapping[str, Any]
    """config.json of the merged model, without its quantization."""
    deltas: Deltas
    settings: MergeSettings
    trained_on: Mapping[str, Any] | None
    """The manifest's `base.quantization`."""


def products(task: Task) -> list[Product]:
    """Every unit of the merged model, in the order of the base's files. Raises DeltaError, BaseError, BackboneError."""
    dense = dense_tensors(task.folder)
    upload = any(not isinstance(tensor, Stored) for tensor in dense.values())
    _check_base(task, upload)
    _check_names(task.deltas, dense)
    _check_head(task)
    simulated = _simulated(task, upload, dense)
    merged = dict(dense) | {name: dense[source] for name, source in task.deltas.sources.items()}
    written = _written_form(task.settings)
    packed = converted_weights(task.merged_config, written, merged) if written else {}
    headed, found = task.deltas.headed, list[Product]()
    for name in sorted(merged, key=lambda name: (*_position(merged[name]), name)):
        written_as = headed.files.get(name) if headed else name
        if written_as is None:  # a language head, which the task's model has no place for
            continue
        form, transposed = simulated.get(name, (None, False))
        transposed = transposed or packed.get(name, False)
        weight = Weight(written_as, merged[name], task.deltas.changes.get(name), form, transposed)
        if name in packed and written:
            found += _in_few_bits(weight, written, task)
        else:
            found.append(_plain(weight, task))
    added = task.deltas.added
    return [*found, *(Given(name, added[name], _dtype_of(added[name], task)) for name in sorted(added))]


def written_config(task: Task) -> dict[str, Any]:
    """config.json as it is written: with the quantization of the output."""
    form = _written_form(task.settings)
    quantized = {"quantization_config": quantization_config(form)} if form else {}
    return dict(task.merged_config) | quantized


def _plain(weight: Weight, task: Task) -> Product:
    dense = weight.dense
    same = dense.dtype not in TORCH or TORCH[dense.dtype] == _dtype(weight, task)
    if isinstance(dense, Stored) and same and not weight.delta and not weight.simulate:
        return Copied(dense, weight.name)
    if dense.dtype not in TORCH:
        raise DeltaError(f"{weight.name} is stored as {dense.dtype}", expected="one of " + ", ".join(TORCH))
    weight.source()  # checks shapes and bytes
    return Rounded(weight, _dtype(weight, task))


def _in_few_bits(weight: Weight, form: Format, task: Task) -> list[Product]:
    dtype = _dtype(weight, task)
    held = Format(form.code, form.double_quant, torch.float32 if dtype == torch.float64 else dtype)
    weight.source()
    product = Requantized(weight, held, task.settings.rounding, task.settings.seed)
    if form.code != "int8":
        return [product]
    if product.unit.bytes % 4:
        raise DeltaError(f"{weight.name} has {weight.shape} numbers", expected="a multiple of four", hint="choose nf4")
    return [product, RowMajor(weight.name.removesuffix(".weight"))]


def _dtype(weight: Weight, task: Task) -> torch.dtype:
    """What the output holds the tensor in; int8 uploads do not say what they came from, their config does."""
    if task.settings.dtype != "keep":
        return getattr(torch, task.settings.dtype)  # type: ignore[no-any-return]
    if isinstance(weight.dense, EightBit):
        said = getattr(torch, str(task.config.get("dtype") or task.config.get("torch_dtype")), torch.float32)
        return said if said in NAMES else torch.float32
    return TORCH[weight.dense.dtype]


def _dtype_of(values: torch.Tensor, task: Task) -> torch.dtype:
    """What the output holds a tensor of a head in."""
    kept = task.settings.dtype == "keep"
    return values.dtype if kept else getattr(torch, task.settings.dtype)


def _position(dense: Dense) -> tuple[str, int]:
    stored = dense.packed if isinstance(dense, FourBit) else dense.rows if isinstance(dense, EightBit) else dense
    return (str(stored.path), stored.start) if isinstance(stored, Stored) else ("", 0)


def _written_form(settings: MergeSettings) -> Format | None:
    if settings.quantize is None:
        return None
    return Format(settings.quantize, settings.double_quant and settings.quantize != "int8")


def _simulated(task: Task, upload: bool, dense: Mapping[str, Dense]) -> dict[str, tuple[Format, bool]]:
    """The linear weights that training saw quantized, with how, and whether the file has them transposed."""
    if task.settings.onto == "original" or upload:
        return {}
    head = task.deltas.headed.head if task.deltas.headed else None
    form = Format.of_record(task.trained_on or {})
    if form is None:
        bits = (task.trained_on or {}).get("bits")
        saw = f"saw the base in {bits} bits" if bits else "does not say in what its base was held"
        raise DeltaError(
            f"{task.deltas.reference} {saw}, so nothing was dequantized in its training",
            expected="an adapter trained on 4 or 8 bits",
            hint="choose --onto original",
        )
    files = task.deltas.headed.files if task.deltas.headed else {name: name for name in dense}
    own = {name: file for file, name in files.items()}
    return {own[name]: (form, turned) for name, turned in converted_weights(task.config, form, own, head).items()}


def _check_base(task: Task, upload: bool) -> None:
    stored = task.config.get("quantization_config")
    method = str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None
    if method not in (None, "bitsandbytes"):
        raise DeltaError(
            f"the base is quantized with {method}",
            expected="a 16- or 32-bit base, or one quantized with bitsandbytes",
            hint="merge onto the 16-bit upload of the same model",
        )
    if upload and task.settings.onto == "original":
        raise DeltaError(
            "the base was uploaded in few bits: its original weights are not in its files",
            expected="onto dequantized, or the base that it was quantized from",
            hint="choose --onto dequantized, or name the 16-bit upload with --base",
        )


def _check_head(task: Task) -> None:
    """Raise DeltaError for what a model with a task's head cannot be written as."""
    headed = task.deltas.headed
    if headed is None or headed.answers:
        return
    if task.settings.quantize:
        raise DeltaError(
            f"{task.deltas.reference} has a {headed.head.kind} head, and --quantize {task.settings.quantize} is for "
            "models with a language head",
            expected="16 or 32 bits",
            hint="leave --quantize out; quant.bits=4 quantizes the merged model whenever it is loaded",
        )
    if homeless := sorted(task.deltas.changes.keys() - headed.files.keys()):
        raise DeltaError(
            f"{task.deltas.reference} changes {homeless[0]}, and a model with a {headed.head.kind} head has none",
            expected="changes of tensors that the model has",
        )


def _check_names(deltas: Deltas, dense: Mapping[str, Dense]) -> None:
    """Every delta must have its tensor and finite numbers, before anything is written."""
    if not deltas.changes and not deltas.added:
        raise DeltaError(f"{deltas.reference} changes nothing", expected="a delta of one tensor or more")
    for name, source in deltas.sources.items():
        if source not in dense or name in dense:
            raise DeltaError(f"{deltas.reference} makes {name} from {source}, which the base's files do not allow")
    absent = sorted(name for name in deltas.changes if name not in dense and name not in deltas.sources)
    if absent:
        raise DeltaError(
            f"{deltas.reference} changes {len(absent)} tensors that the base does not have: {', '.join(absent[:3])}",
            expected="the base that it was trained on",
            hint="name that base with --base",
        )
    for name, delta in deltas.changes.items():
        own = tuple(dense[deltas.sources.get(name, name)].shape)
        if len(delta.shape) != len(own) or tuple(delta.shape[1:]) != own[1:]:
            raise DeltaError(f"{name} has the shape {delta.shape} in {deltas.reference} and {own} in the base")
        bad = sum(int(torch.count_nonzero(~torch.isfinite(tensor))) for tensor in tensors_of(delta))
        if bad:
            raise DeltaError(
                f"{deltas.reference} holds {bad} NaN or infinite numbers for {name}",
                expected="finite numbers",
                hint="train it again from an earlier checkpoint",
            )


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The float tensors that a delta is made of."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, list | tuple) else []
