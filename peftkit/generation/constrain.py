"""Answers that are JSON by a schema: at every step, which tokens can still lead to a valid document."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import ConfigError, GenerationError

# Room for indented documents; without an end, a small model fills its whole answer with line breaks.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,32}"
_SCHEMAS_KEPT = 64
_EXACT = 2**53

_compilers: WeakKeyDictionary[Any, dict[tuple[int, ...], _Compiler]] = WeakKeyDictionary()
_compiling = threading.Lock()


@dataclass(frozen=True)
class Grammar:
    """A JSON schema compiled for one tokenizer; any number of answers may follow it at once."""

    matcher: Any
    """An `llguidance.LLMatcher` at the beginning of a document, never advanced itself."""
    stop_ids: tuple[int, ...]
    """The tokenizer's, which end a document."""

    @classmethod
    def of(cls, schema: Mapping[str, Any], tokenizer: Tokenizer) -> Grammar:
        """Compile `schema`; a tokenizer and a schema that were compiled before are not compiled again.

        Raises ConfigError when llguidance is not installed, the tokenizer is not a fast one, or the schema cannot be
        compiled: it is invalid, contradicts itself, or uses a keyword that cannot be enforced token by token.
        """
        try:
            text = json.dumps(schema, allow_nan=False)
            large = _inexact(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"it is not JSON: {error}") from None
        if large:
            raise _refused(f"{large} is beyond ±2^53, where llguidance would take another number for it")
        with _compiling:
            return cls(_compiler(tokenizer).compile(text), tokenizer.stop_ids)

    def start(self, stop_ids: tuple[int, ...] = ()) -> Constraint:
        """Follow one answer from its first token; `stop_ids` end it beside the tokenizer's own."""
        return Constraint(self.matcher.deep_copy(), (*self.stop_ids, *stop_ids))


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, stop_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._stopped = False

    @property
    def may_stop(self) -> bool:
        """Whether the document is complete as it stands; it may still be able to go on, as a number is."""
        return bool(self._matcher.is_accepting())

    @property
    def done(self) -> bool:
        """Whether the document is complete and nothing but a stop token can follow."""
        return self._stopped or (self.may_stop and bool(self._matcher.is_stopped()))

    def mask(self, width: int) -> Tensor:
        """The tokens that may come next: (width,) bool on the CPU, for logits of `width` tokens.

        Stop tokens are among them exactly when the document is complete; other ids that the tokenizer does not know
        never are. Raises GenerationError when nothing may come next.
        """
        allowed = torch.zeros(width, dtype=torch.bool)
        if not self.done:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            self._check()
            known = min(len(bits), width)
            allowed[:known] = torch.from_numpy(bits[:known])
        allowed[[token for token in self._stop_ids if token < width]] = self.may_stop
        if not allowed.any():
            raise GenerationError("no token of the vocabulary can continue the answer as its JSON schema asks")
        return allowed

    def accept(self, token: int) -> None:
        """Go on by `token`. Raises GenerationError when it cannot follow."""
        if self._stopped or (token in self._stop_ids and not self.may_stop):
            raise GenerationError(f"token {token} cannot follow in an answer by its JSON schema")
        if token in self._stop_ids:
            self._stopped = True
            return
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(f"the answer cannot follow its JSON schema: {self._matcher.get_error()}")


class _Compiler:
    """Compiles schemas for one tokenizer, and keeps the newest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance.hf import from_tokenizer  # an extra
        except ImportError as error:
            raise ConfigError(
                ["JSON by a schema needs llguidance, which is not installed"],
                where="json_schema",
                hint="pip install 'peftkit[json]'",
            ) from error
        try:
            self._vocabulary = from_tokenizer(tokenizer.hf, eos_token=list(tokenizer.stop_ids))
        except (ValueError, TypeError) as error:
            raise ConfigError([f"the tokenizer cannot be followed: {error}"], where="json_schema") from error
        self.compile = lru_cache(maxsize=_SCHEMAS_KEPT)(self._compile)

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise _refused(str(error)) from None
        # Errors without the parser's state, which is pages long and holds what was asked.
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return matcher


def _compiler(tokenizer: Tokenizer) -> _Compiler:
    known = _compilers.setdefault(tokenizer.hf, {})
    if tokenizer.stop_ids not in known:
        known[tokenizer.stop_ids] = _Compiler(tokenizer)
    return known[tokenizer.stop_ids]


def _inexact(part: Any) -> int | None:
    """An integer anywhere in a schema that a float64 may not hold; there is none in most."""
    if isinstance(part, dict | list):
        inside = (_inexact(each) for each in (part.values() if isinstance(part, dict) else part))
        return next((found for found in inside if found), None)
    return part if isinstance(part, int) and abs(part) > _EXACT else None


def _refused(why: str) -> ConfigError:
    return ConfigError([why], where="json_schema")
