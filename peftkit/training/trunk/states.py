"""The states of rows, found by the rows' token ids: whoever calls the top need not say which rows a batch holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftkit.errors import TrainingError
from peftkit.training.trunk.passes import Index, row_key


@dataclass(frozen=True)
class States:
    """What enters the lowest trained block, of every row of an index."""

    index: Index
    values: torch.Tensor
    """Shape (positions, hidden), on the CPU; mapped from a file, or in memory."""

    def of(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States of shape (rows, longest, hidden) on the device of `input_ids`; zeros where a row is padded.

        The arguments have the shape (rows, longest), padded on the right. Raises TrainingError for a row that the
        index does not hold.
        """
        ids, lengths = input_ids.to("cpu", torch.int64), attention_mask.sum(dim=1).tolist()
        found = torch.zeros(*ids.shape, self.values.shape[1], dtype=self.values.dtype)
        types = ids[:, :0] if token_type_ids is None else token_type_ids.to("cpu", torch.int64)
        for row, kinds, length, into in zip(ids, types, lengths, found, strict=True):
            start = self.index.starts.get(row_key(row[:length].numpy().tobytes(), kinds[:length].numpy().tobytes()))
            if start is None:
                raise TrainingError(
                    f"a row of {length} tokens has no states in the trunk cache",
                    expected="rows of this run's steps and held-out rows, padded on the right",
                )
            into[:length] = self.values[start : start + length]
        return found.to(input_ids.device)
