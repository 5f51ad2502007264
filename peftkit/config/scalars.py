"""YAML with the core scalars of 1.2: `1e-5` is a number, `no` is a word, `2024-01-01` and `1:30` stay text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

import yaml

from peftkit.config.hints import fits, inner_hints, takes_text

TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _SCALARS.items():
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    Loader.add_implicit_resolver(TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(TAG + _name, _whole, None)
# PyYAML writes these line ends raw between quotes and reads them back as a space or a newline.
_ODD_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(TAG + "str", text, '"' if _ODD_LINE_ENDS.search(text) else None)
)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))
_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `resolve` (and YAML 1.1 readers) read back as the same values, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _typed(tag: str, text: str) -> Any:
    """The value of a plain scalar; raises ValueError for a tag that is not one of the core scalars."""
    match tag.removeprefix(TAG):
        case "str":
            return text
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 16) if text.startswith("0x") else int(text)
        case "float":
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    raise ValueError(f"the YAML tag {tag} is not supported")


def read_value(node: yaml.Node, alternatives: tuple[Any, ...]) -> Any:
    """A YAML node as plain values, its scalars read the way the type hint wants; raises ValueError on odd tags."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, alternatives)
    if node.tag not in (TAG + "map", TAG + "seq"):
        raise ValueError(f"the YAML tag {node.tag} is not supported")
    if isinstance(node, yaml.MappingNode):
        return {read_word(key): read_value(item, inner_hints(alternatives, read_word(key))) for key, item in node.value}
    return [read_value(item, inner_hints(alternatives, "")) for item in node.value]


def _scalar(node: yaml.ScalarNode, alternatives: tuple[Any, ...]) -> Any:
    """A scalar; what YAML calls a number, a truth value or null stays text where only text is wanted."""
    text = str(node.value)
    if node.tag == TAG + "str":
        return text
    value = _typed(node.tag, text)
    if not text or any(fits(value, kind) for kind in alternatives):
        return value
    # pydantic takes true for 1; as text it is refused wherever no truth value is wanted.
    keep_text = isinstance(value, bool) or any(takes_text(kind, text) for kind in alternatives)
    return text if keep_text else value


def read_word(node: yaml.Node) -> str:
    """The name of a setting; raises ValueError for a node that is none."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("a name of a setting must be a word, not a list or a mapping")
    return str(node.value)


def find_repeats(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Keys that stand twice in one mapping, with their line numbers."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from find_repeats(item, f"{prefix}{index}.")
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            word, line = read_word(key), key.start_mark.line + 1
            if word in lines:
                yield prefix + word, lines[word], line
            lines.setdefault(word, line)
            yield from find_repeats(item, f"{prefix}{word}.")
