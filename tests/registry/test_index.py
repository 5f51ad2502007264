"""Summaries equal what a naive reader finds, whatever happened to the registry or to the cache beside it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RegistryError
from peftkit.registry import Draft, Registry, cache, collect, index, remove, remove_adapter
from peftkit.registry.index import Summary, contents, summaries

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what was written a moment ago too."""
    monkeypatch.setattr(index, "_SETTLED", -(10**12))


@pytest.fixture
def filled(registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]) -> Registry:
    """Three names, six versions: parents, several kinds of metrics, aliases that moved and one that was removed."""
    first = registry.publish("tickets", make_payload(), make_draft(), ["prod"])
    parents = [{"name": "tickets", "version": first.id, "relation": "continued"}]
    metrics = {
        "before": {"score": {"mean": 0.25, "n": 8}},
        "after": {"score": {"mean": 0.5, "n": 8, "metric": "exact"}, "ok": True, "list": [1]},
        "other": {"answer_nll_change": {"point": -0.5, "low": -0.75, "high": None}},
    }
    registry.publish("tickets", make_payload(seed=1), make_draft(parents=parents, metrics=metrics), ["old"])
    registry.publish("tickets", make_payload(seed=2), make_draft(created="2027-01-01T00:00:00Z"))
    registry.untag("tickets", "old")
    many = {"other": {f"group {n}": {"mean": n} for n in range(500)} | {"größe": 1, "nll": 2}}
    registry.publish("sql", make_payload("tensors"), make_draft("tensors", recipe=None, data=[], metrics=many))
    registry.publish("a", make_payload(seed=3), make_draft(adapter={"method": 3}, run="run-1"))
    registry.publish("a", make_payload(seed=4), make_draft(metrics={"after": {"score": 0.5}}))
    return registry


def naive(registry: Registry) -> dict[str, dict[str, Any]]:
    """What a reader without a cache finds, written independently: every manifest is read as plain JSON."""
    found = {}
    for name in registry.names():
        for version_id in registry.version_ids(name):
            text = (registry.root / name / "versions" / version_id / "manifest.json").read_text()
            raw = json.loads(text)
            found[f"{name}@{version_id}"] = {
                "created": raw["created"],
                "kind": raw["kind"],
                "base": raw["base"]["source"],
                "record": raw["base"]["record"],
                "fingerprint": raw["base"]["fingerprint"],
                "recipe": raw["recipe"] and raw["recipe"]["name"],
                "run": raw["run"],
                "parents": [(p["name"], p["version"], p["relation"]) for p in raw["parents"]],
                "data": [(d["role"], d["source"], d["sha256"], d["rows"]) for d in raw["data"]],
                "bytes": sum(file["bytes"] for file in raw["files"].values()),
                "aliases": sorted(a for a, target in registry.aliases(name).items() if target == version_id),
                "problem": None,
            }
    return found


def shown(found: list[Summary]) -> dict[str, dict[str, Any]]:
    return {
        each.reference: {
            "created": each.created,
            "kind": each.kind,
            "base": each.base,
            "record": each.record,
            "fingerprint": each.fingerprint,
            "recipe": each.recipe,
            "run": each.run,
            "parents": [(p.name, p.version, p.relation) for p in each.parents],
            "data": [(d.role, d.source, d.sha256, d.rows) for d in each.data],
            "bytes": each.bytes,
            "aliases": list(each.aliases),
            "problem": each.problem,
        }
        for each in found
    }


def right(registry: Registry) -> bool:
    return shown(summaries(registry)) == naive(registry)


def manifests_read(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many manifests one look at the registry opens."""
    read: list[str] = []
    load = Registry.load
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "load", lambda self, name, each: (read.append(each), load(self, name, each))[1])
        contents(registry)
    return len(read)


@pytest.mark.usefixtures("settled")
def test_summaries_are_what_a_naive_reader_finds(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = summaries(filled)
    assert len(cold) == len(naive(filled)) == 6
    assert shown(cold) == naive(filled)
    assert summaries(filled) == cold == list(contents(filled).versions)
    assert [each.name for each in cold] == ["a", "a", "sql", *["tickets"] * 3]
    assert cold[3].created == "2027-01-01T00:00:00.000000Z"
    assert contents(filled).problems == {}
    assert manifests_read(filled, monkeypatch) == 0
    filled.layout.index.unlink()
    assert manifests_read(filled, monkeypatch) == 6
    assert summaries(filled) == cold


def test_figures_are_the_numbers_nearest_the_top(filled: Registry) -> None:
    by_name = {(each.name, each.metric, len(each.figures)): each for each in summaries(filled)}
    measured = by_name["tickets", "exact", 6]
    assert measured.figures == {
        "after.score.mean": 0.5, "after.score.n": 8.0, "before.score.mean": 0.25, "before.score.n": 8.0,
        "other.answer_nll_change.point": -0.5, "other.answer_nll_change.low": -0.75,
    }  # fmt: skip
    bounded = by_name["sql", None, index.MOST_FIGURES]
    assert bounded.figures["other.nll"] == 2
    assert bounded.figures["other.group 7.mean"] == 7
    assert {each.method for each in summaries(filled)} == {"lora", None}


def test_looking_writes_nothing_where_there_is_nothing(registry: Registry) -> None:
    assert summaries(registry) == []
    assert not registry.root.exists()
    registry.root.mkdir()
    assert summaries(registry) == []
    assert list(registry.root.iterdir()) == []
    (registry.root / "registry.json").write_text('{"format":"peftkit/9"}')
    with pytest.raises(RegistryError, match="peftkit/9"):
        summaries(registry)


def test_what_changed_a_moment_ago_is_not_kept(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manifests_read(filled, monkeypatch) == manifests_read(filled, monkeypatch) == 6
    assert right(filled)


@pytest.mark.usefixtures("settled")
def test_what_another_process_does_is_seen_at_once(
    filled: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    first, second = sorted(filled.version_ids("a"))
    steps: list[Callable[[], object]] = [
        lambda: filled.publish("tickets", make_payload(seed=7), make_draft()),
        lambda: filled.publish("new", make_payload(seed=8), make_draft()),
        lambda: filled.tag(f"a@{first}", "prod"),
        lambda: filled.tag(f"a@{second}", "prod"),
        lambda: filled.restore("a", "prod"),
        lambda: filled.tag(f"a@{first}", "latest"),
        lambda: remove(filled, f"a@{second}"),
        lambda: remove_adapter(filled, "new"),
        lambda: filled.publish("new", make_payload(seed=8), make_draft()),
        lambda: collect(filled, versions=True),
    ]
    seen = [summaries(filled)]
    for step in steps:
        process = FORK.Process(target=step)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert right(filled)
        seen.append(summaries(filled))
    assert all(before != after for before, after in itertools.pairwise(seen))
    with sqlite3.connect(filled.layout.index) as connection:
        (kept,) = connection.execute("SELECT count(*) FROM summaries_1").fetchone()
    connection.close()
    assert kept <= len(seen[-1])  # rows of removed versions are gone


@pytest.mark.usefixtures("settled")
def test_a_manifest_changed_within_the_second_is_seen(filled: Registry) -> None:
    assert right(filled)
    path = filled.resolve("tickets").path / "manifest.json"
    before, text = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(text.replace(b'"rows": 10', b'"rows": 11'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    found = contents(filled)
    (damaged,) = [each for each in found.versions if each.problem]
    assert damaged.reference in found.problems
    assert "was changed" in str(damaged.problem)
    assert len(found.versions) == 6
    path.write_bytes(text)
    assert right(filled)


def test_damage_is_listed_and_stops_nothing(filled: Registry) -> None:
    folders = [filled.root / "tickets/versions" / each for each in filled.version_ids("tickets")]
    (folders[0] / "manifest.json").unlink()
    (folders[1] / "manifest.json").unlink()
    os.mkfifo(folders[1] / "manifest.json")
    (folders[2] / "manifest.json").unlink()
    (folders[2] / "manifest.json").symlink_to(filled.resolve("sql").path / "manifest.json")
    record = filled.layout.record("a", "latest", 2)
    record.chmod(0o644)
    record.write_text("{}")
    shutil.rmtree(filled.resolve("sql").path)
    found = contents(filled)
    assert [each.problem is not None for each in found.versions] == [False, False, True, True, True]
    lost = {f"tickets@{folder.name}" for folder in folders}
    assert set(found.problems) == {"a@latest", "sql@latest", *lost}
    assert "not a plain file" in found.problems[f"tickets@{folders[1].name}"]
    assert all(each.aliases == () for each in found.versions if each.name == "a")


def damaged_indexes(good: bytes) -> Iterator[bytes]:
    chance = random.Random(5)
    for size in (0, 1, 16, 99, 100, 1000, 4095, 4096, 4097, len(good) - 4096, len(good) - 1):
        yield good[:size]
    for _ in range(150):
        changed = bytearray(good)
        for _ in range(chance.choice((1, 1, 4, 64))):
            changed[chance.randrange(len(good))] = chance.randrange(256)
        yield bytes(changed)
    for offset in (18, 19):  # the file asks for a write-ahead log
        changed = bytearray(good)
        changed[offset] = 2
        yield bytes(changed)
    for _ in range(20):  # torn: a page stands in the place of another, as after a crash without a journal
        one, other = chance.randrange(len(good) // 4096), chance.randrange(len(good) // 4096)
        yield good[: one * 4096] + good[other * 4096 : (other + 1) * 4096] + good[(one + 1) * 4096 :]


@pytest.mark.usefixtures("settled")
def test_a_damaged_index_changes_nothing(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(filled)
    path = filled.layout.index
    good = path.read_bytes()
    count = 0
    for data in damaged_indexes(good):
        path.write_bytes(data)
        assert contents(filled) == expected
        if count % 20 == 0:
            assert contents(filled) == expected
            assert manifests_read(filled, monkeypatch) == 0, "the cache was not made whole"
        count += 1
    assert count > 180


@pytest.mark.usefixtures("settled")
def test_what_is_no_index_is_replaced_and_never_followed(
    filled: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(filled)
    path, elsewhere = filled.layout.index, tmp_path / "elsewhere"
    shutil.copy(path, elsewhere)
    kept = elsewhere.read_bytes()

    path.unlink()
    path.symlink_to(elsewhere)
    assert contents(filled) == expected
    assert not path.is_symlink()
    assert elsewhere.read_bytes() == kept

    path.unlink()
    os.mkfifo(path)
    assert contents(filled) == expected
    assert path.is_file()

    for beside in ("-journal", "-wal", "-shm"):
        Path(f"{path}{beside}").symlink_to(elsewhere)
        assert contents(filled) == expected
        assert not os.path.lexists(f"{path}{beside}")
    assert elsewhere.read_bytes() == kept

    for foreign in (
        ["CREATE TABLE other (x)"],
        ["CREATE TABLE summaries_1 (x)"],
        ["CREATE VIEW summaries_1 AS SELECT 1 AS name"],
        [cache._TABLE, "CREATE TRIGGER t BEFORE INSERT ON summaries_1 BEGIN SELECT abs(-9223372036854775808); END"],
    ):
        path.unlink()
        with sqlite3.connect(path) as connection:
            for statement in foreign:
                connection.execute(statement)
        connection.close()
        assert contents(filled) == expected
        assert manifests_read(filled, monkeypatch) == 0

    path.unlink()
    path.mkdir()
    assert contents(filled) == contents(filled) == expected
    assert list(path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("text = ?", "{}"),
        ("text = ?", "[" * 5000),
        ("text = ?", 5),
        ("text = CAST(? AS TEXT)", b"\xff\xfe"),
        ("text = zeroblob(?)", 10_000_000),
        ("text = replace(text, '\"problem\":null', ?)", '"problem":"gone"'),
        ("text = replace(text, '\"aliases\":[]', ?)", '"aliases":["prod"]'),
        ("text = replace(text, '\"bytes\":', ?)", '"bytes":1e400,"x":'),
        ('text = replace(text, \'"name":"tickets"\', ?)', '"name":"sql"'),
        ("stamp = ?", ""),
        ("stamp = ?", None),
        ("name = ?", "nobody"),
    ],
)
@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.usefixtures("settled")
def test_rows_that_peftkit_has_not_written_are_passed_over(
    filled: Registry, monkeypatch: pytest.MonkeyPatch, change: str, value: object, forged: bool
) -> None:
    expected = contents(filled)
    connection = sqlite3.connect(filled.layout.index, isolation_level=None)
    connection.text_factory = bytes
    assert connection.execute(f"UPDATE summaries_1 SET {change}", (value,)).rowcount == 6
    if forged:  # by somebody who can compute the check
        rows = connection.execute("SELECT rowid, name, id, stamp, text FROM summaries_1").fetchall()
        for number, *fields in rows:
            if all(isinstance(field, bytes) and field.isascii() for field in fields):
                check = cache._check(*(field.decode() for field in fields))
                connection.execute('UPDATE summaries_1 SET "check" = ? WHERE rowid = ?', (check, number))
    connection.close()
    assert contents(filled) == expected
    assert contents(filled) == expected
    assert manifests_read(filled, monkeypatch) == 0


def super_journal(victim: Path) -> bytes:
    """A rollback journal of no pages that names `victim` as its super-journal, which SQLite deletes when it is done."""
    name = os.fsencode(victim)
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", 0, 1, 1, 512, 4096)
    page = struct.pack(">I", 0x40000000 // 4096 + 1)
    end = struct.pack(">2I", len(name), sum(name) & 0xFFFFFFFF) + bytes.fromhex("d9d505f920a163d7")
    return header.ljust(512, b"\0") + page + name + end


@pytest.mark.usefixtures("settled")
def test_a_planted_journal_deletes_nothing(filled: Registry, tmp_path: Path) -> None:
    expected = contents(filled)
    victim = tmp_path / "victim.txt"
    victim.write_text("important")
    Path(f"{filled.layout.index}-journal").write_bytes(super_journal(victim))
    assert contents(filled) == expected
    assert victim.exists()


def look_often(root: Path, until: Any) -> None:
    registry = Registry(root)
    looked = 0
    while not until.is_set() or looked < 3:
        found = contents(registry)
        assert found.problems == {}
        assert len({each.reference for each in found.versions}) == len(found.versions) >= 6
        looked += 1


@pytest.mark.usefixtures("settled")
def test_processes_at_once_see_the_truth(
    filled: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    done = FORK.Event()
    readers = [FORK.Process(target=look_often, args=(filled.root, done)) for _ in range(3)]
    for reader in readers:
        reader.start()
    before = filled.publish("busy", make_payload(), make_draft())
    for n in range(1, 25):
        version = filled.publish("busy", make_payload(seed=n), make_draft(), [f"alias-{n % 2}"])
        if n > 1:
            filled.tag(version.reference, f"alias-{1 - n % 2}")
        remove(filled, before.reference)
        assert {each.reference for each in summaries(filled) if each.name == "busy"} == {version.reference}
        if n % 5 == 0:
            filled.layout.index.unlink(missing_ok=True)
        before = version
    done.set()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert right(filled)


@pytest.mark.usefixtures("settled")
def test_a_locked_index_is_done_without(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.01)
    expected = contents(filled)
    before = filled.layout.index.stat().st_ino
    holder = sqlite3.connect(filled.layout.index, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert contents(filled) == expected
    holder.execute("ROLLBACK")
    holder.close()
    assert filled.layout.index.stat().st_ino == before
    assert manifests_read(filled, monkeypatch) == 0


def look_as(user: int, root: Path, expected: Any) -> None:
    os.setgid(user)
    os.setuid(user)
    assert contents(Registry(root)) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not write")
@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("cached", [False, True])
def test_a_reader_who_may_not_write_is_answered(filled: Registry, cached: bool) -> None:
    expected = contents(filled)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "registry"
        shutil.copytree(filled.root, root)
        os.chmod(scratch, 0o755)
        root.joinpath("index.sqlite").unlink()
        if cached:
            contents(Registry(root))
        process = FORK.Process(target=look_as, args=(65534, root, expected))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert root.joinpath("index.sqlite").exists() == cached
