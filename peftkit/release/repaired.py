"""Adapters that begin with what quantization took from the base: LoftQ's, and whatever was made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftkit.errors import DeltaError, PeftkitError
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry


def repairs(registry: Registry, versions: Sequence[Version]) -> str | None:
    """The first of `versions` and their ancestors that LoftQ began, as `name@version`; None where there is none.

    Ancestors that are no longer in the registry are passed over.
    """
    found = (version for version in _with_ancestors(registry, versions) if _is_loftq(version))
    return next((version.reference for version in found), None)


def check_onto(registry: Registry, versions: Sequence[Version], onto: str | None) -> None:
    """Raise DeltaError when the error of quantization would be added to weights that do not have it."""
    repaired = repairs(registry, versions) if onto == "original" else None
    if repaired is not None:
        raise DeltaError(
            f"{repaired} was trained with loftq: it begins with what quantization took from the base, and the original "
            "weights have that already, so --onto original would add it twice",
            expected="--onto dequantized",
            hint="merge it --onto dequantized; to merge onto the original weights, train with adapter.method=lora",
        )


def _is_loftq(version: Version) -> bool:
    return version.manifest.adapter.get("method") == "loftq"


def _with_ancestors(registry: Registry, versions: Sequence[Version]) -> Iterator[Version]:
    waiting, seen = list(versions), set()
    while waiting:
        version = waiting.pop()
        if version.reference in seen:
            continue
        seen.add(version.reference)
        yield version
        for parent in version.manifest.parents:
            try:
                waiting.append(registry.resolve(f"{parent.name}@{parent.version}"))
            except PeftkitError:
                continue
