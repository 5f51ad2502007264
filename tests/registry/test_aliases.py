from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit import durable
from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry import Draft, Registry, aliases, check_root, remove

Ids = list[str]


@pytest.fixture
def published(registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]) -> Ids:
    """Three versions of `tickets`; `latest` points at the third."""
    drafts = [make_draft(created=f"2026-01-{n + 1:02}T00:00:00Z") for n in range(3)]
    return [registry.publish("tickets", make_payload(), draft).id for draft in drafts]


def records(registry: Registry, alias: str) -> list[dict[str, Any]]:
    """The records of an alias, after it was checked that they are numbered and chained without a gap."""
    folder, found, previous = registry.root / "tickets/aliases" / alias, [], None
    for number, path in enumerate(sorted(folder.iterdir()), start=1):
        record = json.loads(path.read_bytes())
        assert (path.name, record["number"]) == (f"{number:08d}", number)
        assert record["previous"] == previous
        previous = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(record)
    return found


def targets(registry: Registry, alias: str) -> list[str | None]:
    found = [record["version"] for record in records(registry, alias)]
    assert found == [move.version for move in registry.history("tickets", alias)]
    return found


def move(registry: Registry, version: str, alias: str) -> None:
    registry.tag(f"tickets@{version}", alias)


# Moving


def test_a_move_is_one_new_record_and_changes_no_old_one(registry: Registry, published: Ids) -> None:
    folder, before = registry.root / "tickets/aliases/prod", {}
    wanted: list[str | None] = []
    for count, version in enumerate([published[n] for n in (0, 1, 0, 2, 0)], start=1):
        move(registry, version, "prod")
        wanted.append(version)
        after = {path.name: (path.read_bytes(), path.stat().st_mode & 0o777) for path in folder.iterdir()}
        assert len(after) == count
        assert after.items() >= before.items()
        assert {mode for _, mode in after.values()} == {0o444}
        assert targets(registry, "prod") == wanted
        assert registry.resolve("tickets@prod").id == version
        before = after


def test_a_move_to_where_the_alias_points_leaves_no_record(registry: Registry, published: Ids) -> None:
    for _ in range(3):
        move(registry, published[2], "latest")
    assert targets(registry, "latest") == published


def test_a_mover_that_comes_second_takes_the_next_number(
    registry: Registry, published: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read that number 1 is free, as two hosts do where a lock does not hold; both are in the history."""
    true_create = durable.create_file
    overtaken: list[str] = []

    def create(path: Path, data: bytes, tmp: Path) -> None:
        if len(overtaken) < 3:
            overtaken.append(published[[1, 2, 1][len(overtaken)]])
            monkeypatch.setattr(durable, "create_file", true_create)
            aliases.move(registry.layout, "tickets", "prod", overtaken[-1])
            monkeypatch.setattr(durable, "create_file", create)
        true_create(path, data, tmp)

    monkeypatch.setattr(durable, "create_file", create)
    with registry.writing("race"):
        done = aliases.move(registry.layout, "tickets", "prod", published[0])
    assert targets(registry, "prod") == [*overtaken, published[0]]
    assert (done.number, done.version) == (4, published[0])
    assert check_root(registry.root) == {}
    assert list((registry.root / "tmp").iterdir()) == []


def test_a_mover_that_was_overtaken_to_the_same_place_is_done(
    registry: Registry, published: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_create = durable.create_file

    def create(path: Path, data: bytes, tmp: Path) -> None:
        monkeypatch.setattr(durable, "create_file", true_create)
        aliases.move(registry.layout, "tickets", "prod", published[1])
        true_create(path, data, tmp)

    monkeypatch.setattr(durable, "create_file", create)
    assert registry.tag(f"tickets@{published[1]}", "prod").id == published[1]
    assert targets(registry, "prod") == [published[1]]


def test_numbers_end(registry: Registry, published: Ids) -> None:
    folder = registry.root / "tickets/aliases/prod"
    move(registry, published[0], "prod")
    (folder / "00000001").rename(folder / "99999999")
    with pytest.raises(RegistryError, match="record number 99999999, after which there is none"):
        move(registry, published[1], "prod")
    assert [path.name for path in folder.iterdir()] == ["99999999"]


# Going back


def test_restore_toggles(registry: Registry, published: Ids) -> None:
    first, second, third = published
    assert [registry.restore("tickets").id for _ in range(3)] == [second, third, second]
    assert targets(registry, "latest") == [first, second, third, second, third, second]
    assert registry.resolve("tickets").id == second


def test_restore_to_a_record(registry: Registry, published: Ids) -> None:
    first, second, third = published
    assert registry.restore("tickets", to=1).id == first
    assert registry.restore("tickets", "latest", to=2).id == second
    assert targets(registry, "latest") == [first, second, third, first, second]
    for number in (0, -1, 9):
        with pytest.raises(
            AdapterNotFound, match=rf"has no record {number} with a version\n.*: 1, 2, 3, 4, 5\n.*peftkit log"
        ):
            registry.restore("tickets", to=number)


def test_restore_needs_an_earlier_place(registry: Registry, published: Ids) -> None:
    move(registry, published[0], "prod")
    with pytest.raises(AdapterNotFound, match="tickets@prod has no earlier place"):
        registry.restore("tickets", "prod")
    with pytest.raises(AdapterNotFound, match="'tickets' has no alias 'never'"):
        registry.restore("tickets", "never")
    with pytest.raises(AdapterNotFound, match="no adapter is called 'sql'"):
        registry.restore("sql")
    assert targets(registry, "prod") == published[:1]
    assert not (registry.root / "tickets/aliases/never").exists()


def test_restore_to_a_removed_version_says_so(registry: Registry, published: Ids) -> None:
    remove(registry, f"tickets@{published[1]}")
    with pytest.raises(AdapterNotFound, match=f"pointed at {published[1]}, which has been removed"):
        registry.restore("tickets")
    assert registry.restore("tickets", to=1).id == published[0]
    assert targets(registry, "latest") == [*published, published[0]]
    assert check_root(registry.root) == {}


# Removing an alias


def test_untag_hides_the_alias_and_keeps_its_history(registry: Registry, published: Ids) -> None:
    first, second, _ = published
    move(registry, first, "prod")
    move(registry, second, "prod")
    registry.untag("tickets", "prod")
    assert set(registry.aliases("tickets")) == {"latest"}
    with pytest.raises(AdapterNotFound, match="'tickets' has no alias 'prod'"):
        registry.resolve("tickets@prod")
    with pytest.raises(AdapterNotFound, match="has no alias 'prod'"):
        registry.untag("tickets", "prod")
    assert targets(registry, "prod") == [first, second, None]
    assert check_root(registry.root) == {}
    assert registry.restore("tickets", "prod").id == second
    move(registry, first, "prod")
    assert targets(registry, "prod") == [first, second, None, second, first]


def test_latest_cannot_be_removed(registry: Registry, published: Ids) -> None:
    with pytest.raises(RegistryError, match=r"tickets@latest cannot be removed\n.*\n.*peftkit restore"):
        registry.untag("tickets", "latest")
    assert targets(registry, "latest") == published


# History


def test_a_clock_that_was_set_back_changes_no_order(
    registry: Registry, published: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = published
    times = ["2030-01-01", "2020-01-01", "2030-01-02", "2020-01-02"]
    moves = [("prod", first), ("prod", second), ("beta", first), ("prod", third)]
    for day, (alias, version) in zip(times, moves, strict=True):
        monkeypatch.setattr(aliases, "timestamp", lambda day=day: f"{day}T00:00:00.000000Z")
        move(registry, version, alias)
    assert targets(registry, "prod") == [first, second, third]
    together = [(each.alias, each.number) for each in registry.history("tickets") if each.alias != "latest"]
    assert together == [("prod", 1), ("prod", 2), ("prod", 3), ("beta", 1)]
    assert check_root(registry.root) == {}


def test_history_of_all_aliases_is_in_order_of_time(registry: Registry, published: Ids) -> None:
    move(registry, published[0], "prod")
    move(registry, published[1], "beta")
    registry.untag("tickets", "prod")
    assert [(each.alias, each.number, each.version) for each in registry.history("tickets")] == [
        *(("latest", number, version) for number, version in enumerate(published, start=1)),
        ("prod", 1, published[0]),
        ("beta", 1, published[1]),
        ("prod", 2, None),
    ]
    assert registry.history("tickets", "never") == registry.history("sql") == []


def test_an_alias_goes_on_across_damage(registry: Registry, published: Ids) -> None:
    """A damaged record costs itself: the alias can be moved on, older and newer records stay, verify names the one."""
    first, second, third = published
    for version in (first, second):
        move(registry, version, "prod")
    path = registry.root / "tickets/aliases/prod/00000002"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterDamaged, match="00000002"):
        registry.resolve("tickets@prod")
    move(registry, third, "prod")
    move(registry, first, "prod")
    assert registry.resolve("tickets@prod").id == first
    with pytest.raises(AdapterDamaged, match="00000002"):
        registry.history("tickets", "prod")
    assert [aliases.read(registry.layout, "tickets", "prod", n).version for n in (1, 3, 4)] == [first, third, first]
    ((where, (sentence,)),) = check_root(registry.root).items()
    assert where == "tickets@prod"
    assert "00000002" in sentence
    path.unlink()
    assert check_root(registry.root) == {"tickets@prod": ["Record 2 is missing."]}
    assert registry.restore("tickets", "prod").id == third, "a missing record does not shift what was before"


# What verify finds


@pytest.fixture
def folder(registry: Registry, published: Ids) -> Path:
    """The folder of the alias `prod` with three records; `beta` has one."""
    for version in published:
        move(registry, version, "prod")
    move(registry, published[0], "beta")
    assert check_root(registry.root) == {}
    return registry.root / "tickets/aliases/prod"


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    for path, data in ((one, other.read_bytes()), (other, kept)):
        path.chmod(0o644)
        path.write_bytes(data)


def rewritten(folder: Path, number: int, **changes: Any) -> None:
    """Someone changed a record and computed its `check` anew: only its place in the chain can tell."""
    path = folder / f"{number:08d}"
    fields = {**json.loads(path.read_bytes()), **changes}
    del fields["check"]
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    fields["check"] = hashlib.sha256(text).hexdigest()
    path.chmod(0o644)
    path.write_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "number 2": lambda folder: swap(folder / "00000001", folder / "00000002"),
    "belongs to tickets@prod, number 1": lambda folder: swap(folder / "00000001", folder.parent / "beta/00000001"),
    "Record 1 is missing": lambda folder: (folder / "00000001").unlink(),
    "Record 2 is missing": lambda folder: (folder / "00000002").unlink(),
    "number 3": lambda folder: shutil.copy(folder / "00000003", folder / "00000004"),
    "is no record": lambda folder: shutil.copy(folder / "00000003", folder / "00000003.bak"),
    "Record 3 does not follow from record 2": lambda folder: rewritten(folder, 2, version="0" * 16),
    "Record 2 does not follow from record 1": lambda folder: rewritten(folder, 2, previous="0" * 64),
    "points at 0000000000000000, which is no version": lambda folder: rewritten(folder, 3, version="0" * 16),
    "its version is 'latest'": lambda folder: rewritten(folder, 3, version="latest"),
    "its fields are not": lambda folder: rewritten(folder, 3, surprise=1),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_verify_finds_each_damage_of_a_chain(registry: Registry, folder: Path, sentence: str) -> None:
    DAMAGE[sentence](folder)
    found = check_root(registry.root)
    assert set(found) <= {"tickets@prod", "tickets@beta"}
    assert sentence in " ".join(text for texts in found.values() for text in texts)
    assert registry.resolve("tickets").id, "the other aliases work"


def test_what_is_no_alias_is_passed_over_and_named(registry: Registry, folder: Path) -> None:
    before = registry.aliases("tickets")
    folder.with_name("Prod").mkdir()
    folder.with_name("dead").mkdir()
    folder.with_name("file").write_text("x")
    folder.with_name("link").symlink_to(folder)
    folder.with_name("empty").mkdir()
    (folder / "notes").write_text("x")
    assert set(check_root(registry.root)) == {f"tickets@{name}" for name in ("Prod", "dead", "file", "link", "prod")}
    assert registry.aliases("tickets") == before
