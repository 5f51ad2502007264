"""Start vLLM over a base, with its first adapters, and wait until it answers."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peftkit.errors import BackboneError
from peftkit.events import Decision, Note, Phase, Progress, Report, silent
from peftkit.generation.limits import Limits
from peftkit.generation.opening import Found
from peftkit.registry.store import Registry, Version
from peftkit.serving.vllm.arguments import Start, environment
from peftkit.serving.vllm.client import Client
from peftkit.serving.vllm.engine import Place, VllmEngine
from peftkit.serving.vllm.exported import Exported
from peftkit.serving.vllm.process import Process, find_vllm

_LOOKS = 0.2
"""Seconds between two looks whether vLLM answers already."""
_LONGEST = 100
"""Bytes of a socket's path, of which Linux takes 107."""


async def start_vllm(
    found: Found,
    versions: Sequence[Version],
    registry: Registry,
    cache: Path,
    *,
    arguments: Sequence[str] = (),
    vllm: str | None = None,
    limits: Limits | None = None,
    report: Report = silent,
) -> VllmEngine:
    """An engine over a vLLM of its own, which answers with `versions` already; it ends when this process does.

    `arguments` are added to those of `vllm serve`; `vllm` is its command, or a Python that has it. Raises ConfigError
    when there is no vLLM or an argument is not the user's, BackboneError when it ends before it answers, and what
    `VllmEngine.prepare` raises.
    """
    program, limits = find_vllm(vllm), limits or Limits()
    first = list({version.reference: version for version in versions}.values())
    folder = _private_folder()
    start = Start(found.located.folder, found.quant, (), limits.rows, folder / "http", tuple(arguments))
    place = Place(found, registry, cache, folder, report)
    process = client = None
    try:
        _ = start.arguments  # wrong ones are told before anything is written
        files = await asyncio.to_thread(_exported, place, first)
        start = start.with_ranks(each.rank for each in files)
        report(Decision("engine", "vLLM", f"{' '.join([*program, *start.arguments])}"))
        process = await Process.start([*program, *start.arguments], folder, environment())
        report(Note(f"vLLM is starting, which takes minutes with a large base; it writes to {process.log}"))
        client = Client(start.socket)
        await _answering(client, process)
        engine = VllmEngine(place, process, client, start.rank, limits)
        await engine.start(first, files)
        report(Note(f"vLLM {await client.version()} answers"))
        return engine
    except BaseException:
        if client is not None:
            await client.close()
        if process is not None:
            await process.end()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exported(place: Place, versions: Sequence[Version]) -> list[Exported]:
    place.report(Phase("writing adapters for vLLM", len(versions), "adapters"))
    files = []
    for version in versions:
        files.append(place.export(version))
        place.report(Progress(len(files), {}))
    return files


async def _answering(client: Client, process: Process) -> None:
    while not await client.healthy():
        if process.ended is not None:
            raise BackboneError(
                f"vLLM ended {process.ended} before it could answer:\n{process.tail()}",
                expected="a vLLM that can hold this base here",
                hint="its arguments stand after `--`: --tensor-parallel-size, --max-model-len, --dtype and others",
            )
        await asyncio.sleep(_LOOKS)


def _private_folder() -> Path:
    """A new folder that only this user can enter, at a path that is short enough for a socket."""
    here = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="peftkit-vllm-", dir=here if len(here) < _LONGEST - 30 else "/tmp"))
