"""What differs between two versions: each planted change, nothing else, and both directions alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.base.record import BaseRecord
from peftkit.registry import Draft, Registry, Version
from peftkit.registry.difference import ABSENT, Difference, Row, difference

Make = Callable[..., Version]


@pytest.fixture
def make(registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]) -> Make:
    return lambda seed=0, **more: registry.publish("tickets", make_payload(seed=seed), make_draft(**more))


def rows(found: Difference) -> list[tuple[str, str, Any, Any]]:
    return [(row.section, row.key, row.left, row.right) for row in found.rows]


def data(source: str, digit: str, rows: int = 10, role: str = "train", **more: Any) -> dict[str, Any]:
    return {"role": role, "source": source, "sha256": digit * 64, "rows": rows, **more}


ROLES = ["train", "held_out"]
BASE = {"source": "Qwen/Qwen3-4B", "fingerprint": "f" * 64, "parts": {"weights": "3" * 64}}


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({}, {}, []),
        ({}, {"created": "2027-01-01T00:00:00Z"}, []),
        ({}, {"run": "r2"}, [("version", "run", ABSENT, "r2")]),
        ({}, {"base": BASE | {"parts": {"weights": "4" * 64}}}, [("base", "parts.weights", "3" * 64, "4" * 64)]),
        (
            {"base": BASE | {"quantization": {"bits": 4}}},
            {"base": BASE | {"quantization": {"bits": 8}, "revision": "main"}},
            [("base", "quantization.bits", 4, 8), ("base", "revision", ABSENT, "main")],
        ),
        ({"adapter": {"r": 8}}, {"adapter": {"r": 16}}, [("adapter", "r", 8, 16)]),
        ({"adapter": {"r": 1}}, {"adapter": {"r": True}}, [("adapter", "r", 1, True)]),
        ({"adapter": {"r": 1}}, {"adapter": {"r": 1.0}}, [("adapter", "r", 1, 1.0)]),
        ({"adapter": {"r": None}}, {"adapter": {}}, [("adapter", "r", None, ABSENT)]),
        ({"adapter": {"t": ["q", "v"]}}, {"adapter": {"t": ["v", "q"]}}, [("adapter", "t", ["q", "v"], ["v", "q"])]),
        ({"adapter": {"a.b": 1}}, {"adapter": {"a": {"b": 1}}},
         [("adapter", "a.b", ABSENT, 1), ("adapter", "a.b", 1, ABSENT)]),
        (
            {"recipe": {"name": "s", "sha256": "1" * 64, "config": {"train": {"lr": 1e-4, "steps": 5}}}},
            {"recipe": {"name": "s", "sha256": "2" * 64, "config": {"train": {"lr": 2e-4, "steps": 5}}}},
            [("recipe", "config.train.lr", 1e-4, 2e-4), ("recipe", "sha256", "1" * 64, "2" * 64)],
        ),
        ({"environment": {"torch": "1"}}, {"environment": {"torch": "2"}}, [("environment", "torch", "1", "2")]),
        (
            {"metrics": {"after": {"score": {"mean": 0.25}}}},
            {"metrics": {"after": {"score": {"mean": 0.75}}}},
            [("metrics", "after.score.mean", 0.25, 0.75)],
        ),
        (
            {"parents": [{"name": "a", "version": "a" * 16, "relation": "continued"}]},
            {"parents": [{"name": "a", "version": "a" * 16, "relation": "combined"}]},
            [("parents", f"a@{'a' * 16}", "continued", "combined")],
        ),
        ({"data": [data("a", "1")]}, {"data": [data("a", "2", 12)]},
         [("data", "train a.rows", 10, 12), ("data", "train a.sha256", "1" * 64, "2" * 64)]),
        ({"data": [data("a", "1")]}, {"data": [data("b", "1")]}, [("data", "train 11111111.source", "a", "b")]),
        ({"data": [data("a", "1", tokens=5)]}, {"data": [data("a", "1", tokens=7)]},
         [("data", "train a.tokens", 5, 7)]),
        (
            {"data": [data("a", "1")]},
            {"data": [data("a", "1"), data("b", "2", role="held_out")]},
            [("data", "held_out b", ABSENT, {"source": "b", "sha256": "2" * 64, "rows": 10, "dropped": 0})],
        ),
        # Two sources of one name: those with the same bytes belong together.
        ({"data": [data("a", "1"), data("a", "2")]}, {"data": [data("a", "2"), data("a", "3")]},
         [("data", "train a.sha256", "1" * 64, "3" * 64)]),
    ],
)  # fmt: skip
def test_a_planted_change_is_found(make: Make, left: Any, right: Any, expected: list[Any]) -> None:
    found = difference(make(**left), make(**right))
    shown = [(row[0], row[1].replace(" (2)", ""), *row[2:]) for row in rows(found)]
    assert sorted(map(repr, shown)) == sorted(map(repr, expected))
    assert sum(found.equal.values()) > 8


def test_files_receipts_and_numbers(make: Make) -> None:
    one = make(metrics={"after": {"n": 1, "big": 10**300, "far": 1e308, "ok": True}})
    other = make(1, metrics={"after": {"n": 3, "big": 2, "far": -1e308, "ok": False}}, receipts=[{"type": "import"}])
    found = difference(one, other)
    by_key = {row.key: row for row in found.rows}
    assert (found.left, found.right) == (one.reference, other.reference)
    assert by_key["adapter_model.safetensors"].left["sha256"] != by_key["adapter_model.safetensors"].right["sha256"]
    assert found.equal["files"] == 1
    assert {row.key for row in found.rows if row.change is not None} == {"after.big", "after.n"}
    assert by_key["after.n"].as_json() == {"section": "metrics", "key": "after.n", "left": 1, "right": 3, "change": 2}
    (receipt,) = [row.as_json() for row in found.rows if row.section == "receipts"]
    assert receipt["right"] == {"type": "import"}
    assert "left" not in receipt


def chance_draft(chance: random.Random) -> dict[str, Any]:
    def tree(depth: int) -> Any:
        if depth and chance.random() < 0.6:
            return {chance.choice("abc"): tree(depth - 1) for _ in range(3)}
        return chance.choice([1, 1.0, True, None, "x", [], {}, [1, 2], 2.5])

    def parent() -> dict[str, str]:
        return {"name": "p", "version": chance.choice("ab") * 16, "relation": chance.choice(["continued", "combined"])}

    return {
        "adapter": {"x": tree(3), "y": tree(2)},
        "metrics": {"after": {"m": tree(3)}},
        "recipe": chance.choice([None, {"name": "s", "sha256": "1" * 64, "config": {"c": tree(3)}}]),
        "environment": {chance.choice("abc"): chance.choice("12")},
        "data": [data(chance.choice("ab"), chance.choice("12"), chance.randrange(3), chance.choice(ROLES))
                 for _ in range(chance.randrange(5))],
        "parents": [parent() for _ in range(chance.randrange(4))],
        "receipts": [{"type": chance.choice(["import", "x"])} for _ in range(chance.randrange(3))],
    }  # fmt: skip


def test_both_directions_mirror_each_other(make: Make) -> None:
    chance = random.Random(3)
    versions = [make(chance.randrange(2), **chance_draft(chance)) for _ in range(14)]
    differing = 0
    for one in versions:
        assert difference(one, one).rows == ()
        for other in versions:
            there, back = difference(one, other), difference(other, one)
            assert there.equal == back.equal
            mirrored = [Row(row.section, row.key, row.right, row.left) for row in back.rows]
            assert list(map(repr, there.rows)) == list(map(repr, mirrored))
            assert [row.change for row in there.rows] == [row.change and -row.change for row in back.rows]
            differing += len(there.rows)
            same = one.manifest.model_dump(exclude={"created"}) == other.manifest.model_dump(exclude={"created"})
            assert same <= (there.rows == ())
    assert differing > 1000


def test_base_records_tell_what_differs(make: Make) -> None:
    one = BaseRecord({"hidden_size": 8}, "1" * 64, {}, None, {})
    other = BaseRecord({"hidden_size": 16}, "1" * 64, {}, None, {})
    version = make()
    told = difference(version, version, left_base=one, right_base=other).base
    assert any("hidden_size 8 → 16" in sentence for sentence in told)
    assert difference(version, version, left_base=one).base == ()
