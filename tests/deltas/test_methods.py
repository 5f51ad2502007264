"""The methods of combining against float64 loops written from the papers, worked examples, and what chance promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.deltas.combining.methods import METHODS, How
from peftkit.deltas.delta import LowRank
from peftkit.errors import DeltaError

WHOLE = {"density": 1.0, "gamma": 0.0}
"""Options with which nothing is dropped."""


def matrices(count: int, rows: int = 5, columns: int = 7, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((count, rows, columns)))


def run(how: How, deltas: list[np.ndarray], weights: list[float], tensor: str = "w") -> np.ndarray:
    given = [torch.from_numpy(np.ascontiguousarray(delta)) for delta in deltas]
    draws = how.draws(tensor, 0, [f"adapter{i}" for i in range(len(given))])
    return how.entry.dense(given, weights, how.values, draws).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(found, expected, rtol=0, atol=1e-12 * max(1.0, float(np.abs(expected).max())))


# --- the loops ---


def loop_trim(delta: np.ndarray, density: float) -> np.ndarray:
    entries = [(-abs(delta[i, j]), i, j) for i in range(delta.shape[0]) for j in range(delta.shape[1])]
    kept = np.zeros_like(delta)
    for _, i, j in sorted(entries)[: max(1, round(density * len(entries)))]:
        kept[i, j] = delta[i, j]
    return kept


def loop_elect(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
    result = np.zeros_like(deltas[0])
    for i, j in np.ndindex(*result.shape):
        mass = 0.0
        for delta, weight in zip(deltas, weights, strict=True):
            mass += weight * delta[i, j]
        value = share = 0.0
        for delta, weight in zip(deltas, weights, strict=True):
            if mass * weight * delta[i, j] > 0:
                value += weight * delta[i, j]
                share += abs(weight)
        result[i, j] = value / share if share else 0.0
    return result


def loop_sum(deltas: list[np.ndarray], weights: list[float]) -> np.ndarray:
    result = np.zeros_like(deltas[0])
    for i, j in np.ndindex(*result.shape):
        for delta, weight in zip(deltas, weights, strict=True):
            result[i, j] += weight * delta[i, j]
    return result


def uniforms(how: How, deltas: list[np.ndarray]) -> list[np.ndarray]:
    """The numbers between 0 and 1 that the method compares with its probabilities."""
    draws = how.draws("w", 0, [f"adapter{i}" for i in range(len(deltas))])
    pairs = zip(deltas, draws, strict=True)
    return [torch.rand(delta.shape, generator=draw, dtype=torch.float64).numpy() for delta, draw in pairs]


def loop_dare(how: How, deltas: list[np.ndarray]) -> list[np.ndarray]:
    found = []
    for delta, chance in zip(deltas, uniforms(how, deltas), strict=True):
        kept = np.zeros_like(delta)
        for i, j in np.ndindex(*delta.shape):
            if chance[i, j] < how.values["density"]:
                kept[i, j] = delta[i, j] / how.values["density"]
        found.append(kept)
    return found


def loop_della(how: How, deltas: list[np.ndarray]) -> list[np.ndarray]:
    found = []
    drop, epsilon = 1 - how.values["density"], how.values["epsilon"]
    for delta, chance in zip(deltas, uniforms(how, deltas), strict=True):
        kept = np.zeros_like(delta)
        for i, row in enumerate(delta):
            ordered = sorted(range(len(row)), key=lambda j: -abs(row[j]))
            for rank, j in enumerate(ordered):
                p = drop - epsilon / 2 + epsilon * rank / (len(row) - 1)
                if chance[i, j] < 1 - p:
                    kept[i, j] = row[j] / (1 - p)
        found.append(kept)
    return found


def loop_breadcrumbs(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    entries = sorted(((-abs(delta[i, j]), i, j) for i, j in np.ndindex(*delta.shape)))
    first, count = round(gamma * len(entries)), max(1, round(density * len(entries)))
    kept = np.zeros_like(delta)
    for _, i, j in entries[first : first + count]:
        kept[i, j] = delta[i, j]
    return kept


def loop_knots(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int((s > s[0] * 1e-12).sum())
    parts = np.split(vh[:rank], len(deltas), axis=1)
    merged = loop_elect([loop_trim(part, density) for part in parts], weights)
    result = np.zeros_like(deltas[0])
    for k in range(rank):
        result += s[k] * np.outer(u[:, k], merged[k])
    return result


WEIGHTS = [0.5, 1.25, -0.75]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.83, 1.0])
def test_trimming_methods_equal_the_loops(density: float) -> None:
    deltas = matrices(3)
    trimmed = [loop_trim(delta, density) for delta in deltas]
    assert close(run(How("ties", {"density": density}), deltas, WEIGHTS), loop_elect(trimmed, WEIGHTS))
    assert close(
        run(How("ties", {"density": density, "scale": 0.3}), deltas, WEIGHTS), 0.3 * loop_elect(trimmed, WEIGHTS)
    )
    assert close(run(How("magnitude_prune", {"density": density}), deltas, WEIGHTS), loop_sum(trimmed, WEIGHTS))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_methods_of_chance_equal_the_loops(density: float) -> None:
    deltas = matrices(3, seed=1)
    options = {"density": density, "seed": 7}
    for name, combine in (("dare_linear", loop_sum), ("dare_ties", loop_elect)):
        how = How(name, options)
        assert close(run(how, deltas, WEIGHTS), combine(loop_dare(how, deltas), WEIGHTS))
    how = How("della", {**options, "epsilon": 0.15, "scale": 1.1})
    assert close(run(how, deltas, WEIGHTS), 1.1 * loop_elect(loop_della(how, deltas), WEIGHTS))


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.05), (0.3, 0.2), (1.0, 0.0), (0.8, 0.2)])
def test_breadcrumbs_equals_the_loop(density: float, gamma: float) -> None:
    deltas = matrices(3, seed=2)
    masked = [loop_breadcrumbs(delta, density, gamma) for delta in deltas]
    assert close(
        run(How("breadcrumbs", {"density": density, "gamma": gamma}), deltas, WEIGHTS), loop_sum(masked, WEIGHTS)
    )


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_knots_equals_the_loop_dense_and_from_factors(count: int, density: float) -> None:
    random = np.random.default_rng(3)
    factors = [(random.standard_normal((6, 2)), random.standard_normal((2, 9))) for _ in range(count)]
    deltas, weights = [2.0 * b @ a for b, a in factors], WEIGHTS[:count]
    how = How("knots", {"density": density})
    expected = loop_knots(deltas, weights, density)
    np.testing.assert_allclose(run(how, deltas, weights), expected, atol=1e-11)
    low = [LowRank((6, 9), torch.from_numpy(b), torch.from_numpy(a), 2.0) for b, a in factors]
    assert how.entry.factored is not None
    found = how.entry.factored(low, weights, how.values)
    assert found.rank <= 2 * count
    np.testing.assert_allclose(found.rows(0, 6).numpy(), expected, atol=1e-11)


def test_knots_leaves_out_directions_that_are_zero_but_for_rounding() -> None:
    """Two equal adapters share their directions: with half the entries kept, the result is that of one of them."""
    random = np.random.default_rng(4)
    delta = random.standard_normal((6, 2)) @ random.standard_normal((2, 9))
    how = How("knots", {"density": 0.5})
    np.testing.assert_allclose(run(how, [delta, delta], [1, 1]), run(how, [delta], [1]), atol=1e-12)


def test_equal_magnitudes_are_kept_in_the_order_of_rows() -> None:
    delta = np.array([[1.0, -1.0, 1.0], [1.0, 2.0, -1.0]])
    found = run(How("magnitude_prune", {"density": 0.5}), [delta], [1])
    np.testing.assert_array_equal(found, [[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]])


# --- worked by hand ---


def test_the_worked_example_of_ties() -> None:
    """methods: trim to half, signs of the sums −1, 2, 0, −2; plain means would be −0.5, 0.5, 0.3, −1.5."""
    one, other = np.array([[3, -1, 0.5, -2]]), np.array([[-4, 2, 0.1, -1]])
    np.testing.assert_array_equal(run(How("ties", {"density": 0.5}), [one, other], [1, 1]), [[-4, 2, 0, -2]])
    np.testing.assert_allclose(run(How("linear"), [one, other], [0.5, 0.5]), [[-0.5, 0.5, 0.3, -1.5]])


def test_the_weights_of_ties_are_shares_of_those_that_agree() -> None:
    """0.6 · 2 against 0.4 · −4 elects −; where both agree, the mean is weighted; only the weights' ratio counts."""
    one, other = np.array([[2.0, 1.0, 5.0]]), np.array([[-4.0, 3.0, 0.0]])
    how = How("ties", {"density": 1.0})
    np.testing.assert_allclose(run(how, [one, other], [0.6, 0.4]), [[-4.0, 0.6 * 1 + 0.4 * 3, 5.0]])
    np.testing.assert_allclose(run(how, [one, other], [1.2, 0.8]), run(how, [one, other], [0.6, 0.4]))
    np.testing.assert_allclose(run(how, [one], [0.3]), one)
    np.testing.assert_allclose(run(how, [one, one], [1, -1]), 0 * one)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0.5, 0.5], [0.70711, 0.70711]), ([0.75, 0.25], [0.92388, 0.38268]), ([1, 0], [1, 0]), ([0, 1], [0, 1])],
)
def test_the_worked_examples_of_slerp(weights: list[float], expected: list[float]) -> None:
    found = run(How("slerp"), [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])], weights)
    np.testing.assert_allclose(found, [expected], atol=1e-5)


def test_slerp_interpolates_lengths_and_falls_back_to_the_line() -> None:
    one, other = matrices(2, seed=5)
    found = run(How("slerp"), [one, other], [0.3, 0.7])
    assert np.linalg.norm(found) == pytest.approx(0.3 * np.linalg.norm(one) + 0.7 * np.linalg.norm(other))
    np.testing.assert_allclose(run(How("slerp"), [one, 2 * one], [0.25, 0.75]), 1.75 * one)
    np.testing.assert_allclose(run(How("slerp"), [one, -one], [0.25, 0.75]), -0.5 * one)
    np.testing.assert_allclose(run(How("slerp"), [one, 0 * one], [0.25, 0.75]), 0.25 * one)


# --- properties ---


def options_of(name: str) -> dict[str, float]:
    return {key: value for key, value in WHOLE.items() if key in METHODS[name].options}


@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_of_weight_1_and_density_1_is_itself(name: str) -> None:
    delta = matrices(1, seed=6)[0]
    how = How(name, options_of(name))
    deltas, weights = ([delta, matrices(1, seed=7)[0]], [1.0, 0.0]) if how.entry.pair else ([delta], [1.0])
    np.testing.assert_allclose(run(how, deltas, weights), delta, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), weights=st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_the_order_of_adapters_does_not_matter(name: str, seed: int, weights: list[float]) -> None:
    how = How(name)
    count = 2 if how.entry.pair else 3
    deltas, names = matrices(count, seed=seed), [f"a{i}" for i in range(count)]
    results = []
    for order in itertools.permutations(range(count)):
        draws = how.draws("w", 0, [names[i] for i in order])
        given_ = [torch.from_numpy(deltas[i]) for i in order]
        results.append(how.entry.dense(given_, [weights[i] for i in order], how.values, draws).numpy())
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_scaling_all_deltas_scales_the_result(name: str, seed: int, factor: float) -> None:
    how = How(name)
    deltas = matrices(2, seed=seed)
    base = run(how, deltas, [0.6, 0.4])
    np.testing.assert_allclose(run(how, [factor * d for d in deltas], [0.6, 0.4]), factor * base, atol=1e-9 * factor)


@pytest.mark.parametrize("name", ["exact", "svd", "linear", "dare_linear", "breadcrumbs", "magnitude_prune", "slerp"])
def test_sums_are_doubled_by_doubled_weights(name: str) -> None:
    deltas = matrices(2, seed=8)
    np.testing.assert_allclose(run(How(name), deltas, [1, 3]), 2 * run(How(name), deltas, [0.5, 1.5]), atol=1e-12)


# --- chance ---


def test_the_mean_and_the_variance_of_dare_are_those_of_the_paper() -> None:
    """E = ΔW; Var = ΔW² p / (1 − p), p the dropped share. n seeds: the mean of an entry lies within 6 σ / √n.

    The sampled variance is compared over all entries: each is a scaled Bernoulli, so the sum's own standard deviation
    is √(Σ τ⁴ (μ₄ − σ⁴) / n), taken six times.
    """
    delta, n, density = matrices(1, seed=9)[0], 400, 0.25
    samples = np.stack([run(How("dare_linear", {"density": density, "seed": seed}), [delta], [1]) for seed in range(n)])
    variance = delta**2 * (1 - density) / density
    assert (np.abs(samples.mean(0) - delta) <= 6 * np.sqrt(variance / n)).all()
    sampled = ((samples - delta) ** 2).mean(0)
    fourth = density * (1 / density - 1) ** 4 + (1 - density)
    spread = math.sqrt(float((delta**4 * (fourth - ((1 - density) / density) ** 2)).sum()) / n)
    assert abs(float((sampled - variance).sum())) <= 6 * spread


def test_the_mean_of_della_is_the_delta_and_small_entries_go_first() -> None:
    delta, n, density, epsilon = matrices(1, seed=10)[0], 400, 0.5, 0.8
    how = {"density": density, "epsilon": epsilon}
    samples = np.stack([run(How("della", {**how, "seed": seed}), [delta], [1]) for seed in range(n)])
    ranks = np.argsort(np.argsort(-np.abs(delta), axis=1), axis=1)
    kept = density - epsilon * (ranks / (delta.shape[1] - 1) - 0.5)
    assert (np.abs(samples.mean(0) - delta) <= 6 * np.abs(delta) * np.sqrt((1 - kept) / kept / n)).all()
    assert (np.abs((samples != 0).mean(0) - kept) <= 6 * np.sqrt(kept * (1 - kept) / n)).all()
    assert kept.mean() == pytest.approx(density)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.random])
def test_a_seed_gives_the_same_bytes_whatever_else_was_drawn(name: str) -> None:
    deltas = matrices(2, seed=11)
    first = run(How(name, {"seed": 3}), deltas, [1, 1])
    torch.rand(5)
    run(How(name, {"seed": 4}), deltas, [1, 1])
    assert run(How(name, {"seed": 3}), deltas, [1, 1]).tobytes() == first.tobytes()
    assert not np.array_equal(run(How(name, {"seed": 4}), deltas, [1, 1]), first)
    assert not np.array_equal(run(How(name, {"seed": 3}), deltas, [1, 1], tensor="v"), first)


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tie", {}, "exact, svd, linear"),
        ("exact", {"density": 0.5}, "'density' is no option of exact"),
        ("ties", {"density": 0.0}, "above 0 and at most 1"),
        ("ties", {"density": 1.5}, "above 0 and at most 1"),
        ("ties", {"density": math.nan}, "above 0 and at most 1"),
        ("ties", {"density": True}, "above 0 and at most 1"),
        ("ties", {"scale": math.inf}, "a finite number"),
        ("dare_ties", {"seed": 0.5}, "a whole number of at least 0"),
        ("dare_ties", {"seed": -1}, "a whole number of at least 0"),
        ("breadcrumbs", {"density": 0.95, "gamma": 0.1}, "more than 1 together"),
        ("della", {"density": 0.9, "epsilon": 0.3}, "below 0.2"),
    ],
)
def test_options_out_of_range_are_refused_with_the_range(name: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(DeltaError) as caught:
        How(name, options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "adapters", "said"),
    [
        ("exact", [1.0, math.nan], 2, "cannot be a weight"),
        ("exact", [1.0, 1e308], 2, "1e+308 cannot be a weight"),
        ("exact", [1e-100, 1.0], 2, "1e-100 cannot be a weight"),
        ("exact", [1.0], 2, "one weight for each"),
        ("exact", [], 0, "one weight for each"),
        ("slerp", [1.0, 1.0, 1.0], 3, "takes 2 adapters"),
        ("slerp", [1.0], 1, "takes 2 adapters"),
        ("slerp", [-1.0, 2.0], 2, "at least 0"),
        ("slerp", [0.0, 0.0], 2, "at least 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(name: str, weights: list[float], adapters: int, said: str) -> None:
    with pytest.raises(DeltaError) as caught:
        How(name).check_weights(weights, adapters)
    assert said in str(caught.value)


def test_the_table_says_all_that_a_method_needs() -> None:
    assert len(METHODS) == 11
    for name, method in METHODS.items():
        assert method.summary, name
        assert method.paper, name
        assert all(option.fits(option.default) for option in method.options.values())
        assert method.random == (name in {"dare_linear", "dare_ties", "della"})
        assert method.pair == (name == "slerp")
