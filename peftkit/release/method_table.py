"""What each way to train can do, read off the tables that decide it and off one adapter of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from peftkit.deltas.reading.read import deltas_of
from peftkit.errors import DeltaError
from peftkit.registry.manifest import Version
from peftkit.release.export.capabilities import check, features_of
from peftkit.release.export.capability_table import Engine
from peftkit.tuning.methods import METHODS, MethodName
from peftkit.tuning.stored import read

COLUMNS = ("method", "settings", "rate", "bits", "merges", "vLLM", "GGUF")
_ENGINES: tuple[Engine, ...] = ("vllm", "gguf")


def rows(examples: Mapping[MethodName, tuple[Version, Path]]) -> Iterator[tuple[str, ...]]:
    """A row of `COLUMNS` for every method; `examples` are an adapter of each, and the folder of its base.

    Bits are those of the bases that it trains over, and that it attaches to.
    """
    for name, method in METHODS.items():
        version, base = examples[name]
        settings = ", ".join(_setting(key, value) for key, value in method.fields.items())
        bits = ", ".join(map(str, method.bits))
        yield (f"`{name}`", settings, f"{method.learning_rate:g}", bits, *_what_it_can(name, version, base))


def as_markdown(examples: Mapping[MethodName, tuple[Version, Path]]) -> str:
    """The table as it stands in docs/guide/methods.md."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows(examples)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _what_it_can(name: MethodName, version: Version, base: Path) -> Iterator[str]:
    """Whether it merges, and what each engine makes of its canonical export."""
    stored = read(version)
    try:
        deltas = deltas_of(stored, base)
    except DeltaError:
        yield from ("no", *("no" for _ in _ENGINES))
        return
    yield "onto dequantized" if name == "loftq" else "yes"
    features = features_of(deltas, stored.config, repaired=name == "loftq")
    for engine in _ENGINES:
        yield "merged" if any(finding.blocking for finding in check(engine, features)) else "yes"


def _setting(key: str, value: object) -> str:
    """A setting with its default, where that says something: not for "all" and for what has to be given."""
    if value is None or value in ([], "all", "all-linear", "auto"):
        return key
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
