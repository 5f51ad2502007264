"""What an adapter makes of a base's tensors, by the papers' formulas in plain numpy float64.

It reads safetensors and JSON itself, and imports neither peft nor peftkit: formulas are written out a second time,
number by number where that is not too slow. A module's name is its tensor's in the file; `transposed` tells of layers
that keep (in, out).
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

Array = Any
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "BF16": "<u2"}
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def read_file(path: Path) -> dict[str, Array]:
    """Tensors of a safetensors file as float64."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = (8 + length + offset for offset in info["data_offsets"])
            numbers = np.frombuffer(data[first:last], dtype=_KINDS[info["dtype"]])
            if info["dtype"] == "BF16":
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            found[name] = numbers.astype(np.float64).reshape(info["shape"])
    return found


def merged(base: Path, adapter: Path) -> dict[str, Array]:
    """Tensor of the base → what it becomes, for all that the adapter's own method touches."""
    tensors = {
        name.removeprefix("base_model.model."): value
        for name, value in read_file(adapter / "adapter_model.safetensors").items()
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = read_file(base / "model.safetensors")
    changed: dict[str, Array] = {}
    _METHODS[config["peft_type"]](config, tensors, weights, changed)
    return changed


def pattern(config: dict[str, Any], key: str, module: str, default: float) -> float:
    """The value of the first regular expression that is the module's name or its end."""
    for name, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({name})$", module):
            return value
    return default


def _modules(tensors: dict[str, Array], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def _oriented(name: str, out_in: Array, weights: dict[str, Array]) -> Array:
    """A matrix (out, in) as the file keeps it."""
    return (out_in.T if _CONV1D.search(name) else out_in).reshape(weights[name].shape)


def _conv(left: Array, right: Array) -> Array:
    """B @ A, or of two convolutions the one that does both: Σ_k B[o, k] A[k, i, y, x]."""
    out = np.zeros((left.shape[0], *right.shape[1:]))
    for k in range(right.shape[0]):
        out += np.multiply.outer(left[:, k].reshape(-1), right[k])
    return out


def _scale(config: dict[str, Any], module: str) -> float:
    rank = pattern(config, "rank_pattern", module, config["r"])
    alpha = pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def _lora(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".lora_A.weight"):
        name = f"{module}.weight"
        if name not in weights or (config.get("target_parameters") and "router" in name):
            continue
        update = _conv(tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"])
        direction = weights[name] + _scale(config, module) * _oriented(name, update, weights)
        changed[name] = _dora(tensors.get(f"{module}.lora_magnitude_vector"), direction, bool(_CONV1D.search(name)))
        if f"{module}.lora_B.bias" in tensors:
            bias = f"{module}.bias"
            changed[bias] = weights[bias] + _scale(config, module) * tensors[f"{module}.lora_B.bias"]
    for module in _modules(tensors, ".lora_embedding_A"):
        name = f"{module}.weight"
        before = tensors.get(f"{module}.base_layer.weight", weights.get(name))
        left, right = tensors[f"{module}.lora_embedding_B"], tensors[f"{module}.lora_embedding_A"]
        direction = before + _scale(config, module) * (left @ right).T
        changed[name] = _dora(tensors.get(f"{module}.lora_magnitude_vector"), direction, True)
    for target in config.get("target_parameters") or []:
        _experts(config, tensors, weights, changed, target)


def _dora(magnitude: Array | None, direction: Array, by_column: bool) -> Array:
    """m · V/‖V‖, output by output."""
    if magnitude is None:
        return direction
    outputs = np.moveaxis(direction, 1, 0) if by_column else direction
    turned = np.stack([m * v / np.sqrt((v**2).sum()) for m, v in zip(magnitude.reshape(-1), outputs, strict=True)])
    return np.moveaxis(turned, 0, 1) if by_column else turned


def _experts(config: dict[str, Any], tensors: Any, weights: Any, changed: Any, target: str) -> None:
    """Expert e has rows e·r … of A and columns e, e + E, … of B."""
    transposed = "bias" in "".join(name for name in weights if "experts" in name)  # GPT-OSS, here
    for name, weight in weights.items():
        if not name.endswith(f".{target}"):
            continue
        if weight.ndim == 2:
            factors = (tensors[f"{name.rpartition('.')[0]}.lora_{part}.weight"] for part in "BA")
            changed[name] = weight + _scale(config, name) * np.matmul(*factors)
            continue
        experts, first, second = weight.shape
        inputs, outputs = (first, second) if transposed else (second, first)
        module = name.rpartition(".")[0]
        for level in (module, f"{module}.base_layer"):
            a, b = tensors.get(f"{level}.lora_A.weight"), tensors.get(f"{level}.lora_B.weight")
            if a is None or (a.shape[1], b.shape[0]) != (inputs, outputs):
                continue
            rank, scale = a.shape[0] // experts, _scale(config, name)
            after = weight.copy()
            for e in range(experts):
                for k in range(rank):
                    update = np.outer(b[:, k * experts + e], a[e * rank + k])
                    after[e] += scale * (update.T if transposed else update)
            changed[name] = after


def _adalora(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".lora_E"):
        name = f"{module}.weight"
        left, values, right = (tensors[f"{module}.lora_{part}"] for part in "BEA")
        update = np.einsum("or,r,ri->oi", left, values[:, 0], right)
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        changed[name] = weights[name] + scale * _oriented(name, update, weights)


def _factor(tensors: Any, stem: str, tucker: str) -> Array:
    left, right = tensors[f"{stem}_a"], tensors[f"{stem}_b"]
    if tucker in tensors:
        return np.einsum("ijyx,io,jc->ocyx", tensors[tucker], left, right)
    return np.einsum("ok,kc->oc", left, right)


def _loha(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".hada_w1_a"):
        name = f"{module}.weight"
        one, two = (_factor(tensors, f"{module}.hada_w{i}", f"{module}.hada_t{i}") for i in (1, 2))
        scale = pattern(config, "alpha_pattern", module, config["alpha"]) / config["r"]
        changed[name] = weights[name] + scale * (one * two).reshape(weights[name].shape)


def _lokr(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    modules = _modules(tensors, ".lokr_w1") + _modules(tensors, ".lokr_w1_a")
    for module in modules:
        name = f"{module}.weight"
        one = tensors.get(f"{module}.lokr_w1")
        one = _factor(tensors, f"{module}.lokr_w1", "") if one is None else one
        two = tensors.get(f"{module}.lokr_w2")
        two = _factor(tensors, f"{module}.lokr_w2", f"{module}.lokr_t2") if two is None else two
        two = two.reshape(two.shape[0], -1)
        update = np.zeros((one.shape[0] * two.shape[0], one.shape[1] * two.shape[1]))
        for i in range(one.shape[0]):
            for j in range(one.shape[1]):
                rows, columns = slice(i * two.shape[0], (i + 1) * two.shape[0]), j * two.shape[1]
                update[rows, columns : columns + two.shape[1]] = one[i, j] * two
        changed[name] = weights[name] + config["alpha"] / config["r"] * update.reshape(weights[name].shape)


def _ia3(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".ia3_l"):
        name, bias = f"{module}.weight", f"{module}.bias"
        inputs = any(module.endswith(other) for other in config["feedforward_modules"])
        axis = 1 if inputs != bool(_CONV1D.search(name)) else 0
        shape = [1] * weights[name].ndim
        shape[axis] = -1
        changed[name] = weights[name] * tensors[f"{module}.ia3_l"].reshape(shape)
        if bias in weights and not inputs:
            changed[bias] = weights[bias] * tensors[f"{module}.ia3_l"].reshape(-1)


def _vera(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".vera_lambda_b"):
        name = f"{module}.weight"
        b, d = tensors[f"{module}.vera_lambda_b"], tensors[f"{module}.vera_lambda_d"]
        outputs, inputs = weights[name].shape[:: -1 if _CONV1D.search(name) else 1]
        left, right = tensors["base_model.vera_B"][:outputs], tensors["base_model.vera_A"][:, :inputs]
        changed[name] = weights[name] + _oriented(name, np.einsum("o,or,r,ri->oi", b, left, d, right), weights)


def _oft(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for suffix in (".oft_R.weight", ".oft_embedding_R.weight"):
        for module in _modules(tensors, suffix):
            name, stored = f"{module}.weight", tensors[module + suffix]
            blocks = [_rotation(config, row, len(stored)) for row in stored]
            extent, turned = len(blocks[0]), weights[name].shape[1]
            whole = np.zeros((turned, turned))
            for i in range(turned // extent):
                part = slice(i * extent, (i + 1) * extent)
                whole[part, part] = blocks[0 if config["block_share"] else i]
            flat = weights[name].reshape(-1, turned)
            changed[name] = (flat @ (whole if "embedding" in suffix else whole.T)).reshape(weights[name].shape)


def _rotation(config: dict[str, Any], above: Array, number: int) -> Array:
    extent = next(b for b in range(1, 100) if b * (b - 1) // 2 == len(above))
    q = np.zeros((extent, extent))
    at = 0
    for i in range(extent):
        for j in range(i + 1, extent):
            q[i, j], q[j, i] = above[at], -above[at]
            at += 1
    if config["coft"]:
        limit = config["eps"] / math.sqrt(number)
        q = q * min(1.0, limit / np.sqrt((q**2).sum()))
    if not config["use_cayley_neumann"]:
        return (np.eye(extent) - q) @ np.linalg.inv(np.eye(extent) + q)
    assert config["num_cayley_neumann_terms"] == 5
    return np.eye(extent) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def _hira(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".hira_A"):
        name = f"{module}.weight"
        update = tensors[f"{module}.hira_B"] @ tensors[f"{module}.hira_A"]
        changed[name] = weights[name] * (1 + _oriented(name, update, weights))


def _miss(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".miss_block"):
        name, block = f"{module}.weight", tensors[f"{module}.miss_block"]
        changed[name] = weights[name].copy()
        for o in range(weights[name].shape[0]):
            for i in range(weights[name].shape[1]):
                changed[name][o, i] += block[i % block.shape[0], o % block.shape[1]]


def _delora(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".delora_A"):
        name = f"{module}.weight"
        right, left = tensors[f"{module}.delora_A"], tensors[f"{module}.delora_B"]
        update = np.zeros(weights[name].shape)
        for k in range(config["r"]):
            length = np.sqrt((right[k] ** 2).sum() * (left[:, k] ** 2).sum())
            update += np.outer(left[:, k], right[k]) / length
        scale = tensors[f"{module}.delora_lambda"][0] / config["r"]
        changed[name] = weights[name] + scale * update * tensors[f"{module}.delora_w_norm"]


def _replace(suffix: str, config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for parameter in ("weight", "bias"):
        for module in _modules(tensors, f".{suffix}.{parameter}"):
            changed[f"{module}.{parameter}"] = tensors[f"{module}.{suffix}.{parameter}"]


def _beft(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".beft_bias"):
        changed[f"{module}.bias"] = weights[f"{module}.bias"] + tensors[f"{module}.beft_bias"][0]


def _tokens(config: dict[str, Any], tensors: Any, weights: Any, changed: Any) -> None:
    for module in _modules(tensors, ".trainable_tokens_delta"):
        name = f"{module}.weight"
        if name in weights:
            changed[name] = weights[name].copy()
            for row, index in enumerate(config["token_indices"]):
                changed[name][index] = tensors[f"{module}.trainable_tokens_delta"][row]


_METHODS = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "IA3": _ia3,
    "VERA": _vera,
    "OFT": _oft,
    "HIRA": _hira,
    "MISS": _miss,
    "DELORA": _delora,
    "BEFT": _beft,
    "TRAINABLE_TOKENS": _tokens,
    "LN_TUNING": lambda *given: _replace("ln_tuning_layers", *given),
}
