"""A file written as one step: readers see the old bytes or the new ones, also after a power cut."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from peftkit.durable import sync_folder


def replace_file(path: Path, text: str) -> None:
    """Write a file so that readers see the old bytes or the new ones, also after a power cut."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with open(draft, "wb") as handle:
            handle.write(text.encode("utf-8", "backslashreplace"))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
