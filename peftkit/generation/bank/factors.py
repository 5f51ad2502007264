"""A stored adapter as the factors that a bank holds, and the reason, by name, when a bank cannot hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch

from peftkit.backbone.load import Backbone
from peftkit.base.dense import Dense
from peftkit.deltas.delta import LowRank
from peftkit.deltas.reading.read import read_deltas
from peftkit.errors import DeltaError, TuningError
from peftkit.generation.bank.sites import in_and_out, linear_layers
from peftkit.tuning.stored import Stored
from peftkit.tuning.targets import targeted

HELD = ("LORA", "ADALORA", "VERA", "MISS", "DELORA")
"""PEFT types whose ΔW of a linear layer is a product of two factors that do not depend on the base."""

_VIRTUAL = "puts virtual tokens before the input"
_WHY = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _VIRTUAL),
    "ADAPTION_PROMPT": "adds prompts inside attention",
    "IA3": "scales activations",
    "BEFT": "changes biases",
    "LN_TUNING": "changes norms",
    "TRAINABLE_TOKENS": "changes rows of the embedding",
    **dict.fromkeys(("LOHA", "LOKR"), "has a ΔW whose factors have the product of two ranks"),
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD"), "turns the weights of the base"),
    "HIRA": "multiplies the weights of the base",
}
_SETTINGS = {
    "use_dora": "DoRA, which scales each output by the norm of the changed weights",
    "modules_to_save": "whole modules in place of the base's (modules_to_save)",
    "trainable_token_indices": "rows of the embedding (trainable_token_indices)",
    "lora_bias": "biases (lora_bias)",
    "target_parameters": "parameters that belong to no linear layer, such as fused experts (target_parameters)",
}
_PARTS = {
    ".lora_embedding_A": "LoRA of an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "biases (lora_bias)",
}


def why_not(kind: str, config: Mapping[str, Any]) -> str | None:
    """Why a bank cannot hold an adapter of this kind with this `adapter_config.json`; None as far as they tell."""
    if kind != "peft":
        return "it replaces whole tensors of the base (kind tensors)"
    method = str(config.get("peft_type"))
    if method not in HELD:
        return f"it is of {method}, which {_WHY.get(method, 'has no ΔW of two factors')}"
    found = [what for key, what in _SETTINGS.items() if config.get(key)]
    if config.get("bias", "none") not in ("none", False, None):
        found.append(f"biases of the base (bias={config['bias']!r})")
    return f"it has {', '.join(found)}" if found else None


def factors_of(stored: Stored, backbone: Backbone) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path of a linear layer → (A of shape (r, in), B · scaling of shape (out, r)), float32, on the CPU.

    Raises TuningError, saying why, when that is not all that the adapter does, or not all that its settings name.
    """
    version = stored.version
    if reason := why_not(version.manifest.kind, stored.config) or _part(stored.tensors):
        _refuse(stored, reason)
    layers = _layers_of(backbone.model)
    try:
        deltas = read_deltas(version.reference, "peft", stored.config, stored.tensors, layers.base, {})
    except DeltaError as error:
        _refuse(stored, error.fact)
    factors = {}
    for tensor, change in deltas.changes.items():
        place = deltas.places[tensor]
        if not isinstance(change, LowRank) or place.module not in layers.paths or place.parameter != "weight":
            _refuse(stored, f"it has {change.label} of {place.module}.{place.parameter}")
        factors[place.module] = change
    _check_whole(stored, layers, factors)
    return {path: _float32(change) for path, change in factors.items() if change.rank}


def _refuse(stored: Stored, reason: str) -> NoReturn:
    raise TuningError(
        f"{stored.version.reference} cannot lie in a bank: {reason}",
        expected="factors of linear layers, and nothing beside them",
    )


def _part(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A part of the checkpoint that no bank holds, whatever the configuration says."""
    for name in tensors:
        for part, what in _PARTS.items():
            if part in name:
                return f"it has {what}"
    return None


def _float32(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    left = change.left if change.left.dtype == torch.float64 else change.left.float()
    return change.right.float().contiguous(), (left * change.scale).float().contiguous()


def _check_whole(stored: Stored, layers: _Layers, found: Mapping[str, LowRank]) -> None:
    """Raise TuningError unless exactly the targeted layers have factors: PEFT begins the others anew without a word."""
    wanted = targeted(stored, layers.paths, layers.all_linear)
    if missing := sorted(wanted - found.keys()):
        _refuse(stored, f"it targets {len(missing)} layers that it has no factors for: {', '.join(missing[:3])}")
    if strange := sorted(found.keys() - wanted):
        _refuse(stored, f"it has factors for {len(strange)} layers that it does not target: {', '.join(strange[:3])}")


@dataclass(frozen=True)
class _Shape:
    """A linear layer's weight as (out, in), GPT-2's and quantized ones too: reading factors needs no number of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    storage: str = "plain"

    def part(self, first: int = 0, last: int | None = None) -> Any:
        """Raise DeltaError: only a saved copy of the base's tensor is compared with it."""
        raise DeltaError(f"it has a copy of {self.name}")


@dataclass(frozen=True)
class _Layers:
    """What reading an adapter needs to know about a model."""

    paths: frozenset[str]
    all_linear: frozenset[str]
    base: Mapping[str, Dense]


_KNOWN: WeakKeyDictionary[Any, _Layers] = WeakKeyDictionary()


def _layers_of(model: Any) -> _Layers:
    """The model's linear layers by their paths, looked for once."""
    if model not in _KNOWN:
        layers, head = linear_layers(model), model.get_output_embeddings()
        shapes: dict[str, Dense] = {}
        for path, layer in layers.items():
            into, out = in_and_out(layer)
            shapes[f"{path}.weight"] = _Shape(f"{path}.weight", (out, into))
        others = frozenset(path for path, layer in layers.items() if layer is not head)
        _KNOWN[model] = _Layers(frozenset(layers), others, shapes)
    return _KNOWN[model]
