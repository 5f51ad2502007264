"""The base's tensor as a matrix that is read some rows at a time."""

from __future__ import annotations

import math

import numpy as np
import torch

from peftkit.base.dense import Dense
from peftkit.base.raw import Stored
from peftkit.deltas.merging.layout import TORCH
from peftkit.deltas.merging.workspace import WORKSPACE
from peftkit.errors import BaseError, DeltaError


class Source:
    """Rows of one tensor; rows below the last one that the base has are zeros (a vocabulary that grew)."""

    def __init__(self, name: str, dense: Dense, matrix: tuple[int, int]) -> None:
        """Read `dense` as `matrix` (rows, columns). Raises DeltaError when its rows have another width."""
        self._dense, self.matrix = dense, matrix
        size = math.prod(dense.shape)
        self._rows = size // matrix[1] if matrix[1] else 0
        if self._rows * matrix[1] != size:
            raise DeltaError(
                f"{name} has the shape {dense.shape} in the base and rows of {matrix[1]} numbers in the delta"
            )
        if isinstance(dense, Stored):
            dense.part(0, 0)  # checks dtype and length

    @property
    def dtype(self) -> torch.dtype:
        """Of `stored`."""
        return TORCH[self._dense.dtype]

    def stored(self, first: int, last: int, buffer: str = "") -> torch.Tensor:
        """Rows in the dtype that they are stored in (dequantized ones: in the dtype they were quantized from).

        They may lie in the workspace's buffer of that name, if one is named.
        """
        columns = self.matrix[1]
        end = min(last, self._rows)
        found = self._read(min(first, end) * columns, end * columns, buffer).view(-1, columns)
        if end < last:
            found = torch.cat([found, found.new_zeros(last - max(first, end), columns)])
        return found

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows in float64."""
        return self.stored(first, last).double()

    def _read(self, first: int, last: int, buffer: str) -> torch.Tensor:
        dense = self._dense
        if not isinstance(dense, Stored):
            return torch.from_numpy(np.require(dense.part(first, last), requirements="W")).to(self.dtype)
        size = (last - first,)
        found = WORKSPACE.take(buffer, size, self.dtype) if buffer else torch.empty(size, dtype=self.dtype)
        target = memoryview(found.view(torch.uint8).numpy())
        with open(dense.path, "rb", buffering=0) as file:
            file.seek(dense.start + first * self.dtype.itemsize)
            while target:
                count = file.readinto(target)
                if not count:
                    raise BaseError(f"{dense.path} became shorter while it was read", hint="fetch it again")
                target = target[count:]
        return found
