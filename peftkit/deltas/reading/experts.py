"""LoRA of fused experts (`target_parameters`): one pair of factors holds those of all experts.

Source: `ParamWrapper` in peft 0.21.2, tuners/lora/layer.py. In lora_A of shape (experts · r, in) the expert is the
slowest index, in lora_B of shape (out, r · experts) the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peftkit.deltas.delta import Delta, LowRank, Stacked
from peftkit.deltas.reading.checkpoint import Checkpoint
from peftkit.deltas.reading.names import Site

_INNER = ".base_layer"

Factors = tuple[torch.Tensor, torch.Tensor]


def nested(checkpoint: Checkpoint) -> list[str]:
    """The modules whose parameters are adapted one by one; their wrappers lie around each other."""
    modules = {module.replace(_INNER, "") for module in checkpoint.modules("lora_A.weight", "lora_B.weight")}
    return sorted(module for module in modules if _targets(checkpoint, module))


def read_experts(
    checkpoint: Checkpoint,
    module: str,
    scaling: Callable[[Mapping[str, Any], str], float],
    rank_of: Callable[[Mapping[str, Any], str], int],
) -> None:
    """Every adapted parameter of one module; which factors are whose is told by their shapes.

    Raises DeltaError when the base's files do not hold the fused tensors, or the shapes leave it open.
    """
    named = _targets(checkpoint, module)
    sites = {name: _site(checkpoint, module, name) for name in named}
    level, pairs = module, list[Factors]()
    while level in checkpoint.modules("lora_A.weight", "lora_B.weight") or not pairs:
        pairs.append((checkpoint.take(level, "lora_A.weight"), checkpoint.take(level, "lora_B.weight")))
        level += _INNER
    found = _assigned(checkpoint, [sites[name] for name in named], pairs)
    for name, (right, left) in zip(named, found, strict=True):
        parameter = f"{module}.{name}"
        experts = _extents(checkpoint, sites[name])[0]
        checkpoint.check_rank(parameter, right.shape[0] // experts, rank_of(checkpoint.config, parameter))
        scale = scaling(checkpoint.config, parameter)
        checkpoint.add(sites[name], _delta(checkpoint, sites[name], left, right, scale))


def _site(checkpoint: Checkpoint, module: str, name: str) -> Site:
    site = checkpoint.site(module, name)
    transposed = len(site.shape) == 3 and checkpoint.names.transposed_experts
    place = replace(site.place, layer="experts", transposed=transposed)
    return replace(site, place=place)


def _targets(checkpoint: Checkpoint, module: str) -> list[str]:
    targets = checkpoint.config.get("target_parameters") or ()
    matched = [target for target in targets if f"{module}.".endswith(f"{target.rpartition('.')[0]}.")]
    wanted = {target.rpartition(".")[2] for target in matched if _ends(module, target.rpartition(".")[0])}
    return sorted(wanted)


def _ends(module: str, name: str) -> bool:
    return not name or module == name or module.endswith(f".{name}")


def _assigned(checkpoint: Checkpoint, sites: Sequence[Site], pairs: Sequence[Factors]) -> list[Factors]:
    """The pair of each site, where exactly one assignment fits."""
    fitting = [[i for i, pair in enumerate(pairs) if _fits(checkpoint, site, pair)] for site in sites]
    if len(sites) != len(pairs) or any(not options for options in fitting):
        shapes = [tuple(factor.shape) for pair in pairs for factor in pair]
        raise checkpoint.misfit(sites[0], *shapes)
    if any(len(options) > 1 for options in fitting) or len({options[0] for options in fitting}) < len(pairs):
        parameters = ", ".join(site.tensor for site in sites)
        raise checkpoint.refuse(
            "LoRA of several parameters of one shape", f"its file does not say whose factors are whose: {parameters}"
        )
    return [pairs[options[0]] for options in fitting]


def _fits(checkpoint: Checkpoint, site: Site, pair: Factors) -> bool:
    right, left = pair
    experts, inputs, outputs = _extents(checkpoint, site)
    rank = right.shape[0]
    return (right.shape[1], left.shape[0]) == (inputs, outputs) and left.shape[1] == rank and rank % experts == 0


def _extents(checkpoint: Checkpoint, site: Site) -> tuple[int, int, int]:
    """(experts, in, out) of the parameter."""
    if len(site.shape) == 2:
        return 1, site.shape[1], site.shape[0]
    if len(site.shape) != 3:
        raise checkpoint.misfit(site)
    experts, first, second = site.shape
    return (experts, first, second) if checkpoint.names.transposed_experts else (experts, second, first)


def _delta(checkpoint: Checkpoint, site: Site, left: torch.Tensor, right: torch.Tensor, scale: float) -> Delta:
    if len(site.shape) == 2:
        return LowRank(site.shape, left, right, scale)
    experts, transposed = site.shape[0], checkpoint.names.transposed_experts
    if experts == 1 and transposed:
        raise checkpoint.refuse("LoRA of a single fused expert", "PEFT adds it untransposed")
    rights = right.unflatten(0, (experts, -1))
    lefts = left.unflatten(1, (-1, experts))
    blocks = []
    for expert in range(experts):
        a, b = rights[expert], lefts[:, :, expert]
        blocks.append(LowRank(site.shape[1:], *((a.T, b.T) if transposed else (b, a)), scale))
    return Stacked(site.shape, tuple(blocks))
