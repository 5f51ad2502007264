"""Out of memory in mid-run: the same step again in smaller pieces, instead of the end of the run."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from peftkit.backbone.quiet import quiet
from peftkit.errors import OutOfMemory, TrainingError
from peftkit.events import Report, Warned
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.journal import Journal
from peftkit.training.parallel import all_there
from peftkit.training.step import Step, StepResult
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.tuned import Tuned


def within_memory(
    step: Step,
    journal: Journal,
    tuned: Tuned,
    report: Report,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepResult:
    """Run a step; when the device runs out of memory, run it again from its random state with fewer tokens at once.

    What was found to fit holds for the rest of the run: the journal keeps it. The effective batch stays as it is, so
    the loss changes by rounding alone; with dropout, the draw is another one. Every attempt runs in a fresh `around`.
    Raises OutOfMemory when one row at a time with checkpointing is still too much.
    """
    while True:
        ran_out, total = False, 0.0
        try:
            with all_there(), around():  # under FSDP every pass is an exchange
                total = step.gradients(journal.tokens_at_once)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out and step.team.sharded:
            raise _beyond_repeating(step, journal)
        if not step.team.any(ran_out):  # all processes repeat a step, or none does
            return step.finish(total, journal.tokens_at_once)
        # Only here are the failed attempt's activations free: the traceback in `error` held their frames.
        release(tuned.backbone.device)
        _concede(step, journal, tuned, report)
        step.rewind()


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def checkpoint_activations(tuned: Tuned, blocks: int | None = None) -> None:
    """Switch gradient checkpointing on; the backward pass ends at the lowest trained tensor, as without it.

    With `blocks`, only so many are recomputed: the lowest of those that keep anything. What they recompute is alive
    when the activations of the blocks above are gone, so they relieve the peak most. Raises TrainingError where the
    model checkpoints as a whole.
    """
    base = tuned.inner
    with quiet():  # Trainer calls these names still; transformers 5.23 has begun to rename them
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    leave_inputs_alone(tuned)
    if blocks is not None:
        _limit(base, blocks)


def _limit(base: Any, count: int) -> None:
    _, blocks = find_blocks(base)
    whole = [block for block in blocks if not isinstance(block, GradientCheckpointingLayer)]
    if whole or not blocks:
        raise TrainingError(
            f"train.checkpointed_blocks={count}: {type(base).__name__} cannot checkpoint its blocks one by one",
            expected="a model of transformers whose blocks are GradientCheckpointingLayers",
            hint="remove train.checkpointed_blocks",
        )
    keeps = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    lowest = keeps.index(True) if any(keeps) else 0
    for at, block in enumerate(blocks):
        block.gradient_checkpointing = at < lowest + count


def leave_inputs_alone(tuned: Tuned) -> None:
    """Let the embeddings' output require a gradient only where something below it trains.

    Upstream makes it require one whenever checkpointing is switched on, which the reentrant kind needs. Ours is not,
    and the backward pass would go through every frozen block down to the embeddings for nothing.
    """
    tuned.inner.disable_input_require_grads()


def keep_activations(tuned: Tuned) -> None:
    """Switch gradient checkpointing off again, if it is on."""
    base = tuned.inner
    if base.is_activation_checkpointing:
        with quiet():
            base.gradient_checkpointing_disable()
        leave_inputs_alone(tuned)


def _beyond_repeating(step: Step, journal: Journal) -> OutOfMemory:
    return OutOfMemory(
        f"process {step.team.rank} of {step.team.size} ran out of memory in step {journal.step + 1}; under FSDP the "
        "others wait for its part of the weights by then, so the step cannot be repeated in smaller pieces",
        expected="room for the step",
        hint="lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps, set "
        "train.gradient_checkpointing=true",
    )


def _concede(step: Step, journal: Journal, tuned: Tuned, report: Report) -> None:
    tried, tokens, longest = _largest(step, journal.tokens_at_once)
    rows = f"{tried} rows at once, the longest of" if tried > 1 else "one row of"
    fact = f"out of memory in step {journal.step + 1} with {rows} {longest:,} tokens"
    if tried > 1:
        journal.tokens_at_once = tokens // 2
        change = f"with {journal.tokens_at_once:,} tokens at once, and so from here on"
    elif _keeps_activations(journal) and not getattr(tuned.model, "fills_the_cache", False):
        all_blocks = " of all blocks" if journal.gradient_checkpointing else ""
        journal.gradient_checkpointing, journal.checkpointed_blocks = True, None
        checkpoint_activations(tuned)
        change = f"with gradient checkpointing{all_blocks}, and so from here on"
    else:
        how = ", and with checkpointing" if journal.gradient_checkpointing else ""
        raise OutOfMemory(
            f"out of memory in step {journal.step + 1} with a single row of {longest:,} tokens{how}",
            expected="room for the longest row",
            hint="lower data.max_length, or hold the base in fewer bits (quant.bits=4)",
        )
    kept = f"the effective batch stays {len(step.rows)} rows"
    report(Warned(f"{fact}: the step is repeated {change}; {kept}{_draw(step, tuned)}"))


def _keeps_activations(journal: Journal) -> bool:
    return not journal.gradient_checkpointing or journal.checkpointed_blocks is not None


def _largest(step: Step, tokens_at_once: int) -> tuple[int, int, int]:
    """Rows and tokens of the largest micro-batch, and its longest row; of equally large ones that of the longest row.

    Of any process, not only this one: all of them concede alike.
    """
    found = []
    for rank in range(step.team.size):
        for lengths, flat in step.lengths(tokens_at_once, rank):
            tokens = sum(lengths) if flat else len(lengths) * max(lengths)
            found.append((tokens, max(lengths), len(lengths)))
    tokens, longest, rows = max(found)
    return rows, tokens, longest


def _draw(step: Step, tuned: Tuned) -> str:
    if step.objective.draws:
        return ". Its random draws are not those of an undisturbed run"
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in tuned.model.modules())
    return ". Its dropout draw is not the one of an undisturbed run" if drops else ""


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def reset_peak(device: torch.device) -> None:
    """Count the device's peak from here; a process has only one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
