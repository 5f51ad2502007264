"""What a row says, as keys: rows that say the same should not stand on both sides, nor twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from peftkit.data.tasks.task import TaskName, TaskRow


def asked(row: TaskRow) -> str:
    """The same for rows that put the same to the model, apart from case and spaces; of an image its bytes."""
    if row.image is not None:
        return hashlib.sha256(row.image.read_bytes()).hexdigest()
    texts = ("\n".join(row.words) or row.text, row.pair or "")
    return "\0".join(" ".join(text.casefold().split()) for text in texts)


def split_keys(rows: Sequence[TaskRow], task: TaskName) -> list[str]:
    """What keeps rows on one side of a split: what they ask; questions go with all others about their context."""
    if task == "extractive_qa" and len({row.text for row in rows}) > 1:
        return [" ".join(row.text.casefold().split()) for row in rows]
    return [asked(row) for row in rows]


def stratum(row: TaskRow) -> str:
    """The label that both sides are to have; rows of several labels, tags, numbers and texts have none."""
    return row.target if isinstance(row.target, str) else ""


def plain_text(row: TaskRow) -> str:
    """What a row puts to the model, as one text; empty for an image."""
    return "\n".join(filter(None, (" ".join(row.words) or row.text, row.pair)))
