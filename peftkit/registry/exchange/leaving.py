"""What leaves this machine with a version: paths that must not, and names that the user should have seen before."""

from __future__ import annotations

import getpass
import json
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftkit.base.record import plain
from peftkit.canonical import strict_json
from peftkit.errors import RegistryError
from peftkit.registry.exchange.export import Piece
from peftkit.registry.headers import LONGEST_HEADER
from peftkit.registry.layout import BASE_RECORD
from peftkit.registry.manifest import Manifest, Version

# "/home/me/x", "~/x", "C:\x", "\\server\x", "file:///x"; a lone "/" or "~" names nothing.
_PATH = re.compile(r"/[^/\s]|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\|file:")
_LONG_TEXT = 200
_SHORTEST_NAME = 4
_HARDWARE = ("system", "processor", "host", "hostname", "gpu")


def refuse_paths(found: Sequence[Piece], version: Version) -> None:
    """Raise RegistryError when a file that would leave holds a path of this machine, naming file and field."""
    home = _home()
    for piece, where, text in _texts(found):
        if _PATH.match(text) or (home is not None and home in text):
            raise RegistryError(
                f"{piece}: {where} holds a path of this machine: {plain(text)}",
                expected="names that mean something elsewhere, and say nothing about this machine",
                hint=f"train or import it anew with a peftkit that records names only; {version.reference} stays here",
            )


def telling(version: Version) -> list[tuple[str, str]]:
    """Fields of the manifest that may tell more than the user wants to say, and what they hold."""
    manifest = version.manifest
    found = [("name", manifest.name), ("base.source", manifest.base.source)]
    found += [(f"data.{at}.source", data.source) for at, data in enumerate(manifest.data)]
    found += [(f"parents.{at}.name", parent.name) for at, parent in enumerate(manifest.parents)]
    found += [("run", manifest.run)] if manifest.run else []
    found += [(f"environment.{key}", manifest.environment[key]) for key in _HARDWARE if key in manifest.environment]
    return [(where, plain(text)) for where, text in [*found, *_named(manifest), *_long(manifest)]]


def _named(manifest: Manifest) -> list[tuple[str, str]]:
    names = [name.lower() for name in _own_names() if len(name) >= _SHORTEST_NAME]
    texts = _walk(manifest.model_dump(mode="json"), "")
    return [(f"{where} (a name of you or this machine)", text) for where, text in texts if _holds(text, names)]


def _long(manifest: Manifest) -> list[tuple[str, str]]:
    """Free JSON holds figures and settings; long text in it may be a row."""
    free = {"metrics": manifest.metrics.model_dump(), "adapter": manifest.adapter, "receipts": list(manifest.receipts)}
    free |= {"recipe.config": manifest.recipe.config} if manifest.recipe else {}
    return [(f"{where} (long text)", text) for where, text in _walk(free, "") if len(text) > _LONG_TEXT or "\n" in text]


def _texts(found: Sequence[Piece]) -> Iterator[tuple[str, str, str]]:
    """File, field and text of every string that would leave, the card apart, which only repeats the manifest."""
    for piece in found:
        if piece.path.endswith(".safetensors"):
            values: Any = _metadata(piece)
        elif piece.path.endswith(".json"):
            data = piece.source if isinstance(piece.source, bytes) else piece.source.read_bytes()
            values = strict_json(data)
            values = values.get("config") if piece.path == BASE_RECORD else values
        else:
            continue
        for where, text in _walk(values, ""):
            yield piece.path, where, text


def _metadata(piece: Piece) -> Any:
    if isinstance(piece.source, bytes):
        return None
    with piece.source.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(min(length, LONGEST_HEADER))).get("__metadata__")


def _walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Dotted place and text of every string below `value`, the keys among them."""
    if isinstance(value, str):
        yield where or "the file", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}.{key}".lstrip(".") + " (the key)", key
            yield from _walk(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _walk(item, f"{where}.{at}".lstrip("."))


def _holds(text: str, names: Sequence[str]) -> bool:
    words = set(re.split(r"[^\w-]+", text.lower()))
    return any(name in words for name in names)


def _own_names() -> list[str]:
    names = [socket.gethostname().partition(".")[0]]
    with suppress(OSError, KeyError, ImportError):  # no user of this number, as in a container
        names.append(getpass.getuser())
    return [name for name in names if name not in ("root", "localhost", "user")]


def _home() -> str | None:
    try:
        home = str(Path.home())
    except RuntimeError:
        return None
    return home + "/" if len(home) > 1 else None
