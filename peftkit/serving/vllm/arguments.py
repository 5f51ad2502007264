"""How vLLM is started: what the server decides, what its user adds, and what nobody may say twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftkit.backbone.spec import QuantSpec
from peftkit.errors import ConfigError
from peftkit.release.export.vllm import allowed_rank

BASE = "base"
"""The base's name inside vLLM; versions are called `name@version`, so they never share it."""

_OURS = (
    *("--host", "--port", "--uds", "--grpc", "--grpc-port", "--api-key", "--root-path", "--headless", "--config"),
    *("--model", "--served-model-name", "--tokenizer", "--skip-tokenizer-init", "--tokens-only"),
    *("--enable-lora", "--no-enable-lora", "--lora-modules", "--lora-target-modules", "--api-server-count"),
    *("--generation-config", "--override-generation-config", "--max-num-seqs", "--logprobs-mode"),
)
_SLOTS = 8
"""Each takes a whole adapter of the largest rank on every GPU; with more adapters, batches take turns."""
_IN_HOST_MEMORY = 32
_RANK = 16
"""For a server that begins without adapters: what most have at most."""


@dataclass(frozen=True)
class Start:
    """The arguments of `vllm serve`."""

    base: Path
    """The base's folder."""
    quant: QuantSpec
    ranks: tuple[int, ...]
    """Of the adapters that are there at the beginning."""
    rows: int
    """Requests that are answered at once."""
    socket: Path
    more: tuple[str, ...]
    """What the user adds."""

    def with_ranks(self, ranks: Iterable[int]) -> Start:
        """The same, knowing the adapters."""
        return replace(self, ranks=tuple(ranks))

    @property
    def rank(self) -> int:
        """The largest rank that an adapter may have."""
        given = _value(self.more, "--max-lora-rank")
        if given is not None:
            try:
                return int(given)
            except ValueError:
                raise ConfigError([f"--max-lora-rank {given}: take a number"], where="vLLM's arguments") from None
        return allowed_rank(max(self.ranks, default=_RANK))

    @property
    def arguments(self) -> list[str]:
        """What the user adds stands last, and wins. Raises ConfigError for what is not theirs to say."""
        if refused := [name for name in _OURS if _given(self.more, name)]:
            fact = f"{', '.join(refused)}: peftkit serve decides this itself"
            hint = "peftkit serve has --host, --port, --api-key, --base and --rows"
            raise ConfigError([fact], where="vLLM's arguments", hint=hint)
        slots = min(len(self.ranks) + 1, _SLOTS)  # one more: the old version ends its answers beside the new one
        return [
            *("serve", str(self.base), "--served-model-name", BASE, "--uds", str(self.socket)),
            *("--dtype", _dtype(self.quant), "--max-num-seqs", str(self.rows)),
            *("--enable-lora", "--max-lora-rank", str(self.rank), "--max-loras", str(slots)),
            *("--max-cpu-loras", str(_IN_HOST_MEMORY)),
            # Adapters are loaded and unloaded at runtime, which several processes of the API would not hear of.
            *("--api-server-count", "1"),
            # A base's generation_config.json may ask for a repetition penalty that nobody asked for here.
            *("--generation-config", "vllm"),
            # The library that our own engine uses, so that both take the same schemas.
            *("--structured-outputs-config.backend", "guidance"),
            "--disable-uvicorn-access-log",
            *self.more,
        ]


def environment() -> dict[str, str]:
    """This process's, with what vLLM needs to be quiet, offline, and open to new adapters."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_LOG_STATS_INTERVAL": "3600"}  # the log would grow every ten seconds
    always = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_API_KEY": "",  # its socket lies in a folder that only its user can enter
    }
    return {**quiet, **os.environ, **always}


def _dtype(quant: QuantSpec) -> str:
    """The dtype of the weights; auto is what the base's files have, and two bytes for those of four."""
    if quant.bits == 32:
        return "float32"
    return "auto" if quant.compute_dtype in ("auto", "measured") else quant.compute_dtype


def _given(arguments: Sequence[str], name: str) -> bool:
    return any(_flag(each) == name for each in arguments)


def _value(arguments: Sequence[str], name: str) -> str | None:
    """What is given for a flag, as vLLM's own parser reads it: the last one, `--flag value` or `--flag=value`."""
    found = None
    for each, following in zip(arguments, (*arguments, "")[1:], strict=True):
        if _flag(each) == name:
            found = each.partition("=")[2] if "=" in each else following
    return found


def _flag(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")
