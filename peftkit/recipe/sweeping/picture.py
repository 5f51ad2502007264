"""Points over a setting as SVG, with their intervals: numbers on a linear or logarithmic axis, words side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from peftkit.charts import COLOURS, log_ticks, short, ticks
from peftkit.page import clean
from peftkit.render import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 240, 54, 16, 26, 40
_WORD = 14  # characters of a word below the axis


@dataclass(frozen=True)
class Dot:
    """A figure over a setting; `best` is drawn in the other colour, `low` and `high` as a line through it."""

    x: float | str
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None
    best: bool = False


def scatter(
    dots: Sequence[Dot],
    x: str,
    y: str,
    *,
    log: bool = False,
    joined: bool = False,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Dots over `x`; `log` where x is positive and searched so; `joined` by a line; `level` is a named line across.

    Values that are not finite are left out, and counted in the text for a screen reader.
    """
    good = [dot for dot in dots if math.isfinite(dot.y)]
    words = list(dict.fromkeys(str(dot.x) for dot in good if isinstance(dot.x, str)))
    places = [float(words.index(str(dot.x))) if isinstance(dot.x, str) else float(dot.x) for dot in good]
    across = _Axis.over(places, log, margin=0.5 if words else 0.0)
    ends = [end for dot in good for end in (dot.low, dot.high) if end is not None and math.isfinite(end)]
    up = _Axis.over([*(dot.y for dot in good), *ends, *([level[1]] if level else [])], False)
    body = [_grid(across, up, words, x, y)]
    if level:
        body.append(_level(up, *level))
    drawn = [(_x(across, place), _y(up, dot.y), dot) for place, dot in zip(places, good, strict=True)]
    if joined and len(drawn) > 1:
        line = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top, _ in sorted(drawn, key=lambda each: each[0]))
        body.append(Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.5"/>').format(line, COLOURS[0]))
    for left, top, dot in sorted(drawn, key=lambda each: each[2].best):
        body.append(_dot(up, left, top, dot))
    lost = f"; {len(dots) - len(good)} cannot be drawn" if len(good) < len(dots) else ""
    told = "; ".join(f"{dot.label or dot.x}: {number(dot.y)}" for dot in good) or "no values"
    return _svg(f"{y} over {x}", told + lost, body)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], log: bool, margin: float = 0.0) -> _Axis:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if log and low > 0:
            factor = (high / low) ** 0.05 if high > low else 2.0
            return cls(low / factor, high * factor, True)
        spread = margin or (high - low) * 0.06 or abs(high) * 0.05 or 0.5
        return cls(low - spread, high + spread, False)

    def share(self, value: float) -> float:
        low, high, at = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return (at - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        return (log_ticks if self.log else ticks)(self.low, self.high)


def _x(axis: _Axis, value: float) -> float:
    return _LEFT + axis.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.share(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(across: _Axis, up: _Axis, words: Sequence[str], x: str, y: str) -> Markup:
    line = Markup('<path d="{}" stroke="currentColor" stroke-opacity=".15" fill="none"/>')
    parts = [line.format("".join(f"M{_LEFT} {_y(up, tick):.1f}H{_WIDTH - _RIGHT}" for tick in up.ticks))]
    parts.append(line.format(f"M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"))
    parts += [_text(_LEFT - 5, _y(up, tick) + 4, short(tick), "end") for tick in up.ticks]
    named = [(float(at), word) for at, word in enumerate(words)] or [(tick, short(tick)) for tick in across.ticks]
    for at, word in named:
        cut = word if len(word) <= _WORD else f"…{word[1 - _WORD :]}"  # of a path the end tells most
        parts.append(_text(_x(across, at), _HEIGHT - _BOTTOM + 15, cut, "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x, "middle"))
    parts.append(_text(4, 13, y, "start"))
    return Markup("").join(parts)


def _level(up: _Axis, name: str, value: float) -> Markup:
    at = _y(up, value)
    line = Markup('<path d="M{} {:.1f}H{}" stroke="currentColor" stroke-opacity=".6" stroke-dasharray="3 3"/>')
    return line.format(_LEFT, at, _WIDTH - _RIGHT) + _text(_WIDTH - _RIGHT, at - 4, name, "end")


def _dot(up: _Axis, left: float, top: float, dot: Dot) -> Markup:
    colour = COLOURS[1] if dot.best else COLOURS[0]
    through = Markup("")
    if dot.low is not None and dot.high is not None and math.isfinite(dot.low) and math.isfinite(dot.high):
        path = f"M{left:.1f} {_y(up, dot.low):.1f}V{_y(up, dot.high):.1f}"
        through = Markup('<path d="{}" stroke="{}" stroke-opacity=".5"/>').format(path, colour)
    circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"><title>{}</title></circle>')
    return through + circle.format(left, top, 4 if dot.best else 3, colour, clean(f"{dot.label} {number(dot.y)}"))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="currentColor">{}</text>').format(
        x, y, anchor, clean(text)
    )


def _svg(title: str, words: str, body: Sequence[Markup]) -> Markup:
    parts = Markup("").join(body)
    key = hashlib.sha256(f"{title}\0{words}\0{parts}".encode("utf-8", "replace")).hexdigest()[:12]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img" aria-labelledby="t{k} d{k}" '
        'font-family="system-ui, sans-serif" font-size="12"><title id="t{k}">{title}</title><desc id="d{k}">{words}'
        "</desc>{parts}</svg>\n"
    ).format(w=_WIDTH, h=_HEIGHT, k=key, title=clean(title), words=clean(words), parts=parts)
