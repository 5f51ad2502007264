"""Settings that differ from module to module: `rank_pattern`, `alpha_pattern`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.errors import DeltaError
from peftkit.registry.intake.values import is_plain


def for_module(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first value whose name is the module's or ends it, as PEFT's `get_pattern_key` finds it, else `default`.

    A name that begins with ^ is the whole name. PEFT takes names for regular expressions; only plain ones are read
    here. Raises DeltaError for others.
    """
    for name, value in (pattern or {}).items():
        if not is_plain(name):
            raise DeltaError(f"the pattern {name!r} is not a plain name", expected="names of modules")
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            return value
    return default
