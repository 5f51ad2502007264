from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.base.record import BaseRecord, TensorDigest
from peftkit.base.relations import Relation
from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry import Draft, Registry, Version, bases, check, check_root, collect, remove, remove_adapter

RECORDS = [BaseRecord({"n": n}, "a" * 64, {}, None, {"w": TensorDigest("F32", (n + 1,), "b" * 64)}) for n in range(3)]
Publish = Callable[..., Version]


@pytest.fixture
def publish(registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]) -> Publish:
    """Publish another version each time, made from `parents`, on a base of `RECORDS` if one is given."""
    payload, count = make_payload(), iter(range(10_000))

    def call(
        name: str = "tickets", *aliases: str, parents: tuple[Version, ...] = (), base: int | None = None
    ) -> Version:
        number = next(count)
        fields: dict[str, Any] = {
            "created": f"2026-01-31T09:{number // 60 % 60:02}:{number % 60:02}Z",
            "metrics": {"other": {"n": number}},
            "parents": [{"name": p.name, "version": p.id, "relation": "continued"} for p in parents],
        }
        record = RECORDS[base] if base is not None else None
        if record is not None:
            fields["base"] = {
                "source": "x", "record": record.id, "fingerprint": record.fingerprint, "parts": record.parts(),
            }  # fmt: skip
        return registry.publish(name, payload, make_draft(**fields), aliases, base=record)

    return call


def everything(registry: Registry) -> dict[str, bytes | None]:
    found = {str(path.relative_to(registry.root)): path for path in registry.root.rglob("*")}
    return {where: path.read_bytes() if path.is_file() else None for where, path in found.items() if where != ".lock"}


def removed_paths(before: dict[str, bytes | None], registry: Registry) -> set[str]:
    after = everything(registry)
    assert after.items() <= before.items(), "nothing is new and nothing has changed"
    gone = set(before) - set(after)
    return {where for where in gone if os.path.dirname(where) not in gone}


# rm of one version


def test_a_version_stays_while_an_alias_points_at_it(registry: Registry, publish: Publish) -> None:
    first, second = publish("tickets", "prod", "beta"), publish()
    before = everything(registry)
    for alias in ("prod", "beta"):
        with pytest.raises(RegistryError, match=rf"needed by .*tickets@{alias}(.|\n)*peftkit tag --remove tickets"):
            remove(registry, first.reference)
        assert everything(registry) == before
        registry.untag("tickets", alias)
        before = everything(registry)
    assert remove(registry, first.reference) == first.reference
    assert removed_paths(before, registry) == {f"tickets/versions/{first.id}"}
    assert registry.versions("tickets") == [second]
    assert check_root(registry.root) == {}
    with pytest.raises(AdapterNotFound):
        remove(registry, first.reference)


def test_latest_holds_a_version_too(registry: Registry, publish: Publish) -> None:
    only = publish()
    with pytest.raises(RegistryError, match="only version: peftkit rm tickets --all"):
        remove(registry, "tickets")
    second = publish()
    with pytest.raises(RegistryError, match=rf"{second.reference} is needed by tickets@latest(.|\n)*peftkit restore"):
        remove(registry, "tickets")
    registry.restore("tickets")
    assert remove(registry, second.reference) == second.reference
    assert registry.resolve("tickets") == only
    assert [move.version for move in registry.history("tickets")] == [only.id, second.id, only.id]


def test_a_version_stays_while_another_was_made_from_it(registry: Registry, publish: Publish) -> None:
    parent = publish()
    child, other = publish("tickets", parents=(parent,)), publish("both", parents=(parent,))
    with pytest.raises(RegistryError, match=rf"{parent.reference} is needed by {other.reference}, {child.reference}"):
        remove(registry, parent.reference)
    remove_adapter(registry, "both")
    with pytest.raises(RegistryError, match=rf"is needed by {child.reference}, made from it"):
        remove(registry, parent.reference)
    publish()
    remove(registry, child.reference)
    assert remove(registry, parent.reference) == parent.reference
    assert check_root(registry.root) == {}


@pytest.mark.parametrize("reference", ["sql", "tickets@prod", "tickets@0000"])
def test_a_wrong_reference_removes_nothing(registry: Registry, publish: Publish, reference: str) -> None:
    publish()
    before = everything(registry)
    with pytest.raises(AdapterNotFound):
        remove(registry, reference)
    assert everything(registry) == before
    assert len(registry.versions("tickets")) == 1


def test_a_removed_version_can_be_published_again(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], publish: Publish
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft())
    publish()
    remove(registry, version.reference)
    assert registry.publish("tickets", make_payload(), make_draft()) == version
    assert check_root(registry.root) == {}


# rm --all


def test_an_adapter_goes_as_a_whole(registry: Registry, publish: Publish) -> None:
    first = publish("tickets", "prod")
    second = publish("tickets", parents=(first,))
    child = publish("both", parents=(second,))
    with pytest.raises(
        RegistryError, match=r"tickets is needed by tickets@prod(.|\n)*peftkit tag --remove tickets prod"
    ):
        remove_adapter(registry, "tickets")
    registry.untag("tickets", "prod")
    with pytest.raises(RegistryError, match=rf"is needed by {child.reference}, made from it"):
        remove_adapter(registry, "tickets")
    remove_adapter(registry, "both")
    before = everything(registry)
    assert sorted(remove_adapter(registry, "tickets")) == sorted([first.id, second.id])
    assert removed_paths(before, registry) == {"tickets"}
    assert registry.names() == []
    for call in (registry.resolve, registry.versions, lambda name: remove_adapter(registry, name)):
        with pytest.raises(AdapterNotFound):
            call("tickets")
    assert registry.history("tickets") == []
    new = publish("tickets")
    assert [(move.number, move.version) for move in registry.history("tickets")] == [(1, new.id)]


# gc


def test_leftovers_go_and_nothing_else(registry: Registry, publish: Publish) -> None:
    version = publish(base=0)
    (registry.root / "tmp/half/versions").mkdir(parents=True)
    (registry.root / "tmp/half/versions/x").write_bytes(bytes(100))
    (registry.root / "tmp/latest-1").write_bytes(bytes(23))
    (registry.root / "tmp/link").symlink_to(version.path)
    assert registry.list() == [version]
    assert check_root(registry.root) == {}
    before = everything(registry)
    planned = collect(registry, dry_run=True)
    assert everything(registry) == before
    assert planned.paths == ("tmp/half", "tmp/latest-1", "tmp/link")
    assert collect(registry) == planned
    assert removed_paths(before, registry) == set(planned.paths)
    assert planned.bytes >= 123
    assert check(version) == []
    assert collect(registry).paths == ()


def test_base_records_go_with_the_last_that_names_them_and_relations_stay(registry: Registry, publish: Publish) -> None:
    first, second = publish(base=0), publish(base=1)
    publish("sql", base=1)
    assert collect(registry).paths == ()
    remove(registry, first.reference)
    assert set(collect(registry).paths) == {f"bases/{RECORDS[0].id}.json"}
    with registry.writing("keep"):
        relation = Relation(RECORDS[2].sha256, RECORDS[1].sha256, "cast", {"w": 0.5})
        bases.keep_relation(registry.layout, relation)
        bases.keep(registry.layout, RECORDS[2])
    remove_adapter(registry, "tickets")
    remove_adapter(registry, "sql")
    assert collect(registry, versions=True).paths == (), "a measured relation and both of its ends were asked for"
    assert bases.relations(registry.layout) == [relation]
    assert second.manifest.base.record == RECORDS[1].id
    assert check_root(registry.root) == {}


def test_versions_that_nothing_reaches_go_when_asked(registry: Registry, publish: Publish) -> None:
    root = publish(base=0)
    middle = publish("tickets", "prod", parents=(root,))
    loose = publish("tickets", parents=(root,), base=1)
    looser = publish("tickets", parents=(loose,))
    last = publish("tickets")
    assert collect(registry).paths == ()
    before = everything(registry)
    planned = collect(registry, versions=True, dry_run=True)
    assert everything(registry) == before
    assert planned.paths == (
        f"tickets/versions/{looser.id}",
        f"tickets/versions/{loose.id}",
        f"bases/{RECORDS[1].id}.json",
    )
    assert collect(registry, versions=True) == planned
    assert removed_paths(before, registry) == set(planned.paths)
    assert registry.versions("tickets") == [last, middle, root]
    registry.untag("tickets", "prod")
    assert {path.rsplit("/")[-1] for path in collect(registry, versions=True).paths} == {
        root.id, middle.id, f"{RECORDS[0].id}.json",
    }  # fmt: skip
    assert registry.versions("tickets") == [last]
    assert check_root(registry.root) == {}


def test_a_lost_latest_costs_no_version_that_another_alias_reaches(registry: Registry, publish: Publish) -> None:
    version, _ = publish("tickets", "prod"), publish()
    for path in (registry.root / "tickets/aliases/latest").iterdir():
        path.unlink()
    assert registry.names() == []
    collect(registry, versions=True)
    assert registry.version_ids("tickets") == [version.id]
    assert check(registry.resolve("tickets@prod")) == []


@pytest.mark.parametrize("what", ["manifest", "alias", "relation", "format"])
def test_where_something_cannot_be_read_nothing_is_removed(registry: Registry, publish: Publish, what: str) -> None:
    """What a damaged file would have named is not known, so what it needs is not known either."""
    version = publish("tickets", base=0)
    publish()
    with registry.writing("keep"):
        relation = bases.keep_relation(registry.layout, Relation("0" * 64, "1" * 64, "cast", {"w": 0.5}))
    (registry.root / "tmp/left").write_text("x")
    path = {
        "manifest": version.path / "manifest.json",
        "alias": registry.root / "tickets/aliases/latest/00000002",
        "relation": registry.root / f"relations/{relation}.json",
        "format": registry.root / "registry.json",
    }[what]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-3] + b"#\n")
    before = everything(registry)
    for options in ({"versions": True}, {"versions": True, "dry_run": True}):
        with pytest.raises(RegistryError if what == "format" else AdapterDamaged, match=path.name):
            collect(registry, **options)
        assert everything(registry) == before


def test_folders_that_are_no_adapters_are_left_alone(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    version = publish()
    (registry.root / "My Notes/versions").mkdir(parents=True)
    (registry.root / "docs").mkdir()
    (registry.root / "README.md").write_text("x")
    (tmp_path / "elsewhere/versions" / ("0" * 16)).mkdir(parents=True)
    (registry.root / "linked").symlink_to(tmp_path / "elsewhere")
    before = everything(registry)
    assert collect(registry, versions=True).paths == ()
    assert everything(registry) == before
    assert registry.list() == [version]


def test_an_empty_place_is_left_empty(registry: Registry) -> None:
    assert collect(registry, versions=True).paths == ()
    assert not registry.root.exists()


# Any history


@dataclasses.dataclass
class Model:
    """What a registry must hold, kept in plain dictionaries."""

    parents: dict[tuple[str, str], list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    record: dict[tuple[str, str], int | None] = dataclasses.field(default_factory=dict)
    alias: dict[tuple[str, str], tuple[str, str]] = dataclasses.field(default_factory=dict)

    def reached(self) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        waiting = list(self.alias.values())
        while waiting:
            version = waiting.pop()
            if version not in found:
                found.add(version)
                waiting += self.parents[version]
        return found

    def forget(self, gone: set[tuple[str, str]]) -> None:
        for version in gone:
            del self.parents[version], self.record[version]


def agree(registry: Registry, model: Model) -> None:
    held = {(name, version) for name in ("a", "b", "c") for version in registry.version_ids(name)}
    assert held == set(model.parents)
    aliases = {(n, alias): (n, target) for n in registry.names() for alias, target in registry.aliases(n).items()}
    assert aliases == model.alias
    assert check_root(registry.root) == {}
    for name, version in held:
        record = bases.record_of(registry.load(name, version))
        wanted = model.record[name, version]
        assert record == (RECORDS[wanted] if wanted is not None else None)


def test_after_any_history_nothing_needed_is_gone(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is visible does not depend on it
    counts = dict.fromkeys(STEPS, 0)
    for seed in range(8):
        walk(registry, publish, random.Random(seed), counts)
        shutil.rmtree(registry.root)
    assert min(counts.values()) >= 5, counts
    assert sum(counts.values()) >= 250, counts


STEPS = ("publish", "tag", "untag", "rm", "rm refused", "rm all", "rm all refused", "gc")


def walk(registry: Registry, publish: Publish, dice: random.Random, counts: dict[str, int]) -> None:
    model = Model()
    for step in range(40):
        known = sorted(model.parents)
        aliases = sorted(model.alias)
        match dice.choice(["publish"] * 5 + ["tag", "tag", "untag", "untag", "rm", "rm", "rm", "rm all", "gc"]):
            case "publish":
                name, base = dice.choice("abc"), dice.choice([None, 0, 1, 2])
                chosen = dice.sample(known, min(len(known), dice.choice([0, 0, 1, 1, 2])))
                version = publish(name, parents=tuple(registry.load(*each) for each in chosen), base=base)
                key = (name, version.id)
                model.parents[key], model.record[key], model.alias[name, "latest"] = chosen, base, key
                counts["publish"] += 1
            case "tag" if known:
                name, target = dice.choice(known)
                alias = dice.choice(["prod", "beta", "latest"])
                if (name, "latest") in model.alias:
                    registry.tag(f"{name}@{target}", alias)
                    model.alias[name, alias] = (name, target)
                    counts["tag"] += 1
            case "untag" if [each for each in aliases if each[1] != "latest"]:
                name, alias = dice.choice([each for each in aliases if each[1] != "latest"])
                registry.untag(name, alias)
                del model.alias[name, alias]
                counts["untag"] += 1
            case "rm" if known:
                version_key = dice.choice(known)
                needed = version_key in model.alias.values() or any(version_key in p for p in model.parents.values())
                try:
                    remove(registry, "@".join(version_key))
                    assert not needed
                    model.forget({version_key})
                    counts["rm"] += 1
                except RegistryError:
                    assert needed
                    counts["rm refused"] += 1
            case "rm all" if known:
                name = dice.choice(known)[0]
                own = {each for each in known if each[0] == name}
                others = [each for each in aliases if each[0] == name and each[1] != "latest"]
                children = [c for c, parents in model.parents.items() if c not in own and own & set(parents)]
                try:
                    assert set(remove_adapter(registry, name)) == {version for _, version in own}
                    assert not others
                    assert not children
                    model.forget(own)
                    model.alias = {each: target for each, target in model.alias.items() if each[0] != name}
                    counts["rm all"] += 1
                except RegistryError:
                    assert others or children
                    counts["rm all refused"] += 1
            case "gc":
                options = {"versions": dice.random() < 0.5, "dry_run": dice.random() < 0.3}
                collect(registry, **options)
                if options["versions"] and not options["dry_run"]:
                    model.forget(set(model.parents) - model.reached())
                counts["gc"] += 1
        if step % 4 == 3:
            agree(registry, model)
    collect(registry, versions=True)
    model.forget(set(model.parents) - model.reached())
    agree(registry, model)
    wanted = {RECORDS[base].id for base in model.record.values() if base is not None}
    assert set(bases.ids(registry.layout.bases)) == wanted


def test_a_damaged_version_can_be_removed_and_blocks_what_it_might_need(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    parent = registry.publish("tickets", make_payload(), make_draft())
    named = [{"name": "tickets", "version": parent.id, "relation": "continued"}]
    child = registry.publish("tickets", make_payload(seed=1), make_draft(parents=named))
    last = registry.publish("tickets", make_payload(seed=2), make_draft())
    path = child.path / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    for attempt in (lambda: remove(registry, parent.reference), lambda: collect(registry, versions=True)):
        with pytest.raises(AdapterDamaged, match=f"what {child.reference} needs is not known") as caught:
            attempt()
        assert f"peftkit rm {child.reference}" in str(caught.value)
    assert set(registry.version_ids("tickets")) == {parent.id, child.id, last.id}
    assert remove(registry, child.reference) == child.reference
    assert remove(registry, parent.reference) == parent.reference
    assert registry.version_ids("tickets") == [last.id]
