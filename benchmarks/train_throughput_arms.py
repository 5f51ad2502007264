"""What one process of `train_throughput.py` does: load, train by one of the arms, and measure; or find the ceiling."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import psutil
import torch
from torch import nn
from train_throughput_llamafactory import llamafactory
from train_throughput_profile import StepProfile
from train_throughput_rows import about, chosen
from trl_arms import trl_train

from peftkit import locations
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.events import Decision, Event, Report
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.memory import peak_bytes
from peftkit.training.passes.trying import paths_for
from peftkit.training.schedule import schedule
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.trainer import Log
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

R, ALPHA, RATE, STEP_ROWS = 16, 32, 1e-4, 8
SHORTCUTS: dict[str, dict[str, Any]] = {
    "head": {"head": None},
    "flat": {"flat": False},
    "fused": {"fused": False},
}
"""What `without` takes away: the head in chunks, rows without padding, LoRA's products in one.

Without the head in chunks, all logits at the labels are held at once; a model that takes `logits_to_keep` computes no
others then either.
"""
_CEILING_TOKENS = (512, 1024, 2048)
_MARGIN = 0.9
"""Of the memory that is free: beyond it an allocation fails, before the system ends a process of its own choice."""


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """One setting: `arm` is peftkit, trl, llamafactory or ceiling; `bits`, `rows` and `training` say the rest.

    Token rates count no padding. `tokens_per_second` is that of the steps after the first, `whole` that of all from the
    call on. `peak_bytes` is the process's above what it had with all libraries imported, loading included. An arm that
    the memory does not suffice for, or that its library refuses, has `refused` with the reason in place of figures.
    """
    imported = _imported_bytes()
    _limit_memory()
    try:
        backbone = load_backbone(BaseSpec(), QuantSpec(bits=setting["bits"]), locations.cache_root().path)
        if setting["arm"] == "ceiling":
            return ceiling(backbone.model)
        loaded = peak_bytes(torch.device("cpu"))
        rows = chosen(setting["rows"], backbone)
        if setting["arm"] == "llamafactory":
            return {**about(rows), **llamafactory(setting["python"], backbone, in_order(rows), RATE, R, ALPHA)}
        arms: dict[str, Callable[..., dict[str, Any]]] = {"peftkit": _ours, "trl": _theirs}
        figures = arms[setting["arm"]](backbone, rows, setting)
    except (RuntimeError, MemoryError, ValueError, AssertionError) as error:
        if setting["arm"] in ("peftkit", "ceiling") and not is_out_of_memory(error):
            raise
        return {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    return {
        **about(rows),
        **figures,
        "peak_bytes": peak_bytes(torch.device("cpu")) - imported,
        "loaded_bytes": max(0, loaded - imported),
        "imported_bytes": imported,
        "threads": torch.get_num_threads(),
    }


def ceiling(model: Any) -> dict[str, Any]:
    """The fastest matrix products of the base's own shapes, and the training tokens a second that they would allow.

    A pass multiplies some tokens with the weight of every linear layer and of the head, forwards and as the gradient
    of the input: 4 FLOP per weight and token, as frozen weights ask for. LoRA's products, attention and all else come
    on top, so no training reaches it with a loss on all tokens; one that spares the head's products of tokens without
    a loss may come closer.
    """
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    numbers = sum(weight.numel() for weight in weights)
    rates = {}
    for tokens in _CEILING_TOKENS:
        spans = [_products(weights, tokens) for _ in range(3)]
        rates[str(tokens)] = round(4 * numbers * tokens / min(spans) / 1e9, 1)
    return {
        "gflop_per_second": rates,
        "linear_parameters": numbers,
        "tokens_per_second": round(max(rates.values()) * 1e9 / (4 * numbers), 1),
        "threads": torch.get_num_threads(),
    }


def same_start(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give every lora_A the same numbers in every arm: PEFT's distribution, drawn by the module's name."""
    for name, parameter in parameters:
        if "lora_A" in name:
            seed = zlib.crc32(name[name.index("layers.") :].replace(".default", "").encode())
            bound = sqrt(3) * sqrt(2 / 6) / sqrt(parameter.shape[1])  # kaiming_uniform_(a=sqrt(5)): 1 / sqrt(fan_in)
            drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 2 * bound - bound
            parameter.data = drawn.to(parameter.dtype)


def spec_of(setting: dict[str, Any]) -> TrainSpec:
    """Ours: 8 rows a step, no warm-up, a constant rate; `training` may say more."""
    fixed = {
        "num_train_epochs": 1, "per_device_train_batch_size": STEP_ROWS, "learning_rate": RATE, "save_steps": 10**6,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    return TrainSpec.model_validate({**fixed, **setting.get("training", {})})


def in_order(rows: list[Example]) -> list[Example]:
    """The rows as our schedule has them, for arms that take them one after another."""
    return [rows[index] for step in schedule(rows, spec_of({})).steps for index in step]


def _ours(backbone: Backbone, rows: list[Example], setting: dict[str, Any]) -> dict[str, Any]:
    """Train with peftkit."""
    tuned = inject(backbone, AdapterSpec(method="lora", r=R, lora_alpha=ALPHA, lora_dropout=0.0))
    same_start(tuned.trainable.items())
    spec, profiled = spec_of(setting), _profile(backbone, setting)
    steps: list[tuple[float, float, float, float]] = []
    events: list[Event] = []

    def log(step: int, figures: dict[str, float]) -> None:
        if "loss" in figures:
            steps.append((time.perf_counter(), figures["loss"], figures["tokens"], figures["answer_tokens"]))
            if profiled:
                profiled.step_ended()

    began = time.perf_counter()
    _run(tuned, rows, spec, setting.get("without", []), events.append, log)
    said = {event.what: event.choice for event in events if isinstance(event, Decision)}
    return {**_figures(began, time.perf_counter(), steps, profiled), "decisions": said}


def _theirs(backbone: Backbone, rows: list[Example], setting: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL, the rows in the order of our schedule."""
    profiled = _profile(backbone, setting)
    began = time.perf_counter()
    steps = trl_train(
        backbone, in_order(rows), setting["training"], same_start, RATE, R, ALPHA,
        (lambda: None) if profiled is None else profiled.step_ended,
    )  # fmt: skip
    return _figures(began, time.perf_counter(), steps, profiled)


def _run(tuned: Tuned, rows: list[Example], spec: TrainSpec, without: list[str], report: Report, log: Log) -> None:
    """Train with the shortcuts that are found to be right, but for those that an ablation goes without."""
    paths = paths_for(tuned, spec, report=report)
    for name in without:
        paths = replace(paths, **SHORTCUTS[name])
    with tempfile.TemporaryDirectory() as folder:
        train(tuned, rows, spec, Path(folder), paths=paths, report=report, log=log)


def _profile(backbone: Backbone, setting: dict[str, Any]) -> StepProfile | None:
    return StepProfile(backbone.model.get_output_embeddings().weight.shape[0]) if setting.get("profile") else None


def _figures(
    began: float, ended: float, steps: list[tuple[float, float, float, float]], profiled: StepProfile | None
) -> dict[str, Any]:
    """Rates and losses of the steps: each has when it ended, its mean loss, its tokens and its answer tokens."""
    times = [began, *(step[0] for step in steps)]
    spans = [later - earlier for earlier, later in pairwise(times)]
    tokens, answers = [step[2] for step in steps], [step[3] for step in steps]
    result: dict[str, Any] = {
        "steps": len(steps),
        "whole": round(sum(tokens) / (ended - began), 2),
        "seconds": [round(span, 3) for span in spans],
        "step_tokens": [int(count) for count in tokens],
        "loss": round(sum(step[1] * step[3] for step in steps) / sum(answers), 5),
        "step_loss": [round(step[1], 5) for step in steps],
        "trained_tokens": int(sum(tokens)),
        "trained_answer_tokens": int(sum(answers)),
    }
    if len(steps) > 1:
        result["tokens_per_second"] = round(sum(tokens[1:]) / sum(spans[1:]), 2)
    if profiled:
        result["profile"] = profiled.result()
    return result


def _products(weights: list[torch.Tensor], tokens: int) -> float:
    """Seconds of one pass; inputs of a width are drawn once, before."""
    widths = {width for weight in weights for width in weight.shape}
    inputs = {width: torch.randn(tokens, width) for width in widths}
    with torch.inference_mode():
        began = time.perf_counter()
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
            inputs[weight.shape[0]] @ weight
        return time.perf_counter() - began


def _imported_bytes() -> int:
    """This process's own peak with all libraries imported and nothing loaded.

    A fork does not count the pages of files, such as a library's code, until it touches them itself: what it touches
    later stays in the peak, in every arm.
    """
    return peak_bytes(torch.device("cpu"))


def _limit_memory() -> None:
    """Let an allocation beyond the free memory fail; on Linux, where the limit counts what is written to."""
    if sys.platform == "linux":
        with suppress(ValueError, OSError):
            data = psutil.Process().memory_info().data
            free = int(data + _MARGIN * psutil.virtual_memory().available)
            resource.setrlimit(resource.RLIMIT_DATA, (free, resource.getrlimit(resource.RLIMIT_DATA)[1]))
