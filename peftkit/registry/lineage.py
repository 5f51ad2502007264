"""Where a version comes from and what became of it: parents, children, and every move of its name's aliases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftkit.errors import RegistryError
from peftkit.registry import aliases as alias_records
from peftkit.registry.aliases import Move
from peftkit.registry.index import Contents, Summary, contents, summarize
from peftkit.registry.store import Registry

_Key = tuple[str, str]
_Edge = tuple[_Key, str]


@dataclass(frozen=True)
class Step:
    """A version in a tree, `depth` steps away from the one that was asked about; each stands after what it hangs on."""

    depth: int
    name: str
    id: str
    relation: str
    """How the child was made from the parent: `continued` or `combined`."""
    summary: Summary | None
    """None for a version that was removed, or is in another registry."""
    again: bool = False
    """It stands further up with all that hangs on it."""

    @property
    def reference(self) -> str:
        """`name@id`."""
        return f"{self.name}@{self.id}"


@dataclass(frozen=True)
class Lineage:
    """The trees on both sides of a version, and the moves of the aliases of its name, oldest first."""

    version: Summary
    ancestors: tuple[Step, ...]
    descendants: tuple[Step, ...]
    moves: tuple[Move, ...]
    problems: tuple[str, ...]
    """Alias records that cannot be read."""


def lineage(registry: Registry, reference: str, known: Contents | None = None) -> Lineage:
    """The lineage of a version, from `known` where the caller has read the registry already.

    Raises AdapterNotFound, and AdapterDamaged where the version's own manifest cannot be read.
    """
    version = registry.resolve(reference)
    everything = {(each.name, each.id): each for each in (known or contents(registry)).versions}
    start = version.name, version.id
    everything.setdefault(start, summarize(version))  # it was published since
    children = _children(everything.values())
    moves, problems = _moves(registry, version.name)
    return Lineage(
        everything[start],
        _walk(start, lambda key: _parents(everything.get(key)), everything),
        _walk(start, lambda key: children.get(key, []), everything),
        moves,
        problems,
    )


def children_of(known: Contents, name: str, version_id: str) -> list[Summary]:
    """The versions that were made from one, by name, newest first."""
    return [each for each in known.versions if any((p.name, p.version) == (name, version_id) for p in each.parents)]


def branches(steps: Sequence[Step]) -> Iterator[tuple[str, str, Step]]:
    """Each step with the lines that lead to it, and with those that go on beside what is written below it."""
    drawn: list[tuple[str, str, Step]] = []
    later: list[bool] = []  # by depth: whether a sibling follows; known when going backwards
    for step in reversed(steps):
        later += [False] * (step.depth + 1 - len(later))
        before = "".join("│  " if follows else "   " for follows in later[1 : step.depth])
        last = not later[step.depth]
        drawn.append((before + ("└─ " if last else "├─ "), before + ("   " if last else "│  "), step))
        del later[step.depth :]
        later.append(True)
    return reversed(drawn)


def _walk(start: _Key, following: Callable[[_Key], list[_Edge]], everything: dict[_Key, Summary]) -> tuple[Step, ...]:
    # Not recursive, and nothing is followed twice: a manifest from a stranger may name any parent, also its own child.
    steps: list[Step] = []
    followed = {start}
    waiting = [(1, edge) for edge in reversed(following(start))]
    while waiting:
        depth, (key, relation) = waiting.pop()
        again = key in followed
        steps.append(Step(depth, *key, relation, everything.get(key), again))
        if not again:
            followed.add(key)
            waiting += [(depth + 1, edge) for edge in reversed(following(key))]
    return tuple(steps)


def _parents(summary: Summary | None) -> list[_Edge]:
    found = summary.parents if summary is not None else ()
    return list(dict.fromkeys(((each.name, each.version), each.relation) for each in found))


def _children(versions: Iterable[Summary]) -> dict[_Key, list[_Edge]]:
    found: dict[_Key, list[_Edge]] = {}
    for child in sorted(versions, key=lambda each: (each.created, each.name, each.id)):
        for parent, relation in _parents(child):
            found.setdefault(parent, []).append(((child.name, child.id), relation))
    return found


def _moves(registry: Registry, name: str) -> tuple[tuple[Move, ...], tuple[str, ...]]:
    moves: list[Move] = []
    problems: list[str] = []
    for alias in alias_records.names(registry.layout, name):
        for number in alias_records.numbers(registry.layout, name, alias):
            try:
                moves.append(alias_records.read(registry.layout, name, alias, number))
            except RegistryError as error:
                problems.append(error.fact)
    return tuple(sorted(moves, key=lambda move: (move.time, move.alias, move.number))), tuple(problems)
