"""Two adapters compared tensor by tensor, against dense float64 matrices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from peftkit.deltas.compare import compare_deltas
from peftkit.deltas.delta import Absolute, Added, Delta, Deltas, LowRank, Place, Rows, Stacked
from peftkit.deltas.reading.kinds import Replaced


def random(m: int, n: int, k: int, seed: int, scale: float = 1.0) -> LowRank:
    draw = np.random.default_rng(seed)
    left, right = draw.standard_normal((m, k)), draw.standard_normal((k, n))
    return LowRank((m, n), torch.from_numpy(left), torch.from_numpy(right), scale)


def adapter(reference: str, changes: dict[str, Delta], **more: Any) -> Deltas:
    return Deltas(reference, changes, {name: Place(name, "linear") for name in changes}, **more)


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * (delta.left.double().numpy() @ delta.right.double().numpy())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4))
def test_figures(seed: int, first: int, second: int) -> None:
    one, other = random(9, 7, first, seed, 2.0), random(9, 7, second, seed + 1)
    alone = random(5, 5, 2, seed + 2)
    found = compare_deltas(adapter("a@1", {"w": one, "x": alone}), adapter("b@1", {"w": other}))
    (tensor,) = found.tensors
    left, right = dense(one), dense(other)
    norms = np.linalg.norm(left), np.linalg.norm(right)
    distance = tensor.distance
    assert (distance.left_norm, distance.right_norm) == pytest.approx(norms)
    assert distance.cosine == pytest.approx((left * right).sum() / norms[0] / norms[1], abs=1e-12)
    assert distance.relative == pytest.approx(np.linalg.norm(left - right) / norms[0])
    for angles, sides in (
        (tensor.write, (one.left, other.left)), (tensor.read, (one.right.T, other.right.T)),
    ):  # fmt: skip
        cosines = np.cos(subspace_angles(*(side.numpy() for side in sides)))
        assert angles is not None
        assert (angles.mean, angles.min, angles.max) == pytest.approx((cosines.mean(), cosines.min(), cosines.max()))
    # What one adapter alone changes is zero in the other.
    vectors = np.concatenate([left.ravel(), dense(alone).ravel()]), np.concatenate([right.ravel(), np.zeros(25)])
    overall = found.overall
    assert overall.left_norm == pytest.approx(np.linalg.norm(vectors[0]))
    assert overall.right_norm == pytest.approx(norms[1])
    assert overall.relative == pytest.approx(np.linalg.norm(vectors[0] - vectors[1]) / np.linalg.norm(vectors[0]))
    assert (found.only_left, found.only_right, found.not_compared) == (("x",), (), {})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_the_same_adapter_in_another_gauge_is_no_other(seed: int, stretch: float) -> None:
    one = random(9, 7, 3, seed, 1.5)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]) * stretch
    again = LowRank(one.shape, one.left @ turn, torch.linalg.inv(turn) @ one.right * 3, 0.5)
    found = compare_deltas(adapter("a@1", {"w": one}), adapter("b@1", {"w": again})).tensors[0]
    assert found.distance.relative == pytest.approx(0, abs=1e-12)
    assert found.distance.cosine == pytest.approx(1, abs=1e-12)
    assert found.write is not None
    assert found.write.min == pytest.approx(1, abs=1e-12)


def test_halves_and_doubles_are_exactly_the_same() -> None:
    one = random(40, 30, 4, 0)
    again = LowRank(one.shape, one.left * 2, one.right / 2)
    overall = compare_deltas(adapter("a@1", {"w": one}), adapter("b@1", {"w": again})).overall
    assert overall.relative == pytest.approx(0, abs=1e-15 * 10)


def test_known_cases() -> None:
    one = random(6, 5, 2, 0)
    minus = compare_deltas(
        adapter("a@1", {"w": one}), adapter("b@1", {"w": LowRank(one.shape, one.left, -one.right)})
    ).overall
    assert (minus.cosine, minus.relative) == pytest.approx((-1, 2))
    zero = LowRank(one.shape, torch.zeros(6, 2), torch.ones(2, 5))
    gone = compare_deltas(adapter("a@1", {"w": one}), adapter("b@1", {"w": zero})).tensors[0]
    assert (gone.distance.cosine, gone.distance.relative, gone.write) == (None, pytest.approx(1), None)
    come = compare_deltas(adapter("a@1", {"w": zero}), adapter("b@1", {"w": one})).overall
    assert come.relative is None
    none = compare_deltas(adapter("a@1", {}), adapter("b@1", {}))
    assert (none.overall.left_norm, none.overall.relative) == (0, 0)


def test_experts_vectors_and_values() -> None:
    blocks = [tuple(random(4, 3, 2, 10 * side + expert) for expert in range(3)) for side in range(2)]
    bias = torch.tensor([[1.0, 2.0, 2.0]])
    values = torch.arange(12.0).reshape(3, 4)
    left = {"e": Stacked((3, 4, 3), blocks[0]), "b": Added((3,), bias), "v": Added((3, 4), values, 2.0)}
    right = {"e": Stacked((3, 4, 3), blocks[1]), "b": Added((3,), bias * 2), "v": Added((3, 4), values)}
    found = {each.name: each for each in compare_deltas(adapter("a@1", left), adapter("b@1", right)).tensors}
    one, other = (np.concatenate([dense(block) for block in each]) for each in blocks)
    assert found["e"].distance.relative == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(one))
    assert (found["b"].distance.left_norm, found["b"].distance.relative) == pytest.approx((3, 1))
    assert found["b"].write is None
    assert (found["v"].distance.relative, found["v"].distance.cosine) == pytest.approx((0.5, 1))
    assert found["v"].distance.left_norm == pytest.approx(2 * np.linalg.norm(values.numpy()))


@dataclass(frozen=True)
class Elsewhere(Absolute):
    kind: ClassVar[str] = "DoRA"
    shape: tuple[int, ...]

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        raise AssertionError("the base is not there")


def test_what_cannot_be_compared_is_named() -> None:
    left = adapter("a@1", {"d": Elsewhere((4, 3)), "s": random(4, 3, 1, 0), "w": random(4, 3, 1, 0)})
    right = adapter(
        "b@1", {"d": random(4, 3, 1, 0), "s": random(5, 3, 1, 0), "w": random(4, 3, 1, 1), "z": Elsewhere((2, 2))}
    )
    found = compare_deltas(left, right)
    assert found.not_compared == {
        "d": "ΔW of DoRA depends on the base's weights",
        "s": "the shapes are (4, 3) and (5, 3)",
        "z": "ΔW of DoRA depends on the base's weights",
    }
    assert [each.name for each in found.tensors] == ["w"]
    record = found.as_record()
    assert json.loads(json.dumps(record, allow_nan=False))["overall"] == record["overall"]


def test_a_tied_head_is_compared_with_an_untied_one() -> None:
    change, other = random(6, 4, 2, 0), random(6, 4, 2, 1)
    tied = adapter("a@1", {"embed": change})
    untied = adapter("b@1", {"embed": change, "head": other}, sources={"head": "embed"})
    found = compare_deltas(tied, untied)
    assert found.only_right == ()
    head = next(each for each in found.tensors if each.name == "head")
    assert head.distance.left_norm == pytest.approx(np.linalg.norm(dense(change)))


def test_two_that_put_the_same_tensor_in_the_bases_place_are_said_to() -> None:
    """Two partial fine-tunes with one result: their ΔW is the same on every base, however large it is there."""
    values = torch.randn(3, 4)
    one = adapter("one", {name: Replaced((3, 4), values, 3) for name in "ab"})
    other = {"a": Replaced((3, 4), values.clone(), 3), "b": Replaced((3, 4), values + 1, 3)}
    found = compare_deltas(one, adapter("other", dict(other)))
    assert found.not_compared["a"] == "both put the same tensor in its place"
    assert "depends on the base's weights" in found.not_compared["b"]
