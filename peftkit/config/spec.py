"""The base of every group of settings, the leaves of one, and its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Base of every group of settings: frozen, strict about names, documented by the strings under its fields."""

    # NaN passes no comparison and has no canonical JSON, so a digest of it could not be trusted.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    shorthand: ClassVar[str] = ""
    """The field that one word given for the whole group sets: with "source", `base=X` means `base.source=X`."""
    selector: ClassVar[str] = ""
    """The field that the group's other defaults belong to: when it is given another value, they are left out."""


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that is not a group, as (dotted key, value), in field order."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a settings file, for editors."""
    schema = model.model_json_schema()
    # A file may leave required settings to a preset or the command line, so an editor must not ask for them.
    for part in [schema, *schema.get("$defs", {}).values()]:
        part.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
