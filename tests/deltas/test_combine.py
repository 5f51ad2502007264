"""Combining on the true ΔW: exactness, the cost of a rank, what is refused, and the same for a direct merge."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peftkit.base.dense import Dense, dense_tensors
from peftkit.deltas.combining.combine import Combined, combine
from peftkit.deltas.combining.lineup import rows_of
from peftkit.deltas.combining.methods import METHODS, How
from peftkit.deltas.combining.together import merged_deltas
from peftkit.deltas.delta import Absolute, Added, Delta, Deltas, LowRank, Place, Rows, Stacked
from peftkit.deltas.merging.receipt import digest_of
from peftkit.deltas.reading.products import Hadamard
from peftkit.errors import DeltaError
from peftkit.events import Event, Note, Phase

SHAPES = {"a": (12, 20), "b": (16, 10), "c": (9, 14), "conv": (6, 3, 2, 2), "experts": (3, 8, 10), "wte": (30, 8)}
PLACES = {
    **{name: Place(f"model.{name}", "linear") for name in "abc"},
    "conv": Place("model.conv", "conv"),
    "experts": Place("model.experts", "experts", "up"),
    "wte": Place("model.wte", "embedding"),
    "bias": Place("model.a", "bias", "bias"),
    "norm": Place("model.norm", "other"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Dense]:
    """A real file of random tensors, one for each name."""
    folder = tmp_path_factory.mktemp("base")
    made = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
    tensors |= {"bias": torch.randn(12, generator=made), "norm": torch.randn(7, generator=made)}
    save_file(tensors, str(folder / "model.safetensors"))
    return dense_tensors(folder)


def low(shape: tuple[int, ...], rank: int, random: np.random.Generator, scale: float) -> LowRank:
    left = torch.from_numpy(random.standard_normal((shape[0], rank))).float()
    right = torch.from_numpy(random.standard_normal((rank, math.prod(shape[1:])))).float()
    return LowRank(shape, left, right, scale)


def adapter(name: str, ranks: Mapping[str, int], seed: int, scale: float = 1.0, bias: bool = False) -> Deltas:
    """Random float32 factors: for each tensor of its rank."""
    random = np.random.default_rng(seed)
    changes: dict[str, Delta] = {}
    for tensor, rank in ranks.items():
        shape = SHAPES[tensor]
        if tensor == "experts":
            changes[tensor] = Stacked(shape, tuple(low(shape[1:], rank, random, scale) for _ in range(shape[0])))
        else:
            changes[tensor] = low(shape, rank, random, scale)
    if bias:
        changes["bias"] = Added((12,), torch.from_numpy(random.standard_normal((1, 12))).float(), scale)
    return Deltas(name, changes, {tensor: PLACES[tensor] for tensor in changes})


def product(delta: Delta) -> np.ndarray:
    """scale · B @ A in float64 numpy, of each expert one below the other."""
    if isinstance(delta, Stacked):
        return np.concatenate([product(block) for block in delta.blocks])
    if isinstance(delta, Added):
        return delta.scale * delta.values.numpy().astype(np.float64).reshape(1, -1)
    assert isinstance(delta, LowRank)
    return delta.scale * (delta.left.numpy().astype(np.float64) @ delta.right.numpy().astype(np.float64))


def total(parents: list[Deltas], weights: list[float]) -> dict[str, np.ndarray]:
    """Σ wᵢ sᵢ Bᵢ Aᵢ of each tensor."""
    found: dict[str, np.ndarray] = {}
    for parent, weight in zip(parents, weights, strict=True):
        for name, delta in parent.changes.items():
            found[name] = found.get(name, 0) + weight * product(delta)
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-300))


class Swapped(Absolute):
    """Another tensor takes the base's place."""

    kind: ClassVar[str] = "DoRA"

    def __init__(self, values: torch.Tensor) -> None:
        self.shape, self.values = tuple(values.shape), values

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        return self.values.reshape(self.matrix)[first:last].double()


def mixed() -> list[Deltas]:
    """Ranks, scalings and tensors that differ."""
    return [
        adapter("one@1", {"a": 2, "b": 3, "experts": 2, "conv": 2}, seed=1, scale=0.5, bias=True),
        adapter("two@1", {"a": 4, "c": 1, "experts": 1, "wte": 2}, seed=2, scale=16 / math.sqrt(4)),
        adapter("three@1", {"a": 1, "b": 1, "conv": 1, "wte": 3}, seed=3, scale=2.0, bias=True),
    ]


WEIGHTS = [0.7, -0.4, 1.3]


# --- exact ---


def test_exact_is_the_weighted_sum_of_the_true_deltas(base: Mapping[str, Dense]) -> None:
    parents = mixed()
    combined = combine(parents, WEIGHTS, How("exact"), base)
    expected = total(parents, WEIGHTS)
    assert set(combined.changes) == set(expected) == {"a", "b", "c", "conv", "experts", "wte", "bias"}
    for name, delta in combined.changes.items():
        assert error(product(delta), expected[name]) < 1e-12, name
        assert combined.places[name] == PLACES[name]
    assert isinstance(combined.changes["a"], LowRank)
    assert combined.changes["a"].rank == 7
    assert combined.residual == 0
    norms = {measured.name: measured.norm for measured in combined.tensors}
    assert norms == pytest.approx({name: float(np.linalg.norm(value)) for name, value in expected.items()})


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(-2, 2).filter(lambda weight: not 0 < abs(weight) < 1e-5), min_size=3, max_size=3))
def test_order_does_not_matter_and_doubled_weights_double(base: Mapping[str, Dense], weights: list[float]) -> None:
    parents = mixed()
    first = combine(parents, weights, How("exact"), base)
    doubled = combine(parents, [2 * weight for weight in weights], How("exact"), base)
    for order in itertools.permutations(range(3)):
        again = combine([parents[i] for i in order], [weights[i] for i in order], How("exact"), base)
        for name, delta in first.changes.items():
            np.testing.assert_allclose(product(again.changes[name]), product(delta), atol=1e-12)
    for name, delta in first.changes.items():
        np.testing.assert_allclose(product(doubled.changes[name]), 2 * product(delta), atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "svd", "linear", "ties", "magnitude_prune", "breadcrumbs", "knots"])
def test_an_adapter_cancels_itself(base: Mapping[str, Dense], name: str) -> None:
    parent = mixed()[0]
    how = How(name)
    combined = combine([parent, parent], [0.8, -0.8], how, base, rank=20 if how.entry.ranked else None)
    assert combined.changes
    for tensor, delta in combined.changes.items():
        assert np.abs(product(delta)).max() < 1e-12, tensor
    assert combined.residual <= 1e-6 or combined.norm < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_of_weight_1_is_itself(base: Mapping[str, Dense], name: str) -> None:
    """For every method, at density 1; slerp by a second adapter of weight 0."""
    parents, weights = [mixed()[0]], [1.0]
    how = How(name, {key: v for key, v in {"density": 1.0, "gamma": 0.0}.items() if key in METHODS[name].options})
    if how.entry.pair:
        parents, weights = [*parents, adapter("other@1", {"a": 2}, seed=9)], [1.0, 0.0]
    combined = combine(parents, weights, how, base, rank=4 if how.entry.ranked else None)
    for tensor, delta in parents[0].changes.items():
        assert error(product(combined.changes[tensor]), product(delta)) < 1e-6, tensor


# --- a rank ---


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_rank_costs_what_eckart_and_young_say(base: Mapping[str, Dense], rank: int) -> None:
    parents = mixed()
    combined = combine(parents, WEIGHTS, How("svd"), base, rank=rank, max_residual=1)
    for name, expected in total(parents, WEIGHTS).items():
        measured = next(found for found in combined.tensors if found.name == name)
        delta = combined.changes[name]
        off = np.linalg.norm(product(delta) - expected)
        assert off == pytest.approx(measured.error, abs=1e-9 * np.linalg.norm(expected)), name
        if isinstance(delta, LowRank):
            values = np.linalg.svd(expected, compute_uv=False)
            assert off == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), rel=1e-5, abs=1e-9), name
            assert delta.rank <= rank
    errors, norms = ([getattr(found, key) for found in combined.tensors] for key in ("error", "norm"))
    assert combined.residual == pytest.approx(math.hypot(*errors) / math.hypot(*norms))


def test_a_rank_that_costs_too_much_is_refused_with_the_rank_that_is_enough(base: Mapping[str, Dense]) -> None:
    parents = mixed()
    with pytest.raises(DeltaError) as caught:
        combine(parents, WEIGHTS, How("svd"), base, rank=2)
    said = str(caught.value)
    assert "off by" in said
    assert "at most 5.0%" in said
    enough = int(said.split("--rank ")[1].split(",")[0])
    combined = combine(parents, WEIGHTS, How("svd"), base, rank=enough)
    assert combined.residual <= 0.05
    with pytest.raises(DeltaError):
        combine(parents, WEIGHTS, How("svd"), base, rank=enough - 1)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "exact"])
def test_every_method_states_what_its_rank_costs(base: Mapping[str, Dense], name: str) -> None:
    """The stated error is that of the factors against the same method merged directly, which has no rank."""
    parents, weights = mixed()[:2], [0.6, 0.4]
    combined = combine(parents, weights, How(name), base, rank=5, max_residual=2)
    direct = merged_deltas(parents, weights, How(name), base)
    for measured in combined.tensors:
        whole = (
            direct.changes[measured.name]
            .dense(rows_of(base[measured.name], direct.changes[measured.name].matrix[1]))
            .numpy()
        )
        assert np.linalg.norm(whole) == pytest.approx(measured.norm, rel=1e-9), measured.name
        off = float(np.linalg.norm(product(combined.changes[measured.name]) - whole))
        assert off == pytest.approx(measured.error, abs=1e-9 * measured.norm), measured.name
    full = combine(parents, weights, How(name), base, rank=30)
    for tensor, delta in full.changes.items():
        whole = direct.changes[tensor].dense(rows_of(base[tensor], delta.matrix[1])).numpy()
        assert error(product(delta), whole) < 1e-9, tensor


def test_the_result_is_the_same_to_the_byte_for_a_seed_and_other_tensors_do_not_matter(
    base: Mapping[str, Dense],
) -> None:
    parents = mixed()[:2]
    how = How("dare_ties", {"seed": 5})

    def factors(given: list[Deltas]) -> dict[str, bytes]:
        made = combine(given, [1, 1], how, base, rank=9, max_residual=2)
        kept = {name: delta for name, delta in made.changes.items() if isinstance(delta, LowRank)}
        return {name: delta.left.numpy().tobytes() + delta.right.numpy().tobytes() for name, delta in kept.items()}

    first = factors(parents)
    torch.rand(3)
    assert factors(parents) == first
    only = [Deltas(p.reference, {"a": p.changes["a"]}, {"a": PLACES["a"]}) for p in parents]
    assert factors(only) == {"a": first["a"]}


def test_rows_are_outputs_also_where_the_file_has_them_as_columns(base: Mapping[str, Dense]) -> None:
    """KnOTS shares outputs: an embedding's are its columns, as a Conv1D's. Transposed, it is the same."""
    parents = [adapter(f"{seed}@1", {"wte": 2}, seed) for seed in (1, 2)]
    combined = combine(parents, [1, 1], How("knots", {"density": 0.5}), base, rank=8)
    flipped = []
    for parent in parents:
        delta = parent.changes["wte"]
        assert isinstance(delta, LowRank)
        flipped.append(LowRank((8, 30), delta.right.T, delta.left.T))
    how = How("knots", {"density": 0.5})
    assert how.entry.factored is not None
    expected = product(how.entry.factored(flipped, [1, 1], how.values)).T
    np.testing.assert_allclose(product(combined.changes["wte"]), expected, atol=1e-10)


# --- kinds without factors ---


def replacing(name: str = "dora@2") -> Deltas:
    """A tensor that takes the base's place."""
    values = torch.from_numpy(np.random.default_rng(8).standard_normal(SHAPES["b"]))
    return Deltas(name, {"b": Swapped(values)}, {"b": PLACES["b"]})


def test_exact_refuses_all_kinds_without_factors_by_name(base: Mapping[str, Dense]) -> None:
    other = Deltas(
        "odd@1",
        {"a": Added(SHAPES["a"], torch.ones(SHAPES["a"])), "c": Swapped(torch.ones(SHAPES["c"]))},
        {"a": PLACES["a"], "c": PLACES["c"]},
    )
    with pytest.raises(DeltaError) as caught:
        combine([mixed()[0], replacing(), other], [1, 1, 1], How("exact"), base)
    said = str(caught.value)
    for name in ("DoRA of dora@2: b", "DoRA of odd@1: c", "values of odd@1: a", "--method svd --rank R"):
        assert name in said


def test_svd_takes_their_delta_on_this_base_and_says_so(base: Mapping[str, Dense]) -> None:
    events: list[Event] = []
    parents = [mixed()[0], replacing()]
    combined = combine(parents, [0.5, 2], How("svd"), base, rank=10, report=events.append)
    swapped = parents[1].changes["b"]
    assert isinstance(swapped, Swapped)
    held = base["b"].part().reshape(SHAPES["b"]).astype(np.float64)
    expected = 0.5 * product(parents[0].changes["b"]) + 2 * (swapped.values.numpy() - held)
    assert error(product(combined.changes["b"]), expected) < 1e-9
    assert combined.converted == {"b of dora@2": "DoRA"}
    assert any(isinstance(event, Note) and "DoRA" in event.text for event in events)
    assert any(isinstance(event, Phase) and event.total == len(combined.tensors) for event in events)


def test_what_no_lora_layer_holds_is_refused_by_name_for_an_adapter_only(base: Mapping[str, Dense]) -> None:
    norm = Deltas("norms@1", {"norm": Added((7,), torch.ones(1, 7))}, {"norm": PLACES["norm"]})
    for name in METHODS:
        how = How(name)
        with pytest.raises(DeltaError) as caught:
            combine([mixed()[0], norm], [1, 1], how, base, rank=8 if how.entry.ranked else None)
        assert "values of norms@1: norm" in str(caught.value)
        assert "peftkit merge" in str(caught.value)
    direct = merged_deltas([mixed()[0], norm], [1, 0.5], How("exact"), base)
    rows = rows_of(base["norm"], 7)
    np.testing.assert_allclose(direct.changes["norm"].dense(rows).numpy(), np.full((1, 7), 0.5))


# --- directly ---


@pytest.mark.parametrize("name", ["exact", "ties", "dare_linear", "knots"])
@pytest.mark.parametrize("step", [1, 5, 100])
def test_a_direct_merge_gives_any_rows_of_any_kind(base: Mapping[str, Dense], name: str, step: int) -> None:
    parents = [*mixed()[:2], replacing()]
    how = How(name)
    direct = merged_deltas(parents, [0.5, 0.3, 0.2], how, base)
    assert set(direct.changes) == {"a", "b", "c", "conv", "experts", "wte", "bias"}
    for tensor, delta in direct.changes.items():
        rows = rows_of(base[tensor], delta.matrix[1])
        height = delta.matrix[0]
        whole = torch.cat([delta.merged(i, min(i + step, height), rows) for i in range(0, height, step)])
        np.testing.assert_allclose(whole, rows(0, height) + delta.dense(rows), atol=1e-12)
    if name == "exact":
        expected = total(mixed()[:1], [0.5])["b"] + 0.2 * parents[2].changes["b"].dense(rows_of(base["b"], 10)).numpy()
        np.testing.assert_allclose(direct.changes["b"].dense(rows_of(base["b"], 10)), expected, atol=1e-12)


def test_a_prepared_dense_result_is_computed_once(base: Mapping[str, Dense]) -> None:
    delta = merged_deltas(mixed()[:2], [1, 1], How("ties"), base).changes["a"]
    rows = rows_of(base["a"], 20)
    reads: list[tuple[int, int]] = []

    def counted(first: int, last: int) -> torch.Tensor:
        reads.append((first, last))
        return rows(first, last)

    ready = delta.prepared(counted)
    before = len(reads)
    whole = torch.cat([ready.change(first, first + 3, counted) for first in range(0, 12, 3)])
    assert torch.equal(whole, delta.change(0, 12, rows))
    assert len(reads) == before
    assert torch.equal(ready.merged(3, 6, rows), rows(3, 6) + whole[3:6])


# --- parents that do not fit ---


def test_different_shapes_and_unknown_tensors_are_named(base: Mapping[str, Dense]) -> None:
    one = adapter("one@1", {"a": 2, "b": 2}, seed=1)
    other = Deltas(
        "two@1",
        {"a": LowRank((12, 21), torch.ones(12, 1), torch.ones(1, 21)), "z": one.changes["b"]},
        {"a": PLACES["a"], "z": PLACES["b"]},
    )
    with pytest.raises(DeltaError) as caught:
        combine([one, other], [1, 1], How("exact"), base)
    assert "a has different shapes: one@1 [12, 20], two@1 [12, 21]" in str(caught.value)
    assert "z of two@1 is not a tensor of the base" in str(caught.value)


def test_an_untied_head_gets_what_the_other_does_to_both(base: Mapping[str, Dense]) -> None:
    """One adapter changes the head alone, the other the matrix that is both: the head gets both changes."""
    head = low(SHAPES["wte"], 1, np.random.default_rng(5), 1.0)
    untied = Deltas("head@1", {"head": head}, {"head": Place("head", "linear")}, {"head": "wte"})
    both = adapter("both@1", {"wte": 2}, seed=6)
    combined = combine([untied, both], [1, 0.5], How("exact"), base)
    shared = 0.5 * product(both.changes["wte"])
    np.testing.assert_allclose(product(combined.changes["wte"]), shared, atol=1e-12)
    np.testing.assert_allclose(product(combined.changes["head"]), product(head) + shared, atol=1e-12)
    assert combined.deltas.sources == {"head": "wte"}
    assert combined.places["head"] == Place("head", "linear")
    embedding_only = Deltas("in@1", both.changes, both.places, {"head": "wte"})
    shared = Deltas("both@1", both.changes, both.places, shared={"wte": Place("head", "linear")})
    parted = combine([embedding_only, shared], [1, 0.5], How("exact"), base)
    np.testing.assert_allclose(product(parted.changes["head"]), 0.5 * product(both.changes["wte"]), atol=1e-12)
    np.testing.assert_allclose(product(parted.changes["wte"]), 1.5 * product(both.changes["wte"]), atol=1e-12)
    assert parted.places["head"] == Place("head", "linear")
    assert parted.deltas.shared == {}
    assert combine([shared], [1], How("exact"), base).deltas.shared == shared.shared
    clash = Deltas("odd@1", {"head": head}, {"head": Place("head", "linear")}, {"head": "other"})
    with pytest.raises(DeltaError, match="head"):
        combine([untied, clash], [1, 1], How("exact"), base)


@pytest.mark.parametrize(
    ("how", "given", "said"),
    [
        (How("svd"), {}, "needs the rank"),
        (How("exact"), {"rank": 4}, "--method svd --rank 4"),
        (How("svd"), {"rank": 0}, "at least 1"),
        (How("svd"), {"rank": 2, "max_residual": math.nan}, "max_residual"),
    ],
)
def test_a_rank_that_makes_no_sense_is_refused(
    base: Mapping[str, Dense], how: How, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(DeltaError) as caught:
        combine(mixed(), WEIGHTS, how, base, **given)
    assert said in str(caught.value)


# --- the receipt ---


def test_the_record_is_plain_json_and_says_all(base: Mapping[str, Dense], tmp_path: Path) -> None:
    how = How("ties", {"density": 0.9})
    combined: Combined = combine([mixed()[0], replacing()], [1, 0.5], how, base, rank=10, max_residual=2)
    record = combined.as_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["options"] == {"density": 0.9, "scale": 1.0}
    assert record["parents"] == [{"reference": "one@1", "weight": 1.0}, {"reference": "dora@2", "weight": 0.5}]
    assert [t["name"] for t in record["tensors"]] == sorted(combined.changes)
    assert record["residual"] == combined.residual > 0
    assert combined.deltas.reference == "ties(one@1:1, dora@2:0.5)"


def test_a_direct_merge_has_the_same_digest_in_every_process(base: Mapping[str, Dense]) -> None:
    """A resumed merge recognises its input by it."""
    first, again = (merged_deltas(mixed()[:2], [1, 0.5], How("ties"), base) for _ in range(2))
    assert digest_of(first) == digest_of(again)
    assert digest_of(merged_deltas(mixed()[:2], [1, 0.4], How("ties"), base)) != digest_of(first)
    assert digest_of(merged_deltas(mixed()[:2], [1, 0.5], How("ties", {"density": 0.3}), base)) != digest_of(first)


def test_a_loha_is_combined_exactly_as_the_lora_that_it_is(base: Mapping[str, Dense]) -> None:
    random = np.random.default_rng(11)
    one, two = (low((12, 20), 2, random, 1.5) for _ in range(2))
    loha = Deltas("loha@1", {"a": Hadamard((12, 20), one, two, 0.5)}, {"a": PLACES["a"]})
    lora = adapter("lora@1", {"a": 2}, seed=3)
    combined = combine([loha, lora], [0.7, -1.0], How("exact"), base)
    expected = 0.7 * 0.5 * product(one) * product(two) - product(lora.changes["a"])
    np.testing.assert_allclose(product(combined.changes["a"]), expected, atol=1e-12)
    assert (combined.changes["a"].rank, combined.residual, dict(combined.converted)) == (6, 0, {})
