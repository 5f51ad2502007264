"""LLaMA-Factory as an arm: the Python that PEFTKIT_LLAMAFACTORY names trains the same base on the same token ids.

It runs in a process of its own with its own versions, in float32, with its defaults but for what makes the runs equal:
8 rows to a pass and step in our order, LoRA of rank 16 on all linear layers, the same constant rate, AdamW. It reports
the time of its training loop, the first step included; its loss is the mean of the steps' losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from peftkit.backbone.load import Backbone
from peftkit.data.chat import Example

VARIABLE = "PEFTKIT_LLAMAFACTORY"
_RUN = """
import json, resource, sys
from llamafactory.train.tuner import run_exp
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_exp(json.load(open(sys.argv[1])))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from importlib.metadata import version
packages = {name: version(name) for name in ("llamafactory", "torch", "transformers", "peft", "trl")}
figures = {"peak_bytes": 1024 * (peak - imported), "imported_bytes": 1024 * imported, "versions": packages}
json.dump(figures, open(sys.argv[2], "w"))
"""


def python() -> str | None:
    """The Python to run it with; None where it is not installed."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    done = subprocess.run([named, "-c", "import llamafactory"], capture_output=True, check=False)
    return named if done.returncode == 0 else None


def llamafactory(
    executable: str, backbone: Backbone, rows: list[Example], rate: float, r: int, alpha: int
) -> dict[str, Any]:
    """Train one epoch; figures as the other arms have them. Raises RuntimeError with its last words when it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
        data["attention_mask"] = [[1] * len(row.input_ids) for row in rows]
        DatasetDict({"train": Dataset.from_dict(data)}).save_to_disk(str(folder / "rows"))
        arguments = {
            "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": r,
            "lora_alpha": alpha, "lora_dropout": 0.0, "model_name_or_path": str(backbone.base.folder),
            "template": "default", "dataset": "rows", "tokenized_path": str(folder / "rows"), "cutoff_len": 4096,
            "disable_shuffling": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "learning_rate": rate, "lr_scheduler_type": "constant", "num_train_epochs": 1.0, "optim": "adamw_torch",
            "output_dir": str(folder / "out"), "save_strategy": "no", "report_to": "none", "logging_steps": 1,
            "bf16": False, "fp16": False, "use_cpu": True, "overwrite_cache": False,
        }  # fmt: skip
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        command = [executable, "-c", _RUN, str(folder / "arguments.json"), str(folder / "figures.json")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        results = json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8"))
        figures: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    tokens = sum(len(row.input_ids) for row in rows)
    speed = round(tokens / results["train_runtime"], 2)
    return {"tokens_per_second": speed, "whole": speed, "loss": round(results["train_loss"], 5), **figures}
