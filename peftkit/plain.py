"""Values of any kind as plain JSON values, and as the text of a JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any


def as_plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinities as text, unknown objects as their text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return as_plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_plain(dataclasses.asdict(value))
    # Scalars of numpy and torch, which this module does not import.
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        item = value.item()
        if isinstance(item, (bool, int, float)):
            return as_plain(item)
    return str(value)


def as_json_text(value: Any) -> str:
    """A value as the text of a JSON file, for people to read."""
    return json.dumps(as_plain(value), indent=2, ensure_ascii=False) + "\n"


def as_utf8(value: Any) -> Any:
    """A value as `as_plain` gives it, with halves of a character (a file name in another encoding) as backslashes."""
    plain = as_plain(value)
    if isinstance(plain, str):
        return plain.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(plain, list):
        return [as_utf8(item) for item in plain]
    if isinstance(plain, dict):
        return {as_utf8(key): as_utf8(item) for key, item in plain.items()}
    return plain
