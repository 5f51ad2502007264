"""A plan's terms against those of a real step, counted by the ledger."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch

from peftkit.generation.forward import autocast
from peftkit.planning.architecture import Architecture
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.training.holdings import held
from peftkit.training.ledger import Ledger
from peftkit.training.objective import Objective
from peftkit.training.passes.paths import Paths
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

CLOSE = 0.05
WEIGHTS = (
    "linear layers", "unpacked linear layers", "quantization constants", "code tables", "embeddings", "head",
    "norms and biases", "adapter", "trained copies",
)  # fmt: skip


def bytes_of(*models: Any) -> int:
    """Bytes of all storages that the models hold, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for m in models for tensor in held(m)}
    return sum(storage.nbytes() for storage in storages.values())


def step_terms(tuned: Tuned, rows: Sequence[Any], around: Objective | None, paths: Paths) -> dict[str, int]:
    """The terms of a real step over all rows at once: the second of a run, the first makes the optimizer's state."""
    backbone = tuned.backbone
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.trainable.values(), foreach=False)

    def step(some: Sequence[Any]) -> None:
        options: dict[str, Any] = {"pad_id": 2, "device": torch.device("cpu"), "objective": around, "paths": paths}
        forward = lambda: autocast(torch.device("cpu"), backbone.placement.compute_dtype)  # noqa: E731
        Step(tuned.model, some, forward=forward, **options).run(sum(len(row.input_ids) for row in some))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(rows[:1])
    gc.collect()
    # What the skeleton of a partial fine-tune has copies of is in the backbone's own model too.
    weights, seen = bytes_of(backbone.model, tuned.model), bytes_of(tuned.model)
    with Ledger(tuned.model, optimizer) as ledger:
        step(rows)
    account = ledger.account()
    return {
        "weights": weights,
        "gradients": account.gradients,
        "optimizer": account.optimizer,
        "kept": account.kept - account.kept_by["outside"],  # the plan counts the loss with the logits
        "peak": account.before + account.peak + weights - seen,
    }


def planned_terms(base: Architecture, setting: Setting) -> dict[str, int]:
    """The same terms as they are planned."""
    plan = plan_memory(base, setting)
    parts = {part.name: part.bytes.expected for part in plan.parts}
    # The run's allocator and its penalties have these, not the model.
    apart = ("context", "mapped file", "scores of ranks", "where training began")
    return {
        "weights": sum(parts.get(name, 0) for name in WEIGHTS),
        "gradients": parts["gradients"],
        "optimizer": parts["optimizer"],
        "kept": parts["activations"],
        "peak": plan.stage("train").bytes.expected - sum(parts.get(name, 0) for name in apart),
    }


def check_terms(plan: dict[str, int], real: dict[str, int]) -> None:
    """Every term within CLOSE."""
    errors = {name: plan[name] / real[name] - 1 for name in real}
    assert all(abs(error) <= CLOSE for error in errors.values()), errors
