"""Attaching, moving, publishing, breaking and asking in any order, beside a model of what each name must mean."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from generation.adapters_lab import Lab, damage
from generation.engine_lab import numbers
from generation.serving_lab import Oracle
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from serving.host_lab import Stage, files, hosted

from peftkit.errors import AdapterDamaged, AdapterNotFound, PeftkitError
from peftkit.registry.store import Registry, Version
from peftkit.serving.answering import Answer

NAMES, ALIASES = ("oak", "elm"), ("prod", "latest")
WEIGHTS = "adapter_model.safetensors"
PROMPTS = (tuple(numbers(4, 1)), tuple(numbers(30, 2)))
PAYLOADS, NEW = 3, 4
name_of, alias_of = st.sampled_from(NAMES), st.sampled_from(ALIASES)
model_of = st.sampled_from([model for name in NAMES for model in (name, f"{name}@prod")])
which = st.integers(0, 9)


class Machine(RuleBasedStateMachine):
    """A host with two slots over a registry of its own, which is not followed."""

    lab: ClassVar[Lab]
    oracle: ClassVar[Oracle]
    folder: ClassVar[Path]
    alike: ClassVar[dict[str, Version]] = {}
    seen: ClassVar[Counter[str]] = Counter()
    begun: ClassVar[int] = 0

    @initialize()
    def begin(self) -> None:
        Machine.begun += 1
        self.mine = Lab(self.folder / f"{self.begun}", self.lab.base, self.lab.loaded)
        self.registry = Registry(self.mine.registry.root)
        self.bad: set[str] = set()
        self.means: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        """Aliases that were asked under an attached name; they are followed, and not listed."""
        self.asked: list[tuple[Answer, Version | None, tuple[int, ...]]] = []
        self.runner, self.stack = asyncio.Runner(), AsyncExitStack()
        for name in NAMES:
            self.publish(name, 0)
        self.stage: Stage = self.run(self.stack.enter_async_context(hosted(self.mine, slots=2, rows=3)))

    def run(self, work: Any) -> Any:
        async def timed() -> Any:
            async with asyncio.timeout(60):
                return await work

        return self.runner.run(timed())

    def resolved(self, model: str) -> Version | None:
        try:
            return self.registry.resolve(model)
        except AdapterNotFound:
            return None

    def picked(self, name: str, which: int) -> Version:
        versions = self.registry.versions(name)
        return versions[which % len(versions)]

    def refused(self, work: Any, kind: type[PeftkitError]) -> None:
        """It fails, and nothing has changed."""
        before = files(self.registry.root)
        with pytest.raises(kind):
            self.run(work)
        assert files(self.registry.root) == before
        self.seen[f"refused: {kind.__name__}"] += 1

    # ---- the registry, changed by others

    @rule(name=name_of, seed=st.integers(0, PAYLOADS - 1))
    def publish(self, name: str, seed: int) -> None:
        payload = self.lab.payload(f"{name}-{seed}", 700 + 10 * NAMES.index(name) + seed)
        self.registry.publish(name, payload, self.mine.draft())

    @rule(name=name_of)
    def publish_damaged(self, name: str) -> None:
        payload = self.lab.payload(f"damaged-{len(self.bad)}", 750 + len(self.bad))
        version = self.registry.publish(name, payload, self.mine.draft())
        damage(version.path / WEIGHTS)
        self.bad.add(version.id)

    @rule(name=name_of, alias=alias_of, which=which)
    def tag(self, name: str, alias: str, which: int) -> None:
        self.registry.tag(self.picked(name, which).reference, alias)

    # ---- the host

    @rule(model=model_of)
    def attach(self, model: str) -> None:
        version = self.resolved(model)
        if version is None:
            self.refused(self.stage.host.attach(model), AdapterNotFound)
        elif version.id in self.bad:
            self.refused(self.stage.host.attach(model), AdapterDamaged)
        else:
            self.run(self.stage.host.attach(model))
            self.means[model] = version.id
            self.kept.pop(model, None)

    @rule(model=model_of)
    def detach(self, model: str) -> None:
        if self.means.pop(model, None) is None:
            self.refused(self.stage.host.detach(model), AdapterNotFound)
        else:
            self.run(self.stage.host.detach(model))
            self.kept = {each: id for each, id in self.kept.items() if each.partition("@")[0] != model}

    @rule()
    def reload(self) -> None:
        self.run(self.stage.host.reload())
        for means in (self.means, self.kept):
            for model in means:
                version = self.resolved(model)
                if version is not None and version.id not in self.bad:
                    means[model] = version.id

    @rule(name=name_of, alias=alias_of, which=which)
    def move(self, name: str, alias: str, which: int) -> None:
        version = self.picked(name, which)
        self._moves(self.stage.host.move(name, alias, version.id), name, alias, version)

    @rule(name=name_of, alias=alias_of)
    def restore(self, name: str, alias: str) -> None:
        moves = self.registry.history(name, alias)
        version = self.registry.load(name, str(moves[-2].version)) if len(moves) > 1 else None
        self._moves(self.stage.host.restore(name, alias), name, alias, version)

    def _moves(self, change: Any, name: str, alias: str, version: Version | None) -> None:
        if version is None or not any(model.partition("@")[0] == name for model in self.means):
            self.refused(change, AdapterNotFound)
        elif version.id in self.bad:
            self.refused(change, AdapterDamaged)
        else:
            models = [name, f"{name}@latest"] if alias == "latest" else [f"{name}@{alias}"]
            meant = {model for model in models if model in self.means and self.means[model] != version.id}
            assert {model.id for model in self.run(change)} == meant
            assert self.registry.resolve(f"{name}@{alias}").id == version.id
            self.means |= dict.fromkeys(meant, version.id)
            self.kept |= {model: version.id for model in models if model in self.kept}
            self.seen["moved"] += 1

    @rule(model=st.one_of(model_of, st.just("base")), prompt=st.sampled_from(PROMPTS), leave=st.booleans())
    def ask(self, model: str, prompt: tuple[int, ...], leave: bool) -> None:
        version: Version | None = None
        if model in (means := self.means | self.kept):
            version = self.registry.load(model.partition("@")[0], means[model])
        elif model != "base":
            version = self.resolved(model) if model.partition("@")[0] in self.means else None
            if version is None:
                self.refused(self.stage.ask(model, prompt), AdapterNotFound)
                return
            if version.id in self.bad:
                self.refused(self.stage.ask(model, prompt), AdapterDamaged)
                return
            self.kept[model] = version.id
            self.seen["kept"] += 1
        answer = self.run(self.stage.begin(model, prompt, NEW))
        if leave:
            answer.cancel()
        else:
            self.asked.append((answer, version, prompt))

    @rule()
    def settle(self) -> None:
        for answer, version, prompt in self.asked:
            found = self.run(answer.whole())
            assert found.adapter == (version.reference if version else None)
            assert found.ids == self.oracle.ids(self._like(version), prompt, NEW)
            self.seen["answered"] += 1
        self.asked.clear()

    def _like(self, version: Version | None) -> Version | None:
        """The first version of these weights: what it answers is known."""
        return version and self.alike.setdefault(version.manifest.files[WEIGHTS].sha256, version)

    @invariant()
    def names_mean_what_they_must(self) -> None:
        assert self.stage.versions() == self.means

    def teardown(self) -> None:
        if hasattr(self, "stage"):
            self.settle()
            self.run(self.stack.aclose())
            self.runner.close()


def run(lab: Lab, oracle: Oracle, folder: Path, examples: int) -> None:
    Machine.lab, Machine.oracle, Machine.folder = lab, oracle, folder
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=slow, derandomize=True,
        database=None,
    )  # fmt: skip
    run_state_machine_as_test(Machine, settings=chosen)
    wanted = {"answered", "moved", "refused: AdapterDamaged", "refused: AdapterNotFound"}
    assert wanted <= Machine.seen.keys(), Machine.seen


def test_names_in_any_order(lab: Lab, oracle: Oracle, tmp_path: Path) -> None:
    run(lab, oracle, tmp_path, 8)


@pytest.mark.full
def test_names_in_any_order_for_long(lab: Lab, oracle: Oracle, tmp_path: Path) -> None:
    run(lab, oracle, tmp_path, 150)
    assert Machine.seen["kept"]
