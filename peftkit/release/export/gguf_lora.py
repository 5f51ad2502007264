"""A LoRA adapter as a GGUF file for llama.cpp and Ollama, with nothing left for them to scale.

llama.cpp adds `adapter_scale · alpha / rank · B A`, with one alpha for the file and the rank of each tensor
(llama-adapter.h, `get_scale`); rsLoRA and alpha patterns do not exist there. So each module's own factor is folded into
its B: B' = B · scale · rank / alpha, in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import torch

from peftkit.base.raw import Array, json_file
from peftkit.deltas.delta import Delta, Deltas, LowRank
from peftkit.errors import DeltaError
from peftkit.events import Report, silent
from peftkit.release.export.gguf_file import Tensor, Written, check_dtype, check_new, write
from peftkit.release.export.gguf_names import Layout, Target, interleaved, layout

_INSTEAD = "merge the adapter and export the merged model as GGUF"


def write_lora_gguf(
    deltas: Deltas,
    base_folder: Path,
    out: Path,
    dtype: Literal["f32", "f16"] = "f32",
    *,
    report: Report = silent,
) -> Written:
    """Write a LoRA adapter in the layout of llama.cpp's convert_lora_to_gguf.py; only config.json of the base is read.

    `<name>.lora_a` has the shape (k, in) and `<name>.lora_b` (out, k); alpha is the largest rank. Raises DeltaError,
    before anything is written, for a delta that llama.cpp's adapters cannot hold: anything but LoRA, a tied head or
    embedding, biases, norms, an architecture that is not tested.
    """
    check_dtype(dtype)
    check_new(out)
    plan = layout(json_file(base_folder / "config.json"))
    checked = [_checked(deltas, plan, name, delta) for name, delta in deltas.changes.items()]
    pairs = [(target, delta) for target, delta in checked if delta.rank]
    if not pairs:
        raise DeltaError(f"{deltas.reference} changes nothing", expected="an adapter with at least one LoRA module")
    alpha = float(max(delta.rank for _, delta in pairs))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(deltas.reference)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    tensors = [tensor for target, delta in pairs for tensor in _pair(target, delta, alpha, dtype)]
    return write(out, plan.family.arch, describe, tensors, report=report)


def _checked(deltas: Deltas, plan: Layout, name: str, delta: Delta) -> tuple[Target, LowRank]:
    place = deltas.places[name]
    if not isinstance(delta, LowRank):
        raise _refused(deltas, name, f"its delta is of kind {delta.kind}", "LoRA of linear layers")
    if place.layer not in ("linear", "embedding"):
        raise _refused(deltas, name, f"it belongs to a layer of kind {place.layer}", "linear layers and embeddings")
    if plan.tied and (place.layer == "embedding" or name in deltas.sources):
        # llama.cpp uses the one tensor for both, and aborts (github.com/ggml-org/llama.cpp/issues/9065).
        raise _refused(deltas, name, "head and embedding of this base are one tensor", "adapters that leave it alone")
    target = plan.target(name)
    if target is None:
        raise _refused(deltas, name, "the base's GGUF file does not hold it", "tensors of the base")
    return target, delta


def _refused(deltas: Deltas, name: str, why: str, expected: str) -> DeltaError:
    return DeltaError(
        f"{deltas.reference} changes {name}, which a LoRA in GGUF cannot say: {why}", expected=expected, hint=_INSTEAD
    )


def _pair(target: Target, delta: LowRank, alpha: float, dtype: Literal["f32", "f16"]) -> Iterator[Tensor]:
    factor = delta.scale * delta.rank / alpha
    a, b = delta.right.double(), delta.left.double() * factor
    if target.head_rows is not None:
        b = interleaved(b, target.head_rows)
    if target.name == "token_embd.weight":
        # ggml looks rows of lora_a up by token and multiplies them with lora_b: A and B change places.
        a, b = b, a.T
    for suffix, values in (("lora_a", a), ("lora_b", b)):
        yield Tensor(f"{target.name}.{suffix}", tuple(values.shape), dtype, partial(_whole, values.contiguous()))


def _whole(values: torch.Tensor) -> list[Array]:
    return [values.numpy()]
