"""Keys and values of prompts that were read before, for prompts that begin alike: bounded, least recently used first.

They belong to what computed them: the key is the digest of the adapter's content, never its name, since a name may be
published again (vLLM reused them by name, vllm-project/vllm#42125).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.generation.rows import Kept

WORTH_SHARING = 16
"""A shorter beginning costs more to copy and look up than to read again."""


@dataclass(frozen=True)
class Entry:
    """A prompt that was read, and its keys and values."""

    tokens: tuple[int, ...]
    kept: Kept

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(part.nbytes for pair in self.kept for part in pair)


class Prefixes:
    """What was read, within `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._token_bytes = 0
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], Entry] = OrderedDict()

    def longest(self, digest: str, prompt: tuple[int, ...]) -> tuple[Kept, int] | None:
        """Keys and values for as many leading tokens of `prompt` as were read with this digest.

        At least one token of the prompt is left to read, since its logits are wanted. None when it is not worth it.
        """
        best, length = None, WORTH_SHARING - 1
        for key, entry in self._entries.items():
            if key[0] == digest and (shared := common(entry.tokens, prompt[:-1])) > length:
                best, length = key, shared
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].kept, length

    def keep(self, digest: str, tokens: tuple[int, ...], kept: Kept) -> None:
        """Remember what was read; what it begins with is forgotten, since it can be taken from the longer one."""
        if len(tokens) < WORTH_SHARING:
            return
        entry = Entry(tokens, kept)
        self._token_bytes = entry.bytes // len(tokens)
        if entry.bytes > self.limit:
            return
        for key in [k for k in self._entries if k[0] == digest and k[1] == tokens[: len(k[1])]]:
            self._drop(key)
        self._entries[digest, tokens] = entry
        self.bytes += entry.bytes
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)))

    def holds(self, tokens: int) -> bool:
        """Whether there is room for so many tokens of one prompt, as far as prompts that were read tell."""
        return self.limit > 0 and tokens * self._token_bytes <= self.limit

    def has(self, digest: str, tokens: tuple[int, ...]) -> bool:
        """Whether all of `tokens` can be taken from what was read."""
        return any(key[0] == digest and key[1][: len(tokens)] == tokens for key in self._entries)

    def _drop(self, key: tuple[str, tuple[int, ...]]) -> None:
        self.bytes -= self._entries.pop(key).bytes


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    limit = min(len(one), len(other))
    if list(one[:limit]) == list(other[:limit]):
        return limit
    return next(i for i in range(limit) if one[i] != other[i])
