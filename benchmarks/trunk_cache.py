"""Seconds per epoch with the top quarter of the layers trained: uncached, with a cached trunk, and TRL's SFTTrainer.

    PEFTKIT_TEST_DATA=/path/to/data python benchmarks/trunk_cache.py

The embedded base in float32, 8 rows to a step, the top 7 of 30 blocks trained (`--layers`); two sets of 48 rows: short
and even (`rasbt_instruction`), long and ragged (`alpaca_en_demo`, up to 512 tokens). TRL trains the same tensors with
the layers below frozen, in float32, without checkpointing, on the same encoded rows and with 8 of them in a pass, as
it does by itself; everything else is its default. Ours has as many as `--at-once`. The arms go one after another. The
first epoch is from the call to its last step, filling the cache included; later epochs are whole ones. `cpu` is the
process's own time on the processor, which tells less about what else was running. One JSON line per arm and set;
ratios of the later epochs' times go into benchmarks/results/trunk_cache.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from peftkit import locations
from peftkit.atomic import replace_file
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.quiet import quiet
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.data.formats import load_rows
from peftkit.data.part import encode
from peftkit.data.rows import to_dataset
from peftkit.data.spec import DataSpec
from peftkit.environment import environment
from peftkit.events import Decision, Event
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import partial_names

RESULTS = Path(__file__).with_name("results") / "trunk_cache.json"
BATCH, RATE = 8, 1e-4  # rows of an optimizer step
LONGEST = 512
SETS = {
    "rasbt_instruction": "rasbt_instruction/instruction-data.json",
    "alpaca_en_demo": "llamafactory_demo/alpaca_en_demo.json",
}
Times = list[tuple[float, float]]


def now() -> tuple[float, float]:
    """Seconds on the wall's clock, and of this process on the processor."""
    return time.perf_counter(), time.process_time()


def backbone_of() -> Backbone:
    """The embedded base in float32."""
    return load_backbone(BaseSpec(), QuantSpec(bits=32), locations.cache_root().path)


def ours(rows: list[Example], layers: int, epochs: int, at_once: int, *, cached: bool) -> tuple[Times, dict[str, Any]]:
    """When each epoch ended, the begin first; and what the cache took."""
    tuned = inject(backbone_of(), AdapterSpec(method="top_layers", top_layers=layers, train_head=False))
    spec = TrainSpec(
        num_train_epochs=epochs, per_device_train_batch_size=at_once, gradient_accumulation_steps=BATCH // at_once,
        learning_rate=RATE, trunk_cache=cached,
        save_steps=10**6, lr_scheduler_type="linear", warmup_ratio=0.0,
    )  # fmt: skip
    per_epoch, events = len(rows) // BATCH, list[Event]()
    with tempfile.TemporaryDirectory() as folder:
        times = [now()]

        def log(step: int, figures: dict[str, float]) -> None:
            if step % per_epoch == 0 and "loss" in figures:
                times.append(now())

        trained = train(tuned, rows, spec, Path(folder), cache=Path(folder), report=events.append, log=log)
    said = {event.what: event.choice for event in events if isinstance(event, Decision) and "trunk" in event.what}
    return times, {"last_loss": round(trained.last_loss, 4), **said}


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each epoch of Trainer's ended."""

    def __init__(self, times: Times) -> None:
        self.times = times

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step of an epoch is done, with its update."""
        self.times.append(now())


def theirs(rows: list[Example], layers: int, epochs: int, at_once: int) -> tuple[Times, dict[str, Any]]:
    """The same for TRL."""
    backbone = backbone_of()
    names = set(partial_names(backbone.model, AdapterSpec(method="top_layers", top_layers=layers, train_head=False)))
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in names)
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = SFTConfig(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=BATCH // at_once, learning_rate=RATE,
            bf16=False, gradient_checkpointing=False, max_length=None, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        times = [now()]
        trainer = SFTTrainer(
            model=backbone.model, args=arguments, train_dataset=to_dataset(rows),
            processing_class=backbone.tokenizer.hf, callbacks=[_Clock(times)],
        )  # fmt: skip
        trainer.train()
    mean = next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry)
    return times, {"mean_loss": round(float(mean), 4)}


def figures(times: Times) -> dict[str, Any]:
    """Seconds of each epoch, by both clocks."""
    spans = [[round(end[clock] - begin[clock], 3) for begin, end in pairwise(times)] for clock in (0, 1)]
    return {"seconds": spans[0], "cpu": spans[1]}


def later(lines: list[dict[str, Any]], arm: str, clock: str) -> float:
    """Mean time of an epoch after the first."""
    spans: list[float] = [span for line in lines if line["arm"] == arm for span in line[clock][1:]]
    return sum(spans) / len(spans)


def main() -> None:
    """Measure all arms, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=7, help="top layers that are trained, of 30")
    parser.add_argument("--rows", type=int, default=48, help="training rows of each set; a multiple of 8")
    parser.add_argument("--at-once", type=int, default=2, help="rows of a step that go through the model at once")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "setting": {
            "layers": options.layers, "epochs": options.epochs, "batch": BATCH, "at_once": options.at_once,
            "threads": torch.get_num_threads(),
        },
        "sets": {name: measured(name, chosen(file, options.rows), options) for name, file in SETS.items()},
        "environment": environment(),
    }  # fmt: skip
    options.results.parent.mkdir(exist_ok=True)
    replace_file(options.results, json.dumps(record, indent=2) + "\n")


def chosen(file: str, count: int) -> list[Example]:
    """The first rows of a file that fit into 512 tokens, encoded."""
    source = load_rows(Path(os.environ.get("PEFTKIT_TEST_DATA", "")) / file)
    data = DataSpec(max_length=LONGEST, too_long="drop")
    kept = encode(source.rows[: 2 * count], source, "train", backbone_of().tokenizer, data, LONGEST).examples
    assert len(kept) >= count, f"{file} has only {len(kept)} rows of {LONGEST} tokens among the first {2 * count}"
    return list(kept[:count])


def measured(name: str, rows: list[Example], options: argparse.Namespace) -> dict[str, Any]:
    """All arms on one set of rows."""
    arms: dict[str, Callable[[], tuple[Times, dict[str, Any]]]] = {
        "uncached": lambda: ours(rows, options.layers, options.epochs, options.at_once, cached=False),
        "cached": lambda: ours(rows, options.layers, options.epochs, options.at_once, cached=True),
        "trl": lambda: theirs(rows, options.layers, options.epochs, BATCH),
    }
    lines: list[dict[str, Any]] = []
    for arm, measure in arms.items():
        times, facts = measure()
        lines.append({"arm": arm, **figures(times), **facts, "load": round(os.getloadavg()[0], 1)})
        print(json.dumps({"set": name, **lines[-1]}), flush=True)
    ratios = {
        f"{other}_over_cached_{clock}": round(later(lines, other, clock) / later(lines, "cached", clock), 2)
        for other in ("trl", "uncached")
        for clock in ("seconds", "cpu")
    }
    print(json.dumps({"set": name, **ratios}), flush=True)
    tokens, answers = sum(len(row.input_ids) for row in rows), sum(row.answer_tokens for row in rows)
    about = {"rows": len(rows), "tokens": tokens, "answer_tokens": answers}
    return {**about, "longest": max(len(row.input_ids) for row in rows), "later_epochs": ratios, "lines": lines}


if __name__ == "__main__":
    main()
