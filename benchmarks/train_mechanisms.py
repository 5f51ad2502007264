"""What the training step was tried with, and what was dropped (docs/decisions/0017).

    python benchmarks/train_mechanisms.py

The embedded base, LoRA of rank 16 on all linear layers, 24 mixed rows (alpaca_en_demo) in steps of 8. Every run of
training has a process of its own:

- `tokens`: speed and peak memory by the tokens that go through the model at once;
- `without`: without one of the shortcuts (`training/passes/trying.py`), without all of them, and with a label at every
  token, which the head then has to see: what scoring answers alone is worth on a CPU, where TRL's head sees all tokens;
- `lora`: the products of a block's siblings (q, k, v; gate, up) as PEFT computes them, fused one by one, and as a group
  that reads its input once, forward and backward, in milliseconds;
- `compile`: norms and MLPs through torch.compile, over PEFT's own LoRA, to be compared with `without: fused`; the first
  step shows what compiling takes.

One JSON line per measurement, and benchmarks/results/train_mechanisms.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lab import Lab
from train_throughput_arms import ALPHA, R, spec_of
from train_throughput_rows import chosen, rows_setting

from peftkit import locations
from peftkit.atomic import replace_file
from peftkit.backbone.load import load_backbone
from peftkit.backbone.quiet import quiet
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.environment import environment
from peftkit.events import silent
from peftkit.training.memory import peak_bytes
from peftkit.training.passes.trying import paths_for
from peftkit.training.schedule import schedule
from peftkit.training.trainer import AnswerTrainer
from peftkit.tuning.fused import fused_lora
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec

RESULTS = Path(__file__).with_name("results") / "train_mechanisms.json"
TOKENS = (128, 512, 1024)
SIBLINGS = {"q, k, v": (576, (576, 192, 192)), "gate, up": (576, (1536, 1536))}
ROWS = 24
SHORTCUTS: dict[str, dict[str, Any]] = {
    "flat": {"flat": False},
    "head": {"head": None},
    "fused": {"fused": False},
}


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """One run of training: tokens a second after the first step, seconds of the first step, peak memory, mean loss."""
    imported = peak_bytes(torch.device("cpu"))
    backbone = load_backbone(BaseSpec(), QuantSpec(bits=setting["bits"]), locations.cache_root().path)
    rows = chosen(setting["rows"], backbone)
    if setting["all_labels"]:
        rows = [replace(row, labels=list(row.input_ids)) for row in rows]
    tuned = inject(backbone, AdapterSpec(method="lora", r=R, lora_alpha=ALPHA))
    spec, steps = spec_of({}), list[tuple[float, float, float]]()

    def log(step: int, figures: dict[str, float]) -> None:
        steps.append((time.perf_counter(), figures["tokens"], figures["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        paths = paths_for(tuned, spec)
        for name in setting["without"]:
            paths = replace(paths, **SHORTCUTS[name])
        trainer = AnswerTrainer(tuned, rows, schedule(rows, spec), spec, Path(folder), silent, log, paths=paths)
        trainer.journal.tokens_at_once = setting["tokens"]
        if setting["compile"]:
            for layer in tuned.inner.model.layers:
                for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                    part.compile(dynamic=True)
        began = time.perf_counter()
        with quiet():
            trainer.train()
    return {
        "tokens_per_second": round(sum(step[1] for step in steps[1:]) / (steps[-1][0] - steps[0][0]), 1),
        "first_step_seconds": round(steps[0][0] - began, 2),
        "peak_bytes": peak_bytes(torch.device("cpu")) - imported,
        "loss": round(sum(step[2] for step in steps) / len(steps), 5),
    }


def siblings(width: int, outs: Sequence[int], tokens: int = 512) -> dict[str, float]:
    """Milliseconds of forward and backward passes of LoRA layers that share their input, base products included."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = torch.nn.ModuleDict({f"m{at}": torch.nn.Linear(width, out, bias=False) for at, out in enumerate(outs)})
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(model)))
    layers = list(lora.base_model.model.values())
    x, slopes = drawn(1, tokens, width).requires_grad_(), [drawn(1, tokens, out) for out in outs]

    def each() -> None:
        torch.autograd.backward([layer(x) for layer in layers], slopes)

    weights = [layer.base_layer.weight for layer in layers]
    a = torch.cat([layer.lora_A["default"].weight.detach() for layer in layers])
    b = [layer.lora_B["default"].weight.detach() for layer in layers]
    flat, flat_slopes = x.detach()[0], [slope[0] for slope in slopes]

    def group() -> None:
        """By hand, without autograd: what a group could reach at best."""
        inner = flat @ a.t()
        for at, (weight, up) in enumerate(zip(weights, b, strict=True)):
            (flat @ weight.t()).addmm_(inner[:, at * R : (at + 1) * R], up.t(), alpha=ALPHA / R)
        by_inner = torch.cat([slope @ up for slope, up in zip(flat_slopes, b, strict=True)], 1).mul_(ALPHA / R)
        by_x = by_inner @ a
        for slope, weight in zip(flat_slopes, weights, strict=True):
            by_x.addmm_(slope, weight)
        by_inner.t() @ flat
        for at, slope in enumerate(flat_slopes):
            slope.t() @ inner[:, at * R : (at + 1) * R]

    found = {"peft": timed(each)}
    with fused_lora(lora):
        found["fused"] = timed(each)
    return {**found, "group": timed(group), "base alone": timed(lambda: _base(flat, flat_slopes, weights))}


def _base(x: torch.Tensor, slopes: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    for slope, weight in zip(slopes, weights, strict=True):
        x @ weight.t()
        slope @ weight


def timed(action: Callable[[], Any], times: int = 60) -> float:
    """Median milliseconds."""
    spans = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        spans.append(time.perf_counter() - began)
    return round(median(spans[times // 6 :]) * 1e3, 3)


def main() -> None:
    """Measure, and write."""
    file = RESULTS.with_suffix(".jsonl")
    lab = Lab(file, measure, None)
    plain = {"rows": rows_setting("mixed", ROWS), "bits": 32, "tokens": 512, "compile": False,
             "without": [], "all_labels": False}  # fmt: skip
    arms: dict[str, dict[str, dict[str, Any]]] = {
        "tokens": {str(tokens): {"tokens": tokens} for tokens in TOKENS},
        "without": {
            **{name: {"without": [name]} for name in SHORTCUTS},
            "all": {"without": list(SHORTCUTS)},
            "labels at answers alone": {"all_labels": True},
        },
        "compile": {"norms and MLPs": {"compile": True, "without": ["fused"]}},
    }
    record: dict[str, Any] = {
        part: {name: lab.run(f"{part} {name}", {**plain, **changes}) for name, changes in some.items()}
        for part, some in arms.items()
    }
    record["lora"] = {name: siblings(*shape) for name, shape in SIBLINGS.items()}
    print(json.dumps(record["lora"]), flush=True)
    replace_file(RESULTS, json.dumps({"environment": environment(), **record}, indent=1) + "\n")
    file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
