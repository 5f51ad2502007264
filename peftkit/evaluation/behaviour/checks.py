"""What an answer has to be: the kinds of checks that a probe may name."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from peftkit.config import Spec
from peftkit.data.findings.language import language
from peftkit.evaluation.behaviour.refusal import declines
from peftkit.generation.requests import Completion


class Regex(Spec):
    """Somewhere in the answer the pattern (Python's `re`) is found."""

    kind: Literal["regex"]
    pattern: str

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern

    def passes(self, answer: Completion) -> bool:
        return re.search(self.pattern, answer.text) is not None


class OneOf(Spec):
    """The answer is one of these, whatever its case, the spaces around it and a mark at its end."""

    kind: Literal["one_of"]
    answers: tuple[str, ...] = Field(min_length=1)

    def passes(self, answer: Completion) -> bool:
        return _bare(answer.text) in map(_bare, self.answers)


class JsonObject(Spec):
    """The whole answer is one JSON object with these keys and no others; a fence around it is more than JSON."""

    kind: Literal["json"]
    keys: tuple[str, ...] = Field(min_length=1)

    def passes(self, answer: Completion) -> bool:
        try:
            value = json.loads(answer.text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(value) == set(self.keys)


class Lines(Spec):
    """The answer has just so many lines that are not blank."""

    kind: Literal["lines"]
    lines: int = Field(gt=0)

    def passes(self, answer: Completion) -> bool:
        return sum(bool(line.strip()) for line in answer.text.split("\n")) == self.lines


class MaxWords(Spec):
    """The answer has a word, and no more than so many."""

    kind: Literal["max_words"]
    words: int = Field(gt=0)

    def passes(self, answer: Completion) -> bool:
        return 0 < len(answer.text.split()) <= self.words


class Refuses(Spec):
    """The answer declines, by phrases (`refusal.declines` says what these miss)."""

    kind: Literal["refuses"]

    def passes(self, answer: Completion) -> bool:
        return declines(answer.text)


class NotRefuses(Spec):
    """There is an answer, and it does not decline."""

    kind: Literal["not_refuses"]

    def passes(self, answer: Completion) -> bool:
        return bool(answer.text.strip()) and not declines(answer.text)


class Language(Spec):
    """The answer is in this language, as py3langid tells; one of less than some 60 letters fails: too few to tell."""

    kind: Literal["language"]
    language: str = Field(pattern="^[a-z]{2}$")
    """ISO 639-1."""

    def passes(self, answer: Completion) -> bool:
        return language(answer.text) == self.language


class Stops(Spec):
    """The model says something, and ends its answer by itself."""

    kind: Literal["stops"]

    def passes(self, answer: Completion) -> bool:
        return answer.stopped and bool(answer.text.strip())


Check = Annotated[
    Regex | OneOf | JsonObject | Lines | MaxWords | Refuses | NotRefuses | Language | Stops,
    Field(discriminator="kind"),
]


def _bare(text: str) -> str:
    return text.strip().rstrip(".!").strip().casefold()
