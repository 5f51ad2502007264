"""How long a step, an evaluation and a run take: floating-point operations over what a device reaches of its rate.

Absolute times are a bracket, not a forecast: published runs of the same work on the same card differ by a factor of
two with kernels, host and driver. Ratios between two settings on one machine came out within a factor of 1.5 for half
of the published pairs, and of 2 for all (tests/planning/test_time.py). Padding is not counted: rows lie without it
where the base allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from peftkit.planning.architecture import Architecture
from peftkit.planning.devices import Device
from peftkit.planning.evaluation import answered_rows
from peftkit.planning.factors import products
from peftkit.planning.setting import PARTIAL, Setting
from peftkit.planning.tokens import micro_batch_tokens
from peftkit.planning.trained import Trained, recomputed_share, trained
from peftkit.planning.weights import trained_parameters, trained_size

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Seconds:
    """Seconds: at least `low`, probably `expected`, at most `high`."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def times(self, count: float) -> Seconds:
        """The same thing `count` times over."""
        return Seconds(self.low * count, self.expected * count, self.high * count)


@dataclass(frozen=True)
class Machine:
    """What a run computes on."""

    flops: float
    """FLOP/s of matrix products in the compute dtype: the vendor's of a card, measured of a CPU."""
    bandwidth: float
    """Bytes/s of its memory."""
    launches: bool = True
    """Whether a host starts each operation on another device, which takes time of its own."""


def gpu(device: Device, compute_dtype: str) -> Machine:
    """A card, by its vendor's figures."""
    return Machine(device.flops(compute_dtype), device.bandwidth)


def cpu(flops: float, bandwidth: float) -> Machine:
    """A CPU, by the FLOP/s of a matrix product and the bytes/s of a copy that the caller has measured."""
    return Machine(flops, bandwidth, launches=False)


class _Reached(NamedTuple):
    """What a run reaches of a machine, in one of the three cases."""

    compute: float
    """Share of the rate of matrix products."""
    dequantization: float
    """Share of the bandwidth while quantized weights are unpacked."""
    stream: float
    """Share of the bandwidth in the optimizer's update and in decoding."""
    launch: float
    """Seconds in which a host starts one pass through one block."""
    link: float
    """Bytes/s between device and host memory."""


# Fitted on one source, the table of Qwen(-1)'s README for a 7B base on an A100 80 GB (time per iteration at 256 to
# 8192 tokens). LoRA: 47 % of the rate is the mean of 1024 to 8192 tokens (41, 45, 49 and 51 %); at 256 tokens 23 %, and
# 1.56 ms a block and pass, which is the host. Q-LoRA minus LoRA: the median row unpacks with 13 % of the bandwidth, the
# slowest with 11 %. Nothing beats the vendor's rate; a slow host needs twice the time. `stream` and `link` (PCIe 3.0
# x16 expected, 4.0 x16 at best, x8 at worst) are in no table and are taken from what such copies usually reach.
_LOW = _Reached(compute=1.0, dequantization=1.0, stream=1.0, launch=0.0, link=25e9)
_EXPECTED = _Reached(compute=0.47, dequantization=0.134, stream=0.8, launch=1.56e-3, link=12e9)
_HIGH = _Reached(compute=0.235, dequantization=0.111, stream=0.4, launch=3.12e-3, link=6e9)

_DORA = 1191 / 942
"""Time of DoRA over LoRA's, PEFT's method comparison (Llama-3.2-3B, L40S, r 32)."""

# Times that an update reads or writes one number per trained parameter. PyTorch's plain AdamW runs eight passes (decay,
# two moments, root, ...), its fused one a single pass; clipping the gradient reads it once and scales it once.
_UPDATE = {"adamw_torch": 21 + 3, "adamw_torch_fused": 7 + 3, "sgd": 3 + 3, "adamw_8bit": 4 + 3, "paged_adamw_8bit": 7}


@dataclass(frozen=True)
class Workload:
    """How much a run does."""

    steps: int
    tokens_per_row: float
    """Mean tokens of a training row."""
    passes: int = 1
    """How often the held-out rows are measured: by base and adapter, and in mid-run."""
    held_out_rows: int = 0
    """Rows whose NLL is measured in each pass."""
    held_out_tokens: float = 0.0
    """Mean tokens of such a row."""
    answers: int = 0
    """Answers generated in all, each as long as the setting allows."""
    tokens_before: float = 0.0
    """Tokens that are read once before the first step: into a trunk's cache, or for what the base gives them."""
    read_besides: float = 0.0
    """Tokens that a step reads besides for every row, without gradients: KTO's answers to other prompts."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of one optimizer step, of all measuring, and of the whole run without loading and saving."""

    step: Seconds
    measuring: Seconds
    total: Seconds


def plan_time(architecture: Architecture, setting: Setting, machine: Machine, workload: Workload) -> TimePlan:
    """The time of a run. Without a held-out row or an answer measuring takes no time."""

    def read(rows: float, tokens: float) -> Seconds:
        work = Workload(0, 0.0, held_out_rows=math.ceil(rows), held_out_tokens=tokens)
        return measuring_seconds(architecture, setting, machine, work)

    step = step_seconds(architecture, setting, machine, workload.tokens_per_row)
    if workload.read_besides:
        step += read(setting.rows_per_step, workload.read_besides)
    measuring = measuring_seconds(architecture, setting, machine, workload)
    total = step.times(workload.steps) + measuring
    if workload.tokens_before:
        total += read(workload.tokens_before / workload.tokens_per_row, workload.tokens_per_row)
    return TimePlan(step, measuring, total)


def step_seconds(
    architecture: Architecture, setting: Setting, machine: Machine, tokens_per_row: float | None = None
) -> Seconds:
    """Seconds of one optimizer step; rows have `tokens_per_row` tokens, or as many as the longest."""
    length = setting.longest if tokens_per_row is None else tokens_per_row
    low, expected, high = (case.step(length) for case in _cases(architecture, setting, machine))
    slower = _DORA if setting.method == "dora" else 1.0
    return Seconds(low, expected * slower, high * slower)


def measuring_seconds(architecture: Architecture, setting: Setting, machine: Machine, workload: Workload) -> Seconds:
    """Seconds of all measuring: forward passes over the held-out rows, and answers token by token."""
    cases = _cases(architecture, setting, machine)
    low, expected, high = (case.measure(workload) + case.answer(workload.answers) for case in cases)
    return Seconds(low, expected, high)


def training_flops(architecture: Architecture, setting: Setting, length: float) -> float:
    """FLOP per token of a row of `length` tokens, forward and backward.

    With N parameters in products and P in the adapter: 6N for full fine-tuning, 4N + 6P for LoRA, whose frozen weights
    have no gradient of their own; checkpointing computes the blocks' forward pass again (the head has none). Causal
    attention adds 2 * length * width of the queries for every layer and pass (half of 4 * length * width). Blocks below
    the lowest trained tensor have a forward pass and nothing else.
    """
    what = trained(architecture, setting)
    blocks, head, attention = _products(architecture, length)
    head *= min(1.0, setting.labelled / setting.longest)  # the head is computed where there are labels
    reached = 1 - what.lowest / architecture.layers
    adapter, factors = (0, 0) if setting.method in PARTIAL else products(architecture, setting, what)
    own = _trained_share(architecture, what) * blocks
    if what.head or architecture.task or (what.embedding and architecture.tied):
        own += head
    passed = reached if setting.trunk_cache else 1.0
    forward = 2 * (blocks * passed + head + adapter) + attention * passed
    backward = 2 * (blocks * reached + head + adapter) + 2 * (own + factors) + 2 * attention * reached
    again = ((2 * blocks + attention) * reached + 2 * adapter) * recomputed_share(architecture, setting)
    return forward + backward + again


def _trained_share(architecture: Architecture, what: Trained) -> float:
    """The share of the blocks' products whose weight is trained."""
    layers = architecture.layers
    if all(block.experts for block in what.blocks):
        return 1.0
    total = architecture.linear_parameters
    return (
        sum(linear.parameters * what.share(linear.name, "weights") / layers for linear in architecture.linears) / total
    )


def _cases(architecture: Architecture, setting: Setting, machine: Machine) -> Iterator[_Case]:
    return (_Case(architecture, setting, machine, reached) for reached in (_LOW, _EXPECTED, _HIGH))


@dataclass(frozen=True)
class _Case:
    """Seconds, if the machine reaches this much."""

    architecture: Architecture
    setting: Setting
    machine: Machine
    reached: _Reached

    def step(self, length: float) -> float:
        """One optimizer step over rows of `length` tokens, in the fewest micro-batches that hold them."""
        setting, tokens = self.setting, self.setting.rows_per_step * length
        micro_batches = math.ceil(tokens / micro_batch_tokens(setting))
        flops = training_flops(self.architecture, setting, length) * tokens / micro_batches
        micro_batch = self._passes(flops, 2 + recomputed_share(self.architecture, setting))
        if setting.activation_offloading:
            micro_batch += 2 * _kept_bytes(self.architecture, setting) * tokens / micro_batches / self.reached.link
        return micro_batches * micro_batch + self._moved(_updated_bytes(self.architecture, setting))

    def measure(self, workload: Workload) -> float:
        """The NLL of all held-out rows, in every pass over them."""
        if not workload.held_out_rows:
            return 0.0
        batches = math.ceil(workload.held_out_rows / self.setting.evaluation_batch)
        rows = workload.held_out_rows / batches
        return workload.passes * batches * self._passes(self._forward_flops(workload.held_out_tokens, rows), 1)

    def answer(self, answers: int) -> float:
        """Prompts go through once; then every token reads all weights, and the keys and values before it."""
        if not answers or not self.setting.max_new_tokens:
            return 0.0
        setting, shape = self.setting, self.architecture
        batches = math.ceil(answers / answered_rows(setting))
        rows = answers / batches
        prompt = self._passes(self._forward_flops(setting.evaluation_longest, rows), 1)
        before = setting.evaluation_longest + setting.max_new_tokens / 2
        cache = 2 * shape.layers * shape.keys * _BYTES[setting.compute_dtype] * before * rows
        flops = self._forward_flops(setting.evaluation_longest, rows) / setting.evaluation_longest
        # bitsandbytes multiplies one row by packed weights; more rows by unpacked ones
        token = self._passes(flops, 1, unpacked=rows > 1) + self._moved(cache)
        return batches * (prompt + setting.max_new_tokens * token)

    def _forward_flops(self, length: float, rows: float) -> float:
        blocks, head, attention = _products(self.architecture, length)
        adapter = 0
        if self.setting.method not in PARTIAL:
            adapter, _ = products(self.architecture, self.setting, trained(self.architecture, self.setting))
        return (2 * (blocks + head + adapter) + attention) * length * rows

    def _passes(self, flops: float, passes: float, unpacked: bool = True) -> float:
        """So many passes through the base: its products, or reading every weight, or starting every operation."""
        shape, width = self.architecture, _BYTES[self.setting.compute_dtype]
        packed = min(width, self.setting.bits / 8)
        others = shape.parameters - shape.linear_parameters
        reading = self._moved(passes * (shape.linear_parameters * packed + others * width))
        starting = passes * shape.layers * self.reached.launch if self.machine.launches else 0.0
        seconds = max(flops / (self.machine.flops * self.reached.compute), reading, starting)
        if packed < width and unpacked:  # again in every pass: packed bytes are read, the products' dtype is written
            moved = passes * shape.linear_parameters * (packed + width)
            seconds += moved / (self.machine.bandwidth * self.reached.dequantization)
        return seconds

    def _moved(self, count: float) -> float:
        return count / (self.machine.bandwidth * self.reached.stream)


def _products(architecture: Architecture, length: float) -> tuple[float, float, float]:
    """Parameters that a token meets in the blocks' products and in the head's, and FLOP of attention forward."""
    blocks = float(architecture.linear_parameters)
    if experts := architecture.experts:
        matrices = experts.per_token * 3 * experts.intermediate + experts.count
        blocks += experts.layers * architecture.hidden * matrices
    head = float(architecture.outputs * architecture.hidden)
    return blocks, head, 2.0 * length * architecture.queries * architecture.layers


def _kept_bytes(architecture: Architecture, setting: Setting) -> float:
    """Bytes per token that wait for the backward pass: a block's input, or what its operations keep.

    12h + 3 * queries + keys + 3 * intermediate per block, as fitcheck measured it on a T4.
    """
    shape = architecture
    kept = 12 * shape.hidden + 3 * shape.queries + shape.keys + 3 * shape.intermediate
    again = recomputed_share(shape, setting)
    return shape.layers * _BYTES[setting.compute_dtype] * (again * shape.hidden + (1 - again) * kept)


def _updated_bytes(architecture: Architecture, setting: Setting) -> float:
    """Bytes that the optimizer's update reads and writes."""
    return trained_parameters(architecture, setting) * trained_size(setting) * _UPDATE[setting.optim]
