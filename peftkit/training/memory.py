"""Out of memory in mid-run: the same step again in smaller pieces, instead of the end of the run."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from peftkit.backbone.quiet import quiet
from peftkit.errors import OutOfMemory
from peftkit.events import Report, Warned
from peftkit.training.journal import Journal
from peftkit.training.parallel import all_there
from peftkit.training.step import Step, StepResult
from peftkit.tuning.tuned import Tuned


def within_memory(
    step: Step,
    journal: Journal,
    tuned: Tuned,
    report: Report,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StepResult:
    """Run a step; when the device runs out of memory, run it again from its random state in smaller micro-batches.

    What was found to fit holds for the rest of the run: the journal keeps it. The effective batch stays as it is, so
    the loss changes by rounding alone; with dropout, the draw is another one. Every attempt runs in a fresh `around`.
    Raises OutOfMemory when one row at a time with checkpointing is still too much.
    """
    while True:
        ran_out, total = False, 0.0
        try:
            with all_there(), around():  # under FSDP every pass is an exchange
                total = step.gradients(journal.micro_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out and step.team.sharded:
            raise _beyond_repeating(step, journal)
        if not step.team.any(ran_out):  # all processes repeat a step, or none does
            return step.finish(total, journal.micro_batch)
        # Only here are the failed attempt's activations free: the traceback in `error` held their frames.
        release(tuned.backbone.device)
        _concede(step, journal, tuned, report)
        step.rewind()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def checkpoint_activations(tuned: Tuned) -> None:
    """Switch gradient checkpointing on; the backward pass ends at the lowest trained tensor, as without it."""
    base = tuned.inner
    with quiet():  # Trainer calls these names still; transformers 5.23 has begun to rename them
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    leave_inputs_alone(tuned)


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
    tried = min(journal.micro_batch, step.widest)
    longest = max(len(row.input_ids) for row in step.rows)
    rows = f"{tried} rows at once, the longest of" if tried > 1 else "one row of"
    fact = f"out of memory in step {journal.step + 1} with {rows} {longest:,} tokens"
    if tried > 1:
        journal.micro_batch = (tried + 1) // 2
        change = f"with {journal.micro_batch} at once, and so from here on"
    elif not journal.gradient_checkpointing and not getattr(tuned.model, "fills_the_cache", False):
        journal.gradient_checkpointing = True
        checkpoint_activations(tuned)
        change = "with gradient checkpointing, and so from here on"
    else:
        how = ", and with checkpointing" if journal.gradient_checkpointing else ""
        raise OutOfMemory(
            f"out of memory in step {journal.step + 1} with a single row of {longest:,} tokens{how}",
            expected="room for the longest row",
            hint="lower data.max_length, or hold the base in fewer bits (quant.bits=4)",
        )
    kept = f"the effective batch stays {len(step.rows)} rows"
    report(Warned(f"{fact}: the step is repeated {change}; {kept}{_draw(step, tuned)}"))


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
