"""Recipes: find them, load them by path, copy them, run them; and the Run that hands a recipe its five verbs.

A recipe is a file with a `Config` and a `main(cfg, run)`. It is loaded by path, so an installed recipe, a checkout and
a user's edited copy behave the same.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import locations
from peftkit.config import Resolved, Spec, resolve
from peftkit.environment import environment
from peftkit.errors import PeftkitError, RunError
from peftkit.events import Event, Note, Progress, Report, Table, silent
from peftkit.registry.layout import check_name
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.render import duration, number, size
from peftkit.runs import RunFolder

if TYPE_CHECKING:  # torch takes seconds to import, and `peftkit recipes list` does not need it
    from peftkit.backbone.load import Backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec, LocatedBase
    from peftkit.data.audit import Audit, DataSpec
    from peftkit.evaluation.held_out import Comparison
    from peftkit.evaluation.spec import EvaluateSpec
    from peftkit.training.sft import Trained
    from peftkit.training.spec import TrainSpec
    from peftkit.tuning.inject import Tuned
    from peftkit.tuning.methods import AdapterSpec


@dataclass(frozen=True)
class Recipe:
    """A recipe file that was found and loaded."""

    name: str
    path: Path
    config: type[Spec]
    main: Any
    presets: Mapping[str, Mapping[str, Any]]

    @property
    def summary(self) -> str:
        """The first line of the file's docstring."""
        return (inspect.getdoc(sys.modules[self.main.__module__]) or "").split("\n", 1)[0]

    @property
    def sha256(self) -> str:
        """Digest of the file, for the manifest."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


# Where a run keeps its trained adapter until the registry has it.
_UNPUBLISHED = "adapter"


class Interrupted(RunError):
    """The user stopped a run; what was learned so far is in the run's folder."""


class _PlannedOnly(Exception):
    """Ends a dry run after its plan."""


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).with_name("_recipes")
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def shipped() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.py"))}


def find(name_or_path: str) -> Path:
    """The file of a shipped recipe, or a user's own. Raises RunError naming what exists."""
    path = Path(name_or_path)
    if path.suffix == ".py" and path.is_file():
        return path
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    near = difflib.get_close_matches(path.stem, known, n=1)
    raise RunError(
        f"there is no recipe {name_or_path!r}",
        expected="a .py file, or one of: " + ", ".join(known),
        hint=f"did you mean {near[0]}?" if near else "peftkit recipes list",
    )


def load(path: Path) -> Recipe:
    """Load a recipe file by its path. Raises RunError when it is not a recipe or does not import."""
    name = f"peftkit_recipe_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RunError(f"{path} cannot be loaded as Python", expected="a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves a Config's annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except PeftkitError:
        raise
    except Exception as error:
        raise RunError(f"{path} does not import: {type(error).__name__}: {error}", hint=f"python {path}") from error
    config, main = getattr(module, "Config", None), getattr(module, "main", None)
    if not (isinstance(config, type) and issubclass(config, Spec)) or not callable(main):
        raise RunError(
            f"{path} is not a recipe",
            expected="a class Config(peftkit.Spec) and a function main(cfg, run)",
            hint="start from a copy: peftkit recipes copy qlora_sft",
        )
    return Recipe(path.stem, path, config, main, getattr(module, "PRESETS", {}))


def copy(name: str, target: Path) -> Path:
    """Copy a shipped recipe to `target` (a file or a folder). Raises RunError rather than overwrite."""
    source = find(name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RunError(f"{target} exists already", hint="choose another name, or remove it")
    shutil.copyfile(source, target)
    return target


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
    saved: Version | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    _located: LocatedBase | None = None
    _data: Audit | None = None

    def audit(self, base: BaseSpec, data: DataSpec) -> Audit:
        """Read, render, check and count the rows before anything else costs time."""
        from peftkit.backbone.locate import locate
        from peftkit.base.ref import read_config
        from peftkit.base.tokenizer import load_tokenizer
        from peftkit.data.audit import audit

        self._located = locate(base, self.cache, self.report)
        tokenizer = load_tokenizer(self._located.folder)
        limit = read_config(self._located.folder).get("max_position_embeddings")
        self._data = audit(data, tokenizer, limit, self.report)
        return self._data

    def plan(
        self, base: BaseSpec, quant: QuantSpec, adapter: AdapterSpec, train: TrainSpec, init_from: str | None = None
    ) -> Tuned:
        """Load the backbone, inject (or continue) the adapter, and say what training will take.

        A dry run ends here.
        """
        from peftkit.backbone.load import load_backbone
        from peftkit.backbone.quantize import footprint
        from peftkit.training.sft import schedule
        from peftkit.tuning.attach import resume_adapter
        from peftkit.tuning.inject import inject

        parent = self.registry.resolve(init_from) if init_from else None
        backbone: Backbone = load_backbone(base, quant, self.cache, report=self.report, located=self._located)
        if parent is not None:
            self.report(Note(f"continuing from {parent.reference}"))
            tuned = resume_adapter(backbone, parent, adapter, report=self.report)
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
            raise _PlannedOnly
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
        except KeyboardInterrupt:
            kept = save_adapter(tuned, folder.path / "interrupted")
            raise Interrupted(
                "training was interrupted; the adapter as it was is a PEFT checkpoint in " + str(kept),
                hint=f"start again with: peftkit train {self.recipe.name} …",
            ) from None
        save_adapter(tuned, folder.path / _UNPUBLISHED)  # whatever happens while measuring, the training is not lost
        self.figures["training"] = {**asdict(trained), "tokens_per_second": trained.tokens_per_second}
        rate, loss = trained.tokens_per_second, f"{trained.first_loss:.3f} → {trained.last_loss:.3f}"
        took = f"{trained.steps} steps in {duration(trained.seconds)}: {rate:.0f} tokens/s"
        self.report(Note(f"trained {took}, loss {loss}, peak memory {size(trained.peak_bytes)}"))
        return trained

    def evaluate(self, tuned: Tuned, spec: EvaluateSpec) -> Comparison:
        """Measure the base and the adapter on the held-out rows and on general text."""
        from peftkit.evaluation import held_out

        data, backbone = self._audited(), tuned.backbone
        held = held_out.prepare(data.held_out, data.rendering, spec, backbone, self.report)
        comparison = held_out.compare(
            held_out.Contestant("base", tuned.as_base),
            held_out.Contestant("adapter", lambda: contextlib.nullcontext(tuned.model)),
            held,
            spec,
            backbone,
            train_rows=data.train.rows,
            report=self.report,
        )
        report_comparison(comparison, self.report)
        self.figures["evaluation"] = comparison.figures()
        self._folder().write_json("samples.json", comparison.samples())
        return comparison

    def publish(self, tuned: Tuned, comparison: Comparison, save_as: str | None = None) -> Version:
        """Keep the adapter in the registry with its base, data, settings and figures; rows stay in the run folder."""
        from peftkit.tuning.inject import save_adapter

        name, backbone, data = save_as or default_name(self.recipe), tuned.backbone, self._audited()
        records = [data.train.record(), data.held_out.record()]
        if comparison.held.text is not None:
            records.append(comparison.held.text.record)
        draft = Draft.model_validate(
            {
                "kind": "peft",
                "base": {
                    "source": backbone.base.source,
                    "revision": backbone.base.revision,
                    "fingerprint": backbone.identity.fingerprint,
                    "parts": backbone.identity.parts(),
                    "quantization": backbone.quantization_record(),
                },
                "adapter": {**tuned.spec.model_dump(), "trainable_parameters": tuned.trainable_parameters},
                "recipe": {
                    "name": self.recipe.name,
                    "sha256": self.recipe.sha256,
                    "config": self.resolved.as_dict(),
                },
                "data": records,
                "environment": environment(),
                "metrics": {**comparison.figures(), "other": {**comparison.figures()["other"], **self._training()}},
                "parents": list(tuned.parents),
            }
        )
        payload = save_adapter(tuned, self._folder().path / _UNPUBLISHED)
        self.saved = self.registry.publish(name, payload, draft)
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


def report_comparison(comparison: Comparison, report: Report) -> None:
    """Report a comparison the way every command shows it."""
    from peftkit.evaluation.held_out import COLUMNS
    from peftkit.render import interval

    report(Table("held-out rows", COLUMNS, tuple(comparison.rows())))
    learned = comparison.learned
    report(Note(f"answer NLL per token, adapter − base: {interval(learned.point, learned.low, learned.high)} (95 %)"))
    forgotten = comparison.forgotten
    if forgotten is not None:
        change = interval(forgotten.point, forgotten.low, forgotten.high)
        report(Note(f"general text NLL per token, adapter − base: {change} (95 %; above 0: forgotten)"))
    if comparison.spec.group_by and comparison.adapter.scores:
        groups = tuple((name, n, f"{value:.2f}") for name, n, value in comparison.by_group(comparison.adapter))
        report(Table(f"adapter by {comparison.spec.group_by}", (comparison.spec.group_by, "rows", "score"), groups))


def default_name(recipe: Recipe) -> str:
    """The adapter name when save_as is not given."""
    return recipe.name.replace("_", "-").lower()


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    run_id: str | None
    saved_as: str | None
    figures: dict[str, Any]


def execute(
    recipe: Recipe,
    resolved: Resolved[Any],
    *,
    registry: Path | None = None,
    runs: Path | None = None,
    report: Report = silent,
    dry_run: bool = False,
) -> Result:
    """Run a recipe's main from a fresh run folder to its end, recording events and how it ended.

    Raises what the recipe raises; Interrupted after Ctrl-C.
    """
    store = Registry(locations.registry_root(registry).path)
    check_name(getattr(resolved.config, "save_as", None) or default_name(recipe))  # before hours of training, not after
    cache = locations.cache_root().path
    if dry_run:
        run = Run(recipe, resolved, store, cache, None, report)
        try:
            recipe.main(resolved.config, run)
        except _PlannedOnly:
            report(Note("dry run: nothing was trained or written"))
        return Result(None, None, {})
    folder = RunFolder.create(locations.runs_root(runs).path, recipe.name, resolved.as_dict(), environment())
    folder.notify = report

    def recorded(event: Event) -> None:
        if not isinstance(event, Progress):  # steps are in metrics.jsonl already
            folder.record(event)
        report(event)

    run = Run(recipe, resolved, store, cache, folder, recorded)
    recorded(Note(f"run {folder.id} in {folder.path}"))
    try:
        recipe.main(resolved.config, run)
    except (KeyboardInterrupt, Interrupted) as error:
        folder.finish("interrupted", error=str(error), figures=run.figures)
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(f"run {folder.id} was interrupted{_kept(folder)}") from None
    except BaseException as error:
        folder.finish("failed", error=f"{type(error).__name__}: {error}", figures=run.figures)
        if _kept(folder):
            report(Note(f"run {folder.id} failed after training{_kept(folder)}"))
        raise
    saved = run.saved.reference if run.saved else None
    folder.finish("done", saved_as=saved, figures=run.figures)
    return Result(folder.id, saved, run.figures)


def _kept(folder: RunFolder) -> str:
    """Where the trained adapter is when it was not published."""
    adapter = folder.path / _UNPUBLISHED
    return f"; the trained adapter is a PEFT checkpoint in {adapter}" if adapter.exists() else ""


def configure(
    recipe: Recipe, *, preset: str | None = None, files: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> Resolved[Any]:
    """Resolve a recipe's settings from its presets, files and `key=value` overrides."""
    return resolve(recipe.config, presets=recipe.presets, preset=preset, files=files, overrides=overrides)
