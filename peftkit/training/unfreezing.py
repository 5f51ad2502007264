"""Which depths of a model train at which step: gradual unfreezing, and freezing layers out.

A frozen parameter has neither gradient nor optimizer state, and one that is thawed begins with a fresh state. Below
the lowest tensor that trains, autograd builds no graph, so the backward pass ends there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

from peftkit.errors import TrainingError
from peftkit.events import Note, Report, Warned
from peftkit.training.rates import freezing_times, frozen_from
from peftkit.training.spec import TrainSpec
from peftkit.tuning.depth import Depths
from peftkit.tuning.tuned import Tuned


def spans(spec: TrainSpec, trained: Iterable[int], *, rows: int, steps: int) -> dict[int, range]:
    """The steps, counted from 0, in which each trained depth trains, in a run of `steps` over `rows` rows.

    Unfreezing: part k begins with the first step before which k · every_epochs passes over the rows are done, or with
    step k · every_steps (ULMFiT, arXiv 1801.06146, section 3.3). FreezeOut: a depth stops at its share of the run.
    Raises TrainingError where there is nothing to unfreeze.
    """
    order = sorted(set(trained), reverse=spec.unfreeze.direction == "deep_first")
    until = freezing_times(spec.freezeout, order)
    if until:
        return {depth: range(frozen_from(until[depth], steps)) for depth in order}
    if spec.unfreeze.direction == "none":
        return {depth: range(steps) for depth in order}
    if len(order) <= spec.unfreeze.groups:
        raise TrainingError(
            f"train.unfreeze.groups={spec.unfreeze.groups} thaws all of the {len(order)} depths that hold trained "
            "tensors at the first step",
            expected="more depths than are thawed at once",
            hint="train.unfreeze.direction=none, or lower train.unfreeze.groups",
        )
    every = Fraction(spec.unfreeze.every_steps or 0)
    if spec.unfreeze.every_epochs is not None:
        every = Fraction(str(spec.unfreeze.every_epochs)) * rows / spec.rows_per_step
    begin = {depth: math.ceil(at // spec.unfreeze.groups * every) for at, depth in enumerate(order)}
    return {depth: range(min(start, steps), steps) for depth, start in begin.items()}


class Unfreezing:
    """Freezes and thaws the trained parameters of one run; `begin` goes before every step."""

    def __init__(self, tuned: Tuned, depths: Depths, spans: Mapping[int, range], report: Report) -> None:
        self.tuned, self.depths, self.spans, self.report = tuned, depths, spans, report
        self._training = frozenset(spans)
        self._names = {depth: [name for name in tuned.names if depths.of[name] == depth] for depth in spans}
        self.last_thaw = max(span.start for span in spans.values() if span)
        """The step, counted from 0, from which on all trains that ever does."""
        never = sum(len(self._names[depth]) for depth, span in spans.items() if not span)
        if never:
            text = f"{never} of {len(tuned.names)} trained tensors are never thawed in this run and stay as they are"
            report(Warned(text, "lower train.unfreeze.every_epochs or every_steps, raise groups, or train longer"))

    def changes_at(self, step: int) -> bool:
        """Whether other depths train at `step`, counted from 0, than at the one before; also right after a resume."""
        return step > 0 and any((step in span) != (step - 1 in span) for span in self.spans.values())

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Let those depths train that do so at `step`, counted from 0; nothing happens where nothing changes."""
        now = frozenset(depth for depth, span in self.spans.items() if step in span)
        if now == self._training:
            return
        parameters = self.tuned.trainable
        for depth in self.spans:
            for name in self._names[depth]:
                parameter = parameters[name].requires_grad_(depth in now)
                if depth not in now:
                    optimizer.state.pop(parameter, None)
        self.report(Note(f"step {step + 1}: {self._told(now)}"))
        self._training = now

    def _told(self, now: frozenset[int]) -> str:
        changes = [
            f"{', '.join(self.depths.label(depth) for depth in sorted(changed))} {what}"
            for what, changed in (("thawed", now - self._training), ("frozen", self._training - now))
            if changed
        ]
        train = sum(len(self._names[depth]) for depth in now)
        return f"{'; '.join(changes)}; {train} of {len(self.tuned.names)} tensors train"


def thaw(tuned: Tuned) -> None:
    """Let all trained parameters require a gradient again, as they did when they were injected."""
    for parameter in tuned.trainable.values():
        parameter.requires_grad_(True)


def check_freezing(spec: TrainSpec, *, sharded: bool) -> None:
    """Raise TrainingError where freezing meets a sharded base: FSDP2 decides once what requires a gradient."""
    used = {
        "train.unfreeze.direction": spec.unfreeze.direction != "none",
        "train.freezeout.t_0": spec.freezeout.t_0 is not None,
    }
    for name in (name for name, set_ in used.items() if set_):
        if sharded:
            raise TrainingError(
                f"{name} freezes tensors during the run, which FSDP does not take up",
                expected="every process with a whole copy of the base",
                hint="start it with DDP: accelerate launch --multi_gpu",
            )
