"""Supervised fine-tuning: train an adapter on encoded rows, from the start or from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbone.quiet import quiet
from peftkit.backbone.shard import shard, whole
from peftkit.data.chat import Example
from peftkit.errors import OutOfMemory, TrainingError
from peftkit.events import Note, Phase, Report, Warned, silent
from peftkit.locations import cache_root
from peftkit.training.bound import rows_digest
from peftkit.training.checkpoint import Checkpoint, Checkpoints
from peftkit.training.course import MEASURED_AT_ONCE, Course
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.journal import Journal
from peftkit.training.memory import checkpoint_activations, keep_activations, peak_bytes, reset_peak
from peftkit.training.parallel import Team, digest, team
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import tokens_of
from peftkit.training.passes.trying import paths_for, side_by_side
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.rates import learning_rate
from peftkit.training.schedule import Schedule, schedule
from peftkit.training.spec import TrainSpec
from peftkit.training.stop import StopRequest
from peftkit.training.suited import check_suited
from peftkit.training.trainer import Log, StepTrainer, trainer_for
from peftkit.training.trunk.cached import cached_trunk, check_cached
from peftkit.training.trunk.passes import measuring_passes, training_passes
from peftkit.training.unfreezing import thaw
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True)
class Trained:
    """What a training run did, the processes it was interrupted in included."""

    steps: int
    tokens: int
    answer_tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    peak_bytes: int
    """Of the process or device that used most, since it began."""
    best_step: int | None
    """The step with the best held-out likelihood, where that was measured."""
    learning_rate: float
    """The peak rate that train.learning_rate gave, or where it is null the method."""

    @property
    def tokens_per_second(self) -> float:
        """Training tokens (prompts and answers) per second."""
        return self.tokens / self.seconds if self.seconds else math.nan


class Stopped(Exception):
    """A signal ended training after a whole step; `kept` is the step of the newest checkpoint."""

    def __init__(self, step: int, total: int, kept: int | None) -> None:
        super().__init__(f"stopped after step {step} of {total}")
        self.step, self.total, self.kept = step, total, kept


def train(
    tuned: Tuned,
    examples: Sequence[Example],
    spec: TrainSpec,
    folder: Path,
    *,
    held_out: Sequence[Example] = (),
    checkpoints: Checkpoints | None = None,
    start: Checkpoint | None = None,
    bound_to: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    paths: Paths | None = None,
    report: Report = silent,
    log: Log = lambda step, figures: None,
) -> Trained:
    """Train the adapter on `examples`, from the beginning or from the checkpoint `start`.

    `log` receives the figures of every step; `bound_to` is kept in every checkpoint; `cache` is the folder for
    train.trunk_cache, by default the user's; `paths` are the shortcuts of the passes, by default those that are found
    to change nothing. Raises TrainingError for a loss that is not finite or float16 compute,
    OutOfMemory when not even one row fits, Stopped after SIGINT or SIGTERM.
    """
    _check(tuned, spec, held_out)
    check_suited(tuned, spec)
    plan = schedule(examples, spec)
    _warn_of_no_measurement(spec, len(plan), report)
    together = team()
    _check_team(together, spec, headed=tuned.backbone.head is not None)
    facts = {"settings": spec.model_dump(), "rows": rows_digest(examples), "base": tuned.backbone.identity.fingerprint}
    together.agree({**facts, "adapter at the start": digest(tuned.trainable)})
    paths = _shortcuts(tuned, spec, paths, together, report)
    with (
        _model_as_it_was(tuned),
        _trained_part(tuned, examples, plan, held_out, spec, together, cache, report, paths) as part,
    ):
        trainer = trainer_for(part)(part, examples, plan, spec, folder, report, log, together, paths=paths.of(part))
        if spec.gradient_checkpointing:
            checkpoint_activations(part, spec.checkpointed_blocks)
        if together.sharded:
            shard(tuned.model, tuned.backbone.device, together.size, reshard=together.group.reshard)
        with StopRequest(report) as stop:
            course = Course(trainer, held_out=held_out, checkpoints=checkpoints, bound_to=bound_to or {}, stop=stop)
            trainer.add_callback(course)
            if start is not None:
                course.go_on_from(start)
            report(Phase("train", len(plan)))
            reset_peak(tuned.backbone.device)
            _check_position(trainer.journal.step, len(plan))
            if trainer.journal.step < len(plan):
                _run(trainer)
        journal = trainer.journal
        if course.stopped:
            raise Stopped(journal.step, len(plan), max(checkpoints.steps(), default=None) if checkpoints else None)
        if course.ended_early:
            _tell_early_end(journal, len(plan), report)
        if spec.early_stopping_patience:
            course.take_best()
    _check_finite(tuned)
    together.agree({"trained adapter": digest(tuned.trainable)})
    return _trained(journal, learning_rate(tuned, spec), int(together.most(peak_bytes(tuned.backbone.device))))


def _tell_early_end(journal: Journal, steps: int, report: Report) -> None:
    why = f"{journal.worse} measurements in a row were no better"
    report(Note(f"stopped after step {journal.step} of {steps}: {why}"))


def _trained(journal: Journal, rate: float, peak: int) -> Trained:
    """What the journal says that was done."""
    assert journal.first_loss is not None  # a schedule has at least one step
    assert journal.last_loss is not None
    return Trained(
        steps=journal.step,
        tokens=journal.tokens,
        answer_tokens=journal.answer_tokens,
        seconds=journal.seconds,
        first_loss=journal.first_loss,
        last_loss=journal.last_loss,
        peak_bytes=peak,
        best_step=journal.best_step,
        learning_rate=rate,
    )


@contextmanager
def _trained_part(
    tuned: Tuned,
    examples: Sequence[Example],
    plan: Schedule,
    held_out: Sequence[Example],
    spec: TrainSpec,
    together: Team,
    cache: Path | None,
    report: Report,
    paths: Paths,
) -> Iterator[Tuned]:
    """All of the model, or with train.trunk_cache what is above the cached trunk."""
    if not spec.trunk_cache:
        yield tuned
        return
    check_cached(spec, together, sum(map(len, plan.steps)) / len(examples), report)
    passes = training_passes(examples, plan, tokens_of(examples, spec, tuned.backbone.device))
    if spec.eval_steps:
        passes += measuring_passes(held_out, tuned.model, MEASURED_AT_ONCE, paths)
    with cached_trunk(tuned, passes, cache or cache_root().path, spec.regularize.dropout, report, paths) as part:
        yield part


def _warn_of_no_measurement(spec: TrainSpec, steps: int, report: Report) -> None:
    if spec.eval_steps and spec.eval_steps > steps:
        fact = f"train.eval_steps={spec.eval_steps} is more than the run's {steps} steps: nothing is measured in it"
        report(Warned(fact, "lower train.eval_steps"))


def _run(trainer: StepTrainer) -> None:
    """Train; out of memory where no repetition helps (an update, its clipping) is an error that says so."""
    try:
        with quiet():
            trainer.train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory in step {trainer.journal.step + 1}, outside of the forward and backward passes",
            expected="room for the optimizer's update",
            hint="start again with train.optim=paged_adamw_8bit (CUDA), a smaller adapter.r, or --budget",
        ) from error


@contextmanager
def _model_as_it_was(tuned: Tuned) -> Iterator[None]:
    """Undo what Trainer does to a model: it writes use_cache and special tokens, and switches checkpointing on."""
    base = tuned.inner
    held = (base.config, base.config.get_text_config(), getattr(base, "generation_config", None))
    configs = [(config, dict(vars(config))) for config in held if config is not None]
    try:
        yield
    finally:
        for config, before in configs:
            vars(config).clear()
            vars(config).update(before)
        keep_activations(tuned)
        thaw(tuned)
        tuned.model.eval()


def _shortcuts(tuned: Tuned, spec: TrainSpec, paths: Paths | None, team: Team, report: Report) -> Paths:
    """Those that were given, or those that are found to change nothing."""
    if paths is None:
        return paths_for(tuned, spec, sharded=team.sharded, report=report)
    if paths.flat and side_by_side(spec):
        raise TrainingError(
            "a cached trunk, noise on embeddings and R-Drop need rows side by side, and paths.flat is set",
            expected="Paths(flat=False)",
        )
    return paths


def _check(tuned: Tuned, spec: TrainSpec, held_out: Sequence[Example]) -> None:
    if tuned.backbone.placement.compute_dtype == torch.float16:
        raise TrainingError(
            "quant.compute_dtype=float16 is for inference: gradients overflow in it",
            expected="bfloat16 or float32",
            hint="remove quant.compute_dtype",
        )
    if tuned.backbone.device.type != "cuda" and spec.optim in ("adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit"):
        raise TrainingError(
            f"train.optim={spec.optim} needs CUDA, and the backbone is on the {tuned.backbone.device.type}",
            expected="auto, adamw_torch or sgd",
            hint="remove train.optim",
        )
    if tuned.backbone.device.type != "cuda" and spec.activation_offloading:
        raise TrainingError(
            f"train.activation_offloading needs CUDA, and the backbone is on the {tuned.backbone.device.type}",
            expected="a GPU, whose memory the host's can relieve",
            hint="remove train.activation_offloading",
        )
    if spec.eval_steps and not held_out:
        raise TrainingError("train.eval_steps is set, and there are no held-out rows", expected="rows to measure on")


def _check_team(team: Team, spec: TrainSpec, *, headed: bool = False) -> None:
    if spec.rows_per_step < team.size:
        raise TrainingError(
            f"a step has {spec.rows_per_step} rows, and there are {team.size} processes to share them",
            expected="at least one row for each",
            hint="raise train.gradient_accumulation_steps, or start fewer processes",
        )
    if team.sharded and (headed or isinstance(spec, PreferenceTrainSpec)):
        what = "a task's head" if headed else "preferences"
        raise TrainingError(
            f"{what} under FSDP: it was never run so",
            expected="one process, or DDP",
            hint="start it again with accelerate launch --multi_gpu; quant.bits=4 holds a larger base",
        )
    if team.sharded and spec.optim in ("paged_adamw_8bit", "adamw_8bit"):
        raise TrainingError(
            f"train.optim={spec.optim} keeps its states in blocks that FSDP cannot spread over processes",
            expected="auto, adamw_torch, adamw_torch_fused or sgd",
            hint="remove train.optim",
        )
    if team.sharded and spec.activation_offloading:
        raise TrainingError(
            "train.activation_offloading does not go with FSDP",
            expected="train.gradient_checkpointing=true to save memory",
            hint="remove train.activation_offloading",
        )


def _check_position(done: int, total: int) -> None:
    if done > total:
        raise TrainingError(
            f"the run has done {done} steps, and with these settings it has {total}",
            expected=f"at least {done} steps",
            hint="raise train.num_train_epochs, train.max_steps or train.max_tokens",
        )


def _check_finite(tuned: Tuned) -> None:
    """The last loss was taken before the last update, and attention on a CPU turns NaN into 0 without a word."""
    values = {name: whole(parameter.detach()) for name, parameter in tuned.trainable.items()}
    spoilt = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if spoilt:
        raise TrainingError(
            f"{len(spoilt)} of {len(tuned.trainable)} trained tensors hold NaN or infinite numbers, first {spoilt[0]}",
            expected="finite numbers",
            hint="lower train.learning_rate",
        )
