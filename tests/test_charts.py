"""Pictures: round ticks, no lost extremes, no lost gaps, well-formed, readable in both modes."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peftkit.charts import COLOURS, MOST_POINTS, histogram, line_chart, log_ticks, short, thin, ticks

SVG = "{http://www.w3.org/2000/svg}"
ANY = st.floats(allow_nan=True, allow_infinity=True)


def elements(svg: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(SVG + tag))


def lines(svg: str) -> list[str]:
    return [p.get("d") for p in elements(svg, "path") if p.get("stroke") in COLOURS and p.get("stroke-dasharray")]


def count_points(svg: str) -> int:
    return sum(len(re.findall("[ML]", data)) for data in lines(svg))


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    (0, 127, [0, 50, 100]), (99, 101, [99, 99.5, 100, 100.5, 101]),
])  # fmt: skip
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    high = low + span
    assume(high - low > max(abs(low), abs(high)) * 1e-9)
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    step = found[1] - found[0]
    digit = step / 10 ** math.floor(math.log10(step) + 1e-6)
    # Neighbouring ticks differ by rounding of the larger of them: 16 digits.
    assert min(abs(digit - d) for d in (1, 2, 5, 10)) < max(1e-6, 4e-16 * max(map(abs, found)) / step * 10)
    assert all(low - step * 1e-6 <= tick <= high + step * 1e-6 for tick in found)


def test_whole_ticks_and_powers_of_ten() -> None:
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert log_ticks(0.01, 1000) == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert log_ticks(0.56, 0.88) == pytest.approx([0.6, 0.7, 0.8])
    assert log_ticks(1, 20) == pytest.approx([1, 2, 5, 10, 20])
    assert [short(v) for v in (1.5e-4, 0.02, 1500, 10_000, 200_000, 1.5e6, 0, 5e-5)] == [
        "1.5e-4", "0.02", "1,500", "10,000", "200k", "1.5M", "0", "5e-5"]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(10, 700))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    heights = [value for _, value in kept]
    assert (min(heights), max(heights)) == (min(values), max(values))


def test_one_spike_among_ten_thousand_is_drawn() -> None:
    flat = [(step, 1.0) for step in range(10_000)]
    flat[4321] = (4321, 50.0)
    svg = line_chart({"loss": flat}, "step", "loss")
    assert count_points(svg) <= MOST_POINTS
    assert "highest 50 at 4,321" in svg
    # The top of the frame is 50, so one point of the line lies on the upper edge, y = 26.
    assert re.search(r"[ML][\d.]+ 26(?=[ML])", lines(svg)[0])


def test_a_gap_is_shown_as_a_gap_and_a_cross() -> None:
    whole = [(step, 1.0 + step) for step in range(10)]
    torn = [(step, math.nan if step == 5 else value) for step, value in whole]
    assert lines(line_chart({"a": whole}, "x", "y"))[0].count("M") == 1
    svg = line_chart({"a": torn}, "x", "y")
    assert lines(svg)[0].count("M") == 2
    assert "× cannot be drawn" in svg
    assert "9 values" in svg
    assert "1 cannot be drawn" in svg
    assert "1 cannot be drawn" in line_chart({"a": [(1, 0.0), (2, 1.0), (3, 10.0)]}, "x", "y", log=True)


def test_a_single_point_is_a_dot_and_nothing_says_so() -> None:
    assert len(elements(line_chart({"a": [(1, 2.0)]}, "x", "y"), "circle")) == 1
    assert "no values" in line_chart({}, "x", "y")
    assert "no values" in line_chart({"a": [(1, math.nan)]}, "x", "y")


SERIES = st.dictionaries(st.text(max_size=40), st.lists(st.tuples(ANY, ANY), max_size=30), max_size=5)


@settings(max_examples=40, deadline=None)
@given(SERIES, st.text(max_size=40), st.booleans(), st.lists(st.tuples(ANY, st.text(max_size=40)), max_size=3))
def test_any_numbers_and_names_give_a_well_formed_picture(series, name: str, log: bool, marks) -> None:
    svg = line_chart(series, name, name, log=log, marks=marks)
    root = ET.fromstring(svg)
    assert root[0].tag == SVG + "title"
    assert root[1].tag == SVG + "desc"
    assert root.get("aria-labelledby").split() == [root[0].get("id"), root[1].get("id")]
    assert {element.tag for element in root.iter()} <= {
        SVG + t for t in ("svg", "title", "desc", "path", "text", "circle")
    }
    numbers = [float(n) for data in lines(svg) for n in re.findall(r"-?[\d.]+", data)]
    assert all(-1 <= n <= 441 for n in numbers)
    assert "nan" not in "".join(lines(svg))


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram([1, 4, 2], [0, 10, 20, 30], "tokens per row")
    heights = [float(bar.get("height")) for bar in elements(svg, "rect")]
    assert heights[1] / heights[0] == pytest.approx(4, abs=0.02)  # coordinates have one decimal
    assert [bar[0].text for bar in elements(svg, "rect")] == ["0 to 10: 1", "10 to 20: 4", "20 to 30: 2"]
    assert "20 and more: 2" in histogram([1, 4, 2], [0, 10, 20, math.inf], "x")
    assert elements(histogram([], [0], "x"), "rect") == []
    with pytest.raises(ValueError, match="2 counts need 3 edges"):
        histogram([1, 2], [0, 1], "x")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 10**9), max_size=20), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_any_counts_give_a_well_formed_picture(counts: list[int], start: float, width: float) -> None:
    root = ET.fromstring(histogram(counts, [start + width * index for index in range(len(counts) + 1)], "<&>"))
    assert root.tag.endswith("svg")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("paper", ["#ffffff", "#14171b"])
def test_lines_stand_out_on_light_and_dark_paper(colour: str, paper: str) -> None:
    """WCAG 2.2, 1.4.11: 3:1 for what a picture needs to be understood."""
    low, high = sorted([luminance(colour), luminance(paper)])
    assert (high + 0.05) / (low + 0.05) >= 3


def test_a_constant_small_value_can_be_read() -> None:
    """A learning rate of 1e-4 stood at 0 on an axis from -0.5 to 0.5."""
    svg = line_chart({"rate": [(step, 1e-4) for step in range(5)]}, "step", "rate")
    assert "1e-4" in [text.text for text in elements(svg, "text")]
