"""The receipt beside an export has the fields that registry/FORMAT.md lists, and digests of every file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftkit.registry

FORMAT = Path(peftkit.registry.__file__).parent / "FORMAT.md"
COMMON = {"type", "engine", "peftkit", "version", "base", "input", "output", "findings"}
ADAPTER = {"rank", "folded", "cut", "error"}
MERGED = {"merge", "written", "notes"}
EXPORTS: dict[str, tuple[tuple[str, ...], dict[str, Any], set[str]]] = {
    "peft": (("peft", "plain"), {}, ADAPTER),
    "vllm": (("vllm", "plain"), {}, ADAPTER),
    "gguf": (("gguf", "plain"), {}, ADAPTER | {"notes"}),
    "merged": (("gguf", "plain"), {"merged": True}, MERGED),
    "ollama": (("ollama", "plain"), {}, ADAPTER | {"notes"}),
    "ollama merged": (("ollama", "plain"), {"merged": True}, MERGED),
}


def documented() -> tuple[set[str], set[str]]:
    """Fields of every export, and the figures that some have, from the page."""
    (row,) = re.findall(r"^\| `export` \| (.*) \|$", FORMAT.read_text(), re.M)
    while "(" in row:
        row = re.sub(r"\([^()]*\)", "", row)
    common, figures = row.split("and the figures of the engine's format")
    return (
        {"type", *re.findall(r"`([a-z]+)`", common)},
        set(re.findall(r"`([a-z]+)`", figures)),
    )


def test_the_page_lists_the_figures_of_every_format() -> None:
    assert documented() == (COMMON, ADAPTER | MERGED)


@pytest.mark.parametrize("which", EXPORTS)
def test_a_written_receipt_has_exactly_these_fields(which: str, export: Callable[..., Any]) -> None:
    names, options, figures = EXPORTS[which]
    receipt = export(*names, **options)
    folder = receipt.folder / "plain" if which == "vllm" else receipt.folder
    written = json.loads((folder / "peftkit_export.json").read_text())
    assert written == receipt.versions["plain"]
    assert written.keys() == COMMON | figures
    assert (written["type"], written["engine"]) == ("export", names[0])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(written["output"]) == files - {"peftkit_export.json"}
    for path, digest in written["output"].items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest
    if "written" in written:
        assert written["written"].keys() == {"what", "dtype", "weights", "groups", "tensors", "forced"}
    if names[0] == "ollama":
        assert any("not run in Ollama" in note for note in written["notes"])
        assert "not run in Ollama" in (folder / "Modelfile").read_text()
