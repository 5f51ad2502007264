"""The forward pass of a task's head: rows side by side, scores back row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peftkit.backbone.heads import outputs_of
from peftkit.backbone.load import Backbone
from peftkit.base.head import Head
from peftkit.data.chat import IGNORED
from peftkit.data.tasks.task import TaskExample
from peftkit.errors import DataError
from peftkit.generation.forward import autocast, by_length

Pixels = Callable[[Path], NDArray[np.float32]]
"""A photograph as numbers of shape (3, height, width), as the base's preprocessor makes them."""


def collate(
    rows: Sequence[TaskExample], head: Head, pad_id: int, device: torch.device, pixels: Pixels | None = None
) -> dict[str, torch.Tensor]:
    """What the model is called with, and `labels`; token ids and masks are int64 of shape (rows, longest).

    `labels` are int64 of shape (rows,) of single labels, float32 (rows, labels) of several and (rows,) of numbers,
    int64 (rows, longest) of tokens, (rows, 2) of spans.
    """
    if head.kind == "image":
        assert pixels is not None  # whoever reads images brings their preprocessor
        images = np.stack([pixels(row.image) for row in rows if row.image is not None])
        return {"pixel_values": torch.from_numpy(images).to(device), "labels": _targets(rows, head).to(device)}
    longest = max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": _filled([row.input_ids for row in rows], longest, pad_id),
        "attention_mask": _filled([[1] * len(row.input_ids) for row in rows], longest, 0),
        "labels": _targets(rows, head, longest),
    }
    if any(row.type_ids is not None for row in rows):
        batch["token_type_ids"] = _filled([row.type_ids or [0] * len(row.input_ids) for row in rows], longest, 0)
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def outputs(
    model: Any,
    backbone: Backbone,
    rows: Sequence[TaskExample],
    *,
    batch_size: int,
    pixels: Pixels | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[NDArray[np.float32]]:
    """The head's scores of every row, in the order of `rows`: (labels,), of tokens (length, labels), spans (length, 2).

    `model` is the backbone's own, or one with an adapter. Raises DataError for a row that the head would misread.
    """
    head, tokenizer, device = backbone.head, backbone.tokenizer, backbone.device
    assert head is not None  # a language head gives answers: generation.generate
    check_ends(rows, backbone)
    found: list[NDArray[np.float32] | None] = [None] * len(rows)
    done = 0
    with torch.inference_mode(), autocast(device, backbone.placement.compute_dtype):
        for indices in by_length(rows, batch_size):  # type: ignore[arg-type]  # any rows with ids have a length
            batch = collate([rows[i] for i in indices], head, tokenizer.pad_id, device, pixels)
            batch.pop("labels")
            scores = outputs_of(head, model(**batch)).cpu().numpy()
            for index, row in zip(indices, scores, strict=True):
                found[index] = row[: len(rows[index].input_ids)] if head.kind in ("token", "span") else row
            done += len(indices)
            progress(done)
    return [one for one in found if one is not None]


def check_ends(rows: Sequence[TaskExample], backbone: Backbone) -> None:
    """Raise DataError for rows that end with the token which fills short ones: a causal base would read one earlier."""
    causal = backbone.head is not None and backbone.head.kind == "sequence" and not _has_type_ids(rows)
    bad = [row for row in rows if causal and row.input_ids and row.input_ids[-1] == backbone.tokenizer.pad_id]
    if bad:
        raise DataError(
            f"{len(bad)} rows end with the token {backbone.tokenizer.pad_id}, which fills short rows: "
            + ", ".join(row.where for row in bad[:5]),
            expected="texts that end with another token",
            hint="remove the special token at their end",
        )


def _has_type_ids(rows: Sequence[TaskExample]) -> bool:
    return bool(rows) and rows[0].type_ids is not None


def _filled(values: Sequence[Sequence[int]], longest: int, fill: int) -> torch.Tensor:
    filled = torch.full((len(values), longest), fill, dtype=torch.long)
    for at, row in enumerate(values):
        filled[at, : len(row)] = torch.tensor(list(row), dtype=torch.long)
    return filled


def _targets(rows: Sequence[TaskExample], head: Head, longest: int = 0) -> torch.Tensor:
    targets = [list(row.target) for row in rows]
    if head.kind == "token":
        return _filled([[int(value) for value in row] for row in targets], longest, IGNORED)
    if head.kind == "seq2seq":
        return _filled([[int(value) for value in row] for row in targets], max(map(len, targets)), IGNORED)
    if head.kind == "span":
        return torch.tensor([[int(value) for value in row[:2]] for row in targets], dtype=torch.long)
    if head.problem == "multi_label":
        return torch.tensor(targets, dtype=torch.float32)
    dtype = torch.float32 if head.problem == "regression" else torch.long
    return torch.tensor([row[0] if row else 0 for row in targets], dtype=dtype)


def texts(
    model: Any,
    backbone: Backbone,
    rows: Sequence[TaskExample],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What an encoder-decoder base writes for every row, greedily, by transformers' own loop, in their order."""
    tokenizer, device = backbone.tokenizer, backbone.device
    written, done = [""] * len(rows), 0
    with torch.inference_mode(), autocast(device, backbone.placement.compute_dtype):
        for indices in by_length(rows, batch_size):  # type: ignore[arg-type]
            ids = [rows[i].input_ids for i in indices]
            longest = max(map(len, ids))
            found = model.generate(
                input_ids=_filled(ids, longest, tokenizer.pad_id).to(device),
                attention_mask=_filled([[1] * len(row) for row in ids], longest, 0).to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            for index, answer in zip(indices, found.tolist(), strict=True):
                written[index] = tokenizer.decode(answer)
            done += len(indices)
            progress(done)
    return written
