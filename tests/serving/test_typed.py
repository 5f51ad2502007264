"""Types of arguments that were written as text, by their schema."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.serving.openai.typed import typed

_ROOT = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}, "a/b": {"enum": [1, 2]}}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '"a"', '"a"'),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "3.0", 3.0),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, '["None", 1]', ["None", 1]),
        ({"type": "array"}, "['a']", "['a']"),
        ({"type": "array"}, "[" * 5000, "[" * 5000),
        ({"type": "object"}, '\n{"a": [1]}\n', {"a": [1]}),
        ({"type": "object"}, '"{}"', '"{}"'),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "a", "a"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "250", 250),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "2a", "2a"),
        ({"oneOf": [{"type": "object"}, {"type": "string"}]}, '{"a": 1}', {"a": 1}),
        ({"allOf": [{"$ref": "#/$defs/n"}], "default": 1}, "3", 3),
        ({"$ref": "#/$defs/a~1b"}, "2", 2),
        ({"$ref": "#/$defs/loop"}, "2", "2"),
        ({"$ref": "#/nowhere/at/all"}, "2", "2"),
        ({"const": 2}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({}, "2", "2"),
        (True, "2", "2"),
        (None, "true", "true"),
        ({"type": 3, "enum": 4, "anyOf": 5}, "2", "2"),
    ],
)
def test_a_text_is_what_its_schema_has_a_type_for(schema: Any, text: str, value: Any) -> None:
    found = typed(text, schema, _ROOT)
    assert (found, type(found)) == (value, type(value))
