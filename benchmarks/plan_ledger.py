"""What the memory plan says against what a real training step holds, term by term, on a CPU.

    python benchmarks/plan_ledger.py                    # the development set and the process's own peak
    python benchmarks/plan_ledger.py --kept-out         # architectures that no formula was made on
    python benchmarks/plan_ledger.py --only gpt2        # one architecture
    python benchmarks/plan_ledger.py --score            # today's plan against what was measured before

One JSON line per cell: bytes that the plan gives and that the ledger counts, and plan / ledger - 1. `allocated` is the
same peak by the CPU's allocator (torch's profiler), which knows nothing of the ledger. The measured step is the second
of a run: the optimizer has its state. Results go into benchmarks/results/plan_ledger.json with versions and hardware.
The models have random weights, but for the embedded base.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from peftkit import locations
from peftkit.backbone.load import load_backbone
from peftkit.backbone.locate import locate
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.environment import environment
from peftkit.planning.architecture import architecture
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.training.ledger import Ledger
from peftkit.training.step import Step
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_bases import write_tokenizer

RESULTS = Path(__file__).with_name("results") / "plan_ledger.json"
BITS = {"full": 32, "lora": 32, "nf4": 4, "int8": 8}
R = 8
CLOSE = 0.05
EMBEDDED = "smollm2-135m"
SMALL = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
DEVELOPMENT: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "intermediate_size": 704},
    "qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "intermediate_size": 1024,
              "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "intermediate_size": 768, "head_dim": 128,
              "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 1024,
             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}  # fmt: skip
KEPT_OUT: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "intermediate_size": 1024},
    "gemma2": {"model_type": "gemma2", **SMALL, "num_key_value_heads": 2, "intermediate_size": 1024, "head_dim": 64,
               "query_pre_attn_scalar": 64, "sliding_window": 128},
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    architecture: str
    mode: str
    checkpointing: bool
    batch: int
    length: int
    micro_batches: int

    def setting(self) -> Setting:
        """The same as the plan knows it: SDPA, float32 compute, AdamW, labels on all tokens but the first."""
        return Setting(
            bits=BITS[self.mode],  # type: ignore[arg-type]
            compute_dtype="float32",
            dtype="float32",
            method="full" if self.mode == "full" else "lora",
            r=R,
            rows_per_step=self.batch * self.micro_batches,
            micro_batch=self.batch,
            gradient_checkpointing=self.checkpointing,
            longest=self.length,
            labelled=self.length - 1,
            evaluation_batch=self.batch,
            evaluation_longest=self.length,
            max_new_tokens=1,
            device="cpu",
        )


CELL = tuple(field.name for field in fields(Cell))
PROCESSES = [
    Cell(EMBEDDED, mode, checkpointing, 4, 256, 1)
    for mode, checkpointing in (("full", False), ("lora", False), ("nf4", False), ("nf4", True), ("int8", True))
]


WEIGHTS = (
    "linear layers",
    "quantization constants",
    "code tables",
    "embeddings",
    "norms and biases",
    "head",
    "experts",
)


def shapes(name: str) -> list[tuple[int, int, int]]:
    """Batches, lengths and micro-batches per step; the embedded base takes seconds for each."""
    if name == EMBEDDED:
        return [(1, 64, 2), (4, 64, 1), (2, 256, 1)]
    return [
        (1, 64, 1),
        (1, 64, 2),
        (2, 64, 1),
        (4, 64, 2),
        (1, 256, 1),
        (2, 256, 2),
        (4, 256, 1),
        (1, 512, 2),
        (2, 512, 1),
    ]


def write_model(config: dict[str, Any], folder: Path) -> Path:
    """A base of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"max_position_embeddings": 1024, **config}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind.pop("model_type"), bos_token_id=1, eos_token_id=2, pad_token_id=2, **kind)
    )
    model.save_pretrained(str(folder))
    write_tokenizer(folder)
    return folder


class Model:
    """A base held and tuned in one mode, ready to step."""

    def __init__(self, folder: Path, mode: str, checkpointing: bool, cache: Path) -> None:
        backbone = load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=BITS[mode]), cache)
        self.base = backbone.model
        self.pad_id = backbone.tokenizer.pad_id
        self.model = self.base.requires_grad_(True) if mode == "full" else inject(backbone, AdapterSpec(r=R)).model
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if checkpointing:  # as transformers' Trainer does
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.trainable, foreach=False)
        self.step(1, 8, 1)  # makes the optimizer's state

    def step(self, batch: int, length: int, micro_batches: int) -> None:
        """One optimizer step over made rows."""
        rows = list(made_rows(batch * micro_batches, length))
        Step(self.model, rows, pad_id=self.pad_id, device=torch.device("cpu")).run(batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, batch: int, length: int, micro_batches: int) -> Ledger:
        """The ledger of one step."""
        gc.collect()
        with Ledger(self.model, self.optimizer) as ledger:
            self.step(batch, length, micro_batches)
        return ledger

    def allocated(self, batch: int, length: int, micro_batches: int) -> int:
        """Most bytes that the CPU's allocator gave to one step."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step(batch, length, micro_batches)
        events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        return max(accumulate(changes, initial=0))


def made_rows(count: int, length: int) -> Iterator[Example]:
    """Rows of random tokens; all but the first are learned."""
    draw = random.Random(0)
    for index in range(count):
        ids = [draw.randrange(3, 259) for _ in range(length)]
        yield Example(ids, [IGNORED, *ids[1:]], 1, index, f"made:{index}")


def counted(ledger: Ledger, model: Model) -> dict[str, int]:
    """The ledger's terms in bytes."""
    account = ledger.account()
    adapter = sum(weight.nbytes for name, weight in model.model.named_parameters() if ".lora_" in name)
    return {
        "weights": account.weights - adapter,
        "adapter": adapter,
        "gradients": account.gradients,
        "optimizer": account.optimizer,
        "kept": account.kept - account.kept_by["outside"],  # the plan counts the loss with the logits
        "peak": account.before + account.peak,
    }


def planned(config: dict[str, Any], cell: Cell) -> dict[str, int]:
    """The plan's terms in bytes, without what Python itself takes.

    `peak` is the plan's for a step under a dispatch mode, as the ledger sees it; `allocated` for a step without.
    """
    base = architecture(config)
    plan, watched = (plan_memory(base, cell.setting(), watched=watched) for watched in (False, True))
    parts = {part.name: part.bytes.expected for part in plan.parts}
    context = parts["context"]
    return {
        "weights": sum(parts.get(name, 0) for name in WEIGHTS),
        "adapter": parts["adapter"],
        "gradients": parts["gradients"],
        "optimizer": parts["optimizer"],
        "kept": parts["activations"],
        "peak": watched.stage("train").bytes.expected - context,
        "allocated": plan.stage("train").bytes.expected - context,
        "train": plan.stage("train").bytes.expected - context,
        "load": plan.stage("load").bytes.expected - context,
    }


def config_of(folder: Path) -> dict[str, Any]:
    """A base's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def cells(name: str, folder: Path, cache: Path) -> Iterator[dict[str, Any]]:
    """Every cell of one architecture: a model is loaded once for its shapes."""
    config = config_of(folder)
    for mode in BITS:
        for checkpointing in (False, True):
            model = Model(folder, mode, checkpointing, cache)
            for shape in shapes(name):
                cell = Cell(name, mode, checkpointing, *shape)
                ledger = model.measure(*shape)
                account = ledger.account()
                measured = counted(ledger, model)
                measured["allocated"] = account.before + model.allocated(*shape)
                yield line(cell, planned(config, cell), measured) | {
                    "kept_by": account.kept_by,
                    "saved": account.saved,
                    "peak_by": account.peak_by,
                    "alive_after": account.alive_after,
                }
            del model


def line(cell: Cell, plan: dict[str, int], measured: dict[str, int]) -> dict[str, Any]:
    """A cell's record: both sides in bytes, and plan / measured - 1 for every term that is there."""
    errors = {term: round(plan[term] / measured[term] - 1, 4) for term in measured if measured[term] and term in plan}
    return {**asdict(cell), "plan": plan, "measured": measured, "error": errors}


def resident() -> tuple[int, int]:
    """Resident bytes of this process now, and the most since the mark was last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def process(folder: Path, cell: Cell, cache: Path) -> dict[str, Any]:
    """In a fresh process: the most resident bytes while loading and in the second step, less what the imports take."""
    gc.collect()
    imports = resident()[0]
    model = Model(folder, cell.mode, cell.checkpointing, cache)
    load = resident()[1] - imports
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model.step(cell.batch, cell.length, cell.micro_batches)
    return {"load": load, "train": resident()[1] - imports, "imports": imports}


def in_processes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`process` of some cells of the embedded base, each in a process of its own."""
    for cell in PROCESSES:
        command = [sys.executable, __file__, "--process", json.dumps(asdict(cell))]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        yield line(cell, planned(config, cell), json.loads(done.stdout.splitlines()[-1]))


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every term: cells, the share within 5 %, and the worst ones."""
    found: dict[str, Any] = {}
    for term in sorted({term for line in lines for term in line["error"]}):
        ranked = sorted((line for line in lines if term in line["error"]), key=lambda line: -abs(line["error"][term]))
        close = sum(abs(line["error"][term]) <= CLOSE for line in ranked)
        worst = [{key: line[key] for key in CELL} | {"error": line["error"][term]} for line in ranked[:3]]
        found[term] = {"cells": len(ranked), "within": round(close / len(ranked), 4), "worst": worst}
    return found


def main() -> None:
    """Run the grid, print a line per cell and the summary, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept-out", action="store_true", help="the architectures that were kept out, instead")
    parser.add_argument("--only", help="one architecture of the set")
    parser.add_argument("--score", action="store_true", help="score today's plan on what was measured before")
    parser.add_argument("--process", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # bitsandbytes says for every layer that float32 becomes float16
    cache = locations.cache_root().path
    if arguments.process:
        print(json.dumps(process(locate(BaseSpec(), cache).folder, Cell(**arguments.process), cache)))
    elif arguments.score:
        score()
    else:
        measure("kept_out" if arguments.kept_out else "development", arguments.only, cache)


def measure(part: str, only: str | None, cache: Path) -> None:
    """Measure a set of architectures, or one of it."""
    configs = KEPT_OUT if part == "kept_out" else {**DEVELOPMENT, EMBEDDED: {}}
    for name in [only] if only else configs:
        with tempfile.TemporaryDirectory() as scratch:
            if name == EMBEDDED:
                folder = locate(BaseSpec(), cache).folder
            else:
                folder = write_model(configs[name], Path(scratch) / name)
            found = list(shown(cells(name, folder, Path(scratch) / "cache")))
            config = config_of(folder)
            processes = list(shown(in_processes(config))) if name == EMBEDDED else []
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        entry = {"environment": environment(), "config": config, "cells": found, "process": processes}
        kept.setdefault(part, {}).setdefault("architectures", {})[name] = entry
        keep(kept)


def shown(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print every line as it comes."""
    for line in lines:
        print(json.dumps(line), flush=True)
        yield line


def score() -> None:
    """Hold today's plan against what was measured before: nothing is measured again."""
    kept = json.loads(RESULTS.read_text())
    for part in kept.values():
        for entry in part["architectures"].values():
            for records in (entry["cells"], entry["process"]):
                for record in records:
                    cell = Cell(**{key: record[key] for key in CELL})
                    record.update(line(cell, planned(entry["config"], cell), record["measured"]))
    keep(kept)


def keep(kept: dict[str, Any]) -> None:
    """Sum every set up, and write the results with one cell a line."""
    for part in kept.values():
        entries = part["architectures"].values()
        part["summary"] = summary([record for entry in entries for record in entry["cells"]])
    print(json.dumps({name: part["summary"] for name, part in kept.items()}, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept).replace('{"architecture"', '\n{"architecture"') + "\n")


if __name__ == "__main__":
    main()
