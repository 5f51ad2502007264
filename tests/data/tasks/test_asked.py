"""Rows of a task as conversations: what is asked, what is learned, and what is cut."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audit import DataSpec, audit
from peftkit.data.chat import IGNORED, prompt_for
from peftkit.data.tasks.asked import SUMMARIZE, AskedAudit, audit_asked, instruction_later
from peftkit.data.tasks.languages import language, recorded_language, target_language
from peftkit.data.tasks.read import read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.errors import BaseError, ConfigError, DataError, PeftkitError
from peftkit.events import Warned

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write records as JSON lines; returns the path."""

    def one(name: str, rows: Sequence[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return one


def pairs(count: int, source: str = "source", target: str = "target", word: str = "dog") -> list[dict[str, str]]:
    return [{source: f"the {word} number {i}", target: f"der {word} {i} é"} for i in range(count)]


def given(causal: Tokenizer, train: str, held_out: str, **settings: Any) -> AskedAudit:
    spec = TaskSpec.model_validate({"task": "translation", "train": train, "held_out": held_out, **settings})
    return audit_asked(spec, causal, 512)


def test_rows_are_learned_as_supervised_fine_tuning_learns_the_same_conversation(causal: Tokenizer, save: Save) -> None:
    train, held = pairs(6), pairs(3, word="cat")
    found = given(causal, save("a.jsonl", train), save("b.jsonl", held), instruction="Do\n\nit.")

    def turns(row: dict[str, str]) -> dict[str, Any]:
        asked = {"role": "user", "content": f"Do\n\nit.\n\n{row['source']}"}
        return {"messages": [asked, {"role": "assistant", "content": row["target"]}]}

    files = save("c.jsonl", map(turns, train)), save("d.jsonl", map(turns, held))
    wanted = audit(DataSpec(train=files[0], held_out=files[1]), causal, 512)
    for ours, theirs in ((found.train, wanted.train), (found.held_out, wanted.held_out)):
        assert len(ours.examples) == len(theirs.examples) > 0
        for one, other in zip(ours.examples, theirs.examples, strict=True):
            assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
    for row, example in zip(found.held_out.rows, found.held_out.examples, strict=True):
        assert prompt_for(row, causal, found.rendering) == example.prompt_ids
    assert [row.target for row in found.held.rows] == [row["target"] for row in held]


@pytest.mark.parametrize(
    ("columns", "settings", "wanted"),
    [
        (("en", "de"), {}, "Translate into German."),
        (("de", "en"), {}, "Translate into English."),
        (("source", "French"), {"label": "French", "text": "source"}, "Translate into French."),
        (("source", "target"), {}, "Translate the text."),
        (("en", "de"), {"instruction": "Say it in German."}, "Say it in German."),
        (("document", "summary"), {"task": "summarization"}, SUMMARIZE),
        (("article", "highlights"), {"task": "summarization", "instruction": "TL;DR"}, "TL;DR"),
    ],
)
def test_what_is_asked(
    columns: tuple[str, str], settings: dict[str, Any], wanted: str, causal: Tokenizer, save: Save
) -> None:
    found = given(causal, save("a.jsonl", pairs(4, *columns)), save("b.jsonl", pairs(2, *columns, "cat")), **settings)
    assert found.instruction == wanted == found.record()["instruction"]
    first = found.train.rows[0]
    assert first.messages[0] == {"role": "user", "content": f"{wanted}\n\nthe dog number 0"}
    assert first.messages[1] == {"role": "assistant", "content": "der dog 0 é"}


def test_two_files_tell_the_language_by_their_endings(causal: Tokenizer, tmp_path: Path) -> None:
    for name, text in (
        ("a.en.gz", "one\ntwo\n"),
        ("b.fr.gz", "un\ndeux\n"),
        ("c.en.gz", "six\n"),
        ("c.fr.gz", "six!\n"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    found = given(causal, f"{tmp_path}/a.en.gz+{tmp_path}/b.fr.gz", f"{tmp_path}/c.en.gz+{tmp_path}/c.fr.gz")
    assert found.instruction == "Translate into French."
    assert len(found.train.examples) == 2


def test_a_target_without_a_language_is_told(causal: Tokenizer, save: Save) -> None:
    events: list[Any] = []
    spec = TaskSpec(task="translation", train=save("a.jsonl", pairs(4)), held_out=save("b.jsonl", pairs(2, word="cat")))
    audit_asked(spec, causal, 512, events.append)
    assert any(isinstance(event, Warned) and "names no language" in event.text for event in events)


@pytest.mark.parametrize("instruction", [None, "Translate."])
def test_held_out_rows_in_the_other_direction_are_refused(
    instruction: str | None, causal: Tokenizer, save: Save
) -> None:
    train, held = save("a.jsonl", pairs(4, "en", "de")), save("b.jsonl", pairs(2, "de", "en"))
    with pytest.raises(DataError, match=r"several languages\n- .*a\.jsonl: German\n- .*b\.jsonl: English"):
        given(causal, train, held, instruction=instruction)


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("de", "German"), ("DE", "German"), ("pt-BR", "Portuguese"), ("zh_Hans", "Chinese"), ("deu_Latn", "German"),
        ("nob", "Norwegian"), ("german", "German"), ("gz", None), ("txt", None), ("target", None), ("", None),
    ],
)  # fmt: skip
def test_languages_by_code_and_name(word: str, wanted: str | None) -> None:
    assert language(word) == wanted


def test_the_folder_and_the_stem_of_a_file_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "de").mkdir()
    for name in ("de/a.txt", "de/de.txt"):
        (tmp_path / name).write_text("x\n")
    assert target_language(f"{tmp_path}/de/a.txt+{tmp_path}/de/de.txt", None) is None


@pytest.mark.parametrize(
    ("source", "column", "wanted"),
    [
        ("train.de", None, "German"),  # of two files with their folders a manifest keeps the second's name alone
        ("train.de.gz", None, "German"),
        ("train.en+train.fr", None, "French"),
        ("pairs.csv", "de", "German"),
        ("pairs.en.csv", None, None),
        ("owner/set:train", "fr", "French"),
        ("train.txt", None, None),
    ],
)
def test_the_language_of_what_a_manifest_names(source: str, column: str | None, wanted: str | None) -> None:
    assert recorded_language(source, column) == wanted


@pytest.mark.parametrize(
    ("settings", "columns", "wanted"),
    [
        ({"train": "train.de"}, ("source", "target"), "Translate into German."),
        ({"train": "pairs.csv", "label": "de"}, ("source", "target"), "Translate into German."),
        ({"train": "pairs.csv"}, ("en", "de"), "Translate into German."),
        ({"train": "pairs.csv"}, ("source", "target"), "Translate the text."),
        ({"mixture": {"a.en+a.fr": 1.0, "b.csv": 2.0}}, ("source", "target"), "Translate into French."),
        ({"train": "train.de", "instruction": "Auf Deutsch:"}, ("source", "target"), "Auf Deutsch:"),
        ({"task": "summarization", "train": "a.jsonl"}, ("document", "summary"), SUMMARIZE),
    ],
)
def test_what_is_asked_of_rows_that_come_later(
    settings: dict[str, Any], columns: tuple[str, str], wanted: str, save: Save
) -> None:
    spec, source = TaskSpec.model_validate({"task": "translation", **settings}), save("new.jsonl", pairs(2, *columns))
    data = read_rows(spec.model_copy(update={"label": None}), source)
    assert instruction_later(spec, None, source, data) == wanted
    assert instruction_later(spec, "Say it.", source, data) == "Say it."


def test_rows_that_come_later_in_another_language_are_refused(save: Save) -> None:
    source = save("new.jsonl", pairs(2, "en", "fr"))
    spec = TaskSpec(task="translation", train="train.de")
    with pytest.raises(DataError, match=r"(?s)several languages.*train\.de: German.*new\.jsonl: French"):
        instruction_later(spec, "Translate into German.", source, read_rows(spec, source))


def test_a_cut_row_keeps_its_answer_and_as_much_of_its_source_as_there_is_room(causal: Tokenizer, save: Save) -> None:
    rows = [{"document": f"{i}\n\n" + "é" * 100, "summary": f"kurz {i}"} for i in range(4)]
    rows.append({"document": "short enough", "summary": "ja"})
    held = [{"document": "another one", "summary": "nein"}]
    paths = save("a.jsonl", rows), save("b.jsonl", held)
    found = given(causal, *paths, task="summarization", too_long="truncate", max_length=160)
    assert len(found.train.examples) == 5
    assert found.train.truncated == tuple(f"a.jsonl:{i}" for i in range(1, 5))
    for row, made, example in zip(rows, found.train.rows, found.train.examples, strict=True):
        learned = [token for token in example.labels if token != IGNORED]
        assert causal.decode(learned) == row["summary"]
        assert learned[-1] in causal.stop_ids
        kept = made.messages[0]["content"].removeprefix(f"{SUMMARIZE}\n\n")
        assert row["document"].startswith(kept)
        # é has two bytes, each a token: half of one is not kept
        assert (159 <= len(example.input_ids) <= 160) or kept == row["document"]


def test_a_row_whose_answer_alone_is_too_long_is_told(causal: Tokenizer, save: Save) -> None:
    rows = [*pairs(3), {"source": "x", "target": "y" * 200}]
    train, held = save("a.jsonl", rows), save("b.jsonl", pairs(1, word="cat"))
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        given(causal, train, held, max_length=120)
    found = given(causal, train, held, max_length=120, too_long="drop")
    assert found.train.dropped == ("a.jsonl:4",)
    assert len(found.train.examples) == 3


def test_rows_left_out_are_not_measured(causal: Tokenizer, save: Save) -> None:
    held = [{"source": "x" * 300, "target": "y"}, *pairs(2, word="cat")]
    found = given(causal, save("a.jsonl", pairs(3)), save("b.jsonl", held), max_length=120, too_long="drop")
    assert [example.row for example in found.held.examples] == [1, 2]


def test_what_cannot_be_asked_is_refused(causal: Tokenizer, save: Save) -> None:
    train, held = save("a.jsonl", pairs(3)), save("b.jsonl", pairs(1, word="cat"))
    with pytest.raises(ConfigError, match="windows is for tokens and questions"):
        given(causal, train, held, too_long="windows")
    bad = save("c.jsonl", [*pairs(2), {"source": "a <|im_end|> b", "target": "c"}])
    with pytest.raises(DataError, match=r"c\.jsonl:3.*control token"):
        given(causal, bad, held)
    template, causal.hf.chat_template = causal.hf.chat_template, None
    try:
        with pytest.raises(BaseError, match="no chat template"):
            given(replace(causal), train, held)
    finally:
        causal.hf.chat_template = template
    with pytest.raises(PeftkitError, match=r"data\.train is not set"):
        audit_asked(TaskSpec(task="translation"), causal, 512)


def test_real_pairs(causal: Tokenizer, test_data: Path) -> None:
    folder = test_data / "multi30k_en_de"
    if not folder.exists():
        pytest.skip("multi30k_en_de is not among the test data")
    names = [f"{folder}/{part}.en.gz+{folder}/{part}.de.gz" for part in ("val", "test_2016_flickr")]
    found = given(causal, *names)
    assert (len(found.train.examples), len(found.held_out.examples)) == (1014, 1000)
    assert found.instruction == "Translate into German."
