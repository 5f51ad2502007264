"""EVA: lora_A begins with the directions that a layer's inputs really have (Paischer et al. 2024, arXiv 2410.07170).

A is the top-r right singular vectors of the inputs of the training rows, and B is 0, so the base computes what it did.
Every layer keeps the rank that was asked for: the paper's second part, ranks moved to the layers that explain more,
changes the size of the adapter by data, and gives every module a rank of its own that serving engines pad to the
largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftkit.data.chat import Example
from peftkit.errors import TuningError
from peftkit.events import Note, Report, silent
from peftkit.tuning.initial import factors, lora_layers, written

_TOKENS = 2048
"""Tokens that are read: a few hundred times the usual ranks."""
_PIECE = 256
"""Inputs that are worked in at once."""
_KEPT = 4
"""Directions that are kept between pieces, as a multiple of r; what is dropped is not found again."""


class Directions:
    """The leading right singular vectors of a matrix that comes in pieces (Levy and Lindenbaum 2000)."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._rows: torch.Tensor | None = None
        """diag(S) Vᵀ of what was seen, float64."""

    def add(self, inputs: torch.Tensor) -> None:
        """Work in inputs of shape (n, width)."""
        for piece in inputs.detach().double().split(_PIECE):
            stacked = piece if self._rows is None else torch.cat([self._rows, piece])
            # The right vectors by the small side: diag(S) Vᵀ = Uᵀ X, and X Xᵀ = U S² Uᵀ.
            _, u = torch.linalg.eigh(stacked @ stacked.T)
            self._rows = u[:, -self.kept :].T @ stacked

    def leading(self, r: int) -> torch.Tensor | None:
        """The first `r` vectors as rows, orthonormal, float64; None where fewer than r inputs were seen."""
        if self._rows is None or len(self._rows) < r:
            return None
        # QR, because the vectors of the smallest values are not orthogonal to rounding.
        q, _ = torch.linalg.qr(self._rows.flip(0)[:r].T)
        return q.T


def begin_eva(model: Any, rows: Sequence[Example], r: int, *, seed: int, report: Report = silent) -> None:
    """Fill every lora_A from `rows`, read one at a time, so that there is no padding; lora_B stays 0.

    Raises TuningError without rows, with fewer tokens than r, and for a rank above a layer's width.
    """
    layers = lora_layers(model, "eva")
    found = {name: Directions(_KEPT * r) for name in layers}
    narrow = next((name for name, layer in layers.items() if layer.in_features < r), None)
    if narrow is not None:
        raise TuningError(f"adapter.r={r}, and {narrow} has {layers[narrow].in_features} inputs", expected="a lower r")
    with _reading(layers, found):
        tokens = _read(model, rows, seed)
    unseen = []
    for name, layer in layers.items():
        a, _ = factors(layer)
        vectors = found[name].leading(r)
        if vectors is None:
            unseen.append(name)
        else:
            written(a, vectors)
    if len(unseen) == len(layers):
        raise TuningError(
            f"adapter.method=eva begins with the inputs of training rows: {tokens} tokens for r={r}",
            expected=f"rows with at least {r} tokens",
            hint="a lower adapter.r, or adapter.method=lora",
        )
    rest = f"; {len(unseen)} layers that were hardly reached begin as LoRA's do" if unseen else ""
    report(Note(f"the directions of {tokens} tokens were taken for {len(layers) - len(unseen)} layers{rest}"))


def _read(model: Any, rows: Sequence[Example], seed: int) -> int:
    """Send rows through the model until there are tokens enough, in an order drawn with the seed; how many it were."""
    left, generator = _TOKENS, torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids = rows[index].input_ids[:left]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
        left -= len(ids)
        if left <= 0:
            break
    return _TOKENS - left


@contextmanager
def _reading(layers: dict[str, Any], found: dict[str, Directions]) -> Iterator[None]:
    """Let every layer's inputs be worked in; those of layers that read the same tensor only once."""
    last: dict[str, Any] = {"inputs": None, "name": None}

    def reads(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            inputs = given[0]
            if inputs is last["inputs"]:
                found[name] = found[last["name"]]
                return
            last.update(inputs=inputs, name=name)
            found[name].add(inputs.reshape(-1, inputs.shape[-1]))

        return hook

    hooks = [layer.register_forward_pre_hook(reads(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
