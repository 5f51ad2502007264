"""Receipts: what was done to an adapter besides training it, as facts that travel in its manifest.

A receipt is a JSON object with a `type`; the types written so far are below. A reader keeps what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, JsonValue


def _typed(receipt: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if not isinstance(receipt.get("type"), str) or not receipt["type"]:
        raise ValueError("a receipt needs a type")
    return receipt


Receipt = Annotated[dict[str, JsonValue], AfterValidator(_typed)]


def imported(
    source: str, files: Mapping[str, str], left_out: Sequence[str], notes: Sequence[str], bound: str
) -> dict[str, Any]:
    """An adapter came from outside: digests of the files as they came, what was left out, and who named its base.

    `bound` is "user" when the base was named at import, "config" when it is the one its own config names, "manifest"
    when an exported version was imported under another name.
    """
    return {
        "type": "import",
        "source": source,
        "files": dict(files),
        "left_out": list(left_out),
        "notes": list(notes),
        "bound": bound,
    }


def other_base(
    version: str,
    trained_on: Mapping[str, Any],
    used_on: Mapping[str, Any],
    differs: Sequence[str],
    relation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An adapter was used, by an explicit flag, on a base that it was not trained on.

    `relation` is what was measured between the two bases, where it was: its id, median and largest error.
    """
    return {
        "type": "other_base",
        "version": version,
        "trained_on": dict(trained_on),
        "used_on": dict(used_on),
        "differs": list(differs),
        "relation": dict(relation) if relation else None,
    }
