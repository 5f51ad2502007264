"""Methods that multiply the base's numbers, and those that train its small tensors."""

from __future__ import annotations

import torch

from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.kinds import Modulated, Scaled
from peftkit.deltas.reading.lora import add_bias, low_rank
from peftkit.deltas.reading.names import Site
from peftkit.errors import DeltaError


def read_ia3(checkpoint: Checkpoint) -> None:
    """One factor for each output, or each input of a feed-forward module; outputs are scaled with their bias."""
    for module in checkpoint.modules("ia3_l"):
        factors, site = checkpoint.take(module, "ia3_l"), checkpoint.site(module)
        of_inputs = _of_inputs(checkpoint, site, factors)
        checkpoint.add(site, Scaled(site.shape, _spread(checkpoint, site, factors.flatten(), of_inputs)))
        if not of_inputs and "bias" in checkpoint.names.parameters(module):
            bias = checkpoint.site(module, "bias")
            checkpoint.add(bias, Scaled(bias.shape, factors.reshape(1, -1)))


def read_hira(checkpoint: Checkpoint) -> None:
    """W' = W ⊙ (1 + B@A), without a scale (peft 0.21.2, tuners/hira/layer.py)."""
    if checkpoint.modules("hira_embedding_A", "hira_embedding_B"):
        raise checkpoint.refuse("HIRA of an embedding", "PEFT leaves out the scale that some bases give theirs")
    for module in checkpoint.modules("hira_A", "hira_B"):
        right, left = checkpoint.take(module, "hira_A"), checkpoint.take(module, "hira_B")
        site = checkpoint.site(module)
        checkpoint.add(site, Modulated(site.shape, low_rank(checkpoint, site, left, right, 1.0)))


def read_beft(checkpoint: Checkpoint) -> None:
    """A change of biases."""
    for module in checkpoint.modules("beft_bias"):
        add_bias(checkpoint, module, checkpoint.take(module, "beft_bias").flatten())


def read_ln_tuning(checkpoint: Checkpoint) -> None:
    """Norms that take the base's place."""
    for parameter in ("weight", "bias"):
        for module in checkpoint.modules(f"ln_tuning_layers.{parameter}"):
            site = checkpoint.site(module, parameter)
            values = checkpoint.take(module, f"ln_tuning_layers.{parameter}")
            checkpoint.add(site, checkpoint.replaced(site, values))


def _of_inputs(checkpoint: Checkpoint, site: Site, factors: torch.Tensor) -> bool:
    """Whether the factors are those of inputs: their shape says so, but for convolutions and single numbers."""
    if factors.dim() == 2 and factors.shape != (1, 1):
        return int(factors.shape[0]) == 1
    names = checkpoint.config.get("feedforward_modules") or ()
    if isinstance(names, str):
        raise DeltaError(
            f"feedforward_modules of {checkpoint.reference} is the pattern {names!r}", expected="names of modules"
        )
    return any(site.place.module.endswith(name) for name in names)


def _spread(checkpoint: Checkpoint, site: Site, factors: torch.Tensor, of_inputs: bool) -> torch.Tensor:
    """Factors as a row or a column of the matrix in the file."""
    rows, columns = site.matrix
    across = of_inputs != (site.layer == "conv1d")
    if across and site.layer == "conv" and columns % factors.numel() == 0:
        if factors.numel() != site.shape[1]:
            raise checkpoint.refuse("IA3 of a grouped convolution", f"{site.tensor} has no factor for each input")
        return factors.repeat_interleave(columns // factors.numel())[None]
    if factors.numel() != (columns if across else rows):
        raise checkpoint.misfit(site, tuple(factors.shape))
    return factors[None] if across else factors[:, None]
