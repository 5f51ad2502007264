"""Where the time of one optimizer step goes: torch.profiler's own CPU time, by kind of work.

`of one step` begins when the first step's gradients are there and ends with the second's, in every arm.
"""

from __future__ import annotations

import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

PARTS = ("products", "head products", "attention", "head elementwise", "elementwise", "dequantize", "optimizer", "rest")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_mkl_linear", "aten::mkldnn_linear")
_LOOKUPS = ("embedding", "index_select")
_TILE = 32768
"""Columns of logits that TRL 1.16's head computes at once (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)."""


class StepProfile:
    """Records what runs between the ends of the first and of the second step."""

    def __init__(self, vocabulary: int) -> None:
        self.wide = {vocabulary, _TILE, vocabulary % _TILE}
        """Sizes by which a tensor of logits is known."""
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.began = 0.0
        self.seconds: float | None = None
        self.steps = 0

    def step_ended(self) -> None:
        """Tell that a step ended."""
        self.steps += 1
        if self.steps == 1:
            self.profile.start()
            self.began = time.perf_counter()
        elif self.steps == 2:
            self.seconds = time.perf_counter() - self.began
            self.profile.stop()

    def result(self) -> dict[str, Any]:
        """Milliseconds by part; `rest` has what no operator of torch's accounts for, Python above all."""
        if self.seconds is None:
            raise RuntimeError(f"a profile needs 2 steps, and {self.steps} ended")
        spent = dict.fromkeys(PARTS, 0.0)
        for event in self.profile.events():
            spent[self._part(event)] += event.self_cpu_time_total / 1000
        spent["rest"] += max(0.0, 1000 * self.seconds - sum(spent.values()))
        return {
            "seconds": round(self.seconds, 3),
            "milliseconds": {part: round(value, 1) for part, value in spent.items()},
            "share": {part: round(value / sum(spent.values()), 3) for part, value in spent.items()},
        }

    def _part(self, event: Any) -> str:
        name: str = event.name
        above = list(_above(event))
        wide = not any(word in name for word in _LOOKUPS) and any(
            size in self.wide for shape in event.input_shapes or [] if isinstance(shape, list) for size in shape
        )
        if any(other.startswith("Optimizer.step") for other in (name, *above)):
            return "optimizer"
        if "attention" in name:
            return "attention"
        if name in _PRODUCTS:
            return "head products" if wide else "products"
        if name.startswith("bitsandbytes") or any(other.startswith("bitsandbytes") for other in above):
            return "dequantize"
        if name.startswith("aten::"):
            return "head elementwise" if wide else "elementwise"
        return "rest"


def _above(event: Any) -> Any:
    while (event := event.cpu_parent) is not None:
        yield event.name
