"""Who speaks, and text that another chat template wrote."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from peftkit.data.findings.finding import Hit, RowText, Tally

# Llama 2 and 3, ChatML, Gemma, Phi, Zephyr, Alpaca, Vicuna, DeepSeek, Mistral, Command R, Harmony: their model cards.
_MARKERS = (
    "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|endoftext|>", "</s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>",
    "<|START_OF_TURN_TOKEN|>", "<|message|>", "<|channel|>",
)  # fmt: skip
_HEADING = re.compile(r"^### ?(?:Instruction|Response|Input|Human|Assistant)\b ?:?", re.MULTILINE)
_SPEAKERS = re.compile(r"^(?:Human|USER|User): .*?^(?:Assistant|ASSISTANT|AI|GPT): ?", re.MULTILINE | re.DOTALL)
_LABEL = re.compile(
    r"^\s*(?:Assistant|ASSISTANT|AI|Bot|GPT|ChatGPT|Response|Output|Answer|回答|答案)\s*[:：]\s*", re.IGNORECASE
)
_PLACEHOLDER = re.compile(
    r"\{\{ ?[\w. ]{1,40} ?\}\}|\{%-? ?\w+|<(?:INSERT|YOUR|NAME)[ _][A-Z_ ]+>|\bLorem ipsum dolor\b"
)


def check(row: RowText, foreign: re.Pattern[str]) -> Iterator[Hit]:
    """What is wrong with the turns of one row; `foreign` finds the marks of other bases' templates."""
    text, chars = row.whole, row.chars
    if "<" in chars or "[" in chars:
        found = foreign.search(text)
        if found:
            yield Hit("foreign_template", *found.span())
    found = _HEADING.search(text) if "#" in chars else None
    found = found or (_SPEAKERS.search(text) if ":" in chars else None)
    if found:
        yield Hit("foreign_template", found.start(), min(found.end(), found.start() + 40))
    if "{" in chars or "<" in chars or "Lorem" in text:
        found = _PLACEHOLDER.search(text)
        if found:
            yield Hit("placeholder", *found.span())
    if row.row.messages:
        yield from _turns(row)


def foreign_to(control: Collection[str]) -> re.Pattern[str]:
    """A pattern of the marks that a tokenizer with these control tokens does not know; those it knows are refused."""
    return re.compile("|".join(re.escape(mark) for mark in _MARKERS if mark not in control))


def _turns(row: RowText) -> Iterator[Hit]:
    messages = row.row.messages
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[0] == "assistant":
        yield Hit("first_turn_assistant")
    for answer in row.answers:
        found = _LABEL.match(answer)
        if found:
            start = row.whole.index(answer)
            yield Hit("role_label", start, start + found.end() + 20)
        if answer.count("<think>") > answer.count("</think>"):
            start = row.whole.index("<think>")
            yield Hit("think_open", start, start + 40)
    if not row.row.tools and any(message.get("tool_calls") for message in messages):
        yield Hit("tools_missing")


def check_all(rows: Sequence[RowText], tally: Tally) -> None:
    """What differs from row to row."""
    chats = [row for row in rows if row.row.messages]
    plain = [row for row in chats if row.row.messages[0]["role"] != "system"]
    if len(plain) < len(chats):
        for row in plain:
            tally.add(row, [Hit("system_mixed")])
    thinking = [row for row in chats if any("<think>" in answer for answer in row.answers)]
    if 0 < len(thinking) < len(chats):
        for row in thinking:
            tally.add(row, [Hit("think_mixed")])
    columns = dict.fromkeys(column for row in rows for column in row.row.columns)
    if columns:
        count = sum(bool(row.row.columns) for row in rows)
        tally.say("unused_columns", count, ", ".join(map(repr, columns)))
