"""Fine-tune a base once on short instruction rows, and measure it: what one run of a benchmark does.

Rows are `rasbt_instruction/instruction-data.json` of the folder PEFTKIT_TEST_DATA (Apache-2.0), one for each prompt,
those of at most `longest` tokens, in an order of their own: first the test rows, then validation, then training. The
loss falls on the answers only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import torch

from peftkit import locations
from peftkit.backbone.converted import shapes_only
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, read_config
from peftkit.data.audit import DataSpec, encode
from peftkit.data.chat import Example
from peftkit.data.formats import load_rows
from peftkit.errors import TrainingError
from peftkit.evaluation.retention import load_text
from peftkit.generation.forward import Labelled, row_nll
from peftkit.training.memory import peak_bytes
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers
from peftkit.tuning.tuned import Tuned

PARTS = ("test", "validation", "train")
_AT_ONCE = 16


def data_file() -> Path:
    """The file of rows; exits where PEFTKIT_TEST_DATA does not name the folder that has it."""
    file = Path(os.environ.get("PEFTKIT_TEST_DATA", "")) / "rasbt_instruction" / "instruction-data.json"
    if not file.is_file():
        raise SystemExit("set PEFTKIT_TEST_DATA to a folder with rasbt_instruction/instruction-data.json")
    return file


def rows_setting(*, longest: int, test: int, validation: int, training: int) -> dict[str, Any]:
    """Which rows are used, with the digest of their file."""
    digest = hashlib.sha256(data_file().read_bytes()).hexdigest()
    return {"sha256": digest, "longest": longest, "test": test, "validation": validation, "train": training}


def chosen_rows(setting: dict[str, Any], backbone: Backbone) -> dict[str, list[Example]]:
    """The encoded rows of every part; they have no prompt in common."""
    source = load_rows(data_file())
    first = {repr(row.messages[:-1]): row for row in reversed(source.rows)}
    data = DataSpec(max_length=setting["longest"], too_long="drop")
    kept = encode(list(first.values()), source, "train", backbone.tokenizer, data, setting["longest"]).examples
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    parts: dict[str, list[Example]] = {}
    for part in PARTS:
        parts[part], order = [kept[at] for at in order[: setting[part]]], order[setting[part] :]
        assert len(parts[part]) == setting[part], f"there are not enough rows of {setting['longest']} tokens"
    return parts


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Load, train where `setting` has an adapter and settings of training, and measure.

    `loaded_peak_bytes` is the most memory until the base was there, `peak_bytes` that of training, both of the process.

    Sums of NLL, in nats, for each row of the parts that `measured` names, and for each passage of the general text
    where it names `retention`. A run that training itself stopped has `diverged` in place of them.
    """
    adapter = AdapterSpec.model_validate(setting["adapter"]) if setting["adapter"] else None
    backbone = load_backbone(
        BaseSpec(source=setting["base"]),
        QuantSpec(bits=setting["bits"]),
        locations.cache_root().path,
        dense=dense_layers(adapter) if adapter else None,
    )
    parts = chosen_rows(setting["rows"], backbone)
    result: dict[str, Any] = {"loaded_peak_bytes": peak_bytes(backbone.device)}
    model = backbone.model
    if adapter and setting["train"]:
        tuned = inject(backbone, adapter, rows=parts["train"])
        result |= _trained(tuned, parts["train"], TrainSpec.model_validate(setting["train"]))
        model = tuned.model
    if "diverged" in result:
        return result
    for part in setting["measured"]:
        general = load_text("general", backbone.tokenizer).passages
        rows: Sequence[Labelled] = general if part == "retention" else parts[part]
        options: dict[str, Any] = {"pad_id": backbone.tokenizer.pad_id, "device": backbone.device}
        result[part] = [round(nll, 4) for nll in row_nll(model, rows, batch_size=_AT_ONCE, **options)]
    return result


def counted(setting: dict[str, Any]) -> dict[str, Any]:
    """Tokens that the NLL of each row or passage is summed over, by part, and what training reads in one epoch."""
    backbone = load_backbone(BaseSpec(source=setting["base"]), QuantSpec(bits=32), locations.cache_root().path)
    parts = chosen_rows(setting["rows"], backbone)
    return {
        **{part: [example.answer_tokens for example in rows] for part, rows in parts.items() if part != "train"},
        "retention": load_text("general", backbone.tokenizer).tokens,
        "epoch_tokens": sum(len(example.input_ids) for example in parts["train"]),
        "epoch_answer_tokens": sum(example.answer_tokens for example in parts["train"]),
    }


def _trained(tuned: Tuned, rows: list[Example], spec: TrainSpec) -> dict[str, Any]:
    """Train; seconds of every epoch, from one figure of a step to the next: the first has what came before it too."""
    _forget_peak()
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = train(
                tuned,
                rows,
                spec,
                Path(folder),
                cache=Path(folder),  # a trunk that another run has cached would spare this one its work
                log=lambda step, figures: marks.append(time.perf_counter()),
            )
        except TrainingError as error:
            if len(marks) == 1:  # it never began: a setting that cannot be, and no result
                raise
            return {"diverged": f"after {len(marks) - 1} steps: {error.fact}"}
    each = len(rows) // spec.rows_per_step
    ends = marks[::each]
    numbers = tuned.trainable_parameters
    return {
        "trained_numbers": numbers,
        "trained_share": numbers / _numbers(tuned.backbone),
        "bytes": {"trained": 4 * numbers, "gradients": 4 * numbers, "optimizer": 8 * numbers},
        "epoch_seconds": [round(end - start, 3) for start, end in pairwise(ends)],
        "peak_bytes": done.peak_bytes,
        "steps": done.steps,
        "tokens": done.tokens,
        "first_loss": done.first_loss,
        "last_loss": done.last_loss,
    }


def _forget_peak() -> None:
    """Begin the process's peak memory anew; where that cannot be done, it goes on from loading's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def _numbers(backbone: Backbone) -> int:
    """How many numbers the base has; its packed tensors would not say."""
    model: Any = shapes_only(read_config(backbone.base.folder))
    return sum(parameter.numel() for parameter in model.parameters())
