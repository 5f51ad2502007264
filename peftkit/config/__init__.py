"""Settings: strict frozen groups, read from presets, YAML files and `key=value` overrides, each value with its source.

    resolved = resolve(Config, presets=PRESETS, preset="cpu", files=[Path("my.yaml")], overrides=["train.seed=1"])

Precedence: default < preset < files in order < overrides in order. A dict setting is one leaf: a later source replaces
it whole, while a key below it (`columns.prompt=question`) changes one item. Every problem of every source is collected
before ConfigError is raised.
"""

from peftkit.config.resolved import Resolved, resolve
from peftkit.config.scalars import dump_yaml
from peftkit.config.spec import Spec, json_schema

__all__ = ["Resolved", "Spec", "dump_yaml", "json_schema", "resolve"]
