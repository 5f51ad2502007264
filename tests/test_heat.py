"""The picture of a small matrix: well-formed, numbers readable, names escaped."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from peftkit.heat import heat

SVG = "{http://www.w3.org/2000/svg}"


def test_cells_colours_and_words() -> None:
    drawn = ElementTree.fromstring(heat(["a", "<b>"], [[1.0, -0.5], [-0.5, None]], "cosine"))
    cells = drawn.findall(f"{SVG}rect")
    assert [cell.get("fill-opacity") for cell in cells] == ["0.60", "0.30", "0.30", "0.00"]
    assert cells[0].get("fill") != cells[1].get("fill")
    texts = [each.text for each in drawn.findall(f"{SVG}text")]
    assert [text for text in texts if text in ("1.00", "-0.50", "-")] == ["1.00", "-0.50", "-0.50", "-"]
    assert "2  <b>" in texts
    assert drawn.findtext(f"{SVG}desc") == "a and <b>: -0.50"
    width, height = map(float, (drawn.get("viewBox") or "").split()[2:])
    assert all(0 <= float(cell.get("x") or -1) <= width - 44 for cell in cells)
    assert all(float(cell.get("y") or -1) <= height - 44 for cell in cells)


def test_a_matrix_that_is_no_square() -> None:
    with pytest.raises(ValueError, match="2 names"):
        heat(["a", "b"], [[1.0, 0.0]], "cosine")
