"""A tokenizer with the tokens that end an answer; one that cannot be used is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import load_tokenizer
from peftkit.errors import BaseError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def set_generation(folder: Path, eos: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


@pytest.mark.parametrize(
    ("listed", "stops"), [(None, (2,)), (2, (2,)), (0, (2, 0)), ([0, 2, 0], (2, 0)), ([], (2,)), ([1, 0], (2, 1, 0))]
)
def test_eos_comes_first_and_the_listed_stops_follow_once(listed: object, stops: tuple[int, ...], folder: Path) -> None:
    set_generation(folder, listed)
    assert load_tokenizer(folder).stop_ids == stops


def test_a_base_without_any_end_token_is_refused(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"], config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="no end-of-sequence token"):
        load_tokenizer(folder)
    set_generation(folder, 0)
    assert load_tokenizer(folder).stop_ids == (0,)
    assert load_tokenizer(folder).pad_id == 0  # without a pad token of its own


def test_a_tokenizer_that_never_answers_needs_no_end_token(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert load_tokenizer(folder, answers=False).stop_ids == ()
    set_generation(folder, 0)
    assert load_tokenizer(folder, answers=False).stop_ids == ()
    padded = load_tokenizer(folder).pad_id
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder, answers=False).pad_id == 2 == padded  # the eos
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder, answers=False).pad_id == 0


def test_ids_and_text_are_exact_inverses(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = " Hello , world .  do n't\n\n\té漢🙂<|im_end|>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.removesuffix("<|im_end|>").encode()) + 1  # no BOS, no EOS; one id per byte
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", '{"model": {"type": "no such"}}'), ("generation_config.json", "{")],
)
def test_a_broken_file_is_an_error_with_its_folder(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    with pytest.raises(BaseError, match=folder.name):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_an_error_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=tmp_path.name):
        load_tokenizer(tmp_path)
