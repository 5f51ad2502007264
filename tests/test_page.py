"""Pages: nothing of a stranger's text becomes markup, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.page import (
    LONGEST_CELL,
    Section,
    badge_html,
    details_html,
    facts_html,
    heading_html,
    page,
    paragraph_html,
    table_html,
    text_html,
)

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title><b>", "{0.__class__}", "%s",
           "a\u202eb", "\x00\x1b[31m", "\ud800", "' onclick='x"]  # fmt: skip
EMPTY = {"meta", "path", "rect", "circle"}


class Elements(HTMLParser):
    """Tags, attributes and text as a browser's parser finds them; unbalanced tags fail."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def everything(text: str) -> str:
    parts = (table_html([text, "n"], [[text, 1]]) + facts_html([(text, text)]) + text_html(text)
             + paragraph_html(text) + badge_html(text) + heading_html(text) + details_html(text, text))  # fmt: skip
    return page(text, [Section(text, parts), Section(text, text)])


@given(st.one_of(st.text(), st.sampled_from(HOSTILE)))
def test_no_text_becomes_markup(text: str) -> None:
    html = everything(text)
    found = Elements(html)
    plain = Elements(everything("plain"))
    names = lambda elements: [(tag, sorted(attributes)) for tag, attributes in elements.tags]  # noqa: E731
    assert names(found) == names(plain)
    html.encode("utf-8")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f]", html)


def test_a_section_of_plain_text_is_shown_not_obeyed() -> None:
    assert "<img" not in page("t", [Section("s", "<img src=x>")])


def test_nothing_is_fetched_or_run() -> None:
    tags = Elements(everything("x")).tags
    assert not {"script", "link", "img", "iframe", "object", "form"} & {tag for tag, _ in tags}
    assert not [a for _, attributes in tags for a in attributes if a.startswith("on") or a in ("src", "style")]
    assert all(
        (value or "").startswith("#") for _, attributes in tags for a, value in attributes.items() if a == "href"
    )


def test_the_policy_allows_this_style_alone() -> None:
    html = page("t", [])
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'" in html
    assert "url(" not in style
    assert "@import" not in style


def test_a_live_page_refreshes_and_a_final_one_does_not() -> None:
    assert '<meta http-equiv="refresh" content="10">' in page("t", [], refresh_seconds=10)
    assert "refresh" not in page("t", [])


def test_sections_of_one_name_have_anchors_of_their_own() -> None:
    html = page("t", [Section("A b", "x")] * 4)
    ids = re.findall('<section id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) == 4
    assert re.findall('href="#([^"]+)"', html) == ids


def test_cells() -> None:
    html = table_html(["name", "count"], [["a", 12345], ["b", None], ["c" * 5000, 0.25]])
    assert '<td class="n">12,345</td>' in html
    assert '<td class="n">-</td>' in html
    assert f"{'c' * LONGEST_CELL}… (cut: 5,000 characters)" in html
    assert "<td>yes</td>" in table_html(["ok"], [[True]])
    assert "<thead>" not in table_html(["", ""], [["a", "b"]])
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table_html(["a", "b"], [["x"]])


def test_line_ends_and_joiners_stay() -> None:
    assert "a\n\tb 👩\u200d💻" in text_html("a\n\tb 👩\u200d💻")
