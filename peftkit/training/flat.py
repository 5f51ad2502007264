"""Nested state with tensors in it, such as an optimizer's `state_dict()`, as JSON plus named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def flatten(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Part `value` into JSON and tensors; `unflatten` puts it together again, types and tensor bytes included.

    Tensors are copied to the CPU. Dictionaries may have any plain keys; raises TypeError for what JSON cannot hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _flat(value, "", tensors), tensors


def unflatten(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `flatten` was given."""
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(unflatten(item, tensors) for item in plain[_TUPLE])
    if _ITEMS in plain:
        return {key: unflatten(item, tensors) for key, item in plain[_ITEMS]}
    return {key: unflatten(item, tensors) for key, item in plain.items()}


def _flat(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # A copy of its own: safetensors refuses tensors that share memory, and training goes on changing this one.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        items = [(key, _flat(item, f"{path}/{key}" if path else str(key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {_ITEMS: [[key, item] for key, item in items]}
    if isinstance(value, tuple | list):
        parts = [_flat(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} holds a {type(value).__name__}, which a checkpoint cannot keep")
