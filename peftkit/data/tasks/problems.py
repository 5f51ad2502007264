"""What is wrong with the rows of a task, all of it in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from peftkit.data.formats import LISTED
from peftkit.data.readers import Where
from peftkit.errors import DataError

T = TypeVar("T")


class Problems:
    """Problems of one source, each with the place it stands at."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[tuple[str, str]] = []

    def add(self, where: Where | str, fact: str) -> None:
        """Note what is wrong at a place."""
        self.found.append((str(where), fact))

    def refuse(self, rows: int, expected: str, hint: str = "edit or remove these rows") -> None:
        """Raise DataError with all problems (20 shown) where there are any; `rows` is how many were looked at."""
        if not self.found:
            return
        listed = "".join(f"\n- {where}: {fact}" for where, fact in self.found[:LISTED])
        more = f"\n- and {len(self.found) - LISTED:,} more" if len(self.found) > LISTED else ""
        many = "1 problem" if len(self.found) == 1 else f"{len(self.found):,} problems"
        bad = len({where for where, _ in self.found})
        places = "1 place" if bad == 1 else f"{bad:,} places"
        raise DataError(
            f"{self.source}: {many} at {places} in {rows:,} rows{listed}{more}", expected=expected, hint=hint
        )


def all_or_refuse(*attempts: Callable[[], T]) -> list[T]:
    """What every attempt returns. Raises DataError with the problems of all that fail, one alone as it is."""
    results, errors = [], []
    for attempt in attempts:
        try:
            results.append(attempt())
        except DataError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else _joined(errors)
    return results


def _joined(errors: Sequence[DataError]) -> DataError:
    def distinct(texts: Sequence[str | None]) -> str | None:
        return "; ".join(dict.fromkeys(filter(None, texts))) or None

    return DataError(
        "\n".join(error.fact for error in errors),
        expected=distinct([error.expected for error in errors]),
        hint=distinct([error.hint for error in errors]),
    )


def shown(value: object, most: int = 60) -> str:
    """A value as it stands in a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
