"""The rows of `train_throughput.py`: short, mixed and long ones, encoded, the same for every arm.

Of the folder PEFTKIT_TEST_DATA: short is `rasbt_instruction` (Apache-2.0), mixed is `alpaca_en_demo` (Apache-2.0), the
first rows of at most 512 tokens of each, once for every prompt. long are whole paragraphs of one article of WikiText-2
(CC BY-SA 3.0) in a row, 1,024 to 2,048 tokens: the first paragraph is the prompt, the others are learned.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.data.chat import Example
from peftkit.data.formats import load_rows
from peftkit.data.part import encode
from peftkit.data.spec import DataSpec

SETS = {
    "short": "rasbt_instruction/instruction-data.json",
    "mixed": "llamafactory_demo/alpaca_en_demo.json",
    "long": "wikitext2/test.txt",
}
_LONGEST = {"short": 512, "mixed": 512, "long": 2048}
_SHORTEST_LONG = 1024
_TITLE = re.compile(r"^ = [^=]+ = $")


def data_file(name: str) -> Path:
    """The file of a set; exits where PEFTKIT_TEST_DATA does not name the folder that has it."""
    file = Path(os.environ.get("PEFTKIT_TEST_DATA", "")) / SETS[name]
    if not file.is_file():
        raise SystemExit(f"set PEFTKIT_TEST_DATA to a folder with {SETS[name]}")
    return file


def rows_setting(name: str, count: int) -> dict[str, Any]:
    """Which rows are used, with the digest of their file: part of a measurement's setting."""
    return {"set": name, "count": count, "sha256": hashlib.sha256(data_file(name).read_bytes()).hexdigest()}


def chosen(setting: dict[str, Any], backbone: Backbone) -> list[Example]:
    """The encoded rows that a setting names."""
    name, count = setting["set"], setting["count"]
    with tempfile.TemporaryDirectory() as folder:
        file = _articles(Path(folder) / "long.jsonl", backbone) if name == "long" else data_file(name)
        source = load_rows(file)
    once = list({repr(row.messages[:-1]): row for row in reversed(source.rows)}.values())[::-1]
    longest = _LONGEST[name]
    kept = list(encode(once, source, "train", backbone.tokenizer, DataSpec(too_long="drop"), longest).examples)
    if name == "long":
        kept = [row for row in kept if len(row.input_ids) >= _SHORTEST_LONG]
    if len(kept) < count:
        raise SystemExit(f"{SETS[name]} has {len(kept)} rows that fit, and {count} are asked for")
    return kept[:count]


def about(rows: list[Example]) -> dict[str, int]:
    """Counts of the rows."""
    return {
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "answer_tokens": sum(row.answer_tokens for row in rows),
        "longest": max(len(row.input_ids) for row in rows),
    }


def _articles(file: Path, backbone: Backbone) -> Path:
    """Rows of WikiText's articles, in an order of their own, as chat rows in a file."""
    rows = list(_portions(backbone))
    random.Random(0).shuffle(rows)
    lines = [
        {"messages": [{"role": "user", "content": f"Go on with this article:\n\n{first}"},
                      {"role": "assistant", "content": "\n\n".join(rest)}]}
        for first, *rest in rows
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _portions(backbone: Backbone) -> Iterator[list[str]]:
    """Paragraphs that follow one another in an article, until they have a drawn number of tokens."""
    draw, portion, tokens, wanted = random.Random(1), list[str](), 0, 1200
    for line in data_file("long").read_text(encoding="utf-8").splitlines():
        if _TITLE.match(line):
            portion, tokens = [], 0  # what is left of the article before is too short
            continue
        if not line.strip() or line.startswith(" ="):
            continue
        portion.append(line.strip())
        tokens += len(backbone.tokenizer.hf(line)["input_ids"])
        if tokens >= wanted and len(portion) > 1:
            yield portion
            portion, tokens, wanted = [], 0, draw.randint(_SHORTEST_LONG, 1800)
