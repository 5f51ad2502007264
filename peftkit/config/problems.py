"""What pydantic finds wrong, in plain words and with the source of the value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from peftkit.config.hints import Slot
from peftkit.config.merge import Merge

_ASKED = "Input should be "
_NUMBER = ("int", "float", "finite")
_MUST_BE = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text of length {min_length} or more",
    "string_too_long": "text of length {max_length} or less",
    "string_pattern_mismatch": "text that matches {pattern}",
    "path_type": "a path",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    "list_type": "a list such as [a, b]",
    "tuple_type": "a list such as [a, b]",
    "set_type": "a list such as [a, b]",
    "frozen_set_type": "a list such as [a, b]",
    "dict_type": "a mapping such as {{a: b}}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
}


def explain(error: ValidationError, merge: Merge) -> list[str]:
    """What pydantic found, as one sentence for each setting, in our words and with the source of the value."""
    found: dict[tuple[str, str], list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_locate(detail, merge), []).append(detail)
    # One bad item of a list fails every other branch of a union as well; only the deepest finding helps.
    deeper = {key for key, item in found if item}
    return [
        sentence
        for (key, item), details in found.items()
        if item or key not in deeper
        for sentence in _sentences(key, item, details, merge)
    ]


def _locate(detail: Any, merge: Merge) -> tuple[str, str]:
    """The setting an error is about, and the item inside it: ("target_modules", "[1]")."""
    key, item = "", ""
    held: Any = None
    for position, part in enumerate(detail["loc"]):
        longer = f"{key}.{part}" if key else str(part)
        if longer in merge.slots and not item:
            key = longer
            held = merge.given[key].value if key in merge.given else None
            continue
        # pydantic puts names of union branches ("int", "list[str]") between the real parts: only real ones count.
        absent = position == len(detail["loc"]) - 1 and detail["type"] in ("missing", "extra_forbidden")
        if isinstance(part, int) and isinstance(held, list):
            item, held = f"{item}[{part}]", held[part] if part < len(held) else None
        elif absent or (isinstance(held, Mapping) and part in held):
            item, held = f"{item}.{part}", held.get(part) if isinstance(held, Mapping) else None
    return key, item


def _sentences(key: str, item: str, details: list[Any], merge: Merge) -> Iterator[str]:
    slot, given = merge.slots.get(key), merge.given.get(key)
    where = f" (from {given.where})" if given else "" if slot is None or slot.group else " (from default)"
    name = f"{key}{item}"
    phrases: list[str] = []
    for detail in details:
        kind = detail["type"]
        if kind == "missing":
            if item or not merge.unread:
                yield f"{name}: required, but not set"
        elif kind == "extra_forbidden":
            yield f"{name}: unknown setting{where}"
        elif kind in ("value_error", "assertion_error"):
            yield f"{name or 'settings'}: {detail['ctx']['error']}{where}"
        elif kind in ("model_type", "model_attributes_type") and slot and slot.group:
            phrases.append(f"a group of settings ({', '.join(slot.group.model_fields)})")
        elif kind in _MUST_BE or detail["msg"].startswith(_ASKED):
            phrases.append(_phrase(detail, _bounds(slot) if slot and not item else []))
        else:
            yield f"{name}: {detail['msg'][:1].lower()}{detail['msg'][1:]}{where}"
    if phrases:
        yield f"{name}: must be {' or '.join(dict.fromkeys(phrases))}, got {_shown(details[0]['input'])}{where}"


def _phrase(detail: Any, bounds: list[str]) -> str:
    """What an error asks for, to be read after "must be"."""
    kind, context = detail["type"], {name: _shown(value) for name, value in detail.get("ctx", {}).items()}
    if "expected" in context:
        context["expected"] = re.sub(r"^(?=.* or )", "one of ", detail["ctx"]["expected"])
    if kind not in _MUST_BE:
        return str(detail["msg"]).removeprefix(_ASKED)
    phrase = _MUST_BE[kind].format(**context)
    if kind.startswith(("greater_than", "less_than")) and len(bounds) > 1:
        return " and ".join(bounds)
    return f"{phrase} {' and '.join(bounds)}" if kind.startswith(_NUMBER) and bounds else phrase


def _bounds(slot: Slot) -> list[str]:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return [
        f"{word} {_shown(getattr(rule, name))}"
        for rule in slot.field.metadata
        for name, word in words.items()
        if getattr(rule, name, None) is not None
    ]


def _shown(value: Any) -> str:
    """A value the way a YAML file would spell it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
