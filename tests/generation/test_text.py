"""The pieces of a streamed answer make up its decoded text, cut at the first stop string, whatever the tokens are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import write_tokenizer
from tiny_families import write_bpe

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.generation.text import Text

PARTIAL = "\ufffd"
WORDS = ["▁", "▁a", "▁the", "▁ab", "a", "b", "c", "ab", "é", "▁▁", ".", "日"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]


def fast(backend: Any) -> Tokenizer:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    return Tokenizer(hf, (hf.eos_token_id,), hf.eos_token_id)


def llama_2() -> Tokenizer:
    """Decodes as SentencePiece does: bytes as tokens of their own, one space dropped at the beginning."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(PIECES)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return fast(backend)


def metaspace() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = [(piece, -1.0) for piece in ["<unk>", "<s>", "</s>", *WORDS]]
    backend = Backend(models.Unigram(vocabulary, unk_id=0))
    backend.decoder = decoders.Metaspace()
    return fast(backend)


def wordpiece() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    words = ["[UNK]", "<s>", "</s>", "the", "##the", "un", "##want", "##ed", ".", ",", "'", "s", "n't", "do"]
    backend = Backend(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return fast(backend)


def byte_bpe(folder: Path) -> Tokenizer:
    hf = write_bpe(folder)
    return Tokenizer(hf, (hf.eos_token_id,), hf.eos_token_id)


def bytes_only(folder: Path) -> Tokenizer:
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers whose decoding of any ids never changes what came long before."""
    return {
        "bytes": bytes_only(tmp_path_factory.mktemp("bytes")),
        "bpe": byte_bpe(tmp_path_factory.mktemp("bpe")),
        "metaspace": metaspace(),
        "wordpiece": wordpiece(),
    }


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return llama_2()


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The oracle: `text` up to the first place where any stop string stands."""
    places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return (text[: min(places)], True) if places else (text, False)


def agrees(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...], *, meanwhile: bool = True) -> None:
    """Feed `ids` until they stop, and compare with the oracle after the last one fed, and after each `meanwhile`.

    Half a character makes byte fallback show the whole characters before it as broken, until it is whole.
    """
    text, pieces, fed = Text(tokenizer, stops), list[str](), list[int]()
    for token in ids:
        pieces.append(text.add(token))
        fed.append(token)
        if text.stopped:
            assert text.add(token) == ""
            break
        if not meanwhile:
            continue
        whole, found = cut(tokenizer.decode(fed).rstrip(PARTIAL), stops)
        assert not found, "a stop string was complete, and not seen"
        assert whole.startswith("".join(pieces).rstrip(PARTIAL))
    pieces.append(text.finish())
    expected, stopped = cut(tokenizer.decode(fed), stops)
    assert ("".join(pieces), text.stopped) == (expected, stopped)
    assert text.text == expected


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    # Two ids more than there are: a model's logits may be wider than its tokenizer.
    return st.lists(st.integers(0, len(tokenizer.hf) + 1), max_size=40)


def stops_in(text: str, data: st.DataObject) -> tuple[str, ...]:
    """Stop strings that do, or nearly do, stand in `text`."""
    places = st.integers(0, max(0, len(text) - 1))
    slices = st.tuples(places, st.integers(1, 4), st.sampled_from(["", "", "x"]))
    drawn = data.draw(st.lists(slices, max_size=3))
    return tuple(stop for at, length, more in drawn if (stop := text[at : at + length] + more))


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace", "wordpiece"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_make_up_the_decoded_text(
    name: str, lossless: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = lossless[name]
    ids = data.draw(ids_of(tokenizer))
    agrees(tokenizer, ids, stops_in(tokenizer.decode(ids), data))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab é日😀\n. "), max_size=12), data=st.data())
def test_pieces_of_any_text_make_up_the_text(text: str, lossless: dict[str, Tokenizer], data: st.DataObject) -> None:
    for name in ("bytes", "bpe"):
        ids = lossless[name].encode(text)
        assert lossless[name].decode(ids) == text
        agrees(lossless[name], ids, stops_in(text, data))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_of_byte_fallback_make_up_the_text(sentencepiece: Tokenizer, data: st.DataObject) -> None:
    parts = st.one_of(
        st.sampled_from([[PIECES.index(word)] for word in WORDS]),
        st.sampled_from("é日😀x").map(lambda char: [PIECES.index(f"<0x{byte:02X}>") for byte in char.encode()]),
        st.sampled_from([[1], [2], [len(PIECES) + 3]]),
    )
    ids = [token for part in data.draw(st.lists(parts, max_size=20)) for token in part]
    agrees(sentencepiece, ids, stops_in(sentencepiece.decode(ids), data), meanwhile=False)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
@pytest.mark.base
def test_pieces_of_the_embedded_base_make_up_its_text(embedded_tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=30))
    ids = embedded_tokenizer.encode(text)
    agrees(embedded_tokenizer, ids, stops_in(text, data))
    ids = data.draw(ids_of(embedded_tokenizer))
    agrees(embedded_tokenizer, ids, stops_in(embedded_tokenizer.decode(ids), data))


@pytest.fixture(scope="module")
def embedded_tokenizer(embedded: Path) -> Tokenizer:
    return load_tokenizer(embedded)


def test_a_character_comes_when_its_last_byte_does(lossless: dict[str, Tokenizer], sentencepiece: Tokenizer) -> None:
    text = Text(lossless["bytes"])
    assert [text.add(token) for token in lossless["bytes"].encode("aé😀b")] == ["a", "", "é", "", "", "", "😀", "b"]
    text = Text(sentencepiece)
    run = [PIECES.index(f"<0x{byte:02X}>") for byte in "é😀".encode()]
    assert [text.add(token) for token in [*run, PIECES.index("▁a")]] == ["", "é", "", "", "", "😀", " a"]


def test_what_may_become_a_stop_string_waits(lossless: dict[str, Tokenizer]) -> None:
    def pieces(content: str, *stops: str) -> list[str]:
        text = Text(lossless["bytes"], stops)
        return [*(text.add(token) for token in lossless["bytes"].encode(content)), text.finish()]

    assert pieces("a\n\nb", "\n\n") == ["a", "", "", "", ""]
    assert pieces("a\nb", "\n\n") == ["a", "", "\nb", ""]
    assert pieces("a\n", "\n\n") == ["a", "", "\n"]
    # The stop string begins anew inside what looked like it.
    assert pieces("aab!", "ab!") == ["", "a", "", "", ""]
    # Whichever is complete first ends the answer.
    assert pieces("xabcd", "bc", "abcd") == ["x", "", "", "a", "", ""]


def test_a_token_that_brings_two_stop_strings_is_cut_at_the_earlier(lossless: dict[str, Tokenizer]) -> None:
    tokenizer = lossless["bpe"]
    hello = next(token for token in range(len(tokenizer.hf)) if tokenizer.decode([token]) == " hello")
    text = Text(tokenizer, ("lo", "e"))
    assert text.add(hello) == " h"
    assert text.stopped


@dataclass(frozen=True)
class Counting(Tokenizer):
    """Counts the ids that are decoded."""

    sizes: list[int] = field(default_factory=list)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        self.sizes.append(len(ids))
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_token_costs_the_decoding_of_a_few_however_long_the_answer(
    lossless: dict[str, Tokenizer], sentencepiece: Tokenizer
) -> None:
    drawn = random.Random(0)
    chosen: list[tuple[Tokenizer, Callable[[], int]]] = []
    for tokenizer in (*lossless.values(), sentencepiece):
        many = len(tokenizer.hf)
        chosen += [(tokenizer, lambda many=many: drawn.randrange(many))]  # type: ignore[misc]
        # One id over and over: lone bytes, control tokens, spaces, ids that the tokenizer does not know.
        chosen += [(tokenizer, lambda token=token: token) for token in (*range(0, many, 7), many + 1)]  # type: ignore[misc]
    for tokenizer, token in chosen:
        counting = Counting(tokenizer.hf, tokenizer.stop_ids, tokenizer.pad_id)
        ids = [token() for _ in range(60)]
        text = Text(counting)
        for each in ids:
            counting.sizes.clear()
            text.add(each)
            assert sum(counting.sizes) <= 120
            assert max(counting.sizes) <= 18
        text.finish()
        if tokenizer is not sentencepiece:
            assert text.text == tokenizer.decode(ids)


def test_a_character_after_bytes_that_are_none_is_whole(lossless: dict[str, Tokenizer]) -> None:
    tokenizer = lossless["bytes"]
    lone = tokenizer.encode("é")[-1]
    for count in range(30):
        agrees(tokenizer, [lone] * count + tokenizer.encode("😀"), ())
