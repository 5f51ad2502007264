"""How much of the delta is left in a merged GGUF: its numbers read back, against the base's in the same encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from peftkit.base.raw import Array
from peftkit.base.ref import read_config
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.companions import merged_config
from peftkit.deltas.merging.kept import Kept, total
from peftkit.deltas.merging.product import Rounded
from peftkit.deltas.merging.receipt import LEAST, WORST
from peftkit.deltas.merging.settings import MergeSettings
from peftkit.deltas.merging.weight import Weight, kept_of, squared
from peftkit.deltas.merging.work import Task, products
from peftkit.errors import DeltaError
from peftkit.events import Phase, Progress, Report, silent
from peftkit.release.export.gguf_file import Dtype, encoded
from peftkit.release.export.gguf_names import Target, interleaved, layout

_STEP = 1 << 18
"""Numbers that are compared at once."""
_TYPES: Mapping[Any, Dtype] = {
    gguf.GGMLQuantizationType.F32: "f32",
    gguf.GGMLQuantizationType.F16: "f16",
    gguf.GGMLQuantizationType.BF16: "bf16",
    gguf.GGMLQuantizationType.Q8_0: "q8_0",
}
_FINER: Mapping[Dtype, str] = {
    "q8_0": "--dtype bfloat16, float16 or float32",
    "bf16": "--dtype float16 or float32",
    "f16": "--dtype float32",
    "f32": "train for longer",
}
_WHAT = (
    "ΔŴ is a tensor of the file minus the base's own, encoded in the same way; kept: ⟨ΔŴ, ΔW⟩ / ‖ΔW‖²; "
    "noise: ‖ΔŴ − ΔW‖ / ‖ΔW‖; unchanged: entries that are the base's"
)


@dataclass(frozen=True)
class KeptInFile:
    """What each changed tensor of a GGUF file keeps of its delta."""

    file: str
    dtype: Dtype
    tensors: Mapping[str, Kept]
    """By their names in the base."""
    forms: Mapping[str, str]
    """Tensor → its kind of delta, and the type that the file holds it in: `LoRA in bf16`."""

    @property
    def groups(self) -> dict[str, Kept]:
        """By kind and type: over all tensors, a replaced head would hide that every LoRA was rounded away."""
        forms = sorted(set(self.forms.values()))
        return {form: total(kept for name, kept in self.tensors.items() if self.forms[name] == form) for form in forms}

    def record(self) -> dict[str, Any]:
        """Plain JSON, as a receipt holds it."""
        return {
            "what": _WHAT,
            "dtype": self.dtype,
            "weights": total(self.tensors.values()).figures() | {"worst": self._by_share()[:WORST]},
            "groups": {form: kept.figures() for form, kept in self.groups.items()},
            "tensors": {name: kept.figures() for name, kept in sorted(self.tensors.items())},
        }

    def lost(self) -> DeltaError | None:
        """The error for a group that keeps less than 90 % of its delta, None when all keep more."""
        shares = {form: kept.share for form, kept in self.groups.items() if kept.share is not None}
        form = min(shares, key=lambda each: shares[each], default=None)
        if form is None or shares[form] >= LEAST:
            return None
        worst = next(name for name in self._by_share() if self.forms[name] == form)
        kept = self.tensors[worst]
        return DeltaError(
            f"{self.file} keeps {100 * shares[form]:.1f} % of the delta ({form}); least in {worst}: "
            f"{100 * (kept.share or 0):.1f} %, {100 * kept.unchanged / kept.entries:.0f} % of its entries unchanged",
            expected=f"at least {100 * LEAST:.0f} %; nothing was written",
            hint=f"{_FINER[self.dtype]}, or write it all the same with --force",
        )

    def _by_share(self) -> list[str]:
        shares = {name: kept.share for name, kept in self.tensors.items() if kept.share is not None}
        return sorted(shares, key=lambda name: (shares[name], name))


def kept_in(
    path: Path,
    dtype: Dtype,
    base: Path,
    deltas: Deltas,
    settings: MergeSettings,
    *,
    trained_on: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> KeptInFile:
    """Read every changed tensor of the GGUF file `path` back, and compare it with base + ΔW, computed in float64.

    `settings` and `trained_on` are those of the merge. Memory: some rows of one tensor. Raises DeltaError for a tensor
    that the file does not hold in the shape of the merged model.
    """
    config = read_config(base)
    task = Task(base, config, merged_config(config, base, deltas, settings), deltas, settings, trained_on)
    weights = [made.weight for made in products(task) if isinstance(made, Rounded) and made.weight.delta is not None]
    plan = layout(task.merged_config)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found, forms = {}, {}
    report(Phase("reading back", len(weights), "tensors"))
    for done, weight in enumerate(weights, start=1):
        target = plan.target(weight.name)
        tensor = held.get(target.name) if target else None
        if target is None or tensor is None or tuple(int(n) for n in reversed(tensor.shape)) != weight.shape:
            raise DeltaError(
                f"{path.name} does not hold {weight.name} in the shape {weight.shape}",
                expected="every tensor that the adapter changes",
                hint="this is a bug in peftkit; nothing was written",
            )
        found[weight.name] = _kept(weight, target, tensor)
        kind = weight.delta.kind if weight.delta else ""
        forms[weight.name] = f"{kind} in {_TYPES[tensor.tensor_type]}"
        report(Progress(done, {}))
    return KeptInFile(path.name, dtype, found, forms)


def _kept(weight: Weight, target: Target, tensor: Any) -> Kept:
    source = weight.source()
    delta = weight.prepared(source)
    assert delta is not None  # `kept_in` takes no others
    rows, columns = weight.matrix
    unit = target.head_rows or 1
    step = rows if rows == 1 else max(_STEP // max(columns, 1) // unit, 1) * unit
    kept = Kept()
    for first in range(0, rows, step):
        last = min(first + step, rows)
        base = source.rows(first, last)
        change, _ = weight.changed(delta, source, first, last, base.clone())
        alone = _encoded(target, base.numpy(), _TYPES[tensor.tensor_type], len(weight.shape))
        data = tensor.data if len(weight.shape) < 2 else tensor.data[first:last]
        stored = gguf.dequantize(data, tensor.tensor_type).reshape(alone.shape)
        wanted = _placed(target, change.numpy(), len(weight.shape))
        error = stored.astype(np.float64) - alone - wanted
        unchanged = int(np.count_nonzero(stored == alone))
        kept = kept + kept_of(
            weight, squared(base), torch.from_numpy(np.ascontiguousarray(wanted)), torch.from_numpy(error), unchanged
        )
    return kept


def _placed(target: Target, rows: Array, dimensions: int) -> Array:
    """Rows as the file orders them; a vector, one row, is a column of heads there."""
    if target.head_rows is None:
        return rows
    found: Array = interleaved(rows.reshape(-1, 1) if dimensions < 2 else rows, target.head_rows)
    return found.reshape(rows.shape)


def _encoded(target: Target, rows: Array, dtype: Dtype, dimensions: int) -> Array:
    """The base's rows as a file of this type would give them back, float32."""
    values = _placed(target, rows.astype(np.float32), dimensions) + np.float32(target.offset)
    data = np.frombuffer(encoded(target.name, values, dtype), np.uint8).reshape(len(rows), -1)
    kind = next(kind for kind, name in _TYPES.items() if name == dtype)
    found: Array = gguf.dequantize(data, kind)
    return found
