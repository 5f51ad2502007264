"""What few-shot runs gave: mean over draws with Student's interval, the interval over rows beside it; table, page."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftkit.atomic import replace_file
from peftkit.events import Note, Report, Table
from peftkit.page import Section, facts_html, figure_html, page, paragraph_html, side_by_side_html, table_html
from peftkit.plain import as_json_text
from peftkit.recipe.sweeping.picture import Dot, scatter
from peftkit.recipe.sweeping.trial import Objective
from peftkit.render import interval, number
from peftkit.runs.contents import flat_figures, is_interval

RESULT, PAGE = "few-shot.json", "few-shot.html"
LEVEL = 0.95
MEANING = (
    "The interval over draws says how other draws of n training rows do on these held-out rows, with the same seeds of "
    "training; that over rows, of the middle draw, how the same adapter does on other held-out rows. Neither holds the "
    "other. Draws come from one set of rows: where n is near its size they share most of them, and differ too little."
)


@dataclass(frozen=True)
class Draw:
    """One run on `rows` training rows; without an objective it failed, for the `reason`."""

    rows: int
    draw: int
    run: str | None = None
    held_out: str | None = None
    """Digest of the rows that it was measured on."""
    objective: Objective | None = None
    before: float | None = None
    """The same figure of the base, where it was measured."""
    baselines: dict[str, float] = field(default_factory=dict)
    """The same figure of each trivial baseline that learned from the same training rows."""
    reason: str | None = None

    @classmethod
    def of(
        cls, rows: int, draw: int, run: str, held_out: str | None, objective: Objective, figures: Mapping[str, Any]
    ) -> Draw:
        """A finished run; `figures` are all that it measured."""
        measured = figures.get("evaluation", {})
        before = _named(objective.name, measured.get("before", {}))
        others = measured.get("other", {}).get("baselines", {})
        found = {name: _named(objective.name, each) for name, each in others.items()}
        known = {name: value for name, value in found.items() if value is not None}
        return cls(rows, draw, run, held_out, objective, None if others else before, known)


@dataclass(frozen=True)
class Point:
    """The draws of one number of rows, summed up; without two draws there is no interval over them."""

    rows: int
    draws: int
    failed: int
    mean: float | None
    low: float | None
    high: float | None
    deviation: float | None
    """Sample standard deviation between draws."""
    middle: Objective | None
    """The median draw (the lower one of two), with its interval over held-out rows."""
    baselines: dict[str, float]
    """Mean over draws."""


@dataclass(frozen=True)
class Curve:
    """All draws, and one point for each number of rows."""

    name: str
    folder: Path
    fixed: tuple[str, ...]
    draws: tuple[Draw, ...]
    points: tuple[Point, ...]

    @property
    def metric(self) -> str:
        """What is measured, and which way is better."""
        found = next((draw.objective for draw in self.draws if draw.objective), None)
        return f"{found.name} ({'less' if found.direction == 'min' else 'more'} is better)" if found else "objective"

    @property
    def before(self) -> float | None:
        """The base without training, the same for all draws; None where baselines stand in its place."""
        return next((draw.before for draw in self.draws if draw.before is not None), None)

    def record(self) -> dict[str, Any]:
        """What few-shot.json holds."""
        facts = {"name": self.name, "metric": self.metric, "level": LEVEL, "fixed": list(self.fixed)}
        every = {"points": [asdict(point) for point in self.points], "draws": [asdict(draw) for draw in self.draws]}
        return {**facts, "meaning": MEANING, "before": self.before, **every}

    def tell(self, report: Report) -> None:
        """Report the table, what its intervals mean, and where the page is."""
        report(Table(f"{self.name}: {self.metric}", *table(self)))
        report(Note(MEANING))
        report(Note(f"page: {self.folder / PAGE}"))


def keep(folder: Path, name: str, fixed: Sequence[str], draws: Sequence[Draw]) -> Curve:
    """Sum up the draws so far, and write few-shot.json and few-shot.html as one step each."""
    groups = itertools.groupby(sorted(draws, key=lambda draw: (draw.rows, draw.draw)), key=lambda draw: draw.rows)
    points = tuple(summed_up(rows, list(group)) for rows, group in groups)
    curve = Curve(name, folder, tuple(fixed), tuple(draws), points)
    replace_file(folder / RESULT, as_json_text(curve.record()))
    replace_file(folder / PAGE, curve_page(curve))
    return curve


def summed_up(rows: int, draws: Sequence[Draw]) -> Point:
    """Mean over draws with Student's interval: mean ± t(0.975, k - 1) · s / √k for k draws."""
    found = sorted((draw.objective for draw in draws if draw.objective), key=lambda each: each.value)
    values = [each.value for each in found]
    names = dict.fromkeys(name for draw in draws for name in draw.baselines)
    given = {name: [draw.baselines[name] for draw in draws if name in draw.baselines] for name in names}
    baselines = {name: statistics.fmean(each) for name, each in given.items()}
    failed = len(draws) - len(found)
    middle = found[(len(found) - 1) // 2] if found else None
    mean = statistics.fmean(values) if values else None
    if mean is None or len(values) < 2:
        return Point(rows, len(values), failed, mean, None, None, None, middle, baselines)
    deviation = statistics.stdev(values)
    half = _student(len(values) - 1) * deviation / math.sqrt(len(values))
    return Point(rows, len(values), failed, mean, mean - half, mean + half, deviation, middle, baselines)


def table(curve: Curve) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """Columns and lines, also for the page."""
    names = list(dict.fromkeys(name for point in curve.points for name in point.baselines))
    failures = any(point.failed for point in curve.points)
    columns = ("n", "draws", "mean over draws", "deviation", "middle draw, over rows", *names)
    lines = []
    for point in curve.points:
        mean = "" if point.mean is None else number(point.mean)
        if point.mean is not None and point.low is not None and point.high is not None:
            mean = interval(point.mean, point.low, point.high)
        middle, deviation = _over_rows(point.middle), point.deviation
        others = [point.baselines.get(name) for name in names]
        line = (point.rows, point.draws, mean, deviation, middle, *others)
        lines.append((*line, f"{point.failed} failed" if point.failed else "") if failures else line)
    return (*columns, "left out") if failures else columns, tuple(lines)


def curve_page(curve: Curve) -> str:
    """A whole HTML document with the curve, each draw, and the table."""
    means = [
        Dot(float(point.rows), point.mean, f"n = {point.rows}:", point.low, point.high)
        for point in curve.points
        if point.mean is not None
    ]
    every = [
        Dot(float(draw.rows), draw.objective.value, f"n = {draw.rows}, draw {draw.draw}:")
        for draw in curve.draws
        if draw.objective
    ]
    level = None if curve.before is None else ("the base", curve.before)
    pictures = [
        figure_html(
            scatter(means, "n", curve.metric, log=True, joined=True, level=level),
            "mean over draws; upright lines are 95 % intervals over draws",
        ),
        figure_html(scatter(every, "n", curve.metric, log=True, level=level), "each draw"),
    ]
    for name in dict.fromkeys(name for point in curve.points for name in point.baselines):
        dots = [Dot(float(p.rows), p.baselines[name], f"n = {p.rows}:") for p in curve.points if name in p.baselines]
        pictures.append(figure_html(scatter(dots, "n", curve.metric, log=True, joined=True), f"baseline: {name}"))
    columns, lines = table(curve)
    failed = [(f"n = {draw.rows}, draw {draw.draw}", draw.reason) for draw in curve.draws if draw.reason]
    sections = [
        Section("Curve", side_by_side_html(pictures) + paragraph_html(MEANING)),
        Section("Figures", table_html(columns, lines)),
        Section("The same in all", facts_html(text.partition("=")[::2] for text in curve.fixed)),
    ]
    if failed:
        sections.append(Section("Failed, and left out", facts_html(failed)))
    return page(f"Few-shot runs of {curve.name}", sections)


def _student(freedom: int) -> float:
    """The quantile of Student's t that a two-sided interval of LEVEL takes."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def _named(name: str, figures: Any) -> float | None:
    """The figure of a name, or the point of its interval; None where there is none."""
    for key, value in flat_figures(figures if isinstance(figures, Mapping) else {name: figures}):
        if key.rpartition(".")[2] == name:
            found = value["point"] if is_interval(value) else value
            return float(found) if isinstance(found, int | float) else None
    return None


def _over_rows(found: Objective | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return number(found.value)
    return interval(found.value, found.low, found.high)
