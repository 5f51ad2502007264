"""Random seats, releases, pins, publications, alias moves and faults against a model of twenty lines."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from generation.adapters_lab import Lab, close, computed, damage
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from peftkit.errors import AdapterDamaged, TuningError
from peftkit.generation.fleet import fleet as module
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.seats import Seat
from peftkit.registry.store import Version
from peftkit.tuning.stored import read

SLOTS = 3
NAMES = ("s0", "s1", "s2", "s3", "s4")
ASKED = (*NAMES, *(f"{name}@live" for name in NAMES))
WEIGHTS = "adapter_model.safetensors"
name_of = st.sampled_from(NAMES)
asked_for = st.sampled_from(ASKED)


@dataclass
class Model:
    """Who is resident in order of use, with how many users; who is in host memory; who is pinned under which name."""

    users: dict[str, int] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    pins: dict[str, str] = field(default_factory=dict)

    def seat(self, identity: str, unreadable: bool) -> str:
        """What asking for a seat comes to: seated, full, pinned, or unreadable."""
        if identity not in self.users:
            held = [other for other in self.users if other in self.pins.values()]
            free = [other for other, users in self.users.items() if not users and other not in held]
            if len(held) >= SLOTS:
                return "pinned"
            if len(self.users) >= SLOTS and not free:
                return "full"
            if identity not in self.waiting and unreadable:
                return "unreadable"
            if len(self.users) >= SLOTS:
                del self.users[free[0]]
                self.waiting.add(free[0])
            self.waiting.discard(identity)
        self.users[identity] = self.users.pop(identity, 0) + 1
        return "seated"


class Interrupt:
    """Raise KeyboardInterrupt at the n-th call or return inside the block, as Ctrl-C could."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self) -> None:
        gc.disable()
        sys.setprofile(self._count)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        self.left -= event in ("call", "return") and frame.f_code.co_name != "__exit__"
        if self.left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt


class Machine(RuleBasedStateMachine):
    """A fleet and its model, given the same."""

    lab: ClassVar[Lab]
    alone: ClassVar[dict[str, torch.Tensor]]
    versions: ClassVar[dict[tuple[str, int], Version]]
    seen: ClassVar[dict[str, int]]
    put_raising: ClassVar[Callable[[BaseException | None], None]]

    def __init__(self) -> None:
        super().__init__()
        self.means = {name: self.versions[name, 0] for name in NAMES}
        self.live = dict(self.means)
        self.fleet = Fleet(self.lab.backbone(), self.resolve, slots=SLOTS)
        self.model = Model()
        self.seats: list[Seat] = []
        self.damaged: dict[str, tuple[Path, bytes]] = {}

    def resolve(self, name: str) -> Version:
        bare, _, alias = name.partition("@")
        return (self.live if alias else self.means)[bare]

    @rule(name=asked_for)
    def seat(self, name: str) -> None:
        self._seat(name, None)

    @rule(name=asked_for)
    def seat_with_a_disk_error(self, name: str) -> None:
        self._seat(name, OSError(5, "Input/output error"))

    def _seat(self, name: str, error: OSError | None) -> None:
        version = self.fleet.identify(name)
        assert version is not None
        assert version == self.resolve(name)
        outcome = self.model.seat(version.id, error is not None or version.id in self.damaged)
        self.seen[outcome] = self.seen.get(outcome, 0) + 1
        type(self).put_raising(error)
        try:
            if outcome == "pinned":
                with pytest.raises(TuningError, match="finds no place"):
                    self.fleet.seat(version)
            elif outcome == "unreadable":
                with pytest.raises((AdapterDamaged, OSError)):
                    self.fleet.seat(version)
            else:
                seat = self.fleet.seat(version)
                assert (seat is None) == (outcome == "full")
                self._took(seat, version)
        finally:
            type(self).put_raising(None)

    def _took(self, seat: Seat | None, version: Version) -> None:
        if seat is not None:
            assert (seat.digest, seat.reference) == (version.id, version.reference)
            assert close(computed(seat), self.alone[version.id])
            self.seats.append(seat)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seat = self.seats.pop(data.draw(st.integers(0, len(self.seats) - 1)))
        self.fleet.release(seat)
        self.model.users[seat.digest] -= 1

    @rule(name=asked_for)
    def pin(self, name: str) -> None:
        identity = self.resolve(name).id
        outcome = self.model.seat(identity, identity in self.damaged)
        if outcome == "seated":
            self.model.users[identity] -= 1
        if outcome in ("seated", "full"):
            self.fleet.pin(name)
            self.model.pins[name] = identity
            return
        with pytest.raises((TuningError, AdapterDamaged)):
            self.fleet.pin(name)

    @rule(order=st.permutations(NAMES))
    def pin_all(self, order: list[str]) -> None:
        """More than there are slots; drawn one by one, this many pins are rare."""
        for name in order:
            self.pin(name)

    @precondition(lambda self: self.model.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.pins)))
        self.fleet.unpin(name)
        del self.model.pins[name]

    @rule(name=name_of, number=st.integers(0, 2))
    def publish_again(self, name: str, number: int) -> None:
        self.means[name] = self.versions[name, number]

    @rule(name=name_of)
    def move_alias(self, name: str) -> None:
        self.live[name] = self.means[name]

    @rule(name=name_of)
    def spoil(self, name: str) -> None:
        version = self.means[name]
        if version.id not in self.damaged:
            path = version.path / WEIGHTS
            self.damaged[version.id] = path, damage(path)

    @precondition(lambda self: self.damaged)
    @rule()
    def mend(self) -> None:
        _, (path, content) = self.damaged.popitem()
        path.write_bytes(content)

    @rule(name=asked_for, after=st.integers(1, 4000))
    def interrupt(self, name: str, after: int) -> None:
        """Who was in use still is; what else came of it is taken over as it is."""
        version, before, seat = self.fleet.identify(name), dict(self.model.users), None
        try:
            with Interrupt(after):
                seat = self.fleet.seat(version)
        except KeyboardInterrupt:
            self.seen["interrupted"] = self.seen.get("interrupted", 0) + 1
        except (TuningError, AdapterDamaged):
            pass
        assert version is not None
        self._took(seat, version)
        residents = self.fleet._residents
        if seat is None and version.id in residents and residents[version.id].users > before.get(version.id, 0):
            residents[version.id].users -= 1  # the seat was given, and lost on its way
        for identity, users in before.items():
            if users and identity != version.id:
                assert residents[identity].users == users
        self.model.users = {identity: resident.users for identity, resident in residents.items()}
        self.model.waiting = set(self.fleet._waiting.ids)

    @invariant()
    def agrees(self) -> None:
        counted = self.fleet.statistics()
        assert [reference.partition("@")[2] for reference in counted.resident] == list(self.model.users)
        assert set(self.fleet._waiting.ids) - set(self.model.users) == self.model.waiting - set(self.model.users)
        assert {key: r.users for key, r in self.fleet._residents.items()} == self.model.users
        slots = [resident.seat.slot for resident in self.fleet._residents.values()]
        assert len(set(slots)) == len(slots) <= SLOTS
        if self.seats:
            seat = self.seats[len(self.model.waiting) % len(self.seats)]
            assert close(computed(seat), self.alone[seat.digest])

    def teardown(self) -> None:
        while self.damaged:
            self.mend()
        for seat in self.seats:
            self.fleet.release(seat)
        self.fleet.close()
        assert self.fleet.bank.bytes == 0


def test_seats_agree_with_the_model_whatever_happens(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pending: list[BaseException] = []

    def raising(version: Version) -> Any:
        if pending:
            raise pending[0]
        return read(version)

    def put(error: BaseException | None) -> None:
        pending[:] = [] if error is None else [error]

    monkeypatch.setattr(module, "read", raising)
    Machine.lab, Machine.put_raising, Machine.seen = lab, staticmethod(put), {}  # type: ignore[assignment]
    ranks = (2, 8, 4, 16, 3)
    Machine.versions = {
        (name, number): lab.written(name, 300 + 10 * i + number, r=ranks[(i + number) % 5])
        for i, name in enumerate(NAMES)
        for number in range(3)
    }
    Machine.alone = {version.id: lab.alone(version) for version in Machine.versions.values()}
    checks = settings(
        max_examples=50,  # hypothesis draws constants from whatever modules are loaded, so the counts below vary
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=checks)
    assert {"seated", "full", "pinned", "unreadable", "interrupted"} <= Machine.seen.keys(), Machine.seen
