"""For vLLM: one canonical folder for each adapter, and the command that serves them over their base."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.base.ref import LocatedBase
from peftkit.errors import DeltaError
from peftkit.registry.manifest import Version
from peftkit.release.export.capability_table import RANKS

SCRIPT, NOTES = "serve.sh", "README.txt"

_LIMITS = """\
{script} serves {count} over {base}:

{served}

A request names an adapter in "model"; the base answers under its own name.

Limits (vLLM 0.32.0, with which these files were checked):
- --max-lora-rank is {rank}: the smallest of {ranks} that holds every adapter here.
- Every rank above an adapter's own is filled up with zeros and costs memory and time.
- The adapters are computed in the dtype of the base. {quantized}
- vLLM does not check that an adapter belongs to the base it is started with.
- It listens on 127.0.0.1; what follows the script's name is added to the command: ./{script} --port 8001
- Bases with more than 258,048 tokens and a head of their own are refused by vLLM when it serves any LoRA.
"""


def allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM may be started with and that holds `rank`. Raises DeltaError above the largest."""
    for allowed in RANKS["vllm"]:
        if rank <= allowed:
            return allowed
    largest = RANKS["vllm"][-1]
    raise DeltaError(
        f"rank {rank}", expected=f"at most {largest}, vLLM's largest", hint=f"--rank {largest} cuts it by SVD"
    )


def served_names(versions: Sequence[Version]) -> list[str]:
    """Under which name each version answers: its own, with the start of its id where two share it.

    Raises DeltaError when the same version is named twice.
    """
    references = [version.reference for version in versions]
    if twice := sorted({each for each in references if references.count(each) > 1}):
        raise DeltaError(f"{twice[0]} is named twice", expected="every version once", hint="leave one out")
    names = [version.name for version in versions]
    return [
        name if names.count(name) == 1 else f"{name}-{version.id[:8]}"
        for name, version in zip(names, versions, strict=True)
    ]


def command(base: LocatedBase, folders: Mapping[str, str], rank: int) -> list[str]:
    """The arguments of `vllm serve`; `folders` are the served names and where each one's files lie."""
    arguments = ["vllm", "serve", base.source if base.kind == "hub" else str(base.folder)]
    if base.kind == "hub" and base.revision:
        arguments += ["--revision", base.revision]
    count = str(len(folders))
    arguments += ["--enable-lora", "--max-lora-rank", str(allowed_rank(rank)), "--max-loras", count]
    # JSON: vLLM splits name=path at commas and equal signs (launchers/cli_args.py, LoRAParserAction).
    modules = [json.dumps({"name": name, "path": path}) for name, path in folders.items()]
    return [*arguments, "--host", "127.0.0.1", "--lora-modules", *modules]


def script(arguments: Sequence[str]) -> str:
    """A shell script that runs the command from its own folder, so that the folder can be moved."""
    lines = ["#!/bin/sh", "set -eu", 'cd "$(dirname "$0")"', "export VLLM_NO_USAGE_STATS=1"]
    return "\n".join([*lines, f'exec {shlex.join(arguments)} "$@"', ""])


def write_serving(folder: Path, base: LocatedBase, receipts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write the script and the notes beside the adapters' folders; `receipts` by served name. Returns the command."""
    rank = max(int(receipt["rank"]) for receipt in receipts.values())
    arguments = command(base, {name: f"./{name}" for name in receipts}, rank)
    quantized = any("quantized base" in line for receipt in receipts.values() for line in receipt["findings"])
    served = "\n".join(f"- {name}: {receipt['version']}, rank {receipt['rank']}" for name, receipt in receipts.items())
    notes = _LIMITS.format(
        script=SCRIPT,
        count="1 adapter" if len(receipts) == 1 else f"{len(receipts)} adapters",
        base=arguments[2],
        served=served,
        rank=allowed_rank(rank),
        ranks=", ".join(map(str, RANKS["vllm"])),
        quantized="They were trained over a quantized base; vLLM serves it as it is told (--quantization)."
        if quantized
        else "",
    )
    durable.write_file(folder / SCRIPT, script(arguments).encode())
    (folder / SCRIPT).chmod(0o755)
    durable.write_file(folder / NOTES, notes.encode())
    (folder / NOTES).chmod(0o644)
    return arguments
