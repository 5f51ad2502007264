"""The longest rows of a run, once, before its first step: what they really take, and how long the run will be."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from peftkit.data.chat import Example
from peftkit.data.encoded import longest
from peftkit.generation.forward import autocast
from peftkit.generation.generate import generate
from peftkit.training import random_state
from peftkit.training.memory import checkpoint_activations, keep_activations, release
from peftkit.training.objective import objective
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import lengths, tokens_of
from peftkit.training.passes.trying import paths_for
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

_ANSWER_TOKENS = 8
_SAMPLES_PER_SECOND = 200


@dataclass(frozen=True)
class Piece:
    """One thing that was tried."""

    seconds: float
    tokens: int
    peak_bytes: int
    """Of the device's allocator, or of the whole process on a CPU."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Probe:
    """What the longest rows took: a forward and backward pass, a likelihood, answers."""

    step: Piece
    """Forward and backward pass, and an update by AdamW whose states are thrown away."""
    likelihood: Piece | None
    answers: Piece | None
    """The first tokens of one batch of answers to the longest prompts."""

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def probe(
    tuned: Tuned,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    spec: TrainSpec,
    *,
    evaluation_batch: int,
    answers: bool,
    paths: Paths | None = None,
) -> Probe:
    """Try one micro-batch of the longest training rows, and one batch of the longest held-out rows.

    Checkpointing and offloading are as the run will have them. Adapter, gradients and random states are afterwards
    what they were. Lets the error through when memory does not suffice.
    """
    backbone = tuned.backbone
    device, tokenizer = backbone.device, backbone.tokenizer
    before = random_state.capture(device)
    try:
        paths, at_once = paths or paths_for(tuned, spec), tokens_of(examples, spec, device)
        fullest = _fullest(longest(examples, spec.rows_per_step), paths, at_once)
        with _as_in_training(tuned, spec) as around:
            tokens = sum(len(row.input_ids) for row in fullest)
            step = _measured(device, lambda: _step(tuned, spec, fullest, around, paths, at_once), tokens)
        rows = longest(held_out, evaluation_batch)
        likelihood = answered = None
        tuned.model.eval()
        if rows:
            options: dict[str, Any] = {"pad_id": tokenizer.pad_id, "device": device, "batch_size": evaluation_batch}
            tokens = sum(len(row.input_ids) for row in rows)
            with autocast(device, backbone.placement.compute_dtype):
                likelihood = _measured(device, lambda: paths.measure(tuned.model, rows, **options), tokens)
                prompts = [ids for row in rows if (ids := row.prompt_ids)] if answers else []
                if prompts:
                    answered = _measured(device, lambda: _answer(tuned, prompts), len(prompts) * _ANSWER_TOKENS)
        return Probe(step, likelihood, answered)
    finally:
        tuned.model.zero_grad(set_to_none=True)
        random_state.restore(before, device)
        tuned.model.eval()
        release(device)


def _fullest(rows: Sequence[Example], paths: Paths, tokens_at_once: int) -> list[Example]:
    """Of the micro-batches that these rows make, the one with most tokens."""
    batches = [[rows[index] for index in batch] for batch, _ in paths.micro_batches(lengths(rows), tokens_at_once)]
    return max(batches, key=lambda batch: sum(lengths(batch)))


@contextlib.contextmanager
def _as_in_training(tuned: Tuned, spec: TrainSpec) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """The model as training has it; the value is what a forward and backward pass runs in."""
    if spec.gradient_checkpointing:
        checkpoint_activations(tuned, spec.checkpointed_blocks)
    try:
        yield get_act_offloading_ctx_manager(tuned.model) if spec.activation_offloading else contextlib.nullcontext()
    finally:
        keep_activations(tuned)


def _step(
    tuned: Tuned,
    spec: TrainSpec,
    rows: Sequence[Example],
    around: contextlib.AbstractContextManager[Any],
    paths: Paths,
    tokens_at_once: int,
) -> None:
    backbone = tuned.backbone
    paths.begin(tuned.model)
    step = Step(
        tuned.model,
        rows,
        pad_id=backbone.tokenizer.pad_id,
        device=backbone.device,
        forward=lambda: autocast(backbone.device, backbone.placement.compute_dtype),
        objective=objective(tuned, spec.regularize, paths, trunk_cache=spec.trunk_cache),
        paths=paths,
    )
    with around:
        step.run(tokens_at_once)
    trained = list(tuned.trainable.values())
    values = [parameter.detach().to("cpu", copy=True) for parameter in trained]
    torch.optim.AdamW(trained, lr=1e-9).step()
    with torch.no_grad():
        for parameter, value in zip(trained, values, strict=True):
            parameter.copy_(value)


def _answer(tuned: Tuned, prompts: list[list[int]]) -> None:
    backbone = tuned.backbone
    options: dict[str, Any] = {"max_new_tokens": _ANSWER_TOKENS, "batch_size": len(prompts)}
    generate(tuned.model, prompts, backbone.tokenizer, device=backbone.device, **options)


def _measured(device: torch.device, action: Callable[[], Any], tokens: int) -> Piece:
    with _peak(device) as peak:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return Piece(seconds, tokens, peak())


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """The most memory that is used inside: of the allocator on CUDA, of the process elsewhere, sampled."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(1 / _SAMPLES_PER_SECOND):
            seen.append(max(seen.pop(), process.memory_info().rss))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        thread.join()
