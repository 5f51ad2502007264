"""Answers that are JSON by a schema: at every step, which tokens can still lead to a valid document."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
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
_MOST_BYTES = 1 << 16
_MOST_OBJECTS = 2000
"""In a schema, itself and its parts. With both bounds the slowest that was found takes 1.3 s; without them,
15,000 properties with patterns take 8.5 s, and 50 MB for as long as they are kept."""
_ROW = 10_000
"""Ways to go on from one place. An object with 2,000 properties has 8,003; llguidance's own bound is 2,000."""
_OPENINGS = ("", "{", "[", "[{")
"""Where a document may have more ways to go on than that: known before an answer begins, not in its middle."""
_SMALLER = "ask for the parts that are needed, or describe parts that are alike once, in $defs"
_SAID = 300
"""Characters of what llguidance says, which may go on with what it was doing, and with what was asked."""

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
        compiled: it is invalid or too large, contradicts itself, or uses a keyword that cannot be enforced token by
        token.
        """
        try:
            text = json.dumps(schema, allow_nan=False)
            _check_size(text, schema)
            large = _inexact(json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"it is not JSON: {error}") from None
        if large:
            raise _refused(f"{large} is beyond ±2^53, where llguidance would take another number for it")
        compiler = _compiler(tokenizer)
        if (known := compiler.known(text)) is not None:
            return cls(known, tokenizer.stop_ids)
        with compiler.busy:
            if (known := compiler.known(text)) is not None:  # somebody else's, meanwhile
                return cls(known, tokenizer.stop_ids)
            made = cls(compiler.compile(text), tokenizer.stop_ids)
            made._check_openings(tokenizer)
            compiler.keep(text, made.matcher)
            return made

    def start(self, stop_ids: tuple[int, ...] = ()) -> Constraint:
        """Follow one answer from its first token; `stop_ids` end it beside the tokenizer's own."""
        return Constraint(self.matcher.deep_copy(), (*self.stop_ids, *stop_ids))

    def _check_openings(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError when it compiles and yet cannot be followed."""
        width = len(tokenizer.hf)
        try:
            for opening in _OPENINGS:
                place = self.start()
                for token in tokenizer.encode(opening):
                    if not place.mask(width)[token]:
                        break
                    place.accept(token)
                else:
                    place.mask(width)
        except GenerationError as error:
            raise _refused(error.fact) from None


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
            raise GenerationError(f"the answer cannot follow its JSON schema: {_first_line(self._matcher.get_error())}")


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
        self._kept: dict[str, Any] = {}
        self._keeping = threading.Lock()
        self.busy = threading.Lock()
        """Held while a schema is compiled: several at once would only take the processor from everybody else."""

    def known(self, schema: str) -> Any:
        """The matcher of a schema that was compiled before; None of another one. Waits for no compiling."""
        with self._keeping:
            if (matcher := self._kept.pop(schema, None)) is not None:
                self._kept[schema] = matcher  # now the newest
            return matcher

    def keep(self, schema: str, matcher: Any) -> None:
        """Know a matcher from now on; the one that was not asked for longest makes room."""
        with self._keeping:
            self._kept[schema] = matcher
            if len(self._kept) > _SCHEMAS_KEPT:
                del self._kept[next(iter(self._kept))]

    def compile(self, schema: str) -> Any:
        """The matcher of a schema. Raises ConfigError."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise _refused(_first_line(str(error))) from None
        # Errors without the parser's state, which is pages long and holds what was asked.
        limits = LLParserLimits(verbose_errors=False, max_items_in_row=_ROW)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(_first_line(matcher.get_error()))
        return matcher


def _compiler(tokenizer: Tokenizer) -> _Compiler:
    with _compiling:
        known = _compilers.setdefault(tokenizer.hf, {})
        if tokenizer.stop_ids not in known:
            known[tokenizer.stop_ids] = _Compiler(tokenizer)
        return known[tokenizer.stop_ids]


def _check_size(text: str, schema: Mapping[str, Any]) -> None:
    if len(text) > _MOST_BYTES:
        raise _refused(f"it has {len(text)} bytes: take at most {_MOST_BYTES}", hint=_SMALLER)
    if (objects := _objects(schema)) > _MOST_OBJECTS:
        raise _refused(f"it has {objects} objects in it: take at most {_MOST_OBJECTS}", hint=_SMALLER)


def _objects(part: Any) -> int:
    """Objects in a schema, itself among them."""
    if isinstance(part, Mapping):
        return 1 + sum(map(_objects, part.values()))
    return sum(map(_objects, part)) if isinstance(part, list | tuple) else 0


def _inexact(part: Any) -> int | None:
    """An integer anywhere in a schema that a float64 may not hold; there is none in most."""
    if isinstance(part, dict | list):
        inside = (_inexact(each) for each in (part.values() if isinstance(part, dict) else part))
        return next((found for found in inside if found), None)
    return part if isinstance(part, int) and abs(part) > _EXACT else None


def _first_line(said: str) -> str:
    """What llguidance says, without the lines that tell where in itself it was; of a regex, what is wrong with it."""
    first, *others = said.strip().splitlines() or ["no reason is given"]
    return " ".join([first, *(line for line in others if line.startswith("error: "))])[:_SAID]


def _refused(why: str, hint: str | None = None) -> ConfigError:
    return ConfigError([why], where="json_schema", hint=hint)
