"""What happens between the steps of a run: go on from a checkpoint, measure, write checkpoints, stop early."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from peftkit.backbone.shard import part_like
from peftkit.data.chat import Example
from peftkit.errors import PeftkitError, RunError, TrainingError
from peftkit.events import Measured, Note, Warned
from peftkit.generation.forward import autocast
from peftkit.training import random_state
from peftkit.training.checkpoint import Checkpoint, Checkpoints
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.journal import Journal
from peftkit.training.memory import checkpoint_activations, release
from peftkit.training.parallel import gathered, spread
from peftkit.training.stop import StopRequest
from peftkit.training.trainer import StepTrainer

_PER_RUN = 10
"""Checkpoints in a run that does not say how often."""
MEASURED_AT_ONCE = 8
"""Held-out rows that go through the model at once."""


class Course(TrainerCallback):  # type: ignore[misc]
    """The course of one run, as a callback of its trainer."""

    def __init__(
        self,
        trainer: StepTrainer,
        *,
        held_out: Sequence[Example],
        checkpoints: Checkpoints | None,
        bound_to: Mapping[str, Any],
        stop: StopRequest,
    ) -> None:
        self.trainer = trainer
        self.held_out = held_out
        self.checkpoints = checkpoints
        self.bound_to = bound_to
        self.stop = stop
        self.ended_early = False
        self.stopped = False
        """Whether a signal to any of the processes ended the run before its last step."""
        self._start: Checkpoint | None = None
        self._best: dict[str, torch.Tensor] | None = None
        """The adapter that was measured best in this process, on the CPU."""
        self._random: dict[str, Any] | None = None
        self._team = trainer.team
        total = len(trainer.plan)
        self._save_every = trainer.spec.save_steps or max(1, -(-total // _PER_RUN))

    @property
    def journal(self) -> Journal:
        """What was done so far."""
        return self.trainer.journal

    def go_on_from(self, start: Checkpoint) -> None:
        """Take adapter and figures from a checkpoint; optimizer and schedule follow when the trainer has made them."""
        self._check_passes(Journal(**start.state["journal"]).passes)
        self.trainer.journal = Journal(**start.state["journal"])
        self.trainer.watchdog.restore(self.journal.watchdog)
        self._set_adapter(start.state["adapter"])
        if self.trainer.allocator is not None:
            self.trainer.allocator.restore(start.state["allocator"])
        if self.checkpoints is not None:
            self.checkpoints.forget_after(start.step)
        if self.journal.gradient_checkpointing and self.journal.concedes(self.trainer.spec):
            checkpoint_activations(self.trainer.tuned, self.journal.checkpointed_blocks)
        self._start = start

    def _check_passes(self, before: list[str]) -> None:
        now = self.trainer.paths.names
        if before != now:
            raise TrainingError(
                f"the run's passes took these shortcuts: {', '.join(before) or 'none'}; now they would take: "
                f"{', '.join(now) or 'none'}",
                expected="the same ones, or the resumed run would round differently",
                hint="go on with the versions and the hardware that the run began with",
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set optimizer, schedule and position to those of the checkpoint."""
        state.global_step = self.journal.step
        if self._start is None:
            if self._team.rank:  # or all processes would drop the same activations
                set_seed(self.trainer.spec.seed + self._team.rank)
                self._random = random_state.capture(self.trainer.tuned.backbone.device)
            return
        inner = self.trainer.optimizer.optimizer
        inner.load_state_dict(spread(self._start.state["optimizer"], inner))
        self.trainer.lr_scheduler.load_state_dict(self._start.state["scheduler"])
        self._random = self._start.state["random"][self._team.rank]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw from where the checkpoint drew; the loader's own draw at its start came after `on_train_begin`."""
        if self._random is not None:
            random_state.restore(self._random, self.trainer.tuned.backbone.device)
            self._random = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has used the step's gradients, and they are still there: AdaLoRA scores its ranks by them."""
        if self.trainer.allocator is not None:
            self.trainer.allocator.allocate(self.journal.step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has used the step's gradients: count it, measure, keep, and stop where that is due."""
        assert self.trainer.result is not None  # a step was done
        self.journal.add(self.trainer.result, time.perf_counter() - self.trainer.step_began)
        spec, step, total = self.trainer.spec, self.journal.step, len(self.trainer.plan)
        better = bool(spec.eval_steps and step % spec.eval_steps == 0 and self._measure())
        patience = spec.early_stopping_patience
        if patience and self.journal.worse >= patience and step < total:
            self.ended_early = True
        self.stopped = self._team.any(self.stop.asked)
        ends = self.stopped or self.ended_early or step == total
        if ends or better or step % self._save_every == 0:
            self._keep()
        if ends:
            control.should_training_stop = True

    def take_best(self) -> None:
        """Go back to the adapter that was measured best, if that is not the last one."""
        best, journal = self.journal.best_step, self.journal
        if best is None or best == journal.step:
            return
        kept = self._best or self._team.first(self._best_checkpoint(best))
        if kept is None:
            return
        self._set_adapter(kept)
        self.trainer.report(
            Note(f"the adapter is that of step {best}, where the held-out NLL was {journal.best_nll:.4f}")
        )

    def _best_checkpoint(self, step: int) -> dict[str, torch.Tensor] | None:
        """The adapter of the best step before this process began; None, and a warning, where it is not whole."""
        if self.checkpoints is None:
            return None
        try:
            adapter: dict[str, torch.Tensor] = self.checkpoints.load(step).state["adapter"]
            return adapter
        except RunError as error:
            text = f"the best adapter, of step {step}, is gone, so the last one is taken: {error.fact}"
            self.trainer.report(Warned(text))
            return None

    def _measure(self) -> bool:
        """Measure the held-out rows; whether the adapter is the best so far."""
        trainer, backbone = self.trainer, self.trainer.tuned.backbone
        nll = self._team.first(self._held_out_nll())  # one device's rounding must decide for all
        trainer.log_step(self.journal.step, {"held_out_nll": nll})
        trainer.report(Measured(self.journal.step, "held_out_nll", nll))
        better = self.journal.measured(nll, counts=self.journal.step > trainer.unfreezing.last_thaw)
        if trainer.spec.early_stopping_patience is None:
            trainer.watch(self.journal.step, {"held_out_nll": nll})
        if better:  # in memory too: its checkpoint may find no room on the disk
            self._best = {n: t.to("cpu", copy=True) for n, t in gathered(trainer.tuned.trainable).items()}
        against = (
            "the best so far" if better else f"best {self.journal.best_nll:.4f} after step {self.journal.best_step}"
        )
        trainer.report(Note(f"step {self.journal.step}: held-out NLL {nll:.4f}, {against}"))
        release(backbone.device)
        return better

    def _held_out_nll(self) -> float:
        """Mean NLL in nats of the held-out answer tokens; fewer rows at once where the memory asks for it."""
        trainer, backbone, size = self.trainer, self.trainer.tuned.backbone, MEASURED_AT_ONCE
        trainer.tuned.model.eval()
        while True:
            try:
                with autocast(backbone.device, backbone.placement.compute_dtype):
                    sums = trainer.paths.measure(
                        trainer.tuned.model,
                        self.held_out,
                        pad_id=backbone.tokenizer.pad_id,
                        device=backbone.device,
                        batch_size=size,
                    )
                return sum(sums) / trainer.paths.counted(self.held_out)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error) or self._team.sharded:
                    raise
            release(backbone.device)
            size //= 2

    def _keep(self) -> None:
        """Write a checkpoint; a full disk costs this checkpoint, never the run."""
        state = self._state()  # all processes have a part in it, and the first one writes
        if self.checkpoints is None:
            return
        try:
            self.checkpoints.write(self.journal.step, state)
        except (OSError, MemoryError, PeftkitError) as error:
            kept = self.checkpoints.steps()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            text = f"no checkpoint of step {self.journal.step} could be written: {reason}; "
            text += f"the last one is of step {kept[-1]}" if kept else "there is none"
            self.trainer.report(Warned(text, f"free some space on the disk of {self.checkpoints.folder}"))
            return
        try:
            self.checkpoints.retain(self.trainer.spec.save_total_limit, self.journal.best_step)
        except OSError as error:
            self.trainer.report(Warned(f"old checkpoints could not be removed: {error.strerror or error}"))

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        self.journal.watchdog = trainer.watchdog.state()
        return {
            "bound_to": self.bound_to,
            "journal": self.journal.as_state(),
            "adapter": gathered(trainer.tuned.trainable),
            "optimizer": gathered(trainer.optimizer.state_dict()),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "allocator": trainer.allocator.state() if trainer.allocator is not None else None,
            "random": self._team.gather(random_state.capture(trainer.tuned.backbone.device)),
        }

    def _set_adapter(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trainer.tuned.trainable.items():
                parameter.copy_(part_like(values[name], parameter))
