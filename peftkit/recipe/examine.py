"""`peftkit doctor --gpu`: what this card computes, needs and reaches, in five minutes, as one record to keep."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from peftkit.backbone.decide import optimizer
from peftkit.backbone.load import load_backbone
from peftkit.backbone.locate import locate
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, LocatedBase, longest_sequence, read_config
from peftkit.errors import BackboneError, PeftkitError
from peftkit.events import Note, Phase, Progress, Report, silent
from peftkit.planning.architecture import Architecture, architecture
from peftkit.recipe.card import Device, allocated, check_device, facts_of, free_bytes
from peftkit.recipe.oracle import BYTES_PER_PARAMETER, check_arithmetic, label_of
from peftkit.recipe.shapes import Shape, check_shape, check_weights, planned, settings
from peftkit.recipe.target import Target, this_machine
from peftkit.recipe.verdict import Check, failed, held, left_out, shown
from peftkit.render import size
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.holdings import held as tensors_of
from peftkit.training.memory import release
from peftkit.training.sft import Stopped, train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

SECONDS = 240.0
"""After so long nothing new is begun."""
BITS = (4, 8, 16)
ARITHMETIC, SPEED = "arithmetic", "plan and speed"
LENGTHS: dict[Device, tuple[int, int]] = {"cuda": (256, 1024), "cpu": (32, 128)}
ROWS: dict[Device, int] = {"cuda": 4, "cpu": 2}
ORACLE = Shape(rows=2, length=32, checkpointing=False)
RATE = 2e-4
ADAPTER = AdapterSpec()
KEPT: dict[Device, tuple[int, str]] = {
    "cuda": (64 << 20, "cuBLAS keeps up to 32 MiB for each thread that multiplies, and autograd has one of its own"),
    "cpu": (4096, "bitsandbytes keeps its tables of codes"),
}
"""Bytes that libraries keep when a base is gone, and why."""
GIVEN_BACK = "not given back"


@dataclass
class Examination:
    """Everything that was found, check by check."""

    device: Device
    base: LocatedBase
    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return failed(self.checks)

    def as_record(self) -> dict[str, Any]:
        """As plain JSON values, without a path or a name of this machine."""
        return {
            "format": 1,
            "device": self.device,
            "base": self.base.portable,
            "revision": self.base.revision,
            "facts": self.facts,
            "seconds": round(self.seconds, 1),
            "failed": [check.name for check in self.failed],
            "left_out": [check.name for check in self.checks if check.state == "left out"],
            "checks": [asdict(check) for check in self.checks],
        }


def examine(
    base: BaseSpec, cache: Path, device: Device = "cuda", *, seconds: float = SECONDS, report: Report = silent
) -> Examination:
    """Check arithmetic, optimizer, plan and speed on a base, in NF4, int8 and 16 bits.

    Begins nothing new after `seconds`, and names what was left out. Raises BackboneError without a CUDA device for
    `cuda` or for a base that is quantized already, BaseError for one that cannot be had or planned.
    """
    check_device(device)
    located = locate(base, cache, report)
    config = read_config(located.folder)
    _check_plain(config, located.source)
    found = Examination(device, located, facts_of(device))
    visit = _Visit(found, architecture(config), base, cache, time.monotonic(), seconds)
    tasks = list(visit.tasks())
    report(Phase("examine", len(tasks), "checks"))
    for done, (what, of, task) in enumerate(tasks, 1):
        found.checks += visit.in_time(what, of, task)
        report(Progress(done, {}))
    found.seconds = time.monotonic() - visit.started
    report(Note(f"{len(found.checks)} figures in {found.seconds:.0f} s"))
    return found


@dataclass
class _Visit:
    """One examination while it goes on."""

    found: Examination
    architecture: Architecture
    base: BaseSpec
    cache: Path
    started: float
    seconds: float

    def tasks(self) -> Iterator[tuple[str, str, Callable[[], list[Check]]]]:
        """What there is to do, the most telling first: time may run out."""
        for bits in BITS:
            for dtype in _dtypes(self.found.device):
                yield ARITHMETIC, f"{bits} bits, {dtype}", partial(self.arithmetic, bits, dtype)
        yield "optimizer", "4 bits", self.optimizer
        for bits in BITS:
            yield SPEED, f"{bits} bits", partial(self.shapes, bits)

    def in_time(self, what: str, of: str, task: Callable[[], list[Check]]) -> list[Check]:
        """Do it, unless time or memory is up; then say so."""
        if self.is_over():
            return [left_out(what, of, self.over)]
        before, free = allocated(self.device), free_bytes(self.device)
        try:
            checks = task()
        except Exception as error:  # a doctor reports what is broken instead of failing on it
            checks = [_broken(what, of, error)]
        release(self.device)
        left = allocated(self.device) - before
        bound, source = KEPT[self.found.device]
        hint = "a process that loads several bases in turn will run out of memory; attach the file to an issue"
        checks.append(held(GIVEN_BACK, f"{what}, {of}", left, "bytes", high=bound, source=source, hint=hint))
        if self.device.type == "cuda":  # paged states are not the allocator's: bitsandbytes 0.50.2 keeps them for good
            taken = free - free_bytes(self.device)
            checks.append(
                shown("taken from the driver", f"{what}, {of}", taken, "bytes", source="kernels, paged states")
            )
        return checks

    @property
    def over(self) -> str:
        """Why something is left out."""
        return f"{self.seconds:.0f} s were over"

    def is_over(self) -> bool:
        return time.monotonic() - self.started > self.seconds

    @property
    def device(self) -> torch.device:
        return torch.device(self.found.device)

    def arithmetic(self, bits: int, dtype: str) -> list[Check]:
        """The gradient oracle, and evaluation against training."""
        need, free = BYTES_PER_PARAMETER * self.architecture.parameters, psutil.virtual_memory().available
        if need > free:
            why = f"its float64 twin needs {size(need)} of host memory, and {size(free)} are free; try a smaller --base"
            return [left_out(ARITHMETIC, f"{bits} bits, {dtype}", why)]
        tuned = self.tuned(QuantSpec(bits=bits, device=self.found.device, compute_dtype=dtype))  # type: ignore[arg-type]
        return check_arithmetic(tuned, ORACLE.examples(self.architecture.vocabulary))

    def optimizer(self) -> list[Check]:
        """One real step of training in NF4 with the optimizer that runs take here: on a card, paged 8-bit AdamW."""
        tuned = self.tuned(QuantSpec(bits=4, device=self.found.device))
        name = optimizer(tuned.backbone.device, quantized=True).choice
        spec = TrainSpec(
            max_steps=1,
            per_device_train_batch_size=ORACLE.rows,
            optim=name,  # type: ignore[arg-type]
            learning_rate=RATE,
            lr_scheduler_type="constant",
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                train(tuned, ORACLE.examples(self.architecture.vocabulary), spec, Path(folder))
            except Stopped:
                raise KeyboardInterrupt from None
        moved = [p.detach().abs().flatten() for n, p in tuned.trainable.items() if "lora_B" in n]  # it was zero
        return [
            held(
                f"first step of {name}",
                label_of(tuned),
                float(torch.cat(moved).median()) / RATE,
                "learning rates",
                low=0.99,
                high=1.01,
                expected=1.0,
                source="Adam's first step is the rate times the gradient's sign (arXiv 1412.6980, section 2.1)",
                hint="train with train.optim=adamw_torch on this card, and attach the file to an issue of peftkit",
            )
        ]

    def shapes(self, bits: int) -> list[Check]:
        """Weights, then every shape that there is time for."""
        quant = QuantSpec(bits=bits, device=self.found.device)  # type: ignore[arg-type]
        target = this_machine(quant)
        before = allocated(self.device)
        tuned = self.tuned(quant)
        checks = [self._loaded(tuned, target, before)]
        for shape in _shapes(self.found.device, longest_sequence(read_config(self.found.base.folder))):
            if self.is_over():
                checks.append(left_out(SPEED, shape.name(label_of(tuned)), self.over))
            else:
                checks += check_shape(tuned, shape, self.architecture, target, before)
        return checks

    def _loaded(self, tuned: Tuned, target: Target, before: int) -> Check:
        adapter = sum(parameter.nbytes for parameter in tuned.trainable.values())
        if self.device.type == "cuda":
            measured = allocated(self.device) - before - adapter
        else:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(tuned.model)}
            measured = sum(storages.values()) - adapter
        plan = planned(ORACLE, settings(tuned), self.architecture, target)
        return check_weights(plan, self.architecture, label_of(tuned), measured)

    def tuned(self, quant: QuantSpec) -> Tuned:
        """The base as `quant` has it, with a fresh adapter."""
        return inject(load_backbone(self.base, quant, self.cache, located=self.found.base), ADAPTER)


def _shapes(device: Device, longest: int | None) -> Iterator[Shape]:
    """Both lengths, without and with checkpointing, within what the base can read."""
    for length in LENGTHS[device]:
        for checkpointing in (False, True):
            yield Shape(ROWS[device], min(length, (longest or length) - 16), checkpointing)


def _dtypes(device: Device) -> Sequence[str]:
    """float32 shows wrong arithmetic at its sharpest; bfloat16 is what runs use where there is bfloat16."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return ("float32",)
    return ("float32", "bfloat16")


def _check_plain(config: dict[str, Any], source: str) -> None:
    if config.get("quantization_config"):
        raise BackboneError(
            f"{source} is quantized already, so it cannot be held in all of {', '.join(map(str, BITS))} bits",
            expected="a 16- or 32-bit upload",
            hint="leave --base out: the embedded base will do",
        )


def _broken(what: str, of: str, error: Exception) -> Check:
    fact = error.fact if isinstance(error, PeftkitError) else f"{type(error).__name__}: {error}"
    if is_out_of_memory(error.__cause__ or error):
        return left_out(what, of, f"out of memory: {fact}")
    hint = "this part does not work here: peftkit doctor shows more; attach the file to an issue of peftkit"
    return Check(what, of, None, "", "failed", source=fact, hint=hint)
