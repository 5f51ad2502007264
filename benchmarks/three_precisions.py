"""Fine-tune the embedded base in 4, 8 and 32 bits on the same rows, and print one JSON line per precision.

    PEFTKIT_TEST_DATA=/path/to/data python benchmarks/three_precisions.py --steps 60

Each precision runs in a process of its own, so that peak memory is its own. Lines are appended to
benchmarks/results/three_precisions.jsonl with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "three_precisions.jsonl"
RECIPES = {"qlora_sft": [], "lora8bit_sft": [], "lora_sft": ["quant.bits=32"]}


def run(recipe: str, extra: list[str], rows: Path, steps: int, scratch: Path) -> dict[str, object]:
    """Run one recipe and return what it measured."""
    settings = [
        f"data.train={rows}", "data.max_held_out_rows=64", f"train.max_steps={steps}",
        "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2", "train.learning_rate=1e-3",
        "evaluate.max_new_tokens=96",
        *extra,
    ]  # fmt: skip
    command = [sys.executable, "-m", "peftkit", "train", recipe, *settings, "--json"]
    places = ["--registry", str(scratch / "registry"), "--runs", str(scratch / "runs")]
    done = subprocess.run([*command, *places], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    figures = result["evaluation"]
    return {
        "recipe": recipe,
        "settings": [s for s in settings if not s.startswith("data.train")],
        "rows": rows.name,
        "answer_nll_before": figures["before"]["answer_nll"],
        "answer_nll_after": figures["after"]["answer_nll"],
        "answer_nll_change": figures["other"]["answer_nll_change"],
        "retention_nll_change": figures["other"]["retention_nll_change"],
        "stopped_before": figures["before"]["stopped"],
        "stopped_after": figures["after"]["stopped"],
        "training": result["training"],
    }


def main() -> None:
    """Run every precision in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=Path, help="rows to train on; instruction-data.json of the test data otherwise")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    folder = os.environ.get("PEFTKIT_TEST_DATA")
    if arguments.rows is None and folder is None:
        parser.error("give --rows FILE, or set PEFTKIT_TEST_DATA to the folder of the test data")
    rows = arguments.rows or Path(str(folder)) / "rasbt_instruction" / "instruction-data.json"
    RESULTS.parent.mkdir(exist_ok=True)
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            line = {**run(recipe, RECIPES[recipe], rows, arguments.steps, Path(scratch)), "environment": environment()}
        text = json.dumps(line)
        print(text)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
