"""Tokenizers small enough to count by hand: every character is a token, with and without special tokens around it."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer

WriteText = Callable[[str, str], str]


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, no special tokens: a pair is joined by a line end."""
    folder = tmp_path_factory.mktemp("causal")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def encoder() -> Tokenizer:
    """BERT's: [CLS] text [SEP] pair [SEP], type ids, control characters removed; a word is its letters, a, ##b, ##c."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = string.ascii_letters + string.digits + string.punctuation + "äöüßé½"
    vocabulary = {token: at for at, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=10_000))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    hf: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        eos_token="[SEP]", model_input_names=names,
    )  # fmt: skip
    return Tokenizer(hf, (3,), 0)


@pytest.fixture
def write(tmp_path: Path) -> WriteText:
    """Write a text file; returns its path."""

    def one(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return str(tmp_path / name)

    return one
