"""Which of a model's blocks a setting names: all, the top ones, the bottom ones, or indices."""

from __future__ import annotations

import re

from peftkit.errors import TuningError

_FORMS = "all, top:N, bottom:N, or indices and ranges such as 0,2,8-15"
_END = re.compile(r"(top|bottom):([1-9]\d*)")
_PART = re.compile(r"(\d+)(?:-(\d+))?")


def chosen_layers(text: str, total: int) -> frozenset[int]:
    """Indices of the blocks that `text` names in a model of `total` blocks, 0 being the one behind the embeddings.

    Raises TuningError for a form that is not known and for blocks that the model does not have.
    """
    text = text.replace(" ", "")
    if text == "all":
        return frozenset(range(total))
    if end := _END.fullmatch(text):
        count = int(end[2])
        if count > total:
            raise _beyond(text, total)
        return frozenset(range(total - count, total) if end[1] == "top" else range(count))
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise TuningError(f"adapter.layers={text!r} names no layers", expected=_FORMS)
        if last >= total:
            raise _beyond(text, total)
        found.update(range(first, last + 1))
    return frozenset(found)


def _beyond(text: str, total: int) -> TuningError:
    return TuningError(
        f"adapter.layers={text!r} names layers that the base does not have",
        expected=f"layers 0 to {total - 1}, as {_FORMS}",
    )
