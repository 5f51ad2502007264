"""CoNLL files become sentences, and tags of every scheme BIO; what breaks a scheme is told with its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.tags import read_tags, tag_names
from peftkit.errors import DataError

Write = Callable[[str, str], str]
SPEC = TaskSpec(task="token_classification")


def read(source: str, *, labelled: bool = True) -> TaskDataset:
    return read_rows(SPEC, source, labelled=labelled)


def test_sentences_are_separated_by_blank_lines(write: Write) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nGerman JJ I-NP B-MISC\r\n"
    found = read(write("eng.train", text))
    assert [(row.words, row.target) for row in found.rows] == [
        (("EU", "rejects"), ("B-ORG", "O")),
        (("German",), ("B-MISC",)),
    ]
    assert [str(row.where) for row in found.rows] == ["eng.train:3", "eng.train:7"]
    assert "3 words" in found.reason
    assert "tags in BIO" in found.reason


def test_words_may_hold_spaces_where_tabs_separate(write: Write) -> None:
    found = read(write("a.conll", "New York\tB-x\nI 'm\tO\n \t\n.\tO\n"))
    assert [row.words for row in found.rows] == [("New York", "I 'm"), (".",)]


def test_a_tsv_is_a_table_only_if_its_header_says_so(write: Write) -> None:
    assert read(write("a.tsv", "x\tB-a\ny\tI-a\n")).rows[0].words == ("x", "y")
    assert read(write("b.tsv", "tokens\ttags\nx y\tB-a I-a\n")).rows[0].words == ("x", "y")


def test_broken_lines_are_all_told(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read(write("a.bio", "a O\nb\nc x O\n\n\tO\nd\t\n"))
    told = str(caught.value)
    assert "4 problems at 4 places in 5 rows" in told
    assert "a.bio:2: the word 'b' has no tag" in told
    assert "a.bio:3: 3 columns where the first line has 2" in told
    assert "a.bio:5: there is no word before the tag" in told
    assert "a.bio:6: the tag of 'd' is empty" in told


def test_a_break_is_told_with_its_line(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read(write("a.conll", "x O\ny B-a\nz I-b\n\nu B-a\nv I-a\n\nw I-a\n"))
    told = str(caught.value)
    assert "a.conll:3: the tag 'I-b' after 'B-a': an entity begins with 'B-b'" in told
    assert "a.conll:8: the tag 'I-a' at the beginning of a sentence" in told
    assert "2 problems" in told


def test_words_to_predict_need_no_tag(write: Write) -> None:
    found = read(write("a.txt", "one\ntwo O\n\nthree\n"), labelled=False)
    assert [(row.words, row.target) for row in found.rows] == [(("one", "two"), None), (("three",), None)]


def test_a_file_without_words_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="holds no words"):
        read(write("a.conll", "\n\n"))


def test_iob1_is_rewritten_and_announced(write: Write) -> None:
    found = read(write("a.iob", "a I-x\nb I-x\nc B-x\nd I-y\ne O\nf I-y\n"))
    assert found.rows[0].target == ("B-x", "I-x", "B-x", "B-y", "O", "B-y")
    assert "tags in IOB1, rewritten as BIO" in found.reason


@pytest.mark.parametrize(
    ("tags", "bio"),
    [
        (["B-x", "I-x", "E-x", "S-y", "O"], ("B-x", "I-x", "I-x", "B-y", "O")),
        (["B-x", "I-x", "L-x", "U-y", "O"], ("B-x", "I-x", "I-x", "B-y", "O")),
        (["B-x", "M-x", "E-x"], ("B-x", "I-x", "I-x")),
    ],
)
def test_schemes_with_ends_are_rewritten(tags: list[str], bio: tuple[str, ...]) -> None:
    read_as = read_tags([tags])
    assert (read_as.scheme, read_as.tags, read_as.broken) == ("BIOES", (bio,), ())


@pytest.mark.parametrize(
    ("tags", "at"), [(["B-x", "O", "S-x"], 0), (["E-x", "S-x"], 0), (["B-x", "E-y", "S-x"], 1), (["S-x", "B-x"], 1)]
)
def test_broken_ends_are_found(tags: list[str], at: int) -> None:
    assert [word for _, word, _ in read_tags([tags]).broken] == [at]


def test_a_tag_without_prefix_among_entities_is_wrong() -> None:
    assert [(at, word) for at, word, _ in read_tags([["O", "B-x"], ["x", "O"]]).broken] == [(1, 0)]


def test_plain_tags_are_left_as_they_are() -> None:
    read_as = read_tags([["DET", "NOUN"], ["-LRB-", "O"]])
    assert (read_as.scheme, read_as.broken) == ("plain", ())
    assert read_as.tags == (("DET", "NOUN"), ("-LRB-", "O"))


def test_names_are_in_order_and_complete() -> None:
    assert tag_names({"B-b", "I-a", "O"}) == ("O", "B-a", "I-a", "B-b", "I-b")
    assert tag_names({"NOUN", "DET"}) == ("DET", "NOUN")


Entities = list[tuple[str, int]]


@st.composite
def sentences(draw: st.DrawFn) -> list[list[tuple[str, int]]]:
    """Runs of (type, length); the type "" is outside."""
    run = st.tuples(st.sampled_from(["", "per", "loc"]), st.integers(1, 3))
    return draw(st.lists(st.lists(run, min_size=1, max_size=6), min_size=1, max_size=4))


def bio(runs: Entities) -> list[str]:
    return [f"{'I' if at else 'B'}-{kind}" if kind else "O" for kind, length in runs for at in range(length)]


def iob1(runs: Entities) -> list[str]:
    tags: list[str] = []
    for kind, length in runs:
        begins = "B" if kind and tags and tags[-1].endswith(f"-{kind}") else "I"
        tags += [f"{begins if at == 0 else 'I'}-{kind}" if kind else "O" for at in range(length)]
    return tags


def bioes(runs: Entities) -> list[str]:
    def prefix(at: int, length: int) -> str:
        return "S" if length == 1 else "B" if at == 0 else "E" if at == length - 1 else "I"

    return [f"{prefix(at, length)}-{kind}" if kind else "O" for kind, length in runs for at in range(length)]


@given(sentences())
def test_all_schemes_of_the_same_entities_become_the_same_tags(runs: list[Entities]) -> None:
    expected = tuple(tuple(bio(one)) for one in runs)
    for write_as in (bio, iob1, bioes):
        written: Sequence[Sequence[str]] = [write_as(one) for one in runs]
        read_as = read_tags(written)
        assert read_as.broken == ()
        # Without an E- or S- in the file, BIOES is BIO; where IOB1 shows no I- after O it is BIO as well.
        assert read_as.tags == expected
