"""How a sweep goes: what it tries, what it writes down, and that neither kill -9 nor a second process changes that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recipes.sweeping.made_trials import SPACE, bowl, go, made

from peftkit.errors import ConfigError, OutOfMemory, RunError
from peftkit.events import Event, Note, Warned, silent
from peftkit.recipe import Interrupted
from peftkit.recipe.sweeping.book import claim, read_trials
from peftkit.recipe.sweeping.plan import continued, load_plan
from peftkit.recipe.sweeping.search import Go, pruning, work
from peftkit.recipe.sweeping.suggest import is_hopeless, suggest
from peftkit.recipe.sweeping.trial import Objective, Pruned, Trial, UnknownMetric, objective_of, split_metric

pytest.importorskip("optuna")
SCRIPT = Path(__file__).with_name("made_trials.py")


def run(folder: Path, trials: int, go: Go = go, report: Callable[[Event], None] = silent) -> list[Trial]:
    work(folder, load_plan(folder), trials, go, report)
    return read_trials(folder)


def tried(trials: list[Trial]) -> list[dict[str, str]]:
    return [trial.settings for trial in trials]


def process(folder: Path, trials: int, seconds: float = 0.0, *kill_at: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])
    command = [sys.executable, str(SCRIPT), str(folder), str(trials), str(seconds), *kill_at]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})


# -- what is tried


def test_the_recipe_s_own_settings_and_the_middle_come_first(tmp_path: Path) -> None:
    trials = run(made(tmp_path), 3)
    assert [trial.why for trial in trials] == ["the recipe's own", "the middle", ""]
    assert trials[0].settings == {"adapter.r": "16"}, "the learning rate is left to the method"
    assert trials[1].settings == {"train.learning_rate": "0.001", "adapter.r": "8"}


def test_with_bases_the_recipe_s_own_settings_come_on_each(tmp_path: Path) -> None:
    folder = made(tmp_path, "bases=one/x,two/y,three/z", "lora_alpha=8")
    first = [(trial.why, trial.settings.get("base.source")) for trial in run(folder, 4)]
    own = "the recipe's own"
    assert first == [(own, "one/x"), (own, "two/y"), (own, "three/z"), ("the middle", "two/y")]


def test_the_same_seed_tries_the_same_and_another_seed_other_settings(tmp_path: Path) -> None:
    known = run(made(tmp_path, seed=1), 13)  # the last two are TPE's, after ten drawn at random
    space = load_plan(tmp_path / "made").space
    assert tried(known)[2:] == [suggest(space, 1, index, known[:index]) for index in range(2, 13)]
    assert all(settings != suggest(space, 2, index, known[:index]) for index, settings in enumerate(tried(known)))


@pytest.mark.full
def test_it_finds_the_bottom_of_a_bowl(tmp_path: Path) -> None:
    """Against random draws from the same space: 16 trials, 5 seeds; the middle, which is the bottom, is not counted."""
    import numpy as np

    def best(trials: list[Trial]) -> float:
        return min(bowl(trial) for trial in trials if not trial.why)

    found = [best(run(made(tmp_path, name=f"s{seed}", seed=seed), 26)) for seed in range(5)]
    random = np.random.default_rng(0)
    rates, ranks = 10 ** random.uniform(-5, -1, (2000, 24)), random.choice([4, 8, 16], (2000, 24))
    drawn = ((np.log10(rates) + 3) ** 2 + (np.log2(ranks) - 3) ** 2).min(axis=1)
    assert np.median(found) < np.median(drawn)


def test_nothing_is_tried_twice_and_a_small_space_ends(tmp_path: Path) -> None:
    folder = made(tmp_path, "max_steps=1,2", name="small")
    plan = load_plan(folder)
    small = replace(plan.space, dimensions=plan.space.dimensions[1:])  # r and max_steps: six combinations
    known: list[Trial] = []
    for index in range(6):
        settings = suggest(small, 0, index, known)
        assert settings is not None
        known.append(Trial(index, settings, "done", objective=Objective("x", float(index), "min")))
    assert len({tuple(each.items()) for each in tried(known)}) == 6
    assert suggest(small, 0, 6, known) is None


def test_settings_that_failed_are_left_alone(tmp_path: Path) -> None:
    """Rank 16 runs out of memory: of ten trials before, four had it; of those after, none does better than once."""
    space = load_plan(made(tmp_path)).space
    rates = [10 ** (-5 + i / 5) for i in range(20)]
    known = []
    for index, rate in enumerate(rates):
        settings = {"train.learning_rate": repr(rate), "adapter.r": ["4", "8", "16"][index % 3]}
        failed = settings["adapter.r"] == "16"
        state, found = ("failed", None) if failed else ("done", Objective("x", 1.0, "min"))
        known.append(Trial(index, settings, state, objective=found))  # type: ignore[arg-type]
    asked = [suggest(space, 0, index, known) for index in range(100, 140)]
    assert sum(each is not None and each["adapter.r"] == "16" for each in asked) < 40 / 3 / 2


# -- what is stopped early


def with_measured(*values: float) -> list[Trial]:
    return [Trial(i, {}, "done", measured={2: value}) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("done", "now", "stops"),
    [
        ((1, 2, 3, 4), {2: 2.6}, True),  # the median is 2.5
        ((1, 2, 3, 4), {2: 2.4}, False),
        ((1, 2, 3, 4), {1: 2.4, 2: 9.0}, False),  # its best so far counts
        ((1, 2, 3, 4), {1: 9.0}, False),  # nobody was measured at that step
        ((1, 2, 3), {2: 9.0}, False),  # too few
        ((1, 2, 3, 4), {2: float("nan")}, True),
    ],
)
def test_the_median_rule(done: tuple[float, ...], now: dict[int, float], stops: bool) -> None:
    assert is_hopeless(with_measured(*done), now) is stops


def pruned_go(trial: Trial, stop: Callable[[int, float, dict[int, float]], bool], report: Callable[[Event], None]):  # type: ignore[no-untyped-def]
    seen = {1: 4 * bowl(trial)}
    if stop(1, seen[1], seen):
        raise Pruned("pruned after step 1")
    return None, Objective("bowl", bowl(trial), "min")


def test_a_planted_bad_trial_is_stopped_and_a_good_one_is_not(tmp_path: Path) -> None:
    trials = run(made(tmp_path, "eval_steps=1", prune=True), 20, pruned_go)
    states = {trial.index: trial.state for trial in trials}
    assert all(states[index] == "done" for index in range(4)), "too few to tell"
    for trial in trials[4:]:
        before = sorted(bowl(each) for each in trials[: trial.index] if each.state == "done")
        middle = (before[(len(before) - 1) // 2] + before[len(before) // 2]) / 2
        assert (trial.state == "pruned") == (bowl(trial) > middle)
    assert {"done", "pruned"} <= {states[index] for index in range(4, 20)}


def test_trials_of_another_length_or_base_are_not_compared(tmp_path: Path) -> None:
    """Eight of one epoch are far better at step 1; those of two epochs are only compared with each other."""
    folder = made(tmp_path, "num_train_epochs=1,2", "eval_steps=1", prune=True)

    def go(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        long = trial.settings.get("train.num_train_epochs") == "2"
        value = 100.0 - trial.index if long else 1.0 - trial.index / 100  # ever better, so none is above the median
        if stop(1, value, {1: value}):
            raise Pruned("pruned")
        return None, Objective("x", 1.0, "min")

    trials = run(folder, 20, go)
    assert {trial.state for trial in trials} == {"done"}
    assert 4 < sum(trial.settings.get("train.num_train_epochs") == "2" for trial in trials) < 16


def test_pruning_says_why_it_is_off(tmp_path: Path) -> None:
    assert pruning(load_plan(made(tmp_path, name="a"))) == (False, "asked for by --no-prune")
    on, why = pruning(load_plan(made(tmp_path, name="b", prune=True)))
    assert not on
    assert "set eval_steps" in why
    on, why = pruning(load_plan(made(tmp_path, "eval_steps=5", name="c", prune=True)))
    assert on
    assert "train.eval_steps is 5 (given)" in why


# -- what is written down


def test_what_is_written_after_every_trial(tmp_path: Path) -> None:
    folder = made(tmp_path, "max_steps=7")
    seen = []

    def watched(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        if trial.index:
            seen.append(len(json.loads((folder / "sweep.json").read_text())["trials"]))
        return go(trial, stop, report)

    run(folder, 12, watched)
    assert seen == list(range(1, 12))
    kept = json.loads((folder / "sweep.json").read_text())
    values = [trial["objective"]["value"] for trial in kept["trials"]]
    assert values == sorted(values)
    assert kept["best"] == 1, "the middle is the bottom of the bowl"
    assert kept["command"] == (
        "peftkit train lora_sft train.max_steps=7 train.learning_rate=0.001 adapter.r=8 save_as=made"
    )
    assert set(kept["importance"]) == {"train.learning_rate", "adapter.r"}
    assert "chosen on the held-out rows" in kept["warnings"][0]
    page = (folder / "sweep.html").read_text()
    assert page.count("<circle") == 12 + 11 + 12  # the recipe leaves its rate open
    assert kept["command"] in page


def test_more_is_better_where_the_objective_says_so(tmp_path: Path) -> None:
    def more(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        return None, Objective("score", -bowl(trial), "max", -9.0, 9.0)

    folder = made(tmp_path)
    trials = run(folder, 12, more)
    best = max(trials, key=lambda trial: trial.objective.value if trial.objective else -99)
    assert json.loads((folder / "sweep.json").read_text())["best"] == best.index == 1


def test_a_failed_trial_is_written_down_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def fails(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        if trial.settings["adapter.r"] == "16":
            raise OutOfMemory("the device ran out of memory at rank 16")
        return go(trial, stop, report)

    said: list[Event] = []
    trials = run(made(tmp_path), 8, fails, said.append)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    assert failed == [trial for trial in trials if trial.settings["adapter.r"] == "16"]
    assert {trial.reason for trial in failed} == {"the device ran out of memory at rank 16"}
    assert sum(isinstance(event, Warned) for event in said) == len(failed)
    assert len(trials) == 8


def test_when_all_fail_it_stops(tmp_path: Path) -> None:
    def fails(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("planted")

    trials = run(made(tmp_path), 50, fails)
    assert [trial.reason for trial in trials] == ["ZeroDivisionError: planted"] * 3


# -- what ends it early, and two at once


def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = run(made(tmp_path, name="whole"), 14)
    folder = made(tmp_path, name="cut")

    def stops(at: int, error: BaseException) -> Go:
        def cut(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
            if trial.index == at:
                raise error
            return go(trial, stop, report)

        return cut

    for at, error in (
        (0, Interrupted("stopped")),
        (5, Interrupted("stopped")),
        (5, KeyboardInterrupt()),
        (12, SystemExit()),
    ):
        with pytest.raises((Interrupted, KeyboardInterrupt, SystemExit)):
            run(folder, 14, stops(at, error))
        assert [trial.index for trial in read_trials(folder)] == list(range(at))
    again = run(folder, 14)
    assert tried(again) == tried(whole)
    assert [trial.objective for trial in again] == [trial.objective for trial in whole]


@pytest.mark.parametrize("kills", [["4"], pytest.param(["0", "4", "4", "7"], marks=pytest.mark.full)])
def test_a_killed_trial_is_run_again_with_the_same_settings(tmp_path: Path, kills: list[str]) -> None:
    whole = run(made(tmp_path, name="whole"), 8)
    folder = made(tmp_path, name="killed")
    for at in kills:
        assert process(folder, 8, 0.0, at).wait() == -signal.SIGKILL
        assert [trial.index for trial in read_trials(folder)] == list(range(int(at)))
    trials = run(folder, 8)
    assert [replace(trial, seconds=0.0) for trial in trials] == [replace(trial, seconds=0.0) for trial in whole]
    assert {trial.state for trial in trials} == {"done"}
    states = [json.loads(line).get("state") for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert states.count(3) == len(kills), "they are failed in optuna's own words"


@pytest.mark.full
def test_two_processes_share_a_sweep(tmp_path: Path) -> None:
    folder = made(tmp_path)
    started = [process(folder, 12, 0.15), process(folder, 12, 0.15)]
    assert [each.wait(60) for each in started] == [0, 0]
    trials = read_trials(folder)
    assert [trial.index for trial in trials] == list(range(12))
    assert len({tuple(each.items()) for each in tried(trials)}) == 12
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    workers = {line["user_attr"]["trial"]["process"]["pid"] for line in lines if "trial" in line.get("user_attr", {})}
    assert workers == {each.pid for each in started}


def test_a_trial_of_a_living_process_is_left_to_it(tmp_path: Path) -> None:
    folder = made(tmp_path)
    plan = load_plan(folder)
    mine = claim(folder, plan, 2)
    other = claim(folder, plan, 2)
    assert mine is not None
    assert other is not None
    assert (mine.trial.index, other.trial.index) == (0, 1)
    assert claim(folder, plan, 2) is None


def test_a_torn_line_costs_that_line_alone(tmp_path: Path) -> None:
    folder = made(tmp_path)
    before = run(folder, 4)
    with (folder / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_i')
    assert read_trials(folder) == before
    assert len(run(folder, 5)) == 5


def test_a_process_that_is_killed_with_the_lock_holds_up_nobody(tmp_path: Path) -> None:
    """optuna's own lock file would stay behind."""
    folder = made(tmp_path)
    run(folder, 1)
    code = (
        "import os, signal, sys; from pathlib import Path; from peftkit.recipe.sweeping import journal\n"
        "with journal.alone(Path(sys.argv[1])):\n"
        "    journal._Lock(Path(sys.argv[1]) / '.journal.jsonl.lock').acquire()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -signal.SIGKILL
    assert len(run(folder, 2)) == 2


def test_another_space_is_refused_by_what_differs(tmp_path: Path) -> None:
    made(tmp_path, "max_steps=3", seed=1)
    same = ["r=4,8,16", "train.learning_rate=1e-5..1e-1", "train.max_steps=3"]
    assert continued(tmp_path, "made", "lora_sft", same, seed=1, prune=False) == tmp_path / "made"
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, "made", "qlora_sft", ["r=4,8", *SPACE[:1], "max_tokens=9"], seed=2, prune=False)
    found = {problem.partition(":")[0]: problem for problem in caught.value.problems}
    assert set(found) == {"recipe", "seed", "adapter.r", "train.max_steps", "train.max_tokens"}
    assert found["adapter.r"] == "adapter.r: 4, 8, 16 then, 4, 8 now"
    assert found["train.max_tokens"] == "train.max_tokens: not there then, 9 now"
    with pytest.raises(RunError, match="expected: one of: made"):
        continued(tmp_path, "mad", None, [])
    with pytest.raises(RunError, match="peftkit sweep --resume made"):
        made(tmp_path)


# -- what a run is judged by


F1 = {"point": 0.5, "low": 0.4, "high": 0.6}
FIGURES = {
    "training": {"seconds": 3.5},
    "evaluation": {"after": {"answer_nll": {"point": 1.5, "low": 1.0, "high": 2.0}, "score": {"mean": 0.25}, "f1": F1}},
}


def test_the_figure_that_decides() -> None:
    assert objective_of(FIGURES) == Objective("answer_nll", 1.5, "min", 1.0, 2.0)
    assert objective_of(FIGURES, "evaluation.after.score.mean:max") == Objective("score.mean", 0.25, "max")
    assert objective_of(FIGURES, "training.seconds:min") == Objective("training.seconds", 3.5, "min")
    said = {**FIGURES, "objective": {"name": "f1", "value": 0.5, "direction": "max"}}
    assert objective_of(said) == Objective("f1", 0.5, "max", 0.4, 0.6)
    assert objective_of(said).cost == -0.5
    with pytest.raises(UnknownMetric, match=r"evaluation\.after\.score\.mean"):
        objective_of(FIGURES, "evaluation.after.score.man:max")
    assert split_metric("evaluation.after.answer_nll") == ("evaluation.after.answer_nll", "min")
    with pytest.raises(ConfigError, match="score:min or :max"):
        split_metric("score")


def test_an_unknown_metric_ends_the_sweep_after_one_run(tmp_path: Path) -> None:
    def unknown(trial: Trial, stop, report):  # type: ignore[no-untyped-def]
        return None, objective_of(FIGURES, "nothing:min")

    said: list[Event] = []
    with pytest.raises(UnknownMetric):
        run(made(tmp_path), 8, unknown, said.append)
    assert sum(isinstance(event, Note) for event in said) == 1
