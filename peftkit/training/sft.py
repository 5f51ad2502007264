"""Supervised fine-tuning through TRL's SFTTrainer, held to what the configuration says.

TRL 1.16 casts adapters of quantized bases to bfloat16, keeps a patched `forward` on the base, sends telemetry, cuts
rows at 1024 tokens and hides NaN losses unless told otherwise. Each line below that undoes one of these has a test
that fails when upstream changes.
"""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from peftkit.backbone.decide import optimizer
from peftkit.backbone.quiet import quiet
from peftkit.data.chat import Example
from peftkit.data.rows import to_dataset
from peftkit.errors import OutOfMemory, TrainingError
from peftkit.events import Decision, Phase, Progress, Report, silent
from peftkit.generation.forward import autocast
from peftkit.training.schedule import Schedule, schedule
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step, StepResult
from peftkit.tuning.inject import Tuned


@dataclass(frozen=True)
class Trained:
    """What a training run did."""

    steps: int
    tokens: int
    answer_tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Training tokens (prompts and answers) per second."""
        return self.tokens / self.seconds if self.seconds else math.nan


def train(
    tuned: Tuned,
    examples: Sequence[Example],
    spec: TrainSpec,
    folder: Path,
    *,
    report: Report = silent,
    log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Trained:
    """Train the adapter on `examples`; `log` receives the figures of every step.

    Raises TrainingError for a loss that is not finite, or float16 compute.
    """
    _check(tuned, spec)
    plan = schedule(examples, spec)
    base = tuned.model.get_base_model()
    configs = [(c, dict(vars(c))) for c in (base.config, base.config.get_text_config(), base.generation_config)]
    try:
        trainer = StepTrainer(tuned, examples, plan, spec, folder, report, log)
        report(Phase("train", len(plan)))
        _reset_peak(tuned.backbone.device)
        started = time.perf_counter()
        try:
            with quiet():
                trainer.train()
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(trainer, spec) from error
        seconds = time.perf_counter() - started
    finally:  # Trainer writes use_cache and the tokenizer's special tokens into them
        for config, before in configs:
            vars(config).clear()
            vars(config).update(before)
        if spec.gradient_checkpointing:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
        tuned.model.eval()
    _check_finite(tuned)
    results = trainer.results
    return Trained(
        steps=len(results),
        tokens=sum(result.tokens for result in results),
        answer_tokens=sum(result.answer_tokens for result in results),
        seconds=seconds,
        first_loss=results[0].loss,
        last_loss=results[-1].loss,
        peak_bytes=peak_bytes(tuned.backbone.device),
    )


def _out_of_memory(trainer: StepTrainer, spec: TrainSpec) -> OutOfMemory:
    done = len(trainer.results)
    rows = trainer.plan.steps[min(done, len(trainer.plan) - 1)]
    longest = max(len(trainer.examples[row].input_ids) for row in rows)
    mends = ["lower data.max_length"]
    if not spec.gradient_checkpointing:
        mends.insert(0, "set train.gradient_checkpointing=true")
    if spec.per_device_train_batch_size > 1:
        mends.insert(0, "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps")
    return OutOfMemory(
        f"the device ran out of memory in step {done + 1} of {len(trainer.plan)}, longest row {longest} tokens",
        expected=f"room for {spec.per_device_train_batch_size} rows at once",
        hint=", or ".join(mends),
    )


def _check(tuned: Tuned, spec: TrainSpec) -> None:
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


def warmup_steps(spec: TrainSpec, steps: int) -> int:
    """Steps of warm-up; the first of them has a rate of 0, so one alone would only waste a step."""
    wanted = int(spec.warmup_ratio * steps)
    return wanted if wanted > 1 else 0


def sft_arguments(tuned: Tuned, plan: Schedule, spec: TrainSpec, folder: Path, optim: str) -> SFTConfig:
    """TRL's settings, with everything explicit that TRL or transformers would otherwise choose."""
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=len(plan),
        per_device_train_batch_size=spec.rows_per_step,  # the loader yields a step; training/step splits it
        gradient_accumulation_steps=1,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_steps=warmup_steps(spec, len(plan)),
        optim=optim,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        max_length=None,  # rows are cut or refused in data/, never here
        packing=False,
        bf16=False,  # mixed precision is ours: generation.forward.autocast, the same in evaluation
        fp16=False,
        gradient_checkpointing=spec.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec.gradient_checkpointing else None,
        logging_nan_inf_filter=False,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to=spec.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=tuned.backbone.device.type == "cpu",
        dataloader_pin_memory=False,
        push_to_hub=False,
    )
    # The backbone is on one device; with several visible, Trainer would wrap it in DataParallel, which TRL refuses.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class StepTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our step: one `training_step` is one optimizer step over all its rows."""

    def __init__(
        self,
        tuned: Tuned,
        examples: Sequence[Example],
        plan: Schedule,
        spec: TrainSpec,
        folder: Path,
        report: Report,
        log: Callable[[int, dict[str, float]], None],
    ) -> None:
        backbone = tuned.backbone
        optim = optimizer(backbone.device, backbone.quant.bits in (4, 8)) if spec.optim == "auto" else None
        decision = optim or Decision("optimizer", spec.optim, "asked for")
        report(decision)
        self.examples, self.plan, self.spec, self.tuned = examples, plan, spec, tuned
        self.report, self.log_step = report, log
        self.results: list[StepResult] = []
        base = tuned.model.get_base_model()
        own_forward = base.__dict__.get("forward")
        # Values, not dtypes: a float32 that went through bfloat16 and back has lost 16 bits.
        values = {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}
        try:
            with quiet():
                super().__init__(
                    model=tuned.model,
                    args=sft_arguments(tuned, plan, spec, folder, decision.choice),
                    train_dataset=to_dataset(examples),
                    processing_class=backbone.tokenizer.hf,
                    data_collator=list,
                )
        except (ImportError, RuntimeError, ValueError) as error:  # a tracker that is not installed, most often
            reason = str(error).strip().splitlines()[0]
            hint = "look at train.report_to" if spec.report_to else None
            raise TrainingError(f"the trainer cannot start: {reason}", hint=hint) from error
        finally:
            _restore(tuned, values, base, own_forward)
        self.remove_callback(PrinterCallback)
        self._clock = time.perf_counter()

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine; TRL would send model, device and data source to the Hub."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the registry's manifest says what the adapter is."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Rows in the order of the schedule, step after step."""
        return _ScheduledOrder(self.plan)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one whole optimizer step's forward and backward passes; the loss is a 0-dim float32 tensor."""
        model.train()
        backbone = self.tuned.backbone
        rows = [self.examples[row["index"]] for row in inputs]
        step = Step(
            model,
            rows,
            pad_id=backbone.tokenizer.pad_id,
            device=backbone.device,
            backward=self.accelerator.backward,
            forward=lambda: autocast(backbone.device, backbone.placement.compute_dtype),
        )
        result = step.run(self.spec.per_device_train_batch_size)
        self._tell(result)
        return torch.tensor(result.loss, device=backbone.device)

    def _tell(self, result: StepResult) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.results.append(result)
        done = len(self.results)
        figures = {
            "loss": result.loss,
            "tokens": float(result.tokens),
            "answer_tokens": float(result.answer_tokens),
            "tokens_per_s": result.tokens / max(seconds, 1e-9),
            "learning_rate": float(self._get_learning_rate()),
            "peak_gb": peak_bytes(self.tuned.backbone.device) / 1e9,
        }
        self.log_step(done, figures)
        self.report(Progress(done, figures))


class _ScheduledOrder(Sampler[int]):  # type: ignore[misc]
    def __init__(self, plan: Schedule) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[int]:
        return (row for step in self.plan.steps for row in step)

    def __len__(self) -> int:
        return sum(len(step) for step in self.plan.steps)


def _check_finite(tuned: Tuned) -> None:
    """The last loss was taken before the last update, and attention on a CPU turns NaN into 0 without a word."""
    spoilt = [name for name, parameter in tuned.trainable.items() if not torch.isfinite(parameter).all()]
    if spoilt:
        raise TrainingError(
            f"{len(spoilt)} of {len(tuned.trainable)} trained tensors hold NaN or infinite numbers, first {spoilt[0]}",
            expected="finite numbers",
            hint="lower train.learning_rate",
        )


def _restore(tuned: Tuned, values: dict[str, torch.Tensor], base: Any, own_forward: Any) -> None:
    """Undo what SFTTrainer's constructor did to the model: trainable tensors, and the base's forward."""
    for name, parameter in tuned.trainable.items():
        parameter.data = values[name]
    if own_forward is None:
        base.__dict__.pop("forward", None)
    else:
        base.forward = own_forward


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the CUDA device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
