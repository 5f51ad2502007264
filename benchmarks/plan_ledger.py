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
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.locate import locate
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.environment import environment
from peftkit.generation.forward import row_nll
from peftkit.generation.generate import generate
from peftkit.planning.architecture import architecture
from peftkit.planning.evaluation import generating, measuring
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.tokens import tokens_at_once
from peftkit.training.ledger import Ledger
from peftkit.training.passes.trying import find_paths
from peftkit.training.step import Step
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_bases import write_tokenizer

RESULTS = Path(__file__).with_name("results") / "plan_ledger.json"
BITS = {"full": 32, "lora": 32, "nf4": 4, "int8": 8}
R = 8
CLOSE = 0.05
SETS = ("development", "kept_out")
BULK = ("architectures", "cells", "environment")
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
            in_place=self.mode == "full",
            r=R,
            rows_per_step=self.batch * self.micro_batches,
            micro_batch=self.batch,
            gradient_checkpointing=self.checkpointing,
            longest=self.length,
            labelled=self.length - 1,
            evaluation_batch=self.batch,
            evaluation_longest=self.length,
            max_new_tokens=NEW_TOKENS,
            device="cpu",
        )


CELL = tuple(field.name for field in fields(Cell))
NEW_TOKENS = 16
EVALUATIONS = [(mode, shape) for mode in ("lora", "nf4") for shape in ((4, 64, 1), (2, 256, 1))]
"""Modes, and rows and tokens of the held-out batch; its prompts are as long, and answered by NEW_TOKENS."""
MODES = (("full", False), ("lora", False), ("nf4", False), ("nf4", True), ("int8", True))
FITTED = EMBEDDED
"""What the C library keeps of freed blocks (`memory.RETAINED`) was read off this base's processes."""
PROCESSES = [
    Cell(name, mode, checkpointing, 4, 256, 1) for name in (FITTED, "llama-process") for mode, checkpointing in MODES
]
PROCESS_LLAMA = {
    "model_type": "llama", "vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1408,
}  # fmt: skip


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
        return [(1, 64, 2), (2, 256, 1)]
    return [(1, 64, 1), (4, 64, 2), (2, 256, 2), (2, 512, 1)]


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


def loaded(folder: Path, mode: str, cache: Path) -> Backbone:
    """A base in the bits of a mode."""
    return load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=BITS[mode]), cache)


class Model:
    """A base held and tuned in one mode, ready to step."""

    def __init__(self, backbone: Backbone, mode: str, checkpointing: bool) -> None:
        self.base, self.tokenizer = backbone.model, backbone.tokenizer
        self.pad_id = backbone.tokenizer.pad_id
        if mode == "full":
            tuned = Tuned(self.base.requires_grad_(True), backbone, AdapterSpec(method="full"), names=())
        else:
            tuned = inject(backbone, AdapterSpec(r=R))
        self.model, self.paths = tuned.model, find_paths(tuned)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if checkpointing:  # as peftkit does: no gradient is asked for at the embeddings
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            self.base.disable_input_require_grads()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.trainable, foreach=False)
        self.step(1, 8, 1)  # makes the optimizer's state

    def step(self, batch: int, length: int, micro_batches: int) -> None:
        """One optimizer step over made rows, as training runs it."""
        rows = list(made_rows(batch * micro_batches, length))
        step = Step(self.model, rows, pad_id=self.pad_id, device=torch.device("cpu"), paths=self.paths)
        step.run(tokens_at_once(batch, length, "cpu"))
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

    def evaluation(self, batch: int, length: int) -> dict[str, int]:
        """The most bytes while a batch of held-out rows is measured, and while as many prompts are answered."""
        self.model.eval()
        device, rows = torch.device("cpu"), list(made_rows(batch, length))
        found = {}
        for name, work in (
            ("likelihood", lambda: row_nll(self.model, rows, pad_id=self.pad_id, device=device, batch_size=batch)),
            ("answers", lambda: self.answer([row.input_ids for row in rows])),
        ):
            gc.collect()
            with Ledger(self.model) as ledger:
                work()
            account = ledger.account()
            found |= {name: account.peak, f"{name}_peak": account.before + account.peak}
        self.model.train()
        return found

    def answer(self, prompts: list[list[int]]) -> object:
        """Greedy answers to all prompts at once."""
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": len(prompts)}
        return generate(self.model, prompts, self.tokenizer, device=torch.device("cpu"), **options)


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

    `peak` is held against the ledger, `allocated`, the same number, against the allocator.
    """
    base = architecture(config)
    plan = plan_memory(base, cell.setting())
    parts = {part.name: part.bytes.expected for part in plan.parts}
    context = parts["context"] + parts["mapped file"]
    return {
        "weights": sum(parts.get(name, 0) for name in WEIGHTS),
        "adapter": parts["adapter"],
        "gradients": parts["gradients"],
        "optimizer": parts["optimizer"],
        "kept": parts["activations"],
        "peak": plan.stage("train").bytes.expected - context,
        "allocated": plan.stage("train").bytes.expected - context,
        "train": plan.stage("train").bytes.expected - context,
        "load": plan.stage("load").bytes.expected - context,
    }


def planned_evaluation(config: dict[str, Any], cell: Cell) -> dict[str, int]:
    """The plan's bytes of `Model.evaluation`: beside the weights, and with them."""
    base, setting = architecture(config), cell.setting()
    plan = planned(config, cell)
    resting = plan["weights"] + plan["adapter"]
    needs = {"likelihood": measuring(base, setting).expected, "answers": generating(base, setting).expected}
    return needs | {f"{name}_peak": resting + need for name, need in needs.items()}


def evaluations(name: str, folder: Path, cache: Path) -> Iterator[dict[str, Any]]:
    """The cells of evaluation of one architecture."""
    config = config_of(folder)
    for mode, shape in EVALUATIONS:
        cell = Cell(name, mode, False, *shape)
        model = Model(loaded(folder, mode, cache), mode, False)
        measured = model.evaluation(cell.batch, cell.length)
        yield line(cell, planned_evaluation(config, cell), measured)


def config_of(folder: Path) -> dict[str, Any]:
    """A base's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def cells(name: str, folder: Path, cache: Path) -> Iterator[dict[str, Any]]:
    """Every cell of one architecture: a model is loaded once for its shapes."""
    config = config_of(folder)
    for mode in BITS:
        for checkpointing in (False, True):
            model = Model(loaded(folder, mode, cache), mode, checkpointing)
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
    """In a fresh process: the most resident bytes while loading, and in three steps."""
    imports = resident()[0]
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    backbone = loaded(folder, cell.mode, cache)
    load = resident()[1]
    model = Model(backbone, cell.mode, cell.checkpointing)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        model.step(cell.batch, cell.length, cell.micro_batches)
    return {"imports": imports, "load": load, "train": resident()[1]}


def in_processes(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """`process` of every cell in a process of its own, and the plan's low and high."""
    for cell in PROCESSES:
        command = [sys.executable, __file__, "--process", json.dumps(asdict(cell)), str(folders[cell.architecture])]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        yield of_process(cell, config_of(folders[cell.architecture]), json.loads(done.stdout.splitlines()[-1]))


def of_process(cell: Cell, config: dict[str, Any], measured: dict[str, int]) -> dict[str, Any]:
    """A process's record: what was measured against the plan's stages, and whether it lies between low and high."""
    plan = plan_memory(architecture(config), cell.setting())
    stages = {name: asdict(plan.stage(name).bytes) for name in ("load", "train")}
    found = {name: stages[name]["low"] <= measured[name] <= stages[name]["high"] for name in stages}
    errors = {name: {end: round(stages[name][end] / measured[name] - 1, 4) for end in stages[name]} for name in stages}
    return {**asdict(cell), "config": config, "plan": stages, "measured": measured, "error": errors, "inside": found}


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
    parser.add_argument("--processes", action="store_true", help="resident bytes of whole processes, instead")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # bitsandbytes says for every layer that float32 becomes float16
    cache = locations.cache_root().path
    if arguments.process:
        cell, folder = arguments.process
        print(json.dumps(process(Path(folder), Cell(**json.loads(cell)), cache)))
    elif arguments.processes:
        measure_processes(cache)
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
            evaluated = list(shown(evaluations(name, folder, Path(scratch) / "cache")))
            config = config_of(folder)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        entry = {"environment": environment(), "config": config, "cells": found, "evaluation": evaluated}
        kept.setdefault(part, {}).setdefault("architectures", {})[name] = entry
        keep(kept)


def measure_processes(cache: Path) -> None:
    """Measure whole processes."""
    with tempfile.TemporaryDirectory() as scratch:
        llama = write_model(PROCESS_LLAMA, Path(scratch) / "llama-process")
        found = list(shown(in_processes({FITTED: locate(BaseSpec(), cache).folder, "llama-process": llama})))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept["process"] = {"fitted_on": FITTED, "environment": environment(), "cells": found}
    keep(kept)


def shown(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print every line as it comes."""
    for line in lines:
        print(json.dumps(line), flush=True)
        yield line


def score() -> None:
    """Hold today's plan against what was measured before: nothing is measured again."""
    kept = json.loads(RESULTS.read_text())
    for name in SETS:
        for entry in kept.get(name, {}).get("architectures", {}).values():
            for records, plan in ((entry["cells"], planned), (entry.get("evaluation", []), planned_evaluation)):
                for record in records:
                    cell = Cell(**{key: record[key] for key in CELL})
                    record.update(line(cell, plan(entry["config"], cell), record["measured"]))
    for record in kept.get("process", {}).get("cells", []):
        cell = Cell(**{key: record[key] for key in CELL})
        record.update(of_process(cell, record["config"], record["measured"]))
    keep(kept)


def keep(kept: dict[str, Any]) -> None:
    """Sum every set up, and write the results with one cell a line."""
    for name in set(SETS) & set(kept):
        entries = kept[name]["architectures"]
        for kind in ("cells", "evaluation"):
            kept[name][f"summary of {kind}"] = summary([each for e in entries.values() for each in e.get(kind, [])])
        kept[name]["within by architecture"] = {
            each: {term: found["within"] for term, found in summary(entry["cells"]).items()}
            for each, entry in entries.items()
        }
    if "process" in kept:
        cells = kept["process"]["cells"]
        kept["process"]["inside"] = {
            name: [sum(all(c["inside"].values()) for c in own), len(own)]
            for name in sorted({c["architecture"] for c in cells})
            for own in [[c for c in cells if c["architecture"] == name]]
        }
    totals = {name: {key: value for key, value in part.items() if key not in BULK} for name, part in kept.items()}
    print(json.dumps(totals, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept).replace('{"architecture"', '\n{"architecture"') + "\n")


if __name__ == "__main__":
    main()
