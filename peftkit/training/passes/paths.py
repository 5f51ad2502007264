"""How the rows of a run go through the model, and which shortcuts are taken on the way.

Which shortcuts are right for a model is found by trying (trying.py). Rows of another kind (a task's, or pairs of
answers) have a subclass of `Paths`, which lays them out, counts and scores them in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch

from peftkit.data.chat import IGNORED
from peftkit.events import Decision, Report
from peftkit.generation.forward import Labelled, bounded, by_length, label_logits, pad, row_nll
from peftkit.training.passes.flat import (
    attention_by_row,
    lay_flat,
    place_of_starts,
)
from peftkit.training.passes.head import Head
from peftkit.training.passes.split import split
from peftkit.training.regularize.losses import TokenLoss
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.tuning.fused import fused_lora
from peftkit.tuning.tuned import Tuned

Loss = Callable[[Any, dict[str, Any], Any], tuple[torch.Tensor, torch.Tensor]]
"""(model, batch, paths) → what is minimized and what is shown: 0-dim sums over what a step counts."""


@dataclass(frozen=True)
class Paths:
    """How the passes of a step go through a model; without arguments the plain way, which is always right."""

    head: Head | None = None
    """Score labelled positions in chunks."""
    keeps_some: bool = False
    """The model takes `logits_to_keep`."""
    flat: bool = False
    """Lay rows out without padding."""
    longest: int | None = None
    """Rows longer than this are padded all the same; None where there is no limit."""
    fused: bool = False
    """Compute LoRA's products in one step."""
    virtual_tokens: int = 0
    """Positions that stand before every row."""
    reasons: tuple[str, ...] = ()
    """Why shortcuts are not taken."""

    @property
    def names(self) -> list[str]:
        """The shortcuts in words."""
        rows = f"head at labels, {self.head.rows} rows at once" if self.head is not None else ""
        ways = {"rows without padding": self.flat, rows: bool(rows), "LoRA fused": self.fused}
        return [name for name, taken in ways.items() if taken]

    def of(self, part: Tuned) -> Self:
        """The same for a part of the model that has modules of its own, such as what is above a cached trunk."""
        if self.head is None:
            return self
        return replace(self, head=replace(self.head, module=part.inner.get_output_embeddings()))

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """What holds during all forward and backward passes of a step."""
        with fused_lora(model) if self.fused else nullcontext():
            yield

    def counted(self, rows: Sequence[Any]) -> int:
        """What the loss of these rows is a sum over, and a step's is divided by: their answer tokens."""
        return sum(label != IGNORED for row in rows for label in row.labels[1:])

    def prepared(
        self,
        model: Any,
        rows: Sequence[Any],
        tokens: int,
        *,
        pad_id: int,
        device: torch.device,
        forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Sequence[Any]:
        """All rows of a step with what no micro-batch of it can know alone: nothing, of answers."""
        return rows

    def begin(self, model: Any) -> None:
        """Put the model into training mode; called before every step."""
        model.train()

    def loss(self, spec: RegularizeSpec) -> Loss:
        """What a batch of `laid` is scored by: the NLL of its answer tokens, with the regularizers of losses."""
        return TokenLoss(spec.label_smoothing, spec.r_drop)

    def measure(
        self, model: Any, rows: Sequence[Any], *, pad_id: int, device: torch.device, batch_size: int
    ) -> list[float]:
        """The summed loss of each row without gradients, in the order of `rows`."""
        return row_nll(model, rows, pad_id=pad_id, device=device, batch_size=batch_size)

    def measured_together(self, model: Any, rows: Sequence[Any], batch_size: int) -> list[list[int]]:
        """Indices of the rows that `measure` takes at once."""
        return bounded(by_length(rows, batch_size), rows, model)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with where nothing is scored."""
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}

    def compared(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """What two models must agree in: the logits of all labels of a batch, of shape (labels, vocabulary)."""
        logits, wanted = label_logits(model, batch)
        learned = batch["labels"][:, 1:][:, wanted] != IGNORED  # the others may be padding in their row
        return logits[learned]

    def lays_flat(self, length: int) -> bool:
        """Whether a row of this length is laid flat."""
        return self.flat and (self.longest is None or length <= self.longest)

    def micro_batches(self, lengths: Sequence[int], tokens: int) -> list[tuple[list[int], bool]]:
        """Indices of rows for each micro-batch of at most `tokens` tokens, and whether it is laid flat."""
        extra = self.virtual_tokens
        if extra and lengths:
            tokens += extra * max(1, tokens // max(lengths))
        found = []
        for flat in (True, False):
            chosen = [index for index, length in enumerate(lengths) if self.lays_flat(length) is flat]
            # Some models go by the place in the call where a layer's window ends (Llama 4's temperature).
            most = min(tokens, self.longest) if flat and self.longest is not None else tokens
            for batch in split([lengths[index] + extra for index in chosen], most, flat=flat):
                found.append(([chosen[at] for at in batch], flat))
        return found

    @contextmanager
    def laid(
        self, model: Any, rows: Sequence[Labelled], *, flat: bool, pad_id: int, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """One micro-batch as the model is called with it, labels included; its passes belong inside."""
        if not flat:
            yield pad(rows, pad_id, device)
            return
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with attention_by_row(inner):
            yield lay_flat(rows, device, starts_on=place_of_starts(inner, device))


Found = TypeVar("Found", bound=Paths)


def told(found: Found, report: Report) -> Found:
    """Say which shortcuts are taken, and why others are not."""
    report(
        Decision(
            "passes", ", ".join(found.names) or "the model's own", "; ".join(found.reasons) or "tried: same results"
        )
    )
    return found
