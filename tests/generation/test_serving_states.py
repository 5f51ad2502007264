"""Requests, publications, pins, evictions, cancellations and faults in any order, over engine and fleet together."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from generation.adapters_lab import Lab, bytes_of, damage, make_lab
from generation.engine_lab import ask, held_bytes, numbers
from generation.serving_lab import Oracle, check_seats, rows_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tuning.method_zoo import save_method

from peftkit.errors import AdapterDamaged, AdapterNotFound, TuningError
from peftkit.generation.fleet import fleet as fleet_module
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.limits import Limits
from peftkit.generation.opening import engine_over
from peftkit.generation.rows import Rows
from peftkit.generation.running import Ticket
from peftkit.registry.store import Version
from peftkit.tuning import attach as attach_module
from peftkit.tuning.skeleton import skeleton
from peftkit.tuning.stored import read

NAMES = ("s0", "s1", "s2", "s3", "own")
RANKS = (2, 8, 4, 3)
NEW = 6
PREFIX = numbers(20, 99)
PROMPTS = (tuple(numbers(1, 1)), tuple(PREFIX + numbers(1, 2)), tuple(PREFIX + numbers(9, 3)), tuple(numbers(12, 4)))
LONG = tuple(PREFIX + numbers(100, 5))
WEIGHTS = "adapter_model.safetensors"
name_of = st.sampled_from(NAMES)
asked_for = st.sampled_from((*NAMES, *(f"{name}@live" for name in NAMES)))
WISH = st.tuples(st.one_of(asked_for, asked_for, st.none()), st.sampled_from((*PROMPTS, LONG)), st.integers(1, NEW))


class Machine(RuleBasedStateMachine):
    """An engine over a fleet with little room; the oracle is what each version answers alone."""

    lab: ClassVar[Lab]
    oracle: ClassVar[Oracle]
    versions: ClassVar[dict[tuple[str, int], Version]]
    disk_error: ClassVar[list[OSError]]
    closed: ClassVar[Counter[Ticket]]
    seen: ClassVar[Counter[str]]

    @initialize(
        slots=st.integers(1, 3),
        memory=st.sampled_from([None, 2, 3]),
        host=st.sampled_from([0, 0, 1, 100]),
        rows=st.integers(1, 6),
        prompt_tokens=st.sampled_from([5, 2048]),
        prefix_bytes=st.sampled_from([0, 64 << 20]),
        cache=st.sampled_from([None, 4]),
    )
    def begin(
        self, slots: int, memory: int | None, host: int, rows: int, prompt_tokens: int, prefix_bytes: int,
        cache: int | None,
    ) -> None:  # fmt: skip
        """`memory` and `host` are in adapters of rank 8, `cache` in rows of 64 tokens."""
        token = 2 * 32 * 4  # one layer, keys and values of one head
        self.means = {name: self.versions[name, 0] for name in NAMES}
        self.live = dict(self.means)
        room = None if memory is None else bytes_of(self.lab, 8, slots=memory)
        self.fleet = Fleet(
            self.lab.backbone(), self.resolve, slots=slots, memory=room, host_memory=bytes_of(self.lab, 8, slots=host)
        )
        limits = Limits(rows, None, prompt_tokens, None if cache is None else cache * 64 * token, prefix_bytes)
        self.cache = limits.cache_bytes
        self.engine = engine_over(self.fleet, limits)
        self.tickets: list[tuple[Ticket, Version | None]] = []
        self.settled: set[Ticket] = set()
        self.damaged: dict[str, tuple[Path, bytes]] = {}
        self.removed: set[str] = set()
        self.pins: set[str] = set()

    def resolve(self, name: str) -> Version:
        bare, _, alias = name.partition("@")
        if bare in self.removed:
            raise AdapterNotFound(f"no adapter is called {bare!r}")
        return (self.live if alias else self.means)[bare]

    @rule(wishes=st.lists(WISH, min_size=1, max_size=8), then=st.integers(0, 8))
    def submit(self, wishes: list[tuple[str | None, tuple[int, ...], int]], then: int) -> None:
        for name, prompt, new in wishes:
            if name is not None and name.partition("@")[0] in self.removed:
                with pytest.raises(AdapterNotFound):
                    ask(self.engine, prompt, new, adapter=name)
            else:
                version = self.resolve(name) if name else None
                self.tickets.append((ask(self.engine, prompt, new, adapter=name), version))
        for _ in range(then):
            self._step()

    @precondition(lambda self: len(self.tickets) > len(self.settled))
    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        """Those that have a row come first."""
        rows = [row.ticket for row in rows_of(self.engine)]
        others = [ticket for ticket, _ in self.tickets if not ticket.done and ticket not in rows]
        [*rows, *others][which % (len(rows) + len(others))].cancel()

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @rule()
    def step_with_a_disk_error(self) -> None:
        """No file can be read meanwhile."""
        self.disk_error.append(OSError(5, "Input/output error"))
        try:
            self._step()
        finally:
            self.disk_error.clear()

    def _step(self) -> bool:
        residents, evicted = self.fleet._residents, self.fleet.statistics().evictions
        stay = [identity for identity in residents if identity in self.fleet._pins.values()]
        more = self.engine.step()
        assert all(identity in residents for identity in stay), "a pinned adapter has made room"
        self.seen["evicted"] += self.fleet.statistics().evictions - evicted
        for ticket, version in self.tickets:
            if ticket.done and ticket not in self.settled:
                self.settled.add(ticket)
                self._check(ticket, version)
        return more

    def _check(self, ticket: Ticket, version: Version | None) -> None:
        """A ticket that has just ended, by what could have ended it."""
        completion, request = ticket.completion, ticket.request
        assert completion is not None
        assert ticket.take() == completion.text
        known = self.oracle.ids(version, request.prompt, NEW)
        self.seen[completion.finish if ticket.error is None else type(ticket.error).__name__] += 1
        if completion.finish in ("stop", "length"):
            assert ticket.error is None
            assert completion.ids == known[: request.max_new_tokens]
            assert completion.finish == ("length" if len(known) >= request.max_new_tokens else "stop")
            assert completion.adapter == (version.reference if version else None)
        elif completion.finish == "cancelled":
            assert ticket.cancelled
            assert completion.ids == known[: len(completion.ids)]
            self.seen["cancelled on its way"] += bool(completion.ids)
        else:
            assert version is not None
            assert completion.ids == [], "what was seated stays whole"
            self._check_failure(ticket.error, version)

    def _check_failure(self, error: BaseException | None, version: Version) -> None:
        if isinstance(error, AdapterDamaged):
            assert version.id in self.damaged or version.name in self.removed
        elif isinstance(error, OSError):
            assert self.disk_error
        else:
            assert isinstance(error, TuningError)
            assert "pinned" in error.fact
            assert self.pins

    @rule(name=asked_for)
    def pin(self, name: str) -> None:
        try:
            self.fleet.pin(name)
            self.pins.add(name)
        except AdapterNotFound:
            assert name.partition("@")[0] in self.removed
        except (AdapterDamaged, TuningError) as error:
            self._check_failure(error, self.resolve(name))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.fleet.unpin(name)
        self.pins.remove(name)

    @rule(name=name_of, number=st.integers(0, 2))
    def publish_again(self, name: str, number: int) -> None:
        self.means[name] = self.versions[name, number]

    @rule(name=name_of)
    def move_alias(self, name: str) -> None:
        self.live[name] = self.means[name]

    @rule(names=st.sets(name_of, min_size=1, max_size=4))
    def spoil(self, names: set[str]) -> None:
        for name in sorted(names - self.removed):
            version = self.means[name]
            if version.id not in self.damaged:
                path = version.path / WEIGHTS
                self.damaged[version.id] = path, damage(path)

    @rule(name=name_of)
    def remove(self, name: str) -> None:
        if name not in self.removed:
            self._move(name, "", ".away")
            self.removed.add(name)

    @precondition(lambda self: self.damaged or self.removed)
    @rule()
    def mend(self) -> None:
        while self.removed:
            self._move(self.removed.pop(), ".away", "")
        while self.damaged:
            _, (path, content) = self.damaged.popitem()
            path.write_bytes(content)

    def _move(self, name: str, before: str, after: str) -> None:
        for number in range(3):
            path = self.versions[name, number].path
            path.with_name(path.name + before).rename(path.with_name(path.name + after))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "engine"):
            return
        check_seats(self.engine, self.fleet)
        assert len(rows_of(self.engine)) == self.engine.running <= self.engine.limits.rows
        assert self.cache is None or held_bytes(self.engine) <= self.cache
        self.seen["waited"] += bool(self.engine.waiting and self.engine.running)
        for ticket, _ in self.tickets:
            assert self.closed[ticket] == ticket.done
            assert ticket.done == (ticket in self.settled)

    def teardown(self) -> None:
        """With nothing wrong any more, everything that is left is answered, in so many steps."""
        if not hasattr(self, "engine"):
            return
        for name in self.pins:
            self.fleet.unpin(name)
        self.pins.clear()
        self.mend()
        for _ in range(20 * len(self.tickets) + 2):
            if not self._step():
                break
            check_seats(self.engine, self.fleet)
        assert all(ticket.done and self.closed[ticket] == 1 for ticket, _ in self.tickets)
        assert self.engine.running == self.engine.waiting == 0
        self.fleet.close()
        assert self.fleet.bank.bytes == 0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("states"), num_hidden_layers=1, tie_word_embeddings=False)


def published(lab: Lab, folder: Path) -> dict[tuple[str, int], Version]:
    found = {}
    for i, name in enumerate(NAMES[:-1]):
        for number in range(3):
            found[name, number] = lab.written(name, 600 + 10 * i + number, r=RANKS[(i + number) % 4])
    for number, method in enumerate(("IA3", "PROMPT_TUNING", "OFT")):
        saved = save_method(skeleton(lab.backbone().model), method, folder / method)
        found["own", number] = lab.publish("own", saved)
    return found


def test_every_request_ends_once_and_right_whatever_happens(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here(Machine):
        """With what it shares between its runs."""

    Here.lab, Here.oracle, Here.versions = lab, Oracle(lab), published(lab, tmp_path)
    Here.disk_error, Here.closed, Here.seen = [], Counter(), Counter()
    true = Ticket.close

    def raising(version: Version) -> Any:
        if Here.disk_error:
            raise Here.disk_error[0]
        return read(version)

    def counted(self: Ticket, *args: Any) -> None:
        Here.closed[self] += 1
        true(self, *args)

    shrink = Rows.shrink

    def shrinking(self: Rows, rows: int, length: int) -> None:
        before = self.held
        shrink(self, rows, length)
        assert self.held != before, "the room was given back for nothing"
        Here.seen["shrunk"] += 1

    monkeypatch.setattr(Rows, "shrink", shrinking)
    monkeypatch.setattr(fleet_module, "read", raising)
    monkeypatch.setattr(attach_module, "read", raising)
    monkeypatch.setattr(Ticket, "close", counted)
    answers = [Here.oracle.ids(version, prompt, NEW) for version in Here.versions.values() for prompt in PROMPTS]
    assert len(set(map(tuple, answers))) > 0.9 * len(answers), "these answers cannot be told apart"
    checks = settings(
        max_examples=70,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Here, settings=checks)
    for what in ("length", "cancelled", "cancelled on its way", "AdapterDamaged", "OSError", "TuningError", "evicted",
                 "waited", "shrunk"):  # fmt: skip
        assert Here.seen[what] >= 3, (what, Here.seen)
