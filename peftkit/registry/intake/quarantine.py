"""Copying the few files of an adapter out of a folder that is not trusted; nothing else of it is ever opened."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from peftkit.registry.intake.rules import LARGEST_CONFIG, LARGEST_FILE, MOST_FILES, AdapterRefused, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TENSORS = "tensors.safetensors"

_NEEDED = {"peft": (CONFIG, WEIGHTS), "tensors": (TENSORS,)}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ARCHIVES = {
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".gz": "tar -xf",
    ".tgz": "tar -xf",
    ".bz2": "tar -xf",
    ".xz": "tar -xf",
    ".zst": "tar -xf",
    ".7z": "7z x",
    ".rar": "unrar x",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Admitted:
    """What lies in quarantine: its kind, SHA-256 and size of each copy, and what was left behind and why."""

    kind: str
    files: dict[str, tuple[str, int]]
    left_out: list[tuple[str, str]]


def admit(source: Path, quarantine: Path) -> Admitted:
    """Copy an adapter's own files into the new folder `quarantine`; AdapterRefused when they cannot be taken."""
    folder = _open_folder(source)
    try:
        entries = _entries(folder, source)
        kind = _kind(entries, source)
        needed = _NEEDED[kind]
        _check_twins(entries, needed, source)
        for name in needed:
            _check_plain(name, entries[name], source)
        quarantine.mkdir()
        files = {name: _copy(folder, name, quarantine / name) for name in needed}
    finally:
        os.close(folder)
    left_out = [(_listed(name), _why(name, mode)) for name, mode in sorted(entries.items()) if name not in needed]
    return Admitted(kind, files, left_out)


def _open_folder(source: Path) -> int:
    try:
        mode = os.lstat(source).st_mode
    except (OSError, ValueError) as error:
        raise AdapterRefused("source.not-folder", f"{shown(str(source))} cannot be read: {error}") from error
    if stat.S_ISLNK(mode):
        raise AdapterRefused(
            "source.link",
            f"{source} is a symbolic link",
            hint=f"give the folder itself: {shown(os.path.realpath(source))}",
        )
    if stat.S_ISDIR(mode):
        # Opened once, and every file relative to it: the path may come to mean another folder meanwhile.
        return os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if unpack := _ARCHIVES.get(source.suffix.lower()):
        hint = f"unpack it into an empty folder with `{unpack}`, look at what came out, and give that folder"
        raise AdapterRefused("source.archive", f"{source} is an archive", hint=hint)
    raise AdapterRefused(
        "source.not-folder", f"{source} is not a folder", hint="give the folder that holds the adapter"
    )


def _entries(folder: int, source: Path) -> dict[str, int]:
    with os.scandir(folder) as listing:
        entries = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in islice(listing, MOST_FILES + 1)}
    if len(entries) > MOST_FILES:
        raise AdapterRefused(
            "limit.files", f"{source} has more than {MOST_FILES} entries", hint="copy the adapter's own files out of it"
        )
    return entries


def _kind(entries: dict[str, int], source: Path) -> str:
    if CONFIG in entries and WEIGHTS in entries:
        return "peft"
    if TENSORS in entries and CONFIG not in entries:
        return "tensors"
    _check_twins(entries, (CONFIG, WEIGHTS, TENSORS), source)
    if shards := sorted(name for name in entries if name.endswith(".index.json") or "-of-0" in name):
        raise AdapterRefused(
            "weights.sharded",
            f"{source} holds shards of weights: {shown(shards[0])}",
            hint="load it with peft and save it again with a larger max_shard_size",
        )
    if pickles := sorted(name for name in entries if name.startswith("adapter_model") and name.endswith(_PICKLES)):
        raise AdapterRefused(
            "weights.pickle",
            f"{source} has its weights as a pickle only: {shown(pickles[0])}",
            hint="where you trust the author: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            f"'{WEIGHTS}')",
        )
    wanted = [name for name in (CONFIG, WEIGHTS) if name not in entries]
    held = ", ".join(shown(name) for name in sorted(entries)[:8]) or "nothing"
    hint = "give the folder that save_pretrained wrote, or the sub-folder of one adapter"
    raise AdapterRefused("source.missing", f"{source} lacks {' and '.join(wanted)}; it holds {held}", hint=hint)


def _check_twins(entries: dict[str, int], needed: tuple[str, ...], source: Path) -> None:
    for name in entries:
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in needed and name != folded:
            raise AdapterRefused(
                "name.look-alike",
                f"{source} holds {shown(name)}, which some file systems take for {folded}",
                hint="remove or rename it",
            )


def _check_plain(name: str, mode: int, source: Path) -> None:
    if stat.S_ISLNK(mode):
        raise AdapterRefused("name.link", f"{source / name} is a symbolic link", hint="copy the file itself there")
    if not stat.S_ISREG(mode):
        raise AdapterRefused("source.special", f"{source / name} is not a plain file", hint="copy a file there")


def _copy(folder: int, name: str, target: Path) -> tuple[str, int]:
    rule, most = ("limit.config-bytes", LARGEST_CONFIG) if name == CONFIG else ("limit.bytes", LARGEST_FILE)
    try:
        # O_NOFOLLOW and O_NONBLOCK: a link or a pipe may have taken the file's place since the folder was listed.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise AdapterRefused("source.special", f"{name} cannot be read: {error.strerror}") from error
    digest, size = hashlib.sha256(), 0
    with open(descriptor, "rb") as reading:
        found = os.fstat(reading.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise AdapterRefused("source.special", f"{name} is not a plain file")
        if found.st_size > most:
            raise AdapterRefused(rule, f"{name} has {found.st_size} bytes")
        with open(target, "xb") as writing:
            while chunk := reading.read(_CHUNK):
                size += len(chunk)
                if size > most:
                    raise AdapterRefused(rule, f"{name} grew past {most} bytes while it was copied")
                digest.update(chunk)
                writing.write(chunk)
            writing.flush()
            os.fchmod(writing.fileno(), 0o444)
            os.fsync(writing.fileno())
    return digest.hexdigest(), size


def _listed(name: str) -> str:
    return name if name.isascii() and name.isprintable() else shown(name)


def _why(name: str, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link, not followed"
    if stat.S_ISDIR(mode):
        return "a folder, not looked into"
    if not stat.S_ISREG(mode):
        return "not a plain file"
    if name.endswith(_PICKLES):
        return "a pickle, never opened"
    if name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")):
        return "tokenizer and template come with the base"
    return "not part of an adapter"
