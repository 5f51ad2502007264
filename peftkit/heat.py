"""A small matrix of numbers between −1 and 1 as a picture: the colour tells the sign, its strength the size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from markupsafe import Markup

from peftkit.charts import COLOURS
from peftkit.page import clean

_CELL, _LEFT, _GAP, _ROW = 46, 14, 18, 17
_LONGEST = 40


def heat(names: Sequence[str], values: Sequence[Sequence[float | None]], title: str) -> Markup:
    """A square of cells with their numbers, rows and columns numbered as the names below it; None is "-".

    Raises ValueError when `values` is not a square of the size of `names`.
    """
    count = len(names)
    if len(values) != count or any(len(row) != count for row in values):
        raise ValueError(f"{count} names need {count} rows of {count} values")
    top, body = _GAP, []
    for i, row in enumerate(values):
        body += [_text(_LEFT / 2, top + (i + 0.5) * _CELL + 4, f"{i + 1}"), _text(_middle(i), top - 5, f"{i + 1}")]
        body += [_cell(_LEFT + j * _CELL, top + i * _CELL, value) for j, value in enumerate(row)]
    below = top + count * _CELL + 6
    for i, name in enumerate(names):
        shown = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        body.append(_text(_LEFT, below + (i + 1) * _ROW - 5, f"{i + 1}  {shown}", "start"))
    words = "; ".join(
        f"{names[i]} and {names[j]}: {_number(values[i][j])}" for i in range(count) for j in range(i + 1, count)
    )
    key = hashlib.sha256(f"{title}\0{words}".encode("utf-8", "replace")).hexdigest()[:12]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img" aria-labelledby="t{k} d{k}" '
        'font-family="system-ui, sans-serif" font-size="12"><title id="t{k}">{title}</title><desc id="d{k}">{words}'
        "</desc>{body}</svg>\n"
    ).format(
        w=max(_LEFT + count * _CELL, 300),
        h=below + count * _ROW,
        k=key,
        title=clean(title),
        words=clean(words),
        body=Markup("").join(body),
    )


def _cell(x: float, y: float, value: float | None) -> Markup:
    strength = 0.0 if value is None else min(abs(value), 1.0)
    colour = COLOURS[0] if value is None or value >= 0 else COLOURS[1]
    # At most 0.6: the number in the middle keeps its contrast on light and on dark paper.
    box = Markup('<rect x="{}" y="{}" width="{s}" height="{s}" fill="{}" fill-opacity="{:.2f}"/>').format(
        x, y, colour, 0.6 * strength, s=_CELL - 2
    )
    return box + _text(x + _CELL / 2 - 1, y + _CELL / 2 + 3, _number(value))


def _middle(index: int) -> float:
    return _LEFT + (index + 0.5) * _CELL - 1


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.2f}"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:g}" y="{:g}" text-anchor="{}" fill="currentColor">{}</text>').format(
        x, y, anchor, clean(text)
    )
