"""tokenizer.json as GGUF metadata: byte-level BPE whose pre-tokenizer llama.cpp knows by name, nothing else.

llama.cpp does not read the pre-tokenizer from the file: `tokenizer.ggml.pre` names one of those compiled into it, and a
wrong name splits text wrongly without a word. The name is found by comparing the definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from peftkit.base.raw import json_file
from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import DeltaError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = ("ByteLevel", True)
_BYTES = ("ByteLevel", False)

_NAMES: Mapping[tuple[Any, ...], str] = {
    (False, _GPT2): "gpt-2",
    (False, ("Digits", True), _GPT2): "smollm",
    (False, ("Split", _LETTERS + r"\p{N}" + _REST), _BYTES): "qwen2",
    (True, ("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES): "llama-bpe",
}
"""(ignore_merges, steps of the pre-tokenizer) → llama.cpp's name (llama-vocab.cpp, `load`)."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Add tokens, types, merges, pre-tokenizer, special ids and chat template of the tokenizer in `folder`.

    `rows` is the height of the embedding; rows without a token become unused tokens, as llama.cpp's converter does.
    Raises DeltaError for a tokenizer that llama.cpp would split differently.
    """
    definition = json_file(folder / "tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(definition))
    tokens, types = _tokens(definition, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_merge(merge) for merge in definition["model"]["merges"]])
    writer.add_add_space_prefix(False)
    _add_special(writer, load_tokenizer(folder))


def pre_tokenizer(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises DeltaError when it has none for it."""
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE" if model.get("byte_fallback") else model.get("type")
        raise _refused(f"its model is {kind}", "a byte-level BPE tokenizer.json")
    normalizer = definition.get("normalizer")
    steps = _steps(definition.get("pre_tokenizer") or {})
    name = _NAMES.get((bool(model.get("ignore_merges")), *steps))
    if name is None:
        raise _refused(f"its pre-tokenizer is {steps}", "the pre-tokenizer of GPT-2, SmolLM, Qwen2 or Llama 3")
    # Qwen's tokenizers compose characters (NFC) first; llama.cpp does not, and differs on decomposed text only.
    if normalizer is not None and not (name == "qwen2" and normalizer == {"type": "NFC"}):
        raise _refused(f"it normalizes text: {normalizer}", "no normalizer, or NFC for Qwen")
    return name


def _steps(pre: Mapping[str, Any]) -> tuple[Any, ...]:
    """A pre-tokenizer as comparable steps; settings that only move offsets are left out."""
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return (("ByteLevel", bool(pre.get("use_regex", True))),)
    if kind == "Digits":
        return (("Digits", bool(pre.get("individual_digits"))),)
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return (("Split", (pre.get("pattern") or {}).get("Regex")),)
    return (str(dict(pre)),)


def _tokens(definition: Mapping[str, Any], rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    by_id = {number: token for token, number in definition["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    for token in definition.get("added_tokens") or ():
        by_id[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    if by_id and max(by_id) >= rows:
        raise _refused(f"it has the id {max(by_id)}", f"at most {rows - 1}: the embedding has {rows} rows")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    return tokens, [types.get(number, gguf.TokenType.UNUSED) for number in range(rows)]


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _add_special(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    hf = tokenizer.hf
    keys = gguf.Keys.Tokenizer
    ids = {keys.BOS_ID: hf.bos_token_id, keys.UNK_ID: hf.unk_token_id, keys.PAD_ID: tokenizer.pad_id}
    ids[keys.EOS_ID] = hf.eos_token_id if hf.eos_token_id is not None else tokenizer.stop_ids[0]
    others = [number for number in tokenizer.stop_ids if number != ids[keys.EOS_ID]]
    if others:
        ids[keys.EOT_ID] = others[0]
    for key, number in ids.items():
        if number is not None:
            writer.add_uint32(key, int(number))
    ended = hf.encode("a", add_special_tokens=True)[-1:] == [hf.eos_token_id]
    writer.add_add_bos_token(bool(tokenizer.bos))
    writer.add_add_eos_token(ended)
    if isinstance(hf.chat_template, str):
        writer.add_chat_template(hf.chat_template)


def _refused(what: str, expected: str) -> DeltaError:
    return DeltaError(
        f"llama.cpp has no tokenizer that splits text as this one does: {what}",
        expected=expected,
        hint="name the base's own GGUF file, whose tokenizer is then copied, or use llama.cpp's convert_hf_to_gguf.py",
    )
