"""Which tensors an adapter may have, where each belongs, and whether every number of them is finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.registry.intake.header import FLOATS, WIDTHS, Tensor, read_header
from peftkit.registry.intake.methods import Method
from peftkit.registry.intake.rules import AdapterRefused, shown
from peftkit.registry.intake.values import check_reserved

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "lm_head", "embed_out")
"""What bases call their embedding or their head, which may be the same matrix."""

_PREFIX = "base_model.model."
_CHUNK = 1 << 20
_EXPONENTS = {  # dtype → its bits as a number, and the exponent's bits: all of them set means NaN or infinite
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: `part` is method, whole, tokens, saved (a copy of the base's) or bias."""

    part: str
    module: str
    suffix: str
    extents: Sequence[str] | None


def check_weights(path: Path, digest: str) -> list[Tensor]:
    """The tensors of the copy at `path`; AdapterRefused when its bytes break a rule or have not the digest."""
    running = hashlib.sha256()
    with open(path, "rb") as stream:
        head, tensors = read_header(stream, path.stat().st_size)
        running.update(head)
        problem: AdapterRefused | None = None
        for tensor in tensors:
            left = tensor.end - tensor.first
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise AdapterRefused("file.changed", f"{path.name} shrank while it was checked")
                running.update(chunk)
                left -= len(chunk)
                problem = problem or _not_finite(tensor, chunk)
    if running.hexdigest() != digest:
        raise AdapterRefused("file.changed", f"{path.name} changed between copy and check")
    if problem:
        raise problem
    return tensors


def _not_finite(tensor: Tensor, chunk: bytes) -> AdapterRefused | None:
    if tensor.dtype not in _EXPONENTS:
        return None
    kind, mask = _EXPONENTS[tensor.dtype]
    whole = len(chunk) - len(chunk) % WIDTHS[tensor.dtype]
    bits = np.frombuffer(chunk[:whole], dtype=kind)
    if not ((bits & mask) == mask).any():
        return None
    return AdapterRefused("tensor.not-finite", f"the tensor {shown(tensor.name)} holds NaN or infinite numbers")


def modules_of(names: Iterable[str], method: Method) -> list[str]:
    """The modules that have tensors of the method, sorted."""
    found = (_split(name.removeprefix(_PREFIX), method) for name in names if name.startswith(_PREFIX))
    return sorted({module for module, _ in filter(None, found)})


def check_places(tensors: Sequence[Tensor], config: Mapping[str, Any], method: Method) -> dict[str, Place]:
    """Tensor name → where it belongs; AdapterRefused when one belongs nowhere, or one that is needed is missing."""
    places = {tensor.name: _place(tensor.name, config, method) for tensor in tensors}
    for tensor in tensors:
        _check_dtype(tensor, places[tensor.name], method)
    _check_together(places, config, method)
    return places


def _place(name: str, config: Mapping[str, Any], method: Method) -> Place:
    whole = name.removeprefix("base_model.")
    if suffix := _matching(whole, method.whole):
        return Place("whole", "", suffix, method.whole[suffix])
    if not name.startswith(_PREFIX):
        raise AdapterRefused("tensor.unknown", f"{method.name} saves no tensor {shown(name)}")
    rest = name.removeprefix(_PREFIX)
    if found := _split(rest, method):
        module, suffix = found
        check_reserved(module, "a tensor's name")
        setting = method.only_with.get(suffix)
        if setting and not config.get(setting):
            raise AdapterRefused("tensor.unknown", f"{shown(name)} is there and {setting} is not set")
        if not _targeted(module, config) and suffix != "trainable_tokens_delta":  # a tied head has them too
            raise AdapterRefused("tensor.module", f"{shown(name)} belongs to no module of target_modules")
        return Place("method", module, suffix, method.tensors[suffix])
    return _beside(name, rest, config, method)


def _beside(name: str, rest: str, config: Mapping[str, Any], method: Method) -> Place:
    """A tensor that PEFT saves beside those of the method: token rows, copies of modules, biases."""
    module, _, last = rest.rpartition(".")
    tokens = module.removesuffix(".token_adapter")
    if last == "trainable_tokens_delta" and tokens != module and config.get("trainable_token_indices"):
        return Place("tokens", tokens, last, ("?", "in"))
    copied = module.removesuffix(".base_layer")
    check_reserved(copied, "a tensor's name")
    if last == "bias" and config.get("bias", "none") != "none":
        return Place("bias", copied, last, None)
    # By the end of the name, as PEFT does: "norm" also takes input_layernorm.
    if any(f"{saved}." in rest for saved in _names(config.get("modules_to_save"))):
        return Place("saved", copied, last, None)
    # PEFT saves embeddings and head too when they are targeted, tied, resized, or it is asked to.
    if last == "weight" and copied.rpartition(".")[2] in EMBEDDINGS:
        return Place("saved", copied, last, None)
    raise AdapterRefused("tensor.unknown", f"{method.name} with this configuration saves no tensor {shown(name)}")


def _split(rest: str, method: Method) -> tuple[str, str] | None:
    """A name after the prefix → (module, the table's suffix); the longest suffix that fits."""
    for suffix in sorted(method.tensors, key=len, reverse=True):
        stem = suffix.removesuffix("*")
        if stem != suffix:
            module, found, _ = rest.partition(f".{stem}")
            if found:
                return module, suffix
        elif rest.endswith(f".{suffix}"):
            return rest.removesuffix(f".{suffix}"), suffix
    return None


def _matching(name: str, known: Iterable[str]) -> str | None:
    for suffix in known:
        if name == suffix or (suffix.endswith("*") and name.startswith(suffix[:-1])):
            return suffix
    return None


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    names = [*_names(targets), *(name.rpartition(".")[0] or name for name in _names(config.get("target_parameters")))]
    return "all-linear" in names or not names or any(module == name or module.endswith(f".{name}") for name in names)


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _check_dtype(tensor: Tensor, place: Place, method: Method) -> None:
    whole = place.suffix in method.integers
    if whole == (tensor.dtype in FLOATS):
        wanted = "whole numbers" if whole else f"one of {', '.join(FLOATS)}"
        raise AdapterRefused("tensor.dtype", f"{shown(tensor.name)} has dtype {tensor.dtype}", expected=wanted)


def _check_together(places: Mapping[str, Place], config: Mapping[str, Any], method: Method) -> None:
    held: dict[str, set[str]] = {}
    for place in places.values():
        held.setdefault(place.module, set()).add(place.suffix)
    whole = held.get("", set())
    missing = [name for name in method.whole if not name.endswith("*") and name not in whole]
    if missing or not any(place.part in ("method", "whole", "tokens") for place in places.values()):
        raise AdapterRefused("tensor.none", f"{method.name} cannot do without {missing[0] if missing else 'tensors'}")
    for module, suffixes in held.items():
        for group in method.together:
            if lacking := set(group) - suffixes if suffixes & set(group) else None:
                fact = f"the module {shown(module)} has tensors and lacks {', '.join(sorted(lacking))}"
                raise AdapterRefused("tensor.pair", fact)
        if config.get("use_dora") and "lora_A.weight" in suffixes and "lora_magnitude_vector" not in suffixes:
            raise AdapterRefused("tensor.pair", f"the module {shown(module)} lacks lora_magnitude_vector (use_dora)")
