"""The trainers of transformers and TRL with our step, held to what the configuration says.

TRL 1.16 casts adapters of quantized bases to bfloat16, keeps a patched `forward` on the base, sends telemetry, cuts
rows at 1024 tokens and hides NaN losses unless told otherwise. Each line below that undoes one of these has a test
that fails when upstream changes.
"""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from trl import SFTTrainer

from peftkit.backbone.decide import optimizer
from peftkit.backbone.quiet import quiet
from peftkit.backbone.shard import whole
from peftkit.data.chat import Example
from peftkit.data.rows import to_dataset
from peftkit.errors import TrainingError
from peftkit.events import Decision, Note, Progress, Report, Warned
from peftkit.generation.forward import autocast
from peftkit.process_group import ProcessGroup
from peftkit.training.arguments import sft_arguments
from peftkit.training.groups import Group, as_arguments, parameter_groups
from peftkit.training.journal import Journal
from peftkit.training.memory import leave_inputs_alone, peak_bytes, within_memory
from peftkit.training.objective import objective
from peftkit.training.parallel import Team
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import tokens_of
from peftkit.training.rates import learning_rate, warmup_steps
from peftkit.training.schedule import Schedule
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step, StepResult
from peftkit.training.unfreezing import Unfreezing, check_freezing, spans
from peftkit.training.watchdog import Watchdog
from peftkit.tuning.allocator import allocator
from peftkit.tuning.depth import depths
from peftkit.tuning.tuned import Tuned

Log = Callable[[int, dict[str, float]], None]


class StepTrainer(Trainer):  # type: ignore[misc]
    """One `training_step` is one optimizer step over all its rows; `journal` tells what was done so far."""

    lr_scheduler: Any

    def __init__(
        self,
        tuned: Tuned,
        examples: Sequence[Example],
        plan: Schedule,
        spec: TrainSpec,
        folder: Path,
        report: Report,
        log: Log,
        team: Team | None = None,
        *,
        paths: Paths | None = None,
    ) -> None:
        backbone = tuned.backbone
        self.paths = paths or Paths()
        self.team = team = team or Team(ProcessGroup())
        optim = None
        if spec.optim == "auto":
            optim = optimizer(backbone.device, backbone.quant.bits in (4, 8), sharded=team.sharded)
        decision = optim or Decision("optimizer", spec.optim, "asked for")
        report(decision)
        self.examples, self.plan, self.spec, self.tuned = examples, plan, spec, tuned
        self.report, self.log_step = report, log
        at_once = tokens_of(examples, spec, backbone.device)
        self.journal = Journal(at_once, spec.gradient_checkpointing, spec.checkpointed_blocks, passes=self.paths.names)
        self.watchdog = Watchdog(
            len(plan), learning_rate=learning_rate(tuned, spec), warmup_steps=warmup_steps(spec, len(plan))
        )
        self.result: StepResult | None = None
        """What the step in progress did; the journal has it once the optimizer has used it."""
        self.objective = objective(
            tuned, spec.regularize, self.paths, sharded=team.sharded, trunk_cache=spec.trunk_cache
        )
        self.allocator = allocator(tuned, len(plan))
        self.groups, self.unfreezing = self._by_depth()
        base = tuned.inner
        own_forward = base.__dict__.get("forward")
        # Values, not dtypes: a float32 that went through bfloat16 and back has lost 16 bits.
        values = {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}
        self.maybe_activation_offload_context = nullcontext()  # TRL's own constructor puts another one in its place
        try:
            with quiet():
                super().__init__(
                    model=tuned.model,
                    args=sft_arguments(tuned, plan, spec, folder, decision.choice),
                    train_dataset=self._dataset(),
                    processing_class=backbone.tokenizer.hf,
                    data_collator=list,
                )
        except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, most often
            reason = str(error).strip().splitlines()[0]
            hint = "look at train.report_to" if spec.report_to else None
            raise TrainingError(f"the trainer cannot start: {reason}", hint=hint) from error
        finally:
            _restore(tuned, values, base, own_forward)
            leave_inputs_alone(tuned)
        self.remove_callback(PrinterCallback)
        # Upstream's word for a model whose placement and gradients are somebody else's concern: it is not wrapped.
        self.is_distributed_loading_by_transformers = team.size > 1
        self.step_began = time.perf_counter()

    def _dataset(self) -> Any:
        """What upstream is shown as the data set; the rows come from `get_train_dataloader`."""
        return _Steps(self.plan.steps)

    def _by_depth(self) -> tuple[tuple[Group, ...], Unfreezing]:
        """The optimizer's groups and what trains when; the rates are told where the settings do not."""
        tuned, spec = self.tuned, self.spec
        check_freezing(spec, sharded=self.team.sharded)
        if spec.learning_rate is None:
            reason = f"none was given, and this is {tuned.spec.method}'s default"
            self.report(Decision("learning rate", f"{learning_rate(tuned, spec):g}", reason))
        found = depths(tuned.model)
        groups = parameter_groups(tuned, found, spec)
        if len(rates := sorted({group.rate for group in groups})) > 1:
            self.report(Note(f"{len(rates)} learning rates, from {rates[0]:.3g} to {rates[-1]:.3g}"))
        trained = spans(spec, (found.of[name] for name in tuned.names), rows=len(self.examples), steps=len(self.plan))
        return groups, Unfreezing(tuned, found, trained, self.report)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Upstream would take the mean of gradients in every backward pass; `Step.finish` sums them once."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of the steps that are left, one step an item, in the order of the schedule."""
        return DataLoader(_Steps(self.plan.steps[self.journal.step :]), batch_size=None, shuffle=False)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Upstream's optimizer, over our groups: the `params` that it takes from GaLore's arguments too."""
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = as_arguments(self.groups, self.tuned.trainable)
            self.optimizer_cls_and_kwargs = kind, {**arguments, "params": groups}
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rates of `training/rates.py`, for each group its own."""
        if self.lr_scheduler is None:
            factors = [group.factor(self.spec, num_training_steps) for group in self.groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_learning_rate(self) -> float:
        """The highest rate among the parameters that train at this step."""
        groups = self.optimizer.param_groups
        return max(float(group["lr"]) for group in groups if any(one.requires_grad for one in group["params"]))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one whole optimizer step's forward and backward passes; the loss is a 0-dim float32 tensor."""
        self.step_began = time.perf_counter()
        self.unfreezing.begin(self.journal.step, self.optimizer)
        if self.unfreezing.changes_at(self.journal.step):
            self.watchdog.begin_anew()
        self.paths.begin(model)
        backbone = self.tuned.backbone
        step = Step(
            model,
            [self.examples[index] for index in inputs],
            pad_id=backbone.tokenizer.pad_id,
            device=backbone.device,
            backward=self.accelerator.backward,
            forward=lambda: autocast(backbone.device, backbone.placement.compute_dtype),
            team=self.team,
            objective=self.objective,
            paths=self.paths,
        )
        self.result = within_memory(
            step, self.journal, self.tuned, self.report, around=lambda: self.maybe_activation_offload_context
        )
        if self.allocator is not None:
            self.allocator.penalize()
        return torch.tensor(self.result.loss, device=backbone.device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Upstream calls this once between the gradients' clipping and the optimizer's step."""
        norm = whole(super()._get_grad_norm(model, grad_norm))
        value = float(norm)
        if not math.isfinite(value):
            raise TrainingError(
                f"the gradient of step {self.journal.step + 1} has the norm {value}; the adapter is that of the step "
                "before",
                expected="a finite number",
                hint="lower train.learning_rate",
            )
        self._tell(value)
        return norm

    def _tell(self, grad_norm: float) -> None:
        assert self.result is not None  # training_step came before
        seconds = time.perf_counter() - self.step_began
        done = self.journal.step + 1
        figures = {
            "loss": self.result.loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self._get_learning_rate()),
            "tokens": float(self.result.tokens),
            "answer_tokens": float(self.result.answer_tokens),
            "tokens_per_s": self.result.tokens / max(seconds, 1e-9),
            "micro_batches": float(self.result.micro_batches),
            "peak_gb": self.team.most(peak_bytes(self.tuned.backbone.device)) / 1e9,
        }
        figures = self.team.first(figures)  # what is decided from them is decided alike
        self.log_step(done, figures)
        self.report(Progress(done, figures))
        self.watch(done, figures)

    def watch(self, step: int, figures: dict[str, float]) -> None:
        """Show figures to the watchdog; raises TrainingError when it says that the run must stop."""
        for alarm in self.watchdog.observe(step, figures):
            if alarm.action == "stop":
                raise TrainingError(f"step {step}: {alarm.fact}", expected=alarm.expected, hint=alarm.hint)
            self.report(Warned(f"step {step}: {alarm.fact}; expected {alarm.expected}", alarm.hint))


class AnswerTrainer(StepTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, for bases with a language head; one with a task's head has transformers' own."""

    def _dataset(self) -> Any:
        return to_dataset(self.examples)

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine; TRL would send model, device and data source to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the registry's manifest says what the adapter is."""


def trainer_for(tuned: Tuned) -> type[StepTrainer]:
    """Which trainer a backbone is trained by."""
    return AnswerTrainer if tuned.backbone.head is None else StepTrainer


class _Steps(torch.utils.data.Dataset[tuple[int, ...]]):  # type: ignore[misc]
    """The rows of every step, as the loader asks for them."""

    def __init__(self, steps: Sequence[tuple[int, ...]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return self.steps[index]


def _restore(tuned: Tuned, values: dict[str, torch.Tensor], base: Any, own_forward: Any) -> None:
    """Undo what SFTTrainer's constructor did to the model: trainable tensors, and the base's forward."""
    for name, parameter in tuned.trainable.items():
        parameter.data = values[name]
    if own_forward is None:
        base.__dict__.pop("forward", None)
    else:
        base.forward = own_forward
