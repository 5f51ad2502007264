"""Which rows every optimizer step sees, decided before the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftkit.data.chat import Example
from peftkit.data.encoded import lengths
from peftkit.errors import TrainingError
from peftkit.training.spec import TrainSpec


@dataclass(frozen=True)
class Schedule:
    """The rows of every optimizer step, decided before the first one."""

    steps: tuple[tuple[int, ...], ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.steps)


def schedule(examples: Sequence[Example], spec: TrainSpec) -> Schedule:
    """Which rows each step sees: seeded permutations one after another, cut by epochs, max_steps and max_tokens.

    A step may span two epochs, so every step but the last is full and every row is seen equally often. Raises
    TrainingError when not even one step fits.
    """
    size, generator = spec.rows_per_step, torch.Generator().manual_seed(spec.seed)
    rows_wanted = spec.max_steps * size if spec.max_steps else max(1, round(len(examples) * spec.num_train_epochs))
    order: list[int] = []
    while len(order) < rows_wanted:
        order += torch.randperm(len(examples), generator=generator).tolist()
    steps: list[tuple[int, ...]] = []
    costs, tokens = lengths(examples).tolist(), 0
    for start in range(0, rows_wanted, size):
        rows = tuple(order[start : min(start + size, rows_wanted)])
        cost = sum(costs[i] for i in rows)
        if spec.max_tokens and tokens + cost > spec.max_tokens:
            break
        steps.append(rows)
        tokens += cost
    if not steps:
        raise TrainingError(
            f"train.max_tokens={spec.max_tokens} is less than the first step of {size} rows",
            hint="raise train.max_tokens or lower train.per_device_train_batch_size",
        )
    return Schedule(tuple(steps), tokens)
