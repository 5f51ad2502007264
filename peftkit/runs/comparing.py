"""Several runs side by side: the settings, versions and data that differ, their figures, their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from peftkit.charts import line_chart
from peftkit.page import Section, figure_html, page, paragraph_html, side_by_side_html, table_html
from peftkit.render import duration
from peftkit.runs.contents import CHECKPOINTS, as_text, checkpoint_steps, flat_figures, read_json, read_text
from peftkit.runs.records import HELD_OUT, read_metrics
from peftkit.runs.status import RunStatus

ABSENT = "(none)"
Rows = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side; each row is a name and one value per run."""

    runs: tuple[RunStatus, ...]
    settings: Rows
    """Settings that differ, by dotted key."""
    environment: Rows
    """Versions and machine, where they differ."""
    data: Rows
    """What was trained on, by digest and count; empty when no run kept it."""
    figures: Rows
    losses: tuple[tuple[tuple[int, float], ...], ...]
    held_out: tuple[tuple[tuple[int, float], ...], ...]

    def as_html(self) -> str:
        """The comparison as one offline page."""
        names = [run.id for run in self.runs]
        facts = [("recipe", *(run.recipe for run in self.runs)), ("state", *(run.state for run in self.runs)),
                 ("took", *(duration(run.seconds) for run in self.runs)),
                 ("saved as", *(run.saved_as or "nothing" for run in self.runs))]  # fmt: skip
        lines = (("loss, training rows", self.losses), ("held-out NLL", self.held_out))
        charts = [
            figure_html(line_chart(dict(zip(names, curves, strict=True)), "step", label))
            for label, curves in lines
            if any(curves)
        ]
        parts = [
            Section("Runs", table_html(("", *names), facts)),
            Section("Losses", side_by_side_html(charts) if charts else paragraph_html("No step has been recorded.")),
            Section("Figures", self._table(self.figures)),
            Section("Settings that differ", self._table(self.settings)),
            Section("Data", self._table(self.data)),
            Section("Versions and machine, where they differ", self._table(self.environment)),
        ]
        return page(f"{len(names)} runs compared", parts)

    def _table(self, rows: Rows) -> Markup:
        if not rows:
            return paragraph_html("None.", "soft")
        return table_html(("", *(run.id for run in self.runs)), [(name, *map(as_text, vs)) for name, vs in rows])


def compare_runs(runs: Sequence[RunStatus]) -> RunComparison:
    """Compare runs by what their folders say; what a folder does not say is "(none)"."""
    records = [read_metrics(run.path) for run in runs]
    return RunComparison(
        tuple(runs),
        _differing([_settings(run) for run in runs]),
        _differing([_environment(run) for run in runs]),
        _rows([_data(run) for run in runs]),
        _rows([dict(flat_figures(run.figures)) for run in runs]),
        tuple(_curve(trace, "loss") for trace in records),
        tuple(_curve(trace, HELD_OUT) for trace in records),
    )


def _curve(trace: Sequence[tuple[int, Mapping[str, float]]], key: str) -> tuple[tuple[int, float], ...]:
    return tuple((step, figures[key]) for step, figures in trace if key in figures)


def _rows(sides: Sequence[Mapping[str, Any]]) -> Rows:
    names = dict.fromkeys(name for side in sides for name in side)
    return tuple((name, tuple(side.get(name, ABSENT) for side in sides)) for name in names)


def _differing(sides: Sequence[Mapping[str, Any]]) -> Rows:
    return tuple((name, values) for name, values in _rows(sides) if any(value != values[0] for value in values))


def _settings(run: RunStatus) -> dict[str, Any]:
    text, _ = read_text(run.path, "config.yaml")
    try:
        found = dict(flat_figures(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {"config.yaml": "unreadable"}
    return {"recipe": run.recipe, **found}


def _environment(run: RunStatus) -> dict[str, Any]:
    return dict(flat_figures(read_json(run.path, "environment.json")[0]))


def _data(run: RunStatus) -> dict[str, Any]:
    """What the run's checkpoints are bound to; it is in binding.json, or else in the newest checkpoint."""
    bound, _ = read_json(run.path, "binding.json")
    if not isinstance(bound, Mapping):
        steps = checkpoint_steps(run.path)
        state = read_json(run.path / CHECKPOINTS / f"step-{steps[-1]:08d}", "state.json")[0] if steps else None
        bound = state.get("bound_to") if isinstance(state, Mapping) else None
    groups = bound if isinstance(bound, Mapping) else {}
    return dict(flat_figures({name: groups[name] for name in ("data", "base") if name in groups}))
