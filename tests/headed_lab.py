"""Backbones with a task's head on the bases of tiny_encoders.py, and rows for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_bases import write_base
from tiny_encoders import IMAGE_BASES, IMAGE_SIZE, write_bert, write_image_base, write_t5

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED
from peftkit.data.tasks.task import TaskExample
from peftkit.generation.tasks import collate

HEADS = {
    "sequence": Head("sequence", ("red", "green", "blue")),
    "several": Head("sequence", ("red", "green", "blue"), "multi_label"),
    "number": Head("sequence", ("stars",), "regression"),
    "token": Head("token", ("O", "B-x", "I-x")),
    "span": Head("span"),
    "image": Head("image", ("left", "middle", "right")),
    "seq2seq": Head("seq2seq"),
}
PAIRS = [
    *((base, head) for base in ("bert", "llama") for head in ("sequence", "several", "number", "token", "span")),
    *((base, "image") for base in IMAGE_BASES),
    *(("t5", head) for head in ("seq2seq", "sequence", "token", "span")),
]
"""Base and head that go together."""
_FILES = sorted(Path(__file__).parent.glob("*.py"))
"""Stand for pictures: a digest is taken of each, and `pixels` draws numbers for its name."""


@once
def write_bases(folder: Path) -> dict[str, Path]:
    """One tiny base of every kind."""
    bases = {"bert": write_bert(folder / "bert"), "t5": write_t5(folder / "t5"), "llama": write_base(folder / "llama")}
    return bases | {kind: write_image_base(folder / kind, kind) for kind in IMAGE_BASES}


def load(base: Path, head: str | Head, bits: int = 32, *, seed: int = 0, **options: Any) -> Backbone:
    """Load a base with a head of HEADS, or another."""
    quant = QuantSpec(bits=bits, **({"dtype": "float32"} if bits < 32 else {}))
    given = HEADS[head] if isinstance(head, str) else head
    cache = base.parent / "cache"
    return load_backbone(BaseSpec(source=str(base)), quant, cache, head=given, seed=seed, **options)


def examples(head: str, lengths: Sequence[int], seed: int = 0, low: int = 6, high: int = 180) -> list[TaskExample]:
    """Rows with drawn tokens and targets; of images `lengths` only counts them."""
    draw = random.Random(seed)
    return [_example(head, length, at, draw, low, high) for at, length in enumerate(lengths)]


def _example(head: str, length: int, at: int, draw: random.Random, low: int, high: int) -> TaskExample:
    ids = [draw.randrange(low, high) for _ in range(length)]
    where = f"made:{at + 1}"
    if head == "image":
        return TaskExample(range(4), (draw.randrange(3),), at, where, image=_FILES[at % len(_FILES)])
    if head == "several":
        return TaskExample(ids, tuple(float(draw.randrange(2)) for _ in range(3)), at, where)
    if head == "number":
        return TaskExample(ids, (draw.uniform(-2, 2),), at, where)
    if head == "span":
        first = draw.randrange(length)
        return TaskExample(ids, (first, draw.randrange(first, length)), at, where)
    if head == "token":
        tags = tuple(IGNORED if index % 3 == 0 else draw.randrange(3) for index in range(length))
        return TaskExample(ids, tags, at, where, per_token=True)
    if head == "seq2seq":
        return TaskExample(
            ids, (*(draw.randrange(low, high) for _ in range(length // 2)), 1), at, where, per_token=True
        )
    return TaskExample(ids, (draw.randrange(3),), at, where)


def pixels(path: Path) -> NDArray[np.float32]:
    """A drawn picture for the path of an example."""
    return np.random.default_rng(crc32(path.name.encode())).normal(size=(3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def batch_of(backbone: Backbone, rows: Sequence[TaskExample]) -> dict[str, torch.Tensor]:
    """The rows side by side, labels included."""
    assert backbone.head is not None
    return collate(rows, backbone.head, backbone.tokenizer.pad_id, backbone.device, pixels)


def scores(model: Any, backbone: Backbone, rows: Sequence[TaskExample]) -> torch.Tensor:
    """What a model says of rows, in evaluation mode."""
    from peftkit.backbone.heads import outputs_of

    assert backbone.head is not None
    batch = batch_of(backbone, rows)
    labels = batch.pop("labels")
    if backbone.head.kind == "seq2seq":
        batch["decoder_input_ids"] = backbone.model.prepare_decoder_input_ids_from_labels(labels)
    model.eval()
    with torch.no_grad():
        return outputs_of(backbone.head, model(**batch))
