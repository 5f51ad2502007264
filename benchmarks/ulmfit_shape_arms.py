"""The arms of docs/decisions/0018: what each trains, how, and at which rates; and one training run."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import numpy as np
import torch
from ulmfit_shape_rows import LABELS

from peftkit import locations
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec
from peftkit.data.tasks.task import TaskExample
from peftkit.errors import TrainingError
from peftkit.generation.forward import autocast
from peftkit.generation.tasks import outputs
from peftkit.training.sft import Trained, train
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.paths import task_paths
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.snapshot import Snapshot

BASE = "embedded:minilm"
QUANT = {"bits": 16, "compute_dtype": "bfloat16", "device": "cpu"}
AT_ONCE = 32
"""Rows measured at once."""
PROBED, SAMPLE = 6, 128
"""Steps and rows that speed is measured with."""


@dataclass(frozen=True)
class Arm:
    """One scheme of fine-tuning."""

    adapter: Mapping[str, Any]
    rates: tuple[float, float, float]
    train: Mapping[str, Any] = field(default_factory=dict)
    unfreeze: str | None = None
    """Direction of gradual unfreezing."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Validation error in % of ULMFiT's Table 7."""


LOW, MIDDLE, HIGH, HIGHEST = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
FULL, HEAD_ONLY = {"method": "full"}, {"method": "top_layers", "top_layers": 0}
DISCRIMINATIVE = {"layerwise": {"decay": 1 / 2.6}, "lr_scheduler_type": "slanted_triangular"}
ARMS = {
    "scratch": Arm(FULL, MIDDLE, published={"IMDb": 9.93, "AG": 6.81}),
    "head_only": Arm(HEAD_ONLY, HIGHEST, published={"IMDb": 6.49, "AG": 8.38}),
    "top_2": Arm({"method": "top_layers", "top_layers": 2}, MIDDLE),
    "full": Arm(FULL, LOW, published={"IMDb": 6.87, "AG": 5.81}),
    "full_decay": Arm(FULL, LOW, {"layerwise": {"decay": 0.95}}),
    "gradual_top_down": Arm(FULL, MIDDLE, unfreeze="deep_first", published={"IMDb": 6.37, "AG": 5.81}),
    "gradual_bottom_up": Arm(FULL, MIDDLE, unfreeze="shallow_first"),
    "full_discr_stlr": Arm(FULL, HIGH, DISCRIMINATIVE),
    "gradual_discr_stlr": Arm(FULL, HIGH, DISCRIMINATIVE, "deep_first", {"IMDb": 5.00, "AG": 5.38}),
    "bias_only": Arm({"method": "bias_only"}, HIGHEST),
    "lora": Arm({"method": "lora"}, HIGH),
}
AT_MOST_ROWS = ("full", "gradual_discr_stlr", "lora", "head_only")
"""Arms that are trained on the largest number of rows too."""
PACE = 16
"""Unfreezing adds a depth after every such part of the steps."""


@dataclass(frozen=True)
class Course:
    """How long a run over so many rows is."""

    epochs: int
    rows_per_step: int
    rates_of: int | None = None
    """The number of rows whose search says the rate; None searches."""

    def steps(self, n: int) -> int:
        """Optimizer steps over n rows."""
        return math.ceil(n * self.epochs / self.rows_per_step)


COURSES = {100: Course(6, 16), 1000: Course(2, 32), 4000: Course(1, 32, rates_of=1000)}


def train_spec(arm: Arm, n: int, course: Course, rate: float, seed: int) -> TrainSpec:
    """The settings of one run."""
    settings: dict[str, Any] = {
        **arm.train,
        "num_train_epochs": course.epochs,
        "per_device_train_batch_size": course.rows_per_step,
        "learning_rate": rate,
        "seed": seed,
    }
    if arm.unfreeze:
        settings["unfreeze"] = {"direction": arm.unfreeze, "every_steps": max(1, course.steps(n) // PACE)}
    return TrainSpec.model_validate(settings)


@lru_cache(maxsize=2)
def backbone_of(data: str, seed: int, scratch: bool) -> Backbone:
    """The base with a head for a data set's labels, drawn from the seed; with `scratch`, all of it is drawn."""
    head = Head("sequence", LABELS[data])
    quant = QuantSpec.model_validate(QUANT)
    found = load_backbone(BaseSpec(source=BASE), quant, locations.cache_root().path, head=head, seed=seed)
    if not scratch:
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(found.model)(found.model.config)
    drawn.config = found.model.config
    return replace(found, model=drawn.to(next(found.model.parameters()).dtype).requires_grad_(False).eval())


def trained(
    data: str, name: str, spec: TrainSpec, rows: Sequence[Any], parts: Mapping[str, Sequence[TaskExample]]
) -> dict[str, Any]:
    """Train an arm and measure it on the rows of `parts`: a text with a 1 for each wrong row, and mean NLL in nats."""
    backbone = backbone_of(data, spec.seed, name == "scratch")
    before, began, cpu = Snapshot(backbone.model), time.perf_counter(), time.process_time()
    try:
        tuned = inject(backbone, AdapterSpec.model_validate({**ARMS[name].adapter, "seed": spec.seed}))
        with tempfile.TemporaryDirectory() as folder:
            done = _finite(lambda: train(tuned, rows, spec, Path(folder), paths=task_paths(tuned, spec, rows)))
        result: dict[str, Any] = {"trained_numbers": tuned.trainable_parameters}
        result |= {"steps": done.steps, "tokens": done.tokens, "last_loss": round(done.last_loss, 4)} if done else {}
        for part, examples in parts.items():
            result[part] = _measured(tuned.model, backbone, examples) if done else {"wrong": "1" * len(examples)}
    finally:
        before.restore()
    cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    return result | {key: round(value, 2) for key, value in cost.items()}


def speed(
    data: str, name: str, spec: TrainSpec, rows: Sequence[Any], parts: Mapping[str, Sequence[TaskExample]]
) -> dict[str, Any]:
    """CPU seconds of a run's beginning, and tokens per CPU second of training's later steps and of measuring."""
    backbone = backbone_of(data, spec.seed, name == "scratch")
    before, began = Snapshot(backbone.model), time.process_time()
    short, marks = spec.model_copy(update={"max_steps": PROBED}), []
    try:
        tuned = inject(backbone, AdapterSpec.model_validate(ARMS[name].adapter))
        with tempfile.TemporaryDirectory() as folder:
            paths = task_paths(tuned, short, rows)
            log: Any = lambda step, figures: marks.append(time.process_time())  # noqa: E731
            done = train(tuned, rows, short, Path(folder), paths=paths, log=log)
        ended, examples = time.process_time(), parts["test"][:SAMPLE]
        _measured(tuned.model, backbone, examples)
        measured = time.process_time() - ended
    finally:
        before.restore()
    each = (marks[-1] - marks[0]) / (PROBED - 1)
    return {
        "startup_seconds": round(ended - began - PROBED * each, 3),
        "tokens_per_second": round(done.tokens / PROBED / each, 1),
        "measured_tokens_per_second": round(sum(len(one.input_ids) for one in examples) / measured, 1),
    }


def _finite(run: Any) -> Trained | None:
    """What a run did; None where its loss or its numbers were not finite."""
    try:
        done: Trained = run()
    except TrainingError as error:
        if "NaN" in error.fact or error.expected == "a finite number":
            return None
        raise
    return done


def _measured(model: Any, backbone: Backbone, examples: Sequence[TaskExample]) -> dict[str, Any]:
    with autocast(backbone.device, backbone.placement.compute_dtype):
        scores = np.stack(outputs(model, backbone, examples, batch_size=AT_ONCE)).astype(np.float64)
    wanted = np.array([int(example.target[0]) for example in examples])
    top = scores.max(axis=1, keepdims=True)
    likely = scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
    wrong = (scores.argmax(axis=1) != wanted).astype(int)
    return {"wrong": "".join(map(str, wrong)), "nll": round(float(-likely[np.arange(len(wanted)), wanted].mean()), 5)}
