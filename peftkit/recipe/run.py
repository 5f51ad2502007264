"""The Run that hands a recipe its five verbs: audit, plan, train, evaluate, publish."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.config import Resolved
from peftkit.environment import environment
from peftkit.errors import OutOfMemory, RunError
from peftkit.events import Note, Report, Table, silent
from peftkit.plain import as_utf8
from peftkit.recipe.files import Recipe, default_name
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.render import duration, interval, number, size
from peftkit.runs import RunFolder

if TYPE_CHECKING:  # torch takes seconds to import, and `peftkit recipes list` does not need it
    from peftkit.backbone.load import Backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec, LocatedBase
    from peftkit.data.audit import Audit, DataSpec
    from peftkit.evaluation.compare import Interval
    from peftkit.evaluation.held_out import Comparison
    from peftkit.evaluation.spec import EvaluateSpec
    from peftkit.training.sft import Trained
    from peftkit.training.spec import TrainSpec
    from peftkit.tuning.inject import Tuned
    from peftkit.tuning.methods import AdapterSpec


# Where a run keeps its trained adapter until the registry has it.
UNPUBLISHED = "adapter"


class Interrupted(RunError):
    """The user stopped a run; what was learned so far is in the run's folder."""


class PlannedOnly(Exception):
    """Ends a dry run after its plan."""


@dataclass
class Run:
    """One execution of a recipe: where things live, and the five verbs."""

    recipe: Recipe
    resolved: Resolved[Any]
    registry: Registry
    cache: Path
    folder: RunFolder | None
    """None in a dry run, which leaves nothing behind."""
    report: Report = silent
    other_base: bool = False
    """Whether `init_from` may name an adapter of another base; what differs is recorded in the new version."""
    publish_to: Registry | None = None
    """Where the adapter is kept when that is not `registry`."""
    saved: Version | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    _located: LocatedBase | None = None
    _data: Audit | None = None

    def audit(self, base: BaseSpec, data: DataSpec) -> Audit:
        """Read, render, check and count the rows before anything else costs time."""
        from peftkit.backbone.locate import locate
        from peftkit.base.ref import longest_sequence, read_config
        from peftkit.base.tokenizer import load_tokenizer
        from peftkit.data.audit import audit
        from peftkit.evaluation.preflight import preflight
        from peftkit.evaluation.spec import EvaluateSpec

        self._located = locate(base, self.cache, self.report)
        tokenizer = load_tokenizer(self._located.folder)
        limit = longest_sequence(read_config(self._located.folder))
        self._data = audit(data, tokenizer, limit, self.report)
        evaluate = getattr(self.resolved.config, "evaluate", None)
        if isinstance(evaluate, EvaluateSpec):
            preflight(evaluate, self._data.held_out.rows, tokenizer)
        return self._data

    def plan(
        self, base: BaseSpec, quant: QuantSpec, adapter: AdapterSpec, train: TrainSpec, init_from: str | None = None
    ) -> Tuned:
        """Load the backbone, inject (or continue) the adapter, and say what training will take.

        A dry run ends here.
        """
        from peftkit.backbone.load import load_backbone
        from peftkit.backbone.quantize import footprint
        from peftkit.training.schedule import schedule
        from peftkit.tuning.attach import resume_adapter
        from peftkit.tuning.inject import inject

        parent = self.registry.resolve(init_from) if init_from else None
        backbone: Backbone = load_backbone(base, quant, self.cache, report=self.report, located=self._located)
        if parent is not None:
            self.report(Note(f"continuing from {parent.reference}"))
            sources = self.resolved.sources.items()
            asked = [key.removeprefix("adapter.") for key, source in sources if source != "default"]
            asked = [key for key in asked if key in type(adapter).model_fields]
            tuned = resume_adapter(
                backbone, parent, adapter, asked=asked, other_base=self.other_base, report=self.report
            )
        else:
            tuned = inject(backbone, adapter, report=self.report)
        steps = schedule(self._audited().train.examples, train)
        weights = footprint(backbone.model)
        optimizer_bytes = 8 * tuned.trainable_parameters
        bits = f" ({weights.bits_per_linear_parameter:.3f} bits per weight)" if weights.linear_parameters else ""
        rows: tuple[tuple[Any, ...], ...] = (
            ("optimizer steps", f"{len(steps)} of {train.rows_per_step} rows"),
            ("training tokens", number(steps.tokens)),
            ("linear layers, quantized", size(weights.linear_bytes) + bits if bits else "none"),
            ("other frozen weights", size(weights.other_bytes)),
            ("adapter and gradients, float32", size(8 * tuned.trainable_parameters)),
            ("optimizer states, at most", size(optimizer_bytes)),
        )
        self.report(Table("plan", ("", ""), rows))
        if self.folder is None:
            raise PlannedOnly
        return tuned

    def train(self, tuned: Tuned, spec: TrainSpec) -> Trained:
        """Train the adapter; when interrupted, what was learned is kept in the run's folder."""
        from peftkit.training.sft import train
        from peftkit.tuning.inject import save_adapter

        folder = self._folder()
        try:
            trained = train(
                tuned,
                self._audited().train.examples,
                spec,
                folder.path / "trainer",
                report=self.report,
                log=folder.log_metrics,
            )
        except OutOfMemory:
            save_adapter(tuned, folder.path / UNPUBLISHED)  # the steps before this one are not lost
            raise
        except KeyboardInterrupt:
            kept = save_adapter(tuned, folder.path / "interrupted")
            raise Interrupted(
                "training was interrupted; the adapter as it was is a PEFT checkpoint in " + str(kept),
                hint=f"start again with: peftkit train {self.recipe.name} …",
            ) from None
        save_adapter(tuned, folder.path / UNPUBLISHED)  # whatever happens while measuring, the training is not lost
        self.figures["training"] = {**asdict(trained), "tokens_per_second": trained.tokens_per_second}
        rate, loss = trained.tokens_per_second, f"{trained.first_loss:.3f} → {trained.last_loss:.3f}"
        took = f"{trained.steps} steps in {duration(trained.seconds)}: {rate:.0f} tokens/s"
        self.report(Note(f"trained {took}, loss {loss}, peak memory {size(trained.peak_bytes)}"))
        return trained

    def evaluate(self, tuned: Tuned, spec: EvaluateSpec) -> Comparison:
        """Measure the base and the adapter on the held-out rows and on general text."""
        import torch

        from peftkit.evaluation import held_out

        data, backbone = self._audited(), tuned.backbone
        held = held_out.prepare(data.held_out, data.rendering, spec, backbone, self.report)
        try:
            comparison = held_out.compare(
                held_out.Contestant("base", tuned.as_base),
                held_out.Contestant("adapter", lambda: contextlib.nullcontext(tuned.model)),
                held,
                spec,
                backbone,
                train_rows=data.train.rows,
                report=self.report,
            )
        except torch.OutOfMemoryError as error:
            fact = f"the device ran out of memory while measuring {spec.batch_size} rows at once"
            raise OutOfMemory(fact, hint="lower evaluate.batch_size") from error
        report_comparison(comparison, self.report)
        self.figures["evaluation"] = comparison.figures()
        self._folder().write_json("samples.json", comparison.samples())
        if spec.group_by and comparison.adapter.scores:
            columns = ("group", "rows", "score")
            groups = [dict(zip(columns, group, strict=True)) for group in comparison.by_group(comparison.adapter)]
            self._folder().write_json("groups.json", groups)
        return comparison

    def publish(self, tuned: Tuned, comparison: Comparison, save_as: str | None = None) -> Version:
        """Keep the adapter in the registry with its base, data, settings and figures; rows stay in the run folder."""
        from peftkit.tuning.inject import save_adapter

        name, backbone, data = save_as or default_name(self.recipe), tuned.backbone, self._audited()
        records = [data.train.record(), data.held_out.record()]
        if comparison.held.text is not None:
            records.append(comparison.held.text.record)
        fields = {
            "kind": "peft",
            "base": base_fields(backbone),
            "adapter": {**tuned.spec.model_dump(), "trainable_parameters": tuned.trainable_parameters},
            "recipe": {
                "name": self.recipe.name,
                "sha256": self.recipe.sha256,
                "config": _without_paths(self.resolved.as_dict(), backbone.base),
            },
            "run": self._folder().id,
            "data": records,
            "environment": environment(),
            "metrics": {**comparison.figures(), "other": {**comparison.figures()["other"], **self._training()}},
            "parents": list(tuned.parents),
            "receipts": list(tuned.receipts),
        }
        # A file name in another encoding must not cost the training that is already done.
        draft = Draft.model_validate(as_utf8(fields))
        payload = save_adapter(tuned, self._folder().path / UNPUBLISHED)
        self.saved = (self.publish_to or self.registry).publish(name, payload, draft, base=backbone.identity.record)
        shutil.rmtree(payload)
        self.report(Note(f"saved as {self.saved.reference} in {self.saved.path}"))
        return self.saved

    def _training(self) -> dict[str, Any]:
        return {"training": self.figures["training"]} if "training" in self.figures else {}

    def _audited(self) -> Audit:
        if self._data is None:
            raise RunError("run.audit was not called", expected="audit before plan, train, evaluate and publish")
        return self._data

    def _folder(self) -> RunFolder:
        if self.folder is None:
            raise RunError("a dry run has no folder", expected="nothing after run.plan in a dry run")
        return self.folder


def base_fields(backbone: Backbone) -> dict[str, Any]:
    """What a manifest says about the base that an adapter was trained on."""
    from peftkit.backbone.locate import license_of

    return {
        "source": backbone.base.portable,
        "revision": backbone.base.revision,
        "record": backbone.identity.id,
        "fingerprint": backbone.identity.fingerprint,
        "parts": backbone.identity.parts(),
        "quantization": backbone.quantization_record(),
        "license": license_of(backbone.base),
    }


def _without_paths(config: dict[str, Any], base: LocatedBase) -> dict[str, Any]:
    """Settings as the registry keeps them: names without the folders of this machine, instructions as a digest."""
    data, evaluate = dict(config.get("data") or {}), dict(config.get("evaluate") or {})
    if isinstance(config.get("base"), dict):
        config = {**config, "base": {**config["base"], "source": base.portable}}
    for group, key in ((data, "train"), (data, "held_out"), (evaluate, "retention")):
        if isinstance(group.get(key), str):
            group[key] = Path(group[key]).name
    if evaluate.get("instructions"):
        evaluate["instructions"] = "sha256:" + hashlib.sha256(str(evaluate["instructions"]).encode()).hexdigest()
    return {**config, **({"data": data} if data else {}), **({"evaluate": evaluate} if evaluate else {})}


def report_comparison(comparison: Comparison, report: Report) -> None:
    """Report a comparison the way every command shows it."""
    from peftkit.evaluation.held_out import COLUMNS

    report(Table("held-out rows", COLUMNS, tuple(comparison.rows())))
    learned = comparison.learned
    report(Note(f"answer NLL per token, adapter − base: {_shown(learned)}"))
    forgotten = comparison.forgotten
    if forgotten is not None:
        report(Note(f"general text NLL per token, adapter − base: {_shown(forgotten)} (above 0: forgotten)"))
    if comparison.spec.group_by and comparison.adapter.scores:
        groups = tuple((name, n, f"{value:.2f}") for name, n, value in comparison.by_group(comparison.adapter))
        report(Table(f"adapter by {comparison.spec.group_by}", (comparison.spec.group_by, "rows", "score"), groups))


def _shown(change: Interval) -> str:
    if not math.isfinite(change.low):
        return f"{number(change.point)} (one row: no interval)"
    return f"{interval(change.point, change.low, change.high)} (95 %)"
