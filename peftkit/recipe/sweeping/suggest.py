"""What a sweep tries next, what it stops early, and which settings mattered: optuna's TPE, median rule and PED-ANOVA.

Each answer is a function of the trials so far, the seed and the trial's number alone: a sweep that was killed and gone
on with tries what an undisturbed one tries, and two processes never draw the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.extras import extra
from peftkit.recipe.sweeping.space import Choices, Dimension, Space
from peftkit.recipe.sweeping.trial import Trial

Settings = Mapping[str, str]

_REDRAWS = 32
"""Draws before a space of few settings is walked through instead."""
STARTUP = 4
"""Finished trials of the same steps before one may be stopped early: the median of fewer says little."""
_LEAST = 8
"""Finished trials before it is said which settings mattered."""


def suggest(space: Space, seed: int, index: int, trials: Sequence[Trial]) -> dict[str, str] | None:
    """The settings of trial `index`, other than those of all `trials`; None when every combination was tried."""
    with extra("search", "a sweep"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    tried = {tuple(trial.settings.get(key, "") for key in space.keys) for trial in trials}
    for attempt in range(_REDRAWS):
        digest = hashlib.sha256(f"{seed}\0{index}\0{attempt}".encode()).digest()
        sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]))
        study = optuna.create_study(direction="minimize", sampler=sampler)
        study.add_trials(_as_optuna(space, trials))
        asked = study.ask(_distributions(space))
        found = {d.key: _text(d, asked.params[d.key]) for d in space.dimensions}
        if tuple(found.values()) not in tried:
            return found
    if math.isinf(space.size):
        return found
    return next((dict(zip(space.keys, t, strict=True)) for t in _all(space) if t not in tried), None)


def first_settings(space: Space, own: Settings | None) -> list[tuple[str, dict[str, str]]]:
    """What is tried before anything is searched, and why: the recipe's own settings, on each base searched, the middle.

    `own` are the recipe's values of what is searched, without those that it leaves open; None where they contradict
    the fixed settings.
    """
    bases = next((d for d in space.dimensions if isinstance(d, Choices) and d.key.endswith(".source")), None)
    if own is None:
        found = []
    elif bases is None:
        found = [dict(own)]
    else:
        found = [{**own, bases.key: text} for text in bases.texts]
    middle = {dimension.key: dimension.middle for dimension in space.dimensions}
    first = [("the recipe's own", settings) for settings in found]
    return first if middle in found else [*first, ("the middle", middle)]


def is_hopeless(done: Sequence[Trial], now: Mapping[int, float]) -> bool:
    """Whether a trial with the held-out NLL `now` (by step) should stop: its best is worse than the median of `done`.

    The median is of the best that each of `done` had reached by that step; fewer than STARTUP trials stop nothing
    but one that is not a number.
    """
    import optuna

    if all(math.isnan(value) for value in now.values()):
        return True
    study = optuna.create_study(direction="minimize")
    state = optuna.trial.TrialState
    for trial in done:
        study.add_trial(
            optuna.trial.create_trial(state=state.COMPLETE, value=0.0, intermediate_values=dict(trial.measured))
        )
    running = optuna.trial.create_trial(state=state.RUNNING, intermediate_values=dict(now))
    return bool(optuna.pruners.MedianPruner(n_startup_trials=STARTUP).prune(study, running))


def importance(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each searched setting in being among the best tenth (PED-ANOVA, arXiv 2304.10255), largest first.

    Empty with fewer than 8 finished trials inside the space, or one setting alone. It needs nothing beside optuna,
    unlike fANOVA, and with few trials it is a hint and no more.
    """
    import optuna

    done = [trial for trial in trials if trial.state == "done" and _inside(space, trial)]
    if len(done) < _LEAST or len(space.dimensions) < 2:
        return {}
    study = optuna.create_study(direction="minimize")
    study.add_trials(_as_optuna(space, done))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental"
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items() if math.isfinite(share)}


def _as_optuna(space: Space, trials: Sequence[Trial]) -> list[Any]:
    """Trials inside the space as optuna's; one that failed counts as the worst, so that its settings are left alone."""
    import optuna

    distributions, state = _distributions(space), optuna.trial.TrialState
    found = []
    for trial in trials:
        if not _inside(space, trial) or trial.state not in ("done", "pruned", "failed"):
            continue
        params = {d.key: _param(d, trial.settings[d.key]) for d in space.dimensions}
        options: dict[str, Any] = {"params": params, "distributions": distributions}
        if trial.state == "pruned":
            options |= {"state": state.PRUNED, "intermediate_values": dict(trial.measured)}
        else:
            options |= {"state": state.COMPLETE, "value": trial.objective.cost if trial.objective else math.inf}
        found.append(optuna.trial.create_trial(**options))
    return found


def _inside(space: Space, trial: Trial) -> bool:
    return all(d.key in trial.settings and d.holds(trial.settings[d.key]) for d in space.dimensions)


def _distributions(space: Space) -> dict[str, Any]:
    import optuna

    found: dict[str, Any] = {}
    for d in space.dimensions:
        if isinstance(d, Choices):
            found[d.key] = optuna.distributions.CategoricalDistribution(d.texts)
        elif d.whole:
            found[d.key] = optuna.distributions.IntDistribution(int(d.low), int(d.high), log=d.log)
        else:
            found[d.key] = optuna.distributions.FloatDistribution(d.low, d.high, log=d.log)
    return found


def _param(dimension: Dimension, text: str) -> Any:
    if isinstance(dimension, Choices):
        return text
    return int(float(text)) if dimension.whole else float(text)


def _text(dimension: Dimension, value: Any) -> str:
    return str(value) if isinstance(dimension, Choices) else dimension.text(value)


def _all(space: Space) -> itertools.product[tuple[str, ...]]:
    return itertools.product(
        *(d.texts if isinstance(d, Choices) else [str(v) for v in range(int(d.low), int(d.high) + 1)]
          for d in space.dimensions)
    )  # fmt: skip
