"""Every line of the registry's code that asks for an fsync, found in its syntax."""

from __future__ import annotations

import ast
from pathlib import Path

import peftkit.durable
import peftkit.registry

FOLDER = Path(peftkit.registry.__file__).parent


def fsync_sites() -> dict[str, str]:
    """`file:line` of every call of os.fsync or sync_folder, and the line's text."""
    sites = {}
    for path in sorted([*FOLDER.rglob("*.py"), Path(peftkit.durable.__file__)]):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and _called(node.func) in ("fsync", "sync_folder"):
                sites[f"{path.name}:{node.lineno}"] = source.splitlines()[node.lineno - 1].strip()
    return sites


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
