"""The page as one file: its style and scripts set into it, and the policy that lets the browser obey nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from peftkit.page import page

_SCRIPTS = ("elements", "server", "answers", "difference", "compare", "cards", "aliases", "registry", "views")
_STYLE_OF_RUNS = re.compile(r"<style>(.*?)</style>", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """What `/` answers, and the Content-Security-Policy that goes with it and with the pages of runs."""

    html: str
    policy: str
    policy_of_runs: str


@cache
def document() -> Document:
    """Put the page together from the files beside this one."""
    folder = files(__package__)
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    html = (folder / "index.html").read_text(encoding="utf-8")
    html = html.replace("{{style}}", style).replace("{{script}}", script)
    of_runs = "".join(_STYLE_OF_RUNS.findall(page("", [])))
    # Where a key is needed, a run's page is fetched and opened as a blob, which obeys this page's policy too.
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        f"style-src {_digest(style)} {_digest(of_runs)}; script-src {_digest(script)}; "
        "require-trusted-types-for 'script'; trusted-types 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    runs = (
        f"default-src 'none'; style-src {_digest(of_runs)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Document(html, policy, runs)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
