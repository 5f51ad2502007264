"""The trials of a sweep in its journal: taken by one process each, ended by it, and taken again where it was killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.process import identity, is_alive
from peftkit.recipe.sweeping.journal import alone, open_study
from peftkit.recipe.sweeping.plan import Plan
from peftkit.recipe.sweeping.suggest import first_settings, suggest
from peftkit.recipe.sweeping.trial import Objective, State, Trial

_TAKEN, _END = "trial", "end"
"""Attributes of optuna's trials: what was tried, and by which process; how it ended. Its own state follows them."""


@dataclass(frozen=True)
class Claim:
    """A trial that this process has taken."""

    trial: Trial
    asked: Any
    """optuna's trial; a trial that was killed keeps its own place in the journal."""

    def measured(self, step: int, value: float) -> None:
        """Write down a measurement between the beginning and the end."""
        self.asked.report(value, step)

    def ended(
        self,
        state: State,
        *,
        objective: Objective | None = None,
        reason: str | None = None,
        run: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Write down how it ended."""
        facts = {"state": state, "objective": asdict(objective) if objective else None, "reason": reason}
        self.asked.set_user_attr(_END, {**facts, "run": run, "seconds": seconds})
        _close(self.asked.study, self.asked.number, facts)

    def given_back(self) -> None:
        """Leave the trial to whoever goes on with the sweep."""
        self.asked.set_user_attr(_END, {"state": "running"})
        _close(self.asked.study, self.asked.number, None)


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a sweep by index, without those that were killed or interrupted."""
    found: dict[int, Trial] = {}
    for held in open_study(folder).get_trials(deepcopy=False):
        if _is_left(held):
            continue
        taken, end = held.user_attrs[_TAKEN], held.user_attrs.get(_END, {})
        objective = Objective(**end["objective"]) if end.get("objective") else None
        found[taken["index"]] = Trial(
            taken["index"], dict(taken["settings"]), end.get("state", "running"), taken["why"], objective,
            end.get("reason"), end.get("run"), end.get("seconds"), dict(held.intermediate_values),
        )  # fmt: skip
    return [found[index] for index in sorted(found)]


def claim(folder: Path, plan: Plan, trials: int) -> Claim | None:
    """Take the next trial, one that was left first; None when `trials` are taken, or nothing is left to try.

    Of two processes that ask at once, each gets a trial of its own.
    """
    with alone(folder):
        study = open_study(folder)
        left = [held for held in study.get_trials(deepcopy=False) if _is_left(held)]
        for held in left:
            _close(study, held.number, None)
        facts = [held.user_attrs[_TAKEN] for held in left if _TAKEN in held.user_attrs]
        again = {each["index"]: each for each in facts}
        known = read_trials(folder)
        indices = {trial.index for trial in known}
        index = next(n for n in range(len(indices) + 1) if n not in indices)
        if index >= trials:
            return None
        taken = again.get(index) or _next(plan, index, known)
        if taken is None:
            return None
        asked = study.ask()
        # One line of the journal: a trial is taken whole, or was never taken.
        asked.set_user_attr(_TAKEN, {**taken, "process": identity(os.getpid())})
    return Claim(Trial(index, dict(taken["settings"]), "running", taken["why"]), asked)


def _next(plan: Plan, index: int, known: Sequence[Trial]) -> dict[str, Any] | None:
    first = first_settings(plan.space, plan.own)
    why, settings = first[index] if index < len(first) else ("", suggest(plan.space, plan.seed, index, known))
    return None if settings is None else {"index": index, "settings": settings, "why": why}


def _is_left(held: Any) -> bool:
    """Whether nobody works on a trial of the journal any more, and it has no end."""
    if _TAKEN not in held.user_attrs:
        return True
    end = held.user_attrs.get(_END)
    return bool(end["state"] == "running" if end else not is_alive(held.user_attrs[_TAKEN]["process"]))


def _close(study: Any, number: int, end: dict[str, Any] | None) -> None:
    """Bring optuna's own state of a trial in line with what is written; only its own tools read that."""
    from optuna.trial import TrialState

    states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    state = states.get(end["state"], TrialState.FAIL) if end else TrialState.FAIL
    objective = Objective(**end["objective"]) if end and end["objective"] else None
    study.tell(number, objective.cost if objective else None, state=state, skip_if_finished=True)
