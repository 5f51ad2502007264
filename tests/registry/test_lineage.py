"""Family trees of versions, also of manifests that a stranger wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from peftkit.errors import AdapterNotFound
from peftkit.registry import Draft, Registry, Version, collect
from peftkit.registry.index import Contents, Parent, Summary
from peftkit.registry.lineage import Step, branches, children_of, lineage

Make = Callable[..., Version]
NOBODY = {"name": "elsewhere", "version": "e" * 16, "relation": "combined"}


@pytest.fixture
def make(registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]) -> Make:
    count = iter(range(1, 100))

    def make(name: str, *parents: Version, relation: str = "continued", more: Sequence[dict[str, str]] = ()) -> Version:
        named = [{"name": each.name, "version": each.id, "relation": relation} for each in parents]
        created = f"2026-01-01T00:00:{next(count):02}Z"
        return registry.publish(name, make_payload(), make_draft(created=created, parents=[*named, *more]))

    return make


def told(steps: Sequence[Step]) -> list[tuple[int, str, str, bool, bool]]:
    return [(each.depth, each.reference, each.relation, each.summary is not None, each.again) for each in steps]


def test_a_tree_with_a_diamond_and_a_missing_parent(registry: Registry, make: Make) -> None:
    root = make("root")
    left = make("left", root)
    right = make("right", root, more=[NOBODY])
    both = make("both", left, right, relation="combined")
    last = make("both", both)
    registry.tag(both.reference, "prod")
    found = lineage(registry, "both")
    assert found.version.reference == last.reference
    assert found.version.aliases == ("latest",)
    assert told(found.ancestors) == [
        (1, both.reference, "continued", True, False),
        (2, left.reference, "combined", True, False),
        (3, root.reference, "continued", True, False),
        (2, right.reference, "combined", True, False),
        (3, root.reference, "continued", True, True),
        (3, f"elsewhere@{'e' * 16}", "combined", False, False),
    ]
    assert found.descendants == ()
    assert [(move.alias, move.number, move.version) for move in found.moves] == [
        ("latest", 1, both.id), ("latest", 2, last.id), ("prod", 1, both.id),
    ]  # fmt: skip
    down = lineage(registry, "root")
    assert down.ancestors == ()
    assert told(down.descendants) == [
        (1, left.reference, "continued", True, False),
        (2, both.reference, "combined", True, False),
        (3, last.reference, "continued", True, False),
        (1, right.reference, "continued", True, False),
        (2, both.reference, "combined", True, True),
    ]
    assert next(step.summary.aliases for step in found.ancestors if step.summary) == ("prod",)
    with pytest.raises(AdapterNotFound):
        lineage(registry, "nobody")


def test_a_damaged_relative_is_named(registry: Registry, make: Make) -> None:
    first = make("a")
    second = make("b", first)
    (first.path / "manifest.json").unlink()
    (step,) = lineage(registry, second.reference).ancestors
    assert step.summary is not None
    assert "cannot be read" in str(step.summary.problem)
    registry.layout.record("b", "latest", 1).unlink()
    registry.layout.record("b", "latest", 1).write_text("{}")
    found = lineage(registry, second.reference)
    assert (len(found.moves), len(found.problems)) == (0, 1)


def test_cycles_and_long_chains_end(registry: Registry, make: Make) -> None:
    version = make("a")

    def edge(name: str) -> Parent:
        return Parent(name, version.id if name == "a" else "0" * 16, "continued")

    a = Summary("a", version.id, parents=(edge("b"), edge("a"), edge("b")))
    found = lineage(registry, "a", Contents((a, Summary("b", "0" * 16, parents=(edge("a"),))), {}))
    assert [(step.depth, step.name, step.again) for step in found.ancestors] == [
        (1, "b", False), (2, "a", True), (1, "a", True),
    ]  # fmt: skip
    assert [(step.depth, step.name, step.again) for step in found.descendants] == [
        (1, "a", True), (1, "b", False), (2, "a", True),
    ]  # fmt: skip
    chain = [Summary("a", version.id, parents=(edge("n1"),))]
    chain += [Summary(f"n{n}", "0" * 16, parents=(edge(f"n{n + 1}"),)) for n in range(1, 5000)]
    long = lineage(registry, "a", Contents(tuple(chain), {}))
    assert len(long.ancestors) == 5000
    assert long.ancestors[-1].summary is None


def test_branches_draw_a_tree() -> None:
    names = [(1, "a"), (2, "b"), (3, "c"), (2, "d"), (1, "e"), (2, "f"), (1, "g")]
    steps = [Step(depth, name, "", "", None) for depth, name in names]
    assert [before + step.name for before, _, step in branches(steps)] == [
        "├─ a", "│  ├─ b", "│  │  └─ c", "│  └─ d", "├─ e", "│  └─ f", "└─ g",
    ]  # fmt: skip
    assert [beside for _, beside, _ in branches(steps)] == [
        "│  ",
        "│  │  ",
        "│  │     ",
        "│     ",
        "│  ",
        "│     ",
        "   ",
    ]
    assert list(branches([])) == []


def test_children_and_collecting(registry: Registry, make: Make) -> None:
    first = make("a")
    second = make("a", first)
    known = Contents(
        (Summary("a", first.id), Summary("a", second.id, parents=(Parent("a", first.id, "continued"),))), {}
    )
    assert [each.id for each in children_of(known, "a", first.id)] == [second.id]
    assert children_of(known, "a", second.id) == []
    assert collect(registry, versions=True, dry_run=True).paths == ()  # the parent of a version in use stays
