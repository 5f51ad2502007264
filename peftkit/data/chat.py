"""Rows to token ids with a loss mask: what is learned is exactly what must be produced at inference.

For every assistant turn the base's own template is rendered twice: the conversation before it *with* the generation
prompt (what the model sees when it has to answer) and the conversation including it. The difference is the answer. It
is cut after its end-of-turn token, which is learned exactly once. Prompt and answer are tokenized apart, because at
inference the prompt's tokens are fixed before the first answer token exists. This needs no `{% generation %}` markers.

A template that renders a past turn differently from a present one (thinking templates drop old think blocks) makes
one example per answer, each with the prompt that inference would use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from peftkit.base.tokenizer import Ahead, Tokenizer
from peftkit.data.formats import Row
from peftkit.data.template import Loss, Rendering, render
from peftkit.errors import DataError

IGNORED = -100
_BATCH = 512  # rows tokenized at once: enough to keep the cores busy, little to hold
T = TypeVar("T")
_THINK_BLOCK = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One training sequence: ids and labels of equal length, -100 where no loss falls."""

    input_ids: list[int]
    labels: list[int]
    answer_start: int
    """Index of the final answer's first token; what lies before is its inference prompt. 0 for text rows."""
    row: int
    """Index of the row it comes from."""
    where: str
    stop_added: bool = False
    """The template wrote no end-of-turn token, so the tokenizer's was appended."""

    @property
    def answer_tokens(self) -> int:
        """How many tokens the loss falls on (the first token of a sequence is never predicted)."""
        ignored = self.labels.count(IGNORED)
        return len(self.labels) - ignored - sum(label != IGNORED for label in self.labels[:1])

    @property
    def prompt_ids(self) -> list[int]:
        """What inference feeds before the final answer."""
        return self.input_ids[: self.answer_start]


@dataclass(frozen=True)
class _Turn:
    """One assistant turn as inference sees it; `text` may go on after the end-of-turn token."""

    prompt: str
    text: str


@dataclass(frozen=True)
class _Answer(_Turn):
    """A turn whose `ids` end with the end-of-turn token."""

    ids: list[int]
    stop_added: bool


def encode_row(row: Row, index: int, tokenizer: Tokenizer, rendering: Rendering) -> list[Example]:
    """Token ids and labels of one row: one example, or one per answer where the template rewrites the past.

    Raises DataError when the row cannot be rendered so that training and inference agree.
    """
    return _encode(row, index, _turns(row, tokenizer, rendering), tokenizer, rendering)


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, rendering: Rendering) -> Iterator[list[Example] | DataError]:
    """What `encode_row` returns or raises, row by row.

    A thread tokenizes a batch, without the interpreter's lock, while the next one is rendered.
    """
    with ThreadPoolExecutor(1, "tokenize") as thread:

        def rendered(start: int) -> tuple[int, list[list[_Turn] | DataError], Future[Ahead]]:
            found = [_caught(_turns, row, tokenizer, rendering) for row in rows[start : start + _BATCH]]
            known = [turns for turns in found if turns and not isinstance(turns, DataError)]
            texts = [turns[0].prompt for turns in known] + [turn.text for turns in known for turn in turns]
            return start, found, thread.submit(Ahead.of, tokenizer, texts)

        for start, found, ahead in _one_ahead(map(rendered, range(0, len(rows), _BATCH))):
            for index, turns in enumerate(found, start):
                if isinstance(turns, DataError):
                    yield turns
                else:
                    yield _caught(_encode, rows[index], index, turns, ahead.result(), rendering)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Give each item out only when the next one has been made."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


def _caught(call: Callable[..., T], *given: Any) -> T | DataError:
    try:
        return call(*given)
    except DataError as error:
        return error


def _turns(row: Row, tokenizer: Tokenizer, rendering: Rendering) -> list[_Turn]:
    """The row's answers as text; none for a text row."""
    if row.text is not None:
        return []
    messages = prepare(row, tokenizer, rendering)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError(f"{row.where}: no assistant turn, so there is nothing to learn", expected="an answer")
    return [_turn(messages, turn, row, tokenizer, rendering) for turn in turns]


def _encode(row: Row, index: int, turns: list[_Turn], tokenizer: Tokenizer, rendering: Rendering) -> list[Example]:
    if row.text is not None:
        return [_encode_text(row, index, tokenizer)]
    answers = [_answer(turn, tokenizer) for turn in turns]
    examples = _one_sequence(answers, index, row, tokenizer, rendering)
    if examples is None:
        if rendering.loss == "all":
            raise DataError(
                f"{row.where}: data.loss=all would count early turns of this row several times, because the template "
                "shows past turns differently from present ones",
                expected="data.loss=assistant or last",
                hint="remove data.loss",
            )
        examples = [_single(answer, index, row, tokenizer, rendering) for answer in answers]
    return _with_loss(examples, rendering.loss)


def prompt_for(
    row: Row, tokenizer: Tokenizer, rendering: Rendering, *, instructions: str | None = None, shots: Sequence[Row] = ()
) -> list[int]:
    """The inference prompt of a row's final answer, optionally with more instructions and solved examples.

    `instructions` are appended to the system turn, `shots` are shown as earlier turns: what an untrained base needs.
    """
    messages = prepare(row, tokenizer, rendering)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    history = list(messages[:last])
    system = [history.pop(0)] if history and history[0]["role"] == "system" else []
    if instructions:
        given = f"{system[0]['content']}\n\n" if system else ""
        system = [{"role": "system", "content": given + instructions}]
    examples = [
        message for shot in shots for message in prepare(shot, tokenizer, rendering) if message["role"] != "system"
    ]
    text = render([*system, *examples, *history], row, tokenizer, rendering, prompt=True)
    return prompt_ids(text, tokenizer, rendering)


def segments(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The example's text in runs of (text, learned), special tokens included, for showing the mask."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        learned = label != IGNORED
        if runs and runs[-1][1] == learned:
            runs[-1][0].append(token)
        else:
            runs.append(([token], learned))
    return [(tokenizer.decode(ids, skip_special_tokens=False), learned) for ids, learned in runs]


def prepare(row: Row, tokenizer: Tokenizer, rendering: Rendering) -> list[dict[str, Any]]:
    """A row's messages as the template gets them.

    Raises DataError when a message contains one of the tokenizer's control tokens: rendered, it would end or fake a
    turn, which an evaluation or a loss curve would never show.
    """
    messages = []
    for number, message in enumerate(row.messages, start=1):
        found = next((token for text in texts_of(message) for token in tokenizer.control if token in text), None)
        if found:
            raise DataError(
                f"{row.where}: message {number} ({message['role']}) contains the control token {found!r}",
                expected="plain text: inside a message it would end the turn",
                hint="remove it, or store the conversation as separate messages",
            )
        content = message.get("content")
        if rendering.think == "strip" and message["role"] == "assistant" and isinstance(content, str):
            kept = _THINK_BLOCK.sub("", content)
            if content.strip() and not kept.strip() and not message.get("tool_calls"):
                raise DataError(
                    f"{row.where}: message {number} is nothing but a think block, so data.think=strip leaves no answer",
                    expected="an answer after the think block",
                    hint="remove the row, or set data.think=keep",
                )
            message = {**message, "content": kept}
            message.pop("reasoning_content", None)
        messages.append(dict(message))
    return messages


def texts_of(value: Any) -> Iterator[str]:
    """Every string inside a message: content, reasoning, names and arguments of tool calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def _encode_text(row: Row, index: int, tokenizer: Tokenizer) -> Example:
    ids = list(tokenizer.hf.encode(row.text, add_special_tokens=True))
    if not ids or ids[-1] not in tokenizer.stop_ids:
        ids.append(tokenizer.stop_ids[0])
    return Example(ids, list(ids), 0, index, str(row.where))


def _turn(messages: list[dict[str, Any]], turn: int, row: Row, tokenizer: Tokenizer, rendering: Rendering) -> _Turn:
    prompt = render(messages[:turn], row, tokenizer, rendering, prompt=True)
    full = render(messages[: turn + 1], row, tokenizer, rendering, prompt=False)
    if not full.startswith(prompt):
        raise DataError(
            f"{row.where}: the template's generation prompt is not how it begins the answer of message {turn + 1}: "
            f"it prompts with {prompt[-40:]!r}",
            expected="a template whose training text starts with its inference prompt",
            hint="try data.template_kwargs={enable_thinking: false}, or add the think block to the answer",
        )
    return _Turn(prompt, full[len(prompt) :])


def _answer(turn: _Turn, tokenizer: Tokenizer) -> _Answer:
    ids = tokenizer.encode(turn.text)
    stop = next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), None)
    if stop is None:
        return _Answer(turn.prompt, turn.text, [*ids, tokenizer.stop_ids[0]], stop_added=True)
    return _Answer(turn.prompt, turn.text, ids[: stop + 1], stop_added=False)


def _one_sequence(
    answers: list[_Answer], index: int, row: Row, tokenizer: Tokenizer, rendering: Rendering
) -> list[Example] | None:
    """All answers in one sequence, or None when a later prompt is not the earlier text continued, token by token."""
    ids: list[int] = []
    labels: list[int] = []
    text, start = "", 0
    for at, answer in enumerate(answers):
        if not answer.prompt.startswith(text):
            return None
        whole = prompt_ids(answer.prompt, tokenizer, rendering)
        between = tokenizer.encode(answer.prompt[len(text) :]) if ids else whole
        if whole != ids + between:
            return None
        ids, start = ids + between + answer.ids, len(ids) + len(between)
        labels = labels + [IGNORED] * len(between) + answer.ids
        if at + 1 < len(answers):  # decoding is an eighth of the time, and most rows have one answer
            said = answer.text if answer.stop_added else tokenizer.decode(answer.ids, skip_special_tokens=False)
            text = answer.prompt + said
    return [Example(ids, labels, start, index, str(row.where), answers[-1].stop_added)]


def _single(answer: _Answer, index: int, row: Row, tokenizer: Tokenizer, rendering: Rendering) -> Example:
    prompt = prompt_ids(answer.prompt, tokenizer, rendering)
    labels = [IGNORED] * len(prompt) + answer.ids
    return Example(prompt + answer.ids, labels, len(prompt), index, str(row.where), answer.stop_added)


def prompt_ids(text: str, tokenizer: Tokenizer, rendering: Rendering) -> list[int]:
    """What inference feeds: a chat template writes its own BOS, plain text gets the tokenizer's."""
    return [*(tokenizer.bos if rendering.template == "plain" else []), *tokenizer.encode(text)]


def _with_loss(examples: list[Example], loss: Loss) -> list[Example]:
    if loss == "assistant":
        return examples
    if loss == "all":
        return [_relabel(example, list(example.input_ids)) for example in examples]
    last = examples[-1]
    kept = last.labels[last.answer_start :]
    return [_relabel(last, [IGNORED] * last.answer_start + kept)]


def _relabel(example: Example, labels: list[int]) -> Example:
    return Example(example.input_ids, labels, example.answer_start, example.row, example.where, example.stop_added)
