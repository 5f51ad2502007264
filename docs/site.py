"""Hooks of mkdocs.yml: the site's order is that of the guide's index, and it names files outside of docs/ in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_DOCS = Path(__file__).parent
_ROOT = _DOCS.parent
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")
_HOME = (
    '<!doctype html><meta charset="utf-8"><title>{}</title>'
    '<meta http-equiv="refresh" content="0; url=guide/index.html">'
)


def on_config(config: Any) -> Any:
    """Put the pages into the order of the guide's index, and all decisions behind them."""
    index = (_DOCS / "guide/index.md").read_text(encoding="utf-8")
    listed = [f"guide/{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", index)]
    decisions = [f"decisions/{path.name}" for path in sorted((_DOCS / "decisions").glob("*.md"))]
    config["nav"] = [{"Guide": ["guide/index.md", *dict.fromkeys(listed)]}, {"Decisions": decisions}]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Say where a file outside of docs/ is, instead of linking to what the site does not have."""
    folder = (_DOCS / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        text, target = link[1], (folder / link[2]).resolve()
        if target == _DOCS / "decisions":
            first = sorted(target.glob("*.md"))[0].name
            return f"[{text}](../decisions/{first})"
        if target.is_relative_to(_DOCS):
            return link[0]
        place = str(target.relative_to(_ROOT))
        return f"`{place}`" if text.strip("`") in place else f"{text} (`{place}`)"

    return _LINK.sub(shown, markdown)


def on_post_build(config: Any) -> None:
    """Begin with the guide."""
    (Path(config["site_dir"]) / "index.html").write_text(_HOME.format(config["site_name"]), encoding="utf-8")
