"""What a base is, by content: one digest per part, so that a mismatch can say which part differs.

Weights are hashed tensor by tensor from the safetensors files (name, dtype, shape, bytes), so a sharded and a
single-file copy of the same model agree. Digests are cached by inode, size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.base.ref import read_config
from peftkit.errors import BaseError

# Fields that a loader or an upload tool writes and that change nothing about the model.
_VOLATILE_CONFIG = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation",
}
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class BaseIdentity:
    """SHA-256 digests of a base's parts."""

    weights: str
    config: str
    tokenizer: str
    special_tokens: str
    chat_template: str

    @property
    def fingerprint(self) -> str:
        """One digest of weights and config: what an adapter's numbers depend on."""
        return hashlib.sha256(f"{self.weights}{self.config}".encode()).hexdigest()

    def parts(self) -> dict[str, str]:
        """Digest by part name."""
        return asdict(self)

    def differences(self, parts: dict[str, str]) -> list[str]:
        """Names of the parts in which this base differs from recorded `parts`."""
        return [name for name, digest in self.parts().items() if name in parts and parts[name] != digest]


def identify(folder: Path, cache: Path | None = None) -> BaseIdentity:
    """Read a base's folder once and digest its parts. Raises BaseError for missing or malformed files."""
    config = {key: value for key, value in read_config(folder).items() if key not in _VOLATILE_CONFIG}
    settings = _json_file(folder / "tokenizer_config.json")
    return BaseIdentity(
        weights=_weights_digest(folder, cache),
        config=_digest(config),
        tokenizer=_tokenizer_digest(folder),
        special_tokens=_digest({name: settings.get(name) for name in _SPECIAL}),
        chat_template=_digest(chat_template(folder)),
    )


def chat_template(folder: Path) -> str | None:
    """The chat template that the base's folder ships, None when it has none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _json_file(folder / "tokenizer_config.json").get("chat_template")
    return json.dumps(template, sort_keys=True) if isinstance(template, list) else template


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, in name order. Raises BaseError when there are none (pickles are refused)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed(index)
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if files:
        return files
    pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise BaseError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened",
            expected="weights as safetensors",
            hint="convert them in a sandbox with transformers: save_pretrained(..., safe_serialization=True)",
        )
    raise BaseError(f"{folder} holds no weights", expected="at least one .safetensors file")


def _indexed(index: Path) -> list[Path]:
    """The files that the index names and transformers loads; nothing outside the folder."""
    names = sorted({str(name) for name in dict(_json_file(index).get("weight_map") or {}).values()})
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if outside or missing or not names:
        raise BaseError(
            f"{index} names {(outside or missing or ['no file'])[0]}, which is not in this folder",
            expected="safetensors files beside the index",
            hint="fetch the base again",
        )
    return [index.parent / name for name in names]


def tensors(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yield (name, dtype, shape, start, end) of every tensor of a safetensors file; start and end are file offsets.

    Raises BaseError when the header is malformed (format: https://github.com/huggingface/safetensors#format).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= min(size, 100_000_000) else None
            entries = {name: info for name, info in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
            for name in sorted(entries):
                info = entries[name]
                start, end = (int(offset) + 8 + length for offset in info["data_offsets"])
                if not 8 + length <= start <= end <= size:
                    raise ValueError(f"tensor {name!r} lies outside the file")
                yield name, str(info["dtype"]), tuple(info["shape"]), start, end
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BaseError(f"{path} is not a whole safetensors file: {error}", hint="fetch it again") from None


def _weights_digest(folder: Path, cache: Path | None) -> str:
    lines: list[str] = []
    for path in weight_files(folder):
        lines += _file_lines(path, cache)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _file_lines(path: Path, cache: Path | None) -> list[str]:
    """One line per tensor: name, dtype, shape, SHA-256; from the cache when the file has not changed."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    entry = cache / "identity" / f"{key}.json" if cache else None
    if entry and entry.exists():
        cached = _cached(entry)
        if cached is not None:
            return cached
    lines = []
    with path.open("rb") as file:
        for name, dtype, shape, start, end in tensors(path):
            digest = hashlib.sha256()
            file.seek(start)
            remaining = end - start
            while remaining:
                chunk = file.read(min(_CHUNK, remaining))
                if not chunk:
                    raise BaseError(f"{path} became shorter while it was read", hint="fetch it again")
                digest.update(chunk)
                remaining -= len(chunk)
            lines.append(f"{name} {dtype} {list(shape)} {digest.hexdigest()}")
    if entry:
        entry.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two processes may identify the same base at the same time.
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False, encoding="utf-8") as scratch:
            json.dump({"lines": lines}, scratch)
        Path(scratch.name).replace(entry)
    return lines


def _cached(entry: Path) -> list[str] | None:
    """Digests of an unchanged file; None when the entry is damaged, since it can be made again."""
    try:
        lines = json.loads(entry.read_text(encoding="utf-8"))["lines"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return lines if isinstance(lines, list) and all(isinstance(line, str) for line in lines) else None


def _tokenizer_digest(folder: Path) -> str:
    """Digest of what turns text into ids: tokenizer.json parsed, or the raw vocabulary files of older bases."""
    file = folder / "tokenizer.json"
    if file.exists():
        content = _json_file(file)
        content.pop("padding", None)  # run-time state that a tokenizer writes back when it is saved
        content.pop("truncation", None)
        return _digest(content)
    names = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
    present = [folder / name for name in names if (folder / name).exists()]
    return _digest([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in present])


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read: {error}", expected="a JSON file") from None
    return content if isinstance(content, dict) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
