"""The learning rate of every depth at every step, as plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from peftkit.errors import TrainingError
from peftkit.training.layerwise import FreezeOutSpec, LayerwiseSpec, blocks_named
from peftkit.training.spec import TrainSpec
from peftkit.tuning.depth import Depths
from peftkit.tuning.methods import METHODS
from peftkit.tuning.tuned import Tuned

_RATIO = 32
_CUT = 10
"""ULMFiT's ratio of the highest rate to the lowest, and one over its cut_frac."""


def learning_rate(tuned: Tuned, spec: TrainSpec) -> float:
    """The peak rate: what the settings say, or else the default of the method that is trained."""
    return METHODS[tuned.spec.method].learning_rate if spec.learning_rate is None else spec.learning_rate


def warmup_steps(spec: TrainSpec, steps: int) -> int:
    """Steps in which the rate rises; the first of them has a rate of 0, so one alone would only waste a step."""
    if spec.freezeout.t_0 is not None or spec.lr_scheduler_type == "constant":
        return 0
    if spec.lr_scheduler_type == "slanted_triangular":
        return max(1, steps // _CUT)
    wanted = int(spec.warmup_ratio * steps)
    return wanted if wanted > 1 else 0


def scheduled(spec: TrainSpec, step: int, steps: int) -> float:
    """What the peak rate is multiplied by at `step` of `steps`, counted from 0, without FreezeOut.

    All but slanted_triangular are bitwise those of transformers (optimization.py).
    """
    warmup = warmup_steps(spec, steps)
    if spec.lr_scheduler_type == "constant":
        return 1.0
    if spec.lr_scheduler_type == "slanted_triangular":
        return slanted_triangular(step, steps)
    if step < warmup:
        return step / max(1, warmup)
    if spec.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    if spec.lr_scheduler_type == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def slanted_triangular(step: int, steps: int) -> float:
    """A short rise and a long fall, between 1/32 and 1 (arXiv 1801.06146, eq. 3, cut_frac 0.1, ratio 32).

    The paper divides by cut·(1/cut_frac - 1), which for more than 10 · cut steps ends below 0 (19 steps: cut is 1); the
    steps that are left after the cut are the same number wherever `steps` is a multiple of ten.
    """
    cut = max(1, steps // _CUT)
    share = step / cut if step < cut else 1 - (step - cut) / max(1, steps - cut)
    return (1 + share * (_RATIO - 1)) / _RATIO


def freezing_times(spec: FreezeOutSpec, trained: Iterable[int]) -> dict[int, float]:
    """Share of the run after which each trained depth is frozen; empty without FreezeOut (arXiv 1706.04983)."""
    order = sorted(trained)
    if spec.t_0 is None:
        return {}
    shares = {
        depth: spec.t_0 + (1 - spec.t_0) * at / (len(order) - 1) if len(order) > 1 else 1.0
        for at, depth in enumerate(order)
    }
    return {depth: share**3 if spec.cubed else share for depth, share in shares.items()}


def frozen_from(until: float, steps: int) -> int:
    """The first step, counted from 0, at which a depth that freezes after the share `until` of the run is frozen.

    Any share above 0 begins with the first step, however small.
    """
    return max(1, math.ceil(round(until * steps, 9)))


def annealed(until: float, step: int, steps: int) -> float:
    """FreezeOut's factor: half a cosine from 1 at the first step to 0 at the share `until` of the run, then 0."""
    if step >= frozen_from(until, steps):
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * step / (until * steps)))


def multipliers(spec: LayerwiseSpec, depths: Depths, trained: Iterable[int]) -> dict[int, float]:
    """What the rate of each trained depth is multiplied by; with a decay, the highest of them has the full rate.

    Raises TrainingError for a table that names a depth twice, leaves one out, or names what is not there or not
    trained.
    """
    held = sorted(set(trained))
    if spec.rates:
        return _tabled(spec.rates, depths, held)
    decay = 1.0 if spec.decay is None else spec.decay
    return {depth: decay ** (held[-1] - depth) for depth in held}


def _tabled(rates: Mapping[str, float], depths: Depths, held: list[int]) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, rate in rates.items():
        blocks = blocks_named(key)
        named = [0 if key == "embeddings" else depths.top] if blocks is None else [index + 1 for index in blocks]
        twice = [depth for depth in named if depth in found]
        if max(named) > depths.top or (blocks is not None and max(named) == depths.top):
            raise _unfit(key, f"and the base has {len(depths.blocks)} blocks", depths, held)
        if twice:
            raise _unfit(key, f"and {_listed(depths, twice)} is named before", depths, held)
        if not set(named) & set(held):
            raise _unfit(key, "where nothing is trained", depths, held)
        found.update(dict.fromkeys(named, rate))
    missing = [depth for depth in held if depth not in found]
    if missing:
        raise TrainingError(
            f"train.layerwise.rates has no rate for {_listed(depths, missing)}",
            expected="a rate for every depth that holds trained tensors",
            hint="add them to train.layerwise.rates, or set train.layerwise.decay instead",
        )
    return {depth: found[depth] for depth in held}


def _unfit(key: str, why: str, depths: Depths, held: list[int]) -> TrainingError:
    return TrainingError(
        f"train.layerwise.rates names {key!r}, {why}",
        expected=f"each of these once: {_listed(depths, held)}",
        hint=f"remove or change {key!r} in train.layerwise.rates",
    )


def _listed(depths: Depths, held: list[int]) -> str:
    return ", ".join(depths.label(depth) for depth in held)
