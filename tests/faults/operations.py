"""The operations that are made to fail, what a reader finds afterwards, and which findings are the old or new state.

What a registry holds is a set of items, each of which is there as a whole or not: versions, aliases with their
history, base records, relations. An operation takes effect item by item in an order that it states (`first`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.stock import EXPORTED, Stock

from peftkit.registry import Registry, bases, check_root, collect, remove, remove_adapter
from peftkit.registry import aliases as alias_records
from peftkit.registry.exchange import export, import_adapter

Item = tuple[str, ...]
Items = dict[Item, object]

_KINDS = ("base", "version", "alias")
NEVER_FINISHED = "It has no alias 'latest': its first publish was cut off before the end."


@dataclass(frozen=True)
class Plan:
    """One operation with its arguments fixed, so that it can be done again after a crash."""

    name: str
    act: Callable[[Registry], object]
    first: Callable[[Item, Item], bool]
    """Whether the one item must take effect before the other."""
    promised: frozenset[Item] = frozenset()
    """What holds once it has returned, even if it was already so before."""
    whole: bool = False
    """All items take effect as one."""
    once: bool = False
    """Done again after it has taken effect it is refused, or does something else."""


Operation = Callable[[Registry, Stock], Plan | None]
"""Fixes the arguments for what is in the registry; None when the operation makes no sense there."""


def _publish(
    number: int, aliases: tuple[str, ...] = (), records: tuple[int, ...] = (), given: bool = True
) -> Operation:
    def plan(registry: Registry, stock: Stock) -> Plan | None:
        there = bases.ids(registry.layout.bases)
        record = next((each for each in records if given or stock.records[each].id in there), None)
        if records and record is None:
            return None
        draft = stock.draft(number, record=record)
        base = stock.records[record] if record is not None and given else None
        moved: list[Item] = [("alias", "tickets", alias) for alias in ("latest", *aliases)]
        promised = {*moved} | ({("base", draft.base.record)} if draft.base.record else set())

        def at(item: Item) -> tuple[int, int]:
            return _KINDS.index(item[0]), moved.index(item) if item in moved else 0

        return Plan(
            f"publish {number} {record} {given}",
            lambda r: r.publish("tickets", stock.sources[number], draft, aliases, base=base),
            lambda one, other: at(one) < at(other),
            frozenset(promised),
        )

    return plan


def _tag(alias: str, newest: bool) -> Operation:
    def plan(registry: Registry, stock: Stock) -> Plan | None:
        found = registry.version_ids("tickets")
        if not found:
            return None
        # By id, so that also a version is reached whose publish was cut off before `latest`.
        reference = f"tickets@{found[0] if newest else found[-1]}"
        return _plan(f"tag {reference} {alias}", lambda r: r.tag(reference, alias), ("alias", "tickets", alias))

    return plan


def _untag(registry: Registry, stock: Stock) -> Plan | None:
    if "prod" not in registry.aliases("tickets"):
        return None
    return _plan("untag", lambda r: r.untag("tickets", "prod"), ("alias", "tickets", "prod"), once=True)


def _restore(registry: Registry, stock: Stock) -> Plan | None:
    moves = alias_records.history(registry.layout, "tickets", "latest")
    if len(moves) < 2 or moves[-2].version not in registry.version_ids("tickets"):
        return None
    return _plan("restore", lambda r: r.restore("tickets"), ("alias", "tickets", "latest"), once=True)


def _remove(registry: Registry, stock: Stock) -> Plan | None:
    versions = registry.version_ids("tickets")
    needed = set(registry.aliases("tickets").values())
    needed |= {p.version for each in versions for p in registry.load("tickets", each).manifest.parents}
    unneeded = [each for each in versions if each not in needed]
    if not unneeded or "tickets" not in registry.names():
        return None
    item = ("version", "tickets", unneeded[0])
    return _plan(f"remove {unneeded[0]}", lambda r: remove(r, f"tickets@{unneeded[0]}"), item, once=True)


def _remove_adapter(registry: Registry, stock: Stock) -> Plan | None:
    name = next((each for each in ("tickets", "orders") if set(registry.aliases(each)) == {"latest"}), None)
    if name is None:
        return None
    return Plan(
        f"remove all of {name}", lambda r: remove_adapter(r, name), lambda one, other: False, whole=True, once=True
    )


def _collect(versions: bool) -> Operation:
    def plan(registry: Registry, stock: Stock) -> Plan | None:
        if not registry.root.is_dir():
            return None
        # A child goes before its parent, every version before the records that it names.
        children = {
            (("version", name, each), ("version", parent.name, parent.version))
            for name in _folders(registry.root)
            for each in registry.version_ids(name)
            for parent in registry.load(name, each).manifest.parents
        }
        return Plan(
            "collect versions" if versions else "collect",
            lambda r: collect(r, versions=versions),
            lambda one, other: (one, other) in children or (one[0] == "version" and other[0] == "base"),
        )

    return plan


def _relate(registry: Registry, stock: Stock) -> Plan:
    def act(target: Registry) -> None:
        with target.writing("keep a relation"):
            bases.keep_relation(target.layout, stock.relations[0])

    return _plan("relate", act, ("relation", stock.relations[0].id))


def _export(registry: Registry, stock: Stock) -> Plan | None:
    if "tickets" not in registry.names() or (registry.root.parent / EXPORTED).exists():
        return None
    reference = registry.resolve("tickets").reference
    return _plan(
        f"export {reference}", lambda r: export(r, reference, r.root.parent / EXPORTED), ("exported",), once=True
    )


def _import(registry: Registry, stock: Stock) -> Plan:
    return Plan(
        "publish by import",
        lambda r: import_adapter(r, stock.exported, aliases=["prod"]),
        lambda one, other: _KINDS.index(one[0]) < _KINDS.index(other[0]),
        frozenset({("alias", "tickets", "latest"), ("alias", "tickets", "prod"), ("base", stock.records[1].id)}),
    )


OPERATIONS: dict[str, Operation] = {
    "publish": _publish(0),
    "publish another": _publish(1),
    "publish with a base and two aliases": _publish(2, ("prod", "next"), records=(1,)),
    "publish on a base that is there": _publish(1, records=(1, 2, 0), given=False),
    "tag a new alias": _tag("pinned", newest=True),
    "move an alias": _tag("prod", newest=False),
    "untag": _untag,
    "restore": _restore,
    "remove a version": _remove,
    "remove an adapter": _remove_adapter,
    "collect": _collect(versions=False),
    "collect versions": _collect(versions=True),
    "keep a relation": _relate,
    "export": _export,
    "import": _import,
}


def find(root: Path) -> tuple[Items, set[str], list[str]]:
    """Everything that readers find, the names whose first publish never finished, and what is wrong."""
    wrong: list[str] = []
    unfinished: set[str] = set()
    for where, sentences in check_root(root).items():
        if sentences == [NEVER_FINISHED]:
            unfinished.add(where)
        else:
            wrong += [f"{where}: {sentence}" for sentence in sentences]
    if wrong:
        return {}, unfinished, wrong
    registry, items = Registry(root), Items()
    try:
        registry.list()
        for name in _folders(root):
            for each in registry.version_ids(name):
                version = registry.load(name, each)
                items["version", name, each] = True
                if version.manifest.base.record:
                    bases.read(registry.layout, version.manifest.base.record)
                wrong += [
                    f"the parent {parent.name}@{parent.version} of {version.reference} is gone"
                    for parent in version.manifest.parents
                    if parent.version not in registry.version_ids(parent.name)
                ]
            for alias in alias_records.names(registry.layout, name):
                items["alias", name, alias] = tuple(move.version for move in registry.history(name, alias))
            for alias in registry.aliases(name):
                registry.resolve(f"{name}@{alias}")
        out = root.parent / EXPORTED
        if out.is_dir():
            items["exported",] = frozenset((path.name, path.read_bytes()) for path in out.rglob("*.*"))
        items |= {("base", each): True for each in bases.ids(registry.layout.bases)}
        items |= {("relation", each.id): True for each in bases.relations(registry.layout)}
    except Exception as error:
        wrong.append(f"a reader stopped with {error!r}")
    return items, unfinished, wrong


def mixed(plan: Plan, before: Items, after: Items, found: Items) -> str | None:
    """Why `found` is neither the old state nor the new one nor on the way that the operation states; None if it is."""
    changed = [item for item in before.keys() | after.keys() if before.get(item) != after.get(item)]
    for item in before.keys() | after.keys() | found.keys():
        if found.get(item) not in (before.get(item), after.get(item)):
            return f"{item} is {found.get(item)}, was {before.get(item)}, becomes {after.get(item)}"
    old = [item for item in changed if found.get(item) == before.get(item)]
    new = [item for item in changed if found.get(item) != before.get(item)]
    if plan.whole and old and new:
        return f"half of it: {old[0]} is old, {new[0]} is new"
    late = [(one, other) for one in old for other in new if plan.first(one, other)]
    return f"{late[0][1]} is new before {late[0][0]}" if late else None


def _plan(name: str, act: Callable[[Registry], object], item: Item, *, once: bool = False) -> Plan:
    return Plan(name, act, lambda one, other: False, frozenset({item}), once=once)


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(root) if (Path(entry.path) / "versions").is_dir())
