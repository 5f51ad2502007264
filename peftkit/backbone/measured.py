"""Is bfloat16 faster than float32 on this CPU: the products of one block, timed in both for at most a second.

Processors differ widely here: bfloat16 units (AMX) multiply several times as fast as float32's, and without them every
product is converted first. Names and version numbers do not tell; doing it does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.backbone.spec import Dtype
from peftkit.errors import BaseError
from peftkit.planning.architecture import architecture
from peftkit.process_group import launched

GAIN = 1.2
"""How many times as fast bfloat16 must be to be chosen: below it the rounding buys too little."""
TOKENS = 512
"""Tokens at once, where the time allows: about a micro-batch."""
LARGEST = 2048 * 5632
"""Numbers of the widest matrix that is timed, that of a 1B base: two cores are at their peak with it."""
SECONDS = 1.0
FEWEST_ROUNDS = 3
"""Medians of fewer decide nothing."""
_FEWEST, _ROUNDS = 16, 9
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Block:
    """Widths of one block of a decoder."""

    hidden: int
    intermediate: int

    def cut(self) -> Block:
        """The same in multiples of 64, and in proportion no wider than `LARGEST`."""
        scale = min(1.0, (LARGEST / (self.hidden * self.intermediate)) ** 0.5)
        return Block(*(max(64, int(width * scale) // 64 * 64) for width in (self.hidden, self.intermediate)))


TYPICAL = Block(576, 1536)
"""SmolLM2-135M's: for a base whose config names no widths, and for `peftkit doctor`."""


@dataclass(frozen=True)
class Timing:
    """Seconds that one block's products took forward and backward, `tokens` at once: medians over `rounds`."""

    float32: float
    bfloat16: float
    block: Block
    tokens: int
    rounds: int

    @property
    def gain(self) -> float:
        """How many times as fast bfloat16 was."""
        return self.float32 / self.bfloat16

    @property
    def faster(self) -> bool:
        """Whether bfloat16 is to be chosen; never after too few rounds to tell."""
        return self.rounds >= FEWEST_ROUNDS and self.gain >= GAIN

    @property
    def text(self) -> str:
        """Both figures: `float32 20.1 ms, bfloat16 7.2 ms (2.8 × as fast), 512 tokens through …`."""
        return (
            f"float32 {self.float32 * 1e3:.1f} ms, bfloat16 {self.bfloat16 * 1e3:.1f} ms ({self.gain:.1f} × as fast), "
            f"{self.tokens} tokens through a block's products "
            f"({self.block.hidden} × {self.block.intermediate}) and back"
        )


Measure = Callable[[], Timing]


def block_of(config: Mapping[str, Any]) -> Block:
    """The widths of a base's blocks from its config.json; `TYPICAL` where it names none that are known."""
    try:
        shape = architecture(dict(config))
    except BaseError:
        return TYPICAL
    return Block(shape.hidden, shape.intermediate)


def measured_dtype(bits: int, measure: Measure) -> tuple[Dtype, str]:
    """The compute dtype that `measured` means on a CPU, and the reason with both figures.

    Nothing is measured for 32 bits, nor in a run of several processes, which could find different dtypes.
    """
    if bits == 32:
        return "float32", "32 bits asked for, which means float32: nothing was measured"
    if launched().size > 1:
        return "float32", "several processes might find different dtypes: not measured, set float32 or bfloat16"
    found = measure()
    if found.faster:
        return "bfloat16", f"measured: {found.text}"
    if found.rounds < FEWEST_ROUNDS:
        return "float32", f"measured: {found.text}; too slow for more than {found.rounds} rounds, which decide nothing"
    return "float32", f"measured: {found.text}; bfloat16 is chosen from {GAIN} × on"


def measure(block: Block = TYPICAL) -> Timing:
    """Time both dtypes on this machine with torch's present number of threads, once per process and block."""
    return _once(block.cut(), torch.get_num_threads())


@functools.cache
def _once(block: Block, threads: int) -> Timing:
    with torch.inference_mode(False), torch.enable_grad():  # whoever asks may be in the middle of an evaluation
        for dtype in _DTYPES:  # a process's first product of a dtype may take 0.3 s: libraries start
            passes(Block(64, 64), dtype)(_FEWEST)
        return timed(block, {dtype: passes(block, dtype) for dtype in _DTYPES})


def timed(
    block: Block,
    work: Mapping[torch.dtype, Callable[[int], None]],
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time `work` (a pass of so many tokens, by dtype) in turns, so that other programs disturb both alike.

    Tokens and rounds are what fits into `SECONDS`: a few tokens are tried first, and where even they take too long,
    they are the figure.
    """
    end = clock() + SECONDS
    tried = {dtype: _tried(run, clock) for dtype, run in work.items()}
    tokens = _FEWEST
    # Time grows with tokens at most in proportion: weights are read once whatever their number.
    while tokens < TOKENS and 3 * sum(tried.values()) * 2 * tokens / _FEWEST < end - clock():
        tokens *= 2
    taken: dict[torch.dtype, list[float]] = {dtype: [] for dtype in work}
    if tokens > _FEWEST:
        for round_ in range(_ROUNDS + 1):
            before = clock()
            for dtype, run in work.items():
                seconds = _seconds(run, tokens, clock)
                if round_:  # the first one of a shape chooses its kernels
                    taken[dtype].append(seconds)
            now = clock()
            if now + (now - before) > end:
                break
    rounds = len(taken[torch.float32])
    if not rounds:
        return Timing(tried[torch.float32], tried[torch.bfloat16], block, _FEWEST, 1)
    medians = {dtype: statistics.median(seconds) for dtype, seconds in taken.items()}
    return Timing(medians[torch.float32], medians[torch.bfloat16], block, tokens, rounds)


def passes(block: Block, dtype: torch.dtype) -> Callable[[int], None]:
    """Forward and backward to the input through a norm, hidden → hidden, hidden → intermediate, silu · up, and down.

    Weights are `dtype` of shape (out, in), the input is of shape (tokens, hidden).
    """
    hidden, wide = block.hidden, block.intermediate
    shapes = (hidden, hidden), (wide, hidden), (hidden, wide)
    square, up, down = (torch.full(shape, 0.01, dtype=dtype) for shape in shapes)
    gain = torch.ones(hidden, dtype=dtype)
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

    def run(tokens: int) -> None:
        x = torch.ones(tokens, hidden, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            risen = linear(linear(_norm(x, gain), square), up)
            y = linear(silu(risen) * risen, down)
        torch.autograd.grad(y, x, torch.ones_like(y))

    return run


def _norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """RMSNorm as transformers writes Llama's: in float32, whatever comes in."""
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _tried(run: Callable[[int], None], clock: Callable[[], float]) -> float:
    """Seconds for a few tokens, without what the first call of a shape costs alone (38 ms against 4)."""
    first = _seconds(run, _FEWEST, clock)
    return first if first > SECONDS / 2 else min(first, _seconds(run, _FEWEST, clock))


def _seconds(run: Callable[[int], None], tokens: int, clock: Callable[[], float]) -> float:
    start = clock()
    run(tokens)
    return clock() - start
