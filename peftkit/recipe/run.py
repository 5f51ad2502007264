"""The Run that hands a recipe its five verbs: audit, plan, train, evaluate, publish."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.config import Resolved, Spec, dump_yaml
from peftkit.errors import OutOfMemory, RunError, TrainingError
from peftkit.events import Note, Report, Warned, silent
from peftkit.plain import as_utf8
from peftkit.process_group import launched
from peftkit.recipe.binding import Binding
from peftkit.recipe.fields import trained_fields, with_whole_paths
from peftkit.recipe.files import Recipe, default_name
from peftkit.recipe.keeping import described, keep_adapter, needed
from peftkit.recipe.resume import how_to_resume
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.render import duration, size
from peftkit.runs import RunFolder
from peftkit.runs.contents import CHECKPOINTS, INTERRUPTED, UNPUBLISHED

if TYPE_CHECKING:  # torch takes seconds to import, and `peftkit recipes list` does not need it
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec, LocatedBase
    from peftkit.recipe.target import Target
    from peftkit.recipe.work import Work
    from peftkit.recipe.work.kinds import Place
    from peftkit.training.checkpoint import Checkpoint
    from peftkit.training.sft import Trained
    from peftkit.training.spec import TrainSpec
    from peftkit.tuning.methods import AdapterSpec
    from peftkit.tuning.tuned import Tuned


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
    target: Target | None = None
    """What the run has to fit into; None is this machine."""
    begun: bool = False
    """Whether training was reached; before it, a run that is resumed is as it was."""
    start: Checkpoint | None = None
    """Where a resumed run goes on."""
    binding: Binding | None = None
    """What its checkpoints are bound to; None in a dry run."""
    saved: Version | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    _located: LocatedBase | None = None
    _work: Work | None = None
    _data: Any = None
    _audited_from: tuple[BaseSpec, Spec] | None = None
    _parents: dict[str, Version] = field(default_factory=dict)

    def audit(self, base: BaseSpec, data: Spec) -> Any:
        """Read, render, check and count the rows before anything else costs time.

        `data` says what kind of rows they are: DataSpec, TaskSpec or PreferenceSpec.
        """
        from peftkit.backbone.locate import locate
        from peftkit.recipe.work import work_for

        if self._data is not None and self._audited_from == (base, data):
            return self._data  # a budget asked for it before
        self._located = locate(base, self.cache, self.report)
        self._work = work_for(data)
        self._data = self._work.audit(self._place(), data, getattr(self.resolved.config, "evaluate", None))
        self._audited_from = (base, data)
        if self.binding is not None:
            self.binding.data(self._data)
        if self.folder is not None and self.start is None:
            self.folder.write_json("audit.json", self._data.record())
        return self._data

    def fit(self, budget: str) -> None:
        """Change the settings until the run fits into so much memory of this machine, and never its effective batch.

        Raises TrainingError when nothing fits, ConfigError for a recipe that cannot be planned or a wrong size, and
        what `to_train` raises for settings that do not go together.
        """
        from peftkit.backbone.locate import locate
        from peftkit.recipe.fitting import fitted, known_shape
        from peftkit.recipe.lengths import Lengths
        from peftkit.recipe.target import this_machine
        from peftkit.recipe.to_train import groups_to_train

        given = groups_to_train(self.resolved, self.registry, resumed=self.start is not None)
        self.target = this_machine(given.quant, budget)
        # A base that no plan knows is refused before it is fetched and the rows are read.
        shape = known_shape(locate(given.base, self.cache, weights=False))
        data, work = self.audit(given.base, given.data), self._audited()[1]
        lengths = Lengths.of_run(data, given, work.head(data))
        self.resolved = fitted(self.resolved, given.adapter, shape, lengths, self.target, self.report)

    def plan(
        self,
        base: BaseSpec,
        quant: QuantSpec,
        adapter: AdapterSpec,
        train: TrainSpec,
        init_from: str | None = None,
        way: Spec | None = None,
    ) -> Tuned:
        """Predict memory, time and disk, load the backbone, inject (or continue) the adapter, try the longest rows.

        `way` is a further group of settings that says what is learned from the rows: a preference, a teacher.
        A dry run ends here. Raises OutOfMemory for a plan that cannot fit, RunError for a disk without room.
        """
        from peftkit.recipe.ahead import Ahead
        from peftkit.recipe.groups import groups_with
        from peftkit.recipe.target import this_machine
        from peftkit.recipe.to_train import foreign_rate, to_train
        from peftkit.recipe.tune import load_tuned
        from peftkit.training.row_rules import check_rows
        from peftkit.training.schedule import schedule

        data, work = self._audited()
        rows, head = data.train.examples, work.head(data)
        quant = self.binding.held_to(quant) if self.binding is not None else quant
        # The settings of a resumed run come from its folder, defaults included; they were agreed when it began.
        parent = self._parent(init_from)
        what = to_train(adapter, quant, train, parent, {} if self.start else self.resolved.sources)
        given = groups_with(self.resolved.config, base=base, quant=quant, adapter=what.adapter, train=train)
        check_rows(given.data, train)
        if self.start is None and (warning := foreign_rate(self.resolved)) is not None:
            self.report(warning)
        assert self._located is not None  # audit has found the base
        steps, target = schedule(rows, train), self.target or this_machine(quant)
        places = self.folder, self.registry.root
        ahead = Ahead(given, self._located, data, head, steps, target, *places, self.start is not None, self.report)
        plan = ahead.plan()
        options: dict[str, Any] = {"head": head, "other_base": self.other_base, "report": self.report}
        options["prepare"] = lambda backbone: work.prepare(self._place(), backbone, way)
        tuned = load_tuned(what, base, self._located, rows, self.cache, **options)
        if self.binding is not None:
            self.binding.base(tuned.backbone)
            self.binding.work(work.besides())
        if self.start is None and not launched().sharded:  # what FSDP would spread is still whole, and not in place
            ahead.probe(tuned, plan, work.paths(self._place(), tuned, data, train))
        if self.folder is None:
            raise PlannedOnly
        return tuned

    def train(self, tuned: Tuned, spec: TrainSpec) -> Trained:
        """Train the adapter, or go on training it; checkpoints and what was learned are kept in the run's folder."""
        from peftkit.training.checkpoint import Checkpoints
        from peftkit.training.sft import Stopped, train

        folder = self._folder()
        data, work = self._audited()
        if self.binding is not None:
            folder.write_json("binding.json", self.binding.values)
        folder.write_text("config.yaml", dump_yaml(with_whole_paths(self.resolved.as_dict())))
        rows, held_out = work.rows(self._place(), tuned, data)
        self.begun = True
        try:
            trained = train(
                tuned,
                rows,
                spec,
                folder.path / "trainer",
                held_out=held_out,
                paths=work.paths(self._place(), tuned, data, spec),
                checkpoints=Checkpoints(folder.path / CHECKPOINTS, self.report) if launched().leads else None,
                start=self.start,
                bound_to=self.binding.values if self.binding else {},
                report=self.report,
                log=self._log,
            )
        except TrainingError as error:
            if not launched().sharded:  # its parts could not be put together: the others are not at this point
                name = UNPUBLISHED if isinstance(error, OutOfMemory) else INTERRUPTED
                keep_adapter(tuned, folder.path / name, self.report)  # the steps before this one are not lost
            raise
        except (Stopped, KeyboardInterrupt) as stop:
            if launched().sharded and not isinstance(stop, Stopped):
                raise
            kept = keep_adapter(tuned, folder.path / INTERRUPTED, self.report)
            what = str(stop) or "interrupted in the middle of a step"
            where = f"; the adapter as it was is {described(kept)}" if launched().leads and kept else ""
            raise Interrupted(f"training was {what}{where}", hint=how_to_resume(folder, self.registry.root)) from None
        keep_adapter(tuned, folder.path / UNPUBLISHED, self.report)  # whatever happens while measuring
        self.figures["training"] = {**asdict(trained), "tokens_per_second": trained.tokens_per_second}
        rate, loss = trained.tokens_per_second, f"{trained.first_loss:.3f} → {trained.last_loss:.3f}"
        took = f"{trained.steps} steps in {duration(trained.seconds)}: {rate:.0f} tokens/s"
        self.report(Note(f"trained {took}, loss {loss}, peak memory {size(trained.peak_bytes)}"))
        return trained

    def evaluate(self, tuned: Tuned, spec: Any) -> Any:
        """Measure the adapter on the held-out rows, beside the base or what is trivial; of answers, general text too.

        Fewer rows at once are tried where the memory does not suffice. Raises OutOfMemory when one row is too much.
        """
        from peftkit.training.exhaustion import is_out_of_memory
        from peftkit.training.memory import release

        data, work = self._audited()
        while True:
            try:
                comparison = work.compare(self._place(), tuned, data, spec)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fact = f"the device ran out of memory while measuring {spec.batch_size} rows at once"
                if spec.batch_size == 1:
                    raise OutOfMemory(fact, hint="lower evaluate.max_new_tokens or data.max_length") from error
            release(tuned.backbone.device)
            spec = spec.model_copy(update={"batch_size": spec.batch_size // 2})
            self.report(Warned(f"{fact}; it is measured again with {spec.batch_size}", "lower evaluate.batch_size"))
        work.tell(comparison, self.report)
        self.figures["evaluation"] = comparison.figures()
        name, value, direction = comparison.objective()
        self.figures["objective"] = {"name": name, "value": value, "direction": direction}
        work.keep(comparison, self._folder(), self.report)
        return comparison

    def publish(self, tuned: Tuned, comparison: Any, save_as: str | None = None) -> Version:
        """Keep the adapter in the registry with its base, data, settings and figures; rows stay in the run folder."""
        from peftkit.training.parallel import team
        from peftkit.tuning.inject import save_adapter

        name, backbone, (data, work) = save_as or default_name(self.recipe), tuned.backbone, self._audited()
        measured, training = comparison.figures(), {k: v for k, v in self.figures.items() if k == "training"}
        fields = {
            **trained_fields(tuned, self.recipe, self.resolved.as_dict(), work.besides()),
            "run": self._folder().id,
            "data": [data.train.record(), data.held_out.record(), *work.sources(comparison)],
            "metrics": {**measured, "other": {**measured["other"], **training}},
        }
        # A file name in another encoding must not cost the training that is already done.
        draft = Draft.model_validate(as_utf8(fields))
        with tempfile.TemporaryDirectory(prefix="peftkit-adapter-") as elsewhere:
            payload = keep_adapter(tuned, self._folder().path / UNPUBLISHED, self.report)
            if payload is None and not launched().sharded:  # the runs' disk is full, and the registry may be on another
                payload = save_adapter(tuned, Path(elsewhere) / UNPUBLISHED)
            if launched().leads:
                target = self.publish_to or self.registry
                self.saved = target.publish(name, needed(payload), draft, base=backbone.identity.record)
            self.saved = team().first(self.saved)
            assert self.saved is not None  # the first process has published it
            shutil.rmtree(needed(payload))
        self.report(Note(f"saved as {self.saved.reference} in {self.saved.path}"))
        return self.saved

    def _log(self, step: int, figures: dict[str, float]) -> None:
        folder = self._folder()
        folder.log_metrics(step, figures)
        folder.write_page()

    def _place(self) -> Place:
        from peftkit.recipe.work.kinds import Place

        assert self._located is not None  # audit has found the base
        parent = self._parent(getattr(self.resolved.config, "init_from", None))
        return Place(self._located, self.cache, self.registry, self.report, parent)

    def _parent(self, init_from: str | None) -> Version | None:
        """The adapter that is continued: what the name means at the run's begin, whatever becomes of its alias."""
        if not init_from:
            return None
        return self._parents.setdefault(init_from, self._parents.get(init_from) or self.registry.resolve(init_from))

    def _audited(self) -> tuple[Any, Work]:
        if self._data is None or self._work is None:
            raise RunError("run.audit was not called", expected="audit before plan, train, evaluate and publish")
        return self._data, self._work

    def _folder(self) -> RunFolder:
        if self.folder is None:
            raise RunError("a dry run has no folder", expected="nothing after run.plan in a dry run")
        return self.folder
