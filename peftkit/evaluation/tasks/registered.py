"""Registered adapters of a task: predictions for a file, and their scores on rows with answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.atomic import replace_file
from peftkit.backbone.load import Backbone
from peftkit.base.ref import longest_sequence, read_config
from peftkit.config import Resolved
from peftkit.data.tasks.encode import encode
from peftkit.data.tasks.heads import check_rows
from peftkit.data.tasks.pixels import Pixels, pixels_of, positions
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Prediction, TaskExample, TaskPart, TaskRow
from peftkit.errors import ConfigError, DataError
from peftkit.evaluation.tasks.comparison import TaskComparison
from peftkit.evaluation.tasks.held_out import compare_task, predict
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Report, Warned, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for

_OF_ROWS = ("text", "pair", "label", "columns", "separator")
_OF_SEQUENCES = ("task", "max_length", "too_long", "stride", "instruction", "multi_label")
_OF_ANSWERS = ("metric", "threshold", "max_answer_tokens", "max_new_tokens")


@dataclass(frozen=True)
class Predicted:
    """What adapters say of the rows of a file."""

    rows: tuple[TaskRow, ...]
    by_name: dict[str, list[Prediction]]
    """Adapter → a prediction per row."""
    labels: tuple[str, ...]

    def records(self) -> list[dict[str, Any]]:
        """One record per row, plain for JSON: where it stands, and each adapter's prediction."""
        found = []
        for at, row in enumerate(self.rows):
            said = {name: self._record(given[at]) for name, given in self.by_name.items()}
            found.append({"where": str(row.where), "index": row.where.index, "predictions": said})
        return found

    def _record(self, given: Prediction) -> dict[str, Any]:
        value = list(given.value) if isinstance(given.value, tuple) else given.value
        record: dict[str, Any] = {"value": value}
        if given.confidence is not None:
            record["confidence"] = round(given.confidence, 6)
        if given.probabilities:
            record["probabilities"] = {
                label: round(value, 6) for label, value in zip(self.labels, given.probabilities, strict=True)
            }
        return record


def task_of(version: Version, **asked: Any) -> TaskSpec:
    """How a version's training read its rows, with the columns that are asked for instead.

    Raises DataError for an adapter that was not trained for a task.
    """
    config: Mapping[str, Any] = version.manifest.recipe.config if version.manifest.recipe else {}
    groups = [group for group in config.values() if isinstance(group, Mapping) and "task" in group]
    if not groups or "head" not in version.manifest.adapter:
        raise DataError(
            f"{version.reference} was not trained for a task: it answers in words",
            expected="an adapter of a task's recipe, such as text_classification",
            hint=f"peftkit generate FILE --adapter {version.name}",
        )
    known = {key: groups[0][key] for key in TaskSpec.model_fields if key in groups[0]}
    rows = {key: value for key, value in asked.items() if value and key in _OF_ROWS}
    if rows:  # columns of another file: those of training name nothing there
        known = {key: value for key, value in known.items() if key not in _OF_ROWS}
    try:
        policy = {"too_long": asked["too_long"]} if asked.get("too_long") else {}
        return TaskSpec.model_validate({**known, **rows, **policy, "augment": {}, "mixture": {}})
    except ValidationError as error:
        raise ConfigError([str(each["msg"]) for each in error.errors()], where=f"settings of {version.name}") from error


def measured_as(version: Version, asked: Resolved[TaskEvaluateSpec]) -> TaskEvaluateSpec:
    """The settings that were asked for, and else those that a version's own figures were taken with."""
    config: Mapping[str, Any] = version.manifest.recipe.config if version.manifest.recipe else {}
    recorded = config.get("evaluate")
    given = recorded if isinstance(recorded, Mapping) else {}
    asked_for = {key for key, source in asked.sources.items() if source != "default"}
    kept = {key: given[key] for key in _OF_ANSWERS if given.get(key) is not None and key not in asked_for}
    try:
        return TaskEvaluateSpec.model_validate({**asked.config.model_dump(), **kept})
    except ValidationError as error:
        raise ConfigError([str(each["msg"]) for each in error.errors()], where=f"settings of {version.name}") from error


def check_alike(versions: Sequence[Version]) -> None:
    """Raise DataError for versions whose rows were read or cut in different ways: one encoding cannot serve them."""
    first = task_of(versions[0])
    for version in versions[1:]:
        own = task_of(version)
        differ = [name for name in _OF_SEQUENCES if getattr(own, name) != getattr(first, name)]
        if differ:
            said = "; ".join(f"data.{name}: {getattr(first, name)} and {getattr(own, name)}" for name in differ)
            raise DataError(
                f"{versions[0].reference} and {version.reference} were trained on rows made in different ways: {said}",
                expected="adapters of one task whose sequences are made alike",
                hint="call them one by one",
            )


def predict_rows(
    host: Attached, versions: Sequence[Version], source: str, spec: TaskSpec, measure: TaskEvaluateSpec,
    *, report: Report = silent,
) -> Predicted:  # fmt: skip
    """What every attached version says of every row of a file. Raises DataError for rows that cannot be read whole."""
    check_alike(versions)
    backbone = host.backbone
    assert backbone.head is not None  # `task_of` has refused others
    data = read_rows(spec, source, labelled=False, report=report)
    report(Note(f"{data.source}: {len(data.rows):,} rows; {data.reason}"))
    examples, _, pixels = _encoded(data, backbone, spec, report, labelled=False)
    _check_pixels(pixels, versions)
    found = {}
    for name in names_for(versions):
        with host.using(name) as model:
            options: dict[str, Any] = {"pixels": pixels, "report": report}
            found[name] = predict(model, backbone, spec.task, data.rows, examples, measure, **options)
    return Predicted(data.rows, found, backbone.head.labels)


def evaluate_tasks(
    host: Attached, versions: Sequence[Version], source: str, spec: TaskSpec, measure: TaskEvaluateSpec,
    *, report: Report = silent,
) -> list[TaskComparison]:  # fmt: skip
    """Measure every attached version on rows with answers; baselines that learn have no training rows here."""
    check_alike(versions)
    backbone = host.backbone
    assert backbone.head is not None
    data = read_rows(spec, source, report=report)
    check_rows(backbone.head, data.rows, data.source, "the adapter's training rows")
    examples, lost, pixels = _encoded(data, backbone, spec, report, labelled=True)
    _check_pixels(pixels, versions)
    held = TaskPart("held_out", data.source, data.sha256, data.rows, examples, dropped=lost)
    if measure.baselines:
        report(Note("baselines learn from training rows, and there are none here: the run that trained it has them"))
        measure = measure.model_copy(update={"baselines": False})
    found = []
    for name in names_for(versions):
        with host.using(name) as model:
            options: dict[str, Any] = {"pixels": pixels, "report": report}
            found.append(compare_task(model, backbone, spec.task, (), held, measure, **options))
    return found


def write_predictions(predicted: Predicted, out: Path) -> None:
    """Write one JSON line per row; the file is there whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False) for record in predicted.records()]
    replace_file(out, "".join(f"{line}\n" for line in lines))


def _check_pixels(pixels: Pixels | None, versions: Sequence[Version]) -> None:
    """Raise DataError where images become other numbers today than when a version was trained."""
    now = json.loads(json.dumps(pixels.record())) if pixels is not None else None
    for version in versions:
        then = version.manifest.adapter.get("pixels")
        if then is not None and then != now:
            raise DataError(
                f"{version.reference} was trained on images prepared as {json.dumps(then)}, and this base prepares "
                f"them as {json.dumps(now)}",
                expected="the preprocessor_config.json that it was trained with",
                hint="put it back into the base's folder",
            )


def _encoded(
    data: TaskDataset, backbone: Backbone, spec: TaskSpec, report: Report, *, labelled: bool
) -> tuple[tuple[TaskExample, ...], tuple[str, ...], Pixels | None]:
    head, folder = backbone.head, backbone.base.folder
    assert head is not None
    config = read_config(folder)
    images = head.kind == "image"
    pixels = pixels_of(folder, report) if images else None
    options: dict[str, Any] = {"labelled": labelled, "positions": positions(config) if images else 1}
    limit = None if images else longest_sequence(config)
    found = encode(data.rows, head, None if images else backbone.tokenizer, limit, spec, **options)
    if found.too_long:
        places = ", ".join(f"{place} ({tokens} tokens)" for place, tokens in list(found.too_long.items())[:5])
        raise DataError(
            f"{len(found.too_long)} of {len(data.rows)} rows are longer than the limit: {places}",
            expected=f"at most {spec.max_length or limit} tokens, as in training",
            hint="--too-long truncate cuts them, --too-long drop leaves them out",
        )
    for what, lost in (("left out", found.dropped), ("cut", found.truncated)):
        if lost:
            report(Warned(f"{len(lost)} of {len(data.rows)} rows are {what}: {', '.join(lost[:5])}"))
    return found.examples, found.dropped, pixels
