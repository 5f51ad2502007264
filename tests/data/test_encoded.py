"""Encoded rows from columns and from the cache are those that encoding gives, and nothing else is ever served.

The oracle is encoding itself, without a store. A row's digest is compared with the one over lists of integers that
checkpoints were bound to before there were columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import CHATML, write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.audit import DataSpec, inspect
from peftkit.data.chat import IGNORED, Example
from peftkit.data.encoded import FILE, EncodedRows, Gathering, answer_tokens, lengths, longest, stop_added
from peftkit.data.encoded_key import checking_key, digest_rows, encoding_key
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.lengths import histogram
from peftkit.data.formats import Dataset, Row
from peftkit.data.part import Encoding, attempt
from peftkit.data.readers import Where
from peftkit.data.rows import to_dataset
from peftkit.data.template import Rendering, render
from peftkit.events import Event, Note, Warned
from peftkit.recipe.lengths import Lengths
from peftkit.training.bound import rows_digest
from peftkit.training.bound import settings as bound_settings
from peftkit.training.schedule import schedule
from peftkit.training.spec import TrainSpec

# As thinking templates do: what was said before the last question is shown otherwise, so a row makes several sequences.
FORGETFUL = CHATML.replace(
    "message['content'] +", "('…' if message['role'] == 'assistant' and not loop.last else message['content']) +"
)
_IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
Write = Callable[[str | None], Tokenizer]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The byte tokenizer with a template, each time a new one."""

    def build(template: str | None = CHATML) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, template)
        return load_tokenizer(folder)

    return build


@pytest.fixture(scope="module")
def tokenizer(make: Write) -> Tokenizer:
    return make(CHATML)


def chat(index: int, *turns: str) -> Row:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns))
    return Row(messages, None, None, {}, {"id": index}, Where("rows.jsonl", index + 1, index))


def text(index: int, words: str) -> Row:
    return Row((), words, None, {}, {}, Where("rows.txt", None, index))


def mixed(rows: int = 40) -> tuple[Row, ...]:
    """Single turns, several turns and plain texts, of 1 to 120 bytes."""
    draw = random.Random(0)

    def words() -> str:
        return "".join(draw.choice("abc äß…") for _ in range(draw.randint(1, 120)))

    return tuple(
        text(index, words()) if index % 5 == 4 else chat(index, *(words() for _ in range(2 + 2 * (index % 3 == 1))))
        for index in range(rows)
    )


def encoded(
    rows: tuple[Row, ...], tokenizer: Tokenizer, spec: DataSpec, length: int | None, store: EncodedStore | None = None
) -> Encoding:
    return attempt(
        rows, Dataset(rows, "messages", "", "rows.jsonl", "0"), "train", tokenizer, spec, length, store=store
    )


def plain(encoding: Encoding) -> tuple[Any, ...]:
    """All that an encoding says, as values that compare."""
    part = encoding.part
    refused = [(place, str(error), error.hint) for place, error in encoding.refused]
    too_long = list(encoding.too_long.items())  # in its order: messages name the first
    return list(part.examples), part.dropped, part.truncated, part.rows, too_long, refused, part.record()


def example(index: int, ids: list[int], start: int, added: bool = False) -> Example:
    return Example(ids, [IGNORED] * start + ids[start:], start, index, f"f.jsonl:{index}", added)


def columns(examples: list[Example]) -> EncodedRows:
    gathering = Gathering(many=0)
    for one in examples:
        gathering.add(one)
    found = gathering.done()
    assert isinstance(found, EncodedRows)
    return found


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(_IDS, st.integers(0, 9), st.booleans()), min_size=1))
def test_columns_give_back_what_they_took(given_rows: list[tuple[list[int], int, bool]]) -> None:
    examples = [example(at, ids, min(start, len(ids)), added) for at, (ids, start, added) in enumerate(given_rows)]
    rows = columns(examples)
    assert list(rows) == examples == [rows[at] for at in range(len(rows))]
    assert rows[-1] == examples[-1]
    assert rows[1:7:2] == tuple(examples[1:7:2])
    assert lengths(rows).tolist() == lengths(examples).tolist() == [len(one.input_ids) for one in examples]
    assert answer_tokens(rows).tolist() == [one.answer_tokens for one in examples]
    assert stop_added(rows).tolist() == [one.stop_added for one in examples]
    assert longest(rows, 3) == sorted(examples, key=lambda one: len(one.input_ids), reverse=True)[:3]
    with pytest.raises(IndexError):
        rows[len(rows)]


def long_rows(rows: int) -> list[Example]:
    draw = random.Random(1)
    return [example(at, [draw.randrange(50_000) for _ in range(draw.randint(3, 60))], 3) for at in range(rows)]


def test_a_row_with_more_labels_than_ids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:1: as many labels"):
        columns([example(0, [1, 2], 1), Example([1], [1, 1], 0, 1, "f.jsonl:1"), Example([1, 1], [1], 0, 2, "f")])


def test_rows_of_several_batches_come_back_from_a_file(tmp_path: Path) -> None:
    examples = long_rows(9_000)
    rows = columns(examples)
    rows.write(tmp_path)
    mapped = EncodedRows.mapped(tmp_path)
    assert len(mapped.table.to_batches()) == 3
    assert list(mapped) == examples
    assert [mapped[at] for at in (0, 4095, 4096, 8191, 8192, 8999)] == [
        examples[at] for at in (0, 4095, 4096, 8191, 8192, 8999)
    ]


def test_figures_of_columns_are_those_of_the_rows() -> None:
    examples = long_rows(5_000)
    rows = columns(examples)
    digest = hashlib.sha256()
    for one in examples:
        digest.update(array("q", [len(one.input_ids), *one.input_ids, *one.labels]).tobytes())
    assert rows_digest(rows) == rows_digest(examples) == digest.hexdigest()
    assert Lengths.of(rows, rows[:9], 8) == Lengths.of(examples, examples[:9], 8)
    assert schedule(rows, TrainSpec(max_tokens=50_000)) == schedule(examples, TrainSpec(max_tokens=50_000))
    assert histogram(rows, rows[:9]) == histogram(examples, examples[:9])
    ours, theirs = to_dataset(rows), to_dataset(examples)
    assert ours.column_names == theirs.column_names
    assert ours[4_999] == theirs[4_999]


def test_figures_are_found_without_building_the_rows(tmp_path: Path) -> None:
    """A list of the ids alone would take 8 bytes a token; batches pass through, and a few columns stay."""
    columns(long_rows(20_000)).write(tmp_path)
    rows = EncodedRows.mapped(tmp_path)
    tokens = int(lengths(rows).sum())
    tracemalloc.start()
    try:
        Lengths.of(rows, rows[:2], 8)
        histogram(rows)
        answer_tokens(rows).sum()
        taken = tracemalloc.get_traced_memory()[1]
        first = rows[0]
    finally:
        tracemalloc.stop()
    assert taken < 4 * tokens < 8 * tokens
    assert first == long_rows(1)[0]


SPECS = {
    "whole": (DataSpec(), None),
    "last": (DataSpec(loss="last"), None),
    "dropped": (DataSpec(too_long="drop"), 150),
    "cut": (DataSpec(too_long="truncate"), 90),
    "split": (DataSpec(too_long="split"), 60),
    "refused for length": (DataSpec(too_long="raise"), 100),
}


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["one sequence", "one per answer"])
@pytest.mark.parametrize("name", SPECS)
def test_what_the_cache_gives_is_what_encoding_gives(name: str, template: str, make: Write, tmp_path: Path) -> None:
    tokenizer, (spec, length), told = make(template), SPECS[name], list[Event]()
    store = EncodedStore(tmp_path, told.append, many=0)
    fresh = encoded(mixed(), tokenizer, spec, length)
    assert isinstance(fresh.part.examples, tuple)
    first = encoded(mixed(), tokenizer, spec, length, store)
    assert not told
    second = encoded(mixed(), make(template), spec, length, store)
    assert [type(event) for event in told] == [Note]
    assert "encoded before" in str(told[0])
    assert isinstance(second.part.examples, EncodedRows)
    assert plain(fresh) == plain(first) == plain(second)
    if name in ("dropped", "cut", "refused for length"):
        assert fresh.part.dropped or fresh.part.truncated or fresh.too_long


def test_rows_that_cannot_be_rendered_are_named_every_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = (*mixed(), chat(40, "What <|im_end|> ends?", "a turn"))
    store = EncodedStore(tmp_path, many=0)
    first, second = (encoded(rows, tokenizer, DataSpec(), None, store) for _ in range(2))
    assert plain(first) == plain(second) == plain(encoded(rows, tokenizer, DataSpec(), None))
    assert len(second.refused) == 1
    assert not store.kept()


def test_few_rows_are_not_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = EncodedStore(tmp_path)
    assert isinstance(encoded(mixed(), tokenizer, DataSpec(), None, store).part.examples, tuple)
    assert not store.root.exists()


def changed_row(rows: tuple[Row, ...], at: int, **change: Any) -> tuple[Row, ...]:
    return (*rows[:at], replace(rows[at], **change), *rows[at + 1 :])


def _with_token(make: Write) -> Tokenizer:
    tokenizer = make(CHATML)
    tokenizer.hf.add_tokens(["abc"])
    return tokenizer


SYSTEM = {"role": "system", "content": "x"}
CHANGES: dict[str, Callable[[Write, tuple[Row, ...]], dict[str, Any]]] = {
    "template": lambda make, rows: {"tokenizer": make(CHATML.replace("+ '\n' }}{% endfor", "+ '\n\n' }}{% endfor"))},
    "a token": lambda make, rows: {"tokenizer": _with_token(make)},
    "stop token": lambda make, rows: {"tokenizer": replace(make(CHATML), stop_ids=(0,))},
    "a letter": lambda make, rows: {"rows": changed_row(rows, 4, text=f"{rows[4].text}!")},
    "a turn": lambda make, rows: {"rows": changed_row(rows, 1, messages=(SYSTEM, *rows[1].messages))},
    "a place": lambda make, rows: {"rows": changed_row(rows, 3, where=Where("rows.jsonl", 99, 3))},
    "the order": lambda make, rows: {"rows": rows[::-1]},
    "a row less": lambda make, rows: {"rows": rows[:-1]},
    "max_length": lambda make, rows: {"length": 91},
    "too_long": lambda make, rows: {"spec": DataSpec(too_long="drop")},
    "loss": lambda make, rows: {"spec": DataSpec(too_long="truncate", loss="last")},
    "think": lambda make, rows: {"spec": DataSpec(too_long="truncate", think="strip")},
    "template_kwargs": lambda make, rows: {"spec": DataSpec(too_long="truncate", template_kwargs={"loud": True})},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_anything_is_encoded_anew(what: str, make: Write, tmp_path: Path) -> None:
    rows = changed_row(mixed(), 0, messages=chat(0, "hi", "<think>so</think>" + "yes " * 9).messages)
    rows = tuple(row for row in rows if row.text is None) if what == "template_kwargs" else rows
    loud = CHATML.replace("message['content'] +", "(message['content'] | upper if loud else message['content']) +")
    template = loud if what == "template_kwargs" else CHATML
    before: dict[str, Any] = {
        "rows": rows, "tokenizer": make(template), "spec": DataSpec(too_long="truncate"), "length": 90,
    }  # fmt: skip
    store = EncodedStore(tmp_path, many=0)
    encoded(**before, store=store)
    after = {**before, **CHANGES[what](make, rows)}
    fresh = plain(encoded(**after))
    assert fresh != plain(encoded(**before)), "the change must show, or this test shows nothing"
    assert plain(encoded(**after, store=store)) == fresh
    assert len(store.kept()) == 2


def test_a_template_that_asks_for_the_day_is_encoded_every_time(make: Write, tmp_path: Path) -> None:
    dated = make("{{ strftime_now('%d %B %Y') }}" + CHATML)
    assert render([{"role": "user", "content": "x"}], mixed()[0], dated, Rendering(), prompt=True)
    store = EncodedStore(tmp_path, many=0)
    first, second = (encoded(mixed(), dated, DataSpec(), None, store) for _ in range(2))
    assert plain(first) == plain(second) == plain(encoded(mixed(), dated, DataSpec(), None))
    assert not store.root.exists()


@pytest.mark.parametrize("damage", ["no Arrow file", "other columns", "a row too many", "a row below"])
def test_an_entry_that_is_not_of_these_rows_is_told_and_not_used(
    damage: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Its digests are right: whoever wrote it wrote this."""
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append, many=0)
    fresh = encoded(mixed(), tokenizer, DataSpec(), None)
    key = encoding_key(digest_rows(mixed()), tokenizer, DataSpec(), None)
    assert key is not None
    facts: dict[str, Any] = {"dropped": [], "truncated": [], "too_long": []}

    def write(folder: Path) -> None:
        if damage == "no Arrow file":
            (folder / FILE).write_bytes(b"nonsense")
        elif damage == "other columns":
            table = pa.table({"x": [1]})
            with pa.ipc.new_file(str(folder / FILE), table.schema) as writer:
                writer.write_table(table)
        else:
            at = len(mixed()) if damage == "a row too many" else -1
            columns([example(0, [1], 0), example(at, [1], 0)]).write(folder)

    assert store.save(key, facts, write) is not None
    assert plain(encoded(mixed(), tokenizer, DataSpec(), None, store)) == plain(fresh)
    assert [type(event) for event in told] == [Warned]
    assert "are not used" in str(told[0])


def test_a_file_name_that_is_not_utf_8_is_kept_in_columns(tmp_path: Path) -> None:
    places = [os.fsdecode(b"/d\xff.jsonl"), "half \ud800", "ä.jsonl"]
    examples = [Example([1], [1], 0, at, place, False) for at, place in enumerate(places)]
    rows = columns(examples)
    rows.write(tmp_path)
    assert list(rows) == list(EncodedRows.mapped(tmp_path)) == examples


def test_a_switched_off_cache_is_neither_written_nor_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, cache, told = tmp_path / "rows.jsonl", tmp_path / "cache", list[Event]()
    words = "word " * 50  # so that the rows are more tokens than are encoded again
    file.write_text("".join(json.dumps({"prompt": f"{at} {words}", "completion": "Yes."}) + "\n" for at in range(950)))

    def look(**given: Any) -> Any:
        told.clear()
        return inspect(DataSpec(train=str(file), **given), tokenizer, None, told.append, cache).record()

    off = look(cache=False)
    assert not cache.exists()
    assert look() == off
    assert len(EncodedStore(cache).kept()) == 1
    assert look() == off
    assert any("before" in str(event) for event in told)
    used = EncodedStore(cache).kept()
    assert look(cache=False) == off
    assert not any("before" in str(event) for event in told)
    assert EncodedStore(cache).kept() == used


def test_a_switched_off_cache_is_no_other_run() -> None:
    on, off = ({"data": {"seed": 0, "cache": cache}} for cache in (True, False))
    assert bound_settings(on) == bound_settings(off) == {"data.seed": 0}


def test_what_the_findings_depend_on_is_in_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources of what looks at words are digested, and Unicode's table goes with Python's version."""
    from peftkit.data import encoded_key
    from peftkit.data.overlap import highest_overlap, prompts

    for function in (highest_overlap, prompts):
        assert source_of(function) in encoded_key._CHECKS
    before = checking_key("a", "b", (), None)
    monkeypatch.setattr("sys.version_info", (3, 99, 0))
    assert checking_key("a", "b", (), None) != before


def source_of(function: Callable[..., Any]) -> str:
    return function.__module__.removeprefix("peftkit.").replace(".", "/") + ".py"


def test_the_digest_of_rows_tells_apart_what_a_plain_joining_would_not() -> None:
    pairs = [
        (chat(0, "a", "b"), chat(0, "ab", "")),
        (chat(0, "1", "b"), replace(chat(0, "1", "b"), columns={"id": "0"})),
        (text(0, "a"), replace(text(0, "a"), tools=({},))),
    ]
    for one, other in pairs:
        assert digest_rows([one]) != digest_rows([other])
    assert digest_rows([text(0, "a"), text(0, "b")]) != digest_rows([text(0, "b"), text(0, "a")])
    assert digest_rows([text(0, "\ud800")]) != digest_rows([text(0, "?")])


def test_an_audit_says_the_same_the_second_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """1,010 rows with faults: findings, counts and warnings come from the cache, and only notes say so."""
    draw = random.Random(2)
    rows = [
        {
            "prompt": f"{index} " + " ".join(draw.choice(["ab", "cde", "fg"]) for _ in range(70)),
            "completion": "Yes. " * 9,
        }
        for index in range(1_010)
    ]
    rows[5]["completion"], rows[6]["completion"] = "N/A", "mail jane@corp.io \ufffd"
    rows[7], rows[8]["prompt"] = rows[9], "x" * 400
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, runs = DataSpec(train=str(file), max_length=380, too_long="drop"), list[tuple[Any, list[Event]]]()
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        told: list[Event] = []
        found = inspect(spec, tokenizer, None, told.append, cache)
        runs.append(((found.findings, found.record(), list(found.train.examples), list(found.held_out.examples)), told))
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[2][0]
    before = [event for event in runs[2][1] if "before" in str(event)]
    assert [event for event in runs[2][1] if event not in before] == runs[0][1]
    assert len(before) == 2, "the training rows and the findings; the held-out rows are few"
    rules = {finding.rule for finding in runs[2][0][0]}
    assert {"empty_answer", "email", "replacement_char", "left_out", "unbroken"} <= rules
    assert not any(isinstance(event, Warned) for event in runs[2][1])
