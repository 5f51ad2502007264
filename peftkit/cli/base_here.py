"""The base of some adapters as far as this machine has it, for commands that only need the names of its tensors.

torch and what reads a base are imported late: `diff` also says something where the base is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.base.record import plain
from peftkit.errors import BaseError, DeltaError
from peftkit.events import Report, silent
from peftkit.registry.manifest import Base, Version

if TYPE_CHECKING:
    from peftkit.deltas.delta import Deltas


def check_one_base(versions: Sequence[Version]) -> None:
    """Raise DeltaError, naming what differs, unless all versions were trained on one base."""
    first = versions[0]
    for other in versions[1:]:
        one, two = first.manifest.base, other.manifest.base
        if one.fingerprint == two.fingerprint:
            continue
        known = sorted(part for part in one.parts.keys() & two.parts.keys() if one.parts[part] != two.parts[part])
        raise DeltaError(
            f"{first.reference} was trained on {_said(one)}, {other.reference} on {_said(two)}"
            + (f"; what differs: {', '.join(known)}" if known else ""),
            expected="adapters of one base, with the same tokenizer and template",
            hint=f"peftkit diff {first.reference} {other.reference}",
        )


def base_here(version: Version, cache: Path, report: Report = silent) -> Path:
    """The folder of the base that a version was trained on; nothing is downloaded.

    Raises BaseError when this machine does not have it.
    """
    base = version.manifest.base
    if snapshot := _hub_snapshot(base, cache):
        return snapshot
    if not _is_local(base, cache):
        raise BaseError(
            f"the base {plain(base.source)} of {version.reference} is not on this machine",
            expected="its files",
            hint=f"hf download {plain(base.source)}, or name it with --base where there is one",
        )
    from peftkit.backbone.locate import locate, locate_again

    return locate(locate_again(base.source, base.revision, base.record, cache), cache, report).folder


def deltas_here(version: Version, folder: Path) -> Deltas:
    """The delta weights of a version over the base in `folder`. Raises AdapterDamaged or DeltaError."""
    from peftkit.deltas.reading.read import deltas_of
    from peftkit.tuning.stored import read

    return deltas_of(read(version), folder)


def _said(base: Base) -> str:
    return f"{plain(base.source)} ({base.fingerprint[:8]})"


def _is_local(base: Base, cache: Path) -> bool:
    """Whether a folder, a file or the fetched embedded base holds it."""
    from peftkit.base import embedded

    for source in (base.source, *_places(base, cache)):
        if source.startswith("embedded:"):
            name = source.removeprefix("embedded:")
            if name in embedded.EMBEDDED and embedded.place_of(name, cache).exists():
                return True
        elif Path(source).is_absolute() and Path(source).exists():
            return True
    return False


def _hub_snapshot(base: Base, cache: Path) -> Path | None:
    """The folder of a Hub base in the Hub's own cache."""
    from huggingface_hub import constants

    for source in (base.source, *_places(base, cache)):
        folder = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
        if source.count("/") != 1 or not folder.is_dir():
            continue
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json", revision=base.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _places(base: Base, cache: Path) -> list[str]:
    if base.record is None:
        return []
    from peftkit.base.places import known_places

    return known_places(base.record, cache)
