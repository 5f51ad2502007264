"""What differs between two versions, as rows that name the place and both values; what is equal is only counted."""

from __future__ import annotations

import contextlib
import enum
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from peftkit.base.record import BaseRecord, explain
from peftkit.canonical import canonical_json, digest_json
from peftkit.registry.manifest import Data, Manifest, Version

SECTIONS = (
    "version", "base", "adapter", "recipe", "data", "environment", "metrics", "files", "parents", "receipts",
)  # fmt: skip


class _Absent(enum.Enum):
    ABSENT = "absent"


ABSENT: Final = _Absent.ABSENT
"""The value of a side that does not have the place at all; None is JSON's null."""

_Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One place where two versions differ; `left` or `right` is ABSENT where only the other has it."""

    section: str
    key: str
    left: Any
    right: Any

    @property
    def change(self) -> float | None:
        """right − left, where both are numbers and a float can hold it."""
        with contextlib.suppress(OverflowError):
            if _is_number(self.left) and _is_number(self.right):
                found: float = self.right - self.left
                return found if math.isfinite(found) else None
        return None

    def as_json(self) -> dict[str, Any]:
        """The row for `--json`: a side without the place has no key."""
        sides = {side: value for side, value in (("left", self.left), ("right", self.right)) if value is not ABSENT}
        change = {} if self.change is None else {"change": self.change}
        return {"section": self.section, "key": self.key, **sides, **change}


@dataclass(frozen=True)
class Difference:
    """All differences of two versions by section and key, and how many values are equal by section."""

    left: str
    right: str
    rows: tuple[Row, ...]
    equal: dict[str, int]
    base: tuple[str, ...] = ()
    """What the base records say about the difference, where both are known."""


def difference(
    left: Version, right: Version, *, left_base: BaseRecord | None = None, right_base: BaseRecord | None = None
) -> Difference:
    """Compare two versions; with both base records the difference of the bases is told in sentences too."""
    one, other = _values(left.manifest), _values(right.manifest)
    data_one, data_other = _paired(left.manifest.data, right.manifest.data)
    one |= data_one
    other |= data_other
    rows = []
    equal = dict.fromkeys(SECTIONS, 0)
    for section, *path in sorted(one.keys() | other.keys(), key=lambda key: (SECTIONS.index(key[0]), key)):
        key = (section, *path)
        values = one.get(key, ABSENT), other.get(key, ABSENT)
        if _same(*values):
            equal[section] += 1
        else:
            rows.append(Row(section, ".".join(path), *values))
    told = explain(left_base, right_base) if left_base is not None and right_base is not None else []
    return Difference(left.reference, right.reference, tuple(rows), {k: n for k, n in equal.items() if n}, tuple(told))


def _values(manifest: Manifest) -> dict[_Path, Any]:
    """Every value but those of the data, by section and path; `created` differs always and is left out."""
    fields = manifest.model_dump(mode="json")
    base = {key: value for key, value in fields["base"].items() if value is not None}
    recipe = {key: value for key, value in (fields["recipe"] or {}).items() if key != "config_sha256"}  # of the config
    return {
        **{("version", key): fields[key] for key in ("name", "kind", "run") if fields[key] is not None},
        **_flat(("base",), base),
        **_flat(("adapter",), fields["adapter"]),
        **_flat(("recipe",), recipe),
        **_flat(("environment",), fields["environment"]),
        **_flat(("metrics",), fields["metrics"]),
        **{("files", path): file for path, file in fields["files"].items()},
        **_grouped("parents", [(f"{each['name']}@{each['version']}", each["relation"]) for each in fields["parents"]]),
        **_grouped("receipts", [(f"{each['type']} {digest_json(each)[:8]}", each) for each in fields["receipts"]]),
    }


def _flat(path: _Path, value: Any) -> dict[_Path, Any]:
    """The leaves below a value by path; a list is a leaf, and so is an empty object below the top."""
    if isinstance(value, Mapping) and (value or len(path) == 1):
        return {leaf: found for key, each in value.items() for leaf, found in _flat((*path, key), each).items()}
    return {path: value}


def _grouped(section: str, pairs: Sequence[tuple[str, Any]]) -> dict[_Path, Any]:
    found: dict[_Path, list[Any]] = {}
    for key, value in pairs:
        found.setdefault((section, key), []).append(value)
    return {path: values[0] if len(values) == 1 else sorted(values, key=str) for path, values in found.items()}


def _paired(left: Sequence[Data], right: Sequence[Data]) -> tuple[dict[_Path, Any], dict[_Path, Any]]:
    """The data of both sides by path, with a whole source as one value where only one side has it."""
    one: dict[_Path, Any] = {}
    other: dict[_Path, Any] = {}
    used: Counter[str] = Counter()
    for label, _, pair in sorted(((*_label(pair), pair) for pair in _pairs(left, right)), key=lambda item: item[:2]):
        used[label] += 1
        path = ("data", label if used[label] == 1 else f"{label} ({used[label]})")
        for entry, values in zip(pair, (one, other), strict=True):
            if entry is not None:
                fields = entry.model_dump(mode="json", exclude={"role"}, exclude_none=True)
                values |= _flat(path, fields) if None not in pair else {path: fields}
    return one, other


def _pairs(left: Sequence[Data], right: Sequence[Data]) -> list[tuple[Data | None, Data | None]]:
    """Sources of one role belong together when name and bytes, or else the name, or else the bytes are the same."""
    found: list[tuple[Data | None, Data | None]] = []
    lefts, rights = list(left), list(right)
    for fields in (("source", "sha256"), ("source",), ("sha256",)):
        same = operator.attrgetter("role", *fields)
        for a in list(lefts):
            b = next((each for each in rights if same(each) == same(a)), None)
            if b is not None:
                found.append((a, b))
                lefts.remove(a)
                rights.remove(b)
    return [*found, *((a, None) for a in lefts), *((None, b) for b in rights)]


def _label(pair: tuple[Data | None, Data | None]) -> tuple[str, list[str]]:
    known = [each for each in pair if each is not None]
    sources = {each.source for each in known}
    what = sources.pop() if len(sources) == 1 else known[0].sha256[:8]
    # The second part orders sources of one name alike, whichever side they are on.
    return f"{known[0].role} {what}", sorted(each.sha256 for each in known)


def _same(left: Any, right: Any) -> bool:
    if left is ABSENT or right is ABSENT:
        return False
    return canonical_json(left) == canonical_json(right)  # Python takes 1, 1.0 and True for the same value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
