"""What lies beside the weights of a merged model: its config, tokenizer, template and generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.backbone.headed import Headed
from peftkit.backbone.heads import settings_of
from peftkit.backbone.load import tokenizer_for
from peftkit.base.dense import dense_tensors
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.settings import MergeSettings
from peftkit.errors import DeltaError

_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_LICENCES = ("LICENSE", "LICENSE.md", "NOTICE")
_OWN = ("config.json", "adapter_config.json", "peftkit_merge.json")
_LARGEST = 1 << 30
_TEMPLATES = "additional_chat_templates"


def companions(base: Path) -> list[str]:
    """Files of a base that a merged model takes over, by their relative paths; never code, pickles or an index."""
    found = [path.name for path in base.iterdir() if path.is_file() and _taken(path)]
    more = base / _TEMPLATES
    if more.is_dir():
        found += [f"{_TEMPLATES}/{path.name}" for path in more.iterdir() if path.suffix == ".jinja"]
    return sorted(found)


def _taken(path: Path) -> bool:
    if path.name in _OWN or path.name.endswith(".index.json") or path.stat().st_size > _LARGEST:
        return False
    return path.suffix in _SUFFIXES or path.name in _LICENCES


def merged_config(config: Mapping[str, Any], base: Path, deltas: Deltas, settings: MergeSettings) -> dict[str, Any]:
    """config.json of the merged model, without a quantization. Raises DeltaError for resized tensors that disagree."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    inner = found.get("text_config")
    parts = [found]
    if isinstance(inner, dict):
        found["text_config"] = inner = dict(inner)
        parts.append(inner)
    rows = _vocabulary(config, base, deltas)
    if deltas.headed is not None:
        _give_head(found, parts, base, deltas.headed)
    for part in parts:
        if deltas.untied and (part is found or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if rows is not None and "vocab_size" in part:
            part["vocab_size"] = rows
        if settings.dtype != "keep" and (part is found or {"dtype", "torch_dtype"} & part.keys()):
            part.pop("torch_dtype", None)
            part["dtype"] = settings.dtype
    return found


def _give_head(found: dict[str, Any], parts: list[dict[str, Any]], base: Path, headed: Headed) -> None:
    """Let config.json name the class and the labels, as transformers looks for them."""
    found["architectures"] = [headed.architecture]
    found |= settings_of(headed.head, str(found.get("model_type")))
    if headed.head.kind == "sequence":  # a causal model is scored at the last token that is not this one
        pad = tokenizer_for(headed.head, base).pad_id
        for part in parts:
            part["pad_token_id"] = pad


def _vocabulary(config: Mapping[str, Any], base: Path, deltas: Deltas) -> int | None:
    """The new number of tokens, None where no tensor changes its number of rows."""
    dense = dense_tensors(base)
    rows = {}
    for name, delta in deltas.changes.items():
        own = dense.get(deltas.sources.get(name, name))
        if own is not None and delta.shape and own.shape and delta.shape[0] != own.shape[0]:
            rows[name] = delta.shape[0]
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise DeltaError(f"the adapter gives the vocabulary different sizes: {told}", expected="one size")
    return next(iter(rows.values()), None)


def spelled(content: Mapping[str, Any]) -> bytes:
    """A JSON file as the model libraries write it."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
