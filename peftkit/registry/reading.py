"""Reading the small files of a registry, which may have been put there by a stranger."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LARGEST_MANIFEST = 16 << 20
"""Bytes of manifest.json: a few kB where figures are kept, not rows."""

LARGEST_RECORD = 64 << 20
"""Bytes of a base record or a relation: about 150 a tensor."""

LARGEST_MOVE = 16 << 10
"""Bytes of an alias record; 500 are usual."""


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a plain file; OSError for a link, a pipe, a device, a folder, or more than `limit` bytes."""
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return data
