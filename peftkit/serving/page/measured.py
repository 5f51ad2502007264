"""The figures of a manifest as lines to read: before, after, the change, and which way it points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from peftkit import render
from peftkit.base.record import plain
from peftkit.registry.index import Summary
from peftkit.registry.manifest import Metrics

_MOST = 24
"""Lines: a stranger's manifest may hold any number of figures."""
_NAMES = {
    "answer_nll": "answer NLL",
    "retention_nll": "general text NLL (retention)",
    "stopped": "answers that end by themselves",
}
_LOWER_IS_BETTER = ("nll", "perplexity", "loss", "error", "mae", "mse", "rmse", "ece", "brier")
_COUNTS = ("rows", "compared_rows")
_RETENTION = "retention_nll"

Verdict = Literal["better", "worse", "unclear"]


def measures(metrics: Metrics) -> list[dict[str, Any]]:
    """A line for every figure that was measured before or after; what general text lost has a line of its own."""
    before, after = metrics.before, metrics.after
    paths = [path for path in dict.fromkeys([*_paths(before), *_paths(after)]) if path != (_RETENTION,)]
    return [_line(metrics, path) for path in paths[:_MOST]]


def retention(metrics: Metrics) -> dict[str, Any] | None:
    """What became of general text; None where it was not measured."""
    known = _RETENTION in metrics.before or _RETENTION in metrics.after or f"{_RETENTION}_change" in metrics.other
    return _line(metrics, (_RETENTION,)) if known else None


def stored(figures: Mapping[str, float], key: str) -> str | None:
    """One figure of a summary as text; None where it has none."""
    return shown({end: figures[f"{key}.{end}"] for end in ("point", "low", "high") if f"{key}.{end}" in figures})


def score(summary: Summary) -> str | None:
    """What a version scored after training, with the metric's name; None where it was not measured."""
    figures, metric = summary.figures, summary.metric
    if "after.score.mean" in figures:
        name, value = metric or "score", {"mean": figures["after.score.mean"], "n": figures.get("after.score.n")}
        return f"{_spoken(name)} {shown(value)}"
    value_of_task = stored(figures, f"after.{metric}") if metric else None
    return f"{_spoken(metric)} {value_of_task}" if metric and value_of_task else None


def shown(value: Any) -> str | None:
    """A figure as text: a number, an interval, or a mean over rows; None for anything else."""
    if _is_number(value):
        return render.number(value)
    if not isinstance(value, Mapping):
        return None
    point, low, high, mean, count = (value.get(key) for key in ("point", "low", "high", "mean", "n"))
    if _is_number(point):
        return render.interval(point, low, high) if _is_number(low) and _is_number(high) else render.number(point)
    if _is_number(mean):
        return render.number(mean) + (f" on {count:,.0f} rows" if _is_number(count) else "")
    return None


def _line(metrics: Metrics, path: tuple[str, ...]) -> dict[str, Any]:
    *of, name = path
    changed = None if of else _change(name, metrics.other)
    return {
        "name": _label(name, metrics.other) + "".join(f" on {plain(each)}" for each in of),
        "before": shown(_at(metrics.before, path)) or (_rival(metrics.other) if name == "score" else None),
        "after": shown(_at(metrics.after, path)),
        "change": shown(changed),
        "verdict": _verdict(changed, _is_higher_better(name, metrics.other)),
    }


def _rival(other: Mapping[str, Any]) -> str | None:
    """The best of the base with instructions or examples, where the base alone was not scored."""
    scored = {name: _at(other, (name, "score", "mean")) for name in other}
    means = {name: mean for name, mean in scored.items() if _is_number(mean)}
    best = max(means, key=lambda name: means[name], default=None)
    return f"{render.number(means[best])} ({plain(best)})" if best is not None else None


def _label(name: str, other: Mapping[str, Any]) -> str:
    metric = other.get("metric")
    if name == "score" and isinstance(metric, str):
        return _spoken(metric)
    return _NAMES.get(name) or _spoken(name)


def _spoken(name: str) -> str:
    return plain(name.replace("_", " "))


def _change(name: str, other: Mapping[str, Any]) -> Any:
    """Adapter − base; of a task, `score_change` is the change of the metric that ranks."""
    return other.get("score_change") if name == other.get("metric") else other.get(f"{name}_change")


def _paths(side: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where figures stand: at the top, or, of a combination, below the reference of each parent."""
    for name, value in side.items():
        if shown(value) is not None and name not in _COUNTS:
            yield (name,)
        elif isinstance(value, dict) and "@" in name:
            yield from ((name, below) for below, figure in value.items() if shown(figure) is not None)


def _at(side: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = side
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _verdict(change: Any, higher: bool) -> Verdict | None:
    """Which way a change points, where its interval leaves no doubt."""
    low, high = (change.get(key) if isinstance(change, Mapping) else None for key in ("low", "high"))
    if not _is_number(low) or not _is_number(high):
        return None
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == higher else "worse"


def _is_higher_better(name: str, other: Mapping[str, Any]) -> bool:
    said = other.get("higher_is_better")
    if name == other.get("metric") and isinstance(said, bool):
        return said
    return not any(part in _LOWER_IS_BETTER for part in name.lower().split("_"))
