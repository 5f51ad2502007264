"""Files are read whole, with the place of every record, or refused with the place of what is wrong."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from peftkit.data import readers
from peftkit.data.readers import Where, read
from peftkit.errors import DataError

ROWS = [{"instruction": "one", "output": "eins\nzwei"}, {"instruction": "é \u2028 ü", "output": " spaced "}]

# every text that UTF-8 can hold; \r is left out where a format's own line ends would meet it
texts = st.text(st.characters(codec="utf-8"))
plain = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(path: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


FILES: dict[str, bytes] = {
    "rows.json": json.dumps(ROWS).encode(),
    "nested.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "crlf.jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\r\n\r\n",
    "rows.csv": as_csv(ROWS).encode(),
    "rows.tsv": as_csv(ROWS, "\t").encode(),
    "rows.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("bom", [False, True], ids=["no-bom", "bom"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, bom: bool, packed: bool) -> None:
    data = FILES[name]
    if bom and not name.endswith(".parquet"):
        data = b"\xef\xbb\xbf" + data
    if packed:
        name, data = name + ".gz", gzip.compress(data)
    path = write(tmp_path / name, data)
    found = read(path)
    assert [row for _, row in found.records] == ROWS
    assert [where.index for where, _ in found.records] == [0, 1]
    assert found.source == str(path)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def test_places_are_those_an_editor_shows(tmp_path: Path) -> None:
    pretty = write(tmp_path / "a.json", json.dumps(ROWS, indent=2))
    assert [str(where) for where, _ in read(pretty).records] == ["a.json:2", "a.json:6"]
    gaps = write(tmp_path / "b.jsonl", '\n{"a": 1}\n  \n\n{"a": 2}\n')
    assert [str(where) for where, _ in read(gaps).records] == ["b.jsonl:2", "b.jsonl:5"]
    tall = write(tmp_path / "c.csv", 'a,b\n"1\n2",3\n\n4,5\n')
    assert [str(where) for where, _ in read(tall).records] == ["c.csv:2", "c.csv:5"]
    table = write(tmp_path / "d.parquet", as_parquet(ROWS))
    assert [str(where) for where, _ in read(table).records] == ["d.parquet[0]", "d.parquet[1]"]
    assert str(Where("tickets.jsonl", 17, 3)) == "tickets.jsonl:17"


def test_txt_is_cut_at_blank_lines_and_nowhere_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n \n  first  \nsecond\r\nthird\t\n \t\n\nfourth\u2028still\n")
    found = [(where.line, row) for where, row in read(path).records]
    assert found == [(3, {"text": "  first  \nsecond\r\nthird\t"}), (8, {"text": "fourth\u2028still"})]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(texts, texts | st.none() | st.integers() | st.lists(texts)), min_size=1))
def test_json_and_jsonl_give_back_what_was_written(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("json")
    array = write(folder / "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    lines = write(folder / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for path in (array, lines):
        assert [row for _, row in read(path).records] == rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1), st.sampled_from([",", "\t"]))
def test_csv_gives_back_what_was_written(tmp_path_factory: Any, rows: list[dict[str, str]], delimiter: str) -> None:
    name = "a.csv" if delimiter == "," else "a.tsv"
    path = write(tmp_path_factory.mktemp("csv") / name, as_csv(rows, delimiter))
    assert [row for _, row in read(path).records] == rows


@settings(max_examples=60, deadline=None)
@given(st.lists(plain.filter(lambda text: all(line.strip() for line in text.split("\n"))), min_size=1))
def test_txt_gives_back_the_paragraphs_it_was_made_of(tmp_path_factory: Any, paragraphs: list[str]) -> None:
    if paragraphs[0].startswith("\ufeff"):
        paragraphs[0] = "x" + paragraphs[0]  # a leading U+FEFF is a byte order mark, not text
    path = write(tmp_path_factory.mktemp("txt") / "a.txt", "\n\n".join(paragraphs))
    assert [row["text"] for _, row in read(path).records] == paragraphs


def test_a_csv_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", as_csv([{"a": "x" * (before + 1)}]))
    assert len(read(path).records[0][1]["a"]) == before + 1
    assert csv.field_size_limit() == before


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    "empty json": ("a.json", b"", ["a.json: holds no rows (0 bytes)"]),
    "empty array": ("a.json", b" [ ] ", ["holds no rows"]),
    "empty jsonl": ("a.jsonl", b"\n\n", ["holds no rows (2 bytes)"]),
    "empty csv": ("a.csv", b"", ["holds no rows"]),
    "header only": ("a.csv", b"a,b\n", ["holds no rows"]),
    "empty txt": ("a.txt", b" \n", ["holds no rows"]),
    "empty parquet": ("a.parquet", b"", ["a.parquet: is not a whole parquet file"]),
    "cut parquet": ("a.parquet", as_parquet(ROWS)[:-9], ["is not a whole parquet file"]),
    "not utf-8": ("a.jsonl", b'{"a": 1}\n{"a": "\xfc"}\n', ["a.jsonl:2: the byte 0xfc is not UTF-8", "iconv -f WIN"]),
    "utf-8 behind a mark": ("a.txt", b"\xef\xbb\xbfok\n\n\xff", ["a.txt:3: the byte 0xff"]),
    "utf-16": ("a.csv", "a,b\n1,2".encode("utf-16"), ["byte order mark of UTF-16", "iconv -f UTF-16"]),
    "cut last line": ("a.jsonl", b'{"a": 1}\n{"a": "lon', ["a.jsonl:2: the last line is cut off", '{"a": "lon']),
    "broken line": ("a.jsonl", b'{"a": 1}\n{"a": }\n{}\n', ["a.jsonl:2: broken JSON", "column 7"]),
    "two on a line": ("a.jsonl", b'{"a": 1} {"a": 2}\n{}\n', ["a.jsonl:1: broken JSON: Extra data"]),
    "line of a list": ("a.jsonl", b'{"a": 1}\n[1]\n', ["a.jsonl:2: a row is list ([1])", "expected: an object"]),
    "array in jsonl": ("a.jsonl", b'[\n{"a": 1}]', ["a.jsonl:1: starts with '['", "rename the file to .json"]),
    "lines in json": ("a.json", b'{"a": 1}\n{"a": 2}\n', ["one dict (keys: a)", "rename the file to .jsonl"]),
    "scalar json": ("a.json", b"3", ["a.json: starts with one int"]),
    "cut array": ("a.json", b'[{"a": 1},\n{"a": 2},\n{"a"', ["a.json:3: broken JSON", "was it cut off?"]),
    "cut inside a string": ("a.json", b'[{"a": 1},\n{"a": "x', ["a.json:2: broken JSON", "was it cut off?"]),
    "array without end": ("a.json", b'[{"a": 1}\n', ["a.json:2: broken JSON", "was it cut off?"]),
    "trailing comma": ("a.json", b'[{"a": 1},\n]', ["a.json:2: broken JSON at column 1"]),
    "no comma": ("a.json", b'[{"a": 1}\n{"a": 2}]', ["a.json:2: broken JSON at column 1", "',' or ']'"]),
    "after the array": ("a.json", b'[{"a": 1}]\nx', ["a.json:2: broken JSON", "more text after the end"]),
    "array of strings": ("a.json", b'[{"a": 1},\n"x"]', ["a.json:2: a row is str ('x')"]),
    "two lists": ("a.json", b'{"data": [{}], "rows": [{}]}', ["in which 2 lists could be the rows"]),
    "row in a nested list": ("a.json", b'{"data": [{"a": 1}, 2]}', ["a.json[1]: a row is int (2)"]),
    "key twice": ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', ["a.jsonl:2", "the key 'a' is given twice"]),
    "key twice in json": ("a.json", b'[\n{"a": 1, "a": 2}]', ["a.json:2", "the key 'a' is given twice"]),
    "too deep": ("a.json", b"[" * 100_000, ["a.json:1: broken JSON"]),
    "too many cells": ("a.csv", b"a,b\n1,2\n1,2,3\n", ["a.csv:3: 3 cells where the header has 2", "the cells a, b"]),
    "too few cells": ("a.tsv", b"a\tb\n1\n", ["a.tsv:2: 1 cells where the header has 2"]),
    "column twice": ("a.csv", b"a,a\n1,2\n", ["a.csv:1: the header names ['a'] more than once"]),
    "quote without end": ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', ["a.csv:3: broken csv"]),
    "not gzip": ("a.jsonl.gz", b'{"a": 1}', ["a.jsonl.gz: is not whole gzip data"]),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-6], ["is not whole gzip data"]),
    "unknown ending": ("a.xlsx", b"PK", ["the ending '.xlsx' is not known", ".parquet"]),
    "unknown ending in gz": ("val.en.gz", gzip.compress(b"x"), ["the ending '.en.gz' is not known"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, data, expected = BROKEN[case]
    message = refused(write(tmp_path / name, data))
    assert all(part in message for part in expected), message
    assert name in message


def test_a_missing_file_names_its_neighbours_and_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "_read_hub", lambda *_: pytest.fail("asked the Hub"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "tickets.jsonl", "{}")
    write(tmp_path / "data" / "notes.md", "x")
    assert "near it: tickets.jsonl" in refused("data/tikets.jsonl")
    assert "no such file" in refused("nowhere/tickets.jsonl")  # a data ending is a file, whatever its folder
    message = refused("data/tickets")
    assert "near it: tickets.jsonl" in message
    assert "data/tickets:train" in message
    message = refused("data")
    assert "is a folder" in message
    assert "it holds tickets.jsonl" in message


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **named: Any) -> Any:
        asked.append((*args, named))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k:test", ("openai/gsm8k", None, {"split": "test"})),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", {"split": "test"})),
    ],
)
def test_a_hub_set_is_asked_for_by_name_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[Any, ...]
) -> None:
    calls = fake_hub(monkeypatch, ROWS)
    found = read(source)
    assert calls == [asked]  # nothing else is passed: no remote code, no other revision
    assert [row for _, row in found.records] == ROWS
    assert str(found.records[1][0]) == f"{source}[1]"
    lines = "".join(json.dumps(row, sort_keys=True, separators=(",", ":")) + "\n" for row in ROWS)
    assert found.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_a_hub_set_without_a_split_takes_train_or_the_only_one_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"test": [{}], "train": ROWS})
    assert read("a/b").source == "a/b:train"
    fake_hub(monkeypatch, {"test": ROWS})
    assert read("a/b").source == "a/b:test"
    fake_hub(monkeypatch, {"test": ROWS, "dev": ROWS})
    message = refused("a/b")
    assert "has the splits test, dev" in message
    assert "write a/b:test" in message


def test_a_hub_set_that_fails_is_one_readable_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_hub(monkeypatch, ConnectionError("Couldn't reach 'a/b' on the Hub\nmore"))
    message = refused("a/b:train")
    assert message.startswith("a/b:train: cannot be loaded from the Hub: Couldn't reach 'a/b' on the Hub\n")
    assert "local file" in message
    fake_hub(monkeypatch, [])
    assert "holds no rows" in refused("a/b:train")
    fake_hub(monkeypatch, [{"image": object()}])
    assert "no stable text" in refused("a/b:train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert "is also here" in refused("a/b:train")


def test_the_real_datasets_library_offline_gives_the_same_error(tmp_path: Path) -> None:
    code = (
        "from peftkit.data.readers import read\nfrom peftkit.errors import DataError\n"
        "try: read('peftkit-tests/no-such-set:train')\nexcept DataError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("peftkit-tests/no-such-set:train: cannot be loaded from the Hub"), done.stderr


def test_the_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, peftkit.data.formats, peftkit.data.split, peftkit.data.overlap\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_all_broken_lines_are_named_at_once(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "[1, 2]", '{"text": "b"}', '{"text"', '{"text": "c"}', "7", '{"text": "d"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="3 lines hold no row") as caught:
        read(path)
    assert [f"rows.jsonl:{line}" in caught.value.fact for line in range(1, 8)] == [n in (2, 4, 6) for n in range(1, 8)]
    assert "mend or remove" in str(caught.value)
