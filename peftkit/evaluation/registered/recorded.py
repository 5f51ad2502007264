"""What a version's manifest says of the rows it was trained on and of how it was measured."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from pydantic import ValidationError

from peftkit.config import Resolved, Spec
from peftkit.data.preference.spec import Kind as PreferenceKind
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskName
from peftkit.errors import ConfigError, DataError
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Report
from peftkit.registry.store import Version

Kind = Literal["conversations", "texts", "pairs", "labelled", "head"]
"""texts: translations and summaries that are asked for; pairs, labelled: preferences; head: a task with its own."""

OF_ROWS = ("text", "pair", "label", "columns", "separator")
"""Settings that name what stands where in one file."""
_OF_THE_RUN = ("shots", "slices", "instructions")
"""Settings of `evaluate` that need the run's own rows or columns, or are kept as a digest alone."""
S = TypeVar("S", bound=Spec)


def kind_of(version: Version) -> Kind:
    """The kind of rows that a version was trained on; conversations where nothing else stands in its manifest."""
    task = _of_task(version).get("task")
    if "head" in version.manifest.adapter and task is not None:
        return "head"
    if task in ("translation", "summarization"):
        return "texts"
    kind: Kind = _of_preferences(version).get("kind", "conversations")
    return kind


def task_settings(version: Version, **asked: Any) -> TaskSpec:
    """How the training of a task's version read its rows, with what is `asked` for instead.

    Raises ConfigError for values that are none.
    """
    known = _known(_of_task(version), TaskSpec)
    rows = {key: value for key, value in asked.items() if value and key in OF_ROWS}
    if rows:  # columns of another file: those of training name nothing there
        known = {key: value for key, value in known.items() if key not in OF_ROWS}
    return _validated(TaskSpec, {**known, **rows, **_policy(asked), "augment": {}}, version)


def preference_settings(version: Version, **asked: Any) -> PreferenceSpec:
    """The same of a version that was trained on preferences."""
    return _validated(PreferenceSpec, {**_known(_of_preferences(version), PreferenceSpec), **_policy(asked)}, version)


def with_options(error: DataError) -> DataError:
    """The error of columns that are not found, its hint with the options of a command instead of a run's settings."""
    hint = re.sub(r"data\.(text|pair|label|columns)=", r"--\1 ", error.hint or "")
    return DataError(error.fact, expected=error.expected, hint=hint or None)


def measured_as(version: Version, asked: Resolved[S]) -> S:
    """The settings that were asked for, and else those that a version's own figures were taken with.

    Raises ConfigError for values that are none.
    """
    spec, given = type(asked.config), _config(version).get("evaluate")
    asked_for = {key for key, source in asked.sources.items() if source != "default"}
    kept = _known(given, spec) if isinstance(given, Mapping) else {}
    kept = {key: value for key, value in kept.items() if key not in {*asked_for, *_OF_THE_RUN}}
    return _validated(spec, {**asked.config.model_dump(), **kept}, version)


def check_same(versions: Sequence[Version], settings: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError for versions whose rows were made in different ways: one encoding cannot serve them.

    `settings` are, of each version, what its rows were made by.
    """
    first = settings[0]
    for version, own in zip(versions[1:], settings[1:], strict=True):
        if differ := [name for name in first if own[name] != first[name]]:
            said = "; ".join(f"data.{name}: {first[name]} and {own[name]}" for name in differ)
            raise DataError(
                f"{versions[0].reference} and {version.reference} were trained on rows made in different ways: {said}",
                expected="adapters of one task whose sequences are made alike",
                hint="call them one by one",
            )


def refuse_shots(shots: int, hint: str = "put examples into evaluate.instructions") -> None:
    """Raise DataError where solved examples are asked for: there are no training rows to take them from."""
    if shots:
        raise DataError(
            f"evaluate.shots={shots}, but solved examples come from training rows, and there are none here",
            expected="evaluate.shots in a training run",
            hint=hint,
        )


def tell_left_out(version: Version, spec: TaskEvaluateSpec, report: Report) -> None:
    """Report which rivals of a run are not measured again: what they were shown is not in its manifest."""
    given = _config(version).get("evaluate")
    given = given if isinstance(given, Mapping) else {}
    if shots := given.get("shots"):
        report(Note(f"the base with {shots} solved rows is left out: they are training rows; the run has its figures"))
    if given.get("instructions") and spec.instructions is None:
        fact = "the base with instructions is left out: of those of the run the manifest has a digest alone"
        report(Note(f"{fact}; --set instructions=TEXT gives them again"))


def _config(version: Version) -> Mapping[str, Any]:
    return version.manifest.recipe.config if version.manifest.recipe else {}


def _of_task(version: Version) -> Mapping[str, Any]:
    """The group of a recipe's settings that says which rows of a task there are."""
    return _group(version, "task", get_args(TaskName))


def _of_preferences(version: Version) -> Mapping[str, Any]:
    return _group(version, "kind", get_args(PreferenceKind))


def _group(version: Version, key: str, values: Collection[str]) -> Mapping[str, Any]:
    groups = (group for group in _config(version).values() if isinstance(group, Mapping))
    return next((group for group in groups if group.get(key) in values), {})


def _known(given: Mapping[str, Any], spec: type[Spec]) -> dict[str, Any]:
    return {key: given[key] for key in spec.model_fields if key in given}


def _policy(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {"too_long": asked["too_long"]} if asked.get("too_long") else {}


def _validated(spec: type[S], values: Mapping[str, Any], version: Version) -> S:
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        told = [": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in error.errors()]
        raise ConfigError(told, where=f"settings of {version.name}") from error
