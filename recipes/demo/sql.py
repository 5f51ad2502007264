"""Write the demo data "sql": a question about one table becomes one SQLite query.

    python recipes/demo/sql.py --out DIR [--seed 7]

Tables and question templates stand in sql_train.json and sql_held_out.json, which share no table, column, text value
or phrasing. Every row has its own small database (column `setup`). A row is kept only when every slightly wrong query
(`wrong_queries`) gives another result there than the reference query, so a score by execution means something.
"""

import argparse
import json
import random
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SYSTEM = "Write one SQLite query. Answer with SQL only."
TRAIN_ROWS, HELD_OUT_ROWS = 480, 120
TABLE_ROWS, TRIES, NGRAM = 8, 300, 8
SLIPS = (  # (pattern, replacement): each turns a right query into one that a careless reader might write
    (r" WHERE .*?(?= GROUP| ORDER|$)", ""),
    (r"WHERE .*? (AND|OR) (?!\d)", "WHERE "),
    (r" (AND|OR) (?!\d).*$", ""),
    (r" OR ", " AND "),
    (r" (AND) (?!\d)", " OR "),
    (r" > ", " >= "), (r" >= ", " > "), (r" < ", " <= "), (r" <= ", " < "), (r" > ", " < "), (r" <> ", " = "),
    (r"BETWEEN (\S+) AND \S+", r"> \1"), (r"(\w+) BETWEEN (\S+) AND (\S+)", r"\1 > \2 AND \1 < \3"),
    (r"MAX", "MIN"), (r"MIN", "MAX"), (r"AVG", "SUM"), (r"SUM", "AVG"), (r"SUM", "MAX"),
    (r" DESC", ""), (r"(ORDER BY \w+)\b(?! DESC)", r"\1 DESC"), (r" LIMIT \d+", ""), (r" ORDER BY \w+( DESC)?", ""),
    (r" HAVING .*", ""),
)  # fmt: skip

Row = dict[str, Any]


def build(seed: int) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the held-out rows; the same seed gives the same rows."""
    train = _split("train", TRAIN_ROWS, random.Random(f"sql-train-{seed}"))
    return train, _split("held_out", HELD_OUT_ROWS, random.Random(f"sql-held-out-{seed}"))


def execute(setup: str, query: str) -> list[tuple[Any, ...]]:
    """Run `query` on the database that `setup` makes; rows are sorted unless the query orders them."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(setup)
        rows = db.execute(query).fetchall()
    return rows if "ORDER BY" in query.upper() else sorted(rows, key=repr)


def wrong_queries(query: str, table: str) -> list[str]:
    """Return queries close to `query` that mean something else, and the trivial one."""
    slips = [re.sub(pattern, replacement, query) for pattern, replacement in SLIPS]
    return [f"SELECT * FROM {table}", *dict.fromkeys(slip for slip in slips if slip != query)]


def overlap(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Return the highest share of one held-out input's word 8-grams that also occur in a training input."""
    seen = {gram for row in train for gram in _ngrams(row)}
    return max(sum(gram in seen for gram in grams) / len(grams) for grams in map(_ngrams, held_out))


def _ngrams(row: Row) -> list[tuple[str, ...]]:
    words = row["messages"][1]["content"].lower().split()
    return [tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))]


def _split(name: str, count: int, rng: random.Random) -> list[Row]:
    """Make `count` rows in blocks that hold every template once, with the tables dealt in turn."""
    source = json.loads((HERE / f"sql_{name}.json").read_text(encoding="utf-8"))
    open_ids, rows, used, tables = sorted(source["templates"]), list[Row](), set[str](), list[Row]()
    while len(rows) < count:
        for template_id in rng.sample(open_ids, len(open_ids)):
            for _ in range(TRIES):
                tables = tables or rng.sample(source["tables"], len(source["tables"]))
                row = _row(tables.pop(), source["templates"][template_id], template_id, rng)
                if row and row["messages"][1]["content"] not in used:
                    used.add(row["messages"][1]["content"])
                    rows.append(row)
                    break
            else:
                open_ids.remove(template_id)  # every question this template can ask has been asked
    return rows[:count]


def _row(table: Row, template: Row, template_id: str, rng: random.Random) -> Row | None:
    """Fill one template with a fresh database; None when a slightly wrong query would score as right."""
    label, group, numbers = table["label"], table["group"], table["numbers"]
    names = rng.sample(label["values"], TABLE_ROWS)
    groups = [rng.choice(group["values"]) for _ in range(TABLE_ROWS)]
    steps = [range(round((n["to"] - n["from"]) / n["step"]) + 1) for n in numbers]
    # Distinct numbers in a column: no ties in ORDER BY … LIMIT. Steps are whole or halves: sums are exact.
    picks = [rng.sample(choices, TABLE_ROWS) for choices in steps]
    columns = [[n["from"] + i * n["step"] for i in pick] for n, pick in zip(numbers, picks, strict=True)]
    types = ["INT" if isinstance(n["step"], int) else "REAL" for n in numbers]
    heads = [f"{label['column']} TEXT", f"{group['column']} TEXT"]
    heads += [f"{n['column']} {kind}" for n, kind in zip(numbers, types, strict=True)]
    schema = f"{table['table']}({', '.join(heads)})"
    lines = [f"('{a}', '{b}', {c}, {d})" for a, b, c, d in zip(names, groups, *columns, strict=True)]
    setup = f"CREATE TABLE {schema};\nINSERT INTO {table['table']} VALUES\n" + ",\n".join(lines) + ";"
    first = rng.randrange(len(numbers))
    second = 1 - first
    low, high = sorted(rng.sample(columns[first], 2))
    value, value_2 = rng.sample(group["values"], 2)
    slots = {"T": table["table"], "L": label["column"], "G": group["column"], "N": numbers[first]["column"]}
    slots |= {"M": numbers[second]["column"], "rows": table["rows"], "row": table["row"], "label": label["word"]}
    slots |= {"group": group["word"], "num": numbers[first]["word"], "num2": numbers[second]["word"], "val": value}
    slots |= {"val2": value_2, "k": str(rng.randint(2, 4)), "v": f"{rng.choice(columns[first]):g}", "lo": f"{low:g}"}
    slots |= {"w": f"{rng.choice(columns[second]):g}", "hi": f"{high:g}"}
    question, query = template["question"].format(**slots), template["sql"].format(**slots)
    result = execute(setup, query)
    if not result or result[0][0] in (None, 0):
        return None
    if any(execute(setup, wrong) == result for wrong in wrong_queries(query, table["table"])):
        return None
    turns = zip(("system", "user", "assistant"), (SYSTEM, f"{schema}\n{question}", query), strict=True)
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "template": template_id, "setup": setup}


def main() -> None:
    """Write both splits and the schema, and print one line about them."""
    parser = argparse.ArgumentParser(description="Write the demo data 'sql'.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    train, held_out = build(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"sql.{name}.jsonl").write_bytes(lines.encode())
    (args.out / "sql.schema.txt").write_bytes((HERE / "sql_schema.txt").read_bytes())
    kinds = [len({row["template"] for row in rows}) for rows in (train, held_out)]
    print(
        f"sql: {len(train)} train rows from {kinds[0]} templates, {len(held_out)} held-out rows from {kinds[1]}; "
        f"highest {NGRAM}-gram overlap of a held-out input with training {overlap(train, held_out):.3f}"
    )


if __name__ == "__main__":
    main()
