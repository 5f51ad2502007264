"""Training answers to test memory with: begun with a few of their tokens, are they continued word for word?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import encode_row
from peftkit.data.formats import Row
from peftkit.data.template import Rendering

ROWS = 8
BEGUN, CONTINUED = 8, 16
"""Tokens of an answer that are given, and that have to follow."""
_TRIED = 64  # rows encoded at most, to find ROWS that are long enough


@dataclass(frozen=True)
class Recall:
    """A prompt with the first BEGUN tokens of its training answer, and the CONTINUED tokens after them."""

    prompt: list[int]
    rest: list[int]


def choose(rows: Sequence[Row], tokenizer: Tokenizer, rendering: Rendering, positions: int | None) -> list[Recall]:
    """Up to ROWS training rows with the longest answers that stand there once.

    An answer that stands there twice is learned as a pattern, and a short one proves little. Rows that the base has no
    positions for are passed over; whether a short run reached a row is not known here.
    """
    counts = Counter(_answer(row) for row in rows if row.text is None)
    once = [row for row in rows if row.text is None and counts[_answer(row)] == 1]
    found: list[Recall] = []
    for row in sorted(once, key=lambda row: -len(_answer(row)))[:_TRIED]:
        example = encode_row(row, 0, tokenizer, rendering)[-1]
        answer = example.input_ids[example.answer_start :]
        prompt = [*example.prompt_ids, *answer[:BEGUN]]
        rest = answer[BEGUN : BEGUN + CONTINUED]
        too_long = positions is not None and len(prompt) + CONTINUED > positions
        if len(answer) > BEGUN + CONTINUED and not too_long:  # the last token only ends it
            found.append(Recall(prompt, rest))
        if len(found) == ROWS:
            break
    return found


def _answer(row: Row) -> str:
    return str(row.messages[-1].get("content") or "") if row.messages else ""
