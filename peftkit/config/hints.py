"""Type hints of settings: which settings there are, and what each may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def alternatives_of(hint: Any) -> tuple[Any, ...]:
    """The members of a type hint, with unions and Annotated taken apart."""
    if get_origin(hint) is Annotated:
        return alternatives_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in alternatives_of(part))
    return (hint,)


def inner_hints(alternatives: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """The alternatives of what stands inside a list, or under `key` in a mapping."""
    found: list[Any] = []
    for kind in alternatives:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [kind.model_fields[key].annotation] if key in kind.model_fields else []
        elif get_origin(kind) is not Literal:
            args = [arg for arg in get_args(kind) if arg is not Ellipsis]
            found += args[1:] if is_mapping(kind) else args
    return tuple(kind for hint in found for kind in alternatives_of(hint)) or (Any,)


def is_mapping(kind: Any) -> bool:
    """Whether a member of a type hint is a dict or the like."""
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value already is what a member of a type hint wants."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(type(value) is type(member.value) and value == member.value for member in kind)
    known = kind not in (Any, object) and (isinstance(kind, type) or get_origin(kind) is not None)
    return not known or type(value) is kind or (kind is float and type(value) is int)


def takes_text(kind: Any, text: str) -> bool:
    """Whether a member of a type hint would take this text."""
    if get_origin(kind) is Literal:
        return text in get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return any(text == member.value for member in kind)
    return isinstance(kind, type) and issubclass(kind, (str, PurePath))


@dataclass(frozen=True)
class Slot:
    """One valid key: a leaf, or a group of settings when `group` is set."""

    field: FieldInfo
    group: type[BaseModel] | None

    @property
    def alternatives(self) -> tuple[Any, ...]:
        return alternatives_of(self.field.annotation)


def find_slots(model: type[BaseModel], prefix: str = "") -> dict[str, Slot]:
    """Every valid key of a model, in field order; raises TypeError where one setting could be two groups."""
    slots: dict[str, Slot] = {}
    for name, field in model.model_fields.items():
        kinds = alternatives_of(field.annotation)
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(groups) > 1:
            raise TypeError(f"{model.__name__}.{name} may be several groups of settings; a setting holds one group")
        slots[prefix + name] = Slot(field, groups[0] if groups else None)
        if groups:
            slots.update(find_slots(groups[0], f"{prefix}{name}."))
    return slots
