"""The weight part of a merge's receipt: what went in, what came out, and how much of the delta was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from peftkit.canonical import digest_json
from peftkit.deltas.combining.methods import How
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.kept import Kept, total
from peftkit.deltas.merging.settings import MergeSettings
from peftkit.deltas.rounding import to_bytes
from peftkit.errors import DeltaError
from peftkit.registry import receipts

LEAST = 0.9
"""The share of the delta that must be kept: issue #5 refuses less without `force`."""
WORST = 5
FILE = "peftkit_merge.json"


@dataclass(frozen=True)
class Provenance:
    """Where the deltas come from, as the receipt says it."""

    versions: Sequence[tuple[str, float]]
    """Reference and weight of each."""
    how: How = field(default_factory=How)
    recommended: Mapping[str, Any] | None = None
    """What was measured to choose `onto`."""


@dataclass(frozen=True)
class MergeReceipt:
    """What a merge did to the weights; the bytes are the same for the same inputs, and so is this."""

    base: Mapping[str, str]
    """Digests of the base: `record`, `weights`."""
    deltas: str
    """Digest of all that is changed."""
    provenance: Provenance
    settings: MergeSettings
    trained_on: Mapping[str, Any] | None
    software: Mapping[str, str]
    tensors: Mapping[str, Kept]
    """For each tensor that has a delta."""
    forms: Mapping[str, str]
    """Tensor → its kind of delta and what it is written as: `LoRA in nf4`."""
    head: Mapping[str, Any] | None = None
    """The head of a task: its labels, the tensors that it added, and those of the base that it left no place for."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`sha256` and `bytes` of every file that was written, this receipt's left out."""
    model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Version → base + adapter against the merged model on its rows, or why that was not measured."""

    @property
    def whole(self) -> Kept:
        """Over all tensors."""
        return total(self.tensors.values())

    @property
    def groups(self) -> dict[str, Kept]:
        """By kind and form: over all tensors, a replaced head would hide that every LoRA was rounded away."""
        names = sorted(set(self.forms.values()))
        return {form: total(kept for name, kept in self.tensors.items() if self.forms[name] == form) for form in names}

    @property
    def worst(self) -> list[str]:
        """The tensors that keep least of their delta, the worst first."""
        return self._by_share[:WORST]

    def as_record(self) -> dict[str, Any]:
        """Plain JSON (registry/FORMAT.md, Receipts)."""
        origin = self.provenance
        return receipts.merged(
            versions=[{"reference": reference, "weight": weight} for reference, weight in origin.versions],
            **origin.how.as_record(),
            deltas=self.deltas,
            base=self.base,
            trained_on=self.trained_on,
            settings=self.settings.model_dump(),
            software=self.software,
            weights=self.whole.figures() | {"worst": self.worst},
            groups={form: kept.figures() for form, kept in self.groups.items()},
            tensors={name: kept.figures() for name, kept in sorted(self.tensors.items())},
            model=self.model,
            head=self.head,
            recommended=origin.recommended,
            files=dict(sorted(self.files.items())),
        )

    def check_or(self, drop: Callable[[], None]) -> None:
        """Raise DeltaError, after `drop`, when a group keeps less than 90 % of its delta, unless it was forced."""
        shares = {form: kept.share for form, kept in self.groups.items() if kept.share is not None}
        lost = {form: share for form, share in shares.items() if share < LEAST}
        if not lost or self.settings.force:
            return
        drop()
        form = min(lost, key=lambda form: lost[form])
        worst = next(name for name in self._by_share if self.forms[name] == form)
        least = self.tensors[worst].share
        raise DeltaError(
            f"the merged weights keep {100 * lost[form]:.1f} % of the delta ({form}; "
            f"{worst}: {100 * (least or 0):.1f} %): {_why(self.settings, self.groups[form])}",
            expected=f"at least {100 * LEAST:.0f} %; nothing was published",
            hint=_instead(self.settings) + ", or publish it all the same with --force",
        )

    @property
    def _by_share(self) -> list[str]:
        shares = {name: kept.share for name, kept in self.tensors.items() if kept.share is not None}
        return sorted(shares, key=lambda name: (shares[name], name))


def digest_of(deltas: Deltas) -> str:
    """SHA-256 over every tensor's delta: kind, shapes, dtypes and bytes of its parts."""
    parts: dict[str, Any] = {name: _plain(delta) for name, delta in deltas.changes.items()}
    if deltas.headed is not None:
        parts["+"] = [deltas.headed.record(), _plain(dict(deltas.added))]
    return digest_json(parts | {"": dict(deltas.sources)})


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        data = to_bytes(held) if held.numel() else b""
        return [str(held.dtype), list(held.shape), hashlib.sha256(data).hexdigest()]
    if is_dataclass(value):
        parts = {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.compare}
        return [type(value).__name__, parts]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return value if isinstance(value, str | int | bool) or value is None else repr(value)


def _why(settings: MergeSettings, kept: Kept) -> str:
    if settings.quantize and settings.onto == "dequantized" and settings.rounding == "nearest":
        return (
            "dequantized weights lie on the steps of the format, and a change smaller than half a step"
            " is rounded back to where it came from"
        )
    same = 100 * kept.unchanged / kept.entries if kept.entries else 0.0
    return f"{same:.0f} % of the entries are changed by less than half a step of the output format"


def _instead(settings: MergeSettings) -> str:
    if not settings.quantize:
        return "choose --dtype float32" if settings.dtype != "float32" else "train for longer"
    ways = [] if settings.onto == "original" else ["--onto original"]
    ways += [] if settings.rounding == "stochastic" else ["--rounding stochastic"]
    return "choose " + " or ".join([*ways, "16 bits (without --quantize)"])
