"""Encoded rows as a `datasets.Dataset`, the only form that TRL takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from peftkit.data.chat import Example
from peftkit.data.encoded import EncodedRows


def to_dataset(examples: Sequence[Example]) -> Any:
    """A Dataset with the columns index, input_ids and labels; nothing is written to a cache.

    Those of `EncodedRows` share their memory, or their file.
    """
    index = list(range(len(examples)))
    if isinstance(examples, EncodedRows):
        ids, labels = (examples.table.column(name) for name in ("input_ids", "labels"))
        table = pa.table({"index": index, "input_ids": ids, "labels": labels})
        return Dataset(table, fingerprint=examples.sha256[:16])  # without one, upstream pickles the table to hash it
    return Dataset.from_dict(
        {
            "index": index,
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
    )
