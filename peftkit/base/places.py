"""Where a base was last found on this machine, by its content: a disposable note in the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peftkit.base.identity import BaseIdentity, write_note
from peftkit.canonical import strict_json

_MOST_PLACES = 16


def remember_place(identity: BaseIdentity, source: Path | str, cache: Path) -> None:
    """Note that this base was found at `source`: a folder, a GGUF file, or a reference (`owner/name@revision`)."""
    place = os.path.expanduser(source)
    place = os.path.abspath(place) if isinstance(source, Path) or os.path.exists(place) else str(source)
    noted = _places(identity.id, cache)
    known = [place, *(other for other in noted if other != place)][:_MOST_PLACES]
    if known != noted:
        write_note(_note_of(identity.id, cache), known)


def known_places(record_id: str, cache: Path) -> list[str]:
    """Where the base of this id was found on this machine, newest first; only paths that still exist.

    It says where to look: who uses a place identifies it again.
    """
    return [place for place in _places(record_id, cache) if not os.path.isabs(place) or os.path.exists(place)]


def _places(record_id: str, cache: Path) -> list[str]:
    if not re.fullmatch(r"[0-9a-f]{16}", record_id):
        return []
    try:
        noted = strict_json(_note_of(record_id, cache).read_bytes())
    except (OSError, ValueError):
        return []
    return [place for place in noted if isinstance(place, str) and place] if isinstance(noted, list) else []


def _note_of(record_id: str, cache: Path) -> Path:
    return cache / "places" / f"{record_id}.json"
