"""The fastest way to run a setting within a memory budget, with the reason for every change.

Concessions are made in this order, and a later kind only where the earlier ones do not suffice:

1. micro-batch and checkpointing, of as few blocks as suffice, whichever is faster: the same gradients, the same
   effective batch;
2. an optimizer with 8-bit, then paged states;
3. activations that wait in host memory;
4. weights of 8, then 4 bits;
5. with consent only, shorter rows.

Within one kind the fastest setting wins. Where memory is left, the micro-batch grows and checkpointing is switched off.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from peftkit.errors import TrainingError
from peftkit.planning.architecture import Architecture
from peftkit.planning.concessions import FIELDS, Concession, choices, reason
from peftkit.planning.devices import find_device
from peftkit.planning.memory import MemoryPlan, StageName, plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.time import Machine, Workload, cpu, gpu, measuring_seconds, step_seconds
from peftkit.render import number, size

Planner = Callable[[Architecture, Setting], MemoryPlan]
Consent = Literal["length"]


@dataclass(frozen=True)
class Fit:
    """A setting that fits, how it came about, and what one more concession would bring."""

    setting: Setting
    plan: MemoryPlan
    decisions: tuple[Concession, ...]
    next: Concession | None


def fit(
    architecture: Architecture,
    setting: Setting,
    budget_bytes: int,
    *,
    fixed: frozenset[str] = frozenset(),
    consent: frozenset[Consent] = frozenset(),
    machine: Machine | None = None,
    tokens_per_row: float | None = None,
    plan: Planner = plan_memory,
) -> Fit:
    """The fastest setting whose high peak is within the budget; it keeps the effective batch and the fields in `fixed`.

    `tokens_per_row` is the mean length of a training row (None: all as long as the longest). `machine` ranks by speed;
    without one a card or CPU of the middle class does. Raises TrainingError when nothing fits.
    """
    search = _Search(architecture, setting, budget_bytes, fixed, machine, tokens_per_row, plan)
    found = search.fastest()
    if found is None and "length" in consent and "longest" not in fixed and (longest := search.longest()):
        found = replace(search, start=_shortened(setting, longest)).fastest()
    if found is None:
        raise _too_small(search)
    return Fit(found, search.planned(found), tuple(search.concessions(setting, found)), search.next_after(found))


@dataclass(frozen=True)
class _Search:
    """What may be tried, in order, and what it needs."""

    architecture: Architecture
    start: Setting
    budget: int
    fixed: frozenset[str]
    machine: Machine | None
    tokens: float | None
    plan: Planner
    _plans: dict[Setting, MemoryPlan] = field(default_factory=dict)

    def planned(self, setting: Setting) -> MemoryPlan:
        if setting not in self._plans:
            self._plans[setting] = self.plan(self.architecture, setting)
        return self._plans[setting]

    def need(self, setting: Setting) -> int:
        """The high estimate of the stage that needs most."""
        return max(stage.bytes.high for stage in self.planned(setting).stages)

    def seconds(self, setting: Setting) -> float:
        """Seconds of a step, to six digits: sums in another order are no difference."""
        tokens = None if self.tokens is None else min(self.tokens, setting.longest)
        return float(f"{step_seconds(self.architecture, setting, self._machine, tokens).expected:.6g}")

    def evaluation_seconds(self, setting: Setting) -> float:
        rows = self.start.evaluation_batch
        work = Workload(0, 0.0, held_out_rows=rows, held_out_tokens=self.start.evaluation_longest)
        if self.start.max_new_tokens:
            work = Workload(0, 0.0, answers=rows)
        return measuring_seconds(self.architecture, setting, self._machine, work).expected

    @cached_property
    def _machine(self) -> Machine:
        if self.machine is not None:
            return self.machine
        if self.start.device == "cpu":
            return cpu(100e9, 20e9)
        return gpu(find_device("RTX 3060 12GB"), self.start.compute_dtype)

    def choices(self, name: str) -> tuple[Any, ...]:
        """Values of a field that may be tried, the most welcome first."""
        return choices(self.start, name, self.fixed)

    def rungs(self) -> Iterator[Setting]:
        """Settings with the least evaluation batch on which something fits; each gives up more than the one before."""
        last = self.last_rung(self.start)
        for bits in self.choices("bits"):
            packed = replace(last, bits=bits)
            for offloading in self.choices("activation_offloading") if self._any_fits(packed) else ():
                waiting = replace(packed, activation_offloading=offloading)
                for optim in self.choices("optim") if self._any_fits(waiting) else ():
                    yield replace(waiting, optim=optim)

    def last_rung(self, setting: Setting) -> Setting:
        """Everything given up but speed."""
        names = ("bits", "activation_offloading", "optim", "evaluation_batch")
        return replace(setting, **{name: self.choices(name)[-1] for name in names})

    def fastest(self) -> Setting | None:
        """The fastest setting that fits on the first rung where any does."""
        for rung in self.rungs():
            fitting = [setting for base in self._checkpointed(rung) for setting in self._fitting(base)]
            fitting += [fewer for setting in fitting if (fewer := self._fewest_blocks(setting, fitting)) is not None]
            if fitting:
                best = min(fitting, key=self._order)
                batches = (replace(best, evaluation_batch=count) for count in self.choices("evaluation_batch"))
                return next(setting for setting in batches if self.need(setting) <= self.budget)
        return None

    def _checkpointed(self, rung: Setting) -> Iterator[Setting]:
        """No block, all, and all but the last: offloaded, or of few blocks, the latter may need least of the three."""
        for on in self.choices("gradient_checkpointing"):
            blocks = self.choices("checkpointed_blocks")[0] if on else None
            yield replace(rung, gradient_checkpointing=on, checkpointed_blocks=blocks)
        last = self.architecture.layers - 1
        if last and not self.fixed & {"gradient_checkpointing", "checkpointed_blocks"} and self._may_checkpoint:
            yield replace(rung, gradient_checkpointing=True, checkpointed_blocks=last)

    @property
    def _may_checkpoint(self) -> bool:
        return True in self.choices("gradient_checkpointing")

    def _fewest_blocks(self, setting: Setting, fitting: list[Setting]) -> Setting | None:
        """The same with the fewest checkpointed blocks that fit; None where that is none, all, or all but one."""
        if setting.checkpointed_blocks is None or replace(setting, gradient_checkpointing=False) in fitting:
            return None
        some = [replace(setting, checkpointed_blocks=count) for count in range(1, setting.checkpointed_blocks)]
        first = bisect.bisect_left(some, True, key=lambda each: self.need(each) <= self.budget)
        return some[first] if first < len(some) else None

    def _fitting(self, rung: Setting) -> list[Setting]:
        """The micro-batches that fit. Fewer rows need less memory, but the whole batch at once accumulates nothing."""
        whole, *parts = [replace(rung, micro_batch=count) for count in self.choices("micro_batch")]
        first = bisect.bisect_left(parts, True, key=lambda setting: self.need(setting) <= self.budget)
        return [whole] * (self.need(whole) <= self.budget) + parts[first:]

    def _any_fits(self, rung: Setting) -> bool:
        return self.need(self.least(rung)) <= self.budget

    def least(self, rung: Setting) -> Setting:
        """The setting of a rung with the smallest peak."""
        batches = self.choices("micro_batch")
        ends = {batches[0], batches[-1]}
        settings = [replace(base, micro_batch=count) for base in self._checkpointed(rung) for count in sorted(ends)]
        return min(settings, key=self.need)

    def _order(self, setting: Setting) -> tuple[float, bool, bool, int]:
        """Least time; among equals what was asked for, then what takes least memory."""
        same_batch = setting.micro_batch == self.start.micro_batch
        same_checkpointing = setting.gradient_checkpointing == self.start.gradient_checkpointing
        return self.seconds(setting), not same_checkpointing, not same_batch, setting.micro_batch

    def longest(self) -> int | None:
        """Tokens of the longest row that would fit with every other concession made; None: not even one token's."""
        last = self.last_rung(self.start)
        if not self._any_fits(_shortened(last, 1)):
            return None
        low, high = 1, _limit(self.start)
        while low < high:
            middle = (low + high + 1) // 2
            if self._any_fits(_shortened(last, middle)):
                low = middle
            else:
                high = middle - 1
        return low

    def concessions(self, before: Setting, after: Setting) -> Iterator[Concession]:
        """The changes from one setting to the other, field by field, each on top of those before it."""
        names = [name for name in FIELDS if getattr(before, name) != getattr(after, name)]
        names += ["longest"] if _limit(before) != _limit(after) else []
        for name in sorted(names, key=lambda name: _spends(name, before, after)):  # what saves memory comes first
            changed = _shortened(before, _limit(after))
            if name != "longest":
                changed = replace(before, **{name: getattr(after, name)})
            yield self._concession(name, before, changed)
            before = changed

    def _concession(self, name: str, before: Setting, after: Setting) -> Concession:
        stage: StageName = "evaluate" if name == "evaluation_batch" else "train"
        saved = self._stage(before, stage) - self._stage(after, stage)
        clock = self.evaluation_seconds if name == "evaluation_batch" else self.seconds
        factor = clock(after) / clock(before)
        was, now = (
            (_limit(before), _limit(after)) if name == "longest" else (getattr(before, name), getattr(after, name))
        )
        return Concession(name, was, now, saved, factor, reason(name, after, was, now, saved, factor))

    def _stage(self, setting: Setting, name: StageName) -> int:
        stages = {stage.name: stage.bytes.high for stage in self.planned(setting).stages}
        return stages.get(name, self.need(setting))

    def next_after(self, setting: Setting) -> Concession | None:
        """The first single change that would lower the peak further: evaluation, then the fastest, then the rungs."""
        peak = self.need(setting)
        for names in (("evaluation_batch",), FIELDS[:3], *((n,) for n in FIELDS[3:6])):
            steps = (self._lower(setting, name) for name in names)
            lower = [step for step in steps if step is not None and self.need(step) < peak]
            if lower:
                return next(self.concessions(setting, min(lower, key=self.seconds)))
        return None

    def _lower(self, setting: Setting, name: str) -> Setting | None:
        if name == "checkpointed_blocks":
            some = setting.checkpointed_blocks is not None and name not in self.fixed
            return replace(setting, checkpointed_blocks=None) if some else None
        values = self.choices(name)
        after = values.index(getattr(setting, name)) + 1
        return replace(setting, **{name: values[after]}) if after < len(values) else None


def _spends(name: str, before: Setting, after: Setting) -> bool:
    """Whether a change uses memory to gain time."""
    was, now = getattr(before, name), getattr(after, name)
    if name == "checkpointed_blocks":
        return now is not None and (was is None or now < was)
    return bool(now > was if name == "micro_batch" else was and not now)


def _shortened(setting: Setting, longest: int) -> Setting:
    """Training and held-out rows cut at `longest` tokens: data.max_length holds for both."""
    cut = {name: min(getattr(setting, name), longest) for name in ("longest", "labelled", "evaluation_longest")}
    return replace(setting, **cut)


def _limit(setting: Setting) -> int:
    """Tokens of the longest row of all."""
    return max(setting.longest, setting.evaluation_longest)


def _too_small(search: _Search) -> TrainingError:
    least = search.least(search.last_rung(search.start))
    plan = search.planned(least)
    stage = max(plan.stages, key=lambda each: each.bytes.high)
    peak = search.need(least)
    hints = list(_released(search))
    if "longest" not in search.fixed and (longest := search.longest()):
        hints.append(f"cut rows at {number(longest)} tokens (the longest has {number(_limit(search.start))})")
    smaller = search.architecture.parameters * search.budget / peak
    hints.append(f"take a smaller base, by proportion about {smaller / 1e9:.1f} billion parameters")
    kept = "".join(f", {name}={getattr(search.start, name)}" for name in FIELDS if name in search.fixed)
    return TrainingError(
        f"the smallest peak is {_gigabytes(peak)}, in stage {stage.name!r}, and the budget is {size(search.budget)}",
        expected=f"a budget of at least {_gigabytes(peak)} for rows of {number(search.start.longest)} tokens{kept}",
        hint="; or ".join(hints),
    )


def _gigabytes(count: int) -> str:
    """Rounded up, so that the figure is a budget that suffices."""
    return f"{math.ceil(count / 1e7) / 100:.2f} GB"


def _released(search: _Search) -> Iterator[str]:
    """What would fit if single fields that were asked for, or all of them, could change."""
    asked = [name for name in FIELDS if name in search.fixed]
    for names in [*({name} for name in asked), *([set(asked)] if len(asked) > 1 else [])]:
        freed = replace(search, fixed=search.fixed - names)
        if (found := freed.fastest()) is not None:
            changes = [
                f"{name} {getattr(search.start, name)} → {getattr(found, name)}" for name in asked if name in names
            ]
            yield f"let {' and '.join(changes)}: {_gigabytes(freed.need(found))}"
            if len(names) > 1:
                return
