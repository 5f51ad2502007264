"""Plain text from plain values: tables, numbers, sizes, durations, intervals, sparklines. No colours, no terminal."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

_ABSENT = "-"
_BARS = "▁▂▃▄▅▆▇█"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], max_width: int = 48) -> str:
    """An aligned table under a rule; columns of numbers stand right, and cells over `max_width` end in "…".

    Raises ValueError when a row has another length than `columns`.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {list(row)!r}")
    texts = [[_cell(value, max_width) for value in row] for row in rows]
    heads = [_cell(column, max_width) for column in columns]
    widths = [max(map(_width, column)) for column in zip(heads, *texts, strict=True)]
    right = [_is_numeric([row[index] for row in rows]) for index in range(len(columns))]
    lines = [heads, ["-" * width for width in widths], *texts]
    return "\n".join(
        "  ".join(_pad(text, width, end) for text, width, end in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """Names and values, one pair a line, the values in one column; nothing is shortened."""
    width = max((_width(name) for name, _ in rows), default=0)
    return "\n".join(f"{_pad(name, width, False)}  {_cell(value, 10_000)}".rstrip() for name, value in rows)


def number(x: float | None) -> str:
    """Four significant digits, all digits before the point, thousands separated; an int is shown whole."""
    if x is None:
        return _ABSENT
    if isinstance(x, int):
        return f"{x:,}"
    x = float(x)
    if not math.isfinite(x):
        return str(x)
    if 1000 <= abs(float(f"{x:.3e}")) < 1e15:
        # Rounding 12,346 to 12,350 would invent a zero; past 1e15 a float has no digits left to show.
        return f"{x:,.0f}"
    text = f"{x:.4g}"
    if text == "-0":
        return "0"
    digits, exponent, power = text.partition("e")
    return f"{digits}e{int(power)}" if exponent else text


def size(count: float | None) -> str:
    """Bytes in decimal units: "512 B", "53.1 MB", "135 MB", "11.4 GB"."""
    if count is None:
        return _ABSENT
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    amount = abs(float(count))
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    # "100.0 MB" and "999.95 kB" come from rounding: the decimal goes where the rounded figure reaches 100.
    text = f"{amount:.0f}" if units[0] == "B" or round(amount, 1) >= 100 else f"{amount:.1f}"
    return f"{'-' if count < 0 else ''}{text} {units[0]}"


def duration(seconds: float | None) -> str:
    """The two largest units: "350 ms", "4.2 s", "2 min 31 s", "1 h 4 min", "3 d 2 h"."""
    if seconds is None:
        return _ABSENT
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.0005 else "under 1 ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    # Each figure is rounded in the smallest unit shown, so that 59.7 s is never "60 s" and 3599.6 s never "60 min".
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def interval(point: float, low: float, high: float) -> str:
    """A figure with its confidence interval: "-0.412 [-0.455, -0.371]".

    Shown to the second digit of the half-width, since what follows is noise; to three places where there is no width.
    """
    figures = (point, low, high)
    if not all(map(math.isfinite, figures)):
        return f"{number(point)} [{number(low)}, {number(high)}]"
    half = abs(high - low) / 2
    places = min(max(1 - math.floor(math.log10(half)), 0), 9) if 0 < half < math.inf else 3
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    texts = [f"{round(figure, places) + 0.0:,.{places}f}" for figure in figures]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """One bar per value, ▁ lowest to █ highest; a long series is averaged into `width` bars; NaN and inf are "·"."""
    count = min(len(values), max(width, 1))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    # One NaN in a bucket must stay visible: it is the thing to look for.
    points = [_mean(values[start:end]) for start, end in itertools.pairwise(edges)]
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return "·" * len(points)
    low, high = min(finite), max(finite)
    return "".join(_bar(point, low, high) if math.isfinite(point) else "·" for point in points)


def _mean(values: Sequence[float]) -> float:
    # Divided first: a sum of large finite values may overflow.
    return sum(float(value) / len(values) for value in values)


def _bar(point: float, low: float, high: float) -> str:
    # Halved first: high - low may overflow.
    span = high / 2 - low / 2
    if span <= 0:
        return _BARS[3]
    return _BARS[min(int((point / 2 - low / 2) / span * len(_BARS)), len(_BARS) - 1)]


def _is_numeric(cells: Sequence[Any]) -> bool:
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in known)


def _cell(value: Any, max_width: int) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    # Names come from strangers' adapters: an escape sequence or a direction override must not reach the terminal.
    text = "".join(_harmless(char) for char in str(value))
    if _width(text) <= max_width:
        return text
    kept, used = [], 0
    for char in text:
        used += _width(char)
        if used > max_width - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"


def _harmless(char: str) -> str:
    if char in "\t\n\r\x0b\x0c\x85\u2028\u2029":
        return " "
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char


def _width(text: str) -> int:
    """Columns that a terminal needs: two for wide East Asian characters and emoji, none for combining marks."""
    if text.isascii():
        return len(text)
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
