"""The rows of an optimizer step in micro-batches of a limited number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from peftkit.data import encoded
from peftkit.data.chat import Example
from peftkit.generation.forward import Labelled
from peftkit.planning.tokens import tokens_at_once
from peftkit.training.spec import TrainSpec


def lengths(rows: Iterable[Labelled]) -> list[int]:
    """Tokens of each row."""
    return [len(row.input_ids) for row in rows]


def tokens_of(rows: Sequence[Example], spec: TrainSpec, device: torch.device) -> int:
    """The most tokens of a run's micro-batches, which its plan counts with."""
    longest = int(encoded.lengths(rows).max())
    return tokens_at_once(min(spec.per_device_train_batch_size, spec.rows_per_step), longest, device.type)


def split(rows: Sequence[int], tokens: int, *, flat: bool) -> list[list[int]]:
    """Indices of rows of these lengths in micro-batches of at most `tokens` tokens; a longer row goes alone.

    Where rows are laid out `flat` a micro-batch takes the sum of its rows' lengths, otherwise each row takes the length
    of the longest beside it. Only the lengths decide, so a resumed run splits alike.
    """
    return _flat(rows, tokens) if flat else _padded(rows, tokens)


def _padded(rows: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows of similar length together, the shortest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: (rows[i], i)):
        if batches and (len(batches[-1]) + 1) * rows[index] <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _flat(rows: Sequence[int], tokens: int) -> list[list[int]]:
    """First fit, the longest row first: at most 11/9 of the fewest possible batches, and one (Johnson 1973)."""
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: (-rows[i], i)):
        for at, left in enumerate(room):
            if rows[index] <= left:
                batches[at].append(index)
                room[at] -= rows[index]
                break
        else:
            batches.append([index])
            room.append(tokens - rows[index])
    return batches
