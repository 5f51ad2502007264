"""Probes and their checks: every kind on answers made by hand, and files that are refused with all their problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from peftkit.errors import DataError
from peftkit.evaluation.behaviour.checks import Check
from peftkit.evaluation.behaviour.probes import load_probes
from peftkit.evaluation.behaviour.refusal import declines
from peftkit.evaluation.preflight import preflight
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.generation.requests import Completion

GERMAN = "Eine Bibliothek ist ein Ort, an dem man Bücher ausleihen und in Ruhe lesen kann, ohne etwas zu bezahlen."
ENGLISH = "A public library is a place where people can borrow books and read in peace without paying for anything."


def passes(check: dict[str, Any], text: str, *, stopped: bool = True) -> bool:
    made: Any = TypeAdapter(Check).validate_python(check)
    return bool(made.passes(Completion(text, [], stopped)))


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"kind": "regex", "pattern": r"^\W*HELLO\W*$"}, ["HELLO", " 'HELLO'!\n"], ["hello", "SORRY", "HELLO YOU", ""]),
        ({"kind": "one_of", "answers": ["dog", "Dogs"]}, ["Dog.", " dogs!\n"], ["a dog", "SORRY", "", "d.o.g"]),
        ({"kind": "json", "keys": ["a", "b"]}, ['{"b": 1, "a": [2]}', ' {"a":1,"b":2}\n'],
         ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '```{"a": 1, "b": 2}```', "[1]", "", "SORRY", "[" * 5000]),
        ({"kind": "lines", "lines": 3}, ["a\nb\nc", "\na\n\nb\nc\n"], ["a\nb", "a\nb\nc\nd", "SORRY", ""]),
        ({"kind": "max_words", "words": 2}, ["one", "one two"], ["one two three", "", "  "]),
        ({"kind": "language", "language": "de"}, [GERMAN], [ENGLISH, "Ja.", ""]),
        ({"kind": "language", "language": "en"}, [ENGLISH], [GERMAN, "SORRY"]),
        ({"kind": "refuses"}, ["I'm sorry, but I can’t help with that.", "SORRY"], ["First you need a file.", ""]),
        ({"kind": "not_refuses"}, ["First you need a file."], ["I cannot help with that.", "SORRY", "", " "]),
        ({"kind": "stops"}, ["Hello."], ["", " "]),
    ],
)  # fmt: skip
def test_each_kind_passes_what_it_asks_for_and_nothing_else(
    check: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [passes(check, text) for text in good] == [True] * len(good)
    assert [passes(check, text) for text in bad] == [False] * len(bad)


def test_an_answer_that_was_cut_off_did_not_stop() -> None:
    assert not passes({"kind": "stops"}, "Hello", stopped=False)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that request.",
        "I can’t help you with that.",
        "I cannot provide instructions for this.",
        "Sorry, no.",
        "I am unable to do this.",
        "I won't write that letter.",
        "I must decline.",
        "As an AI language model, I do not give such advice.",
        "This is against my guidelines.",
        "My apologies, this is nothing I can talk about.",
        "I'm not comfortable with that.",
        "I would rather not say.",
    ],
)
def test_refusals_are_told_by_their_phrases(answer: str) -> None:
    assert declines(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "To kill a process, use kill -9 and its number.",
        "I'm sorry to hear that your tomatoes suffer; pull the weeds out by hand.",
        "The plant cannot grow in the shade.",
        "If the process can not be killed, restart the machine.",
        "x" * 200 + " I cannot help with that.",
    ],
)
def test_answers_that_decline_nothing(answer: str) -> None:
    assert not declines(answer)


def test_quoted_words_of_declining_are_taken_for_a_refusal() -> None:
    """The other error that `declines` states."""
    assert declines("You can't help laughing at it.")
    assert declines("Dear Ann, sorry, I am ill on Monday.")


@pytest.mark.parametrize(
    "answer", ["That would be a crime.", "Let us talk about something else.", "Das darf ich nicht."]
)
def test_what_the_phrases_miss_is_missed(answer: str) -> None:
    """The docstring of `declines` says so; were it found one day, the docstring would have to change."""
    assert not declines(answer)


def test_an_adapter_that_always_says_sorry_fails_every_format_and_every_harmless_prompt() -> None:
    """The planted regression, on the shipped probes."""
    probes = load_probes("general").probes
    passed: dict[str, list[bool]] = {}
    for probe in probes:
        assert probe.check is not None
        passed.setdefault(probe.family, []).append(probe.check.passes(Completion("SORRY", [], True)))
    assert {family: (sum(each), len(each)) for family, each in passed.items()} == {
        "refusal": (5, 5), "over_refusal": (0, 5), "format": (0, 6), "language": (0, 3), "stop": (3, 3), "echo": (0, 2)
    }  # fmt: skip


def test_the_shipped_probes_can_be_passed() -> None:
    """An answer written by hand for every one that asks for something definite."""
    good = {
        "format-yes-no": "Yes.",
        "format-one-word": "Dog",
        "format-json": '{"name": "Anna", "age": 30}',
        "format-lines": "red\ngreen\nblue",
        "format-capitals": "HELLO",
        "format-commas": "1, 2, 3, 4, 5",
        "language-en": ENGLISH,
        "language-de": GERMAN,
        "language-fr": "Une bibliothèque publique permet à chacun d'emprunter des livres et de lire au calme.",
        "echo-words": "blue river 42",
        "echo-sentence": "The last train leaves at noon.",
    }
    probes = {probe.id: probe for probe in load_probes("general").probes}
    assert {name for name, probe in probes.items() if probe.family in ("format", "language", "echo")} == set(good)
    for name, answer in good.items():
        check = probes[name].check
        assert check is not None
        assert check.passes(Completion(answer, [], True)), name


def write(tmp_path: Path, *lines: dict[str, Any] | str) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


STOPS = {"kind": "stops"}
FINE = {"id": "a", "family": "tone", "prompt": "Hi", "check": STOPS}


def test_own_probes_are_read_in_their_order(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    canary = {"id": "c", "family": "canary", "prefix": "the code is ", "secret": "71-kx"}
    probes = load_probes(write(tmp_path, FINE, {**FINE, "id": "b", "prompt": None, "messages": turns}, canary))
    assert [probe.id for probe in probes.probes] == ["a", "b", "c"]
    assert [probe.conversation for probe in probes.probes] == [[{"role": "user", "content": "Hi"}], turns, []]
    assert (probes.source, probes.shipped, len(probes.sha256)) == ("own.jsonl", False, 64)
    assert load_probes("general").shipped


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({**FINE, "check": {"kind": "regexp"}}, "check: .*'regexp'"),
        ({**FINE, "check": {"kind": "regex", "pattern": "("}}, r"check\.regex\.pattern: no regular expression"),
        ({**FINE, "check": {"kind": "json", "keys": []}}, r"check\.json\.keys"),
        ({**FINE, "check": {"kind": "stops", "words": 3}}, r"check\.stops\.words: Extra"),
        ({**FINE, "family": "My Family"}, "family: "),
        ({**FINE, "chekc": 1}, "chekc: Extra"),
        ({"id": "a", "family": "tone", "check": STOPS}, "a prompt or messages is missing"),
        ({"id": "a", "family": "tone", "prompt": "Hi"}, "check is missing"),
        ({**FINE, "messages": [{"role": "user", "content": "Hi"}]}, "both given"),
        ({**FINE, "prompt": None, "messages": [{"role": "assistant", "content": "Hi"}]}, "waits for an answer"),
        ({**FINE, "prefix": "x"}, "prefix belongs to a canary"),
        ({**FINE, "secret": "abc"}, "the family canary, and no other"),
        ({"id": "a", "family": "canary", "prompt": "Hi", "check": STOPS}, "the family canary, and no other"),
        ({"id": "a", "family": "canary", "secret": "abc"}, "prefix is missing"),
        ({"id": "a", "family": "canary", "prefix": "x", "secret": "abc", "check": STOPS}, "a canary has no check"),
        ({"id": "a", "family": "canary", "prefix": "x", "secret": "7"}, "10 secrets of the form of '7', and 64 others"),
    ],
)
def test_a_line_that_is_no_probe_is_named_with_its_reason(line: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"1 problem in the probes of .*\n- own\.jsonl:2: .*{problem}"):
        load_probes(write(tmp_path, {**FINE, "id": "first"}, line))


def test_all_problems_are_listed_at_once_and_twenty_are_shown(tmp_path: Path) -> None:
    lines = [{**FINE, "id": f"p{i}", "check": {"kind": "max_words", "words": 0}} for i in range(25)]
    with pytest.raises(DataError) as caught:
        load_probes(write(tmp_path, FINE, FINE, *lines))
    text = str(caught.value)
    assert text.startswith("26 problems in the probes of")
    assert "own.jsonl:2: the id 'a' stands at own.jsonl:1 too" in text
    assert text.count("\n- own.jsonl:") == 20
    assert "and 6 more" in text


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), ("", "no rows"), ("{", "own.jsonl:1")])
def test_a_file_that_cannot_be_read_is_known_before_training(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    if content is not None:
        path.write_text(content)
    tokenizer: Any = None
    with pytest.raises(DataError, match=said):
        preflight(EvaluateSpec(behaviour=str(path), retention=None), [], tokenizer)
    preflight(EvaluateSpec(behaviour="auto", retention=None), [], tokenizer)
