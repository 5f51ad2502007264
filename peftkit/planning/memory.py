"""Peak memory of a run, stage by stage, as arithmetic on a base's config and a setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from peftkit.planning.activations import Activations, activations
from peftkit.planning.architecture import Architecture
from peftkit.planning.block import forward_pass
from peftkit.planning.evaluation import (
    asked_base,
    evaluated_rows,
    evaluation_logits,
    generating,
    kv_cache,
    measuring,
    reading,
)
from peftkit.planning.head import chunk_rows
from peftkit.planning.layers import SIZES
from peftkit.planning.passes import training_passes
from peftkit.planning.ranges import NOTHING, Part, Range, Stage, StageName, exactly
from peftkit.planning.setting import Setting
from peftkit.planning.tokens import accumulates, labelled_tokens, micro_batch_tokens
from peftkit.planning.weights import (
    beside,
    gradients,
    held_bits,
    kept_beside,
    largest_tensor,
    optimizer,
    trained_parameters,
    trained_size,
    trunk,
    update_scratch,
    weights,
)

__all__ = ["MemoryPlan", "Part", "Range", "Stage", "StageName", "exactly", "plan_memory"]

MIB = 1 << 20
MEASURED_AT_ONCE = 8
"""`training.course.MEASURED_AT_ONCE`: rows that are measured at once in mid-run; planning may not import it."""
CONTEXT = Range(133 * MIB, 140 * MIB, 500 * MIB)
"""CUDA's own: 133 to 147 MiB on a T4 (fitcheck), more where more kernels are loaded."""
PROCESS = Range(440 * MIB, 600 * MIB, 750 * MIB)
"""Python with torch, transformers, peft, trl and bitsandbytes on a CPU: 436 to 527 MiB after the imports, and about 60
to 120 MiB of kernels after the first step (benchmarks/plan_ledger.py --processes)."""
FRAGMENTATION = (0.0, 0.0, 0.2)
"""Share of what comes and goes in a step that CUDA's allocator holds besides: up to 20 % (methods, section 2.10)."""
RETAINED = (0.0, 0.0, 2.0)
"""The same of glibc's, which keeps freed blocks below 32 MB: up to twice the step, read off SmolLM2's processes."""


@dataclass(frozen=True)
class MemoryPlan:
    """Every part of a run's memory, and the peak of each stage; parts are not all alive at once."""

    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]

    @property
    def limit(self) -> Stage:
        """The stage that needs the most memory (by its expected bytes)."""
        return max(self.stages, key=lambda stage: stage.bytes.expected)

    @property
    def peak(self) -> Range:
        """Bytes of the stage that needs the most memory."""
        return self.limit.bytes

    def part(self, name: str) -> Part:
        """The part of that name. Raises KeyError."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def stage(self, name: StageName) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def as_record(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "parts": [asdict(part) for part in self.parts],
            "stages": [asdict(stage) for stage in self.stages],
            "limit": self.limit.name,
            "peak": asdict(self.peak),
        }

    def rows(self) -> list[list[Any]]:
        """Name, low, expected, high (bytes) and formula of every part, then of every stage, for a text table."""
        lines: list[list[Any]] = [
            [part.name, part.bytes.low, part.bytes.expected, part.bytes.high, part.formula] for part in self.parts
        ]
        for stage in self.stages:
            note = "the most" if stage is self.limit else ""
            lines.append([f"peak: {stage.name}", stage.bytes.low, stage.bytes.expected, stage.bytes.high, note])
        return lines


def plan_memory(architecture: Architecture, setting: Setting) -> MemoryPlan:
    """The memory of a run of this setting on this base; bytes of the device, on a CPU of the whole process.

    Raises BaseError when an ending of target_modules fits no layer.
    """
    held = list(weights(architecture, setting))
    step = activations(architecture, setting)
    padded = activations(architecture, setting, masked=setting.micro_batch > 1)
    own = [beside(architecture, setting), gradients(architecture, setting), optimizer(architecture, setting)]
    around = Part("context", *_context(setting))
    mapped = Part(
        "mapped file", _mapped(architecture, setting), "quantized layers' originals, which the system may drop"
    )
    parts = [
        *held,
        *own,
        *_activation_parts(architecture, step, padded, setting),
        Part("allocator", _fragmentation(step, setting), "blocks that are too small to be used again"),
        evaluation_logits(architecture, setting),
        kv_cache(architecture, setting),
        mapped,
        around,
    ]
    asked = asked_base(architecture, setting)
    if asked.bytes.high:
        parts.insert(-1, asked)
    more = list(kept_beside(architecture, setting))
    parts[len(held) + len(own) : len(held) + len(own)] = more
    resting = _total(held) + own[0].bytes + mapped.bytes
    training = _total(more) + _training(architecture, setting, step, padded, own)
    if setting.trunk_cache:
        released = trunk(architecture, setting)
        parts.append(Part("released trunk", exactly(released), "of the weights above, while the top is trained"))
        training += exactly(-released)
    stages = (
        Stage("load", around.bytes + _loading(architecture, setting, _total(held))),
        Stage("train", around.bytes + resting + training),
        Stage("evaluate", around.bytes + resting + asked.bytes + _evaluating(architecture, setting, own)),
        Stage("save", around.bytes + resting + _saving(architecture, setting, own)),
        Stage("merge", around.bytes + _merging(architecture)),
    )
    return MemoryPlan(tuple(parts), stages)


def _total(parts: list[Part]) -> Range:
    total = NOTHING
    for part in parts:
        total += part.bytes
    return total


def _context(setting: Setting) -> tuple[Range, str]:
    if setting.device == "cuda":
        return CONTEXT, "CUDA's context and kernels"
    return PROCESS, "Python and its libraries"


def _activation_parts(
    architecture: Architecture, step: Activations, padded: Activations, setting: Setting
) -> list[Part]:
    tokens = f"{micro_batch_tokens(setting) * setting.row_copies:,} tokens at once"
    scored = f"{labelled_tokens(setting) * setting.row_copies:,} labelled tokens × vocabulary × 12 B"
    if training_passes(architecture, setting).scores_labels:
        scored = (
            f"{labelled_tokens(setting):,} labelled tokens, {chunk_rows(architecture.vocabulary):,} of them at once"
        )
    elif architecture.task:
        scored = f"{tokens} × {architecture.task.outputs:,} scores, and the states that the head reads"
    kept = "every block's input" if setting.gradient_checkpointing else "what every block's backward pass needs"
    if setting.gradient_checkpointing and setting.checkpointed_blocks:
        kept = f"the inputs of {setting.checkpointed_blocks} blocks, and what the others' backward passes need"
    on_device = NOTHING if setting.activation_offloading else Range(step.kept, step.kept, max(step.kept, padded.kept))
    return [
        Part("activations", on_device, f"{kept}, {tokens}"),
        Part("one block's backward pass", exactly(step.hump), "gradients" + _again(setting) + f", {tokens}"),
        Part("logits", exactly(step.logits), scored),
    ]


def _again(setting: Setting) -> str:
    return " and the block computed again" if setting.gradient_checkpointing else ""


def _fragmentation(step: Activations, setting: Setting) -> Range:
    shares = FRAGMENTATION if setting.device == "cuda" else RETAINED
    low, expected, high = (int(share * step.peak) for share in shares)
    return Range(low, expected, high)


def _mapped(architecture: Architecture, setting: Setting) -> Range:
    """On a CPU, tensors that have the file's dtype are used where it is mapped, and that keeps all of it mapped."""
    same = SIZES[setting.dtype] == architecture.stored
    if setting.device == "cuda" or not same or held_bits(architecture, setting) not in (4, 8):
        return NOTHING
    size = architecture.linear_parameters * architecture.stored
    return Range(0, size, size)


def _training(
    architecture: Architecture, setting: Setting, step: Activations, padded: Activations, own: list[Part]
) -> Range:
    """Forward and backward passes, or the update after them."""
    _, grads, states = own
    there = grads.bytes if accumulates(setting) else NOTHING
    waiting = step.kept if setting.activation_offloading else 0
    passes = Range(step.peak - waiting, step.peak - waiting, max(step.peak, padded.peak) - waiting)
    update = grads.bytes + exactly(update_scratch(architecture, setting))
    return (there + passes + _fragmentation(step, setting)).or_more(update) + states.bytes


def _evaluating(architecture: Architecture, setting: Setting, own: list[Part]) -> Range:
    """The NLL of held-out rows, or generated answers; in mid-run the optimizer's states are there too."""
    need = measuring(architecture, setting).or_more(generating(architecture, setting))
    if setting.compared_at_once:
        length = setting.compared_at_once * setting.evaluation_longest
        whole = replace(setting, evaluation_longest=length, evaluation_batch=MEASURED_AT_ONCE)
        rows = setting.compared_at_once * evaluated_rows(architecture, whole)
        need = need.or_more(exactly(reading(architecture, setting, rows)))
    if setting.trunk_cache:  # it is filled before the first step
        tokens = micro_batch_tokens(setting)
        need = need.or_more(exactly(forward_pass(architecture, setting, tokens, setting.longest, 0)))
        need = need.or_more(Range(0, 0, reading(architecture, setting, MEASURED_AT_ONCE)))  # where mid-run measures
    return need + Range(0, 0, own[2].bytes.high)


def _loading(architecture: Architecture, setting: Setting, held: Range) -> Range:
    """Weights, and the tensor that is on its way; a CPU process has the whole file mapped as well."""
    flight = largest_tensor(architecture) * architecture.stored
    if setting.device == "cuda":
        return held + Range(0, flight, 2 * flight)
    file = architecture.parameters * architecture.stored
    if SIZES[setting.dtype] == architecture.stored and held_bits(architecture, setting) > 8:
        return Range(0, 0, held.high + flight)  # the map is the weights, and is read when they are used
    return held + Range(flight, file, file + 2 * flight)


def _saving(architecture: Architecture, setting: Setting, own: list[Part]) -> Range:
    """A copy of what was trained is made in host memory."""
    copy = trained_parameters(architecture, setting) * trained_size(setting)
    states = own[2].bytes
    if setting.device == "cuda":
        return states + Range(0, 0, copy)
    return states + Range(0, copy, 2 * copy)


def _merging(architecture: Architecture) -> Range:
    """Tensor by tensor in float64: the weight, its delta and their sum, beside the tensor in the file's dtype."""
    largest = max(linear.out * linear.into for linear in architecture.linears)
    return exactly(largest * (3 * 8 + 2 * architecture.stored))
