"""A causal base asked in words, with solved examples, and its answer read: the baseline that training must beat."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskName, TaskRow
from peftkit.evaluation.tasks.spans import marks_spans

NO_ANSWER = "unanswerable"
_NUMBER = re.compile(r"[-+−]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?")
_DECODER = json.JSONDecoder()
_ATTEMPTS = 50
"""Brackets at which a list may begin, before an answer is given up."""


def messages(
    task: TaskName,
    head: Head,
    row: TaskRow,
    shots: Sequence[TaskRow],
    instruction: str | None = None,
) -> list[dict[str, str]]:
    """The conversation that ends with `row`: the instruction before the first question, each shot solved before it.

    `instruction` takes the place of the task's own, which names the labels.
    """
    said = instruction if instruction is not None else instructions(task, head)
    turns: list[dict[str, str]] = []
    for shot in shots:
        turns.append({"role": "user", "content": _question(task, shot)})
        turns.append({"role": "assistant", "content": _answer(task, head, shot)})
    turns.append({"role": "user", "content": _question(task, row)})
    turns[0] = {"role": "user", "content": f"{said}\n\n{turns[0]['content']}"}
    return turns


def instructions(task: TaskName, head: Head) -> str:
    """What is asked for."""
    labels = ", ".join(head.labels)
    if task == "text_classification" and head.problem == "multi_label":
        return f"Which of these labels fit the text: {labels}? Answer with a JSON list of labels and nothing else."
    if task == "token_classification" and marks_spans(head):
        types = ", ".join(sorted({label[2:] for label in head.labels if label != "O"}))
        return (
            f"Find the entities of these types in the text: {types}. Answer with a JSON list of objects with the keys "
            '"type" and "text", in the order of the text, and nothing else.'
        )
    if task == "token_classification":
        return f"Tag each word of the text with one of: {labels}. Answer with a JSON list of tags and nothing else."
    return {
        "text_classification": f"Classify the text as one of: {labels}. Answer with the label and nothing else.",
        "regression": f"Give the {labels} of the text as a number. Answer with the number and nothing else.",
        "extractive_qa": "Answer the question with words copied from the text and nothing else. "
        f"If the text does not answer it, say {NO_ANSWER}.",
        "translation": "Translate the text as the examples do. Answer with the translation and nothing else.",
        "summarization": "Summarize the text. Answer with the summary and nothing else.",
        "image_classification": "",
    }[task]


def parse(task: TaskName, head: Head, row: TaskRow, answer: str) -> Prediction:
    """What an answer says.

    One label: the answer itself, else the one label that it names; an answer that names none or several is "", which
    counts as wrong. Several labels: those of the JSON list, else those that it names. A number: the first one, else
    None. Entities that do not stand in the text are left out. An answer of several lines about one label or one span is
    read as far as its first line.
    """
    text = answer.strip()
    if task == "token_classification":
        return Prediction(_tags(head, row, text))
    if task in ("translation", "summarization"):
        return Prediction(text)
    first = text.splitlines()[0].strip() if text else ""
    if task == "regression":
        found = _NUMBER.search(first)
        return Prediction(float(found[0].replace("−", "-").replace(",", ".")) if found else None)
    if task == "extractive_qa":
        words = first.strip("\"'“”").strip()
        return Prediction("" if words.rstrip(".").casefold() == NO_ANSWER else words)
    if head.problem == "multi_label":
        listed = _list(text)
        named = {_folded(str(item)) for item in listed} if listed is not None else set()
        chosen = (
            [label for label in head.labels if _folded(label) in named] if listed is not None else _named(head, text)
        )
        return Prediction(tuple(chosen))
    return Prediction(_one_label(head, first))


def _one_label(head: Head, text: str) -> str:
    exact = [label for label in head.labels if _folded(label) == _folded(text)]
    named = exact or _named(head, text)
    return named[0] if len(named) == 1 else ""


def _named(head: Head, text: str) -> list[str]:
    """Labels that stand in the text as words of their own; a label inside a longer one that is named is not counted."""
    rest, found = text.casefold(), set()
    for label in sorted(head.labels, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(label.casefold())}(?!\w)"
        if re.search(pattern, rest):
            found.add(label)
            rest = re.sub(pattern, " ", rest)
    return [label for label in head.labels if label in found]


def _folded(text: str) -> str:
    return text.strip().strip("\"'“”`*.:!").strip().casefold()


def _list(text: str) -> list[Any] | None:
    """The first JSON list in the text, None where there is none."""
    for found in islice(re.finditer(r"\[", text), _ATTEMPTS):
        try:
            value: list[Any] = _DECODER.raw_decode(text, found.start())[0]
        except (ValueError, RecursionError):
            continue
        return value
    return None


def _question(task: TaskName, row: TaskRow) -> str:
    if task == "token_classification":
        return "Text: " + " ".join(row.words)
    if task == "extractive_qa":
        return f"Text: {row.text}\nQuestion: {row.pair}"
    return f"Text: {row.text}" + (f"\nSecond text: {row.pair}" if row.pair is not None else "")


def _answer(task: TaskName, head: Head, row: TaskRow) -> str:
    """A row's target as an answer is to be written."""
    if task == "token_classification":
        solved = _entities(row) if marks_spans(head) else list(row.target)
        return json.dumps(solved, ensure_ascii=False)
    if task == "extractive_qa":
        return row.target[0].text if row.target else NO_ANSWER
    if head.problem == "multi_label":
        return json.dumps(list(row.target), ensure_ascii=False)
    return f"{row.target:g}" if task == "regression" else str(row.target)


def _entities(row: TaskRow) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for word, tag in zip(row.words, row.target, strict=True):
        if tag.startswith("B-"):
            found.append({"type": tag[2:], "text": word})
        elif tag.startswith("I-") and found:
            found[-1]["text"] += f" {word}"
    return found


def _tags(head: Head, row: TaskRow, text: str) -> tuple[str, ...]:
    """A tag for each word: of the entities in the answer's JSON list where tags mark spans, else the listed tags."""
    listed = _list(text) or []
    if not marks_spans(head):
        known = [tag if tag in head.labels else "" for tag in map(str, listed)]
        return tuple((known + [""] * len(row.words))[: len(row.words)])
    tags, words = ["O"] * len(row.words), [word.casefold() for word in row.words]
    for entity in listed:
        if isinstance(entity, dict):
            _mark(tags, words, str(entity.get("type", "")), str(entity.get("text", "")), head)
    return tuple(tags)


def _mark(tags: list[str], words: list[str], kind: str, text: str, head: Head) -> None:
    """Tag the first untagged words that read as `text`; nothing where there are none, or no such type."""
    wanted = text.casefold().split()
    kinds = {label[2:].casefold(): label[2:] for label in head.labels if label != "O"}
    if not wanted or kind.casefold() not in kinds or "B-" + kinds[kind.casefold()] not in head.labels:
        return
    inside = "I-" + kinds[kind.casefold()]
    if len(wanted) > 1 and inside not in head.labels:
        return
    for start in range(len(words) - len(wanted) + 1):
        stop = start + len(wanted)
        if words[start:stop] == wanted and tags[start:stop] == ["O"] * len(wanted):
            tags[start:stop] = ["B-" + kinds[kind.casefold()], *[inside] * (len(wanted) - 1)]
            return
