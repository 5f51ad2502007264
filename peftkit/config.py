"""Settings: strict frozen groups, read from presets, YAML files and `key=value` overrides, each value with its source.

    resolved = resolve(Config, presets=PRESETS, preset="cpu", files=[Path("my.yaml")], overrides=["train.seed=1"])

Precedence: default < preset < files in order < overrides in order. A dict setting is one leaf: a later source replaces
it whole, while a key below it (`columns.prompt=question`) changes one item. Every problem of every source is collected
before ConfigError is raised.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from types import UnionType
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from peftkit.errors import ConfigError


class Spec(BaseModel):
    """Base of every group of settings: frozen, strict about names, documented by the strings under its fields."""

    # NaN passes no comparison and has no canonical JSON, so a digest of it could not be trusted.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    shorthand: ClassVar[str] = ""
    """The field that one word given for the whole group sets: with "source", `base=X` means `base.source=X`."""


T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A validated configuration, and for each leaf the source that set it."""

    config: T
    sources: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """Every leaf as (dotted key, value, source), in field order."""
        return [(key, value, self.sources[key]) for key, value in _leaves(self.config)]

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `dump_yaml` of it resolves to an equal configuration."""
        return self.config.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no spaces, UTF-8)."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def resolve(
    model: type[T],
    *,
    presets: Mapping[str, Mapping[str, Any]] = {},
    preset: str | None = None,
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
) -> Resolved[T]:
    """Merge all sources of settings and validate them; raises ConfigError with every problem at once."""
    merge = _Merge(model)
    if preset is not None:
        merge.add_preset(preset, presets)
    for path in files:
        merge.add_file(Path(path))
    for text in overrides:
        merge.add_override(text)
    problems = merge.problems
    try:
        config = model.model_validate(merge.assemble())
    except ValidationError as error:
        problems = problems + _explain(error, merge)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    sources = {key: merge.given[key].source if key in merge.given else "default" for key, _ in _leaves(config)}
    return Resolved(config, sources)


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a settings file, for editors."""
    schema = model.model_json_schema()
    # A file may leave required settings to a preset or the command line, so an editor must not ask for them.
    for part in [schema, *schema.get("$defs", {}).values()]:
        part.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that `resolve` (and YAML 1.1 readers) read back as the same values, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# -- YAML, 1.2 core scalars: `1e-5` is a number, `no` is a word, `2024-01-01` and `1:30` stay text

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _SCALARS.items():
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, None)
# PyYAML writes these line ends raw between quotes and reads them back as a space or a newline.
_ODD_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TAG + "str", text, '"' if _ODD_LINE_ENDS.search(text) else None)
)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))
_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def _typed(tag: str, text: str) -> Any:
    """The value of a plain scalar; raises ValueError for a tag that is not one of the core scalars."""
    match tag.removeprefix(_TAG):
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


def _value(node: yaml.Node, alternatives: tuple[Any, ...]) -> Any:
    """A YAML node as plain values, its scalars read the way the type hint wants; raises ValueError on odd tags."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, alternatives)
    if node.tag not in (_TAG + "map", _TAG + "seq"):
        raise ValueError(f"the YAML tag {node.tag} is not supported")
    if isinstance(node, yaml.MappingNode):
        return {_word(key): _value(item, _inner(alternatives, _word(key))) for key, item in node.value}
    return [_value(item, _inner(alternatives, "")) for item in node.value]


def _scalar(node: yaml.ScalarNode, alternatives: tuple[Any, ...]) -> Any:
    """A scalar; what YAML calls a number, a truth value or null stays text where only text is wanted."""
    text = str(node.value)
    if node.tag == _TAG + "str":
        return text
    value = _typed(node.tag, text)
    if not text or any(_fits(value, kind) for kind in alternatives):
        return value
    # pydantic takes true for 1; as text it is refused wherever no truth value is wanted.
    keep_text = isinstance(value, bool) or any(_takes_text(kind, text) for kind in alternatives)
    return text if keep_text else value


def _word(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("a name of a setting must be a word, not a list or a mapping")
    return str(node.value)


def _repeats(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Keys that stand twice in one mapping, with their line numbers."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeats(item, f"{prefix}{index}.")
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, item in node.value:
            word, line = _word(key), key.start_mark.line + 1
            if word in lines:
                yield prefix + word, lines[word], line
            lines.setdefault(word, line)
            yield from _repeats(item, f"{prefix}{word}.")


# -- type hints: which settings there are, and what each may hold


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a type hint, with unions and Annotated taken apart."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _alternatives(part))
    return (hint,)


def _inner(alternatives: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """The alternatives of what stands inside a list, or under `key` in a mapping."""
    found: list[Any] = []
    for kind in alternatives:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [kind.model_fields[key].annotation] if key in kind.model_fields else []
        elif get_origin(kind) is not Literal:
            args = [arg for arg in get_args(kind) if arg is not Ellipsis]
            found += args[1:] if _is_mapping(kind) else args
    return tuple(kind for hint in found for kind in _alternatives(hint)) or (Any,)


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(type(value) is type(member.value) and value == member.value for member in kind)
    known = kind not in (Any, object) and (isinstance(kind, type) or get_origin(kind) is not None)
    return not known or type(value) is kind or (kind is float and type(value) is int)


def _takes_text(kind: Any, text: str) -> bool:
    if get_origin(kind) is Literal:
        return text in get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(text == member.value for member in kind)
    return isinstance(kind, type) and issubclass(kind, (str, PurePath))


@dataclass(frozen=True)
class _Slot:
    """One valid key: a leaf, or a group of settings when `group` is set."""

    field: FieldInfo
    group: type[BaseModel] | None

    @property
    def alternatives(self) -> tuple[Any, ...]:
        return _alternatives(self.field.annotation)


def _slots(model: type[BaseModel], prefix: str = "") -> dict[str, _Slot]:
    """Every valid key of a model, in field order; raises TypeError where one setting could be two groups."""
    slots: dict[str, _Slot] = {}
    for name, field in model.model_fields.items():
        kinds = _alternatives(field.annotation)
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(groups) > 1:
            raise TypeError(f"{model.__name__}.{name} may be several groups of settings; a setting holds one group")
        slots[prefix + name] = _Slot(field, groups[0] if groups else None)
        if groups:
            slots.update(_slots(groups[0], f"{prefix}{name}."))
    return slots


def _leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# -- merging


@dataclass(frozen=True)
class _Given:
    """A value somebody gave, with where: "file my.yaml", and its line."""

    value: Any
    source: str
    line: int | None = None

    @property
    def where(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


class _Merge:
    """Collects what the sources give, key by key, and every problem on the way."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model
        self.slots = _slots(model)
        self.given: dict[str, _Given] = {}
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
        node = yaml.compose(dump_yaml(dict(presets[name])), Loader=_Loader)
        if isinstance(node, yaml.MappingNode):
            self._add_tree(node, f"preset {name}", numbered=False)

    def add_file(self, path: Path) -> None:
        source = f"file {path}"
        try:
            node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                return
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("must hold lines of `key: value`")
            for key, first, second in _repeats(node):
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
        self._put(full, node if full == key else _override_node(value, self.slots[full]), _Given(None, "command line"))

    def _add_tree(self, node: yaml.Node, source: str, *, numbered: bool) -> None:
        seen: dict[str, int] = {}
        for key, item, line in _spread(node, self.slots):
            # `train.r` may stand nested and dotted in one file; neither is the later one.
            if key in seen:
                self.problems.append(_twice(key, source, seen[key], line))
            seen[key] = line
            self._put(key, item, _Given(None, source, line if numbered else None))

    def _put(self, key: str, node: yaml.Node, given: _Given) -> None:
        slot = self.slots.get(key)
        owner = key if slot else next((k for k in _parents(key) if k in self.slots), None)
        if owner is None or (slot is None and not any(map(_is_mapping, self.slots[owner].alternatives))):
            self.problems.append(f"{key}: unknown setting{_nearest(key, self.slots)} (from {given.where})")
            return
        if slot and slot.group and isinstance(node, yaml.MappingNode):
            for inner, item, _ in _spread(node, self.slots, key + "."):
                self._put(inner, item, given)
            return
        alternatives = self.slots[owner].alternatives
        try:
            value = _value(node, _inner(alternatives, key) if slot is None else alternatives)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{key}: {error} (from {given.where})")
            return
        if slot is None:
            value = {**self._mapping(owner), key.removeprefix(owner + "."): value}
        for other in [*_parents(owner), *(k for k in self.given if k.startswith(owner + "."))]:
            self.given.pop(other, None)
        self.given[owner] = _Given(value, given.source, given.line)

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
        for name, field in (group or self.model).model_fields.items():
            key, inherits = prefix + name, base is not None and name in base.model_fields_set
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


def _default(holder: Any, name: str) -> Any:
    """The value of a field where nobody sets it: from a default instance, or from the field of a class."""
    if isinstance(holder, BaseModel):
        return getattr(holder, name)
    if not (isinstance(holder, type) and issubclass(holder, BaseModel)):
        return None
    field = holder.model_fields[name]
    default = field.get_default(call_default_factory=True, validated_data={})
    group = [kind for kind in _alternatives(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return group[0] if group and not isinstance(default, BaseModel) else default


def _spread(node: yaml.Node, slots: Mapping[str, _Slot], prefix: str = "") -> Iterator[tuple[str, yaml.Node, int]]:
    """The leaves of a tree of settings as (dotted key, node, line); a mapping under an unknown key stays whole."""
    for word, item in node.value:
        key = prefix + _word(word)
        slot = slots.get(key)
        if slot and slot.group and isinstance(item, yaml.MappingNode):
            yield from _spread(item, slots, key + ".")
        else:
            yield _spelled_out(key, item, slots), item, word.start_mark.line + 1


def _spelled_out(key: str, node: yaml.Node, slots: Mapping[str, _Slot]) -> str:
    """The key that a value is for, where one word stands for a whole group (`Spec.shorthand`)."""
    slot = slots.get(key)
    word: str = getattr(slot.group, "shorthand", "") if slot else ""
    return f"{key}.{word}" if word and isinstance(node, yaml.ScalarNode) and node.tag != _TAG + "null" else key


def _override_node(text: str, slot: _Slot | None) -> yaml.Node:
    """The value of an override as a node: raw text where the setting holds text, YAML elsewhere."""
    alternatives = slot.alternatives if slot else (Any,)
    raw = yaml.ScalarNode(_TAG + "str", text)
    texty = any(isinstance(kind, type) and issubclass(kind, (str, PurePath)) for kind in alternatives)
    if texty and len(alternatives) == 1:
        return raw
    try:
        node = yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(_TAG + "null", "")
    except (yaml.YAMLError, RecursionError):
        return raw
    # `prompt=a #b` and `prompt=[INST]` are words to a setting that holds text; a quoted "null" stays the word null.
    holds_more = any(get_origin(kind) not in (None, Literal) for kind in alternatives)
    plain_word = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag == _TAG + "str"
    return raw if texty and (plain_word or not (holds_more or isinstance(node, yaml.ScalarNode))) else node


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


# -- problems in plain words


def _twice(key: str, source: str, first: int, second: int) -> str:
    return f"{key}: given twice (from {source}, lines {first} and {second})"


def _nearest(key: str, slots: Mapping[str, _Slot]) -> str:
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


def _explain(error: ValidationError, merge: _Merge) -> list[str]:
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


def _locate(detail: Any, merge: _Merge) -> tuple[str, str]:
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


def _sentences(key: str, item: str, details: list[Any], merge: _Merge) -> Iterator[str]:
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


def _bounds(slot: _Slot) -> list[str]:
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
