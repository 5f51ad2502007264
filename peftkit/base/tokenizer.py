"""The base's tokenizer with what a trainer must know about it: which tokens end a turn, which token pads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftkit.errors import BaseError


@dataclass(frozen=True)
class Tokenizer:
    """A transformers tokenizer and the ids that end an answer; nothing in it is changed."""

    hf: Any
    """The `PreTrainedTokenizerBase`."""
    stop_ids: tuple[int, ...]
    """Any of these ends a generated answer: the tokenizer's eos and those of generation_config.json."""
    pad_id: int
    """Fills short rows; always masked by the attention mask, so it may equal a stop token."""

    @cached_property
    def control(self) -> list[str]:
        """Tokens that steer a conversation and never belong into a message's text."""
        added = [token.content for token in self.hf.added_tokens_decoder.values() if token.special]
        return [token for token in dict.fromkeys([*self.hf.all_special_tokens, *added]) if token.strip()]

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer puts before plain text: its BOS token, or nothing. Chat templates write their own."""
        ids = self.hf.encode("a", add_special_tokens=True)
        return [ids[0]] if ids and ids[0] == self.hf.bos_token_id else []

    @property
    def has_template(self) -> bool:
        """Whether the base ships a chat template."""
        return bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: no BOS, no EOS."""
        return list(self.hf.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, with nothing cleaned up."""
        text = self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)


@dataclass(frozen=True)
class Ahead(Tokenizer):
    """A tokenizer that has some texts already encoded; it gives the same ids as the one it was made from."""

    known: dict[str, list[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: list[str]) -> Ahead:
        """Encode `texts` in one call, which in a fast tokenizer runs without the interpreter's lock."""
        distinct = list(dict.fromkeys(texts))
        encoded = tokenizer.hf(distinct, add_special_tokens=False)["input_ids"] if distinct else []
        # One int object per id instead of one per token: a third of the memory of encoded rows.
        same = list(range(len(tokenizer.hf)))
        known = {text: [same[i] for i in ids] for text, ids in zip(distinct, encoded, strict=True)}
        return cls(tokenizer.hf, tokenizer.stop_ids, tokenizer.pad_id, known)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: no BOS, no EOS."""
        known = self.known.get(text)
        return list(known) if known is not None else super().encode(text)


def load_tokenizer(folder: Path, answers: bool = True) -> Tokenizer:
    """Load the tokenizer of a base's folder without remote code.

    Without `answers` (encoders, classifiers) no token has to end a text, and there are no stop ids. Raises BaseError
    when it cannot be loaded, or names no token that ends an answer.
    """
    from transformers import AutoTokenizer  # seconds of start-up that `--help` does not need

    try:
        hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(f"the tokenizer in {folder} cannot be loaded: {reason}", expected="tokenizer.json") from error
    stops = _stop_ids(hf, folder) if answers else ()
    named = [token for token in (hf.pad_token_id, *stops, hf.eos_token_id) if token is not None]
    return Tokenizer(hf, stops, named[0] if named else 0)


def _stop_ids(hf: Any, folder: Path) -> tuple[int, ...]:
    ids = [hf.eos_token_id] if hf.eos_token_id is not None else []
    file = folder / "generation_config.json"
    if file.exists():
        try:
            listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise BaseError(f"{file} cannot be read: {error}", expected="a JSON object") from None
        ids += listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    if not ids:
        raise BaseError(
            f"the tokenizer in {folder} names no end-of-sequence token",
            expected="eos_token in tokenizer_config.json: without it an answer can never end",
        )
    return tuple(dict.fromkeys(ids))
