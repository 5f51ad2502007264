"""Plain text: hand-worked figures, alignment and limits."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.render import duration, interval, number, size, sparkline, table

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1234567, "1,234,567"), (-1000, "-1,000"), (0.0, "0"), (-0.0, "0"), (1.0, "1"), (3.14159, "3.142"),
        (0.00012345, "0.0001234"), (2e-5, "2e-5"), (1.23456e-7, "1.235e-7"), (999.94, "999.9"), (999.97, "1,000"),
        (12345.678, "12,346"), (-9999.6, "-10,000"), (NAN, "nan"), (1e300, "1e300"), (-INF, "-inf"), (None, "-"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1499, "1.5 kB"), (53_100_000, "53.1 MB"), (135e6, "135 MB"),
        (99_949_999, "99.9 MB"), (99_960_000, "100 MB"), (999_499_999, "999 MB"), (999_500_000, "1.0 GB"),
        (11_400_000_000, "11.4 GB"), (2e12, "2.0 TB"), (5e18, "5000 PB"), (-1500, "-1.5 kB"), (None, "-"),
    ],
)  # fmt: skip
def test_size(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0001, "under 1 ms"), (0.35, "350 ms"), (0.9996, "1.0 s"), (4.24, "4.2 s"), (9.96, "10 s"),
        (59.4, "59 s"), (59.7, "1 min 0 s"), (151, "2 min 31 s"), (3599.6, "1 h 0 min"), (3840, "1 h 4 min"),
        (86_399, "1 d 0 h"), (3 * 86_400 + 7200, "3 d 2 h"), (-151, "-2 min 31 s"), (INF, "unknown"), (None, "-"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ((-0.4121, -0.4549, -0.3711), "-0.412 [-0.455, -0.371]"),  # half-width 0.042: two digits are three places
        ((12.345, 11.0, 13.9), "12.3 [11.0, 13.9]"),
        ((1234.5, 1000, 1500), "1,234 [1,000, 1,500]"),
        ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
        ((-0.0001, -0.02, 0.02), "0.000 [-0.020, 0.020]"),
        ((1.5, NAN, INF), "1.5 [nan, inf]"),
    ],
)
def test_interval(figures: tuple[float, float, float], text: str) -> None:
    assert interval(*figures) == text


def test_table_worked_by_hand() -> None:
    rows = [["tickets", 1234, 0.5, True], ["表", 7, None, False], ["e\u0301" * 3, 0, 2.25, None]]
    assert table(["name", "rows", "loss", "ok"], rows).splitlines() == [
        "name      rows  loss  ok",
        "-------  -----  ----  ---",
        "tickets  1,234   0.5  yes",
        "表           7     -  no",
        "e\u0301e\u0301e\u0301          0  2.25  -",
    ]
    assert table(["a"], []) == "a\n-"


def test_long_cells_end_in_an_ellipsis_and_stay_within_the_width() -> None:
    lines = table(["x"], [["a" * 9], ["表" * 5], ["a" * 8]], max_width=8).splitlines()
    assert lines[2:] == ["aaaaaaa…", "表表表…", "aaaaaaaa"]


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table(["a", "b"], [["x"]])


def test_a_name_from_a_stranger_cannot_steer_the_terminal() -> None:
    text = table(["name"], [["\x1b[2Jx\ny\u202ez\u0301"]])
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.splitlines()[2] == "\ufffd[2Jx y\ufffdz\u0301"


cells = st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=60))


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_every_table_is_aligned(rows: list[list[object]]) -> None:
    def width(text: str) -> int:
        wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
        return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)

    lines = table([f"c{index}" for index in range(len(rows[0]))], rows, max_width=20).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(width(line) <= width(lines[1]) for line in lines)
    assert all(line == line.rstrip() for line in lines)
    assert all(len(rule) <= 20 for rule in lines[1].split())


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0]) == "█▁"
    assert sparkline([2, 2]) == "▄▄"
    assert sparkline([0, NAN, 1, INF]) == "▁·█·"
    assert (sparkline([]), sparkline([NAN])) == ("", "·")
    assert sparkline([-1e308, 1e308]) == "▁█"
    # 0..7 in four buckets: means 0.5, 2.5, 4.5, 6.5 lie at 0, 1/3, 2/3 and 1 of the span.
    assert sparkline(list(range(8)), width=4) == "▁▃▆█"
    assert sparkline([0, 0, NAN, 0, 1, 1], width=3) == "▁·█"


@given(st.lists(st.floats(), max_size=200), st.integers(1, 80))
def test_a_sparkline_fits_its_width_and_uses_only_its_bars(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set("▁▂▃▄▅▆▇█·")
