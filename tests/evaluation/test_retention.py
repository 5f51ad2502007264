"""General text becomes passages of predicted tokens: every token stands in one, and counts are what they say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import DataError
from peftkit.evaluation.retention import GENERAL, load_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def test_the_text_that_ships_is_cut_at_its_paragraphs_and_nothing_is_lost(tokenizer: Tokenizer) -> None:
    text = load_text("general", tokenizer, window=100_000)
    paragraphs = [part.strip() for part in GENERAL.read_text(encoding="utf-8").split("\n\n")]
    assert len(paragraphs) > 10
    assert [tokenizer.decode(passage.input_ids) for passage in text.passages] == paragraphs
    assert text.record["source"] == "general.txt"
    assert not any("<|" in paragraph for paragraph in paragraphs)


def test_every_token_but_the_first_of_a_passage_is_predicted(tokenizer: Tokenizer) -> None:
    text = load_text("general", tokenizer, window=64)
    for passage, predicted in zip(text.passages, text.tokens, strict=True):
        assert passage.labels == passage.input_ids
        assert predicted == len(passage.input_ids) - 1 > 0
        assert len(passage.input_ids) <= 64
    assert text.record["rows"] == len(text.passages)
    assert text.record["tokens"] == sum(text.tokens) + len(text.passages)


@pytest.mark.parametrize(("length", "passages"), [(2, [2]), (8, [8]), (9, [8]), (10, [8, 2]), (24, [8, 8, 8])])
def test_a_users_file_is_cut_in_windows_and_only_a_lone_last_token_is_left_out(
    length: int, passages: list[int], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content = ("ab\n\n" * 10)[:length].encode()  # paragraphs of a user's file are not cut apart
    (tmp_path / "mine.txt").write_bytes(content)
    text = load_text(str(tmp_path / "mine.txt"), tokenizer, window=8)
    assert [len(passage.input_ids) for passage in text.passages] == passages
    together = "".join(tokenizer.decode(passage.input_ids) for passage in text.passages)
    assert together == content.decode()[: sum(passages)]
    assert text.record["sha256"] == hashlib.sha256(content).hexdigest()
    assert str(tmp_path) not in str(text.record)


def test_a_limit_takes_the_first_passages(tokenizer: Tokenizer) -> None:
    whole, some = load_text("general", tokenizer), load_text("general", tokenizer, limit=3)
    assert some.passages == whole.passages[:3]
    assert some.record["rows"] == 3


@pytest.mark.parametrize("content", [None, b"", b"a", b"\xff\xfe\xfd"])
def test_a_file_that_holds_no_text_is_refused_by_name(
    content: bytes | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"evaluate\.retention=.*mine\.txt") as caught:
        load_text(str(path), tokenizer)
    assert caught.value.expected is not None
