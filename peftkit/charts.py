"""Pictures of plain numbers as SVG: lines and histograms, readable on light and dark paper, and by a screen reader."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from peftkit.page import clean
from peftkit.render import number

Point = tuple[float, float]

# Okabe and Ito's colours for people who see few, those with a contrast of at least 3 on white and on #14171b.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0669a")
_DASHES = ("none", "6 3", "2 2", "8 2 2 2")  # so that a print without colours can be read

MOST_POINTS = 600  # of a line: more than the screen has columns for
_MOST_CROSSES = 60
_LARGEST = 1e300  # a span of two larger numbers overflows

# A picture is drawn this large and scaled by the page; at 330 px, a phone, 12 become 9 px.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 240, 54, 12, 26, 40
_ROW = 17  # height of a line of the legend


def line_chart(
    series: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """One line per series of (x, y) over a common frame; what cannot be drawn is a gap with a cross at the bottom.

    `log` draws y by its logarithm, so that 0 and below cannot be drawn; `marks` are upright lines with a name.
    """
    drawn = {name: _Line.of(points, log) for name, points in series.items()}
    places = [point for line in drawn.values() for part in line.parts for point in part]
    crosses = [at for line in drawn.values() for at in line.crosses]
    across = _Axis.over([at for at, _ in places] + crosses + [at for at, _ in marks if _is_drawable(at)], False)
    up = _Axis.over([value for _, value in places], log)
    frame = _Frame(across, up)
    body = [frame.grid(x, y)]
    if not places:
        body.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT / 2, "no values", "middle"))
    for at, label in marks:
        if _is_drawable(at):
            body.append(_mark(frame.x(at), label))
    for index, line in enumerate(drawn.values()):
        body.append(_path(frame, line, index))
    body += [_cross(frame.x(at)) for at in _spread(sorted(crosses), _MOST_CROSSES)]
    if crosses:
        body.append(_text(_WIDTH - _RIGHT, 13, "× cannot be drawn", "end"))
    rows = list(drawn) if len(drawn) > 1 else []
    body.append(_legend(rows))
    words = [_summary(name, points, log) for name, points in series.items()]
    return _svg(f"{y} over {x}", "; ".join(words) or "no values", body, _HEIGHT + _ROW * len(rows))


def histogram(counts: Sequence[int], edges: Sequence[float], label: str) -> Markup:
    """Bars of `counts` between `edges`, one edge more than counts; a last edge at infinity is "and more".

    Raises ValueError when the numbers do not match.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} edges, got {len(edges)}")
    open_end = bool(counts) and not math.isfinite(edges[-1])
    ends = [*edges[:-1], 2 * edges[-2] - edges[-3] if len(edges) > 2 else edges[-2] + 1] if open_end else list(edges)
    tall = [max(count, 0) if _is_drawable(count) else 0 for count in counts]
    frame = _Frame(_Axis.over(ends, False, tight=True), _Axis.over([0, *tall], False))
    body = [frame.grid(label, "count")]
    for (start, end), count in zip(itertools.pairwise(ends), tall, strict=True):
        left, right, top = frame.x(start), frame.x(end), frame.y(count)
        name = f"{number(start)} {'and more' if open_end and end == ends[-1] else f'to {number(end)}'}: {count:,}"
        bar = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="{}"><title>{}</title></rect>')
        wide, high = _c(max(right - left - 1, 0.5)), _c(frame.y(0) - top)
        body.append(bar.format(_c(left), _c(top), wide, high, COLOURS[0], name))
    words = f"{sum(tall):,} in {len(tall)} bars" + (f" from {number(ends[0])} to {number(ends[-1])}" if tall else "")
    return _svg(f"how often: {label}", words, body)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that look like all of them: the lowest and the highest of every stretch are kept."""
    if len(points) <= most:
        return list(points)
    stretches = max(most // 2 - 1, 1)
    kept = {0, len(points) - 1}
    for index in range(stretches):
        reach = range(index * len(points) // stretches, (index + 1) * len(points) // stretches)
        kept.add(min(reach, key=lambda at: points[at][1]))
        kept.add(max(reach, key=lambda at: points[at][1]))
    return [points[at] for at in sorted(kept)]


def ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between two, ends included; `whole` allows integers alone."""
    step = _round_step((high - low) / about)
    step = max(step, 1.0) if whole else step
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten between two, with double and fivefold where there are few, or else round numbers; ends included."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / about))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    found = [digit * 10.0**power for power in range(first, last + 1, every) for digit in digits]
    within = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return within if len(within) > 1 or low >= high else ticks(low, high, about)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((digit * power for digit in (1, 2, 5) if rough <= digit * power * (1 + 1e-9)), 10 * power)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], log: bool, tight: bool = False) -> _Axis:
        """The range of the values; the ends of a linear one are widened to round numbers unless `tight`."""
        if not values:
            return cls(0.0, 1.0, False, ())
        low, high = min(values), max(values)
        if log:
            low, high = (low, high) if high > low * 1.2 else (low / 2, high * 2)
            return cls(low, high, True, tuple(log_ticks(low, high)))
        whole = all(float(value).is_integer() for value in values)
        # A span below the precision of the numbers themselves has no round numbers in it.
        least = max(abs(low), abs(high)) * 1e-9 or 1e-9
        if high - low < least:
            half = abs(high) * 0.05 or 0.5
            low, high = low - half, high + half
        elif not tight and not whole:
            step = _round_step((high - low) / 5)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, False, tuple(ticks(low, high, whole=whole)))

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        scale: Callable[[float], float] = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low)


@dataclass(frozen=True)
class _Line:
    parts: list[list[Point]]
    crosses: list[float]

    @classmethod
    def of(cls, points: Sequence[Point], log: bool) -> _Line:
        """The stretches without a gap, thinned, and where the values are that cannot be drawn."""
        known = [(float(at), float(value)) for at, value in points if _is_drawable(at)]
        groups = itertools.groupby(known, key=lambda point: _is_drawable(point[1]) and (not log or point[1] > 0))
        parts, crosses = [], []
        for good, group in groups:
            if good:
                parts.append(list(group))
            else:
                crosses += [at for at, _ in group]
        total = sum(map(len, parts)) or 1
        shares = [max(4, MOST_POINTS * len(part) // total) for part in parts]
        # NaN at every second step makes as many stretches as points; nobody sees that many on a screen.
        kept = _spread(list(zip(parts, shares, strict=True)), MOST_POINTS // 2)
        return cls([thin(part, share) for part, share in kept], crosses)


@dataclass(frozen=True)
class _Frame:
    across: _Axis
    up: _Axis

    def x(self, value: float) -> float:
        return _LEFT + self.across.share(value) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self.up.share(value) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self, x: str, y: str) -> Markup:
        """The lines at round numbers, their labels, and what the axes are."""
        line = Markup('<path d="{}" stroke="currentColor" stroke-opacity=".15" fill="none"/>')
        rows = "".join(f"M{_LEFT} {_c(self.y(tick))}H{_WIDTH - _RIGHT}" for tick in self.up.ticks)
        edge = f"M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"
        parts = [line.format(rows), line.format(edge)]
        parts += [_text(_LEFT - 5, self.y(tick) + 4, short(tick), "end") for tick in self.up.ticks]
        for tick in self.across.ticks:
            x_at, anchor = (_WIDTH - 2, "end") if self.x(tick) > _WIDTH - 24 else (self.x(tick), "middle")
            parts.append(_text(x_at, _HEIGHT - _BOTTOM + 15, short(tick), anchor))
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, _name(x), "middle"))
        parts.append(_text(4, 13, _name(y), "start"))
        return Markup("").join(parts)


def short(value: float) -> str:
    """A number for an axis: "1.5e-4", "0.02", "1,500", "200k", "1.5M"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(unit, 1e5) <= abs(value) < 1e15:
            return f"{number(float(f'{value / unit:.4g}'))}{name}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{number(float(digits))}e{int(power)}"
    return number(float(f"{value:.6g}"))


def _path(frame: _Frame, line: _Line, index: int) -> Markup:
    colour, dash = COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
    drawn = [[f"{_c(frame.x(at))} {_c(frame.y(value))}" for at, value in part] for part in line.parts if len(part) > 1]
    data = "".join("M" + "L".join(part) for part in drawn)
    points = [part[0] for part in line.parts if len(part) == 1]  # a line of one point cannot be seen
    dots = Markup("").join(
        Markup('<circle cx="{}" cy="{}" r="2.5" fill="{}"/>').format(_c(frame.x(at)), _c(frame.y(value)), colour)
        for at, value in points
    )
    stroke = Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.5" stroke-dasharray="{}"/>')
    return dots + (stroke.format(data, colour, dash) if data else Markup(""))


def _mark(x: float, label: str) -> Markup:
    line = Markup('<path d="M{} {}V{}" stroke="currentColor" stroke-opacity=".6" stroke-dasharray="3 3"/>')
    end = "end" if x > _WIDTH / 2 else "start"
    beside = x - 4 if end == "end" else x + 4
    return line.format(_c(x), _TOP, _HEIGHT - _BOTTOM) + _text(beside, _TOP + 10, _name(label), end)


def _cross(x: float) -> Markup:
    y = _HEIGHT - _BOTTOM - 5
    return Markup('<path d="M{0} {2}L{1} {3}M{1} {2}L{0} {3}" stroke="{4}" stroke-width="1.5"/>').format(
        _c(x - 3), _c(x + 3), y - 3, y + 3, COLOURS[1]
    )


def _legend(names: Sequence[str]) -> Markup:
    """One line per series below the picture: names of runs are long."""
    sample = Markup('<path d="M{} {}h24" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>')
    parts = []
    for index, name in enumerate(names):
        y, colour, dash = _HEIGHT + _ROW * index + 8, COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
        parts += [sample.format(_LEFT, y, colour, dash), _text(_LEFT + 32, y + 4, _name(name, 50), "start")]
    return Markup("").join(parts)


def _summary(name: str, points: Sequence[Point], log: bool) -> str:
    good = [(at, value) for at, value in points if _is_drawable(at) and _is_drawable(value) and (not log or value > 0)]
    lost = len(points) - len(good)
    missing = f", {lost:,} cannot be drawn" if lost else ""
    if not good:
        return f"{name}: no value{missing}"
    low, high = min(good, key=lambda point: point[1]), max(good, key=lambda point: point[1])
    return (
        f"{name}: {len(good):,} values, first {number(good[0][1])}, last {number(good[-1][1])}, "
        f"lowest {number(low[1])} at {number(low[0])}, highest {number(high[1])} at {number(high[0])}{missing}"
    )


def _svg(title: str, words: str, body: Sequence[Markup], height: int = _HEIGHT) -> Markup:
    parts = Markup("").join(body)
    key = hashlib.sha256(f"{title}\0{words}\0{parts}".encode("utf-8", "replace")).hexdigest()[:12]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" role="img" aria-labelledby="t{k} d{k}" '
        'font-family="system-ui, sans-serif" font-size="12"><title id="t{k}">{title}</title><desc id="d{k}">{words}'
        "</desc>{parts}</svg>\n"
    ).format(w=_WIDTH, h=height, k=key, title=clean(title), words=clean(words), parts=parts)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" fill="currentColor">{}</text>').format(
        _c(x), _c(y), anchor, clean(text)
    )


def _name(text: str, longest: int = 32) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _spread(values: Sequence[Any], most: int) -> Iterator[Any]:
    """All values, or `most` of them at even distances."""
    count = min(len(values), most)
    return (values[index * len(values) // count] for index in range(count))


def _is_drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < _LARGEST


def _c(value: float) -> str:
    """A coordinate with a tenth of a unit: finer than a screen, and half the bytes."""
    return f"{value:.1f}".removesuffix(".0")
