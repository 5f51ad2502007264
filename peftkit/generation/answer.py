"""Ask an opened engine something in turns, and put its answers into words for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.canonical import canonical_json
from peftkit.data.chat_prompt import chat_prompt
from peftkit.data.template import Rendering
from peftkit.errors import DataError, GenerationError, PeftkitError
from peftkit.generation.opening import Opened
from peftkit.generation.requests import Completion, Logprob, Request
from peftkit.generation.running import Ticket
from peftkit.registry.store import Version

ASKED = Request(prompt=())
"""What is asked for where nothing else is said."""


def ask(opened: Opened, version: Version | None, turns: Sequence[Mapping[str, Any]], like: Request = ASKED) -> Ticket:
    """Queue the next turn of a conversation, to be answered by a version; None is the base.

    The turns are rendered as its training rendered them. `like` says what else is asked for. Raises DataError for turns
    that cannot be rendered, and what `Engine.submit` raises.
    """
    ids = prompt_of(turns, opened.backbone.tokenizer, opened.rendering(version))
    return opened.engine.submit(replace(like, prompt=ids, adapter=version.reference if version else None))


def prompt_of(
    turns: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    rendering: Rendering,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, ...]:
    """Token ids of a conversation that waits for an answer. Raises DataError for what cannot be rendered."""
    asked, known = [dict(turn) for turn in turns], [dict(tool) for tool in tools]
    try:
        canonical_json([asked, known])
    except ValueError as error:
        raise DataError(f"this cannot be asked: {error}", expected="text in UTF-8") from error
    return tuple(chat_prompt(asked, tokenizer, rendering, known))


def answered(ticket: Ticket) -> Completion:
    """The completion of a ticket that is done.

    Raises what went wrong with it; what peftkit did not foresee, such as no memory, as GenerationError.
    """
    if isinstance(ticket.error, PeftkitError):
        raise ticket.error
    if ticket.error is not None:
        raise stopped(ticket.error) from ticket.error
    assert ticket.completion is not None
    return ticket.completion


def stopped(error: BaseException, hint: str | None = None) -> GenerationError:
    """What to raise for an error that is no fault of what was asked."""
    why = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return GenerationError(f"answering stopped: {type(error).__name__}: {why}", hint=hint)


def record(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion as JSON: who answered (None is the base), what, why it ended there, in how many tokens."""
    fields: dict[str, Any] = {
        "adapter": completion.adapter,
        "answer": completion.text,
        "finish": completion.finish,
        "tokens": len(completion.ids),
    }
    if completion.error is not None:
        fields["error"] = completion.error
    if completion.logprobs:
        fields["logprobs"] = [_logprob(each, tokenizer) for each in completion.logprobs]
    return fields


def _logprob(given: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_token(token, value, tokenizer) for token, value in given.top]
    return {**_token(given.token, given.value, tokenizer), **({"top": top} if top else {})}


def _token(token: int, value: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"id": token, "token": tokenizer.decode([token], skip_special_tokens=False), "logprob": value}
