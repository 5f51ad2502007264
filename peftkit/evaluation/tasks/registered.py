"""Registered adapters of a task: predictions for a file, and their scores on rows with answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftkit.atomic import replace_file
from peftkit.backbone.load import Backbone
from peftkit.base.ref import longest_sequence, read_config
from peftkit.data.tasks.encode import encode
from peftkit.data.tasks.heads import check_rows
from peftkit.data.tasks.pixels import Pixels, pixels_of, positions
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Prediction, TaskExample, TaskPart, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.answered import BASE, beside_base, decoded
from peftkit.evaluation.held_out import Contestant
from peftkit.evaluation.registered.recorded import check_same, kind_of, refuse_shots, task_settings, with_options
from peftkit.evaluation.tasks.baselines import LEARNED
from peftkit.evaluation.tasks.comparison import TaskComparison
from peftkit.evaluation.tasks.held_out import compare_task, predict
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Note, Report, Warned, silent
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, names_for

_OF_SEQUENCES = {"task", "max_length", "too_long", "stride", "instruction", "multi_label"}


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
    if kind_of(version) != "head":
        raise DataError(
            f"{version.reference} was not trained for a task: it answers in words",
            expected="an adapter of a task's recipe, such as text_classification",
            hint=f"peftkit generate FILE --adapter {version.name}",
        )
    return task_settings(version, **asked)


def check_alike(versions: Sequence[Version]) -> None:
    """Raise DataError for versions whose rows were read or cut in different ways: one encoding cannot serve them."""
    check_same(versions, [task_of(version).model_dump(include=_OF_SEQUENCES) for version in versions])


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
    """Measure every attached version on rows with answers, beside the baselines that need no training rows.

    An encoder-decoder base is measured too, once.
    """
    refuse_shots(measure.shots, "leave evaluate.shots out")
    check_alike(versions)
    backbone = host.backbone
    assert backbone.head is not None
    try:
        data = read_rows(spec, source, report=report)
    except DataError as error:
        raise with_options(error) from None
    check_rows(backbone.head, data.rows, data.source, "the adapter's training rows")
    examples, lost, pixels = _encoded(data, backbone, spec, report, labelled=True)
    _check_pixels(pixels, versions)
    held = TaskPart("held_out", data.source, data.sha256, data.rows, examples, dropped=lost)
    if measure.baselines and spec.task in LEARNED:
        report(Note("baselines learn from training rows, and there are none here: the run that trained it has them"))
        measure = measure.model_copy(update={"baselines": False})
    found: list[TaskComparison] = []
    written: list[Prediction] | None = None
    for name in names_for(versions):
        with host.using(name) as model:
            options: dict[str, Any] = {"pixels": pixels, "report": report}
            comparison = compare_task(model, backbone, spec.task, (), held, measure, **options)
        if backbone.head.kind == "seq2seq":
            base = Contestant(BASE, partial(host.using, None))
            written = decoded(comparison, base, backbone, report=report) if written is None else written
            comparison = beside_base(comparison, written)
        found.append(comparison)
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
