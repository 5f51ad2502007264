"""A sweep: take a trial, run it, write down how it ended, until enough are done; any process may join at any time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peftkit.config.spec import leaves
from peftkit.errors import ConfigError, PeftkitError, TrainingError
from peftkit.events import Decision, Note, Report, Warned, silent
from peftkit.process_group import launched
from peftkit.recipe.run import Interrupted
from peftkit.recipe.sweeping.book import Claim, claim, read_trials
from peftkit.recipe.sweeping.journal import alone, open_study
from peftkit.recipe.sweeping.plan import Plan, load_plan
from peftkit.recipe.sweeping.suggest import is_hopeless
from peftkit.recipe.sweeping.table import Sweep, keep
from peftkit.recipe.sweeping.trial import Objective, Pruned, Stop, Trial, UnknownMetric, objective_of, run_trial

_HOPELESS = 3
"""When the first so many trials all fail, no more are tried."""
_PACE = ("num_train_epochs", "max_steps", "max_tokens", "per_device_train_batch_size", "gradient_accumulation_steps",
         "max_train_rows", "source", "revision")  # fmt: skip
"""Settings of which two values make two trials incomparable after the same step: another schedule, or another base."""

Go = Callable[[Trial, Stop, Report], tuple[str | None, Objective]]
"""Runs a trial; gives the id of its run, and what it is judged by."""


def sweep(folder: Path, *, trials: int, jobs: int = 1, registry: Path | None = None, report: Report = silent) -> Sweep:
    """Work on the sweep in `folder` until it has `trials` trials, those of other processes counted.

    A trial that fails is written down with its reason, and the sweep goes on. Raises TrainingError when all fail,
    Interrupted after Ctrl-C, ConfigError without optuna and for a metric that the first run does not have.
    """
    if launched().size > 1:
        raise ConfigError(["a sweep runs each trial in one process: start it without accelerate launch or torchrun"])
    plan = load_plan(folder)
    open_study(folder)  # made before a helper looks for it
    _say_what(folder, plan, trials, report)
    with _helpers(folder, trials, jobs - 1, registry):
        work(folder, plan, trials, _runner(folder, plan, registry), report)
    with alone(folder):
        result = keep(folder, plan, read_trials(folder))
    if result.best is None:
        first = next((trial.reason for trial in result.trials if trial.reason), "none was finished")
        raise TrainingError(
            f"none of {len(result.trials)} trials of the sweep {folder.name} gave a figure; the first: {first}",
            hint=f"the runs are in {folder / 'runs'}",
        )
    return result


def work(folder: Path, plan: Plan, trials: int, go: Go, report: Report) -> None:
    """Run one trial after the other until there is none left to take, or the first ones all failed."""
    while not _is_lost(read_trials(folder)):
        taken = claim(folder, plan, trials)
        if taken is None:
            known = len(read_trials(folder))
            if known < trials:
                report(Note(f"all {known} combinations were tried"))
            return
        _go(folder, plan, taken, go, report)
        with alone(folder):
            keep(folder, plan, read_trials(folder))


def pruning(plan: Plan) -> tuple[bool, str]:
    """Whether trials are stopped early, and why or why not."""
    if not plan.prune:
        return False, "asked for by --no-prune"
    fixed = [text.partition("=")[0] for text in plan.space.fixed]
    own = dict(leaves(plan.configured({d.key: d.middle for d in plan.space.dimensions}).config))
    measured = [key for key, value in own.items() if key.rpartition(".")[2] == "eval_steps" and value]
    if not measured:
        return False, "nothing is measured during training; set eval_steps, such as train.eval_steps=50"
    said = "given" if measured[0] in (*fixed, *plan.space.keys) else "the recipe's own"
    return True, f"{measured[0]} is {own[measured[0]]} ({said}); a trial stops above the median of those of equal steps"


def _say_what(folder: Path, plan: Plan, trials: int, report: Report) -> None:
    report(Note(f"sweep {folder.name} in {folder}"))
    for dimension in plan.space.dimensions:
        report(Decision("search", f"{dimension.key}: {dimension}", "asked for"))
    on, why = pruning(plan)
    report(Decision("pruning", "on" if on else "off", why))
    done = len(read_trials(folder))
    report(Decision("trials", f"{trials}", f"{done} taken before" if done else f"seed {plan.seed}"))


def _go(folder: Path, plan: Plan, taken: Claim, go: Go, report: Report) -> None:
    """Run a trial that was taken, and write down its end; what is not the trial's fault is raised."""
    trial, began = taken.trial, time.monotonic()
    said = ", ".join(f"{key}={text}" for key, text in trial.settings.items()) or "as the recipe has it"
    report(Note(f"trial {trial.index}: {said}" + (f"  ({trial.why})" if trial.why else "")))
    try:
        run, objective = go(trial, _stopper(folder, plan, taken), report)
    except Pruned as error:
        taken.ended("pruned", reason=error.fact, seconds=time.monotonic() - began)
        report(Note(f"trial {trial.index}: {error.fact}"))
    except Interrupted:
        taken.given_back()
        hint = f"go on with: peftkit sweep --resume {folder.name}"
        raise Interrupted(f"the sweep {folder.name} was interrupted in trial {trial.index}", hint=hint) from None
    except (PeftkitError, MemoryError, RuntimeError, ValueError, ArithmeticError) as error:
        reason = str(getattr(error, "fact", None) or f"{type(error).__name__}: {error}")
        taken.ended("failed", reason=reason, seconds=time.monotonic() - began)
        if isinstance(error, UnknownMetric):
            raise
        report(Warned(f"trial {trial.index} failed: {reason}"))
    except BaseException:
        taken.given_back()
        raise
    else:
        taken.ended("done", objective=objective, run=run, seconds=time.monotonic() - began)
        report(Note(f"trial {trial.index}: {objective.name} {objective.value:.4g}"))


def _runner(folder: Path, plan: Plan, registry: Path | None) -> Go:
    """Trials as real runs of the plan's recipe."""

    def go(trial: Trial, stop: Stop, report: Report) -> tuple[str | None, Objective]:
        name = f"sweep-{folder.name}-{trial.index:03d}"
        resolved = plan.configured(trial.settings)
        result = run_trial(plan.recipe, resolved, folder, name, registry=registry, stop=stop, report=report)
        return result.run_id, objective_of(result.figures, plan.metric)

    return go


def _stopper(folder: Path, plan: Plan, taken: Claim) -> Stop:
    """Writes each measurement down, and tells whether the trial is worse than the median of its like."""
    on, _ = pruning(plan)
    pace = _pace(taken.trial)

    def stop(step: int, value: float, seen: dict[int, float]) -> bool:
        taken.measured(step, value)
        if not on:
            return False
        like = [trial for trial in read_trials(folder) if trial.state == "done" and _pace(trial) == pace]
        return is_hopeless(like, seen)

    return stop


def _pace(trial: Trial) -> dict[str, str]:
    return {key: text for key, text in trial.settings.items() if key.rpartition(".")[2] in _PACE}


def _is_lost(trials: list[Trial]) -> bool:
    ended = [trial for trial in trials if trial.state != "running"]
    return len(ended) >= _HOPELESS and all(trial.state == "failed" for trial in ended)


@contextmanager
def _helpers(folder: Path, trials: int, count: int, registry: Path | None) -> Iterator[None]:
    """`count` more processes that work on the same sweep, without a word; they end before the block does."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that holds CUDA cannot use it
    started = [context.Process(target=_help, args=(folder, trials, registry)) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield
    except BaseException:
        for process in started:
            process.terminate()
        raise
    finally:
        for process in started:
            process.join()


def _help(folder: Path, trials: int, registry: Path | None) -> None:
    plan = load_plan(folder)
    work(folder, plan, trials, _runner(folder, plan, registry), silent)
