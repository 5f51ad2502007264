"""A matrix as a quantized backbone computes with it, made from the 16- or 32-bit file that is loaded."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

from peftkit.backbone.roundtrip import Codes, Format, quantized
from peftkit.base.dense import Dense
from peftkit.base.raw import Array


class Simulated:
    """A `Dense` that reads a linear layer's weight, quantizes and dequantizes it: bitwise `dense_weight` of the layer.

    The codes are made at the first read and stay in memory with it: half a byte for each number, or one (int8). A
    matrix that the file has transposed is held whole.
    """

    storage = "simulated"

    def __init__(self, dense: Dense, form: Format, transposed: bool = False) -> None:
        self._dense, self._form, self._transposed = dense, form, transposed
        self._lock = threading.Lock()
        self._codes: Codes | None = None
        self._flat: torch.Tensor | None = None

    @property
    def dtype(self) -> str:
        """Of the numbers that are read."""
        names = {torch.bfloat16: "BF16", torch.float16: "F16"}
        return "F32" if self._form.code == "int8" else names.get(self._form.dtype, "F32")

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""
        return self._dense.shape

    def part(self, first: int = 0, last: int | None = None) -> Array:
        """Numbers `first` to `last` in row-major order, float32. Raises what `quantized` raises."""
        last = math.prod(self.shape) if last is None else last
        with self._lock:
            if self._codes is None:
                self._codes = self._quantized()
                if self._transposed:
                    whole = self._codes.rows(0, self.shape[1])
                    self._flat = whole.to(torch.float32).T.contiguous().view(-1)
        found: Array
        if self._flat is not None:
            found = self._flat[first:last].numpy()
            return found
        columns = self.shape[1]
        top = first // columns
        rows = self._codes.rows(top, -(-last // columns)).to(torch.float32)
        found = rows.view(-1)[first - top * columns : last - top * columns].numpy()
        return found

    def _quantized(self) -> Codes:
        height, width = self.shape
        if self._transposed:
            matrix = self._held(0, height).T
            return quantized(lambda first, last: matrix[first:last], (width, height), self._form)
        return quantized(self._held, (height, width), self._form)

    def _held(self, first: int, last: int) -> torch.Tensor:
        """Rows in the dtype that a backbone holds before it quantizes them."""
        width = self.shape[1]
        numbers = np.require(self._dense.part(first * width, last * width), requirements="W")
        return torch.from_numpy(numbers).view(last - first, width).to(self._form.dtype)
