"""Classic tasks: labels, numbers, tags, spans, images, and texts of an encoder-decoder base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peftkit.backbone.heads import check_kind
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec, LocatedBase, longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.tasks.audit import TaskAudit, audit_task
from peftkit.data.tasks.heads import kind_of
from peftkit.data.tasks.pixels import Pixels, pixels_of, positions
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskName
from peftkit.errors import BaseError
from peftkit.evaluation.tasks import slices
from peftkit.evaluation.tasks.comparison import COLUMNS, TaskComparison
from peftkit.evaluation.tasks.held_out import compare_task
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Report, Table
from peftkit.recipe.keeping import keep_json
from peftkit.recipe.work.kinds import Place
from peftkit.runs import RunFolder
from peftkit.training.passes.paths import Paths
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.paths import task_paths
from peftkit.tuning.tuned import Tuned


class Tasks:
    """Rows of a task, and the head that is trained for it."""

    def __init__(self) -> None:
        self._pixels: Pixels | None = None
        self._task: TaskName = "text_classification"
        self._paths: Paths | None = None

    def audit(self, place: Place, spec: TaskSpec, evaluate: Any) -> TaskAudit:
        """Read, check, encode and count the rows; the labels are those of the parent, where one is continued."""
        config, self._task = read_config(place.located.folder), spec.task
        recorded = place.parent.manifest.adapter.get("head") if place.parent is not None else None
        head = Head.of(recorded) if isinstance(recorded, dict) else None
        check_kind(kind_of(spec)[0], str(config.get("model_type")))
        if spec.task == "image_classification":
            self._pixels = pixels_of(place.located.folder, place.report)
            return audit_task(spec, None, None, place.report, positions=positions(config), head=head)
        tokenizer = load_tokenizer(place.located.folder, answers=False)
        return audit_task(spec, tokenizer, longest_sequence(config), place.report, head=head)

    def head(self, data: TaskAudit) -> Head | None:
        """That of the rows' labels."""
        return data.head

    def prepare(self, place: Place, backbone: Backbone, way: Any) -> None:
        """Nothing."""

    def besides(self) -> dict[str, Any]:
        """How images become numbers: the base's record does not cover its preprocessor."""
        return {"pixels": self._pixels.record()} if self._pixels is not None else {}

    def paths(self, place: Place, tuned: Tuned, data: TaskAudit, train: TrainSpec) -> Paths | None:
        """Padded rows and the head's loss."""
        if self._paths is None:
            self._paths = task_paths(tuned, train, data.train.examples, self._pixels, report=place.report)
        return self._paths

    def rows(self, place: Place, tuned: Tuned, data: TaskAudit) -> tuple[Sequence[Any], Sequence[Any]]:
        """As they were encoded."""
        return data.train.examples, data.held_out.examples

    def compare(self, place: Place, tuned: Tuned, data: TaskAudit, spec: TaskEvaluateSpec) -> TaskComparison:
        """The adapter beside what is trivial, on the held-out rows."""
        base, quant = BaseSpec(source=place.located.source, revision=place.located.revision), tuned.backbone.quant
        language = None
        if spec.shots and can_answer(place.located):
            language = partial(load_backbone, base, quant, place.cache, located=place.located)
        return compare_task(
            tuned.model,
            tuned.backbone,
            self._task,
            data.train.rows,
            data.held_out,
            spec,
            language=language,
            pixels=self._pixels,
            report=place.report,
        )

    def tell(self, comparison: TaskComparison, report: Report) -> None:
        """The table, the slices, and whether the adapter beats what is trivial."""
        report_task(comparison, report)

    def keep(self, comparison: TaskComparison, folder: RunFolder, report: Report) -> None:
        """Predictions, and scores by slice."""
        keep_json(folder, "samples.json", comparison.samples(), report)
        if comparison.slices:
            keep_json(folder, "slices.json", [each.table() for each in comparison.slices], report)

    def sources(self, comparison: TaskComparison) -> Sequence[dict[str, Any]]:
        """None: retention is measured on answers."""
        return []


def report_task(comparison: TaskComparison, report: Report, name: str | None = None) -> None:
    """Report a task's comparison the way every command shows it, under the adapter's name where there are several."""
    report(Table(f"held-out rows{f', {name}' if name else ''}", COLUMNS, tuple(comparison.rows())))
    for each in comparison.slices:
        report(Table(f"adapter by {each.column}", slices.COLUMNS, tuple(each.table())))
    if len(comparison.contestants) > 1:
        report(comparison.verdict())


def can_answer(located: LocatedBase) -> bool:
    """Whether a base can be asked in words: it writes what it reads on, and a token ends its answers."""
    if read_config(located.folder).get("is_encoder_decoder"):
        return False
    try:
        return bool(load_tokenizer(located.folder).stop_ids)
    except BaseError:
        return False
