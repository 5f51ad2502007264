"""The weight search finds a known optimum, tries the same for the same seed, and keeps what was refused."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from peftkit.errors import ConfigError, DeltaError
from peftkit.events import Event, Table
from peftkit.release.search import HIGHEST, first_weights, search_weights


def bowl(*centre: float) -> Callable[[Sequence[float]], list[float]]:
    """NLLs that are lowest, at 1, where the weights are `centre`: each task looks at its own weight."""
    return lambda weights: [1 + (w - c) ** 2 for w, c in zip(weights, centre, strict=True)]


def search(score: Any, parents: int = 2, trials: int = 40, **more: Any) -> Any:
    names = [f"p{i}" for i in range(parents)]
    return search_weights(names, score, [1.0] * parents, trials=trials, **more)


def test_what_is_tried_first() -> None:
    assert first_weights(3) == [(1 / 3,) * 3, (1.0,) * 3, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert first_weights(1) == [(1.0,)]
    found = search(lambda w: [1.0, 1.0, 1.0], 3, 5)
    assert [trial.weights for trial in found.trials] == first_weights(3)


def test_a_known_optimum_is_found() -> None:
    found = search(bowl(0.8, 0.3))
    assert found.best.weights == pytest.approx((0.8, 0.3), abs=0.2)
    assert found.best.objective < min(trial.objective for trial in found.trials[:4])
    assert all(0 <= weight <= HIGHEST for trial in found.trials for weight in trial.weights)
    assert len(found.trials) == 40


def test_a_parent_alone_is_found_where_it_is_best() -> None:
    """Its weights are among the first that are tried, so nothing found later can be worse."""
    found = search(bowl(1.0, 0.0), trials=12)
    assert found.best.weights == (1.0, 0.0)
    assert found.best.objective == 1.0
    assert found.best.number == 2


def test_the_same_seed_tries_the_same_and_another_one_something_else() -> None:
    one, same, other = (search(bowl(0.8, 0.3), trials=15, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert [t.weights for t in one.trials] != [t.weights for t in other.trials]
    assert json.loads(json.dumps(one.record())) == one.record()


def test_the_objective_is_the_mean_or_the_worst_task() -> None:
    def score(weights: Sequence[float]) -> list[float]:
        return [2.0, 9.0]

    mean = search_weights(["a", "b"], score, [1.0, 3.0], trials=4)
    worst = search_weights(["a", "b"], score, [1.0, 3.0], trials=4, objective="worst")
    assert mean.best.objective == (2.0 / 1.0 + 9.0 / 3.0) / 2
    assert worst.best.objective == 3.0
    assert mean.best.nll == (2.0, 9.0)


def test_a_refused_combination_is_a_trial_without_a_figure() -> None:
    def score(weights: Sequence[float]) -> list[float]:
        if sum(weights) > 1.5:
            raise DeltaError("too far")
        return bowl(0.8, 0.3)(weights)

    found = search(score, trials=20)
    refused = [trial for trial in found.trials if trial.objective is None]
    assert {trial.refused for trial in refused} == {"too far"}
    assert found.best.objective is not None
    assert sum(found.best.weights) <= 1.5


def test_only_refused_combinations_are_an_error() -> None:
    def score(weights: Sequence[float]) -> list[float]:
        raise DeltaError("too far")

    with pytest.raises(DeltaError, match="none of 4 sets of weights gave a combination: too far"):
        search(score, trials=4)


def test_fewer_trials_than_the_first_weights_are_an_error() -> None:
    with pytest.raises(ConfigError, match="take 4"):
        search(bowl(1, 1), trials=3)


def test_without_optuna_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(DeltaError) as caught:
        search(bowl(1, 1))
    assert caught.value.hint == "pip install 'peftkit[search]'"


def test_every_trial_is_told() -> None:
    told: list[Event] = []
    found = search(bowl(0.8, 0.3), trials=6, report=told.append)
    table = next(event for event in told if isinstance(event, Table))
    assert len(table.rows) == len(found.trials) == 6
    assert [row[-2].endswith("(best)") for row in table.rows].count(True) == 1
