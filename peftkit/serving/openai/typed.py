"""Types of values that were written as text, by the JSON schema of what takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.canonical import strict_json

_KINDS = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
# Templates of Jinja write these as Python does: `args_value | string` in Qwen's.
_JINJA = {"True": "true", "False": "false", "None": "null"}


def typed(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """What a text stands for: what it is as JSON, where `schema` has a type for that; else the text itself.

    A text that is a text in JSON too is taken as it stands, with its quotes. `root` is what references are read in.
    """
    kinds = _kinds(schema, root) - {"string"}
    if not kinds:
        return text
    bare = text.strip()
    try:
        value = strict_json(_JINJA.get(bare, bare).encode())
    except ValueError:
        return text
    return value if _KINDS[type(value)] in kinds or _is_number(value, kinds) else text


def declared(schema: Mapping[str, Any], name: str) -> Any:
    """The schema of one of an object's properties; None when nothing is said about it."""
    return properties(schema).get(name, schema.get("additionalProperties"))


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's properties, by their names."""
    said = schema.get("properties")
    return said if isinstance(said, Mapping) else {}


def _is_number(value: Any, kinds: set[str]) -> bool:
    """Whether a schema's number may be this whole one, or its integer this 3.0."""
    if type(value) is int:
        return "number" in kinds
    return "integer" in kinds and isinstance(value, float) and value.is_integer()


def _kinds(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The types that a schema names, itself or in what it is made of. None where it leaves them open."""
    kinds, left, seen = set[str](), [schema], set[str]()
    while left:
        part = left.pop()
        if not isinstance(part, Mapping):
            continue
        said = part.get("type")
        kinds.update(each for each in (said if isinstance(said, list) else [said]) if isinstance(each, str))
        listed = part.get("enum", [part["const"]] if "const" in part else [])
        if said is None and isinstance(listed, list):
            kinds.update(_KINDS[type(each)] for each in listed)
        for several in (part.get("anyOf"), part.get("oneOf"), part.get("allOf")):
            left += several if isinstance(several, list) else []
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            left.append(_at(root, reference))
    return kinds


def _at(root: Any, reference: str) -> Any:
    """What a reference such as `#/$defs/city` points to; None when it is not there."""
    found, steps = root, reference.split("/")
    for step in steps[1:] if steps[0] == "#" else [reference]:
        key = step.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
