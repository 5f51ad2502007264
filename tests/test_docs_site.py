"""The guide as a site: complete, in the index's order, and loading nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs/site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(text: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="guide/serve.md"))
    return str(hooks().on_page_markdown(text, page))


def test_every_page_and_every_decision_is_in_the_site() -> None:
    guide, decisions = (next(iter(part.values())) for part in hooks().on_config({})["nav"])
    assert guide[:2] == ["guide/index.md", "guide/first-run.md"]
    assert sorted(guide) == sorted(f"guide/{path.name}" for path in (ROOT / "docs/guide").glob("*.md"))
    assert decisions == sorted(f"decisions/{path.name}" for path in (ROOT / "docs/decisions").glob("*.md"))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[memory](memory.md#presets)", "[memory](memory.md#presets)"),
        ("[0009](../decisions/0009-memory-plan.md)", "[0009](../decisions/0009-memory-plan.md)"),
        ("[SECURITY.md](../../SECURITY.md)", "`SECURITY.md`"),
        ("[table](../../benchmarks/results/merge.json)", "table (`benchmarks/results/merge.json`)"),
        ("[vLLM](https://github.com/vllm-project/vllm)", "[vLLM](https://github.com/vllm-project/vllm)"),
    ],
)
def test_links_out_of_the_site_name_the_file(written: str, shown: str) -> None:
    assert rendered(f"See {written}.") == f"See {shown}."


def test_the_built_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    commands = pytest.importorskip("mkdocs.commands.build", reason="pip install 'peftkit[docs]'")
    from mkdocs.config import load_config

    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))  # strict: no dead links
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 30
    loaded = [link for text in pages for link in re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"([^\"]+)", text)]
    assert loaded
    assert [link for link in loaded if "//" in link] == []
    styles = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css")]
    assert [url for text in styles for url in re.findall(r"url\(['\"]?((?:https?:)?//[^)]+)", text)] == []
    assert "guide/index.html" in (tmp_path / "site/index.html").read_text()
