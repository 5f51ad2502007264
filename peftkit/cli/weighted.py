"""What the commands that combine adapters take: `NAME:WEIGHT`, a method with its settings, rows by adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftkit.errors import DeltaError

if TYPE_CHECKING:
    from peftkit.deltas.combining.methods import How

Adapters = Annotated[list[str], typer.Argument(metavar="NAME[:WEIGHT] …", help="Adapters of one base.")]
MethodName = Annotated[str, typer.Option("--method", help="How ΔWs become one; `exact` is their weighted sum.")]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Settings of the method, such as density=0.5 or seed=1."),
]
RowFiles = Annotated[
    list[str] | None,
    typer.Option("--rows", metavar="[NAME=]FILE", help="Held-out rows of an adapter; else those of its run."),
]


def how(method: str, settings: Sequence[str]) -> How:
    """The method with its settings. Raises DeltaError for one that does not exist or is out of its range."""
    from peftkit.deltas.combining.methods import How

    options: dict[str, float] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise DeltaError(f"--set {text}: no number is set", expected="KEY=NUMBER", hint="--set density=0.5")
        options[key.strip()] = int(number) if number.is_integer() and "." not in value else number
    return How(method, options)


def parse_rows(arguments: Sequence[str], names: Sequence[str]) -> Mapping[str, Path]:
    """File of rows by adapter; a file alone belongs to every adapter that none is named for."""
    named, alone = {}, []
    for text in arguments:
        name, equals, file = text.partition("=")
        if equals and not Path(text).exists():
            named[name] = Path(file)
        else:
            alone.append(text)
    empty = [name for name, file in named.items() if not name or file == Path()]
    if len(alone) > 1 or empty:
        surplus = f"{len(alone)} files without an adapter: {', '.join(alone)}"
        raise DeltaError(
            f"--rows names {surplus if alone[1:] else 'an adapter without a file'}",
            expected=f"NAME=FILE with one of {', '.join(names)}",
            hint=f"--rows {names[0]}={(alone or ['held_out.jsonl'])[0]}",
        )
    return named | {name: Path(alone[0]) for name in names if alone and name not in named}


def parse_weighted(arguments: Sequence[str]) -> list[tuple[str, float]]:
    """(reference, weight) of each argument `NAME[:WEIGHT]`; the weight is 1 where none is given.

    Raises DeltaError for an empty name or weight, a weight that is no finite number, and weights that are all 0.
    """
    found = [_parse(argument) for argument in arguments]
    if found and not any(weight for _, weight in found):
        raise DeltaError(f"all weights of {', '.join(arguments)} are 0", expected="one weight that is not 0")
    return found


def _parse(argument: str) -> tuple[str, float]:
    name, colon, text = argument.partition(":")
    try:
        weight = float(text) if colon else 1.0
    except ValueError:
        weight = math.nan
    if not name.strip() or not math.isfinite(weight):
        what = f"the weight {text!r} is no finite number" if name.strip() else "it names no adapter"
        raise DeltaError(
            f"{argument!r}: {what}",
            expected="NAME or NAME:WEIGHT, such as tickets:0.6 or tickets@prod:-1",
            hint=f"peftkit preview {name or 'NAME'}:0.5",
        )
    return name, weight
