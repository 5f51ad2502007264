"""A config.json with the spellings that model types use for one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.errors import BaseError
from peftkit.planning.families import Switch


class Keys:
    """Values of a config.json, or of its text_config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("text_config")
        self._config = dict(config)
        if isinstance(inner, Mapping) and inner:  # a vision model says beside its text_config whether the head is tied
            tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
            self._config = {**inner, "tie_word_embeddings": tied}
        self.model_type = str(self._config.get("model_type", config.get("model_type", "none")))

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is there and not null."""
        return next((self._config[name] for name in names if self._config.get(name) is not None), default)

    def count(self, *names: str, default: int | None = None) -> int:
        """A positive whole number. Raises BaseError when it is missing or something else."""
        value = self.get(*names, default=default)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        fact = f"config.json has no {names[0]}" if value is None else f"config.json has {names[0]}={value!r}"
        raise BaseError(fact, expected="a positive whole number under " + " or ".join(names))

    def switch(self, switch: Switch) -> bool:
        """Whether a switch of the family is on in this config."""
        if isinstance(switch, bool):
            return switch
        key, absent = switch
        return bool(self.get(key, default=absent))
