"""The demo data: the same files each time, and two splits that share nothing that would flatter a score."""

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "recipes" / "demo"
KEYS = ["language", "intent", "urgency", "product", "order_id"]
INTENTS = {"refund", "defect", "invoice", "cancel", "delivery"}
LANGUAGES = {"en": 0.6, "es": 0.4}  # and their share of the rows

Row = dict[str, Any]


def load(name: str) -> ModuleType:
    """Load one script by path, as a user's copy would be."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(name: str, split: str) -> Row:
    """Read one committed file of templates and values."""
    data: Row = json.loads((DEMO / f"{name}_{split}.json").read_text(encoding="utf-8"))
    return data


def mail(row: Row) -> str:
    return str(row["messages"][1]["content"])


def answer(row: Row) -> str:
    return str(row["messages"][2]["content"])


def strings(node: Any) -> set[str]:
    """All texts below a JSON node, keys left out."""
    if isinstance(node, str):
        return {node}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return set().union(*map(strings, children))


def run(name: str, out: Path, hash_seed: str, *extra: str) -> str:
    """Run the script as a command and return what it printed."""
    command = [sys.executable, str(DEMO / f"{name}.py"), "--out", str(out), *extra]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


Splits = tuple[list[Row], list[Row]]


@pytest.fixture(scope="module")
def tickets() -> Splits:
    splits: Splits = load("tickets").build(7)
    return splits


@pytest.fixture(scope="module")
def sql() -> Splits:
    splits: Splits = load("sql").build(7)
    return splits


@pytest.mark.parametrize("name", ["tickets", "sql"])
def test_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    printed = [run(name, tmp_path / folder, hash_seed) for folder, hash_seed in (("a", "1"), ("b", "2"))]
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 1
    files = [f"{name}.held_out.jsonl", f"{name}.schema.txt", f"{name}.train.jsonl"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    run(name, tmp_path / "c", "1", "--seed", "8")
    assert (tmp_path / "c" / files[2]).read_bytes() != (tmp_path / "a" / files[2]).read_bytes()


@pytest.mark.parametrize("name", ["tickets", "sql"])
@pytest.mark.parametrize("seed", [7, 1])
def test_counts_and_no_shared_inputs_or_templates(name: str, seed: int) -> None:
    train, held_out = load(name).build(seed)
    assert (len(train), len(held_out)) == (480, 120)
    inputs = [mail(row) for row in train + held_out]
    assert len(set(inputs)) == len(inputs)
    templates = [{row["template"] for row in rows} for rows in (train, held_out)]
    assert templates == [set(source(name, "train")["templates"]), set(source(name, "held_out")["templates"])]
    assert not templates[0] & templates[1]
    for row in train + held_out:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert "{" not in mail(row)


@pytest.mark.parametrize("name", ["tickets", "sql"])
def test_overlap_figure_is_what_a_naive_count_gives(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, "0")
    texts = {
        split: [
            mail(json.loads(line)).lower()
            for line in (tmp_path / f"{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in ("train", "held_out")
    }
    haystack = "\n\n".join(" " + " ".join(text.split()) + " " for text in texts["train"])
    highest = 0.0
    for text in texts["held_out"]:
        words = text.split()
        pieces = [" " + " ".join(words[start : start + 8]) + " " for start in range(len(words) - 7)]
        highest = max(highest, sum(piece in haystack for piece in pieces) / len(pieces))
    assert highest <= 0.2
    assert printed.strip().endswith(f"{highest:.3f}")


def test_overlap_sees_a_copied_row(tickets: Splits) -> None:
    train, held_out = tickets
    assert load("tickets").overlap(train, [*held_out, train[3]]) == 1.0


def test_tickets_have_the_keys_in_order_and_only_allowed_values(tickets: Splits) -> None:
    for row in tickets[0] + tickets[1]:
        assert "\n" not in answer(row)
        ticket = json.loads(answer(row))
        assert list(ticket) == KEYS
        assert ticket["intent"] in INTENTS
        assert ticket["language"] in LANGUAGES
        assert ticket["urgency"] in {"can wait", "normal", "urgent"}
        assert row["template"].split("-")[1:3] == [ticket["intent"], ticket["language"]]
        assert ticket["product"] in mail(row)
        assert ticket["order_id"] is None or ticket["order_id"] in mail(row)
        assert len(mail(row)) <= 200
        assert len(answer(row)) <= 120


def test_ticket_splits_share_no_product_id_or_phrase(tickets: Splits) -> None:
    found: list[dict[str, set[str]]] = []
    for rows in tickets:
        parsed = [json.loads(answer(row)) for row in rows]
        found.append({key: {ticket[key] for ticket in parsed} - {None} for key in ("product", "order_id")})
    for key in ("product", "order_id"):
        assert found[0][key]
        assert not found[0][key] & found[1][key]
    data = source("tickets", "train"), source("tickets", "held_out")
    for key in ("products", "orders", "urgency", "no_order", "templates"):
        assert strings(data[0][key]) & strings(data[1][key]) <= {""}, key
    everything = "\n".join(mail(row) for row in tickets[0])
    for word in data[1]["products"]:
        assert word not in everything


def test_null_order_ids_have_no_order_phrase(tickets: Splits) -> None:
    """Where the label is null the mail holds no number of an order's shape."""
    shape = re.compile(r"\b\d{4}-[A-Z]\b|\b\d\d-\d{4}\b")
    for rows in tickets:
        empty = 0
        for row in rows:
            has_id = json.loads(answer(row))["order_id"] is not None
            assert bool(shape.search(mail(row))) == has_id, mail(row)
            empty += not has_id
        assert 0.25 < empty / len(rows) < 0.6


def test_no_product_name_hides_in_another() -> None:
    products = source("tickets", "train")["products"] + source("tickets", "held_out")["products"]
    assert not [(a, b) for a in products for b in products if a != b and a in b]


def test_any_prefix_of_the_tickets_is_balanced(tickets: Splits) -> None:
    even = {"intent": dict.fromkeys(INTENTS, 0.2), "language": LANGUAGES}
    for rows, size in ((tickets[0], 25), (tickets[0], 200), (tickets[1], 50)):
        first = [json.loads(answer(row)) for row in rows[:size]]
        for key, shares in even.items():
            counts = Counter(ticket[key] for ticket in first)
            assert counts == {value: round(share * size) for value, share in shares.items()}
        urgencies = Counter(ticket["urgency"] for ticket in first)
        assert min(urgencies[urgency] for urgency in ("can wait", "normal", "urgent")) >= size // 5, urgencies
    assert {row["template"] for row in tickets[0][:150]} == set(source("tickets", "train")["templates"])


def query(row: Row, statement: str) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(row["setup"])
        return database.execute(statement).fetchall()
    finally:
        database.close()


def test_sql_references_execute_and_tell_themselves_apart(sql: Splits) -> None:
    for row in sql[0] + sql[1]:
        schema, question = mail(row).split("\n")
        table = schema.split("(")[0]
        result = query(row, answer(row))
        everything = query(row, f"SELECT * FROM {table}")
        assert result
        assert len(everything) == 8
        assert result != everything
        assert row["setup"].startswith(f"CREATE TABLE {schema};")
        for value in re.findall(r"'([^']*)'", answer(row)):
            assert value in question
        if " WHERE " in answer(row):
            assert sorted(query(row, re.sub(r" WHERE .*?(?= GROUP|$)", "", answer(row)))) != sorted(result)


def test_sql_orders_have_no_ties(sql: Splits) -> None:
    for row in sql[0] + sql[1]:
        if ordered := re.search(r"ORDER BY (\w+)", answer(row)):
            values = query(row, f"SELECT {ordered[1]} FROM {mail(row).split('(')[0]}")
            assert len(set(values)) == len(values)


def test_sql_splits_share_no_table_column_or_value() -> None:
    seen: list[set[str]] = []
    for split in ("train", "held_out"):
        names: set[str] = set()
        for table in source("sql", split)["tables"]:
            names |= {table["table"], table["label"]["column"], table["group"]["column"]}
            names |= {*table["label"]["values"], *table["group"]["values"]}
            names |= {number["column"] for number in table["numbers"]}
        seen.append({name.lower() for name in names})
    assert not seen[0] & seen[1]


def test_wrong_queries_differ_and_run(sql: Splits) -> None:
    module = load("sql")
    row = next(row for row in sql[0] if row["template"] == "tr-two-1")
    wrong = module.wrong_queries(answer(row), mail(row).split("(")[0])
    assert answer(row) not in wrong
    assert any(" OR " in item for item in wrong)
    assert any(">=" in item for item in wrong)
    assert all(module.execute(row["setup"], item) is not None for item in wrong)


@pytest.mark.parametrize("name", ["tickets", "sql"])
def test_scripts_stay_short_and_use_the_standard_library(name: str) -> None:
    text = (DEMO / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert imported
    assert set(imported) <= sys.stdlib_module_names
