"""The preview against dense float64 matrices: what it says of ΔW without ever computing it as a whole."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peftkit.deltas.combining.dense_time import DenseTime, dense_time
from peftkit.deltas.delta import Absolute, Added, Delta, Deltas, LowRank, Place, Rows, Stacked
from peftkit.deltas.previewing import signs
from peftkit.deltas.previewing.page import preview_page
from peftkit.deltas.previewing.preview import Preview, preview
from peftkit.errors import DeltaError
from peftkit.events import Event, Phase, Progress


def random(m: int, n: int, k: int, seed: int, scale: float = 1.0) -> LowRank:
    draw = np.random.default_rng(seed)
    left, right = draw.standard_normal((m, k)), draw.standard_normal((k, n))
    return LowRank((m, n), torch.from_numpy(left), torch.from_numpy(right), scale)


def adapter(reference: str, changes: dict[str, Delta], layer: Any = "linear", **more: Any) -> Deltas:
    return Deltas(reference, changes, {name: Place(name, layer) for name in changes}, **more)


def dense(delta: Delta) -> np.ndarray:
    if isinstance(delta, LowRank):
        return delta.scale * (delta.left.double().numpy() @ delta.right.double().numpy())
    if isinstance(delta, Stacked):
        return np.concatenate([dense(block) for block in delta.blocks])
    assert isinstance(delta, Added)
    return delta.scale * delta.values.double().numpy().reshape(delta.matrix)


def three(seed: int = 0) -> list[Deltas]:
    """Three adapters with other ranks, scales and tensors; one of them has a bias."""
    return [
        adapter("a@1", {"p": random(12, 9, 3, seed, 2.0), "q": random(7, 10, 2, seed + 1)}),
        adapter("b@1", {"p": random(12, 9, 3, seed + 2), "bias": Added((6,), torch.arange(6.0)[None], 0.5)}),
        adapter("c@1", {"p": random(12, 9, 3, seed + 3, 0.3), "q": random(7, 10, 4, seed + 4)}),
    ]


WEIGHTS = (0.6, -0.4, 1.5)


def whole(parents: Sequence[Deltas]) -> list[np.ndarray]:
    """ΔW of each adapter as one long vector, zeros where it leaves a tensor alone."""
    names = sorted({name for parent in parents for name in parent.changes})
    size = {name: dense(parent.changes[name]).size for parent in parents for name in parent.changes}
    return [
        np.concatenate(
            [dense(p.changes[name]).ravel() if name in p.changes else np.zeros(size[name]) for name in names]
        )
        for p in parents
    ]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.tuples(*[st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.01)] * 3))
def test_every_figure_of_all_tensors(seed: int, weights: tuple[float, float, float]) -> None:
    parents = three(seed)
    found, vectors = preview(parents, weights), whole(parents)
    every = found.overall
    assert every.norms == pytest.approx([np.linalg.norm(v) for v in vectors], rel=1e-11)
    total = sum(w * v for w, v in zip(weights, vectors, strict=True))
    separate = sum(abs(w) * np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
    assert every.combined_norm == pytest.approx(np.linalg.norm(total), rel=1e-10)
    assert every.cancellation == pytest.approx(1 - np.linalg.norm(total) / separate, abs=1e-10)
    for pair, (v, w) in zip(every.pairs, itertools.combinations(vectors, 2), strict=True):
        assert pair.cosine == pytest.approx(v @ w / np.linalg.norm(v) / np.linalg.norm(w), abs=1e-11)
    stacked = np.stack([w * v for w, v in zip(weights, vectors, strict=True)])
    mass = np.abs(stacked).sum(0)
    disagree = (stacked > 0).any(0) & (stacked < 0).any(0)
    assert every.sign_conflict is not None
    assert every.outvoted is not None
    # 4,096 entries hold all of these tensors, so that nothing is estimated.
    assert (every.sign_conflict.error, every.outvoted.error) == (0, 0)
    assert every.sign_conflict.share == pytest.approx(mass[disagree].sum() / mass.sum(), abs=1e-12)
    weaker = np.minimum(np.clip(stacked, 0, None).sum(0), np.clip(-stacked, 0, None).sum(0))
    assert every.outvoted.share == pytest.approx(weaker.sum() / mass.sum(), abs=1e-12)


def test_spectrum_ranks_and_residuals_of_cutting_every_tensor_to_one_rank() -> None:
    parents = three()
    found = preview(parents, WEIGHTS, ranks=(1, 2, 3, 50))
    sums = {
        name: sum(w * dense(p.changes[name]) for w, p in zip(WEIGHTS, parents, strict=True) if name in p.changes)
        for name in ("p", "q", "bias")
    }
    values = [np.linalg.svd(each, compute_uv=False) for each in sums.values()]
    energy = sum(float((each**2).sum()) for each in values)

    def left_out(rank: int) -> float:
        return sum(float((each[rank:] ** 2).sum()) for each in values)

    for rank, residual in found.residuals.items():
        assert residual == pytest.approx(math.sqrt(left_out(rank) / energy), abs=1e-11)
    for share, rank in found.ranks.items():
        assert left_out(rank) <= (1 - share / 100) * energy < left_out(rank - 1)
    assert found.spectrum[0] == pytest.approx(math.sqrt(sum(each[0] ** 2 for each in values)))
    assert found.exact_rank == 9
    # p: 9 directions of 12 + 9 numbers, q: 6 of 7 + 10, both float64; the bias: a row of 6 float32 and the number 1.
    assert found.exact_bytes == 8 * (9 * 21 + 6 * 17) + 4 * 7


def test_each_tensor() -> None:
    parents = three()
    found = {tensor.name: tensor for tensor in preview(parents, WEIGHTS).tensors}
    assert list(found) == ["bias", "p", "q"]
    assert found["q"].ranks == (2, None, 4)
    assert found["q"].figures.norms[1] is None
    assert [pair.cosine for pair in found["q"].figures.pairs].count(None) == 2
    one, other = parents[0].changes["p"], parents[1].changes["p"]
    assert isinstance(one, LowRank)
    assert isinstance(other, LowRank)
    pair = found["p"].figures.pairs[0]
    for angles, sides in (
        (pair.write, (one.left.numpy(), other.left.numpy())),
        (pair.read, (one.right.numpy().T, other.right.numpy().T)),
    ):
        cosines = np.cos(subspace_angles(*sides))
        assert angles is not None
        assert (angles.mean, angles.min, angles.max) == pytest.approx((cosines.mean(), cosines.min(), cosines.max()))
    assert found["bias"].figures.pairs[0].write is None


def test_angles_of_all_tensors_are_the_mean_over_those_that_both_change() -> None:
    found = preview(three(), WEIGHTS)
    tensors = {tensor.name: tensor.figures.pairs[1] for tensor in found.tensors}  # a and c
    p, q, overall = tensors["p"].read, tensors["q"].read, found.overall.pairs[1].read
    assert p is not None
    assert q is not None
    assert overall is not None
    assert overall.mean == pytest.approx((p.mean + q.mean) / 2)
    assert overall.max == max(p.max, q.max)


@pytest.mark.parametrize("layer", ["linear", "conv1d", "embedding"])
def test_averaged_factors_as_peft_averages_them(layer: str) -> None:
    """PEFT 0.21, add_weighted_adapter("linear"): √|w s| on both factors, the sign of w on lora_A, written out here."""
    ones = [random(8, 6, 2, seed, scale) for seed, scale in ((1, 2.0), (2, 0.5), (3, 1.0))]
    weights = (0.7, -0.2, 0.5)
    if layer == "linear":
        pairs = [(d.left.numpy(), d.right.numpy()) for d in ones]
    else:  # the file has the transposed weight: B is the right factor
        pairs = [(d.right.numpy().T, d.left.numpy().T) for d in ones]
    roots = [math.sqrt(abs(w * d.scale)) for w, d in zip(weights, ones, strict=True)]
    b = sum(root * pair[0] for root, pair in zip(roots, pairs, strict=True))
    a = sum(math.copysign(root, w) * pair[1] for root, w, pair in zip(roots, weights, pairs, strict=True))
    true = sum(w * d.scale * (pair[0] @ pair[1]) for w, d, pair in zip(weights, ones, pairs, strict=True))
    found = preview([adapter(f"{i}@1", {"w": d}, layer) for i, d in enumerate(ones)], weights)
    assert found.overall.linear_error == pytest.approx(np.linalg.norm(b @ a - true) / np.linalg.norm(true), rel=1e-10)
    assert preview(three(), WEIGHTS).overall.linear_error is None  # the ranks of q differ


def test_averaged_factors_agree_with_peft_itself() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False)),
        LoraConfig(r=2, lora_alpha=6, target_modules=["0"]),
        "one",
    )
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name in ("one", "two"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
    weights = (0.7, -0.3)
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type="linear")
    true = sum(w * layer.get_delta_weight(name) for w, name in zip(weights, ("one", "two"), strict=True))
    error = (layer.get_delta_weight("both") - true).norm() / true.norm()
    parents = [
        adapter(n, {"w": LowRank((8, 6), layer.lora_B[n].weight.data, layer.lora_A[n].weight.data, layer.scaling[n])})
        for n in ("one", "two")
    ]
    # PEFT computes in float32.
    assert preview(parents, weights).overall.linear_error == pytest.approx(error.item(), rel=1e-5)


def both(one: LowRank, other: LowRank, weights: Sequence[float] = (1.0, 1.0)) -> Preview:
    return preview([adapter("a@1", {"w": one}), adapter("b@1", {"w": other})], weights)


def test_known_cases() -> None:
    one = random(8, 6, 2, 0)
    minus = LowRank(one.shape, -one.left, one.right)
    opposite = both(one, minus)
    assert opposite.overall.pairs[0].cosine == pytest.approx(-1, abs=1e-12)
    assert opposite.overall.cancellation == pytest.approx(1, abs=1e-12)
    assert opposite.overall.sign_conflict == signs.Estimate(1.0, 0.0)
    assert opposite.overall.outvoted is not None
    assert opposite.overall.outvoted.share == pytest.approx(0.5)

    equal = both(one, LowRank(one.shape, one.left * 4, one.right / 4))
    assert equal.overall.pairs[0].cosine == pytest.approx(1, abs=1e-12)
    assert equal.overall.cancellation == pytest.approx(0, abs=1e-12)
    assert equal.overall.sign_conflict == signs.Estimate(0.0, 0.0)
    assert equal.overall.pairs[0].write is not None
    assert equal.overall.pairs[0].write.min == pytest.approx(1)

    axes = torch.eye(8, dtype=torch.float64)
    first = LowRank((8, 8), axes[:, :2], axes[:2])
    second = LowRank((8, 8), axes[:, 2:4], axes[2:4])
    apart = both(first, second)
    write, read = apart.overall.pairs[0].write, apart.overall.pairs[0].read
    assert write is not None
    assert read is not None
    assert (apart.overall.pairs[0].cosine, write.max, read.max) == (0, 0, 0)
    assert apart.overall.cancellation == pytest.approx(1 - 2 / (2 * math.sqrt(2)))
    assert apart.spectrum == pytest.approx([1, 1, 1, 1])
    assert apart.ranks == {95: 4, 99: 4}

    nothing = both(one, one, (0.0, 0.0))
    assert (nothing.overall.cancellation, nothing.overall.sign_conflict) == (None, None)
    assert nothing.residuals[8] is None
    assert nothing.tables()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5))
def test_figures_do_not_depend_on_the_gauge(seed: int, stretch: float) -> None:
    """But for PEFT's averaged factors, which do: that they change with B · t, A / t is what is wrong with them."""
    one, other = random(9, 7, 3, seed), random(9, 7, 3, seed + 1)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]) * stretch
    turned = LowRank(one.shape, one.left @ turn, torch.linalg.inv(turn) @ one.right)
    before, after = both(one, other, (0.5, 0.5)), both(turned, other, (0.5, 0.5))
    assert before.overall.linear_error != after.overall.linear_error

    def figures(found: Preview) -> list[float]:
        every, pair = found.overall, found.overall.pairs[0]
        assert pair.write is not None
        assert pair.read is not None
        assert every.sign_conflict is not None
        return [*every.norms, pair.cosine, pair.write.mean, pair.read.max, every.cancellation,
                every.sign_conflict.share, *found.spectrum]  # fmt: skip

    assert figures(after) == pytest.approx(figures(before), abs=1e-9)


def test_the_sampled_conflict_is_within_its_error() -> None:
    """400 draws: as many within 1 and 2 standard errors as a normal distribution has (68.3 % and 95.4 %)."""
    deltas, weights = [random(60, 50, 2, 1, 3.0), random(60, 50, 2, 2), random(60, 50, 2, 3)], (1.0, -1.0, 0.5)
    values = np.stack([w * dense(d) for w, d in zip(weights, deltas, strict=True)])
    mass = np.abs(values).sum(0)
    exact = mass[(values > 0).any(0) & (values < 0).any(0)].sum() / mass.sum()
    weaker = np.minimum(np.clip(values, 0, None).sum(0), np.clip(-values, 0, None).sum(0)).sum() / mass.sum()
    for estimate, true in ((signs.conflict, exact), (signs.outvoted, weaker)):
        off = []
        for seed in range(400):
            found = estimate([signs.sample(deltas, weights, "w", seed, 300)])
            assert found is not None
            assert found.error > 0
            off.append((found.share - true) / found.error)
        within = [float((np.abs(off) < k).mean()) for k in (1, 2)]
        # A share of 400 draws is itself known to 2.3 % and 1 %; four times that.
        assert within[0] == pytest.approx(0.683, abs=0.093)
        assert within[1] == pytest.approx(0.954, abs=0.042)
        assert abs(float(np.mean(off))) < 4 / math.sqrt(400) + 0.1  # a ratio estimate has a bias of order 1 / sample


def test_strata_of_unlike_size_are_weighed_by_their_entries() -> None:
    small = [random(4, 4, 2, 1), random(4, 4, 2, 2)]
    large = [random(40, 50, 2, 3), random(40, 50, 2, 4)]
    values = [np.stack([dense(d) for d in each]) for each in (small, large)]
    mass = sum(np.abs(v).sum() for v in values)
    conflict = sum(np.abs(v).sum(0)[(v > 0).any(0) & (v < 0).any(0)].sum() for v in values)
    found = signs.conflict([signs.sample(each, (1, 1), "w", 0, 1500) for each in (small, large)])
    assert found is not None
    assert abs(found.share - conflict / mass) < 4 * found.error


def test_same_seed_same_sample_whatever_else_there_is() -> None:
    parents = [adapter(f"{i}@1", {"w": random(90, 80, 2, i)}) for i in range(2)]
    more = [adapter(f"{i}@1", {"a": random(90, 80, 2, 9), "w": random(90, 80, 2, i)}) for i in range(2)]
    one, again = (preview(parents, (1, 1), sample=500, seed=3).tensors[0] for _ in range(2))
    beside = preview(more, (1, 1), sample=500, seed=3).tensors[1]
    other = preview(parents, (1, 1), sample=500, seed=4).tensors[0]
    assert one == again == beside
    assert one.figures.sign_conflict != other.figures.sign_conflict


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_iter(out) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("count", [2, 6])
def test_cost_grows_with_the_ranks_never_with_rows_times_columns(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which measures one piece of 384 × 384, whatever the tensors are.
    monkeypatch.setattr("peftkit.deltas.previewing.preview.dense_time", lambda matrices: DenseTime(0.0, 0.0))
    rows, columns, rank, sample = 3000, 2000, 4, 500
    parents = [adapter(f"{i}@1", {"w": random(rows, columns, rank, i)}) for i in range(count)]
    with LargestTensor() as seen:
        preview(parents, [1.0] * count, sample=sample)
    assert 0 < seen.elements <= (rows + columns) * rank * count + sample * rank < rows * columns / 40


@dataclass(frozen=True)
class Elsewhere(Absolute):
    kind: ClassVar[str] = "DoRA"
    shape: tuple[int, ...]

    def merged(self, first: int, last: int, base: Rows) -> torch.Tensor:
        raise AssertionError("the base is not there")


def test_what_has_no_factors_is_named() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    parents = [
        adapter("a@1", {"w": random(5, 4, 2, 0), "x": Elsewhere((5, 4)), "y": Added((3, 4), values, 2.0)}),
        adapter("b@1", {"w": random(6, 4, 2, 1)}),
    ]
    found = preview(parents, (1, 1))
    missing = {(each.reference, each.tensor): each for each in found.not_shown}
    assert set(missing) == {("a@1", "x"), ("a@1", "y"), ("b@1", "w")}
    assert missing["a@1", "x"].norm is None
    assert "base" in missing["a@1", "x"].reason
    assert missing["a@1", "y"].norm == pytest.approx(2 * float(values.norm()))
    assert missing["b@1", "w"].reason == "it is 6 × 4, that of the first 5 × 4"
    assert [tensor.name for tensor in found.tensors] == ["w"]
    shown = [row[0] for table in found.tables() for row in table.rows]
    assert {"not shown: w", "not shown: x", "not shown: y"} <= set(shown)
    alone = preview([adapter("a@1", {"x": Elsewhere((5, 4))})], (1,))
    assert (alone.tensors, alone.spectrum, alone.overall.linear_error) == ((), (), None)


def test_experts_are_matrices_of_their_own() -> None:
    blocks = [tuple(random(5, 4, 2, 10 * adapter_ + expert) for expert in range(3)) for adapter_ in range(2)]
    parents = [adapter(f"{i}@1", {"w": Stacked((3, 5, 4), each)}, "experts") for i, each in enumerate(blocks)]
    found = preview(parents, (1, -1), ranks=(2,))
    vectors = whole(parents)
    assert found.overall.norms == pytest.approx([np.linalg.norm(v) for v in vectors])
    sums = [dense(a) - dense(b) for a, b in zip(*blocks, strict=True)]
    values = [np.linalg.svd(each, compute_uv=False) for each in sums]
    want = math.sqrt(sum((v[2:] ** 2).sum() for v in values) / sum((v**2).sum() for v in values))
    assert found.residuals[2] == pytest.approx(want)
    assert (found.exact_rank, found.exact_bytes) == (4, 3 * 4 * 9 * 8)
    cosines = np.cos(np.concatenate([subspace_angles(a.left, b.left) for a, b in zip(*blocks, strict=True)]))
    write = found.overall.pairs[0].write
    assert write is not None
    assert write.mean == pytest.approx(cosines.mean())


def test_a_tied_head_counts_where_another_adapter_unties_it() -> None:
    tied = adapter("a@1", {"embed": random(6, 4, 2, 0)}, "embedding")
    untied = adapter("b@1", {"head": random(6, 4, 2, 1)}, sources={"head": "embed"})
    found = {tensor.name: tensor.ranks for tensor in preview([tied, untied], (1, 1)).tensors}
    assert found == {"embed": (2, None), "head": (2, 2)}


@pytest.mark.parametrize("weights", [(1.0,), (1.0, math.nan), (math.inf, 1.0), ()])
def test_weights_that_are_none(weights: tuple[float, ...]) -> None:
    with pytest.raises(DeltaError, match="weight"):
        preview(three()[:2], weights)


def test_dense_time_is_scaled_from_one_piece() -> None:
    times = iter(range(0, 10_000, 1))
    # Each call of the clock is one second later: a piece takes 1 s, whatever it is.
    found = dense_time([(384, 384, 2), (768, 384, 1)], clock=lambda: float(next(times)))
    assert found.entries_seconds == pytest.approx(2 + 2)
    assert found.svd_seconds == pytest.approx(1 + 2)
    assert found.seconds == found.entries_seconds + found.svd_seconds
    assert dense_time([]).seconds == 0


def test_record_tables_and_page() -> None:
    evil = "<script>alert(1)</script>@1"
    parents = [adapter(evil, three()[0].changes | {"<b>": Elsewhere((5, 4))}), *three()[1:]]
    events: list[Event] = []
    found = preview(parents, WEIGHTS, report=events.append)
    assert events[0] == Phase("preview", 4, "tensors")
    assert events[-1] == Progress(4, {})
    record = found.as_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["dense_seconds"] == found.dense_seconds
    assert "do not say" in record["descriptive"]
    facts = found.tables()[0]
    assert facts.rows[0][0].startswith("dense methods")  # before anything else
    assert any("sampled" in str(value) for _, value in facts.rows)
    page = preview_page(found)
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("<svg") == 5  # three of pairs, the spectrum, the norms
    assert "95 % at" in page
    assert "http-equiv" in page
    assert "do not say" in page
    assert 'src="' not in page
    assert "url(" not in page
