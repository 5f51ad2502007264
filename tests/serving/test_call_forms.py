"""Templates that nobody would write who means well, and why a template is refused."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from serving.calls_lab import PLAIN, no_hang, read
from serving.scripted import Scripted
from serving.test_completions import TOOLS, asking, told
from serving.tool_templates import HERMES, MARKED, OTHERWISE, QWEN3_CODER, XML, tokenizer_with

from peftkit.errors import DataError
from peftkit.serving.openai import completions
from peftkit.serving.openai.call_forms import Shown, Spelling, form_of, shown
from peftkit.serving.openai.turns import Tools


def calls_as(before: str, argument: str, after: str = "", times: int = 1) -> str:
    """A template that writes calls with NAME before each, its arguments with KEY and VALUE, and then what ends it."""
    head, _, tail = XML.partition("{{ '<function=' + c.function.name + '>' }}")
    rest = tail[tail.index("{% endfor %}{{ '</function>' }}") + len("{% endfor %}{{ '</function>' }}") :]
    write = argument.replace("KEY", "' + k + '").replace("VALUE", "' + v | string + '")
    named = before.replace("NAME", "' + c.function.name + '")
    each = f"{{{{ ('{write}') * {times} }}}}"
    loop = "{% for k, v in c.function.arguments.items() %}" + each + "{% endfor %}{{ '" + after + "' }}"
    return head + "{{ '" + named + "' }}" + loop + rest


BLANKS = " " * 100_000
HOSTILE = {
    "blanks in a call": calls_as("<a NAME" + " " * 800, "(KEY=VALUE)"),
    "more blanks in a call": calls_as("<a NAME" + BLANKS, "(KEY=VALUE)"),
    "blanks before the value": calls_as("<a NAME>", f"<p KEY>{BLANKS}VALUE</p>"),
    "blanks behind the value": calls_as("<a NAME>", f"<p KEY>VALUE{BLANKS}</p>", "</a>"),
    "lines": calls_as("<a NAME>" + "\\n" * 100_000, "<p KEY>VALUE</p>"),
    "arguments": calls_as("<a NAME", "<p KEY>VALUE</p>\\n", times=1_000),
    "tags": calls_as("<a NAME>" + "<" * 100_000, "<p KEY>VALUE</p>", "</a>"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_template_takes_its_server_long(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_with(tmp_path, HOSTILE[name])
    with no_hang():
        found = shown(tokenizer, PLAIN)
        with pytest.raises(DataError, match="cannot be used for tools"):
            form_of(found, tokenizer)


@pytest.mark.parametrize(
    "said",
    [
        "<a zq_first<p zq_key>zq_value</p>\n" * 58,
        "<a zq_first" + " " * 4_000 + "(zq_key=zq_value)",
        "<a zq_first>" + " <" * 2_000 + "p zq_key>zq_value</p>",
        "<a zq_first><p zq_key>zq_value" + "\n" * 4_000,
        "{" * 4_000 + "zq_first",
        '{"a":' * 800,
        "<a zq_first" * 300,
    ],
)
def test_what_a_template_writes_is_looked_through_once(tmp_path: Path, said: str) -> None:
    tokenizer = tokenizer_with(tmp_path, HERMES)
    with no_hang(), pytest.raises(DataError, match="cannot be used for tools"):
        form_of(Shown(said, None, said, Spelling()), tokenizer)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (XML, "refuses a number"),
        (MARKED, "change with the type of its value"),
        (calls_as("<a NAME>", "<' + ('s' if v is string else 'n') + ' KEY>VALUE</p>", "</a>"), "change with the type"),
        (calls_as("<a NAME>", "<p KEY>VALUE</' + ('s' if v is string else 'n') + '>", "</a>"), "change with the type"),
        (calls_as("<a NAME>", "<p KEY>VALUE</p>", "<end"), "cannot be read back"),
        (OTHERWISE, "neither as JSON nor each between tags"),
        (HOSTILE["more blanks in a call"], "as 200,0[0-9]+ characters"),
    ],
)
def test_a_refusal_names_its_cause(tmp_path: Path, template: str, why: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(DataError, match=why):
        form_of(shown(tokenizer, PLAIN), tokenizer)


def test_many_spaces_are_no_reason_to_refuse_a_template(tmp_path: Path) -> None:
    template = QWEN3_CODER.replace("+ '>\\n' }}", "+ '>" + "\\n" * 300 + "' }}")
    tokenizer = tokenizer_with(tmp_path, template)
    f = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}
    text = "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
    assert read(tokenizer, text, Tools((f,), "auto")) == ("", [("f", {"n": 3})])


def test_templates_are_read_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a while holds up nobody else."""
    tokenizer = tokenizer_with(tmp_path / "hermes", HERMES)
    threads = list[threading.Thread]()

    def watched(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return form_of(*given)

    async def scene() -> None:
        async with asking(Scripted(tokenizer, ["a"]), tmp_path) as client:
            await told(client, False, tools=TOOLS)
            assert threads
            assert threading.current_thread() not in threads

    monkeypatch.setattr(completions, "form_of", watched)
    asyncio.run(scene())
