"""Deltas as the plainest LoRA checkpoint: what every reader of PEFT's format understands alike.

The scaling is folded into B, so that lora_alpha == r; no rsLoRA, no patterns; ranks are filled up with zeros to the
largest; the layers are named one by one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peftkit.deltas.combining.combine import Combined
from peftkit.deltas.delta import Added, Delta, Deltas, LowRank, Place, Stacked
from peftkit.errors import DeltaError

_PREFIX = "base_model.model."
_LAYERS = ("linear", "conv1d", "conv", "embedding", "experts")

# PEFT wraps a module once for each parameter, in the order in which the module registers them: the last one is
# outermost and its keys lack `.base_layer` (peft 0.21, BaseTuner._inject_parameters). The experts of transformers 5.23
# register these two, in this order.
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Checkpoint:
    """A PEFT LoRA checkpoint in memory."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    tensors: dict[str, torch.Tensor]
    """float32, by the names of adapter_model.safetensors."""


def canonical_lora(
    deltas: Deltas | Combined,
    *,
    task_type: str | None = "CAUSAL_LM",
    base_model: str | None = None,
    revision: str | None = None,
    modules: Collection[str] = (),
) -> Checkpoint:
    """A plain LoRA checkpoint of these deltas, whose ΔW is theirs but for the rounding of its factors to float32.

    `modules` are those of the base (or its tensors' names without the last part): PEFT takes a name in target_modules
    for an ending, and those that would match by accident are excluded. Raises DeltaError, naming the tensors, for a
    delta that is not low-rank, for a layer whose bias alone changes, and for a mixture of layers that PEFT cannot hold.
    """
    deltas = deltas.deltas if isinstance(deltas, Combined) else deltas
    changes, places = deltas.changes, deltas.places
    _check(changes, places)
    factors = {name: _factors(changes[name], place) for name, place in places.items() if place.layer != "bias"}
    layers = [places[name].layer for name in factors]
    rank = max([1, *(a.shape[-2] for a, _ in factors.values())])
    biases = {places[name].module: delta for name, delta in changes.items() if places[name].layer == "bias"}
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in factors.items():
        tensors |= _named(a, b, rank, places[name], changes[name].shape, _wrapped(places[name], places))
    if biases:
        tensors |= _biases(tensors, biases)
    for name, place in deltas.shared.items():
        tensors |= _named(*_factors(changes[name], place), rank, place, changes[name].shape, False)
    everywhere = [*places.values(), *deltas.shared.values()]
    targets = sorted({p.module for p in everywhere if p.layer != "experts"})
    parameters = sorted({f"{_module(p)}.{p.parameter}" for p in places.values() if p.layer == "experts"})
    excluded = _excluded(targets, modules)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": targets,
        "target_parameters": parameters or None,
        "exclude_modules": excluded or None,
        "modules_to_save": None,
        "bias": "none",
        "lora_bias": bool(biases),
        "fan_in_fan_out": "conv1d" in layers,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return Checkpoint(config, {key: _single(key, tensors[key]) for key in sorted(tensors)})


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write adapter_model.safetensors and adapter_config.json; the same checkpoint gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {name: checkpoint.tensors[name].contiguous() for name in sorted(checkpoint.tensors)}
    (folder / "adapter_model.safetensors").write_bytes(save(ordered, metadata={"format": "pt"}))
    text = json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def _check(changes: Mapping[str, Delta], places: Mapping[str, Place]) -> None:
    wrong = []
    for name, delta in sorted(changes.items()):
        layer = places[name].layer if name in places else "other"
        fits = isinstance(delta, Added) and len(delta.shape) == 1 if layer == "bias" else False
        if layer in _LAYERS:
            fits = isinstance(delta, Stacked if len(delta.shape) == 3 and layer == "experts" else LowRank)
        if not fits:
            wrong.append(f"{name} ({delta.kind})")
    if wrong:
        raise DeltaError(
            "no LoRA layer can hold " + ", ".join(wrong),
            expected="low-rank deltas of matrices, and the biases of their layers",
            hint="combine it with --method svd --rank R, which states the error, or merge it",
        )
    layers = {places[name].layer for name in changes}
    for one, other in (("bias", "embedding"), ("bias", "experts"), ("conv1d", "experts")):
        if {one, other} <= layers:
            named = [name for name in sorted(changes) if places[name].layer in (one, other)]
            raise DeltaError(
                f"PEFT has no adapter for layers of kind {one} and {other} together: {', '.join(named[:4])} …",
                expected="one or the other",
                hint="merge it: peftkit merge takes every mixture; --drop leaves biases out and counts them as error",
            )


def _factors(delta: Delta, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with the scaling in B: (k, in) and (out, k), for experts with one more dimension in front."""
    if isinstance(delta, Stacked):
        most = max(block.rank for block in delta.blocks)
        pairs = [_factors(block, place) for block in delta.blocks]
        return torch.stack([_padded(a, most, 0) for a, _ in pairs]), torch.stack(
            [_padded(b, most, 1) for _, b in pairs]
        )
    if not isinstance(delta, LowRank):
        raise TypeError(delta.kind)
    left, right = delta.left.double(), delta.right.double()
    if place.layer in ("conv1d", "embedding") or place.transposed:
        left, right = right.T, left.T
    return right, left * delta.scale


def _named(
    a: torch.Tensor, b: torch.Tensor, rank: int, place: Place, shape: tuple[int, ...], wrapped: bool
) -> dict[str, torch.Tensor]:
    """A and B in the shapes and under the names that PEFT keeps them."""
    a, b = _padded(a, rank, -2), _padded(b, rank, -1)
    fused = a.dim() == 3
    module = f"{_PREFIX}{_module(place)}{'.base_layer' if wrapped else ''}"
    if place.layer == "embedding":
        return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    if place.layer == "conv":
        a, b = a.reshape(rank, *shape[1:]), b.reshape(*b.shape, *(1 for _ in shape[2:]))
    if fused:  # rows of A: expert by expert; columns of B: rank by rank, the experts within
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def _biases(tensors: Mapping[str, torch.Tensor], biases: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
    """A bias for every layer, as `lora_bias` demands: zeros where none changes."""
    missing = sorted(module for module in biases if f"{_PREFIX}{module}.lora_A.weight" not in tensors)
    if missing:
        raise DeltaError(
            f"the bias of {', '.join(missing)} changes and its weight does not",
            expected="LoRA on the weight of every layer whose bias changes",
            hint="merge it: peftkit merge takes biases alone",
        )
    found = {}
    for key, b in tensors.items():
        module = key.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
        if key.endswith(".lora_B.weight"):
            delta = biases.get(module)
            values = delta.rows(0, 1).reshape(-1) if isinstance(delta, Added) else b.new_zeros(b.shape[0])
            found[f"{_PREFIX}{module}.lora_B.bias"] = values
    return found


def _wrapped(place: Place, places: Mapping[str, Place]) -> bool:
    """Whether another parameter's wrapper lies around that of this one."""
    beside = {p.parameter for p in places.values() if p.layer == "experts" and _module(p) == _module(place)}
    if place.layer != "experts" or len(beside) == 1:
        return False
    if not beside <= set(_EXPERT_PARAMETERS):
        raise DeltaError(
            f"{_module(place)} has LoRA on {', '.join(sorted(beside))}, whose order in the module is not known",
            expected="one parameter of a module, or " + " and ".join(_EXPERT_PARAMETERS),
        )
    return place.parameter != _EXPERT_PARAMETERS[-1]


def _module(place: Place) -> str:
    """The module itself: PEFT's keys hold `.base_layer` for each wrapper around it."""
    name = place.module
    while place.layer == "experts" and name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _excluded(targets: Collection[str], modules: Collection[str]) -> list[str]:
    """Modules that PEFT would match by an ending although they are not meant."""
    known = set(targets)
    endings = {module: module.split(".") for module in modules if module not in known}
    return sorted(m for m, parts in endings.items() if any(".".join(parts[i:]) in known for i in range(1, len(parts))))


def _padded(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim) if shape[dim] else factor


def _single(key: str, tensor: torch.Tensor) -> torch.Tensor:
    single = tensor.to(torch.float32).contiguous().clone()
    if not torch.isfinite(single).all():
        raise DeltaError(f"{key} holds numbers that float32 cannot", expected="finite factors below 3.4e38")
    return single
