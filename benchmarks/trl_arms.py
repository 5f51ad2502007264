"""TRL's SFTTrainer as an arm of a benchmark: our backbone and rows, its own LoRA, and every setting that makes it fast.

What it is given by itself: float32 (bf16 is its default; all arms alike are asked for float32), no truncation, no
trackers, no telemetry. Packing, padding, batches, checkpointing and the order of rows come from the
setting; what is left out is TRL's default. Over a 4-bit base TRL holds the adapter in bfloat16, as it always does.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from peftkit.backbone.load import Backbone
from peftkit.backbone.quiet import quiet
from peftkit.data.chat import IGNORED, Example

STEP_ROWS = 8
DEFAULTS: dict[str, Any] = {}
"""8 rows at once, padded, with checkpointing, in the order that they are given in."""
Step = tuple[float, float, float, float]
"""When it ended, its mean loss over answer tokens, its tokens without padding, its answer tokens."""


class CountedTrainer(SFTTrainer):  # type: ignore[misc]
    """Notes each micro-batch's summed loss and tokens; nothing of the training is changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches: list[tuple[Any, Any, int]] = []
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Upstream's; its loss is the micro-batch's summed NLL over the answer tokens of the whole step."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batches.append((loss, num_items_in_batch, int(tokens)))
        return loss


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ended, its update included, and what it saw."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.trainer: CountedTrainer | None = None
        self.steps: list[Step] = []
        self.ended = ended

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A whole optimizer step."""
        assert self.trainer is not None
        seen, self.trainer.micro_batches = self.trainer.micro_batches, []
        if seen[0][1] is None:
            raise RuntimeError("Trainer gave no num_items_in_batch: its losses would be means of means")
        loss = sum(float(micro[0]) for micro in seen)
        tokens = sum(micro[2] for micro in seen)
        self.steps.append((time.perf_counter(), loss, tokens, float(seen[0][1])))
        self.ended()


def trl_train(
    backbone: Backbone,
    rows: list[Example],
    setting: dict[str, Any],
    same_start: Callable[[Iterable[tuple[str, nn.Parameter]]], None],
    rate: float,
    r: int,
    alpha: int,
    step_ended: Callable[[], None],
) -> list[Step]:
    """Train one epoch in steps of about 8 rows.

    `setting` may have `batch` (rows at once), `checkpointing`, `padding_free`, `order` (a train_sampling_strategy) and
    `packs` (packs to a step). Packs are as long as makes so many of them for every step, so that there are as many
    steps as without. Raises ValueError where no such length is, and what TRL raises.
    """
    steps = math.ceil(len(rows) / STEP_ROWS)
    data = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = _Clock(step_ended)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, quiet():
        model = get_peft_model(backbone.model, config)
        same_start(model.named_parameters())
        arguments = SFTConfig(
            output_dir=folder, num_train_epochs=1, learning_rate=rate, lr_scheduler_type="constant", bf16=False,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            **_choices(setting, data, rows, steps),
        )  # fmt: skip
        trainer = CountedTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=backbone.tokenizer.hf, callbacks=[clock]
        )
        clock.trainer = trainer
        trainer.train()
    _check_counts(clock.steps, rows)
    return clock.steps


def _choices(setting: dict[str, Any], data: Dataset, rows: list[Example], steps: int) -> dict[str, Any]:
    """The setting in TRL's words."""
    packs, batch = setting.get("packs"), setting.get("batch", STEP_ROWS)
    chosen: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    if packs:
        length, batch = pack_length(data, rows, steps * packs), 1
        chosen = {"packing": True, "packing_strategy": "bfd", "max_length": length}
    if setting.get("padding_free"):
        chosen["padding_free"] = True
    if "checkpointing" in setting:
        chosen["gradient_checkpointing"] = setting["checkpointing"]
    chosen["per_device_train_batch_size"] = batch
    chosen["gradient_accumulation_steps"] = packs or STEP_ROWS // batch
    chosen["train_sampling_strategy"] = setting.get("order", "sequential")
    return chosen


def pack_length(data: Dataset, rows: list[Example], packs: int) -> int:
    """The least length at which best-fit decreasing makes just so many packs, none of the rows cut."""
    longest = max(len(row.input_ids) for row in rows)
    tokens = sum(len(row.input_ids) for row in rows)
    least = max(longest, math.ceil(tokens / packs))
    for length in range(least, 2 * least, 8):
        count = len(pack_dataset(data, length, "bfd"))
        if count == packs:
            return length
        if count < packs:
            break
    raise ValueError(f"no length of packs makes {packs} of these {len(rows)} rows")


def _check_counts(steps: list[Step], rows: list[Example]) -> None:
    """All tokens were seen once: a setting that loses some is no candidate."""
    seen, there = int(sum(step[2] for step in steps)), sum(len(row.input_ids) for row in rows)
    answers = int(sum(step[3] for step in steps))
    learned = sum(label != IGNORED for row in rows for label in row.labels[1:])
    if (seen, answers) != (there, learned):
        raise ValueError(f"it saw {seen} tokens, {answers} of them answers, of {there} and {learned}")
