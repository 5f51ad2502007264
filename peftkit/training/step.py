"""One optimizer step's gradients: rows split into micro-batches, weighed by answer tokens, repeatable.

The loss of a step is the summed NLL of all its answer tokens over their number, however the rows are split. A mean of
micro-batch means would weigh short answers more (transformers and Unsloth, October 2024): 8 tokens at 2.0 and 120 at
1.0 are 1.0625, not 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.data.chat import IGNORED
from peftkit.errors import TrainingError
from peftkit.generation.forward import Labelled, by_length, pad, token_nll
from peftkit.training import random_state


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float
    """Mean NLL of the step's answer tokens in nats."""
    answer_tokens: int
    tokens: int
    micro_batches: int


class Step:
    """The gradients of one optimizer step over `rows`; `run` adds them, `repeat` starts over with the same draws."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[Labelled],
        *,
        pad_id: int,
        device: torch.device,
        backward: Callable[[torch.Tensor], None] | None = None,
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.rows = rows
        self.pad_id = pad_id
        self.device = device
        self.forward = forward
        self.backward = backward or (lambda loss: loss.backward())
        self.answer_tokens = sum(label != IGNORED for row in rows for label in row.labels[1:])
        self._random = random_state.capture(device)
        if self.answer_tokens == 0:
            raise TrainingError("a step has no answer token, so it has no loss", expected="labels in every step")

    def run(self, micro_batch_size: int) -> StepResult:
        """Accumulate the step's gradients with at most `micro_batch_size` rows alive at once.

        Raises TrainingError when the loss is NaN or infinite.
        """
        total = 0.0
        batches = by_length(self.rows, micro_batch_size)
        for indices in batches:
            batch = pad([self.rows[i] for i in indices], self.pad_id, self.device)
            with self.forward():  # autocast belongs around the forward pass alone
                nll = token_nll(self.model, batch).sum()
            total += float(nll.detach())
            self.backward(nll / self.answer_tokens)
        loss = total / self.answer_tokens
        if not torch.isfinite(torch.tensor(loss)):
            places = ", ".join(sorted({str(getattr(row, "where", "?")) for row in self.rows})[:4])
            raise TrainingError(
                f"the loss is {loss} in a step with the rows {places}",
                expected="a finite number",
                hint="lower train.learning_rate, or look at these rows with `peftkit data preview`",
            )
        return StepResult(loss, self.answer_tokens, sum(len(row.input_ids) for row in self.rows), len(batches))

    def repeat(self, micro_batch_size: int) -> StepResult:
        """Throw the step's gradients away and run it again from its saved random state, split as asked."""
        for parameter in self.model.parameters():
            parameter.grad = None
        random_state.restore(self._random, self.device)
        return self.run(micro_batch_size)
