"""Killed or failing at any point, the registry is in its old state or its new one."""

from __future__ import annotations

import builtins
import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RegistryError
from peftkit.registry import Draft, Registry, Version, check, check_root

CALLS = [
    (os, "replace"),
    (os, "rename"),
    (os, "fsync"),
    (os, "open"),
    (os, "mkdir"),
    (os, "fchmod"),
    (builtins, "open"),
]
FORK = multiprocessing.get_context("fork")


def fail_at(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None], counted: list[str]) -> None:
    """Count every call that can change the disk, and `act` before the one with this number."""

    def guarded(true: Callable[..., object], name: str) -> Callable[..., object]:
        def replaced(*args: object, **options: object) -> object:
            counted.append(name)
            if len(counted) == number:
                act()
            return true(*args, **options)

        return replaced

    for module, name in CALLS:
        patch.setattr(module, name, guarded(getattr(module, name), name))


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes see does not depend on fsync, and a hundred publishes would wait for the disk.

    That everything is synced, and in which order, is what `test_every_file_is_synced_before_it_is_named` is about.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def die_at(number: int, work: Callable[[], object]) -> list[str]:
    """Run `work` in a child that is gone, without any tidying up, before its call with this number."""
    report, end = FORK.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        counted: list[str] = []
        code = 1

        def last_words() -> None:
            end.send(counted)
            os._exit(9)

        try:
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, number, last_words, counted)
                work()
            end.send(counted)
            code = 0
        finally:
            os._exit(code)
    end.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
    return list(report.recv())


def assert_old_or_new(root: Path, old: Version | None, new_id: str | None) -> str | None:
    """Returns what `latest` points at."""
    registry = Registry(root, lock_timeout=10)
    problems = check_root(root)
    if old is None and "tickets" not in registry.names():
        problems.pop("tickets", None)  # a version complete and in place, its alias not yet written: the old state
        assert problems == {}
        assert registry.list() == []
        return None
    assert problems == {}
    latest = registry.resolve("tickets").id
    assert latest in {old.id if old else None, new_id}
    assert set(registry.version_ids("tickets")) - {latest} <= {old.id if old else None, new_id}
    return latest


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("how", ["error", "exit"])
@pytest.mark.parametrize("existing", [False, True])
def test_the_nth_call_fails(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], how: str, existing: bool
) -> None:
    source, draft = make_payload(seed=1), make_draft(created="2026-02-02T00:00:00Z")
    (source / "sub").mkdir()
    (source / "sub/extra.json").write_text("{}")
    new_id = Registry(tmp_path / "pattern").publish("tickets", source, draft).id
    outcomes, failed = set(), 0
    for number in range(1, 200):
        root = tmp_path / str(number)
        old = Registry(root).publish("tickets", make_payload(), make_draft(), ["prod"]) if existing else None
        counted: list[str] = []
        if how == "error":
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, number, no_space, counted)
                with contextlib.suppress(RegistryError):
                    Registry(root).publish("tickets", source, draft, ["prod"])
                    failed -= 1
            failed += 1
            if root.is_dir():
                assert not list((root / "tmp").iterdir() if (root / "tmp").is_dir() else []), "an error tidies up"
        else:
            counted = die_at(number, partial(Registry(root).publish, "tickets", source, draft, ["prod"]))
            failed += len(counted) == number
        latest = assert_old_or_new(root, old, new_id)
        outcomes.add(latest)
        if len(counted) < number:
            break
        again = Registry(root, lock_timeout=10).publish("tickets", source, draft, ["prod"])
        assert again.id == new_id
        assert check_root(root) == {}, "the same publish mends what was cut off"
        assert Registry(root).aliases("tickets") == {"latest": new_id, "prod": new_id}
    assert 30 < failed <= number - 1 == len(counted), "every call of a whole publish was made to fail once"
    assert outcomes == {old.id if old else None, new_id}


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("how", ["error", "exit"])
def test_moving_an_alias_fails_at_the_nth_call(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], how: str
) -> None:
    outcomes = set()
    for number in range(1, 100):
        registry = Registry(tmp_path / str(number), lock_timeout=10)
        first = registry.publish("tickets", make_payload(), make_draft())
        second = registry.publish("tickets", make_payload(seed=1), make_draft())
        counted: list[str] = []
        if how == "error":
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RegistryError):
                fail_at(patch, number, no_space, counted)
                registry.tag(first.reference, "latest")
        else:
            counted = die_at(number, partial(registry.tag, first.reference, "latest"))
        outcomes.add(registry.resolve("tickets").id)
        assert registry.resolve("tickets").id in {first.id, second.id}
        assert check_root(registry.root) == {}
        if len(counted) < number:
            break
        registry.tag(first.reference, "latest")
        assert registry.resolve("tickets") == first
    assert number - 1 == len(counted) > 8
    assert outcomes == {first.id, second.id}


def publish_for_ever(root: Path, source: Path, drafts: Callable[..., Draft], start: int, report: Connection) -> None:
    report.send("ready")
    for n in range(start, start + 10_000):
        draft = drafts(metrics={"other": {"n": n}})
        report.send(Registry(root).publish("tickets", source, draft, ["prod"]).id)


def received(report: Connection) -> list[str]:
    found = []
    with contextlib.suppress(EOFError):
        while report.poll():
            found.append(report.recv())
    return found


def test_sigkill_at_random_points(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    source, root = make_payload(), tmp_path / "registry"
    (source / "big.json").write_text("[" + "1," * 50_000 + "1]")
    dice = random.Random(7)
    begun = time.monotonic()
    Registry(tmp_path / "measured").publish("tickets", source, make_draft(), ["prod"])
    usual = time.monotonic() - begun
    done: set[str] = set()
    cut_off = 0
    for kill in range(40):
        report, end = FORK.Pipe(duplex=False)
        child = FORK.Process(target=publish_for_ever, args=(root, source, make_draft, kill * 10_000, end))
        child.start()
        end.close()
        assert report.recv() == "ready"
        # Aimed by finished publishes and by how long one takes here, so that a slow disk does not move the kills away.
        done.update(report.recv() for _ in range(dice.choice([0, 0, 1])))
        time.sleep(dice.uniform(0.0, 1.2) * usual)
        child.kill()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        done.update(received(report))
        registry = Registry(root, lock_timeout=10)
        problems = check_root(root)
        if root.is_dir() and not registry.names():
            problems.pop("tickets", None)
        assert problems == {}
        assert done <= set(registry.version_ids("tickets")), "a publish that returned was lost"
        if done:
            assert registry.resolve("tickets").id in registry.version_ids("tickets")
            cut_off += len(registry.clear_leftovers())
    assert all(check(version) == [] for version in registry.versions("tickets"))
    assert len(done) >= 5
    assert cut_off > 0, "no kill hit a publish in the middle"


def publish_some(root: Path, source: Path, name: str, first: int, drafts: list[Draft], results: Any) -> None:
    registry = Registry(root, lock_timeout=60)
    results.put([registry.publish(name, source, draft, [f"n{first + at}"]).id for at, draft in enumerate(drafts)])


def test_two_publishers_lose_nothing(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    root, results = tmp_path / "registry", FORK.Queue()
    workers = []
    for worker in range(2):
        drafts = [make_draft(metrics={"other": {"n": n, "worker": worker}}) for n in range(10)]
        arguments = (root, make_payload(seed=worker), "tickets", worker * 10, drafts, results)
        workers.append(FORK.Process(target=publish_some, args=arguments))
    for process in workers:
        process.start()
    found = results.get(timeout=60) + results.get(timeout=60)
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    registry = Registry(root)
    assert len(set(found)) == 20
    assert set(registry.version_ids("tickets")) == set(found)
    aliases = registry.aliases("tickets")
    assert set(aliases) == {"latest", *(f"n{n}" for n in range(20))}
    assert {aliases[f"n{n}"] for n in range(20)} == set(found)
    moves = registry.history("tickets")
    assert len(moves) == 40
    assert moves[-2].version == aliases["latest"]
    assert check_root(root) == {}


def test_every_file_is_synced_before_it_is_named(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the bytes do; so each file and folder must be synced before the rename."""
    order: list[tuple[str, str]] = []
    true: dict[str, Callable[..., None]] = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def fsync(descriptor: int) -> None:
        order.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        true["fsync"](descriptor)

    def moving(name: str) -> Callable[[object, object], None]:
        def move(source: object, target: object) -> None:
            order.append((name, f"{source}>{target}"))
            true[name](source, target)

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving("rename"))
    monkeypatch.setattr(os, "replace", moving("replace"))
    source = make_payload()
    (source / "sub").mkdir()
    (source / "sub/extra.json").write_text("{}")
    version = Registry(tmp_path / "r").publish("tickets", source, make_draft())
    (rename,) = [at for at, (kind, _) in enumerate(order) if kind == "rename"]
    building = Path(order[rename][1].split(">")[0])
    before = {path for kind, path in order[:rename] if kind == "fsync"}
    inside = [building, *(building / path.relative_to(version.path) for path in version.path.rglob("*"))]
    assert len(inside) == 6
    assert {str(path) for path in inside} <= before
    after = order[rename + 1 :]
    assert after[0] == ("fsync", str(version.path.parent))
    (alias,) = [
        at for at, (_, text) in enumerate(after) if text.endswith(">" + str(tmp_path / "r/tickets/aliases/latest"))
    ]
    assert after[alias - 1] == ("fsync", after[alias][1].split(">")[0])
    assert after[alias + 1] == ("fsync", str(tmp_path / "r/tickets/aliases"))
