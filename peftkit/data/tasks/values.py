"""Cells of a table → what a task takes: texts, labels, numbers, words, tags and answers.

Every function returns the value, or raises ValueError with what is wrong in a few words.
"""

from __future__ import annotations

import json
import math
from typing import Any

from peftkit.data.tasks.problems import shown
from peftkit.data.tasks.task import Answer


def text_of(value: Any) -> str:
    """A text that says something; nothing in it is changed."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text" if value is not None else "there is no value")
    if not value.strip():
        raise ValueError("it is empty")
    return value


def label_of(value: Any) -> str:
    """A label: a text, a whole number or a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else text_of(value)


def labels_of(value: Any, separator: str) -> tuple[str, ...]:
    """Several labels, or none: a list, or one text with `separator` between them."""
    if value is None:
        raise ValueError("there is no value (for a row without labels write an empty list or text)")
    listed = _listed(value)
    if listed is None and isinstance(value, str):
        listed = [part.strip() for part in value.split(separator)] if value.strip() else []
    labels = tuple(map(label_of, [value] if listed is None else listed))
    if len(set(labels)) != len(labels):
        raise ValueError(f"{shown(value)} names a label twice")
    return labels


def number_of(value: Any) -> float:
    """A finite number, or a text that is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{shown(value)} is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        comma = isinstance(value, str) and "," in value
        raise ValueError(f"{shown(value)} is no number{'; decimals follow a point' if comma else ''}") from None
    if not math.isfinite(number):
        raise ValueError(f"{shown(value)} is not a finite number")
    return number


def words_of(value: Any) -> tuple[str, ...]:
    """Words: a list, or a text with spaces between them."""
    listed = _listed(value)
    if listed is None:
        listed = text_of(value).split()
    if not listed:
        raise ValueError("there are no words")
    for at, word in enumerate(listed):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"word {at + 1} is {shown(word)}, which is no word")
    return tuple(listed)


def tags_of(value: Any) -> tuple[str, ...]:
    """Tags: a list of texts, or a text with spaces between them."""
    listed = _listed(value)
    if listed is None:
        listed = text_of(value).split()
    for tag in listed:
        if isinstance(tag, int):
            raise ValueError(f"the tag {tag} is a number: write the names that the numbers of the set stand for")
        if not isinstance(tag, str) or not tag.strip():
            raise ValueError(f"{shown(tag)} is no tag")
    return tuple(listed)


def answers_of(value: Any) -> tuple[Answer, ...]:
    """Answers as SQuAD writes them: a list of {text, answer_start}, {text: […], answer_start: […]}, or JSON of it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{shown(value)} is no JSON of answers with text and answer_start") from None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(f"{shown(value)} has not as many texts as answer_start")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list) or not all(isinstance(answer, dict) for answer in value):
        raise ValueError(f"{shown(value)} is no list of answers with text and answer_start")
    answers = []
    for answer in value:
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the answer {shown(answer)} has no text")
        if isinstance(start, bool) or not isinstance(start, int):
            raise ValueError(f"the answer {shown(text)} has the answer_start {shown(start)}, which is no position")
        answers.append(Answer(text, start))
    return tuple(answers)


def misplaced(answer: Answer, context: str) -> str | None:
    """What is wrong where an answer does not stand at its character of the context; None where it does."""
    stands = context[max(0, answer.start) :][: len(answer.text)]
    if answer.start >= 0 and stands == answer.text:
        return None
    places, at = [], context.find(answer.text)
    while at >= 0:
        places.append(at)
        at = context.find(answer.text, at + 1)
    there = f"there stands {shown(stands)}" if 0 <= answer.start < len(context) else f"it has {len(context)} characters"
    nearest = min(places, key=lambda place: abs(place - answer.start), default=None)
    elsewhere = f"it stands at {nearest}" if nearest is not None else "it stands nowhere in the context"
    return f"the answer {shown(answer.text)} is not at character {answer.start} of its context: {there}; {elsewhere}"


def _listed(value: Any) -> list[Any] | None:
    """A list as it is, or as JSON in a text; None for anything else."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            return None
        return found if isinstance(found, list) else None
    return None
