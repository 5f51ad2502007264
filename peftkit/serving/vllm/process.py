"""vLLM as a process: found, started in a private folder, and ended with everything that it started."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftkit.errors import ConfigError

VARIABLE = "PEFTKIT_VLLM"
"""The environment variable that names vLLM's command, or a Python that has it."""
_KEEPER = Path(__file__).with_name("keeper.py")
_TAIL = 16
"""Lines of its log in a message: vLLM's last error with what led to it."""


def find_vllm(named: str | None = None) -> list[str]:
    """What starts vLLM: `named`, what PEFTKIT_VLLM names, or `vllm` on PATH. Raises ConfigError for none."""
    wanted = named or os.environ.get(VARIABLE)
    found = shutil.which(os.path.expanduser(wanted or "vllm"))
    if found is None:
        missing = f"{wanted} is no command of this machine" if wanted else "vLLM is not on PATH"
        hint = f"python -m venv vllm && vllm/bin/pip install vllm, then {VARIABLE}=vllm/bin/vllm"
        raise ConfigError([missing], where="--engine vllm", hint=hint)
    if re.fullmatch(r"python[\d.]*", Path(found).name):
        return [found, "-m", "vllm.entrypoints.cli.main"]
    return [found]


class Process:
    """A running command whose output is kept in its folder."""

    def __init__(self, keeper: asyncio.subprocess.Process, folder: Path) -> None:
        self.folder = folder
        self.pid: int | None = None
        """Of the command; known when it has started."""
        self.ended: str | None = None
        """How it ended, when it has."""
        self._keeper = keeper
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        """Run `command`; `folder` is removed when it has ended, or when this process is gone."""
        keeper = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(_KEEPER), str(folder), *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for the server, which finishes its answers first
            env=dict(environment),
        )
        return cls(keeper, folder)

    @property
    def log(self) -> Path:
        """What it has written."""
        return self.folder / "vllm.log"

    def tail(self) -> str:
        """The last lines that it has written."""
        try:
            written = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(written.splitlines()[-_TAIL:])

    async def end(self) -> None:
        """End it and all that it started, and remove its folder."""
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        await self._keeper.wait()
        await self._listening

    async def _listen(self) -> None:
        assert self._keeper.stdout is not None
        async for line in self._keeper.stdout:
            word, _, value = line.decode().strip().partition(" ")
            if word == "started":
                self.pid = int(value)
            elif word == "ended":
                self.ended = f"by signal {-int(value)}" if int(value) < 0 else f"with status {value}"
        self.ended = self.ended or "with the process that kept it"
