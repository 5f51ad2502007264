"""The memory plan of methods and strategies against one real step each, on the embedded base in 4 bits, on a CPU.

    python benchmarks/plan_methods.py                # all cells
    python benchmarks/plan_methods.py --only norms   # one method

One JSON line per cell: bytes that the plan gives and that the ledger counts, and plan / ledger - 1. The step is the
second of a run. tests/planning/test_methods.py does the same for every method on a tiny base. Results go into
benchmarks/results/plan_methods.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from peftkit import locations
from peftkit.backbone.load import load_backbone
from peftkit.backbone.locate import locate
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.environment import environment
from peftkit.planning.architecture import architecture
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.recipe.setting import what_is_trained
from peftkit.training.holdings import held
from peftkit.training.ledger import Ledger
from peftkit.training.memory import checkpoint_activations
from peftkit.training.passes.trying import find_paths
from peftkit.training.step import Step
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers

sys.path.insert(0, str(Path(__file__).parent))
from plan_ledger import CLOSE, WEIGHTS, config_of, made_rows

RESULTS = Path(__file__).with_name("results") / "plan_methods.json"
ROWS, TOKENS = 4, 128
SPECS: list[dict[str, Any]] = [
    {"method": "lora", "r": 16},
    {"method": "lora", "r": 16, "layers": "top:8"},
    {"method": "dora", "r": 16},
    {"method": "vera"},
    {"method": "oft"},
    {"method": "ia3"},
    {"method": "prompt_tuning"},
    {"method": "top_layers", "top_layers": 8},
    {"method": "top_layers", "top_layers": 4, "train_head": False},
    {"method": "norms"},
]


def measured(spec: AdapterSpec, checkpointing: bool, cache: Path) -> dict[str, int]:
    """Weights, and what one step holds besides."""
    backbone = load_backbone(BaseSpec(), QuantSpec(bits=4), cache, dense=dense_layers(spec))
    tuned = inject(backbone, spec)
    if checkpointing:
        checkpoint_activations(tuned)
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.trainable.values(), foreach=False)

    paths, around = find_paths(tuned), {"pad_id": backbone.tokenizer.pad_id, "device": torch.device("cpu")}

    def step(rows: int, tokens: int) -> None:
        Step(tuned.model, list(made_rows(rows, tokens)), paths=paths, **around).run(rows * tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(1, 8)
    gc.collect()
    weights, seen = bytes_of(backbone.model, tuned.model), bytes_of(tuned.model)
    with Ledger(tuned.model, optimizer) as ledger:
        step(ROWS, TOKENS)
    account = ledger.account()
    return {
        "weights": weights,
        "gradients": account.gradients,
        "optimizer": account.optimizer,
        "kept": account.kept - account.kept_by["outside"],
        "peak": account.before + account.peak + weights - seen,
    }


def bytes_of(*models: Any) -> int:
    """Bytes of all storages that the models hold, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for m in models for tensor in held(m)}
    return sum(storage.nbytes() for storage in storages.values())


def planned(config: dict[str, Any], spec: AdapterSpec, checkpointing: bool) -> dict[str, int]:
    """The same terms of the plan."""
    base = architecture(config)
    setting = Setting(
        **what_is_trained(base, spec), compute_dtype="float32", dtype="float32", device="cpu", micro_batch=ROWS,
        rows_per_step=ROWS, longest=TOKENS, labelled=TOKENS - 1, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    plan = plan_memory(base, setting)
    parts = {part.name: part.bytes.expected for part in plan.parts}
    weights = (*WEIGHTS, "unpacked linear layers", "adapter", "trained copies")
    return {
        "weights": sum(parts.get(name, 0) for name in weights),
        "gradients": parts["gradients"],
        "optimizer": parts["optimizer"],
        "kept": parts["activations"],
        "peak": plan.stage("train").bytes.expected - parts["context"] - parts["mapped file"],
    }


def main() -> None:
    """Print a line per cell, and keep them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one method")
    only = parser.parse_args().only
    logging.disable(logging.WARNING)  # bitsandbytes says for every layer that float32 becomes float16
    cache = locations.cache_root().path
    config = config_of(locate(BaseSpec(), cache).folder)
    found = []
    for values in SPECS:
        spec = AdapterSpec(**values)
        for checkpointing in (False, True) if only in (None, spec.method) else ():
            plan, real = planned(config, spec, checkpointing), measured(spec, checkpointing, cache)
            errors = {name: round(plan[name] / real[name] - 1, 4) for name in real}
            found.append({**values, "checkpointing": checkpointing, "plan": plan, "measured": real, "error": errors})
            print(json.dumps(found[-1]), flush=True)
    if only is None:
        within = sum(all(abs(error) <= CLOSE for error in line["error"].values()) for line in found)
        summary = {"cells": len(found), f"within {CLOSE:.0%} in every term": within}
        RESULTS.write_text(
            json.dumps({"environment": environment(), "summary": summary, "cells": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
