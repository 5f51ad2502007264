"""The parts of a run's page, each from the files that it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from peftkit.charts import histogram, line_chart
from peftkit.page import (
    Kind,
    badge_html,
    details_html,
    facts_html,
    figure_html,
    heading_html,
    paragraph_html,
    side_by_side_html,
    table_html,
    text_html,
)
from peftkit.render import duration, number, size
from peftkit.runs.contents import as_text, checkpoint_steps, flat_figures, held, read_json, read_text, size_of
from peftkit.runs.records import HELD_OUT, read_events, read_metrics
from peftkit.runs.status import RunStatus

_KINDS: dict[str, Kind] = {"done": "good", "failed": "error", "died": "error", "damaged": "error", "running": "plain"}
_SEVERITIES: dict[str, Kind] = {"error": "error", "warning": "warning", "warn": "warning"}
# (figure of a step, label of its axis, whether by its logarithm)
_CURVES = (
    ("learning_rate", "learning rate", False),
    ("grad_norm", "gradient norm", True),
    ("tokens_per_s", "tokens/s", False),
    ("peak_gb", "peak memory, GB", False),
    ("micro_batches", "micro-batches per step", False),
)
_MOST_ROWS = 200
Trace = Sequence[tuple[int, Mapping[str, float]]]


def state(status: RunStatus) -> Markup:
    """What the run is, how it ended, and what its folder holds."""
    disk, steps = held(status.path), checkpoint_steps(status.path)
    facts: list[tuple[str, Any]] = [
        ("state", badge_html(status.state, _KINDS.get(status.state, "warning"))),
        ("recipe", status.recipe or None),
        ("started", status.started),
        ("resumed", ", ".join(status.resumed) or None),
        ("ended", status.ended),
        ("took", duration(status.seconds)),
        ("process", status.pid),
        ("saved as", status.saved_as or "nothing"),
        ("checkpoints", f"steps {', '.join(map(number, steps))}; {size(disk.checkpoints)}" if steps else "none"),
        ("disk, without this page", size(disk.total - size_of(status.path / "report.html"))),
        ("records lost", status.lost_records or None),
    ]
    shown = facts_html([(name, value) for name, value in facts if value is not None])
    return shown + (text_html(status.error) if status.error else Markup(""))


def training(status: RunStatus) -> Markup:
    """The curves of the steps and of the measurements between them."""
    records = read_metrics(status.path)
    steps: Trace = [(step, figures) for step, figures in records if HELD_OUT not in figures]
    measured: Trace = [(step, figures) for step, figures in records if HELD_OUT in figures]
    if not records:
        return paragraph_html("No step has been recorded.", "soft")
    losses, held_out = _series(steps, "loss"), _series(measured, HELD_OUT)
    lines = {"training rows": losses, **({"held-out rows": held_out} if held_out else {})}
    finite = [point for point in held_out if math.isfinite(point[1])]
    best = [(min(finite, key=lambda point: point[1])[0], "best")] if finite else []
    ends = f"{number(losses[0][1])} → {number(losses[-1][1])} over {len(losses):,} steps" if losses else ""
    figures = [figure_html(line_chart(lines, "step", "loss, nats per answer token", marks=best), ends)]
    for key, label, log in _CURVES:
        if points := _series(steps, key):
            figures.append(figure_html(line_chart({label: points}, "step", label, log=log)))
    totals = [(f"{key.replace('_', ' ')}, all", f"{sum(v for _, v in points):,.0f}")
              for key in ("tokens", "answer_tokens") if (points := _finite(_series(steps, key)))]  # fmt: skip
    return side_by_side_html(figures) + facts_html(totals)


def evaluation(status: RunStatus) -> Markup:
    """The held-out figures of base and adapter, and what else the run's end says."""
    found = status.figures.get("evaluation")
    if not isinstance(found, Mapping):
        return paragraph_html("The adapter has not been measured against the base.", "soft")
    before, after = (dict(flat_figures(found.get(side))) for side in ("before", "after"))
    names = list(dict.fromkeys([*before, *after]))
    rows = [(name, as_text(before.get(name)), as_text(after.get(name))) for name in names]
    other = found.get("other")
    others = dict(other) if isinstance(other, Mapping) else {}
    behaviour = others.pop("behaviour", None)
    further = {k: v for k, v in found.items() if k not in (*_SIDES, "other")} | ({"other": others} if others else {})
    rest = [(name, as_text(v)) for name, v in flat_figures(further)]
    columns = ("", "before", "after")
    # The figures of single fields ("score.fields.product.recall") are many; the first look goes to the whole.
    single = [row for row in rows if row[0].count(".") > 1]
    parts = table_html(columns, [row for row in rows if row not in single][:_MOST_ROWS])
    if single:
        parts += details_html("Single fields", table_html(columns, single[:_MOST_ROWS]))
    parts += _behaviour(behaviour)
    return parts + (details_html("More figures", facts_html(rest[:_MOST_ROWS])) if rest else Markup(""))


_SIDES = ("before", "after")


def _behaviour(found: Any) -> Markup:
    """The probes by family, and what secrets and training answers were given away."""
    if not isinstance(found, Mapping):
        return Markup("")
    families = found.get("families")
    cells = [
        (name, figures.get("prompts"), *(as_text(figures.get(key)) for key in _FAMILY))
        for name, figures in (families.items() if isinstance(families, Mapping) else ())
        if isinstance(figures, Mapping)
    ]
    columns = ("family", "prompts", "base passes", "adapter passes", "pass → fail", "fail → pass", "p (McNemar)")
    rest = [(name, as_text(v)) for name, v in flat_figures({k: v for k, v in found.items() if k != "families"})]
    parts = heading_html("behaviour on the probes") + paragraph_html("Refusals are counted by phrases.", "soft")
    return parts + table_html(columns, cells[:_MOST_ROWS]) + facts_html(rest)


_FAMILY = ("base", "adapter", "pass_to_fail", "fail_to_pass", "p")


def warnings(status: RunStatus) -> Markup:
    """What the run warned of, newest last."""
    found = [event for event in read_events(status.path) if event.get("event") == "Warned"]
    if not found:
        return paragraph_html("None.", "soft")
    rows = [(_time(event), event.get("text"), event.get("hint")) for event in found[-_MOST_ROWS:]]
    cut = paragraph_html(f"The last {_MOST_ROWS} of {len(found):,}.", "soft") if len(found) > _MOST_ROWS else Markup("")
    return cut + table_html(("at", "warning", "to mend it"), rows)


def audit(status: RunStatus) -> Markup:
    """The findings of the data audit and the lengths of the rows."""
    value, why = read_json(status.path, "audit.json")
    if not isinstance(value, Mapping):
        return _absent(why or "audit.json holds no findings")
    parts = Markup("")
    findings = [finding for finding in value.get("findings") or [] if isinstance(finding, Mapping)]
    rows = []
    for finding in findings[:_MOST_ROWS]:
        severity = str(finding.get("severity"))
        examples = finding.get("examples")
        places = [_place(example) for example in examples[:5]] if isinstance(examples, list) else []
        badge = badge_html(severity, _SEVERITIES.get(severity, "plain"))
        share = finding.get("share")
        shown = f"{share:.2%}" if isinstance(share, float) else as_text(share)
        texts = [as_text(finding.get(key)) for key in ("text", "mend")]
        rows.append((badge, as_text(finding.get("rule")), as_text(finding.get("count")), shown, texts[0],
                     "\n".join(places), texts[1]))  # fmt: skip
    columns = ("severity", "rule", "count", "share", "what", "examples", "to mend it")
    parts += table_html(columns, rows) if rows else paragraph_html("Nothing was found.", "good")
    tokens = value.get("tokens")
    if isinstance(tokens, Mapping) and tokens.get("counts"):
        edges = [float(edge) for edge in tokens["edges"]]
        parts += figure_html(histogram([int(count) for count in tokens["counts"]], edges, "tokens per row"))
    return parts


def plan(status: RunStatus) -> Markup:
    """Memory, disk and time as they were predicted, and what was measured of them."""
    value, why = read_json(status.path, "plan.json")
    parts = Markup("") if isinstance(value, Mapping) else _absent(why or "plan.json holds no plan")
    if isinstance(value, Mapping):
        budget = value.get("budget")
        facts = [("budget", size(budget) if _is_number(budget) else "none"), ("peak measured", _measured_peak(status))]
        parts += facts_html(facts)
        for key, title in (("parts", "memory by part"), ("stages", "memory by stage")):
            parts += _ranges(value.get(key), title)
        disk = [row for row in value.get("disk") or [] if isinstance(row, Mapping)]
        if disk:
            rows = [(row.get("name"), size(row.get("bytes")), row.get("where")) for row in disk]
            parts += heading_html("disk") + table_html(("what", "size", "where"), rows)
        if times := [(name, _seconds(v)) for name, v in flat_figures(value.get("time") or {})]:
            parts += heading_html("time") + facts_html(times)
    return parts + _probe(status)


def _ranges(rows: Any, title: str) -> Markup:
    known = [row for row in rows or [] if isinstance(row, Mapping)]
    cells = [(row.get("name"), *(size(row.get(end)) for end in ("low", "expected", "high"))) for row in known]
    return heading_html(title) + table_html(("what", "low", "expected", "high"), cells) if cells else Markup("")


def _probe(status: RunStatus) -> Markup:
    value, why = read_json(status.path, "probe.json")
    if not isinstance(value, Mapping):
        return _absent(why or "probe.json holds no measurements")
    rows = []
    for row in (row for row in value.get("rows") or [] if isinstance(row, Mapping)):
        predicted, measured = row.get("predicted"), row.get("measured")
        unit = str(row.get("unit") or "")
        ratio = measured / predicted if _is_number(predicted) and _is_number(measured) and predicted else None
        rows.append((row.get("what"), _amount(predicted, unit), _amount(measured, unit), ratio))
    table = table_html(("what", "predicted", "measured", "measured / predicted"), rows)
    return heading_html("probe: one real step on the longest rows") + table


def _amount(value: Any, unit: str) -> str:
    if not _is_number(value):
        return str(value if value is not None else "-")
    if unit in ("B", "bytes"):
        return size(value)
    return duration(value) if unit in ("s", "seconds") else f"{number(value)} {unit}".strip()


def _measured_peak(status: RunStatus) -> str:
    peaks = _finite(_series(read_metrics(status.path), "peak_gb"))
    return size(max(value for _, value in peaks) * 1e9) if peaks else "not yet"


def decisions(status: RunStatus) -> Markup:
    """What peftkit chose and why, and the tables that it showed."""
    events = read_events(status.path)
    chosen = [(e.get("what"), e.get("choice"), e.get("reason")) for e in events if e.get("event") == "Decision"]
    if not events:
        return _absent("events.jsonl is missing or empty")
    parts = table_html(("what", "choice", "why"), chosen[-_MOST_ROWS:]) if chosen else Markup("")
    for event in events:
        columns, rows = event.get("columns"), event.get("rows")
        if event.get("event") == "Table" and isinstance(columns, list) and isinstance(rows, list):
            whole = [[as_text(cell) for cell in row] for row in rows if _fits(row, columns)][:_MOST_ROWS]
            parts += details_html(str(event.get("title")), table_html([str(name) for name in columns], whole))
    notes = [(_time(event), event.get("text")) for event in events if event.get("event") == "Note"]
    return parts + (details_html("Notes", table_html(("at", "note"), notes[-_MOST_ROWS:])) if notes else Markup(""))


def settings(status: RunStatus) -> Markup:
    """The settings and the machine, folded."""
    text, why = read_text(status.path, "config.yaml")
    parts = _absent(why) if why else details_html("config.yaml", text_html(text))
    value, why = read_json(status.path, "environment.json")
    if not isinstance(value, Mapping):
        return parts + _absent(why or "environment.json holds no versions")
    return parts + details_html("environment", facts_html([(n, as_text(v)) for n, v in flat_figures(value)]))


def _series(trace: Trace, key: str) -> list[tuple[float, float]]:
    return [(float(step), figures[key]) for step, figures in trace if key in figures]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]


def _fits(row: Any, columns: Sequence[Any]) -> bool:
    return isinstance(row, list) and len(row) == len(columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _place(example: Any) -> str:
    if isinstance(example, Mapping):
        return f"{as_text(example.get('where'))}: {as_text(example.get('excerpt'))}"
    return str(as_text(example))


def _seconds(value: Any) -> str:
    return duration(value) if isinstance(value, int | float) else as_text(value)


def _time(event: Mapping[str, Any]) -> str:
    return str(event.get("at", "")).replace("T", " ")[:19]


def _absent(why: str) -> Markup:
    return paragraph_html(f"{why}.", "soft")
