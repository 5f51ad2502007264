"""How preferences go through the model: both answers of a pair side by side in one micro-batch, counted as one row.

A step's loss is the mean over its rows, however they are split: what a row adds depends on no other row of its
micro-batch. KTO's divergence does depend on other rows, so it is measured once for the whole step, before its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from peftkit.data.chat import Example
from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import TrainingError
from peftkit.events import Report, silent
from peftkit.generation.forward import bounded, by_length
from peftkit.training.parallel import team
from peftkit.training.passes.paths import Loss, Paths
from peftkit.training.passes.split import lengths
from peftkit.training.passes.trying import find_paths
from peftkit.training.preference.likelihoods import likelihoods
from peftkit.training.preference.losses import dpo, kto, orpo
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.tuning.tuned import Tuned

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class PreferencePaths(Paths):
    """The passes of rows that say which answer is better."""

    spec: PreferenceTrainSpec = field(default_factory=PreferenceTrainSpec)
    tries_memory: bool = False
    """The rows are not scored under the base yet, and only what their passes take counts: all the base gives is 0."""

    def counted(self, rows: Sequence[PreferenceExample]) -> int:
        """Pairs, or answers with a label."""
        return len(rows)

    @contextmanager
    def laid(
        self, model: Any, rows: Sequence[Any], *, flat: bool, pad_id: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """All better answers, then all worse ones, each behind its prompt; `rows` go with them for the loss."""
        sequences = [row.chosen for row in rows] + [row.rejected for row in rows if row.rejected is not None]
        with super().laid(model, sequences, flat=flat, pad_id=pad_id, device=device) as batch:
            yield {**batch, "rows": rows}

    def loss(self, spec: RegularizeSpec) -> Loss:
        """The preference loss, summed over rows; it is also what is shown."""
        return self._loss

    def _loss(self, model: Any, batch: dict[str, Any], paths: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.losses(model, batch).sum()
        return total, total

    def losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of every row of a batch that `laid` made, (rows,)."""
        rows: Sequence[PreferenceExample] = batch["rows"]
        if self.tries_memory:
            rows = [replace(row, reference=(0.0, 0.0), divergence=0.0) for row in rows]
        tokens = [row.chosen.answer_tokens for row in rows]
        tokens += [row.rejected.answer_tokens for row in rows if row.rejected is not None]
        inputs = {name: value for name, value in batch.items() if name != "rows"}
        found = likelihoods(model, inputs, tokens, self)

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=found.dtype, device=found.device)

        if self.spec.loss == "kto":
            divergence = [row.divergence for row in rows if row.divergence is not None]
            _check(len(divergence) == len(rows), "divergence of the step", rows)
            _check_reference(rows)
            desirable = torch.tensor([bool(row.desirable) for row in rows], device=found.device)
            return kto(found, column([row.reference[0] for row in rows]), desirable, column(divergence), self.spec)
        _check(len(tokens) == 2 * len(rows), "worse answers", rows)
        (chosen, rejected), (better, worse) = found.chunk(2), column(tokens).chunk(2)
        if self.spec.loss == "orpo":
            return orpo(chosen, rejected, better, worse, self.spec.beta)
        _check_reference(rows)
        first, second = (column([row.reference[side] for row in rows]) for side in (0, 1))
        return dpo(chosen, rejected, first, second, better, worse, self.spec)

    def prepared(
        self,
        model: Any,
        rows: Sequence[PreferenceExample],
        tokens: int,
        *,
        pad_id: int,
        device: torch.device,
        forward: Autocast = nullcontext,
    ) -> list[PreferenceExample]:
        """All rows of a step with what no micro-batch can know: of KTO the divergence, of the others nothing.

        z = max(0, mean of log π(y'|x) - log base(y'|x)) over the step's prompts x with answers y' to other prompts
        (arXiv 2402.01306, section 4.1), under the adapter as it is at the step's begin, in evaluation mode and without
        gradients. TRL takes the mean over a micro-batch, in training mode.
        """
        if self.spec.loss != "kto" or self.tries_memory:
            return list(rows)
        _check_reference(rows)
        asked = [row.mismatched for row in rows if row.mismatched is not None]
        mode = model.training
        model.eval()
        try:
            policy = self.scored(model, asked, tokens, pad_id=pad_id, device=device, forward=forward)
        finally:
            model.train(mode)
        ratios = [one - row.reference[1] for one, row in zip(policy, rows, strict=True)]
        divergence = max(0.0, sum(ratios) / len(ratios))
        return [replace(row, divergence=divergence) for row in rows]

    def scored(
        self,
        model: Any,
        sequences: Sequence[Example],
        tokens: int,
        *,
        pad_id: int,
        device: torch.device,
        forward: Autocast = nullcontext,
    ) -> list[float]:
        """The log-likelihood of each sequence's answer without gradients, at most `tokens` tokens at once."""
        sums = [0.0] * len(sequences)
        for indices, flat in self.micro_batches(lengths(sequences), tokens):
            some = [sequences[index] for index in indices]
            laid = Paths.laid(self, model, some, flat=flat, pad_id=pad_id, device=device)
            with torch.no_grad(), laid as batch, forward():
                found = likelihoods(model, batch, [one.answer_tokens for one in some], self)
            for index, value in zip(indices, found.double().tolist(), strict=True):
                sums[index] = value
        return sums

    def measure(
        self, model: Any, rows: Sequence[PreferenceExample], *, pad_id: int, device: torch.device, batch_size: int
    ) -> list[float]:
        """The loss of each row without gradients, in the order of `rows`."""
        longest = max(lengths(rows))
        rows = self.prepared(model, rows, batch_size * longest, pad_id=pad_id, device=device)
        losses = [0.0] * len(rows)
        for indices in bounded(by_length(rows, batch_size), rows, model):
            some = [rows[index] for index in indices]
            flat = all(self.lays_flat(len(row.input_ids)) for row in some)
            with torch.no_grad(), self.laid(model, some, flat=flat, pad_id=pad_id, device=device) as batch:
                found = self.losses(model, batch).double().tolist()
            for index, value in zip(indices, found, strict=True):
                losses[index] = value
        return losses


def preference_paths(tuned: Tuned, spec: PreferenceTrainSpec, report: Report = silent) -> PreferencePaths:
    """The shortcuts that are right for a model, for rows of preferences."""
    found = find_paths(tuned, sharded=team().sharded, report=report)
    return PreferencePaths(**{each.name: getattr(found, each.name) for each in fields(found)}, spec=spec)


def _check_reference(rows: Sequence[PreferenceExample]) -> None:
    _check(all(len(row.reference) == 2 for row in rows), "log-likelihoods under the base", rows)


def _check(holds: bool, what: str, rows: Sequence[PreferenceExample]) -> None:
    if not holds:
        raise TrainingError(
            f"{rows[0].where} and its neighbours: no {what}",
            expected="rows of the kind that train.loss reads, scored by reference_scored before training",
        )
