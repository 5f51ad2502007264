"""Processes that publish, move one alias, collect and read at the same time: no lost update, no torn read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from peftkit import durable
from peftkit.base.record import BaseRecord, TensorDigest
from peftkit.errors import AdapterNotFound
from peftkit.registry import Draft, Registry, aliases, bases, check, check_root, collect

FORK = multiprocessing.get_context("fork")
ROUNDS = 6
RECORDS = [BaseRecord({"n": n}, "a" * 64, {}, None, {"w": TensorDigest("F32", (2,), "b" * 64)}) for n in range(4)]


def based(make_draft: Callable[..., Draft], worker: int, turn: int, record: BaseRecord) -> Draft:
    base = {"source": "x", "record": record.id, "fingerprint": record.fingerprint, "parts": record.parts()}
    return make_draft(metrics={"other": {"worker": worker, "turn": turn}}, base=base)


class Workers:
    """Forked processes that start together; each reports one value, or what it raised."""

    def __init__(self) -> None:
        self.results = FORK.Queue()
        self.go, self.stop = FORK.Event(), FORK.Event()
        self.processes: list[Any] = []

    def add(self, role: str, work: Callable[..., Any], *arguments: Any) -> None:
        def run() -> None:
            os.fsync = lambda descriptor: None  # what other processes see does not depend on it
            self.go.wait(60)
            try:
                self.results.put((role, work(*arguments), None))
            except BaseException as error:
                self.results.put((role, None, repr(error)))

        self.processes.append(FORK.Process(target=run))

    def run(self, writers: int) -> dict[str, list[Any]]:
        """Results by role; the workers that read or collect are stopped when `writers` others are done."""
        for process in self.processes:
            process.start()
        self.go.set()
        found: dict[str, list[Any]] = {}
        failed = []
        try:
            for done in range(1, len(self.processes) + 1):
                role, result, error = self.results.get(timeout=120)
                found.setdefault(role, []).append(result)
                failed += [(role, error)] if error else []
                if done >= writers or failed:
                    self.stop.set()
        finally:
            for process in self.processes:
                process.join(30)
                process.kill()
        assert failed == []
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes)
        return found


def publisher(root: Path, source: Path, drafts: list[tuple[Draft, BaseRecord]], worker: int) -> list[tuple[str, str]]:
    """What was acknowledged: (alias, version id), for the alias of each version's own and for the shared one."""
    registry, done = Registry(root, lock_timeout=60), []
    for turn, (draft, record) in enumerate(drafts):
        version = registry.publish("tickets", source, draft, [f"own-{worker}-{turn}"], base=record)
        done.append((f"own-{worker}-{turn}", version.id))
        registry.tag(version.reference, "shared")
        done.append(("shared", version.id))
    return done


def litterer(root: Path, source: Path, drafts: list[tuple[Draft, BaseRecord]]) -> None:
    """Publishes versions that the next one makes garbage, on bases that nobody else uses."""
    registry = Registry(root, lock_timeout=60)
    for draft, record in drafts:
        registry.publish("scratch", source, draft, base=record)


def collector(root: Path, stop: Event) -> list[str]:
    registry, removed = Registry(root, lock_timeout=60), []
    while True:
        last = stop.is_set()
        removed += collect(registry, versions=True).paths
        if last:
            return removed  # once after all others, so that there was something to collect
        time.sleep(0.02)


def reader(root: Path, stop: Event) -> dict[str, int]:
    """Reads all there is; what it sees is whole, or gone by the time it looks."""
    registry, seen = Registry(root), {"whole": 0, "gone": 0, "absent": 0, "moves": 0}
    longest = 0
    while not (stop.is_set() and seen["whole"] >= 20):
        for reference in ("tickets", "tickets@shared", "scratch", *map("@".join, known(registry))):
            try:
                version = registry.resolve(reference)
            except AdapterNotFound:
                seen["absent"] += 1
                continue
            problems = check(version, read_data=True)
            if problems and not version.path.exists():
                seen["gone"] += 1
                continue
            assert problems == []
            assert bases.record_of(version) is not None or not version.path.exists()
            seen["whole"] += 1
        history = registry.history("tickets", "shared")
        assert [move.number for move in history] == list(range(1, len(history) + 1))
        assert len(history) >= longest, "a move was lost"
        longest = seen["moves"] = len(history)
        with contextlib.suppress(AdapterNotFound):
            registry.list()
        problems_now = check_root(root)
        for name in ("tickets", "scratch"):  # true while the first publish is between its version and `latest`
            problems_now.pop(name, None)
        assert problems_now == {}
    return seen


def known(registry: Registry) -> list[tuple[str, str]]:
    """A few versions of each adapter by id, which nothing holds while they are read."""
    return [(name, version) for name in registry.names() for version in registry.version_ids(name)[:3]]


def records_of(registry: Registry, alias: str) -> list[str]:
    """Where the records of an alias pointed, after it was checked that they are numbered and chained."""
    found, previous = [], None
    for number, path in enumerate(sorted((registry.root / "tickets/aliases" / alias).iterdir()), start=1):
        record = json.loads(path.read_bytes())
        assert (path.name, record["previous"]) == (f"{number:08d}", previous)
        previous = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(record["version"])
    return found


def test_eight_processes_at_once(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    root, workers = tmp_path / "registry", Workers()
    for worker in range(4):
        drafts = [(based(make_draft, worker, turn, RECORDS[worker % 2]), RECORDS[worker % 2]) for turn in range(ROUNDS)]
        workers.add("publisher", publisher, root, make_payload(seed=worker), drafts, worker)
    litter = [(based(make_draft, 9, turn, RECORDS[2 + turn % 2]), RECORDS[2 + turn % 2]) for turn in range(ROUNDS)]
    workers.add("litterer", litterer, root, make_payload(seed=9), litter)
    workers.add("collector", collector, root, workers.stop)
    workers.add("reader", reader, root, workers.stop)
    workers.add("reader", reader, root, workers.stop)
    assert len(workers.processes) == 8
    found = workers.run(writers=5)

    registry = Registry(root)
    acknowledged = [move for done in found["publisher"] for move in done]
    assert len(acknowledged) == 2 * 4 * ROUNDS
    published = {version for _, version in acknowledged}
    assert len(published) == 4 * ROUNDS
    assert set(registry.version_ids("tickets")) == published, "every acknowledged publish, and nothing else"
    for alias in {alias for alias, _ in acknowledged} | {"latest"}:
        moves = [version for each, version in acknowledged if each == alias] if alias != "latest" else list(published)
        assert sorted(records_of(registry, alias)) == sorted(moves), "every acknowledged move exactly once"
    assert registry.aliases("tickets")["shared"] == records_of(registry, "shared")[-1]
    assert check_root(root) == {}
    assert {record.id for v in registry.versions("tickets") if (record := bases.record_of(v))} == {
        record.id for record in RECORDS[:2]
    }
    (removed,) = found["collector"]
    assert not any(version in path for version in published for path in removed)
    assert sum(path.startswith("scratch/versions/") for path in removed) == ROUNDS - 1
    assert any(path.startswith("bases/") for path in removed)
    for seen in found["reader"]:
        assert seen["whole"] >= 20, seen
    assert list((root / "tmp").iterdir()) == []


@contextmanager
def unlocked(registry: Registry) -> Iterator[None]:
    durable.make_folder(registry.layout.tmp)
    yield


def test_without_a_lock_no_move_is_lost(
    tmp_path: Path,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a network file system whose lock does not hold; only removal relies on the lock."""
    root, workers = tmp_path / "registry", Workers()
    with Registry(root).writing("create"):
        pass
    monkeypatch.setattr(Registry, "writing", lambda self, purpose: unlocked(self))
    same = (based(make_draft, 0, 0, RECORDS[2]), RECORDS[2])
    for worker in range(4):
        drafts = [(based(make_draft, worker, turn, RECORDS[0]), RECORDS[0]) for turn in range(1, 2 * ROUNDS)]
        workers.add("publisher", publisher, root, make_payload(), [same, *drafts], worker)
    found = workers.run(writers=4)

    registry = Registry(root)
    acknowledged = [move for done in found["publisher"] for move in done]
    assert len(acknowledged) == 2 * 4 * 2 * ROUNDS
    (shared_content,) = {version for alias, version in acknowledged if alias.endswith("-0")}
    published = {version for _, version in acknowledged}
    assert len(published) == 4 * (2 * ROUNDS - 1) + 1, "the same content four times is one version"
    assert set(registry.version_ids("tickets")) == published
    shared = records_of(registry, "shared")
    assert sorted(v for v in shared if v != shared_content) == sorted(published - {shared_content})
    assert shared_content in shared
    assert len(records_of(registry, "latest")) >= len(published)
    assert check_root(root) == {}
    assert list((root / "tmp").iterdir()) == []


def movers(root: Path, ids: list[str]) -> list[tuple[int, str | None]]:
    moves = [aliases.move(Registry(root).layout, "tickets", "prod", version) for version in ids]
    return [(move.number, move.version) for move in moves]


def test_racing_movers_each_get_their_own_number(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    """Nothing but the exclusive creation between eight movers: every number is given out once."""
    payload = make_payload()
    ids = [registry.publish("tickets", payload, make_draft(metrics={"other": {"n": n}})).id for n in range(16)]
    workers = Workers()
    for worker in range(8):
        workers.add("mover", movers, registry.root, ids[2 * worker : 2 * worker + 2] * 5)
    given = [move for moves in workers.run(writers=8)["mover"] for move in moves]
    assert len(given) == 80
    assert sorted(number for number, _ in given) == list(range(1, 81))
    assert [version for _, version in sorted(given)] == records_of(registry, "prod")
    assert check_root(registry.root) == {}
