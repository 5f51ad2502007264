"""One optimizer step's gradients: rows split into micro-batches by tokens, weighed by answer tokens, repeatable.

The loss of a step is the summed NLL of all its answer tokens over their number, however the rows are split. A mean of
micro-batch means would weigh short answers more (transformers and Unsloth, October 2024): 8 tokens at 2.0 and 120 at
1.0 are 1.0625, not 1.5. A mean over processes would do the same, so each divides by the tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peftkit.errors import TrainingError
from peftkit.generation.forward import Labelled
from peftkit.process_group import ProcessGroup
from peftkit.training import random_state
from peftkit.training.objective import Objective, Work
from peftkit.training.parallel import Team
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.split import lengths
from peftkit.training.regularize.spec import RegularizeSpec


@dataclass(frozen=True)
class StepResult:
    """What one step did, all processes together."""

    loss: float
    """Mean NLL of the step's answer tokens in nats."""
    answer_tokens: int
    tokens: int
    micro_batches: int
    """Of the process that had most of them."""


class Step:
    """The gradients of one optimizer step over `rows`; `run` adds them, `repeat` starts over with the same draws.

    In a team, `rows` are those of the whole step, and each process runs its share; `finish` brings them together.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Labelled],
        *,
        pad_id: int,
        device: torch.device,
        backward: Callable[[torch.Tensor], None] | None = None,
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
        team: Team | None = None,
        objective: Objective | None = None,
        paths: Paths | None = None,
    ) -> None:
        self.model = model
        self.paths = paths or Paths()
        self.objective = objective or Objective(self.paths.loss(RegularizeSpec()))
        self.rows = rows
        self.team = team or Team(ProcessGroup())
        self._shares = self.team.shares(lengths(rows))
        self.share = [rows[index] for index in self._shares[self.team.rank]]
        """The rows of this process."""
        self.pad_id = pad_id
        self.device = device
        self.forward = forward
        self.backward = backward or (lambda loss: loss.backward())
        self.answer_tokens = self.paths.counted(rows)
        self._random = random_state.capture(device)
        if self.answer_tokens == 0:
            raise TrainingError("a step has no answer token, so it has no loss", expected="labels in every step")

    def run(self, tokens_at_once: int) -> StepResult:
        """The step's gradients and figures, with at most `tokens_at_once` tokens or one row alive at once.

        Raises TrainingError when the loss is NaN or infinite.
        """
        return self.finish(self.gradients(tokens_at_once), tokens_at_once)

    def gradients(self, tokens_at_once: int) -> float:
        """Accumulate the gradients of this process's rows, at most `tokens_at_once` tokens or one row alive at once.

        Returns their summed NLL in nats. Under FSDP every pass gathers the weights from all processes, so a process
        that is done sooner goes on with passes that count nothing.
        """
        total = 0.0
        with self.paths.around(self.model):
            options: dict[str, Any] = {"pad_id": self.pad_id, "device": self.device, "forward": self.forward}
            rows = self.paths.prepared(self.model, self.rows, tokens_at_once, **options)
            self.share = [rows[index] for index in self._shares[self.team.rank]]
            batches = self.batches(tokens_at_once)
            for batch, flat in batches:
                total += self._pass([self.share[index] for index in batch], self.team.weight, flat=flat)
            if self.team.sharded:
                shortest = min((row for row in rows), key=lambda row: len(row.input_ids))
                for _ in range(self.micro_batches(tokens_at_once) - len(batches)):
                    self._pass([shortest], 0, flat=False)
        return total

    def batches(self, tokens_at_once: int, rank: int | None = None) -> list[tuple[list[int], bool]]:
        """The micro-batches of a process's share, by default this one's: indices in it, and whether they lie flat."""
        share = self._shares[self.team.rank if rank is None else rank]
        return self.paths.micro_batches(lengths(self.rows[index] for index in share), tokens_at_once)

    def lengths(self, tokens_at_once: int, rank: int) -> list[tuple[list[int], bool]]:
        """Tokens of the rows of a process's micro-batches, and whether they lie flat."""
        share = self._shares[rank]
        return [
            (lengths(self.rows[share[index]] for index in batch), flat)
            for batch, flat in self.batches(tokens_at_once, rank)
        ]

    def micro_batches(self, tokens_at_once: int) -> int:
        """Passes of the process that has most of them."""
        return max(len(self.batches(tokens_at_once, rank)) for rank in range(self.team.size))

    def finish(self, total: float, tokens_at_once: int) -> StepResult:
        """Bring together what all processes found: the gradients of the whole step, and its figures.

        `total` is this process's summed NLL. Raises TrainingError, on all processes, when the loss is NaN or infinite.
        """
        loss = self.team.total(total) / self.answer_tokens
        if not torch.isfinite(torch.tensor(loss)):
            places = ", ".join(sorted({str(getattr(row, "where", "?")) for row in self.rows})[:4])
            raise TrainingError(
                f"the loss is {loss} in a step with the rows {places}",
                expected="a finite number",
                hint="lower train.learning_rate, or look at these rows with `peftkit data preview`",
            )
        self.team.add_gradients(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.objective.finish()
        tokens = sum(len(row.input_ids) for row in self.rows)
        return StepResult(loss, self.answer_tokens, tokens, self.micro_batches(tokens_at_once))

    def repeat(self, tokens_at_once: int) -> StepResult:
        """Throw the step's gradients away and run it again from its saved random state, split as asked."""
        self.rewind()
        return self.run(tokens_at_once)

    def rewind(self) -> None:
        """Throw the step's gradients away and go back to its saved random state."""
        for parameter in self.model.parameters():
            parameter.grad = None
        random_state.restore(self._random, self.device)

    def _pass(self, rows: Sequence[Labelled], weight: int, *, flat: bool) -> float:
        with self.paths.laid(self.model, rows, flat=flat, pad_id=self.pad_id, device=self.device) as batch:
            back = partial(self._back, weight=weight)
            return self.objective.gradients(Work(self.model, batch, self.forward, back, self.paths))

    def _back(self, total: torch.Tensor, weight: int) -> None:
        self.backward(total * weight / self.answer_tokens)
