"""What a base is, by content: one digest per part, so that a mismatch can say which part differs.

Weights are hashed tensor by tensor from the safetensors files (name, dtype, shape, bytes), so a sharded and a
single-file copy of the same model agree. Digests are cached by path, inode, size and modification time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit.atomic import replace_file
from peftkit.base.raw import json_file, pieces, tensors, weight_files
from peftkit.base.record import BaseRecord, TensorDigest, explain, plain, tensors_of
from peftkit.base.ref import read_config
from peftkit.canonical import canonical_json, digest_json, strict_json
from peftkit.errors import BaseError

__all__ = [
    "BaseIdentity",
    "chat_template",
    "fitting_revisions",
    "identify",
    "license_of",
    "tensors",
    "weight_files",
]

# Fields that a loader or an upload tool writes and that change nothing about the model.
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_VOLATILE_CONFIG |= {"_attn_implementation"}
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")
_FRONT_MATTER = 1 << 16


@dataclass(frozen=True)
class BaseIdentity:
    """A base's record, and the SHA-256 digests of its parts."""

    record: BaseRecord

    @property
    def id(self) -> str:
        """The id of the record: 16 hex digits."""
        return self.record.id

    @property
    def weights(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor."""
        return self.record.parts()["weights"]

    @property
    def config(self) -> str:
        """SHA-256 of the configuration."""
        return self.record.parts()["config"]

    @property
    def tokenizer(self) -> str:
        """SHA-256 of what turns text into ids."""
        return self.record.parts()["tokenizer"]

    @property
    def special_tokens(self) -> str:
        """SHA-256 of the special tokens."""
        return self.record.parts()["special_tokens"]

    @property
    def chat_template(self) -> str:
        """SHA-256 of the chat template."""
        return self.record.parts()["chat_template"]

    @property
    def fingerprint(self) -> str:
        """One digest of weights and config: what an adapter's numbers depend on."""
        return self.record.fingerprint

    def parts(self) -> dict[str, str]:
        """Digest by part name."""
        return self.record.parts()

    def differences(self, parts: Mapping[str, str]) -> list[str]:
        """Names of the parts in which this base differs from recorded `parts`."""
        return _differing(self.parts(), parts)

    def explain(self, recorded: BaseRecord) -> list[str]:
        """Sentences that say in what this base differs from a recorded one, the most important first."""
        return explain(recorded, self.record)


def identify(folder: Path, cache: Path | None = None) -> BaseIdentity:
    """Read a base's folder once and digest its parts. Raises BaseError for missing or malformed files."""
    identity = BaseIdentity(_with_weights(_texts(folder), folder, cache))
    try:
        identity.parts()
    except ValueError as error:
        raise BaseError(f"a tensor name in {folder} cannot be used: {error}", hint="fetch the base again") from None
    return identity


def _texts(folder: Path) -> BaseRecord:
    """The record without its tensors: what is cheap to read."""
    try:
        config = {key: value for key, value in read_config(folder).items() if key not in _VOLATILE_CONFIG}
        settings = json_file(folder / "tokenizer_config.json")
        special = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
        record = BaseRecord(
            _spelled(config), _tokenizer_digest(folder), _spelled(special), _spelled(chat_template(folder)), tensors={}
        )
        record.parts()
    except RecursionError:
        raise BaseError(f"a JSON file in {folder} is nested too deeply", hint="fetch the base again") from None
    return record


def _with_weights(texts: BaseRecord, folder: Path, cache: Path | None) -> BaseRecord:
    found: dict[str, TensorDigest] = {}
    for path in weight_files(folder):
        digests = _file_digests(path, cache)
        twice = sorted(found.keys() & digests.keys())
        if twice:
            raise BaseError(
                f"the tensor {plain(twice[0])} stands twice in {folder}, the second time in {path.name}",
                expected="every tensor once",
                hint="remove the surplus files, or add the model.safetensors.index.json that names the right ones",
            )
        found |= digests
    return BaseRecord(texts.config, texts.tokenizer, texts.special_tokens, texts.chat_template, found)


def chat_template(folder: Path) -> str | None:
    """The chat template that the base's folder ships, None when it has none; several of them as one JSON text."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BaseError(f"{file} cannot be read: {error}", expected="a text in UTF-8") from None
    template = json_file(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        return json.dumps(template, sort_keys=True)
    return template if isinstance(template, str) else None


def _file_digests(path: Path, cache: Path | None) -> dict[str, TensorDigest]:
    """Digest by tensor name of one file; from the cache when the file has not changed."""
    key = _file_key(path)
    entry = cache / "identity" / f"{key}.json" if cache else None
    known = _cached(entry) if entry else None
    if known is not None:
        return known
    found: dict[str, TensorDigest] = {}
    for name, dtype, shape, start, end in tensors(path):
        digest = hashlib.sha256()
        for piece in pieces(path, start, end):
            digest.update(piece)
        found[name] = TensorDigest(dtype, shape, digest.hexdigest())
    if entry and _file_key(path) == key:  # otherwise it was written to while it was read
        content = {name: tensor.as_json() for name, tensor in found.items()}
        write_note(entry, {"tensors": content, "sha256": digest_json(content)})
    return found


def _file_key(path: Path) -> str:
    stat = path.stat()
    known = f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}"
    return hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()


def _cached(entry: Path) -> dict[str, TensorDigest] | None:
    """Digests of an unchanged file; None when the entry is missing or damaged, since it can be made again."""
    try:
        noted = strict_json(entry.read_bytes())
        return tensors_of(noted["tensors"]) if noted["sha256"] == digest_json(noted["tensors"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_note(path: Path, content: Any) -> None:
    """Write what can be made again; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, canonical_json(content).decode("ascii"))


def fitting_revisions(parts: Mapping[str, str], source: str, cache: Path | None = None) -> list[str]:
    """Commits of the Hub id `source` on this machine that equal all recorded `parts`, the newest download first.

    Looks into the Hub's cache without a network and never raises: a broken or partial snapshot is passed over.
    """
    from huggingface_hub import constants  # start-up time that `--help` does not need

    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", source) or "weights" not in parts:
        return []
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots"
    found = []
    with contextlib.suppress(OSError):
        found = [(folder.stat().st_mtime_ns, folder) for folder in snapshots.iterdir() if folder.is_dir()]
    return [folder.name for _, folder in sorted(found, reverse=True) if _fits(folder, parts, cache)]


def _fits(folder: Path, parts: Mapping[str, str], cache: Path | None) -> bool:
    """Whether a folder equals the recorded parts; its weights are only read when the small files already do."""
    with contextlib.suppress(BaseError, OSError, ValueError):
        texts = _texts(folder)
        small = {name: digest for name, digest in parts.items() if name != "weights"}
        return not _differing(texts.parts(), small) and not _differing(
            _with_weights(texts, folder, cache).parts(), parts
        )
    return False


def license_of(folder: Path) -> str | None:
    """The licence that the front matter of a base's README.md states, None when it states none.

    Source: https://huggingface.co/docs/hub/model-cards (`license`, and `license_name`, `license_link` with `other`).
    """
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            front = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", file.read(_FRONT_MATTER), re.DOTALL)
        card = yaml.load(front[1], Loader=yaml.BaseLoader) if front else None  # BaseLoader: every scalar is a text
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(card, dict):
        return None
    stated = card.get("license")
    names = [name for name in (stated if isinstance(stated, list) else [stated]) if isinstance(name, str)]
    text = ", ".join(name.strip() for name in names if name.strip())
    more = [card.get(key) for key in ("license_name", "license_link")] if text == "other" else []
    stated_more = ", ".join(item.strip() for item in more if isinstance(item, str) and item.strip())
    return plain(f"{text} ({stated_more})" if stated_more else text) or None


def _tokenizer_digest(folder: Path) -> str:
    """Digest of what turns text into ids: tokenizer.json parsed, or the raw vocabulary files of older bases."""
    file = folder / "tokenizer.json"
    if file.exists():
        content = json_file(file)
        content.pop("padding", None)  # run-time state that a tokenizer writes back when it is saved
        content.pop("truncation", None)
        return digest_json(_spelled(content))
    names = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
    present = [folder / name for name in names if (folder / name).exists()]
    return digest_json([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in present])


def _spelled(value: Any) -> Any:
    """JSON that has one spelling: some configs hold NaN, infinity, or half a character, which UTF-8 has no bytes for.

    transformers' own spelling of the first two is {"__float__": "Infinity"}; the last gets a backslash.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {_spelled(key): _spelled(item) for key, item in value.items()}
    return [_spelled(item) for item in value] if isinstance(value, list) else value


def _differing(parts: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    return [name for name, digest in parts.items() if name in recorded and recorded[name] != digest]
