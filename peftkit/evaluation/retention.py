"""What was forgotten: the likelihood of general text, before and after."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import DataError

GENERAL = Path(__file__).with_name("general.txt")


@dataclass(frozen=True)
class Passage:
    """A piece of text whose every token is predicted."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class RetentionText:
    """General text in passages, with what the manifest records about it."""

    passages: tuple[Passage, ...]
    record: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        """Predicted tokens per passage: all but the first."""
        return [len(passage.input_ids) - 1 for passage in self.passages]


def load_text(source: str, tokenizer: Tokenizer, *, window: int = 256, limit: int | None = None) -> RetentionText:
    """Cut a text file into passages of at most `window` tokens; `general` is the text that ships with peftkit.

    Raises DataError when the file cannot be read or holds no text.
    """
    path = GENERAL if source == "general" else Path(source)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"evaluate.retention={source} cannot be read: {error}",
            expected="a UTF-8 text file, or `general`",
            hint="leave evaluate.retention out to use the text that ships with peftkit",
        ) from None
    blocks = [block.strip() for block in text.split("\n\n")] if source == "general" else [text]
    passages = []
    for block in blocks:
        ids = tokenizer.encode(block)
        passages += [[*tokenizer.bos, *ids[start : start + window]] for start in range(0, len(ids), window)]
    passages = [ids for ids in passages if len(ids) > 1][:limit]
    if not passages:
        raise DataError(f"evaluate.retention={source} holds no text", expected="at least a few sentences")
    record = {
        "role": "retention",
        "source": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": len(passages),
        "tokens": sum(len(ids) for ids in passages),
        "dropped": 0,
    }
    return RetentionText(tuple(Passage(ids, list(ids)) for ids in passages), record)
