"""Adapter tensors → what happens to each tensor of the base: one table, method → reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from peftkit.backbone.headed import Headed, headed
from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.head import Head
from peftkit.base.record import plain
from peftkit.base.ref import read_config
from peftkit.deltas.delta import Deltas
from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.factors import read_adalora, read_delora, read_miss, read_vera
from peftkit.deltas.reading.lora import read_lora
from peftkit.deltas.reading.lycoris import read_loha, read_lokr
from peftkit.deltas.reading.oft import read_oft
from peftkit.deltas.reading.saved import read_saved, read_tensors, read_trainable_tokens, read_under
from peftkit.deltas.reading.scaled import read_beft, read_hira, read_ia3, read_ln_tuning
from peftkit.errors import DeltaError
from peftkit.tuning.attach import head_of
from peftkit.tuning.stored import Stored

READERS: dict[str, Callable[[Checkpoint], None]] = {
    "ADALORA": read_adalora,
    "BEFT": read_beft,
    "DELORA": read_delora,
    "HIRA": read_hira,
    "IA3": read_ia3,
    "LN_TUNING": read_ln_tuning,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "LORA": read_lora,
    "MISS": read_miss,
    "OFT": read_oft,
    "TRAINABLE_TOKENS": read_trainable_tokens,
    "VERA": read_vera,
}
"""PEFT type → the function that takes its tensors; what PEFT saves beside them is read for all alike."""

_PROMPTS = "it puts vectors before the input and changes no weight"
_ROUTED = "what it adds depends on the input"
_NO_DELTA = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), _PROMPTS),
    **dict.fromkeys(("CARTRIDGE", "ADAPTION_PROMPT"), _PROMPTS),
    **dict.fromkeys(("LILY", "POLY", "XLORA"), _ROUTED),
    "PEANUT": "it puts a nonlinear network beside the layer",
    "SHADOW": "it runs a second network beside the base",
    "ADAMSS": "PEFT clusters the base's weights again when it loads it",
}

# What torch and Python raise for a setting of another type, or tensors that cannot be multiplied.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def read_deltas(
    reference: str,
    kind: Literal["peft", "tensors"],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: Mapping[str, Dense],
    base_config: Mapping[str, Any],
    under: Headed | None = None,
) -> Deltas:
    """All that an adapter does to a base, by the names and in the orientation of the base's files.

    `config` is adapter_config.json (empty for kind `tensors`), `base_config` the base's config.json, `under` the
    head of a task that it was trained with. Factors stay in
    the dtypes they are stored in. Raises DeltaError, naming method or setting, for what has no exact ΔW, for a tensor
    that no reader knows, and for one that does not fit the base. Formulas and shapes are those of peft 0.21.2.
    """
    _check_finite(reference, tensors)
    checkpoint = Checkpoint(reference, config, tensors, base, base_config, under)
    if kind == "tensors":
        read_tensors(checkpoint)
        return checkpoint.deltas()
    method = str(config.get("peft_type"))
    if method not in READERS:
        raise checkpoint.refuse(method, _NO_DELTA.get(method, "how its tensors become a ΔW is not written down here"))
    try:
        read_under(checkpoint)
        READERS[method](checkpoint)
        read_saved(checkpoint)
    except _UNREADABLE as error:
        reason = plain(str(error) or type(error).__name__, 200)
        raise DeltaError(
            f"the tensors or settings of {reference} are none of {method}: {reason}",
            expected="an adapter as PEFT 0.21 saves it",
        ) from error
    return checkpoint.deltas()


def deltas_of(stored: Stored, folder: Path) -> Deltas:
    """All that a stored version does to the base whose files lie in `folder`. Raises what `read_deltas` raises."""
    manifest = stored.version.manifest
    kind: Literal["peft", "tensors"] = "peft" if manifest.kind == "peft" else "tensors"
    base, base_config = dense_tensors(folder), read_config(folder)
    under = headed_base(head_of(stored.version), folder, base, base_config)
    return read_deltas(stored.version.reference, kind, stored.config, stored.tensors, base, base_config, under)


def headed_base(
    head: Head | None, folder: Path, base: Mapping[str, Dense], base_config: Mapping[str, Any]
) -> Headed | None:
    """How the files of a base lie under a task's head; None for the language head. Raises BackboneError."""
    if head is None:
        return None
    return headed(head, base_config, {name: tuple(dense.shape) for name, dense in base.items()}, str(folder))


def _check_finite(reference: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise DeltaError, naming the tensors, for NaN and infinity: nothing can be computed from them."""
    broken = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and tensor.numel() and not _finite(tensor)
    ]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise DeltaError(
            f"{reference} holds NaN or infinite numbers in {', '.join(broken[:3])}{more}",
            expected="finite weights",
            hint="take an earlier version (peftkit log NAME), or train it again",
        )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are, in one pass without a copy: NaN is both the smallest and the largest."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor)).double()).all())
