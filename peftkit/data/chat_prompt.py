"""A conversation that waits for an answer, as token ids: rendered as training rendered it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import prepare, prompt_ids, texts_of
from peftkit.data.formats import Row
from peftkit.data.template import Rendering, render
from peftkit.errors import DataError


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    rendering: Rendering,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a conversation that waits for an answer, rendered as training rendered it.

    Raises DataError when it cannot be rendered, and for `tools` that the template leaves out of the prompt.
    """
    row = Row(messages=tuple(dict(m) for m in messages), text=None, tools=tuple(dict(tool) for tool in tools) or None,
              chat_template_kwargs={}, columns={}, where="chat")  # type: ignore[arg-type]  # fmt: skip
    turns = prepare(row, tokenizer, rendering)
    text = render(turns, row, tokenizer, rendering, prompt=True)
    if row.tools:
        _check_tools(row.tools, tokenizer)
        if text == render(turns, replace(row, tools=None), tokenizer, rendering, prompt=True):
            raise DataError(
                f"the base's chat template does not show the model its {len(row.tools)} tools",
                expected="a base whose template renders tools",
                hint="describe them in the system message, or ask without tools",
            )
    return prompt_ids(text, tokenizer, rendering)


def _check_tools(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> None:
    """Raise DataError when a definition contains a control token: rendered, it would end or fake a turn."""
    found = next((token for text in texts_of(tools) for token in tokenizer.control if token in text), None)
    if found:
        raise DataError(f"chat: a tool contains the control token {found!r}", expected="plain text in its definition")
