"""Messages → text, by the base's own chat template or plainly."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.formats import Row
from peftkit.errors import DataError

Loss = Literal["assistant", "last", "all"]
Think = Literal["keep", "strip"]
Template = Literal["base", "plain"]


@dataclass(frozen=True)
class Rendering:
    """How rows become token ids; recorded with an adapter, so that serving renders what training rendered."""

    loss: Loss = "assistant"
    """assistant: every assistant turn; last: only the final one; all: every token of the row."""
    think: Think = "keep"
    """Whether `<think>` blocks in assistant turns are learned or removed before rendering."""
    template: Template = "base"
    """base: the base's own chat template; plain: prompt, blank line, answer (for bases without a template)."""
    kwargs: Mapping[str, Any] | None = None
    """Extra variables for the template, such as enable_thinking; a row's own win."""


def render(
    messages: list[dict[str, Any]], row: Row, tokenizer: Tokenizer, rendering: Rendering, *, prompt: bool
) -> str:
    """Messages as text: with `prompt` up to the point where an answer begins, else with the answer.

    Raises DataError when the template cannot render them.
    """
    if rendering.template == "plain":
        return _render_plain(messages, row, prompt=prompt)
    if not tokenizer.has_template:
        raise DataError(
            f"{row.where} is a conversation, and this base has no chat template",
            expected="an instruct base, or data.template=plain for single questions and answers",
            hint="data.template=plain",
        )
    variables = {**(rendering.kwargs or {}), **row.chat_template_kwargs}
    reserved = sorted(variables.keys() & _arguments(tokenizer.hf.__class__)) if variables else []
    if reserved:
        raise DataError(
            f"{row.where}: the template variable {reserved[0]!r} is an argument of the renderer itself",
            expected="variables that the template reads, such as enable_thinking",
            hint="remove it from chat_template_kwargs or data.template_kwargs",
        )
    try:
        text = tokenizer.hf.apply_chat_template(
            messages,
            tools=list(row.tools) if row.tools else None,
            tokenize=False,
            add_generation_prompt=prompt,
            **variables,
        )
    except Exception as error:  # a Jinja template may raise anything, most often its own raise_exception(...)
        raise DataError(
            f"{row.where}: the base's chat template refuses this conversation: {error}",
            expected="turns that the template knows",
            hint="look at the row with `peftkit data preview`",
        ) from error
    return str(text)


@lru_cache
def _arguments(kind: Any) -> frozenset[str]:
    """The arguments of a tokenizer class's renderer; to ask takes as long as to render."""
    return frozenset(inspect.signature(kind.apply_chat_template).parameters)


def _render_plain(messages: list[dict[str, Any]], row: Row, *, prompt: bool) -> str:
    if row.tools or (not prompt and sum(message["role"] == "assistant" for message in messages) > 1):
        raise DataError(
            f"{row.where}: data.template=plain cannot render tools or several assistant turns",
            expected="one question and one answer per row",
            hint="use an instruct base with its own chat template",
        )
    answer = "" if prompt else str(messages[-1]["content"])
    before = messages if prompt else messages[:-1]
    return "".join(f"{message['content']}\n\n" for message in before) + answer
