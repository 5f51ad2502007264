"""The sources of settings merged: what each gives, key by key, and the problems on the way."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel

from peftkit.config.hints import Slot, alternatives_of, find_slots, inner_hints, is_mapping
from peftkit.config.scalars import TAG, Loader, dump_yaml, find_repeats, read_value, read_word


@dataclass(frozen=True)
class Given:
    """A value somebody gave, with where: "file my.yaml", and its line."""

    value: Any
    source: str
    line: int | None = None

    @property
    def where(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


class Merge:
    """Collects what the sources give, key by key, and every problem on the way."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model
        self.slots = find_slots(model)
        self.given: dict[str, Given] = {}
        self.problems: list[str] = []
        self.unread = False
        """A whole source could not be used: "required, but not set" would then be a guess."""

    def add_preset(self, name: str, presets: Mapping[str, Mapping[str, Any]]) -> None:
        if name not in presets:
            known = ", ".join(presets) or "none"
            self.problems.append(f"preset {name!r}: unknown; presets here: {known}")
            self.unread = True
            return
        # As YAML a preset follows the same rules as a file, and one path of code serves both.
        node = yaml.compose(dump_yaml(dict(presets[name])), Loader=Loader)
        if isinstance(node, yaml.MappingNode):
            self._add_tree(node, f"preset {name}", numbered=False)

    def add_file(self, path: Path) -> None:
        source = f"file {path}"
        try:
            node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=Loader)
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                return
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("must hold lines of `key: value`")
            for key, first, second in find_repeats(node):
                self.problems.append(_twice(key, source, first, second))
            self._add_tree(node, source, numbered=True)
            return
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start})"
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            problem = f"{line}is not valid YAML ({error.problem})"
        except yaml.YAMLError as error:
            problem = f"is not valid YAML ({str(error).splitlines()[0]})"
        except RecursionError:
            problem = "nests too deeply, or an alias holds itself"
        except ValueError as error:
            problem = str(error)
        self.problems.append(f"{source}: {problem}")
        self.unread = True

    def add_override(self, text: str) -> None:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self.problems.append(f"{text!r}: an override is written key=value (from command line)")
            return
        node = _override_node(value, self.slots.get(key))
        full = _spelled_out(key, node, self.slots)
        self._put(full, node if full == key else _override_node(value, self.slots[full]), Given(None, "command line"))

    def _add_tree(self, node: yaml.Node, source: str, *, numbered: bool) -> None:
        seen: dict[str, int] = {}
        for key, item, line in _spread(node, self.slots):
            # `train.r` may stand nested and dotted in one file; neither is the later one.
            if key in seen:
                self.problems.append(_twice(key, source, seen[key], line))
            seen[key] = line
            self._put(key, item, Given(None, source, line if numbered else None))

    def _put(self, key: str, node: yaml.Node, given: Given) -> None:
        slot = self.slots.get(key)
        owner = key if slot else next((k for k in _parents(key) if k in self.slots), None)
        if owner is None or (slot is None and not any(map(is_mapping, self.slots[owner].alternatives))):
            self.problems.append(f"{key}: unknown setting{_nearest(key, self.slots)} (from {given.where})")
            return
        if slot and slot.group and isinstance(node, yaml.MappingNode):
            for inner, item, _ in _spread(node, self.slots, key + "."):
                self._put(inner, item, given)
            return
        alternatives = self.slots[owner].alternatives
        try:
            value = read_value(node, inner_hints(alternatives, key) if slot is None else alternatives)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{key}: {error} (from {given.where})")
            return
        if slot is None:
            value = {**self._mapping(owner), key.removeprefix(owner + "."): value}
        for other in [*_parents(owner), *(k for k in self.given if k.startswith(owner + "."))]:
            self.given.pop(other, None)
        self.given[owner] = Given(value, given.source, given.line)

    def _mapping(self, owner: str) -> dict[str, Any]:
        """What a dict setting holds so far: the given value, or its default."""
        default: Any = self.model
        for name in owner.split("."):
            default = _default(default, name)
        held = self.given[owner].value if owner in self.given else default
        return dict(held) if isinstance(held, Mapping) else {}

    def assemble(self, group: type[BaseModel] | None = None, prefix: str = "", base: Any = None) -> dict[str, Any]:
        """What pydantic gets for one group: the given values, over those that a default instance of the group sets."""
        data: dict[str, Any] = {}
        inherited = self._inherited(prefix, base)
        for name, field in (group or self.model).model_fields.items():
            key, inherits = prefix + name, name in inherited
            inner = self.slots[key].group
            touched = any(other.startswith(key + ".") for other in self.given)
            if key in self.given:
                data[name] = self.given[key].value
            elif inner and (touched or (field.is_required() and not inherits)):
                # A required group is opened even when nothing is given, so that its own missing settings are named.
                default = _default(base or group or self.model, name)
                data[name] = self.assemble(inner, key + ".", default if isinstance(default, BaseModel) else None)
            elif inherits:
                data[name] = getattr(base, name)
        return data

    def _inherited(self, prefix: str, base: Any) -> set[str]:
        """The fields that a default instance sets, unless what they belong to is given another value."""
        if base is None:
            return set()
        selector = getattr(base, "selector", "")
        chosen = self.given.get(prefix + selector) if selector else None
        return set() if chosen and chosen.value != getattr(base, selector) else set(base.model_fields_set)


def _default(holder: Any, name: str) -> Any:
    """The value of a field where nobody sets it: from a default instance, or from the field of a class."""
    if isinstance(holder, BaseModel):
        return getattr(holder, name)
    if not (isinstance(holder, type) and issubclass(holder, BaseModel)):
        return None
    field = holder.model_fields[name]
    default = field.get_default(call_default_factory=True, validated_data={})
    group = [
        kind for kind in alternatives_of(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    return group[0] if group and not isinstance(default, BaseModel) else default


def _spread(node: yaml.Node, slots: Mapping[str, Slot], prefix: str = "") -> Iterator[tuple[str, yaml.Node, int]]:
    """The leaves of a tree of settings as (dotted key, node, line); a mapping under an unknown key stays whole."""
    for word, item in node.value:
        key = prefix + read_word(word)
        slot = slots.get(key)
        if slot and slot.group and isinstance(item, yaml.MappingNode):
            yield from _spread(item, slots, key + ".")
        else:
            yield _spelled_out(key, item, slots), item, word.start_mark.line + 1


def _spelled_out(key: str, node: yaml.Node, slots: Mapping[str, Slot]) -> str:
    """The key that a value is for, where one word stands for a whole group (`Spec.shorthand`)."""
    slot = slots.get(key)
    word: str = getattr(slot.group, "shorthand", "") if slot else ""
    return f"{key}.{word}" if word and isinstance(node, yaml.ScalarNode) and node.tag != TAG + "null" else key


def _override_node(text: str, slot: Slot | None) -> yaml.Node:
    """The value of an override as a node: raw text where the setting holds text, YAML elsewhere."""
    alternatives = slot.alternatives if slot else (Any,)
    raw = yaml.ScalarNode(TAG + "str", text)
    texty = any(isinstance(kind, type) and issubclass(kind, (str, PurePath)) for kind in alternatives)
    if texty and len(alternatives) == 1:
        return raw
    try:
        node = yaml.compose(text, Loader=Loader) or yaml.ScalarNode(TAG + "null", "")
    except (yaml.YAMLError, RecursionError):
        return raw
    # `prompt=a #b` and `prompt=[INST]` are words to a setting that holds text; a quoted "null" stays the word null.
    holds_more = any(get_origin(kind) not in (None, Literal) for kind in alternatives)
    plain_word = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag == TAG + "str"
    return raw if texty and (plain_word or not (holds_more or isinstance(node, yaml.ScalarNode))) else node


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _twice(key: str, source: str, first: int, second: int) -> str:
    return f"{key}: given twice (from {source}, lines {first} and {second})"


def _nearest(key: str, slots: Mapping[str, Slot]) -> str:
    """The end of "unknown setting": equal leaves and a close key, else close leaves, else the choice."""
    last = key.rpartition(".")[2]
    leaves = [known for known, slot in slots.items() if slot.group is None]
    same = [known for known in leaves if known.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, slots, n=1, cutoff=0.75)
    names = difflib.get_close_matches(last, {known.rpartition(".")[2] for known in leaves}, n=1, cutoff=0.7)
    near = list(dict.fromkeys(same + close)) or [known for known in leaves if known.rpartition(".")[2] in names]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    group = next((parent for parent in _parents(key) if parent in slots), "")
    beside = [known for known in slots if known.rpartition(".")[0] == group]
    return f"; {group or 'the settings'} may hold {', '.join(beside)}" if beside else ""
