"""The embedded encoder is all-MiniLM-L6-v2: transformers reads it whole, and it knows what sentences mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.backbone.locate import license_of, locate
from peftkit.base import embedded as shipped
from peftkit.base import identity
from peftkit.base.ref import BaseSpec, LocatedBase, longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.errors import BaseError

pytestmark = pytest.mark.base


@pytest.fixture(scope="module")
def minilm(cache: Path) -> LocatedBase:
    if not shipped.place_of("minilm", cache).exists():
        pytest.skip("embedded:minilm is not in the cache: peftkit base fetch embedded:minilm")
    return locate(BaseSpec(source="embedded:minilm"), cache)


def test_it_is_a_base_like_any_other(minilm: LocatedBase, cache: Path) -> None:
    assert minilm.kind == "embedded"
    assert longest_sequence(read_config(minilm.folder)) == 512
    assert license_of(minilm) == identity.license_of(minilm.folder) == "apache-2.0"
    known = identity.identify(minilm.folder, cache)
    assert known.weights == "873c8079dd0f488a1626818e82b20e9af8214e483649a711c1402bad929fd7bb"
    numbers = [tensor for tensor in known.record.tensors.values() if tensor.dtype == "F32"]
    assert sum(_count(tensor.shape) for tensor in numbers) == 22_713_216


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * _count(shape[1:]) if shape else 1


def test_its_tokenizer_pads_and_cuts_nothing_by_itself(minilm: LocatedBase) -> None:
    """Its tokenizer.json asks for padding to 128 and truncation at 128; sentence-transformers cuts at 256."""
    with pytest.raises(BaseError, match="no end-of-sequence token"):
        load_tokenizer(minilm.folder)
    tokenizer = load_tokenizer(minilm.folder, answers=False)
    assert (tokenizer.stop_ids, tokenizer.pad_id) == ((), 0)
    assert len(tokenizer.encode("word " * 600)) == 600
    assert tokenizer.hf(["a b", "a"])["input_ids"] == [[101, 1037, 1038, 102], [101, 1037, 102]]


def test_a_classifier_on_it_misses_only_its_own_layer(minilm: LocatedBase) -> None:
    from transformers import AutoModelForSequenceClassification

    _, told = AutoModelForSequenceClassification.from_pretrained(
        str(minilm.folder), num_labels=4, output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    assert told["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]


def test_sentences_of_one_meaning_lie_near_each_other(minilm: LocatedBase) -> None:
    """Mean pooling and cosine, as its model card says; its authors' own example pair and an unrelated text."""
    import torch
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(str(minilm.folder), local_files_only=True).eval()
    hf = load_tokenizer(minilm.folder, answers=False).hf
    texts = ["This is an example sentence", "Here is a sentence as an example", "The parliament passed the budget"]
    batch = hf(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    near, far, farther = (float(mean[i] @ mean[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert near > 0.8
    assert max(far, farther) < 0.3
