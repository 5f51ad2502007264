"""Dots where they belong: on linear, logarithmic and worded axes, and safe whatever a name holds."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from peftkit.recipe.sweeping.picture import Dot, scatter


def places(svg: str) -> list[tuple[float, float]]:
    ElementTree.fromstring(svg)
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_equal_factors_are_equal_distances_on_a_logarithmic_axis() -> None:
    dots = [Dot(x, 1.0) for x in (1e-5, 1e-4, 1e-3)]
    left, middle, right = (x for x, _ in places(scatter(dots, "rate", "nll", log=True)))
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    left, middle, right = (x for x, _ in places(scatter(dots, "rate", "nll")))
    assert (right - middle) / (middle - left) == pytest.approx(10, rel=0.02)


def test_more_is_higher_and_an_interval_reaches_from_end_to_end() -> None:
    svg = scatter([Dot(1.0, 2.0, low=1.0, high=4.0), Dot(2.0, 3.0)], "n", "score")
    (_, two), (_, three) = places(svg)
    assert three < two
    top, bottom = sorted(float(y) for y in re.search(r'd="M[\d.]+ ([\d.]+)V([\d.]+)" stroke="#', svg).groups())  # type: ignore[union-attr]
    assert (bottom - two) / (two - three) == pytest.approx(1, abs=0.02)
    assert (two - top) / (two - three) == pytest.approx(2, abs=0.02)


def test_words_stand_side_by_side_and_equal_ones_above_each_other() -> None:
    svg = scatter([Dot("a", 1.0), Dot("b", 2.0), Dot("a", 3.0, best=True), Dot("c", 1.5)], "base", "nll")
    assert svg.count("<circle") == 4
    xs = {round(x) for x, _ in places(svg)}
    assert len(xs) == 3


def test_what_cannot_be_drawn_is_counted() -> None:
    svg = scatter([Dot(1.0, float("nan")), Dot(2.0, 1.0), Dot(3.0, float("inf"))], "n", "nll")
    assert svg.count("<circle") == 1
    assert "2 cannot be drawn" in svg
    assert "no values" in scatter([], "n", "nll")
    assert len(places(scatter([Dot(1.0, 5.0)], "n", "nll", log=True, joined=True, level=("the base", 6.0)))) == 1


def test_a_name_is_never_obeyed() -> None:
    svg = scatter([Dot("<script>1</script>", 1.0, "</desc><script>")], "<x>", '"y"')
    assert "<script" not in svg
    ElementTree.fromstring(svg)
