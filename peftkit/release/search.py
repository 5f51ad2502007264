"""Weights of a combination found on held-out rows: optuna's TPE over one weight per parent, every trial reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.errors import ConfigError, DeltaError
from peftkit.events import Note, Phase, Progress, Report, Table, silent

Objective = Literal["mean", "worst"]
HIGHEST = 1.5
"""Weights lie in [0, HIGHEST]; above it a combination of trained adapters has only been seen to break."""

Score = Callable[[Sequence[float]], Sequence[float]]
"""Weights → NLL per answer token on each parent's own rows, in the order of the parents."""


@dataclass(frozen=True)
class Trial:
    """One set of weights and what it gave."""

    number: int
    weights: tuple[float, ...]
    objective: float | None
    """None where the combination was refused."""
    nll: tuple[float, ...] = ()
    """Nats per answer token on each parent's rows."""
    refused: str | None = None

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        return {"weights": list(self.weights), "objective": self.objective, "nll": list(self.nll)} | (
            {"refused": self.refused} if self.refused else {}
        )


@dataclass(frozen=True)
class Search:
    """All trials in their order."""

    parents: tuple[str, ...]
    objective: Objective
    seed: int
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the lowest objective, the earliest of equals. Raises DeltaError when all were refused."""
        valued = [(trial.objective, trial.number, trial) for trial in self.trials if trial.objective is not None]
        if not valued:
            raise DeltaError(
                f"none of {len(self.trials)} sets of weights gave a combination: {self.trials[0].refused}",
                hint="raise --rank or --max-residual",
            )
        return min(valued)[2]

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        return {
            "sampler": "tpe",
            "seed": self.seed,
            "objective": self.objective,
            "trials": [trial.record() for trial in self.trials],
            "best": self.best.number,
        }

    def tell(self, report: Report) -> None:
        """Report every trial."""
        columns = ("trial", *self.parents, "objective", "NLL per task")
        report(Table("weight search", columns, tuple(self._line(trial) for trial in self.trials)))

    def _line(self, trial: Trial) -> tuple[str, ...]:
        weights = (f"{weight:.3f}" for weight in trial.weights)
        if trial.objective is None:
            return str(trial.number), *weights, "", str(trial.refused)
        mark = " (best)" if trial is self.best else ""
        return str(trial.number), *weights, f"{trial.objective:.4f}{mark}", ", ".join(f"{v:.4f}" for v in trial.nll)


def first_weights(parents: int) -> list[tuple[float, ...]]:
    """What is tried before anything is searched: the mean, the sum, and each parent alone."""
    alone = [tuple(float(i == j) for j in range(parents)) for i in range(parents)]
    return list(dict.fromkeys([(1 / parents,) * parents, (1.0,) * parents, *alone]))


def search_weights(
    parents: Sequence[str],
    score: Score,
    own: Sequence[float],
    *,
    trials: int,
    seed: int = 0,
    objective: Objective = "mean",
    report: Report = silent,
) -> Search:
    """Try `trials` sets of weights, each in [0, HIGHEST], and score every one; the same seed gives the same trials.

    `own` is each parent's own NLL on its rows: a task's figure is NLL / own, 1 where the combination is as good as the
    parent alone, and the objective is the mean of the tasks' figures, or the worst of them. Trials whose combination
    is refused (DeltaError) stay in the list without a figure. Raises DeltaError without optuna, ConfigError for fewer
    trials than the fixed first ones (`first_weights`).
    """
    fixed = first_weights(len(parents))
    if trials < len(fixed):
        raise ConfigError(
            [f"trials: {trials}; the mean, the sum and each of {len(parents)} parents alone take {len(fixed)}"]
        )
    study = _study(seed)
    for weights in fixed:
        study.enqueue_trial({str(i): weight for i, weight in enumerate(weights)})
    report(Phase("search weights", trials, "trials"))
    found: list[Trial] = []
    for number in range(trials):
        asked = study.ask()
        weights = tuple(asked.suggest_float(str(i), 0.0, HIGHEST) for i in range(len(parents)))
        trial = _tried(number, weights, score, own, objective)
        study.tell(asked, math.inf if trial.objective is None else trial.objective)
        found.append(trial)
        report(Progress(number + 1, {} if trial.objective is None else {"objective": trial.objective}))
    result = Search(tuple(parents), objective, seed, tuple(found))
    result.tell(report)
    best = ", ".join(f"{name}:{weight:.3f}" for name, weight in zip(parents, result.best.weights, strict=True))
    report(Note(f"best weights: {best}"))
    return result


def _tried(number: int, weights: tuple[float, ...], score: Score, own: Sequence[float], objective: Objective) -> Trial:
    try:
        nll = tuple(score(weights))
    except DeltaError as error:
        return Trial(number, weights, None, refused=error.fact)
    figures = [value / alone for value, alone in zip(nll, own, strict=True)]
    return Trial(number, weights, max(figures) if objective == "worst" else sum(figures) / len(figures), nll)


def _study(seed: int) -> Any:
    try:
        import optuna  # an extra
    except ImportError as error:
        raise DeltaError(
            "searching for weights needs optuna, which is not installed", hint="pip install 'peftkit[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
