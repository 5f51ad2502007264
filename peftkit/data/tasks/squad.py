"""SQuAD's JSON (versions 1.1 and 2.0) → rows of a context, a question and its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkit.data.readers import Records, Where
from peftkit.data.tasks.problems import Problems, shown
from peftkit.data.tasks.task import Answer, TaskRow
from peftkit.data.tasks.values import answers_of, misplaced, text_of

_READ = ("question", "answers", "is_impossible", "plausible_answers")


def is_squad(records: Records) -> bool:
    """Whether the records are articles, each with a list of paragraphs."""
    return all(isinstance(record.get("paragraphs"), list) for _, record in records.records)


def read_squad(records: Records, *, labelled: bool) -> tuple[TaskRow, ...]:
    """A row for every question; `columns` hold its id and the title of its article.

    A question without answers is one that its context does not answer; `plausible_answers` are not read. Raises
    DataError with all problems: texts that are missing, answers that do not stand where they say.
    """
    problems = Problems(records.source)
    rows: list[TaskRow] = []
    file = Path(records.source).name
    for title, context, question in _questions(records, problems):
        where = Where(file, None, len(rows))
        place = f"{where} (id {question.get('id', 'unknown')})"
        rest = {key: value for key, value in question.items() if key not in _READ}
        text = _text(context, "context", place, problems)
        asked = _text(question.get("question"), "question", place, problems)
        target = _answers(question, text, place, problems) if labelled else None
        rows.append(TaskRow(where, {"title": title, **rest}, text, asked, target=target))
    if not rows and not problems.found:
        problems.add(file, "holds no questions")
    problems.refuse(len(rows), "every answer stands in its context, at the character answer_start (from 0)")
    return tuple(rows)


def _questions(records: Records, problems: Problems) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Title, context and question, in the order of the file."""
    for where, article in records.records:
        for paragraph in article["paragraphs"]:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
                problems.add(where, f"the paragraph {shown(paragraph)} has no list of questions (qas)")
                continue
            for question in questions:
                yield article.get("title", ""), paragraph.get("context"), question


def _text(value: Any, name: str, place: str, problems: Problems) -> str:
    try:
        return text_of(value)
    except ValueError as error:
        problems.add(place, f"{name}: {error}")
        return ""


def _answers(question: dict[str, Any], context: str, place: str, problems: Problems) -> tuple[Answer, ...] | None:
    impossible = question.get("is_impossible")
    try:
        answers = answers_of(question.get("answers", [] if impossible else None))
    except ValueError as error:
        problems.add(place, f"answers: {error}")
        return None
    if impossible and answers:
        problems.add(place, f"is_impossible, and yet the answer {shown(answers[0].text)}")
    if impossible is False and not answers:
        problems.add(place, "not is_impossible, and yet no answer")
    for answer in answers:
        if context and (wrong := misplaced(answer, context)) is not None:
            problems.add(place, wrong)
    return answers
