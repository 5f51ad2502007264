"""Write the demo data "tickets": a support e-mail becomes one line of JSON.

    python recipes/demo/tickets.py --out DIR [--seed 7]

Templates and values stand in tickets_train.json and tickets_held_out.json; the two files share no product, phrase or
template, and this script only combines them. In the shapes of order ids, # is a digit and @ a letter.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
SYSTEM = "Ticket as JSON."
FIELDS = ("language", "intent", "urgency", "product", "order_id")
URGENCIES = ("can wait", "normal", "urgent")
SHARES = {"en": 3, "es": 2}  # rows of a language in a block, for each intent
TRAIN_ROWS, HELD_OUT_ROWS = 480, 120
LETTERS = "ABCDEFGHKLMNPRSTUVWXYZ"
NGRAM = 8

Row = dict[str, Any]
T = TypeVar("T")


def build(seed: int) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the held-out rows; the same seed gives the same rows."""
    taken: set[str] = set()  # order ids and mails already used, in either split
    train = _split("train", TRAIN_ROWS, random.Random(f"tickets-train-{seed}"), taken)
    held_out = _split("held_out", HELD_OUT_ROWS, random.Random(f"tickets-held-out-{seed}"), taken)
    return train, held_out


def overlap(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Return the highest share of one held-out mail's word 8-grams that also occur in a training mail."""
    seen = {gram for row in train for gram in _ngrams(row)}
    return max(sum(gram in seen for gram in grams) / len(grams) for grams in map(_ngrams, held_out))


def _ngrams(row: Row) -> list[tuple[str, ...]]:
    words = row["messages"][1]["content"].lower().split()
    return [tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))]


def _split(name: str, count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """Combine one file's templates and values into `count` rows.

    Rows come in blocks that hold every intent as often as SHARES says for each language: any prefix is balanced.
    """
    source = json.loads((HERE / f"tickets_{name}.json").read_text(encoding="utf-8"))
    cells: dict[tuple[str, str], list[str]] = {}
    for template_id in source["templates"]:
        cells.setdefault(_labels(template_id), []).append(template_id)
    decks = {cell: _deck(rng, ids) for cell, ids in cells.items()}
    products = _deck(rng, source["products"])
    moods = _deck(rng, [(urgency, order) for urgency in URGENCIES for order in (True, True, True, False, False)])
    rows: list[Row] = []
    while len(rows) < count:
        block = [cell for cell in cells for _ in range(SHARES[cell[1]])]
        rng.shuffle(block)
        for cell in block[: count - len(rows)]:
            rows.append(_row(source, next(decks[cell]), next(products), next(moods), rng, taken))
    return rows


def _labels(template_id: str) -> tuple[str, str]:
    """Read intent and language off a template's name: tr-refund-en-1."""
    _, intent, language, _ = template_id.split("-")
    return intent, language


def _deck(rng: random.Random, items: Sequence[T]) -> Iterator[T]:
    """Deal the items for ever, each once per round, reshuffled every round."""
    while True:
        yield from rng.sample(items, len(items))


def _row(
    source: Row, template_id: str, product: str, mood: tuple[str, bool], rng: random.Random, taken: set[str]
) -> Row:
    """Fill one template; draw again while the mail has been used before."""
    template = source["templates"][template_id]
    intent, language = _labels(template_id)
    urgency, has_order = mood[0], mood[1] or "{id}" in template
    while True:
        order_id = _shape(source["order_ids"], rng)
        if order_id in taken:
            continue
        tail = [rng.choice(source["urgency"][urgency][language])]
        if "{id}" not in template:
            tail.append(rng.choice(source["orders" if has_order else "no_order"][language]))
        rng.shuffle(tail)
        mail = " ".join(part for part in (template, *tail) if part).format(
            product=product,
            other=rng.choice([item for item in source["products"] if item != product]),
            id=order_id,
        )
        if mail not in taken:
            break
    taken.update((mail, order_id))
    values = {
        "product": product,
        "intent": intent,
        "urgency": urgency,
        "order_id": order_id if has_order else None,
        "language": language,
    }
    ticket = json.dumps({key: values[key] for key in FIELDS}, ensure_ascii=False, separators=(",", ":"))
    turns = zip(("system", "user", "assistant"), (SYSTEM, mail, ticket), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in turns], "template": template_id}


def _shape(shapes: Sequence[str], rng: random.Random) -> str:
    """Draw one number of one of these shapes."""
    fill = {"#": "0123456789", "@": LETTERS}
    return "".join(rng.choice(fill.get(char, char)) for char in rng.choice(shapes))


def main() -> None:
    """Write both splits and the schema, and print one line about them."""
    parser = argparse.ArgumentParser(description="Write the demo data 'tickets'.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    train, held_out = build(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("held_out", held_out)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"tickets.{name}.jsonl").write_bytes(lines.encode())
    (args.out / "tickets.schema.txt").write_bytes((HERE / "tickets_schema.txt").read_bytes())
    kinds = [len({row["template"] for row in rows}) for rows in (train, held_out)]
    print(
        f"tickets: {len(train)} train rows from {kinds[0]} templates, {len(held_out)} held-out rows from {kinds[1]}; "
        f"highest {NGRAM}-gram overlap of a held-out mail with training {overlap(train, held_out):.3f}"
    )


if __name__ == "__main__":
    main()
