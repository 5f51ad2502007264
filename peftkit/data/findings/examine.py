"""All checks over the words of the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import chain

from peftkit.data.findings import answers, classes, duplicates, language, private, text, turns
from peftkit.data.findings.finding import Role, RowText, Tally
from peftkit.data.formats import Row


def examine_texts(
    train: Sequence[Row],
    held_out: Sequence[Row],
    control: Collection[str],
    against: tuple[str, Sequence[Row]] | None = None,
) -> Tally:
    """Look at the words of the rows; of the tokenizer only its control tokens are needed."""
    checks = (private.check, text.check, partial(turns.check, foreign=turns.foreign_to(control)), answers.check)
    tally = Tally(len(train), len(held_out))
    for row in chain(_texts(train, "train"), _texts(held_out, "held_out")):
        for check in checks:
            tally.add(row, check(row))
    # Made again: what a row keeps for the checks above is several times its size.
    learned, held = list(_texts(train, "train")), list(_texts(held_out, "held_out"))
    rows = [*learned, *held]
    turns.check_all(rows, tally)
    answers.check_all(rows, tally)
    classes.check_all(learned, held, tally)
    duplicates.check_all(learned, held, tally)
    if against is not None:
        name, others = against
        duplicates.check_against(learned, list(_texts(others, "held_out")), name, tally)
    language.check_all(rows, tally)
    return tally


def _texts(rows: Sequence[Row], role: Role) -> Iterator[RowText]:
    return (RowText(row, role, index) for index, row in enumerate(rows))
