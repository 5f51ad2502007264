"""Train three adapters on three tasks, combine them by every method, and measure each task's held-out NLL.

    python benchmarks/combine_tasks.py --data ../shared/data/t0_tasks

Rows: headlines (gigaword), sentences from given words (common_gen), multiple choice (commonsense_qa); 140 of each 200
rows train, less those whose prompt is held out too, and 60 are held out. Every combination is measured as ΔW on the
weights that training saw (NF4 dequantized, float32), so nothing is lost by a rank but where `svd` cuts to one. Weights
are 1 each (a sum) and 1/3 each (a mean); where weights are shares both are the same, and slerp takes pairs. Settings
are each method's defaults. Results go to benchmarks/results/combine_tasks.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations as combinations_of
from pathlib import Path
from typing import Any

import torch

from peftkit import locations
from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.spec import QuantSpec
from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.ref import BaseSpec, longest_sequence, read_config
from peftkit.data.audit import DataSpec, encode
from peftkit.data.formats import load_rows
from peftkit.deltas.combining.combine import combine
from peftkit.deltas.combining.methods import METHODS, How
from peftkit.deltas.combining.together import merged_deltas
from peftkit.deltas.delta import Deltas
from peftkit.deltas.reading.read import deltas_of
from peftkit.environment import environment
from peftkit.evaluation.compare import mean_nll, paired_nll
from peftkit.generation.forward import row_nll
from peftkit.registry.store import Registry
from peftkit.release.shares import share_kept
from peftkit.tuning.stored import read

RESULTS = Path(__file__).with_name("results") / "combine_tasks.json"
TASKS = {
    "headline": "gigaword_TLDR",
    "sentence": "common_gen_Example_prompt",
    "commonsense": "commonsense_qa_question_answering",
}
SETTINGS = ("train.num_train_epochs=2", "train.learning_rate=5e-4", "evaluate.max_generated_rows=0")
MEASURED = ("evaluate.retention_passages=8", "data.accept=[leak,duplicate]")
SUMS = {"sum": 1.0, "mean": 1 / 3}
SHARES = ("ties", "dare_ties", "della", "knots")
"""Methods whose result does not change when all weights are doubled."""


def write_rows(data: Path, scratch: Path) -> None:
    """The rows of every task, split by position; a prompt that is held out does not train."""
    for task, name in TASKS.items():
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{**row, "completion": row["completion"].removesuffix("<|endoftext|>").strip()} for row in rows]
        held = [row for i, row in enumerate(rows) if i % 10 >= 7]
        prompts = {row["prompt"] for row in held}
        train = [row for i, row in enumerate(rows) if i % 10 < 7 and row["prompt"] not in prompts]
        for part, chosen in (("train", train), ("held_out", held)):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (scratch / f"{task}.{part}.jsonl").write_text(text, encoding="utf-8")


def train(scratch: Path) -> None:
    """One adapter a task, each with the same settings."""
    places = {"PEFTKIT_REGISTRY": str(scratch / "registry"), "PEFTKIT_RUNS": str(scratch / "runs")}
    for task in TASKS:
        rows = [f"data.train={task}.train.jsonl", f"data.held_out={task}.held_out.jsonl", f"save_as={task}"]
        command = [sys.executable, "-m", "peftkit", "train", "qlora_sft", *rows, *SETTINGS, *MEASURED]
        subprocess.run(command, cwd=scratch, env={**os.environ, **places}, check=True)


class Task:
    """One task's held-out rows."""

    def __init__(self, rows: Path, backbone: Backbone) -> None:
        source = load_rows(rows)
        limit = longest_sequence(read_config(backbone.base.folder))
        self.examples = encode(source.rows, source, "held_out", backbone.tokenizer, DataSpec(), limit).examples
        self.tokens = [example.answer_tokens for example in self.examples]
        self.pad_id = backbone.tokenizer.pad_id

    def nll(self, model: Any) -> list[float]:
        """Summed answer NLL of every row, nats."""
        return row_nll(model, self.examples, pad_id=self.pad_id, device=torch.device("cpu"), batch_size=20)


def dequantized() -> Backbone:
    """The embedded base in float32, its linear layers with the numbers that NF4 stands for."""
    cache = locations.cache_root().path
    seen = quantized_linears(load_backbone(BaseSpec(), QuantSpec(bits=4), cache).model)
    backbone = load_backbone(BaseSpec(), QuantSpec(bits=32), cache)
    for name, layer in seen.items():
        backbone.model.get_submodule(name).weight.data.copy_(dense_weight(layer))
    return backbone


@contextmanager
def merged(model: Any, deltas: Deltas) -> Iterator[Any]:
    """The model with every ΔW added, and without them again."""
    parameters = dict(model.named_parameters())
    before = {}
    for name, delta in deltas.changes.items():
        weight = parameters[name].data
        before[name] = weight.clone()
        matrix = weight.double().view(delta.matrix)

        def rows(first: int, last: int, matrix: torch.Tensor = matrix) -> torch.Tensor:
            return matrix[first:last]

        weight.copy_(delta.prepared(rows).merged(0, delta.matrix[0], rows).view_as(weight))
    yield model
    for name, weight in before.items():
        parameters[name].data.copy_(weight)


def combinations(parents: Sequence[Deltas], base: Mapping[str, Dense]) -> Iterator[tuple[str, Deltas]]:
    """Every method with every weight, named."""
    for method, entry in METHODS.items():
        if entry.pair:
            for pair in combinations_of(range(len(parents)), 2):
                names = " and ".join(list(TASKS)[i] for i in pair)
                yield f"{method}, {names}", merged_deltas([parents[i] for i in pair], [0.5, 0.5], How(method), base)
        elif method == "svd":
            for word, weight in SUMS.items():
                cut = combine(parents, [weight] * 3, How(method), base, rank=16, max_residual=1)
                yield f"{method} at rank 16 (error {cut.residual:.0%}), {word}", cut.deltas
        elif method in SHARES:
            yield method, merged_deltas(parents, [1.0] * 3, How(method), base)
        elif method != "linear":  # here the same as exact
            for word, weight in SUMS.items():
                yield f"{method}, {word}", merged_deltas(parents, [weight] * 3, How(method), base)


def measure(parents: Sequence[Deltas], tasks: Mapping[str, Task], backbone: Backbone) -> Iterator[dict[str, Any]]:
    """A line for the base, for each adapter, and for every combination."""
    base = dense_tensors(backbone.base.folder)
    bare = {task: rows.nll(backbone.model) for task, rows in tasks.items()}
    alone: dict[str, list[float]] = {}
    yield line("base", bare, bare, None, tasks)
    own: dict[str, dict[str, list[float]]] = {}
    for name, parent in zip(TASKS, parents, strict=True):
        with merged(backbone.model, parent) as model:
            own[name] = {task: rows.nll(model) for task, rows in tasks.items()}
        alone[name] = own[name][name]
    for name, nll in own.items():
        yield line(f"{name} alone", nll, bare, alone, tasks)
    for what, combined in combinations(parents, base):
        with merged(backbone.model, combined) as model:
            nll = {task: rows.nll(model) for task, rows in tasks.items()}
        yield line(what, nll, bare, alone, tasks)


def line(
    what: str,
    nll: Mapping[str, list[float]],
    bare: Mapping[str, list[float]],
    alone: Mapping[str, list[float]] | None,
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    """NLL per token of every task; with `alone`, its change against the task's own adapter and the share kept."""
    found: dict[str, Any] = {"what": what, "tasks": {}}
    for task, rows in tasks.items():
        each: dict[str, Any] = {"answer_nll": interval(mean_nll(nll[task], rows.tokens))}
        if alone:
            each["against_its_own"] = interval(paired_nll(alone[task], nll[task], rows.tokens))
            each["share_kept"] = interval(share_kept(bare[task], alone[task], nll[task]))
        found["tasks"][task] = each
    print(json.dumps(found), flush=True)
    return found


def interval(found: Any) -> list[float]:
    """Point, low and high to four digits."""
    return [round(value, 4) for value in (found.point, found.low, found.high)]


def main() -> None:
    """Train, combine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder t0_tasks")
    parser.add_argument("--scratch", type=Path, help="keep rows, runs and adapters there, and use those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).absolute()
        scratch.mkdir(parents=True, exist_ok=True)
        if not (scratch / "registry").exists():
            write_rows(arguments.data, scratch)
            train(scratch)
        backbone = dequantized()
        versions = [Registry(scratch / "registry").resolve(task) for task in TASKS]
        parents = [deltas_of(read(version), backbone.base.folder) for version in versions]
        tasks = {task: Task(scratch / f"{task}.held_out.jsonl", backbone) for task in TASKS}
        results = {
            "environment": environment(),
            "settings": [*SETTINGS, *MEASURED],
            "rows": {
                task: {"rows": len(rows.tokens), "answer_tokens": sum(rows.tokens)} for task, rows in tasks.items()
            },
            "lines": list(measure(parents, tasks, backbone)),
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
