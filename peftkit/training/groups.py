"""The optimizer's groups of parameters, only as many as there are different rates and decays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from peftkit.training.rates import annealed, freezing_times, learning_rate, multipliers, scheduled
from peftkit.training.spec import TrainSpec
from peftkit.tuning.depth import Depths, decaying
from peftkit.tuning.tuned import Tuned

_LORA_B = ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class Group:
    """Parameters that share one rate at every step."""

    names: tuple[str, ...]
    rate: float
    """Peak rate."""
    weight_decay: float
    until: float | None
    """FreezeOut: the share of the run after which they are frozen."""

    def factor(self, spec: TrainSpec, steps: int) -> Callable[[int], float]:
        """What `rate` is multiplied by at each step, counted from 0: a pure function of settings, step and steps."""
        if self.until is None:
            return partial(scheduled, spec, steps=steps)
        return partial(annealed, self.until, steps=steps)


def parameter_groups(tuned: Tuned, depths: Depths, spec: TrainSpec) -> tuple[Group, ...]:
    """Part the trained parameters by rate and weight decay, in the model's order.

    The peak rate of a parameter is learning_rate, times what `train.layerwise` says of its depth, times
    lora_plus_ratio for the second factor of LoRA+ (arXiv 2402.12354), and with `freezeout.scaled` over the share of
    the run in which it trains. Raises TrainingError for a table of rates that does not fit the trained depths.
    """
    trained = {depths.of[name] for name in tuned.names}
    scale = multipliers(spec.layerwise, depths, trained)
    times = freezing_times(spec.freezeout, trained)
    peak, ratio = learning_rate(tuned, spec), tuned.spec.lora_plus_ratio or 1.0
    decayed = decaying(tuned.model, tuned.trainable)
    found: dict[tuple[float, float, float | None], list[str]] = {}
    for name in tuned.trainable:
        depth, until = depths.of[name], times.get(depths.of[name])
        rate = peak * scale[depth] * (ratio if _is_lora_b(name) else 1.0)
        if until is not None and spec.freezeout.scaled:
            rate /= until
        decay = spec.weight_decay if name in decayed else 0.0
        found.setdefault((rate, decay, until), []).append(name)
    return tuple(Group(tuple(names), *key) for key, names in found.items())


def as_arguments(groups: Iterable[Group], parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups as an optimizer of torch takes them."""
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def _is_lora_b(name: str) -> bool:
    return any(part in _LORA_B for part in name.split("."))
