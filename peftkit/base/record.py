"""Everything that identifies a base by content, as one small JSON text; comparing two of them says what differs.

A record holds the configuration, the special tokens and the chat template as they are, and the digests of the
tokenizer and of every tensor. It can be kept beside an adapter, so that a mismatch names the tensor, not the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from peftkit.canonical import canonical_json, digest_json, strict_json
from peftkit.errors import BaseError

FORMAT = "peftkit/1"
PARTS = ("weights", "config", "tokenizer", "special_tokens", "chat_template")
_FIELDS = {"format", "config", "tokenizer", "special_tokens", "chat_template", "tensors"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAMED = 3
_WIDTH = 40


class _Encoded(Protocol):
    def encode(self) -> bytes: ...


T = TypeVar("T", bound=_Encoded)


@dataclass(frozen=True)
class TensorDigest:
    """One tensor by content: its dtype as safetensors spells it, its shape, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """The entry of a record."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


@dataclass(frozen=True, eq=False)
class BaseRecord:
    """A base by content; two records are equal when they encode to the same bytes."""

    config: dict[str, Any]
    """config.json without the fields that loaders and upload tools write."""
    tokenizer: str
    """SHA-256 of what turns text into ids."""
    special_tokens: dict[str, Any]
    chat_template: str | None
    tensors: dict[str, TensorDigest]

    def encode(self) -> bytes:
        """The one spelling of this record: canonical JSON and a line end."""
        return canonical_json(self._as_json()) + b"\n"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the encoded record, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def id(self) -> str:
        """The first 16 hex digits of `sha256`."""
        return self.sha256[:16]

    def parts(self) -> dict[str, str]:
        """SHA-256 by part name."""
        return dict(self._parts)

    @property
    def fingerprint(self) -> str:
        """One digest of configuration and weights: what an adapter's numbers depend on."""
        return digest_json({"config": self._parts["config"], "weights": self._parts["weights"]})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def __eq__(self, other: object) -> bool:
        # Not field by field: Python takes 1, 1.0 and True for the same value.
        return isinstance(other, BaseRecord) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @cached_property
    def _parts(self) -> dict[str, str]:
        return {
            "weights": digest_json({name: tensor.as_json() for name, tensor in self.tensors.items()}),
            "config": digest_json(self.config),
            "tokenizer": self.tokenizer,
            "special_tokens": digest_json(self.special_tokens),
            "chat_template": digest_json(self.chat_template),
        }

    def _as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": self.config,
            "tokenizer": self.tokenizer,
            "special_tokens": self.special_tokens,
            "chat_template": self.chat_template,
            "tensors": {name: tensor.as_json() for name, tensor in self.tensors.items()},
        }


def decode(data: bytes) -> BaseRecord:
    """Read an encoded record; BaseError says what is wrong with bytes that `encode` cannot have written."""
    return decode_as(_record_of, _FIELDS, data, "record of a base", again="identify the base again")


def decode_as(read: Callable[[dict[str, Any]], T], fields: set[str], data: bytes, what: str, *, again: str) -> T:
    """What `read` makes of the JSON object `data` with exactly `fields`; BaseError unless it encodes to these bytes."""
    try:
        raw = strict_json(data)
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if raw.get("format") != FORMAT:
            raise ValueError(f"its format is {raw.get('format')!r}")
        _check_fields(raw, fields)
        found = read(raw)
        if found.encode() != data:
            raise ValueError("its spelling is not the canonical one")
    except (ValueError, RecursionError) as error:
        raise BaseError(
            f"this is no {what}: {plain(str(error), 200)}",
            expected=f"the bytes that peftkit wrote, format {FORMAT}",
            hint=f"it is damaged or of another version: {again}",
        ) from None
    return found


def _record_of(raw: dict[str, Any]) -> BaseRecord:
    template = raw["chat_template"]
    if not isinstance(raw["config"], dict) or not isinstance(raw["special_tokens"], dict):
        raise ValueError("config and special_tokens must be objects")
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template must be a text or null")
    return BaseRecord(
        raw["config"], check_digest(raw["tokenizer"]), raw["special_tokens"], template, tensors_of(raw["tensors"])
    )


def tensors_of(raw: Any) -> dict[str, TensorDigest]:
    """The tensors of a record from plain JSON; raises ValueError for what is no list of tensors."""
    if not isinstance(raw, dict):
        raise ValueError("tensors must be an object")
    return {name: _tensor_of(name, entry) for name, entry in raw.items()}


def _tensor_of(name: str, entry: Any) -> TensorDigest:
    if not isinstance(entry, dict):
        raise ValueError(f"the tensor {name!r} is not an object")
    _check_fields(entry, {"dtype", "shape", "sha256"})
    shape = entry["shape"]
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"the tensor {name!r} has no dtype")
    if not isinstance(shape, list) or not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in shape):
        raise ValueError(f"the tensor {name!r} has a shape that is not a list of counts")
    return TensorDigest(entry["dtype"], tuple(shape), check_digest(entry["sha256"]))


def _check_fields(raw: dict[str, Any], wanted: set[str]) -> None:
    """Raise ValueError unless `raw` has exactly the fields `wanted`."""
    for field in sorted(wanted - raw.keys()):
        raise ValueError(f"the field {field!r} is missing")
    for field in sorted(raw.keys() - wanted):
        raise ValueError(f"the field {field!r} is unknown")


def check_digest(value: Any) -> str:
    """Return `value` when it is a SHA-256 in hex; raises ValueError otherwise."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is not a SHA-256 in hex")
    return value


def plain(text: str, width: int = 120) -> str:
    """`text` on one line of at most `width` characters, with control characters escaped: it may be hostile."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def explain(recorded: BaseRecord, present: BaseRecord) -> list[str]:
    """Short sentences that say in what `present` differs from `recorded`, the most important first; none when equal."""
    weights = _explain_tensors(recorded.tensors, present.tensors)
    others = _explain_values("config", recorded.config, present.config)
    if recorded.tokenizer != present.tokenizer:
        others.append("the tokenizer differs")
    others += _explain_values("special tokens", recorded.special_tokens, present.special_tokens)
    others += _explain_template(recorded.chat_template, present.chat_template)
    return weights + others if weights or not others else ["the weights are the same", *others]


def _explain_tensors(before: dict[str, TensorDigest], after: dict[str, TensorDigest]) -> list[str]:
    common = [name for name in before if name in after]
    reshaped = [name for name in common if before[name].shape != after[name].shape]
    kept = [name for name in common if before[name].shape == after[name].shape]
    changed = [
        name for name in kept if before[name].dtype == after[name].dtype and before[name].sha256 != after[name].sha256
    ]
    sentences = _explain_names("missing", before.keys() - after.keys(), len(before))
    sentences += _explain_names("added", after.keys() - before.keys(), len(after))
    sentences += [_explain_shape(name, before[name].shape, after[name].shape) for name in reshaped[:_NAMED]]
    if len(reshaped) > _NAMED:
        sentences.append(f"{len(reshaped) - _NAMED} more tensors have another shape")
    sentences += _explain_dtypes([(before[name].dtype, after[name].dtype) for name in common])
    if changed:
        sentences.append(f"tensors: {len(changed)} of {len(before)} differ in their bytes ({_names(changed)})")
    return sentences


def _explain_names(what: str, names: Iterable[str], total: int) -> list[str]:
    found = sorted(names)
    if len(found) <= _NAMED:
        return [f"{plain(name)} is {what}" for name in found]
    return [f"tensors: {len(found)} of {total} are {what} ({_names(found)})"]


def _explain_shape(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
    if len(before) == len(after) == 2 and before[1] == after[1] and re.search(r"embed|wte|lm_head", name):
        what = "output" if "lm_head" in name else "embedding"
        return f"{what} rows {before[0]} → {after[0]} ({plain(name)})"
    return f"{plain(name)} has the shape {plain(str(list(before)))} → {plain(str(list(after)))}"


def _explain_dtypes(pairs: list[tuple[str, str]]) -> list[str]:
    sentences = []
    for pair in sorted({pair for pair in pairs if pair[0] != pair[1]}):
        count = pairs.count(pair)
        which = "all tensors" if count == len(pairs) else f"tensors: {count} of {len(pairs)}"
        sentences.append(f"{which} stored as {plain(pair[1])} instead of {plain(pair[0])}")
    return sentences


def _names(names: list[str]) -> str:
    return ", ".join(plain(name) for name in names[:_NAMED]) + (" …" if len(names) > _NAMED else "")


def _explain_values(what: str, before: dict[str, Any], after: dict[str, Any], most: int = 8) -> list[str]:
    if canonical_json(before) == canonical_json(after):
        return []
    one, other = dict(_flat(before)), dict(_flat(after))
    keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    if not keys:
        return [f"{what}: the same values, nested in another way"]
    sentences = [
        f"{what}: {plain(key)} {plain(one.get(key, 'absent'), _WIDTH)} → {plain(other.get(key, 'absent'), _WIDTH)}"
        for key in keys[:most]
    ]
    return [*sentences, f"{what}: {len(keys) - most} more differ"] if len(keys) > most else sentences


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted key and shown value of every leaf; as text, since Python takes 1, 1.0 and True for the same value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value, sort_keys=True, ensure_ascii=False)


def _explain_template(before: str | None, after: str | None) -> list[str]:
    if before == after:
        return []
    if before is None or after is None:
        return [f"the chat template is {'added' if before is None else 'missing'}"]
    one, other = before.split("\n"), after.split("\n")
    line = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if line is None:
        return [f"the chat template differs ({len(one)} lines → {len(other)} lines)"]
    left, right = one[line], other[line]
    shared = min(len(left), len(right))
    column = next((i for i in range(shared) if left[i] != right[i]), shared)
    first = max(0, column - _WIDTH // 4)
    shown = [repr(text[first : first + _WIDTH]) for text in (left, right)]
    return [f"the chat template differs (first at line {line + 1}: {shown[0]} → {shown[1]})"]
