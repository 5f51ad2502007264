"""What answers on disk depend on: told apart from what is asked now, before anything is written over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.errors import GenerationError

FORMAT = "peftkit answers 1"
"""Stands first in what answers depend on."""
_BEGINNING = json.dumps({"format": FORMAT}).removesuffix("}").encode()
_GO_ON = "repeat the command that began it, choose another --out, or start over with --fresh"
_DIFFERENCES = 8


def receipt_of(out: Path) -> Path:
    """What says what finished answers depend on."""
    return out.with_name(f"{out.name}.receipt.json")


def receipt_for(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt of `out`. Raises GenerationError unless it holds the answers to just this."""
    try:
        receipt = dict(json.loads(receipt_of(out).read_bytes()))
        there, digest = receipt["about"], receipt["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        there = digest = None
    mended = "choose another --out, or replace it with --overwrite"
    if digest != durable.digest_file(out):
        raise GenerationError(
            f"{out} is there already, and is not as peftkit wrote it" if digest else f"{out} is there already",
            expected=f"answers with their receipt, {receipt_of(out).name}, or no such file",
            hint=mended,
        )
    refuse_other(out, there, about, mended)
    return receipt


def refuse_strange(path: Path) -> None:
    """Raise GenerationError for a file without a first line, unless its beginning is what a killed writer leaves."""
    with open(path, "rb") as stream:
        head = stream.read(len(_BEGINNING))
    if head.strip(b"\0") and head != _BEGINNING[: len(head)]:
        refuse_other(path, None, {})


def refuse_other(path: Path, there: Any, now: Mapping[str, Any], mended: str = _GO_ON) -> None:
    """Raise GenerationError when the answers in `path` depend on something else, naming it."""
    if there == now:
        return
    if not isinstance(there, dict) or there.get("format") != now.get("format"):
        raise GenerationError(
            f"{path} does not hold answers as this version of peftkit writes them",
            expected="what `peftkit generate` left there",
            hint=mended,
        )
    before, after = _flat(there), _flat(now)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    listed = [f"\n- {name}: {_short(before.get(name))} there, {_short(after.get(name))} now" for name in changed]
    more = f"\n- and {len(changed) - _DIFFERENCES} more" if len(changed) > _DIFFERENCES else ""
    raise GenerationError(
        f"{path} holds answers to something else:{''.join(listed[:_DIFFERENCES])}{more}",
        expected="the same rows, adapters, base and settings",
        hint=mended,
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: leaf for part, held in value.items() for key, leaf in _flat(held, f"{name}.{part}".strip(".")).items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
