"""Which column of a table is the text, which the second text, which the label: by setting, or by their usual names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftkit.data.readers import Records
from peftkit.data.tasks.files import ending_of
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskName
from peftkit.errors import DataError

_TEXT = (
    "text", "sentence", "content", "tweet", "review", "comment", "message", "body", "utterance", "document", "title",
    "description", "headline", "text_a", "sentence1", "premise", "question1",
)  # fmt: skip
_PAIR = ("pair", "text_pair", "text_b", "sentence2", "hypothesis", "question2")
_LABEL = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "emotion", "y")
_NUMBER = ("label", "score", "value", "number", "rating", "stars", "target", "similarity_score", "similarity", "y")
_WORDS, _TAGS = ("tokens", "words", "token", "word"), ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "tag")
_SOURCE, _TRANSLATED = ("source", "src", "input", "source_text"), ("target", "tgt", "output", "target_text")
_LONG = ("document", "article", "dialogue", "text", "report", "passage", "source")
_SUMMARY = ("summary", "highlights", "abstract", "headline", "target")
_LIKE = 0.6  # difflib's own bound for a good guess
_LANGUAGE = re.compile(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?")  # en, de, pt-BR, zh_Hans


@dataclass(frozen=True)
class Role:
    """What a column is to a task, and its usual names."""

    setting: str
    """Of TaskSpec: text, pair or label."""
    what: str
    names: tuple[str, ...]
    needed: bool = True


_ROLES: dict[TaskName, tuple[Role, ...]] = {
    "text_classification": (
        Role("text", "the text", _TEXT),
        Role("pair", "the second text", _PAIR, needed=False),
        Role("label", "the label", _LABEL),
    ),
    "regression": (
        Role("text", "the text", _TEXT),
        Role("pair", "the second text", _PAIR, needed=False),
        Role("label", "the number", _NUMBER),
    ),
    "token_classification": (Role("text", "the words", _WORDS), Role("label", "the tags", _TAGS)),
    "extractive_qa": (
        Role("text", "the context", ("context", "passage", "paragraph")),
        Role("pair", "the question", ("question", "query")),
        Role("label", "the answers", ("answers", "answer")),
    ),
    "translation": (Role("text", "the source text", _SOURCE), Role("label", "the target text", _TRANSLATED)),
    "summarization": (Role("text", "the text", _LONG), Role("label", "the summary", _SUMMARY)),
}


def has_pair(task: TaskName) -> bool:
    """Whether rows of a task may have a second text."""
    return any(role.setting == "pair" for role in _ROLES.get(task, ()))


@dataclass(frozen=True)
class Columns:
    """The names of a task's columns in a table."""

    text: str
    pair: str | None = None
    label: str | None = None
    """None where rows are read without their targets."""

    @property
    def used(self) -> set[str]:
        """Those that become part of the rows themselves."""
        return {name for name in (self.text, self.pair, self.label) if name is not None}

    def reason(self, spec: TaskSpec) -> str:
        """Which column is what, and who said so."""
        found = [(role, getattr(self, role.setting)) for role in _ROLES[spec.task]]
        return ", ".join(
            f"{role.what} is {name!r}{'' if getattr(spec, role.setting) else ' by its name'}"
            for role, name in found
            if name is not None
        )


def find_columns(records: Records, spec: TaskSpec, *, labelled: bool) -> Columns:
    """Find each role's column. Raises DataError that lists every role without one, or with several."""
    there = list(dict.fromkeys(column for _, record in records.records for column in record))
    roles = [role for role in _ROLES[spec.task] if labelled or role.setting != "label"]
    given = {role.setting: getattr(spec, role.setting) for role in _ROLES[spec.task]}
    found: dict[str, str] = {}
    problems: list[str] = []
    for role in roles:
        if name := given[role.setting]:
            if name in there:
                found[role.setting] = name
            else:
                problems.append(f"data.{role.setting}={name!r} is no column{_nearest([name], there)}")
    languages = _languages(there) if spec.task == "translation" and not any(given.values()) else None
    if languages is not None:
        return Columns(languages[0], None, languages[1] if labelled else None)
    for role in roles:
        if given[role.setting]:
            continue
        # What another setting names is taken, and so is a label's column where labels are not read.
        free = [column for column in there if column not in given.values()]
        named = [column for column in free if column.casefold() in role.names]
        if len(named) == 1:
            found[role.setting] = named[0]
        elif named:
            problems.append(f"{role.what}: {' and '.join(map(repr, named))} are each named like it")
        elif role.needed:
            problems.append(f"{role.what}: no column is named like it{_nearest(role.names, _unnamed(free, roles))}")
    twice = sorted({name for name in found.values() if list(found.values()).count(name) > 1})
    problems += [f"column {name!r} would be two things at once" for name in twice]
    if problems:
        raise _refusal(problems, records, there, roles)
    return replace(Columns(""), **found)


def _languages(there: Sequence[str]) -> tuple[str, str] | None:
    """The two columns named after languages, in the order of the table; None unless there are just two."""
    named = [column for column in there if _LANGUAGE.fullmatch(column) and column not in ("id", "idx", "src", "tgt")]
    return (named[0], named[1]) if len(named) == 2 else None


def _unnamed(there: Sequence[str], roles: Sequence[Role]) -> list[str]:
    """Columns that have no role's usual name."""
    return [column for column in there if not any(column.casefold() in role.names for role in roles)]


def _nearest(names: Sequence[str], there: Sequence[str]) -> str:
    """The column that is spelt most like one of the names, unless it is spelt like nothing."""

    def likeness(column: str) -> float:
        return max(difflib.SequenceMatcher(None, column.casefold(), name).ratio() for name in names)

    near = max(there, key=likeness, default=None)
    return f"; did you mean {near!r}?" if near is not None and likeness(near) >= _LIKE else ""


def _refusal(problems: Sequence[str], records: Records, there: Sequence[str], roles: Sequence[Role]) -> DataError:
    listed = "".join(f"\n- {problem}" for problem in problems)
    settings = " ".join(f"data.{role.setting}=COLUMN" for role in roles)
    hint = f"name the columns: {settings}"
    if ending_of(records.source) in (".csv", ".tsv"):
        hint += "; if the first line is itself a row, name all columns in their order: data.columns=[…]"
    expected = "; ".join(f"{role.what}: {', '.join(role.names[:6])}, …" for role in roles if role.needed)
    columns = ", ".join(map(repr, there[:20])) or "(none)"
    return DataError(f"{records.source}: it has the columns {columns}{listed}", expected=expected, hint=hint)
