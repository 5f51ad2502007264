"""Norms, angles and truncation from factors against dense float64 matrices, computed by numpy and scipy alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from peftkit.deltas import spectrum
from peftkit.deltas.delta import LowRank

ATOL = 1e-12  # of float64 over some dozen sums of numbers near 1


def random(m: int, n: int, k: int, seed: int, scale: float = 1.0) -> LowRank:
    draw = np.random.default_rng(seed)
    left, right = draw.standard_normal((m, k)), draw.standard_normal((k, n))
    return LowRank((m, n), torch.from_numpy(left), torch.from_numpy(right), scale)


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * (delta.left.double().numpy() @ delta.right.double().numpy())


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
seeds = st.integers(0, 1000)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds, st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.01))
def test_svd_and_norm(size: tuple[int, int, int], seed: int, scale: float) -> None:
    delta = random(*size, seed, scale)
    want = dense(delta)
    found = spectrum.svd(delta)
    values = np.linalg.svd(want, compute_uv=False)
    kept = found.values.numel()
    assert found.values.numpy() == pytest.approx(values[:kept], abs=ATOL * values[0])
    assert values[kept:] == pytest.approx(0, abs=ATOL * values[0])
    rebuilt = (found.left * found.values) @ found.right
    assert rebuilt.numpy() == pytest.approx(want, abs=10 * ATOL * values[0])
    assert spectrum.norm(delta) == pytest.approx(np.linalg.norm(want), rel=ATOL)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=4), seeds)
def test_sums_products_and_common_coordinates(m: int, n: int, ranks: list[int], seed: int) -> None:
    deltas = [random(m, n, k, seed + at, 0.5 + at) for at, k in enumerate(ranks)]
    weights = [(-1.0) ** at * (at + 1) for at in range(len(ranks))]
    want = [dense(delta) for delta in deltas]
    total = spectrum.stacked(deltas, weights)
    expected = sum(weight * each for weight, each in zip(weights, want, strict=True))
    assert total.rank == sum(ranks)
    assert dense(total) == pytest.approx(expected, abs=1e-11)
    joint = spectrum.joint(deltas)
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas):
            product = float((want[i] * want[j]).sum())
            assert spectrum.inner(one, other) == pytest.approx(product, abs=1e-10)
            assert spectrum.inner(joint[i], joint[j]) == pytest.approx(product, abs=1e-10)
            lengths = np.linalg.norm(want[i]) * np.linalg.norm(want[j])
            assert spectrum.cosine(one, other) == pytest.approx(product / lengths, abs=1e-11)
    assert max(max(each.shape) for each in joint) <= sum(ranks)
    values = np.linalg.svd(expected, compute_uv=False)
    summed = spectrum.svd(spectrum.stacked(joint, weights)).values.numpy()
    length = min(values.size, summed.size)
    assert summed[:length] == pytest.approx(values[:length], abs=1e-11 * max(1, values[0]))


@settings(max_examples=30, deadline=None)
@given(sizes, seeds, st.integers(1, 8))
def test_truncation_is_the_best_there_is(size: tuple[int, int, int], seed: int, rank: int) -> None:
    delta = random(*size, seed)
    want = dense(delta)
    values = np.linalg.svd(want, compute_uv=False)
    found, error = spectrum.truncated(delta, rank)
    assert found.rank == rank
    # Eckart and Young (1936): the error is what the left-out singular values hold; issue: to 1e-5, float64 does better.
    best = math.sqrt(float((values[rank:] ** 2).sum()))
    assert error == pytest.approx(best, abs=1e-11 * values[0])
    assert np.linalg.norm(want - dense(found)) == pytest.approx(best, abs=1e-11 * values[0])


@pytest.mark.parametrize(("m", "n", "first", "second"), [(20, 15, 3, 5), (8, 30, 4, 4), (6, 6, 6, 2)])
def test_principal_angles(m: int, n: int, first: int, second: int) -> None:
    one, other = random(m, n, first, 1), random(m, n, second, 2)
    shared = torch.cat([one.left[:, :1], other.left[:, 1:]], dim=1)  # one direction in common
    other = LowRank(other.shape, shared, other.right)
    write, read = spectrum.principal_cosines(one, other)
    assert write.numpy() == pytest.approx(np.sort(np.cos(subspace_angles(one.left.numpy(), shared.numpy())))[::-1])
    rows = subspace_angles(one.right.numpy().T, other.right.numpy().T)
    assert read.numpy() == pytest.approx(np.sort(np.cos(rows))[::-1])
    assert float(write[0]) == pytest.approx(1.0)
    for mine, theirs in zip(spectrum.principal_cosines(*spectrum.joint([one, other])), (write, read), strict=True):
        assert mine.numpy() == pytest.approx(theirs.numpy(), abs=1e-11)


def test_a_factor_with_idle_directions_has_fewer_angles() -> None:
    one, other = random(10, 9, 2, 1), random(10, 9, 2, 2)
    idle = LowRank(
        one.shape, torch.cat([one.left, one.left], 1), torch.cat([one.right, torch.zeros(2, 9, dtype=torch.float64)])
    )
    assert dense(idle) == pytest.approx(dense(one))
    for mine, theirs in zip(
        spectrum.principal_cosines(idle, other), spectrum.principal_cosines(one, other), strict=True
    ):
        assert mine.shape == theirs.shape
        assert mine.numpy() == pytest.approx(theirs.numpy(), abs=1e-11)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.1, 10))
def test_figures_do_not_depend_on_the_gauge(seed: int, stretch: float) -> None:
    one, other = random(9, 7, 3, seed), random(9, 7, 3, seed + 1)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]) * stretch
    turned = LowRank(one.shape, one.left @ turn, torch.linalg.inv(turn) @ one.right)
    assert spectrum.norm(turned) == pytest.approx(spectrum.norm(one), rel=1e-10)
    assert spectrum.cosine(turned, other) == pytest.approx(spectrum.cosine(one, other), abs=1e-10)
    for mine, theirs in zip(
        spectrum.principal_cosines(turned, other), spectrum.principal_cosines(one, other), strict=True
    ):
        assert mine.numpy() == pytest.approx(theirs.numpy(), abs=1e-9)


def test_nothing_at_all() -> None:
    zero = LowRank((4, 3), torch.zeros(4, 2), torch.ones(2, 3))
    one = random(4, 3, 2, 0)
    assert spectrum.norm(zero) == 0
    assert spectrum.cosine(zero, one) == 0
    assert [each.numel() for each in spectrum.principal_cosines(zero, one)] == [0, 0]
    assert spectrum.Angles.of(list(spectrum.principal_cosines(zero, one))) is None
    assert spectrum.rank_for(spectrum.svd(zero).values, 0.95) == 0
    empty = LowRank((4, 3), torch.zeros(4, 0), torch.zeros(0, 3))
    assert spectrum.norm(empty) == 0
    assert spectrum.svd(empty).values.numel() == 0
    assert (spectrum.relative(0.0, 0.0), spectrum.relative(1.0, 0.0), spectrum.relative(1.0, 4.0)) == (
        0,
        math.inf,
        0.25,
    )


@pytest.mark.parametrize(
    ("values", "share", "rank"),
    [
        ([3.0, 1.0], 0.9, 1),  # 9 of 10: exactly enough
        ([3.0, 1.0], 0.91, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.75, 3),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([0.0, 0.0], 0.95, 0),
        ([], 0.95, 0),
    ],
)
def test_rank_for_a_share_of_the_energy(values: list[float], share: float, rank: int) -> None:
    assert spectrum.rank_for(torch.tensor(values), share) == rank


@pytest.mark.parametrize(("rows", "columns", "rank"), [(7, 12, 7), (12, 7, 7), (9, 9, 9), (10, 14, 3), (6, 5, 0)])
def test_a_dense_matrix_is_decomposed_as_by_numpy_and_cut_at_the_best_error(rows: int, columns: int, rank: int) -> None:
    random = np.random.default_rng(rows * columns)
    matrix = (
        random.standard_normal((rows, rank))
        @ np.diag(10.0 ** -np.arange(rank))
        @ random.standard_normal((rank, columns))
    )
    found = spectrum.dense_svd(torch.from_numpy(matrix))
    exact = np.linalg.svd(matrix, compute_uv=False)
    largest = exact[0] if rank else 1.0
    noise = 2.0**-26 * largest  # the root of float64's epsilon: a Gram matrix squares the values
    np.testing.assert_allclose(found.values.numpy(), exact, atol=noise)
    for kept in range(min(rows, columns) + 1):
        product = (found.left[:, :kept] * found.values[:kept]) @ found.right[:kept]
        best = np.sqrt((exact[kept:] ** 2).sum())
        assert np.linalg.norm(matrix - product.numpy()) == pytest.approx(best, rel=1e-5, abs=noise)
