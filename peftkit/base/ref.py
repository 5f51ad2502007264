"""A base by reference: which frozen weights are meant, and the folder that holds them on this machine."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from peftkit.base import embedded
from peftkit.config import Spec
from peftkit.errors import BaseError

Kind = Literal["embedded", "hub", "folder", "gguf"]

_EXPECTED = "a folder, a .gguf file, a Hub id (owner/name) or embedded:smollm2-135m"

# What `locate` downloads from the Hub: weights as safetensors, and the small text files (README.md states the licence).
# Pickles stay there.
_TEXTS = ["*.json", "README.md", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
HUB_FILES = [*_TEXTS, "*.safetensors"]


class BaseSpec(Spec):
    """Which base to start from."""

    shorthand: ClassVar[str] = "source"

    source: str = "embedded:smollm2-135m"
    """Hub id (`Qwen/Qwen3-4B`), folder, GGUF file, or `embedded:smollm2-135m`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id."""


@dataclass(frozen=True)
class BaseRef:
    """A parsed reference to a base; nothing has been read or downloaded yet."""

    source: str
    kind: Kind
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source


def parse(spec: BaseSpec) -> BaseRef:
    """Tell what kind of reference `spec.source` is.

    Raises BaseError for an unknown embedded name, a missing path, or a revision where none can apply.
    """
    source, revision = spec.source, spec.revision
    kind = _kind_of(source)
    if revision and kind != "hub":
        raise BaseError(
            f"base.revision={revision!r} was given for {source!r}, which is not a Hub id",
            expected="a revision only together with a Hub id such as Qwen/Qwen3-4B",
            hint="remove base.revision",
        )
    return BaseRef(source, kind, revision)


def _kind_of(source: str) -> Kind:
    try:
        return _recognise(source)
    except (OSError, RuntimeError, ValueError) as error:  # a path too long, ~nobody, a NUL byte
        raise BaseError(f"{source[:60]!r} cannot be a base: {error}", expected=_EXPECTED) from None


def _recognise(source: str) -> Kind:
    if not source.strip():
        raise BaseError("the base is empty", expected=_EXPECTED)
    if source.startswith("embedded:"):
        name = source.removeprefix("embedded:")
        if name not in embedded.EMBEDDED:
            raise BaseError(
                f"there is no embedded base {name!r}",
                expected="one of " + ", ".join(f"embedded:{known}" for known in embedded.EMBEDDED),
            )
        return "embedded"
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if path.is_dir():
        return "folder"
    if path.exists():
        raise BaseError(f"{source} is a file, and not a GGUF", expected="a folder with config.json, or a .gguf file")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".gguf")
    if looks_local:
        known = [f"embedded:{name}" for name in embedded.EMBEDDED]
        near = difflib.get_close_matches(source, known, n=1, cutoff=0.4)
        raise BaseError(
            f"{source!r} does not exist on this machine",
            expected="a folder, a .gguf file, a Hub id (owner/name) or " + ", ".join(known),
            hint=f"did you mean {near[0]}?" if near else None,
        )
    return "hub"


def snapshot(ref: BaseRef, weights: bool = True) -> Path:
    """The local folder of a Hub base: from the Hub's cache when it is whole, downloaded otherwise.

    Without `weights` it holds at least config and tokenizer: what a plan reads.

    Raises BaseError when the Hub cannot be reached or does not know the id.
    """
    from huggingface_hub import snapshot_download  # 0.3 s of start-up that `--help` does not need

    try:
        # Some uploads repeat the weights in other formats: consolidated.safetensors, original/, metal/.
        return Path(
            snapshot_download(
                ref.source,
                revision=ref.revision,
                allow_patterns=HUB_FILES if weights else _TEXTS,
                ignore_patterns=["consolidated*", "*/*"],
            )
        )
    except Exception as error:  # the Hub client raises a dozen unrelated types for "cannot be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(
            f"the base {ref} could not be fetched from the Hub: {reason}",
            expected="an existing Hub id, and a network or an already downloaded copy",
            hint="use a local folder (base=/path/to/model) or base=embedded:smollm2-135m",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a base's folder. Raises BaseError when it is missing or broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "adapter_config.json" if (folder / "adapter_config.json").exists() else None
        hint = "this is an adapter; give the base that its base_model_name_or_path names" if what else None
        raise BaseError(f"{folder} has no config.json", expected="a model folder", hint=hint) from None
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read: {error}", expected="a JSON file") from None
    if not isinstance(config, dict):
        raise BaseError(f"{path} holds {type(config).__name__}", expected="a JSON object")
    return config


def longest_sequence(config: dict[str, Any]) -> int | None:
    """How many tokens a base can read, from config.json; None when it does not say."""
    inner = config.get("text_config")
    for source in (config, inner if isinstance(inner, dict) else {}):
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
            value = source.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None


class LocatedBase(Spec):
    """A base whose files are on this machine."""

    source: str = Field(min_length=1)
    """The reference as the user wrote it."""
    kind: Kind
    revision: str | None
    """The commit that was resolved, for Hub bases."""
    folder: Path
    """Holds config.json, safetensors and the tokenizer."""

    @property
    def portable(self) -> str:
        """The source as an adapter may carry it: a path of this machine means nothing elsewhere, so only its name."""
        return Path(self.source).name if self.kind in ("folder", "gguf") else self.source

    @property
    def place(self) -> str:
        """The source as this machine finds it again from any folder."""
        return str(Path(self.source).expanduser().absolute()) if self.kind in ("folder", "gguf") else self.source


def located(ref: BaseRef, folder: Path) -> LocatedBase:
    """Bind a reference to its folder; a Hub snapshot folder is named after the resolved commit."""
    revision = folder.name if ref.kind == "hub" and len(folder.name) == 40 else ref.revision
    return LocatedBase(source=ref.source, kind=ref.kind, revision=revision, folder=folder)
