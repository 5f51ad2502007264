"""The committed table of PEFT's methods: the keys of their configurations, and the tensors that they save.

peft_methods.json says of each method `keys` (key → kind), and either why it is `refused` or its tensors: `tensors`
(name after the module → extents), `whole` (names that belong to no module), `together` (what works only as a group),
`only_with` (name → the setting that brings it), `integers`, `must_be_true` and `must_be_given` (settings), `notes`.
An extent is a number, `out` and `in` of the module, `r` of the module, a key of the configuration, products (`a*b`),
quotients (`a/b`), alternatives (`a|b`) or `?`, which is anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Method:
    """What the table says of one method."""

    name: str
    keys: Mapping[str, Any]
    refused: str | None = None
    tensors: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    whole: Mapping[str, Sequence[str] | None] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()
    only_with: Mapping[str, str] = field(default_factory=dict)
    integers: Sequence[str] = ()
    must_be_true: Sequence[str] = ()
    must_be_given: Sequence[str] = ()
    notes: Sequence[str] = ()


@cache
def methods() -> dict[str, Method]:
    """PEFT type → what the table says of it."""
    return {name: Method(name=name, **said) for name, said in _table()["methods"].items()}


def task_types() -> list[str]:
    """The task types that PEFT knows."""
    return list(_table()["task_types"])


def peft_version() -> str:
    """The version of PEFT that the table was made from."""
    return str(_table()["peft"])


@cache
def _table() -> dict[str, Any]:
    text = files("peftkit.registry.intake").joinpath("peft_methods.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table
