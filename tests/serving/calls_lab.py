"""Answers with calls: what a template makes of them, and what is read off them."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.formats import Row
from peftkit.data.template import Rendering, render
from peftkit.generation.requests import Completion
from peftkit.serving.openai.call_forms import form_of, shown
from peftkit.serving.openai.calls import Form, Reading, new_id
from peftkit.serving.openai.turns import Tools

PLAIN = Rendering()


def tool(name: str, **properties: str | dict[str, Any]) -> dict[str, Any]:
    """A function whose arguments are of these types."""
    typed = {key: {"type": kind} if isinstance(kind, str) else kind for key, kind in properties.items()}
    return {
        "type": "function",
        "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": typed}},
    }


def shipped(name: str) -> str:
    """A chat template that comes with TRL, as its family publishes it."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


TOOLS = (tool("f", city="string", days="array"), tool("g-1", a="object"))
AUTO = Tools(TOOLS, "auto")


def written(
    tokenizer: Tokenizer, calls: list[tuple[str, dict[str, Any]]], content: str = "", short: bool = False
) -> str:
    """What a model answers that writes calls as its template does."""
    made = [{"id": new_id(short=short), "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": made}]
    row = Row(messages=(), text=None, tools=TOOLS, chat_template_kwargs={}, columns={}, where="test")  # type: ignore[arg-type]
    whole = render(turns, row, tokenizer, PLAIN, prompt=False)
    prompt = render(turns[:1], row, tokenizer, PLAIN, prompt=True)
    assert whole.startswith(prompt)
    said = whole[len(prompt) :]
    stop = tokenizer.decode([tokenizer.stop_ids[0]], skip_special_tokens=False)
    return said[: said.index(stop)]


@cache
def form(tokenizer: Tokenizer) -> Form:
    return form_of(shown(tokenizer, PLAIN), tokenizer)


def read(tokenizer: Tokenizer, text: str, tools: Tools = AUTO, size: int = 1) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls of an answer that comes in pieces, as a stream gives it out."""
    ids = tokenizer.encode(text)
    completion = Completion(tokenizer.decode(ids), ids, True)
    reading = Reading(tools, form(tokenizer) if tools.choice == "auto" else None)
    pieces = [completion.text[at : at + size] for at in range(0, len(completion.text), size)]
    content = "".join(reading.add(piece) for piece in pieces)
    rest, calls = reading.finish(completion, tokenizer)
    assert len({call.id for call in calls}) == len(calls)
    return content + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@contextmanager
def no_hang(seconds: int = 60) -> Iterator[None]:
    """End what would take hours. A signal, and not a thread: a pattern that is looked for lets no other thread run."""

    def end(number: int, frame: Any) -> None:
        raise AssertionError(f"it was not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
