"""One value of a stranger's configuration against the kind that the table of methods gives it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftkit.registry.intake.rules import (
    LARGEST_RANK,
    LARGEST_SEED,
    LARGEST_SETTING,
    LONGEST_NAME,
    LONGEST_TEXT,
    AdapterRefused,
    shown,
)

_NAME = re.compile(r"\^?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]*", re.ASCII)
_PATTERN_SIGNS = set("*+?()[]{}|$^")
_RESERVED = {
    *("base_model", "base_layer", "original_module", "modules_to_save", "token_adapter", "lora"),
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
}


def check_value(key: str, value: Any, kind: Any) -> None:
    """Raise AdapterRefused unless `value` is of `kind` ("rank", "names?", "choice:a|b", or a dict of kinds)."""
    if isinstance(kind, Mapping):
        _check_nested(key, value, kind)
        return
    name = kind.removesuffix("?")
    if value is None:
        if not kind.endswith("?"):
            raise _wrong(key, value, name)
    elif name.startswith("choice:"):
        spelled = str(value).lower() if isinstance(value, bool) else value
        if spelled not in name.removeprefix("choice:").split("|"):
            raise AdapterRefused("config.value", f"{key} is {shown(value)}", expected=f"one of {name[7:]}")
    else:
        _CHECKS[name](key, value)


def check_name(key: str, value: Any) -> None:
    """Raise AdapterRefused unless `value` is a dotted module name that PEFT may safely take for a pattern."""
    if not isinstance(value, str):
        raise _wrong(key, value, "a name")
    if len(value) > LONGEST_NAME:
        raise AdapterRefused("limit.name", f"{key} holds a name of {len(value)} characters")
    if not _NAME.fullmatch(value):
        if set(value) & _PATTERN_SIGNS and value.isprintable():
            hint = "write the names of the modules out, in the folder's adapter_config.json"
            raise AdapterRefused("config.pattern", f"{key} holds {shown(value)}", hint=hint)
        raise AdapterRefused("config.name", f"{key} holds {shown(value)}")
    check_reserved(value, key)


def check_reserved(module: str, where: str) -> None:
    """Raise AdapterRefused when a part of a module's name is a word that PEFT or peftkit keeps for itself."""
    for part in module.split("."):
        if part in _RESERVED or part.startswith("__"):
            raise AdapterRefused("name.reserved", f"{where} holds {shown(module)}: {part} is reserved")


def is_plain(name: str) -> bool:
    """Whether a name matches only itself when PEFT takes it for a pattern (but for its dots)."""
    return bool(_NAME.fullmatch(name))


def check_text(key: str, value: str) -> None:
    """Raise AdapterRefused unless the text is printable and not too long."""
    if len(value) > LONGEST_TEXT:
        raise AdapterRefused("limit.name", f"{shown(key)} has {len(value)} characters")
    if not value.isprintable():
        raise AdapterRefused("config.text", f"{shown(key)} is {shown(value)}")


def _check_nested(key: str, value: Any, kinds: Mapping[str, Any]) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise _wrong(key, value, "settings")
    for inner, item in value.items():
        if inner not in kinds:
            raise AdapterRefused("config.unknown-key", f"{key} holds the key {shown(inner)}")
        if item is not None:
            check_value(f"{key}.{inner}", item, kinds[inner])


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(key, value, "a number")
    if abs(value) > LARGEST_SETTING:
        raise AdapterRefused("limit.setting", f"{key} is {shown(value)}")


def _check_fraction(key: str, value: Any) -> None:
    _check_number(key, value)
    if not 0 <= value < 1:
        raise AdapterRefused("config.value", f"{key} is {shown(value)}", expected="at least 0, below 1")


def _check_whole(key: str, value: Any, most: int = LARGEST_SETTING) -> None:
    if type(value) is not int:
        raise _wrong(key, value, "a whole number")
    if not -1 <= value <= most:
        raise AdapterRefused("limit.setting", f"{key} is {shown(value)}")


def _check_seed(key: str, value: Any) -> None:
    _check_whole(key, value, LARGEST_SEED)


def _check_rank(key: str, value: Any) -> None:
    if type(value) is not int:
        raise _wrong(key, value, "a whole number")
    if not 1 <= value <= LARGEST_RANK:
        raise AdapterRefused("limit.rank", f"{key} is {shown(value)}")


def _check_word(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _wrong(key, value, "text")
    check_text(key, value)
    if not _WORD.fullmatch(value):
        raise AdapterRefused("config.value", f"{key} is {shown(value)}", expected="one plain word")


def _check_names(key: str, value: Any) -> None:
    if not isinstance(value, str | list):
        raise _wrong(key, value, "a list of names")
    for name in [value] if isinstance(value, str) else value:
        check_name(key, name)


def _check_indices(key: str, value: Any) -> None:
    if not isinstance(value, list | int):
        raise _wrong(key, value, "a list of whole numbers")
    for index in value if isinstance(value, list) else [value]:
        _check_whole(key, index)


def _check_token_indices(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        _check_indices(key, value)
        return
    for name, indices in value.items():
        check_name(key, name)
        _check_indices(key, indices)


def _check_pattern(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise _wrong(key, value, "names with a number each")
    check = _check_rank if key == "rank_pattern" else _check_number
    for name, number in value.items():
        check_name(key, name)
        if key == "rank_pattern" and isinstance(number, float | list):
            _check_share(key, number)
        else:
            check(key, number)


def _check_share(key: str, value: Any) -> None:
    # AdaLoRA keeps one true or false for each rank, OSF a share of the rank.
    if isinstance(value, float):
        _check_fraction(key, value)
        return
    if len(value) > LARGEST_RANK:
        raise AdapterRefused("limit.rank", f"{key} holds a mask of {len(value)} ranks")
    for item in value:
        _check_bool(key, item)


def _wrong(key: str, value: Any, wanted: str) -> AdapterRefused:
    return AdapterRefused("config.type", f"{key} is {shown(value)}", expected=wanted)


_CHECKS = {
    "bool": _check_bool,
    "number": _check_number,
    "fraction": _check_fraction,
    "whole": _check_whole,
    "seed": _check_seed,
    "rank": _check_rank,
    "word": _check_word,
    "names": _check_names,
    "indices": _check_indices,
    "token-indices": _check_token_indices,
    "pattern": _check_pattern,
}
