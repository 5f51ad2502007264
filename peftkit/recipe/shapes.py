"""The plan against a real step and a real evaluation, over a few shapes of batch: memory and speed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peftkit.backbone.quiet import quiet
from peftkit.data.chat import IGNORED, Example
from peftkit.data.spec import DataSpec
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.planning.architecture import Architecture
from peftkit.planning.ranges import Part, Range, StageName
from peftkit.planning.weights import weights
from peftkit.recipe.forecast import Forecast, forecast
from peftkit.recipe.groups import Groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.oracle import label_of
from peftkit.recipe.target import Target
from peftkit.recipe.verdict import Check, held, left_out, shown
from peftkit.render import size
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.memory import checkpoint_activations, release
from peftkit.training.probe import Probe, probe
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned

ANSWER = 8
"""Tokens that the probe generates for every answer."""
CLOSE = 0.1
"""How far a figure may lie outside the plan's range: what the plan promises of published figures (issue 4, item 1)."""
_HINT = "give plans this much more room on this card (--budget), and attach the file to an issue of peftkit"


@dataclass(frozen=True)
class Shape:
    """So many rows of one length at once, in training and in evaluation."""

    rows: int
    length: int
    checkpointing: bool

    def name(self, label: str) -> str:
        """As tables show it: `nf4+dq, bfloat16, 4 × 256 tokens, checkpointing`."""
        return f"{label}, {self.rows} × {self.length:,} tokens" + (", checkpointing" if self.checkpointing else "")

    def examples(self, vocabulary: int) -> list[Example]:
        """Random tokens, the second half learned; the whole row is what an answer would follow."""
        draw, half = random.Random(0), self.length // 2
        made = []
        for index in range(self.rows):
            ids = [draw.randrange(vocabulary) for _ in range(self.length)]
            labels = [IGNORED] * half + ids[half:]
            made.append(Example(ids, labels, self.length, index, f"made row {index + 1}"))
        return made


def planned(shape: Shape, given: Groups, architecture: Architecture, target: Target) -> Forecast:
    """The plan of this shape, as a run with these settings would get it."""
    rows = shape.examples(architecture.vocabulary)
    return forecast(architecture, _settings(shape, given), Lengths.of(rows, rows, shape.rows), target)


def settings(tuned: Tuned) -> Groups:
    """A recipe's groups of settings for a backbone with an adapter; training and evaluation are the shape's."""
    base = tuned.backbone.base
    names = {"base": base, "quant": tuned.backbone.quant, "adapter": tuned.spec}
    return Groups(**names, data=DataSpec(), train=TrainSpec(), evaluate=EvaluateSpec(), names={})  # type: ignore[arg-type]


def check_weights(plan: Forecast, architecture: Architecture, label: str, measured: int) -> Check:
    """What loading took, against the plan."""
    planned_bytes = _total(list(weights(architecture, plan.setting)))
    return _against("weights", label, measured, planned_bytes, judged=True)


def check_shape(tuned: Tuned, shape: Shape, architecture: Architecture, target: Target, before: int) -> list[Check]:
    """Try a shape twice, and hold the second time to its plan; `before` bytes were there without the base.

    On a CPU memory is shown only: a process's own holds what earlier shapes left behind.
    """
    name, given = shape.name(label_of(tuned)), settings(tuned)
    plan = planned(shape, given, architecture, target)
    need, room = plan.memory.limit.bytes, target.bytes or 0
    if need.low > room:
        return [
            left_out("plan and speed", name, f"the plan needs {size(need.low)}, and {target.name} has {size(room)}")
        ]
    try:
        found = _tried(tuned, shape, _settings(shape, given), architecture.vocabulary)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = None
    if found is None:
        release(tuned.backbone.device)
        source = f"it ran out of memory; the plan's peak is {size(need.expected)}, and {size(room)} were free"
        promised = 1.0 if need.high <= room else 0.0
        return [held("fits", name, 0.0, "", low=promised, source=source, hint=_HINT)]
    return list(_figures(found, plan, name, before))


def _figures(found: Probe, plan: Forecast, name: str, before: int) -> Iterator[Check]:
    on_card = plan.target.device == "cuda"
    around = plan.memory.part("context").bytes if on_card else Range(0, 0, 0)  # the allocator does not see it
    states = plan.memory.part("optimizer").bytes  # a probe updates nothing
    pieces = [piece for piece in (found.likelihood, found.answers) if piece]
    stages: list[tuple[StageName, str, int, list[Range]]] = [
        ("train", "step", found.step.peak_bytes, [around, states]),
        ("evaluate", "evaluation", max(piece.peak_bytes for piece in pieces), [around]),
    ]
    for stage, what, peak, absent in stages:
        expected = _without(plan.memory.stage(stage).bytes, absent)
        yield _against(what, name, peak - (before if on_card else 0), expected, judged=on_card)
    tokens = plan.setting.rows_per_step * plan.lengths.mean
    rate = tokens / plan.time.step.expected if plan.time else None
    yield shown("training", name, found.step.tokens_per_second, "tokens/s", rate)
    if found.answers:
        yield shown("answering", name, found.answers.tokens_per_second, "tokens/s")


def _settings(shape: Shape, given: Groups) -> Groups:
    train = TrainSpec(per_device_train_batch_size=shape.rows, gradient_checkpointing=shape.checkpointing)
    evaluate = EvaluateSpec(batch_size=shape.rows, max_new_tokens=ANSWER)
    return Groups(given.base, given.quant, given.adapter, given.data, train, evaluate, given.names)


def _tried(tuned: Tuned, shape: Shape, given: Groups, vocabulary: int) -> Probe:
    rows = shape.examples(vocabulary)
    with _checkpointing(tuned, shape.checkpointing):
        for _ in range(2):  # the first time loads kernels and chooses algorithms
            found = probe(tuned, rows, rows, given.train, evaluation_batch=shape.rows, answers=True)
    return found


@contextmanager
def _checkpointing(tuned: Tuned, on: bool) -> Iterator[None]:
    base = tuned.inner
    if on:
        with quiet():
            checkpoint_activations(tuned)
    try:
        yield
    finally:
        if on:
            with quiet():
                base.gradient_checkpointing_disable()
            base.disable_input_require_grads()


def _against(what: str, of: str, measured: int, plan: Range, *, judged: bool) -> Check:
    if not judged:
        return shown(what, of, measured, "bytes", plan.expected, "a process's memory holds what earlier shapes left")
    low, high = plan.low * (1 - CLOSE), plan.high * (1 + CLOSE)
    source = f"the plan's range, and {CLOSE:.0%} on either side"
    return held(what, of, measured, "bytes", low=low, high=high, expected=plan.expected, source=source, hint=_HINT)


def _total(parts: Sequence[Part]) -> Range:
    total = Range(0, 0, 0)
    for part in parts:
        total += part.bytes
    return total


def _without(whole: Range, absent: Sequence[Range]) -> Range:
    low, expected, high = ([getattr(part, end) for part in absent] for end in ("low", "expected", "high"))
    return Range(whole.low - sum(low), whole.expected - sum(expected), whole.high - sum(high))
