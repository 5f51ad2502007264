"""Layouts: whatever the slots, every token meets its own adapter's factors, nothing else, and at a bounded cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.generation.bank.layout import NO_SLOT, Layout, lay_out, product

CPU = torch.device("cpu")
IN, RANK, OUT, SLOTS = 5, 3, 4, 20
slots_of_rows = st.lists(st.integers(NO_SLOT, SLOTS - 1), min_size=1, max_size=40)


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SLOTS, IN, RANK, generator=generator, dtype=torch.float64)
    return a.to(dtype), torch.randn(SLOTS, RANK, OUT, generator=generator, dtype=torch.float64).to(dtype)


def applied(layout: Layout, x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    layout.add(out, product(layout.gathered(x), a[layout.slots]), b[layout.slots])
    return out


def by_token(slots: list[int], length: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: one token after the other."""
    a, b = factors()
    expected = out.double().clone()
    for token in range(len(slots) * length):
        slot = slots[token // length]
        if slot != NO_SLOT:
            expected[token] += x[token].double() @ a[slot] @ b[slot]
    return expected


def shown(layout: Layout | None) -> tuple[str, int, int, bool]:
    """Whether factors are read where they lie, how many groups, how wide, and whether tokens stay where they are."""
    assert layout is not None
    kind = "neighbours" if isinstance(layout.slots, slice) else "copied"
    return kind, layout.groups, layout.width, layout.order is None


@settings(max_examples=150, deadline=None)
@given(slots_of_rows, st.integers(1, 9))
def test_every_token_gets_what_its_own_adapter_adds(slots: list[int], length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(slots) * length, IN, generator=generator, dtype=torch.float64)
    out = torch.randn(len(slots) * length, OUT, generator=generator, dtype=torch.float64)
    layout = lay_out(slots, length, CPU)
    if layout is None:
        assert set(slots) == {NO_SLOT}
        return
    found = applied(layout, x, out.clone(), *factors())
    torch.testing.assert_close(found, by_token(slots, length, x, out), rtol=0, atol=1e-12)
    base = [token for token in range(len(x)) if slots[token // length] == NO_SLOT]
    assert torch.equal(found[base], out[base])


@settings(max_examples=100, deadline=None)
@given(slots_of_rows, st.integers(1, 9), st.data())
def test_what_is_not_a_number_stays_with_the_rows_of_its_slot(
    slots: list[int], length: int, data: st.DataObject
) -> None:
    """Also when it stands in a token: places that nobody needs hold some token of another adapter."""
    layout = lay_out(slots, length, CPU)
    if layout is None:
        return
    a, b = factors()
    sick = data.draw(st.integers(0, SLOTS - 1))
    a[sick], b[sick] = float("nan"), float("inf")
    x = torch.ones(len(slots) * length, IN, dtype=torch.float64)
    x[: len(x) // 2 : 3] = float("nan")
    broken = x.isnan().any(1) | torch.tensor([slot == sick for slot in slots]).repeat_interleave(length)
    adapted = torch.tensor([slot != NO_SLOT for slot in slots]).repeat_interleave(length)
    found = applied(layout, x, torch.zeros(len(x), OUT, dtype=torch.float64), a, b)
    assert torch.equal(found.isfinite().all(1), ~(broken & adapted))


FORMS: dict[str, tuple[list[int], int, tuple[str, int, int, bool]]] = {
    "one adapter": ([3] * 8, 4, ("neighbours", 1, 32, True)),
    "one row each, in order": (list(range(16)), 1, ("neighbours", 16, 1, True)),
    "one row each, in any order": ([2, 0, 3, 1], 1, ("neighbours", 4, 1, False)),
    "as many rows each, in order": ([4, 4, 5, 5], 3, ("neighbours", 2, 6, True)),
    "with a slot between them that nobody asked for": ([0, 2, 3], 1, ("neighbours", 4, 1, False)),
    "far apart: only those asked for": ([0, 19], 1, ("copied", 2, 1, True)),
    "far apart and mixed": ([19, 0, 19], 2, ("copied", 2, 4, False)),
    "very unequal: one group for each row": ([0] * 9 + [1], 200, ("copied", 10, 200, True)),
    "very unequal within one row: blocks": ([0] * 500 + [1, 2, 3, 4], 1, ("copied", 12, 64, False)),
    "beside the base": ([NO_SLOT, 1, 2, NO_SLOT], 5, ("neighbours", 2, 5, False)),
}


@pytest.mark.parametrize("case", FORMS)
def test_each_form_is_taken_where_it_is_cheapest(case: str) -> None:
    slots, length, expected = FORMS[case]
    assert shown(lay_out(slots, length, CPU)) == expected


def test_only_the_base() -> None:
    assert lay_out([NO_SLOT, NO_SLOT], 7, CPU) is None


def test_tokens_beside_the_base_are_named_and_others_are_not() -> None:
    mixed, full = lay_out([NO_SLOT, 1], 2, CPU), lay_out([1, 0], 2, CPU)
    assert mixed is not None
    assert full is not None
    assert mixed.tokens is not None
    assert mixed.tokens.tolist() == [2, 3]
    assert full.tokens is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 31), st.integers(1, 600)), min_size=1, max_size=12),
    st.sampled_from([1, 3, 32, 500]),
)
def test_no_form_is_much_larger_than_the_tokens(runs: list[tuple[int, int]], length: int) -> None:
    """Places, and 6 for each group whose factors are read: at most twice the tokens and 72 for each adapter.

    One of the widths compared is w in [24, 48), or one group for each adapter of fewer, or one for each row of more;
    blocks cost Σ ⌈n/w⌉ · (24 + w) ≤ 2n + (24 + w) · adapters, and no cost is less than what is counted here.
    """
    slots = [slot for slot, count in runs for _ in range(max(1, count // length))]
    layout = lay_out(slots, length, CPU)
    assert layout is not None
    assert layout.groups * (6 + layout.width) <= 2 * len(slots) * length + 72 * len(set(slots))


def test_one_long_request_among_short_ones_does_not_widen_all() -> None:
    """Thirty-one requests of 10 tokens and one of 4,000 in one row: 32 groups of 4,000 would be 128,000 places."""
    slots = [slot for slot in range(31) for _ in range(10)] + [31] * 4000
    layout = lay_out(slots, 1, CPU)
    assert layout is not None
    assert layout.groups * layout.width < 2 * len(slots)
    assert layout.groups < 200  # a copy of the factors for each token would be 4,310


@pytest.mark.parametrize("slots", [[0, 1], [1, 0, 1], [NO_SLOT, 3]], ids=["as they come", "by index", "with the base"])
def test_autocast_does_not_round_what_is_asked_for_in_float32(slots: list[int]) -> None:
    """Autocast makes `bmm` of two float32 tensors a bfloat16 one, which cannot be added in place."""
    layout = lay_out(slots, 2, CPU)
    assert layout is not None
    x, out = torch.ones(2 * len(slots), IN) / 3, torch.zeros(2 * len(slots), OUT)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = applied(layout, x, out.clone(), *factors(torch.float32))
    torch.testing.assert_close(found.double(), by_token(slots, 2, x, out), rtol=0, atol=1e-5)
