"""The page of a sweep: one offline HTML file with the trials, the objective by trial, and each setting against it."""

from __future__ import annotations

from markupsafe import Markup

from peftkit.page import (
    Section,
    facts_html,
    figure_html,
    page,
    paragraph_html,
    side_by_side_html,
    table_html,
    text_html,
)
from peftkit.recipe.sweeping.picture import Dot, scatter
from peftkit.recipe.sweeping.space import Choices, Dimension
from peftkit.recipe.sweeping.table import Sweep, rows
from peftkit.recipe.sweeping.trial import Objective, Trial


def sweep_page(sweep: Sweep) -> str:
    """A whole HTML document."""
    columns, lines = rows(sweep)
    sections = [Section("Best", _best(sweep)), Section("Trials", table_html(columns, lines))]
    done = [(trial, trial.objective) for trial in sweep.trials if trial.objective]
    if done:
        sections.append(Section("Objective", _pictures(sweep, done)))
    if sweep.importance:
        shares = facts_html((key, f"{share:.0%}") for key, share in sweep.importance.items())
        what = "Share of each setting in being among the best tenth (PED-ANOVA); with few trials a hint and no more."
        sections.append(Section("What mattered", paragraph_html(what) + shares))
    plan = sweep.plan
    asked = [("recipe", plan.asked_as), ("preset", plan.preset or "-"), ("seed", str(plan.seed))]
    searched = [(dimension.key, str(dimension)) for dimension in plan.space.dimensions]
    fixed = [(text.partition("=")[0], text.partition("=")[2]) for text in plan.space.fixed]
    sections.append(Section("Asked for", facts_html([*asked, *searched, *fixed])))
    return page(f"Sweep {sweep.name}", sections)


def _best(sweep: Sweep) -> Markup:
    warned = Markup("").join(paragraph_html(warning, "warning") for warning in sweep.warnings)
    if sweep.best is None or sweep.best.objective is None:
        return paragraph_html("No trial has a figure yet.") + warned
    found = sweep.best.objective
    facts = facts_html([("trial", sweep.best.index), (found.name, found.value), ("run", sweep.best.run or "-")])
    return facts + text_html(sweep.command or "") + warned


def _pictures(sweep: Sweep, done: list[tuple[Trial, Objective]]) -> Markup:
    name = f"{done[0][1].name} ({'less' if done[0][1].direction == 'min' else 'more'} is better)"
    by_trial = [_dot(sweep, trial, found, float(trial.index)) for trial, found in done]
    figures = [figure_html(scatter(by_trial, "trial", name), "by trial; lines are intervals over the held-out rows")]
    for dimension in sweep.plan.space.dimensions:
        inside = [(trial, found) for trial, found in done if dimension.key in trial.settings]
        dots = [_dot(sweep, trial, found, _place(dimension, trial.settings[dimension.key])) for trial, found in inside]
        figures.append(figure_html(scatter(dots, dimension.key, name, log=_is_log(dimension)), dimension.key))
    return side_by_side_html(figures)


def _dot(sweep: Sweep, trial: Trial, found: Objective, x: float | str) -> Dot:
    return Dot(x, found.value, f"trial {trial.index}:", found.low, found.high, trial is sweep.best)


def _place(dimension: Dimension, text: str) -> float | str:
    return text if isinstance(dimension, Choices) else float(text)


def _is_log(dimension: Dimension) -> bool:
    return not isinstance(dimension, Choices) and dimension.log
