"""Encoded rows as a `datasets.Dataset`, the only form that TRL takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from peftkit.data.chat import Example


def to_dataset(examples: Sequence[Example]) -> Any:
    """A Dataset in memory with the columns index, input_ids and labels; nothing is written to a cache."""
    return Dataset.from_dict(
        {
            "index": list(range(len(examples))),
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
    )
