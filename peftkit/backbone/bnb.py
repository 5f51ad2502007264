"""The one door to bitsandbytes.

On CPUs with AVX512-BF16, importing bitsandbytes 0.50 fetches a compiled kernel from the Hub when the package `kernels`
is installed, and warns when it is not (`backends/cpu/ops.py`). peftkit runs no code from the Hub and does not use that
kernel, so the import happens with `kernels` out of reach.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    logger, absent = logging.getLogger("bitsandbytes"), object()
    before, level = sys.modules.get("kernels", absent), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


with _without_hub_kernels():
    from bitsandbytes import functional
    from bitsandbytes.autograd._functions import MatMul8bitFp
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

__all__ = ["Linear4bit", "Linear8bitLt", "MatMul8bitFp", "Params4bit", "functional"]
