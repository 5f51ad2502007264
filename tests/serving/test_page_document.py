"""The page is one file: its parts are in it, its policy names their digests, and nothing makes HTML of text."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from peftkit.serving.page import document as made_by
from peftkit.serving.page.document import document

FOLDER = Path(made_by.__file__).parent


def test_all_scripts_are_in_it_and_the_policy_names_what_stands_in_the_file() -> None:
    html = document().html
    scripts = sorted(FOLDER.glob("*.js"))
    assert len(scripts) >= 9
    for path in (*scripts, FOLDER / "page.css"):
        assert path.read_text(encoding="utf-8") in html
    assert "{{" not in html.partition("<style>")[0] + html.rpartition("</script>")[2]
    for tag in ("style", "script"):
        inline = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        assert len(inline) == 1
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert re.search(rf"{tag}-src [^;]*'sha256-{re.escape(digest)}'", document().policy)


def test_it_names_no_other_place_and_fetches_nothing_by_itself() -> None:
    html = document().html.replace("xmlns='http://www.w3.org/2000/svg'", "")
    assert re.findall(r"https?://|//[a-z0-9-]+\.[a-z]{2,}", html) == []
    assert re.findall(r"<(?:script|img|iframe|link)[^>]*\b(?:src|href)=\"(?!data:)", html) == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.js")), ids=lambda path: path.name)
def test_no_script_makes_html_or_code_of_text_or_stores_anything(path: Path) -> None:
    banned = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|Storage|\.cookie|indexedDB|srcdoc"
    )
    assert re.findall(banned, path.read_text(encoding="utf-8")) == []
