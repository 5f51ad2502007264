"""`peftkit eval`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.asking import refuse
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.config import resolve
from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Report
from peftkit.recipe import report_comparison
from peftkit.registry.store import Version

Way = tuple[Callable[[Any], list[Any]], Callable[[Any, Report, str], None]]
"""How rows are measured over the adapters that were opened, and how a comparison is told under an adapter's name."""


def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Adapters to measure against their base.")],
    data: Annotated[str, typer.Option("--data", metavar="ROWS", help="Held-out rows, as those of training.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Settings of `evaluate.*`, without the prefix."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="Of a task: the text's column.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", metavar="COLUMN", help="Of a task: the second text's.")] = None,
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="Of a task: that of the label, or the wanted text.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B,…", help="Of a task: columns of a csv without a header.")
    ] = None,
    too_long: Annotated[
        str | None,
        typer.Option("--too-long", metavar="POLICY", help="Of a task: raise, drop or truncate; of preferences: drop."),
    ] = None,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Measure base and adapters on the same rows, with intervals, the way that the runs which trained them did.

    Conversations by likelihood and score; adapters of a task, translations and summaries too, by its own metrics;
    those of dpo, orpo and kto by the preferences in the rows.

    Example: peftkit eval tickets sql --data held_out.jsonl
    """
    store = open_registry(registry)
    versions = [store.resolve(name) for name in names]
    asked = {"text": text, "pair": pair, "label": label, "columns": tuple(columns.split(",")) if columns else None}
    _refuse(versions[0], {**asked, "too_long": too_long})
    loaded = {"base": base, "bits": bits, "other_base": other_base}
    with Reporter(as_json=as_json) as report:
        figures = _measure(versions, data, {**asked, "too_long": too_long}, settings or [], loaded, report)
    if as_json:
        show(figures, as_json=True, text="")


def _refuse(version: Version, asked: dict[str, Any]) -> None:
    """Refuse, by its name, what means nothing for the kind of rows that an adapter was trained on."""
    from peftkit.data.tasks.columns import has_pair
    from peftkit.evaluation.registered.recorded import kind_of, task_settings

    options = {f"--{name.replace('_', '-')}": value for name, value in asked.items()}
    kind = kind_of(version)
    if kind == "conversations":
        refuse(options, f"{version.reference} answers in words")
    elif kind in ("pairs", "labelled"):
        refuse({**options, "--too-long": None}, f"{version.reference} was trained on preferences")
    elif not has_pair(task := task_settings(version).task):
        why = f"{version.reference} was trained for {task}, whose rows have none"
        images = task == "image_classification"
        refuse({name: options[name] for name in ("--pair", *(("--columns", "--too-long") if images else ()))}, why)


def _measure(
    versions: list[Version],
    source: str,
    asked: dict[str, Any],
    settings: list[str],
    loaded: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Read the rows, load the base, measure and report; the figures of each version."""
    if "head" in versions[0].manifest.adapter:
        measured, tell = _heads(versions, source, asked, settings, report)
    else:
        measured, tell = _language(versions, source, asked, settings, report)
    from peftkit.tuning.attach import open_adapters

    host = open_adapters(versions, locations.cache_root().path, **loaded, report=report)
    comparisons = measured(host)
    for version, comparison in zip(versions, comparisons, strict=True):
        tell(comparison, report, version.reference)
    receipts = {"receipts": list(host.receipts)}
    return {v.reference: {**c.figures(), **receipts} for v, c in zip(versions, comparisons, strict=True)}


def _heads(versions: list[Version], source: str, asked: dict[str, Any], settings: list[str], report: Report) -> Way:
    """Adapters of a task with its own head."""
    from peftkit.evaluation.registered.recorded import measured_as
    from peftkit.evaluation.tasks.registered import evaluate_tasks, task_of
    from peftkit.recipe.work.tasks import report_task

    rows: dict[str, Any] = {"versions": versions, "source": source, "spec": task_of(versions[0], **asked)}
    how = measured_as(versions[0], resolve(TaskEvaluateSpec, overrides=settings))
    return partial(evaluate_tasks, **rows, measure=how, report=report), report_task


def _language(versions: list[Version], source: str, asked: dict[str, Any], settings: list[str], report: Report) -> Way:
    """Adapters with the base's language head, by what the rows can be read as."""
    from peftkit.data.formats import Dataset
    from peftkit.data.tasks.read import TaskDataset
    from peftkit.evaluation.registered import conversations, preferences, texts
    from peftkit.evaluation.registered.reading import read_as_trained
    from peftkit.evaluation.registered.recorded import measured_as, preference_settings, task_settings
    from peftkit.recipe.work.preferences import report_preferences
    from peftkit.recipe.work.texts import report_answered

    rows, first = read_as_trained(versions, source, asked, report=report), versions[0]
    given: dict[str, Any] = {"versions": versions, "report": report}
    if isinstance(rows, Dataset):
        refuse({"--too-long": asked["too_long"]}, f"{source} is measured as conversations")
        given |= {"source": rows, "spec": resolve(EvaluateSpec, overrides=settings).config}
        return partial(conversations.evaluate_attached, **given), _tell
    if isinstance(rows, TaskDataset):
        given |= {"source": source, "data": rows, "spec": task_settings(first, **asked)}
        given |= {"measure": measured_as(first, resolve(TaskEvaluateSpec, overrides=settings))}
        return partial(texts.evaluate_texts, **given), report_answered
    given |= {"data": rows, "spec": preference_settings(first, **asked)}
    given |= {"measure": measured_as(first, resolve(PreferenceEvaluateSpec, overrides=settings))}
    return partial(preferences.evaluate_preferences, **given), report_preferences


def _tell(comparison: Any, report: Report, _: str) -> None:
    """Report a comparison whose rows say which adapter is which."""
    report_comparison(comparison, report)
