"""The index of messages is true: every message that it quotes is one that the source can say, in its class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import peftkit.errors

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/guide/errors.md").read_text(encoding="utf-8")
KINDS = {
    name: kind
    for name, kind in vars(peftkit.errors).items()
    if isinstance(kind, type) and kind.__module__ == "peftkit.errors"
}
CLASSES = {*KINDS, "AdapterRefused"}
SPOKEN_BY = {"ValueError": "ConfigError"}  # pydantic's validators; each becomes a line of a ConfigError


def said(node: ast.expr) -> str | None:
    """A string as far as the source states it, with … for what is computed; None is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = said(node.left), said(node.right)
        return None if left is None and right is None else f"{left or '…'}{right or '…'}"
    return None


def strings(tree: ast.AST, raised: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Every string of a module that is no docstring, with the error in whose call it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        inside = raised
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = SPOKEN_BY.get(node.func.id, node.func.id)
            inside = name if name in CLASSES else raised
        text = said(node) if isinstance(node, ast.expr) else None
        if text is None:
            yield from strings(node, inside)
        else:
            yield re.sub("…+", "…", text), inside
            yield from strings(node, inside)  # what an addition or a placeholder holds


@cache
def source() -> frozenset[tuple[str, str | None]]:
    modules = list((ROOT / "peftkit").rglob("*.py"))
    assert len(modules) > 100
    return frozenset(each for path in modules for each in strings(ast.parse(path.read_text(encoding="utf-8"))))


def known(message: str, classes: set[str]) -> bool:
    """Whether the source can say it, in an error of these classes or in one whose text is made before it is raised."""
    parts = [re.escape(part) for part in message.strip("…").split("…")]
    pattern = re.compile("…".join(parts), re.DOTALL)
    return any(pattern.search(text) and (raised is None or raised in classes) for text, raised in source())


def sections() -> list[tuple[str, set[str], list[str]]]:
    found = []
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        messages = re.findall(r"^\| `(.+?)` (?:followed by `(.+?)` )?\|", text, re.MULTILINE)
        found.append((title, set(re.findall(r"`(\w+)`", title)), [one for pair in messages for one in pair if one]))
    return found


def with_bases(names: set[str]) -> set[str]:
    """The named classes and those that stand above or below them: an error is raised as what fits best."""
    wanted = [KINDS[name] for name in names]
    near = {name for name, kind in KINDS.items() for one in wanted if issubclass(kind, one) or issubclass(one, kind)}
    return near | ({"AdapterRefused"} if "RegistryError" in names else set())


@pytest.mark.parametrize(("title", "classes", "messages"), sections(), ids=[title for title, *_ in sections()])
def test_every_quoted_message_is_in_the_source(title: str, classes: set[str], messages: list[str]) -> None:
    assert classes, f"{title} names no class"
    assert len(messages) >= 3
    unknown = [message for message in messages if not known(message, with_bases(classes))]
    assert unknown == [], "their text changed: quote them as they are now"


def test_every_class_has_a_section() -> None:
    named = {name for _, classes, _ in sections() for name in classes}
    assert named == set(KINDS) - {"PeftkitError"}


@pytest.mark.parametrize(
    ("message", "classes"),
    [("no adapter is called … on …", {"AdapterNotFound"}), ("… is not a whole safetensors file: …", {"RunError"})],
    ids=["another text", "another class"],
)
def test_what_the_source_does_not_say_is_found(message: str, classes: set[str]) -> None:
    assert not known(message, classes)
