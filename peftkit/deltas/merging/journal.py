"""What a merge has finished, safe on disk: after an interruption it goes on from there.

One JSON line for each unit, written after the unit's bytes were fsynced. The digest is that of the file from its start
to the unit's end, so one pass over the file checks all lines and yields the digest to go on with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peftkit.deltas.merging.kept import Kept
from peftkit.durable import sync_folder

FORMAT = 1
"""Raise it when the same inputs give other bytes than before."""


@dataclass(frozen=True)
class Line:
    """A finished unit."""

    file: str
    unit: str
    end: int
    """Bytes of the file up to its end, the header included."""
    sha256: str
    """Of these bytes."""
    kept: Kept | None


class Journal:
    """The lines of one merge, bound to the digest of everything that it was made from."""

    def __init__(self, path: Path, inputs: str) -> None:
        self._path, self._inputs = path, inputs

    def read(self) -> list[Line] | None:
        """Lines so far; None when there is no journal, or it is one of other inputs. A torn last line is left out."""
        try:
            texts = self._path.read_bytes().split(b"\n")[:-1]
            if json.loads(texts[0]) != self._head():
                return None
        except (OSError, ValueError, IndexError):
            return None
        found = []
        for text in texts[1:]:
            try:
                raw = json.loads(text)
                found.append(Line(**raw | {"kept": Kept(**raw["kept"]) if raw["kept"] else None}))
            except (ValueError, TypeError, KeyError):
                break
        return found

    def begin(self, lines: Iterable[Line]) -> None:
        """Start anew with `lines`."""
        draft = self._path.with_suffix(".new")
        with open(draft, "wb") as file:
            file.write(json.dumps(self._head()).encode() + b"\n" + _encoded(lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._path)
        sync_folder(self._path.parent)

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines; they are on disk when this returns."""
        if not lines:
            return
        with open(self._path, "ab") as file:
            file.write(_encoded(lines))
            file.flush()
            os.fsync(file.fileno())

    def _head(self) -> dict[str, object]:
        return {"journal": FORMAT, "inputs": self._inputs}


def _encoded(lines: Iterable[Line]) -> bytes:
    return b"".join(json.dumps(asdict(line)).encode() + b"\n" for line in lines)
