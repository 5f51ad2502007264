"""The data of benchmarks/tasks.py: sets of PEFTKIT_TEST_DATA as the recipes read them, rewritten where they have to be.

Each function writes what it must into a scratch folder and gives the settings that name the rows.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

ENDING = "<|endoftext|>"
CLASSES = ("World", "Sports", "Business", "Sci/Tech")
HELD_ARTICLES = 10
"""Articles of xquad, the last ones, whose passages are held out."""


def folder() -> Path:
    """The folder of data; exits where PEFTKIT_TEST_DATA names none."""
    found = Path(os.environ.get("PEFTKIT_TEST_DATA", ""))
    if not (found / "sst2").is_dir():
        raise SystemExit("set PEFTKIT_TEST_DATA to the folder of data sets")
    return found


def sst2(scratch: Path) -> list[str]:
    """Sentences of reviews, two labels; the test file is held out."""
    files = [f"data.train={folder() / 'sst2' / 'train.tsv'}", f"data.held_out={folder() / 'sst2' / 'test.tsv'}"]
    return [*files, "data.columns=[text,label]"]


def ag_news(scratch: Path) -> list[str]:
    """News, four labels by their names; a quarter of the file is held out."""
    with (folder() / "ag_news" / "test.csv").open(encoding="utf-8", newline="") as lines:
        rows = [{"text": f"{title}. {text}", "label": CLASSES[int(at) - 1]} for at, title, text in csv.reader(lines)]
    return [f"data.train={_written(scratch / 'ag_news.jsonl', rows)}", "data.held_out_share=0.25"]


def stars(scratch: Path) -> list[str]:
    """Reviews of businesses and their one to five stars (Yelp, 200 rows): the graded numbers of the shared data."""
    rows = []
    for row in _lines("t0_tasks/yelp_review_full_so_i_would.jsonl"):
        text = row["prompt"].strip().removesuffix("So I would like to give it").strip()
        rows.append({"text": text, "stars": int(row["completion"].split()[0])})
    return [f"data.train={_written(scratch / 'stars.jsonl', rows)}", "data.label=stars", "data.held_out_share=0.25"]


def wnut17(scratch: Path) -> list[str]:
    """Words of short texts and their entities; the test file is held out."""
    place = folder() / "wnut17"
    return [f"data.train={place / 'wnut17train.conll'}", f"data.held_out={place / 'emerging.test.annotated'}"]


def xquad(scratch: Path) -> list[str]:
    """English questions about passages, split by article: no passage is in both parts."""
    articles = json.loads((folder() / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    files = []
    for name, part in (("train", articles[:-HELD_ARTICLES]), ("held_out", articles[-HELD_ARTICLES:])):
        file = scratch / f"{name}.json"
        file.write_text(json.dumps({"version": "1.1", "data": part}), encoding="utf-8")
        files.append(f"data.{name}={file}")
    return files


def multi30k(scratch: Path) -> list[str]:
    """Captions, English into German; the test files are held out."""
    place = folder() / "multi30k_en_de"
    return [
        f"data.train={place / 'val.en.gz'}+{place / 'val.de.gz'}",
        f"data.held_out={place / 'test_2016_flickr.en.gz'}+{place / 'test_2016_flickr.de.gz'}",
    ]


def samsum(scratch: Path) -> list[str]:
    """Chats and their summaries (200 rows)."""
    rows = [
        {"text": row["prompt"].removeprefix("Summarize:").strip(), "summary": row["completion"].removesuffix(ENDING)}
        for row in _lines("t0_tasks/samsum_Summarize_.jsonl")
    ]
    return [f"data.train={_written(scratch / 'samsum.jsonl', rows)}", "data.held_out_share=0.25"]


def signs(scratch: Path) -> list[str]:
    """Photographs of hand signs for ten digits; the test folder is held out."""
    place = folder() / "sign_digits_subset"
    return [f"data.train={place / 'train'}", f"data.held_out={place / 'test'}"]


def rasbt(scratch: Path) -> list[str]:
    """Short instructions with a polite and an impolite answer, both made by a language model.

    Six rows have the same answer twice, which is no preference: they are left out.
    """
    file = folder() / "rasbt_instruction" / "instruction-data-with-preference.json"
    pairs = json.loads(file.read_text(encoding="utf-8"))
    kept = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    return [f"data.train={_written(scratch / 'pairs.jsonl', kept)}"]


def instructions(scratch: Path) -> list[str]:
    """Short instructions with one answer; what stands there twice is meant so."""
    return [
        f"data.train={folder() / 'rasbt_instruction' / 'instruction-data.json'}",
        "data.accept=[leak,duplicate]",
    ]


def _lines(name: str) -> Iterable[dict[str, str]]:
    with (folder() / name).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _written(file: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
