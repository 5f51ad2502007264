"""What PEFT saves beside a method's own tensors: copies of modules, biases and embeddings, rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.base.dense import Dense
from peftkit.deltas.reading.checkpoint import PREFIX, Checkpoint
from peftkit.deltas.reading.kinds import TokenRows
from peftkit.deltas.reading.names import HEADS
from peftkit.errors import DeltaError
from peftkit.registry.intake.tensors import EMBEDDINGS

_WRAPPERS = (".base_layer", ".token_adapter")
_PIECE = 1 << 20


def read_under(checkpoint: Checkpoint) -> None:
    """Copies that PEFT loads into the base's own embedding, head or bias, before any change of them.

    They are saved whether or not they differ from the base (a resized vocabulary, a targeted embedding); an equal one
    is no change. Of a tied base, either is both.
    """
    for name in checkpoint.left:
        wrapped, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        module = wrapped
        for wrapper in _WRAPPERS:
            module = module.removesuffix(wrapper)
        if not name.startswith(PREFIX) or not _loaded_into_base(checkpoint, module, parameter):
            continue
        values = checkpoint.take_named(name)
        site = checkpoint.names.site(module, parameter)
        if values is not None and not _equal(checkpoint.base[site.read], values):
            checkpoint.put_under(site, values)


def read_saved(checkpoint: Checkpoint) -> None:
    """Modules of `modules_to_save` and rows of `trainable_token_indices`."""
    _read_tokens(checkpoint, "token_adapter.trainable_tokens_delta", checkpoint.config.get("trainable_token_indices"))
    for name in checkpoint.left:
        module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        if name.startswith(PREFIX) and _is_saved(checkpoint.config, name):
            values = checkpoint.take(module, parameter)
            if checkpoint.brings(f"{module}.{parameter}", values):
                continue
            site = checkpoint.site(module, parameter)
            checkpoint.add(site, checkpoint.replaced(site, values))


def read_trainable_tokens(checkpoint: Checkpoint) -> None:
    """The method that trains rows of tokens alone."""
    _read_tokens(checkpoint, "trainable_tokens_delta", checkpoint.config.get("token_indices"))


def read_tensors(checkpoint: Checkpoint) -> None:
    """Kind `tensors`: whatever has the name of a tensor takes its place.

    The embedding of a tied base takes the head with it unless the head is given too, as when it is attached
    (tuning/tensors.py).
    """
    given = checkpoint.left
    headed = any(name.removesuffix(".weight") in HEADS for name in given)
    for name in given:
        values = checkpoint.take_named(name)
        if values is not None and checkpoint.brings(name, values):
            continue
        module, _, parameter = name.rpartition(".")
        site = checkpoint.names.site(module, parameter)
        if values is None or tuple(values.shape) != site.shape:
            raise checkpoint.misfit(site, *([] if values is None else [tuple(values.shape)]))
        checkpoint.add(site, checkpoint.replaced(site, values), with_head=not headed)


def _read_tokens(checkpoint: Checkpoint, suffix: str, given: Any) -> None:
    """Rows of tokens; those of a tied base's embedding are the head's too, unless the head has other tokens."""
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
    for module in checkpoint.modules(suffix):
        rows[module] = _indices(checkpoint, given, module), checkpoint.take(module, suffix)
    heads = {module for module in rows if checkpoint.site(module).source}
    for module, (indices, values) in rows.items():
        site = checkpoint.site(module)
        if module in heads and any(_same(rows[module], rows[other]) for other in rows.keys() - heads):
            continue
        alone = all(_same(rows[module], rows[head]) for head in heads)
        if values.shape != (len(indices), site.matrix[1]) or len(set(indices)) < len(indices):
            raise checkpoint.misfit(site, tuple(values.shape))
        if not all(0 <= index < site.shape[0] for index in indices):
            raise DeltaError(
                f"{checkpoint.reference} trains the token {max(indices)} of {site.tensor}, which has {site.shape[0]}",
                expected="tokens of the base, or a saved embedding with more rows",
            )
        checkpoint.add(site, TokenRows(site.shape, indices, values), with_head=alone and not site.source)


def _same(one: tuple[tuple[int, ...], torch.Tensor], other: tuple[tuple[int, ...], torch.Tensor]) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


def _indices(checkpoint: Checkpoint, given: Any, module: str) -> tuple[int, ...]:
    if isinstance(given, Mapping):
        matched = [value for name, value in given.items() if module == name or module.endswith(f".{name}")]
        given = matched[0] if len(matched) == 1 else None
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DeltaError(
            f"the configuration of {checkpoint.reference} does not say which tokens of {module} it trains",
            expected="their indices",
        )
    return tuple(int(index) for index in given)


def _loaded_into_base(checkpoint: Checkpoint, module: str, parameter: str) -> bool:
    if _is_saved(checkpoint.config, f"{PREFIX}{module}.{parameter}"):
        return False
    bias = parameter == "bias" and checkpoint.config.get("bias", "none") != "none"
    embedding = parameter == "weight" and module.rpartition(".")[2] in EMBEDDINGS
    return (bias or embedding) and parameter in checkpoint.names.parameters(module)


def _is_saved(config: Mapping[str, Any], name: str) -> bool:
    """By the end of a module's name, as PEFT matches it: "norm" also takes input_layernorm."""
    saved = config.get("modules_to_save") or ()
    saved = [saved] if isinstance(saved, str) else [*saved]
    if config.get("ensure_weight_tying") and set(saved) & set(EMBEDDINGS):
        saved += HEADS  # a copy of the saved embedding, which PEFT ties to it
    return any(f"{module}." in name for module in saved)


def _equal(dense: Dense, values: torch.Tensor) -> bool:
    """Whether a saved copy has exactly the base's numbers; both are read by pieces."""
    if tuple(dense.shape) != tuple(values.shape):
        return False
    flat = values.flatten()
    for first in range(0, flat.numel(), _PIECE):
        last = min(first + _PIECE, flat.numel())
        if not torch.equal(torch.from_numpy(dense.part(first, last)).double(), flat[first:last].double()):
            return False
    return True
