"""How two bases relate, measured: what a GGUF, a 4-bit upload or a cast lost against the weights it was made from.

Every tensor of the child is dequantized in numpy and compared with the parent's of the same name, a few MB at a time,
so that an adapter trained on one can be used on the other knowingly.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.identity import identify
from peftkit.base.raw import Array, rounded
from peftkit.base.record import FORMAT, check_digest, decode_as, plain
from peftkit.canonical import canonical_json
from peftkit.errors import BaseError
from peftkit.events import Phase, Progress, Report, silent

Kind = Literal["gguf", "bnb-4bit", "bnb-8bit", "same-weights", "cast", "other"]
_FIELDS = {"format", "child", "parent", "kind", "tensors", "missing", "added", "reshaped"}
_STEP = 1 << 20
"""Numbers that are compared at once: a multiple of every block size."""


@dataclass(frozen=True, eq=False)
class Relation:
    """One base measured against the base it was derived from."""

    child: str
    """SHA-256 of the child's record."""
    parent: str
    """SHA-256 of the parent's record."""
    kind: Kind
    tensors: dict[str, float]
    """‖child − parent‖ / ‖parent‖ (Frobenius) by tensor name, to 6 digits; 0 means bit for bit the same numbers."""
    missing: tuple[str, ...] = ()
    """Tensors that only the parent has."""
    added: tuple[str, ...] = ()
    """Tensors that only the child has."""
    reshaped: tuple[str, ...] = ()
    """Tensors that both have, in different shapes."""

    @property
    def child_id(self) -> str:
        """The id of the child's record."""
        return self.child[:16]

    @property
    def parent_id(self) -> str:
        """The id of the parent's record."""
        return self.parent[:16]

    @property
    def exact(self) -> int:
        """How many tensors hold the same numbers in both."""
        return sum(error == 0 for error in self.tensors.values())

    @property
    def median(self) -> float:
        """The median relative error over the compared tensors."""
        return statistics.median(self.tensors.values())

    @property
    def max(self) -> float:
        """The largest relative error of a compared tensor."""
        return max(self.tensors.values())

    def encode(self) -> bytes:
        """The one spelling of this relation: canonical JSON and a line end."""
        lists = {"missing": list(self.missing), "added": list(self.added), "reshaped": list(self.reshaped)}
        fields = {"child": self.child, "parent": self.parent, "kind": self.kind, "tensors": self.tensors}
        return canonical_json({"format": FORMAT, **fields, **lists}) + b"\n"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the encoded relation, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def id(self) -> str:
        """The first 16 hex digits of `sha256`."""
        return self.sha256[:16]

    def describe(self) -> str:
        """One line: kind, how many tensors are exact, and the errors of the others."""
        worst = max(self.tensors, key=lambda name: self.tensors[name])
        text = f"{self.kind}: {self.exact} of {len(self.tensors)} tensors are exact"
        if self.exact < len(self.tensors):
            text += f"; relative error {self.median:.2g} median, {self.max:.2g} at most ({plain(worst)})"
        counts = {"missing": self.missing, "added": self.added, "of another shape": self.reshaped}
        return text + "".join(f"; {len(names)} {what}" for what, names in counts.items() if names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Relation) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def measure(
    child: Path, parent: Path, *, kind: Kind | None = None, cache: Path | None = None, report: Report = silent
) -> Relation:
    """Compare every tensor of the base in folder `child` with the one of the same name in `parent`.

    `kind` is worked out from the tensors when it is not given; give "gguf" for the folder of a converted GGUF.
    Raises BaseError when either cannot be read, holds NaN, or the two have next to nothing in common.
    """
    for folder in (child, parent):
        if not folder.is_dir():
            raise BaseError(
                f"{folder} is no folder",
                expected="a base's folder; for a GGUF, the one it was converted to",
                hint=f"peftkit base show {folder} names the folder",
            )
    ids = identify(child, cache).record.sha256, identify(parent, cache).record.sha256
    ours, theirs = dense_tensors(child), dense_tensors(parent)
    common = sorted(ours.keys() & theirs.keys())
    reshaped = [name for name in common if ours[name].shape != theirs[name].shape]
    compared = [name for name in common if ours[name].shape == theirs[name].shape]
    if len(compared) <= len(reshaped):
        raise BaseError(
            f"{child} and {parent} are not related: {len(common)} tensor names in common, {len(reshaped)} of them with"
            " another shape",
            expected="a base and one derived from it, with the same architecture",
        )
    report(Phase("comparing tensors", len(compared), "tensors"))
    errors, cast = {}, True
    for done, name in enumerate(compared, start=1):
        errors[name], is_cast = _compare(name, ours[name], theirs[name])
        cast = cast and is_cast
        report(Progress(done, {"relative error": errors[name]}))
    missing, added = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    whole = not (missing or added or reshaped)
    found = kind or _kind(ours, theirs, whole=whole, exact=not any(errors.values()), cast=cast)
    return Relation(*ids, found, errors, tuple(missing), tuple(added), tuple(reshaped))


def _kind(ours: dict[str, Dense], theirs: dict[str, Dense], *, whole: bool, exact: bool, cast: bool) -> Kind:
    storages = {tensor.storage for tensor in ours.values()}
    same_dtypes = all(ours[name].dtype == theirs[name].dtype for name in ours.keys() & theirs.keys())
    if whole and exact and same_dtypes and storages == {tensor.storage for tensor in theirs.values()}:
        return "same-weights"
    if "bnb-4bit" in storages:
        return "bnb-4bit"
    if "bnb-8bit" in storages:
        return "bnb-8bit"
    return "cast" if whole and cast else "other"


def _compare(name: str, child: Dense, parent: Dense) -> tuple[float, bool]:
    """The relative error of one tensor, in float64, and whether rounding the parent gives exactly the child.

    It is 1 when the parent's tensor is all zeros and the child's is not, where the quotient has no value.
    """
    lost = whole = 0.0
    is_cast, changed, size = True, False, math.prod(child.shape)
    for first in range(0, size, _STEP):
        ours, theirs = child.part(first, first + _STEP), parent.part(first, first + _STEP)
        is_cast = is_cast and _is_rounded(theirs, ours, child.dtype)
        with np.errstate(all="ignore"):
            reference = theirs.astype(np.float64)
            change = np.where(ours == theirs, 0.0, ours.astype(np.float64) - reference)
            changed = changed or bool(change.any())
            lost += float(np.dot(change, change))
            whole += float(np.dot(reference, reference))
    if not changed:
        return 0.0, is_cast
    if not (math.isfinite(lost) and math.isfinite(whole)):
        raise BaseError(
            f"{plain(name)} cannot be compared: it holds NaN, infinite or huge numbers",
            expected="finite weights",
            hint="fetch both bases again",
        )
    error = math.sqrt(lost) / math.sqrt(whole) if whole else 1.0
    # Sums of other machines differ in their last digits; the id of a relation should not. 0 is kept for exact tensors.
    return float(f"{max(error, 1e-300):.6g}"), is_cast


def _is_rounded(values: Array, found: Array, dtype: str) -> bool:
    if dtype not in ("F64", "F32", "F16", "BF16"):
        return bool(np.array_equal(values, found))
    return bool(np.array_equal(rounded(values, dtype), found))


def decode(data: bytes) -> Relation:
    """Read an encoded relation; BaseError says what is wrong with bytes that `encode` cannot have written."""
    return decode_as(_relation_of, _FIELDS, data, "relation of two bases", again="measure the two bases again")


def _relation_of(raw: dict[str, Any]) -> Relation:
    errors = raw["tensors"]
    if raw["kind"] not in get_args(Kind):
        raise ValueError(f"its kind is {raw['kind']!r}")
    if not isinstance(errors, dict) or not errors or not all(type(e) is float and e >= 0 for e in errors.values()):
        raise ValueError("tensors must hold one error or more, none below 0")
    lists = []
    for field in ("missing", "added", "reshaped"):
        names = raw[field]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{field} must be a list of names")
        lists.append(tuple(names))
    return Relation(check_digest(raw["child"]), check_digest(raw["parent"]), raw["kind"], errors, *lists)
