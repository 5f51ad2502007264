"""vLLM as an engine behind the server: a name inside it for every version, and never another version for a name."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftkit.base.ref import read_config
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.template import Rendering
from peftkit.errors import ConfigError, EngineBusy, EngineGone, GenerationError, PeftkitError, TuningError
from peftkit.events import Report, Warned
from peftkit.generation.check import check
from peftkit.generation.constrain import Grammar
from peftkit.generation.limits import Limits
from peftkit.generation.opening import Found, rendering_of
from peftkit.generation.requests import Request
from peftkit.registry.store import Registry, Version
from peftkit.release.export.vllm import allowed_rank
from peftkit.serving.answering import Load
from peftkit.serving.vllm.answers import VllmAnswer, asked
from peftkit.serving.vllm.arguments import BASE
from peftkit.serving.vllm.client import RESTART, Client
from peftkit.serving.vllm.exported import Exported, export_version
from peftkit.serving.vllm.process import Process

_LOOKS = 1.0
"""Seconds between two looks at how vLLM is."""
_LINGER = 10.0
"""Seconds before the files of an unloaded version go: vLLM hears of a closed connection a moment later, may begin with
its request until then, and would read an adapter that it had evicted once more."""
_MOST_LOGPROBS = 20
"""vLLM's --max-logprobs."""


@dataclass
class Resident:
    """A version that vLLM answers with."""

    version: Version
    files: Exported
    users: int = 0
    """Answers on their way."""
    wanted: bool = False
    """Whether a name stands for it."""


@dataclass(frozen=True)
class Place:
    """Where versions come from, and where their files for vLLM are written."""

    found: Found
    registry: Registry
    cache: Path
    folder: Path
    report: Report
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def export(self, version: Version) -> Exported:
        """Write a version's files, where none have been; see `export_version`."""
        out = self.folder / f"{next(self._numbers)}-{version.name}"
        return export_version(self.registry, version, self.found.located.folder, out, self.cache, self.report)


class VllmEngine:
    """Answers over a vLLM that `start_vllm` has started."""

    def __init__(self, place: Place, process: Process, client: Client, rank: int, limits: Limits) -> None:
        self.process = process
        self._place, self._client, self._rank, self._limits = place, client, rank, limits
        folder = place.found.located.folder
        self._tokenizer, self._vocabulary = load_tokenizer(folder), _vocabulary(folder)
        self._positions: int | None = None
        self._first: Version | None = None
        self._residents: dict[str, Resident] = {}
        self._changing = asyncio.Lock()
        self._answers: set[VllmAnswer] = set()
        self._beginning = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._load, self._lost = Load(), False
        self._closed = False

    async def start(self, versions: Sequence[Version], files: Sequence[Exported]) -> None:
        """Load what was exported, and begin to look after vLLM."""
        self._positions = await self._client.positions()
        self._first = versions[0] if versions else None
        for version, each in zip(versions, files, strict=True):
            await self._load_into(version, each)
            self._residents[version.reference].wanted = True
        self._looking = asyncio.create_task(self._look())

    @property
    def base(self) -> str:
        """Where the base comes from."""
        return self._place.found.located.portable

    @property
    def fingerprint(self) -> str:
        """The base's digest."""
        return self._place.found.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return self._tokenizer

    @property
    def positions(self) -> int | None:
        """The most tokens of a prompt with its answer, as vLLM says it."""
        return self._positions

    def rendering(self, version: Version | None) -> Rendering:
        """How the training of what answers rendered its rows; the base is asked as the first version is."""
        return rendering_of(version or self._first)

    async def prepare(self, version: Version) -> None:
        """Export a version and load it into vLLM. Raises PeftkitError, and then nothing has changed."""
        (await self._resident(version)).wanted = True

    async def forget(self, version: Version) -> None:
        """A version is not answered under any name any more; it leaves vLLM after its last answer."""
        resident = self._residents.get(version.reference)
        if resident is not None:
            resident.wanted = False
            self._leave_if_unused(resident)

    async def begin(self, version: Version | None, request: Request) -> VllmAnswer:
        """Queue a request. Raises EngineBusy when the queue is full or closed, EngineGone when vLLM has ended,
        ConfigError for what vLLM does not take, and what `prepare` raises for a version that is not there any more."""
        self._check_open()
        check(request, self._vocabulary, self._positions)
        if request.logprobs is not None and request.logprobs > _MOST_LOGPROBS:
            raise ConfigError(
                [f"logprobs is {request.logprobs}: vLLM gives {_MOST_LOGPROBS} at most"], where="the request"
            )
        self._beginning += 1
        try:
            if request.json_schema is not None:  # vLLM would say what is wrong with it inside the stream
                await asyncio.to_thread(Grammar.of, request.json_schema, self._tokenizer)
            resident = await self._used(version) if version else None
            try:
                body = asked(request, version.reference if version else BASE, self._tokenizer)
                response = await self._client.complete(body)
            except BaseException:
                self._release(resident)
                raise
        finally:
            self._beginning -= 1

        def ended(answer: VllmAnswer) -> None:
            self._answers.discard(answer)
            self._release(resident)

        answer = VllmAnswer(version.reference if version else None, request, self._tokenizer, response, ended)
        self._answers.add(answer)
        return answer

    def load(self) -> Load:
        """How busy vLLM was at the last look, at most a second ago, and who is in it."""
        wanted = [each for each in self._residents.values() if each.wanted]
        size = sum(each.files.bytes for each in self._residents.values())
        return replace(self._load, resident=tuple(each.version.reference for each in wanted), adapter_bytes=size)

    def trouble(self) -> str | None:
        """Why it cannot answer anything at the moment; None while it can."""
        if self.process.ended is not None:
            return f"vLLM has ended {self.process.ended}"
        return "vLLM does not answer, or says that it is not well" if self._lost else None

    async def close(self, seconds: float) -> None:
        """Take no more requests, finish those that were taken within so many seconds, cancel the rest, end vLLM."""
        self._closed = True
        until = time.monotonic() + seconds
        while (self._answers or self._beginning) and time.monotonic() < until and self.process.ended is None:
            await asyncio.sleep(0.05)
        while self._answers:
            on_way = [answer.task for answer in self._answers]
            for answer in list(self._answers):
                answer.cancel()
            await asyncio.wait(on_way)
        tasks = [*self._leaving, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()
        await self.process.end()
        await asyncio.to_thread(shutil.rmtree, self._place.folder, ignore_errors=True)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineBusy("the engine takes no more requests", expected="a request before it was closed")
        if self.process.ended is not None:
            raise EngineGone(f"vLLM has ended {self.process.ended}", expected="a running vLLM", hint=RESTART)
        on_way, rows = len(self._answers) + self._beginning, self._limits.rows
        self._limits.check_room(min(on_way, rows), max(0, on_way - rows))

    async def _resident(self, version: Version) -> Resident:
        """The version's place in vLLM, where it is loaded if it is not there."""
        async with self._changing:
            if version.reference not in self._residents:
                begun = time.monotonic()
                files = await asyncio.to_thread(self._place.export, version)
                await self._load_into(version, files)
                seconds = self._load.miss_seconds + time.monotonic() - begun
                self._load = replace(self._load, misses=self._load.misses + 1, miss_seconds=seconds)
            return self._residents[version.reference]

    async def _load_into(self, version: Version, files: Exported) -> None:
        """Raises TuningError with vLLM's reason; vLLM does not have it then, and the files are gone."""
        try:
            self._check_rank(version, files.rank)
            await self._client.load(version.reference, files.folder)
        except BaseException as error:
            with suppress(PeftkitError):  # whoever asked may have left while vLLM went on
                await self._client.unload(version.reference)
            await asyncio.to_thread(shutil.rmtree, files.outer, ignore_errors=True)
            if isinstance(error, GenerationError) and not isinstance(error, EngineGone):
                raise TuningError(f"vLLM does not take {version.reference}: {error.fact}") from error
            raise
        self._residents[version.reference] = Resident(version, files)

    def _check_rank(self, version: Version, rank: int) -> None:
        if rank > self._rank:
            raise TuningError(
                f"{version.reference} has rank {rank}, and vLLM was started for {self._rank} at most",
                expected=f"a rank of {self._rank} or less",
                hint=f"start the server again with -- --max-lora-rank {allowed_rank(rank)}",
            )

    async def _used(self, version: Version) -> Resident:
        """The version's place in vLLM, with one more user."""
        if version.reference in self._residents:
            self._load = replace(self._load, hits=self._load.hits + 1)
        resident = self._residents.get(version.reference) or await self._resident(version)
        resident.users += 1
        return resident

    def _release(self, resident: Resident | None) -> None:
        if resident is not None:
            resident.users -= 1
            self._leave_if_unused(resident)

    def _leave_if_unused(self, resident: Resident) -> None:
        if not (resident.users or resident.wanted or self._closed):
            task = asyncio.create_task(self._leave(resident))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _leave(self, resident: Resident) -> None:
        """Unload a version that nobody uses."""
        async with self._changing:
            reference = resident.version.reference
            if resident.users or resident.wanted or self._residents.get(reference) is not resident:
                return
            del self._residents[reference]
            self._load = replace(self._load, evictions=self._load.evictions + 1)
            with suppress(PeftkitError):  # vLLM is gone: `trouble` says so
                await self._client.unload(reference)
        await asyncio.sleep(_LINGER)
        await asyncio.to_thread(shutil.rmtree, resident.files.outer, ignore_errors=True)

    async def _look(self) -> None:
        while self.process.ended is None:
            try:
                healthy = await self._client.healthy()
                running, waiting = await self._client.busy()
            except PeftkitError:
                healthy = False
            else:
                self._load = replace(self._load, running=running, waiting=waiting)
            self._lost = not healthy
            await asyncio.sleep(_LOOKS)
        self._load = replace(self._load, running=0, waiting=0)
        self._place.report(Warned(f"vLLM has ended {self.process.ended}:\n{self.process.tail()}", RESTART))


def _vocabulary(folder: Path) -> int:
    """The number of a base's logits, from its config.json."""
    config = read_config(folder)
    inner = config.get("text_config")
    return int(config.get("vocab_size") or (inner or {})["vocab_size"])
