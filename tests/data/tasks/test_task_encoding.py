"""What goes into the model is what the tokenizer's template says, and nothing of a row is lost or counted twice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import IGNORED
from peftkit.data.readers import Where
from peftkit.data.tasks.encode import Encoded, encode
from peftkit.data.tasks.pieces import tokenize, trimmed
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import Answer, TaskRow
from peftkit.data.tasks.windows import owner, windows
from peftkit.errors import BaseError, ConfigError, DataError

LABELS = Head("sequence", ("a", "b", "c"))
TAGS = Head("token", ("O", "B-x", "I-x"))
SPAN = Head("span")
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


def where(index: int = 0) -> Where:
    return Where("rows.csv", index + 1, index)


def run(rows: list[TaskRow], head: Head, tokenizer: Tokenizer, limit: int | None = None, **given: Any) -> Encoded:
    task = {"sequence": "text_classification", "token": "token_classification", "span": "extractive_qa"}
    spec = {"task": task.get(head.kind, "translation"), **{k: v for k, v in given.items() if k != "labelled"}}
    return encode(rows, head, tokenizer, limit, TaskSpec.model_validate(spec), labelled=given.get("labelled", True))


def tokens(tokenizer: Tokenizer, ids: Any) -> str:
    return " ".join(tokenizer.hf.convert_ids_to_tokens(list(ids)))


# Windows


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 19))
def test_windows_cover_everything_and_move_on(length: int, room: int, stride: int) -> None:
    if length > room and room <= stride:
        with pytest.raises(ValueError, match="do not move on"):
            windows(length, room, stride)
        return
    over = windows(length, room, stride)
    assert sorted({at for window in over for at in window}) == list(range(length))
    assert all(len(window) == min(room, length) for window in over)
    starts = [window.start for window in over]
    assert starts == sorted(set(starts))
    # Neighbours share at least `stride`, and all but the last two exactly so.
    shared = [len(set(one) & set(two)) for one, two in pairwise(over)]
    assert all(count >= stride for count in shared)
    assert all(count == stride for count in shared[:-1])
    owners = [owner(at, over) for at in range(length)]
    assert owners == sorted(owners)


def test_owner_is_the_window_with_most_context() -> None:
    over = windows(12, 6, 4)
    assert [(window.start, window.stop) for window in over] == [(0, 6), (2, 8), (4, 10), (6, 12)]
    # Position 4: one token to the end of the first window, 2 to the start of the second, at the start of the third.
    assert [owner(at, over) for at in range(12)] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]


# Whole texts


def test_a_text_and_a_pair_are_as_the_template_says(encoder: Tokenizer, causal: Tokenizer) -> None:
    rows = [TaskRow(where(), text="ab c", pair="d", target="b"), TaskRow(where(1), text="e", target="a")]
    both, one = run(rows, LABELS, encoder).examples
    assert tokens(encoder, both.input_ids) == "[CLS] a ##b c [SEP] d [SEP]"
    assert both.type_ids == (0, 0, 0, 0, 0, 1, 1)
    assert tokens(encoder, one.input_ids) == "[CLS] e [SEP]"
    assert (both.target, one.target, both.row, one.row) == ((1,), (0,), 0, 1)
    both, one = run(rows, LABELS, causal).examples
    assert causal.decode(list(both.input_ids)) == "ab c\nd"
    assert causal.decode(list(one.input_ids)) == "e"
    assert both.type_ids is None
    assert (both.answer_tokens, both.per_token) == (1, False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.none() | TEXTS), min_size=1, max_size=5))
def test_ids_are_those_of_the_tokenizer_itself(encoder: Tokenizer, texts: list[tuple[str, str | None]]) -> None:
    rows = [TaskRow(where(), text=text, pair=pair, target="a") for text, pair in texts]
    for example, (text, pair) in zip(run(rows, LABELS, encoder).examples, texts, strict=True):
        given_by = encoder.hf(text, pair)
        assert list(example.input_ids) == given_by["input_ids"]
        assert list(example.type_ids or ()) == given_by["token_type_ids"]


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Bytes with two merges: a line end with a, a space with b."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: at for at, token in enumerate(["q", "a", "b", "Ċ", "Ġ", "Ċa", "Ġb"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("Ċ", "a"), ("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), (0,), 0)


def test_a_token_is_of_the_text_it_begins_in_and_without_spaces(merging: Tokenizer) -> None:
    (one,) = tokenize(merging, ["q"], ["ab b"])
    assert tokens(merging, one.ids) == "q Ċa b Ġb"
    assert (one.first, one.second) == (range(2), range(2, 4))
    assert one.offsets[2:] == ((1, 2), (3, 4))
    assert [trimmed(span, "ab  cd") for span in ((2, 5), (0, 3), (2, 4), (0, 6))] == [(4, 5), (0, 2), (0, 0), (0, 6)]


def test_texts_with_and_without_a_pair_keep_their_order(encoder: Tokenizer) -> None:
    found = tokenize(encoder, ["a", "b", "c"], ["d", None, "e"])
    assert [tokens(encoder, one.ids) for one in found] == [
        "[CLS] a [SEP] d [SEP]",
        "[CLS] b [SEP]",
        "[CLS] c [SEP] e [SEP]",
    ]


def test_targets_of_every_problem(causal: Tokenizer) -> None:
    def target(head: Head, value: object) -> tuple[float, ...]:
        return run([TaskRow(where(), text="t", target=value)], head, causal).examples[0].target

    assert target(LABELS, "c") == (2,)
    assert target(Head("sequence", ("a", "b", "c"), "multi_label"), ("c", "a")) == (1, 0, 1)
    assert target(Head("sequence", ("a", "b"), "multi_label"), ()) == (0, 0)
    assert target(Head("sequence", ("score",), "regression"), 2.5) == (2.5,)


def test_a_long_row_is_refused_dropped_or_cut_as_asked(encoder: Tokenizer) -> None:
    rows = [
        TaskRow(where(at), text=text, pair=pair, target="a")
        for at, (text, pair) in enumerate([("abcdef", "gh"), ("a", "b")])
    ]
    kept = run(rows, LABELS, encoder, 8)
    assert (kept.too_long, len(kept.examples), kept.dropped) == ({"rows.csv:1": 11}, 1, ())
    kept = run(rows, LABELS, encoder, 8, too_long="drop")
    assert (kept.dropped, len(kept.examples), kept.too_long) == (("rows.csv:1",), 1, {})
    kept = run(rows, LABELS, encoder, 8, too_long="truncate")
    assert (kept.truncated, kept.dropped) == (("rows.csv:1",), ())
    assert tokens(encoder, kept.examples[0].input_ids) == "[CLS] a ##b ##c [SEP] g ##h [SEP]"
    kept = run(rows, LABELS, encoder, 6, too_long="truncate")
    assert [len(example.input_ids) for example in kept.examples] == [6, 5]
    assert run(rows, LABELS, encoder, 99, max_length=8).too_long == {"rows.csv:1": 11}
    with pytest.raises(ConfigError, match="windows"):
        run(rows, LABELS, encoder, 8, too_long="windows")


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(BaseError, match="SlowTokenizer"):
        run([TaskRow(where(), text="t", target="a")], LABELS, Tokenizer(SlowTokenizer(), (0,), 0))


# Words


def tagged(words: list[str], tags: list[str] | None = None, index: int = 0) -> TaskRow:
    return TaskRow(where(index), words=tuple(words), target=tuple(tags or ["O"] * len(words)))


def test_the_first_sub_token_of_a_word_has_its_tag(encoder: Tokenizer, causal: Tokenizer) -> None:
    row = tagged(["ab", "c", "d"], ["B-x", "I-x", "O"])
    one = run([row], TAGS, encoder).examples[0]
    assert tokens(encoder, one.input_ids) == "[CLS] a ##b c d [SEP]"
    assert one.target == (IGNORED, 1, IGNORED, 2, 0, IGNORED)
    assert (one.words, one.first_word, one.answer_tokens) == ((1, 3, 4), 0, 3)
    one = run([row], TAGS, causal).examples[0]
    assert causal.decode(list(one.input_ids)) == "ab c d"
    # The byte of a space is a token of its own here, and the word's first is the one after it.
    assert one.target == (1, IGNORED, IGNORED, 2, IGNORED, 0)


def test_a_word_of_several_words_or_signs_is_one_word(encoder: Tokenizer) -> None:
    one = run([tagged(["U.S.", "New York", "x"], ["B-x", "I-x", "O"])], TAGS, encoder).examples[0]
    assert [position for position, value in enumerate(one.target) if value != IGNORED] == list(one.words)
    assert tokens(encoder, [one.input_ids[at] for at in one.words]) == "U N x"


def test_windows_of_words_by_hand(causal: Tokenizer) -> None:
    # 11 bytes "a b c d e f"; windows of 5 bytes that share 2: [0, 5), [3, 8), [6, 11); words begin at 0, 2, …, 10.
    words = ["a", "b", "c", "d", "e", "f"]
    row = tagged(words, ["B-x", "I-x", "O", "B-x", "O", "I-x"])
    found = run([row], TAGS, causal, 5, stride=2).examples
    assert [causal.decode(list(one.input_ids)) for one in found] == ["a b c", " c d ", "d e f"]
    # c (byte 4) is the last of the first window and second of the next; d (6) is at 3 of [3, 8), the start of [6, 11).
    assert [(one.first_word, one.words) for one in found] == [(0, (0, 2)), (2, (1, 3)), (4, (2, 4))]
    assert [one.target for one in found] == [
        (1, -100, 2, -100, -100),
        (-100, 0, -100, 1, -100),
        (-100, -100, 0, -100, 2),
    ]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), limit=st.integers(6, 24), stride=st.integers(0, 3), spaced=st.booleans())
def test_every_word_counts_exactly_once(
    encoder: Tokenizer, causal: Tokenizer, data: st.DataObject, limit: int, stride: int, spaced: bool
) -> None:
    tokenizer = causal if spaced else encoder
    word = TEXTS.filter(lambda text: bool(text.strip()))
    lists = data.draw(st.lists(st.lists(word, min_size=1, max_size=12), min_size=1, max_size=3))
    rows = [tagged(words, [TAGS.labels[len(word) % 3] for word in words], at) for at, words in enumerate(lists)]
    encoded = run(rows, TAGS, tokenizer, limit, stride=stride)
    counted: dict[tuple[int, int], int] = {}
    for one in encoded.examples:
        assert len(one.input_ids) <= limit
        assert len(one.target) == len(one.input_ids)
        positions = [position for position in one.words if position >= 0]
        assert [at for at, value in enumerate(one.target) if value != IGNORED] == positions
        for number, position in enumerate(one.words, start=one.first_word):
            if position >= 0:
                counted[one.row, number] = counted.get((one.row, number), 0) + 1
                assert one.target[position] == TAGS.labels.index(rows[one.row].target[number])
    assert set(counted.values()) <= {1}
    lost = sum(len(words) for words in lists) - len(counted)
    assert bool(lost) == bool(encoded.unseen)
    if spaced:
        assert not lost  # every byte is a token


def test_words_without_tokens_are_told(encoder: Tokenizer) -> None:
    rows = [tagged(["a", "\u200d", "b"], ["O", "B-x", "I-x"]), tagged(["\u200d"], index=1)]
    encoded = run(rows, TAGS, encoder)
    assert encoded.unseen == {"rows.csv:1": "'\\u200d'", "rows.csv:2": "'\\u200d'"}
    assert encoded.dropped == ("rows.csv:2",)
    assert encoded.examples[0].words == (1, -1, 2)
    assert encoded.examples[0].target == (IGNORED, 0, 2, IGNORED)


def test_a_word_longer_than_a_window_counts_once(encoder: Tokenizer) -> None:
    rows = [tagged(["x", "y" * 40, "z"], ["O", "B-x", "O"])]
    encoded = run(rows, TAGS, encoder, 8, stride=2)
    assert [word for one in encoded.examples for word in range(one.first_word, one.first_word + len(one.words))] == [
        0,
        1,
        2,
    ]
    # Windows within the long word have nothing to learn, and are left out.
    assert len(encoded.examples) == 2


def test_a_limit_that_leaves_no_room_is_refused(encoder: Tokenizer) -> None:
    with pytest.raises(DataError, match="do not move on"):
        run([tagged(["abcdef"])], TAGS, encoder, 4, stride=2)


def test_other_policies_for_words(encoder: Tokenizer) -> None:
    rows = [tagged(["a", "b", "c", "d"])]
    assert run(rows, TAGS, encoder, 4, too_long="raise").too_long == {"rows.csv:1": 6}
    assert run(rows, TAGS, encoder, 4, too_long="drop").dropped == ("rows.csv:1",)
    cut = run(rows, TAGS, encoder, 4, too_long="truncate")
    assert (cut.truncated, cut.examples[0].words, len(cut.examples)) == (("rows.csv:1",), (1, 2), 1)


def test_words_to_predict_have_positions_and_no_targets(encoder: Tokenizer) -> None:
    rows = [TaskRow(where(), words=("a", "b"))]
    one = run(rows, TAGS, encoder, labelled=False).examples[0]
    assert one.words == (1, 2)
    assert set(one.target) == {IGNORED}


# Spans


def question(context: str, answer: str | None, asked: str = "q?") -> TaskRow:
    target = () if answer is None else (Answer(answer, context.index(answer)),)
    return TaskRow(where(), text=context, pair=asked, target=target)


def test_an_answer_is_a_first_and_a_last_token(encoder: Tokenizer, causal: Tokenizer) -> None:
    row = question("ab cd ef", "cd e")
    one = run([row], SPAN, encoder).examples[0]
    assert tokens(encoder, one.input_ids) == "[CLS] q ? [SEP] a ##b c ##d e ##f [SEP]"
    assert one.target == (6, 8)
    assert one.offsets == ((0, 0),) * 4 + ((0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (0, 0))
    assert one.type_ids == (0,) * 4 + (1,) * 7
    one = run([row], SPAN, causal).examples[0]
    assert causal.decode(list(one.input_ids)) == "q?\nab cd ef"
    assert one.target == (6, 9)
    assert one.offsets[:5] == ((0, 0), (0, 0), (0, 0), (0, 1), (1, 2))


def test_a_question_without_an_answer_points_at_the_first_token(encoder: Tokenizer) -> None:
    assert run([question("ab", None)], SPAN, encoder).examples[0].target == (0, 0)


def test_windows_of_a_context_by_hand(encoder: Tokenizer) -> None:
    # 5 tokens of question and special ones leave 4 for the context; 2 are shared: [0, 4), [2, 6), [3, 7).
    found = run([question("abcdefg", "ef")], SPAN, encoder, 9, stride=2).examples
    assert [tokens(encoder, one.input_ids) for one in found] == [
        "[CLS] q ? [SEP] a ##b ##c ##d [SEP]",
        "[CLS] q ? [SEP] ##c ##d ##e ##f [SEP]",
        "[CLS] q ? [SEP] ##d ##e ##f ##g [SEP]",
    ]
    assert [one.target for one in found] == [(0, 0), (6, 7), (5, 6)]
    assert found[1].offsets[4:8] == ((2, 3), (3, 4), (4, 5), (5, 6))


def test_an_answer_that_no_window_holds_is_refused(encoder: Tokenizer) -> None:
    with pytest.raises(DataError, match="of 4 tokens is in no window as a whole"):
        run([question("abcdefgh", "bcde")], SPAN, encoder, 9, stride=1)
    assert len(run([question("abcdefgh", "bcde")], SPAN, encoder, 9, stride=3).examples) == 5


def test_a_question_that_leaves_no_room_is_refused(encoder: Tokenizer) -> None:
    with pytest.raises(DataError, match="the question and special tokens take 9"):
        run([question("abcdefgh", "b", "abcdef")], SPAN, encoder, 9, stride=0)


def test_a_row_cut_before_its_answer_is_dropped(encoder: Tokenizer) -> None:
    rows = [question("abcdefgh", "bc"), question("abcdefgh", "gh")]
    cut = run(rows, SPAN, encoder, 9, too_long="truncate")
    assert (len(cut.examples), cut.truncated, cut.dropped) == (1, ("rows.csv:1",), ("rows.csv:1",))


# Texts to write


def test_source_and_target_end_as_the_tokenizer_says(encoder: Tokenizer, causal: Tokenizer) -> None:
    row = TaskRow(where(), text="ab", target="c")
    one = run([row], Head("seq2seq"), encoder).examples[0]
    assert (tokens(encoder, one.input_ids), tokens(encoder, one.target)) == ("[CLS] a ##b [SEP]", "[CLS] c [SEP]")
    assert (one.per_token, one.answer_tokens) == (True, 3)
    one = run([row], Head("seq2seq"), causal).examples[0]
    assert tokens(causal, one.target) == "c <|im_end|>"
    one = run([row], Head("seq2seq"), causal, instruction="to German:").examples[0]
    assert causal.decode(list(one.input_ids)) == "to German: ab"


def test_long_sources_and_targets(encoder: Tokenizer) -> None:
    rows = [TaskRow(where(), text="abcdef", target="g"), TaskRow(where(1), text="g", target="abcdef")]
    assert run(rows, Head("seq2seq"), encoder, 6).too_long == {"rows.csv:1": 8, "rows.csv:2": 8}
    cut = run(rows, Head("seq2seq"), encoder, 6, too_long="truncate").examples
    assert tokens(encoder, cut[0].input_ids) == "[CLS] a ##b ##c ##d [SEP]"
    assert tokens(encoder, cut[1].target) == "[CLS] a ##b ##c ##d ##e"
