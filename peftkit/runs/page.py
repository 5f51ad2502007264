"""The page of a run, from the files of its folder alone; any of them may be missing, torn, or still growing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from peftkit.page import Section, page, paragraph_html
from peftkit.runs import sections
from peftkit.runs.status import RunStatus, load_folder

PAGE = "report.html"

REFRESH_SECONDS = 10

_SECTIONS: tuple[tuple[str, Callable[[RunStatus], Markup]], ...] = (
    ("Run", sections.state),
    ("Before and after", sections.evaluation),
    ("Training", sections.training),
    ("Warnings", sections.warnings),
    ("Data", sections.audit),
    ("Plan against measured", sections.plan),
    ("Decisions", sections.decisions),
    ("Settings", sections.settings),
)


def run_page(path: Path) -> str:
    """The page of the run in `path`; while the run goes on, the browser reads the file again every ten seconds."""
    status = load_folder(Path(path))
    parts = [Section(title, _shown(section, status)) for title, section in _SECTIONS]
    return page(f"Run {status.id}", parts, REFRESH_SECONDS if status.state == "running" else None)


def _shown(section: Callable[[RunStatus], Markup], status: RunStatus) -> Markup:
    # One file that holds something unforeseen must not cost the page.
    try:
        return section(status)
    except Exception as error:
        return paragraph_html(f"This part cannot be shown: {type(error).__name__}: {error}", "warning")
