"""What is said and checked before the first step: the plan before the weights are loaded, the probe after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import locations
from peftkit.base.head import Head
from peftkit.base.ref import LocatedBase, read_config
from peftkit.errors import BaseError
from peftkit.events import Note, Report, Table, Warned
from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.memory import MemoryPlan
from peftkit.recipe.forecast import Forecast, forecast, workload
from peftkit.recipe.groups import Groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.measuring import Measuring, measuring
from peftkit.recipe.target import Target
from peftkit.render import duration, number, size
from peftkit.runs import RunFolder

if TYPE_CHECKING:
    from peftkit.training.passes.paths import Paths
    from peftkit.training.probe import Piece, Probe
    from peftkit.training.schedule import Schedule
    from peftkit.tuning.tuned import Tuned

_WEIGHTS = (
    "linear layers", "unpacked linear layers", "quantization constants", "embeddings", "head", "experts",
    "norms and biases",
)  # fmt: skip
"""Parts of the base; the float32 copies that are trained stand beside it."""


def shape_of(located: LocatedBase) -> Architecture | None:
    """A base's architecture from its config; None where it is none that a plan knows."""
    try:
        return architecture(read_config(located.folder))
    except BaseError:
        return None


@dataclass(frozen=True)
class Ahead:
    """A run before its first step."""

    given: Groups
    located: LocatedBase
    data: Any
    """What the audit found, of any kind of rows."""
    head: Head | None
    steps: Schedule
    target: Target
    folder: RunFolder | None
    registry: Path
    resumed: bool
    report: Report

    def plan(self) -> Forecast | None:
        """Plan the run, say how it stands to memory and disk, and keep the plan as plan.json.

        Raises OutOfMemory when it cannot fit, RunError when a disk has no room for what the run will write. A base
        whose architecture no plan knows is trained without one.
        """
        shape = shape_of(self.located)
        if shape is None:
            fact = "no plan of memory and time: this base's architecture is not one that peftkit can plan"
            tried = "the longest rows are tried before the first step"
            # A task's base is often an encoder, of which none is planned; one that answers should be a known decoder.
            self.report(Warned(fact, tried) if self.head is None else Note(f"{fact}; {tried}"))
            return None
        found = forecast(shape, self.given, self._lengths, self.target)
        found.tell(self.report)
        if self.folder is not None and not self.resumed:
            self.folder.write_json("plan.json", found.as_record())
        found.check_memory(self.report)
        if self.resumed:  # its checkpoints are on the disk already
            return found
        runs = self.folder.path if self.folder else locations.runs_root().path
        found.check_disk({"runs": runs, "registry": self.registry})
        return found

    def probe(self, tuned: Tuned, plan: Forecast | None, paths: Paths | None = None) -> None:
        """Try the longest rows; say what they took against the plan, and how long the run will be.

        `paths` say how rows of another kind than answers go through the model.

        They go through the whole model. A run with a cached trunk takes less, so the plan beside them is that of the
        same run without one, and its time is a bound.
        """
        found = self._tried(tuned, paths)
        if found is None:
            return
        cached = self.given.train.trunk_cache
        lines = _against(found, self._uncached() if plan is not None and cached else plan, tuned, self._without)
        self.report(Table("the longest rows, tried once", ("", "predicted", "measured"), tuple(map(_shown, lines))))
        times = self._times(found)
        total, training, measuring = (duration(t) for t in (sum(times.values()), times["training"], times["measuring"]))
        words = (f"at most {total}", f"at most {training}{self._without}") if cached else (f"about {total}", training)
        self.report(Note(f"the run will take {words[0]}: training {words[1]}, measuring at most {measuring}"))
        if self.folder is not None:
            names = ("what", "predicted", "measured", "unit")
            records = [dict(zip(names, line, strict=True)) for line in lines]
            self.folder.write_json("probe.json", {"rows": records, "seconds": times, **found.as_record()})

    @property
    def _without(self) -> str:
        """What is said of figures of the whole model where the run will have a cached trunk."""
        return " without the trunk cache" if self.given.train.trunk_cache else ""

    def _uncached(self) -> Forecast | None:
        shape = shape_of(self.located)
        given = replace(self.given, train=self.given.train.model_copy(update={"trunk_cache": False}))
        return forecast(shape, given, self._lengths, self.target) if shape is not None else None

    @cached_property
    def _lengths(self) -> Lengths:
        return Lengths.of_run(self.data, self.given, self.head)

    def _times(self, found: Probe) -> dict[str, float]:
        """Seconds of training, and at most of measuring, from what the longest rows took."""
        work = workload(self.given, self._lengths, len(self.steps))
        answers = work.answers * self._measuring.max_new_tokens
        besides = self.steps.tokens if work.read_besides else 0  # so many again without gradients
        read = work.passes * work.held_out_rows * work.held_out_tokens
        return {
            "training": _seconds(found.step, self.steps.tokens)
            + _seconds(found.likelihood, work.tokens_before + besides),
            "measuring": _seconds(found.likelihood, read) + _seconds(found.answers, answers),
        }

    @property
    def _measuring(self) -> Measuring:
        rows = len(self.data.held_out.rows)
        return measuring(self.given.evaluate, rows, has_head=self.head is not None)

    def _tried(self, tuned: Tuned, paths: Paths | None) -> Probe | None:
        from peftkit.training.exhaustion import is_out_of_memory
        from peftkit.training.probe import probe

        rows, evaluate = (self.data.train.examples, self.data.held_out.examples), self.given.evaluate
        answers = self._measuring.answers > 0
        options: dict[str, Any] = {"evaluation_batch": evaluate.batch_size, "answers": answers, "paths": paths}
        try:
            return probe(tuned, *rows, self.given.train, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        asked = f"the longest training rows, or {evaluate.batch_size} of the longest held-out rows at once,"
        fact = f"{asked} do not fit into memory{self._without}"
        self.report(Warned(fact, "find settings that fit: --budget"))
        return None


def weights_held(memory: MemoryPlan) -> int:
    """Bytes of the base's own weights in a plan, as `backbone.quantize.footprint` measures them."""
    return sum(part.bytes.expected for part in memory.parts if part.name in _WEIGHTS)


def _against(
    found: Probe, plan: Forecast | None, tuned: Tuned, without: str
) -> list[tuple[str, float | None, float, str]]:
    """What was predicted and what was measured, with the unit; `without` says what the step was tried without."""
    from peftkit.backbone.quantize import footprint

    weights = footprint(tuned.backbone.model)
    evaluated = [piece.peak_bytes for piece in (found.likelihood, found.answers) if piece]
    step_bytes = measured_bytes = weight_bytes = rate = None
    if plan is not None:
        memory = plan.memory
        weight_bytes = weights_held(memory)
        # The allocator does not see CUDA's context.
        around = memory.part("context").bytes.expected if plan.target.device == "cuda" else 0
        step_bytes = memory.stage("train").bytes.expected - around
        measured_bytes = memory.stage("evaluate").bytes.expected - around
        if plan.time is not None:
            rate = plan.setting.rows_per_step * plan.lengths.mean / plan.time.step.expected
    rows: list[tuple[str, float | None, float, str]] = [
        ("weights", weight_bytes, weights.linear_bytes + weights.other_bytes, "bytes"),
        (f"memory of a step{without}", step_bytes, found.step.peak_bytes, "bytes"),
        (f"training tokens/s{without}", rate, found.step.tokens_per_second, "tokens/s"),
    ]
    if evaluated:
        rows.insert(2, ("memory of measuring", measured_bytes, max(evaluated), "bytes"))
    return rows


def _shown(row: tuple[str, float | None, float, str]) -> tuple[str, str, str]:
    what, predicted, measured, unit = row
    text = size if unit == "bytes" else number
    return what, text(predicted), text(measured)


def _seconds(piece: Piece | None, tokens: Any) -> float:
    return tokens / piece.tokens_per_second if piece else 0.0
