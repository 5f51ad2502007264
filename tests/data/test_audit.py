"""What a run loses on the way from file to tokens is refused, or counted and listed; nothing is lost silently.

A ChatML row of a question and an answer of q and a bytes has 20 + q + a tokens here: 6 for `<|im_start|>user⏎`, 2 for
`<|im_end|>⏎`, 11 for `<|im_start|>assistant⏎`, and 1 end-of-turn, which like the answer is learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.audit import Audit, DataSpec, audit, recorded_rendering
from peftkit.errors import DataError
from peftkit.events import Event, Note, Table, Warned

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content if loop.last or m.role == 'user' else m.content[-1:] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Write (question, answer) pairs or records to a file; returns its path."""

    def write(*given: tuple[str, str] | dict[str, Any], name: str = "rows.jsonl") -> str:
        records = [g if isinstance(g, dict) else {"prompt": g[0], "completion": g[1]} for g in given]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    return write


@pytest.fixture
def held(rows: Callable[..., str]) -> str:
    return rows(("held", "yes"), name="held.jsonl")


class Told(list[Event]):
    """Events in the order they were reported."""

    def of(self, kind: type) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.of(Warned)]

    @property
    def table(self) -> dict[str, dict[str, Any]]:
        (table,) = [event for event in self.of(Table) if event.title == "data"]
        return {line[0]: dict(zip(table.columns[1:], line[1:], strict=True)) for line in table.rows}


def run(tokenizer: Tokenizer, limit: int | None = None, **settings: Any) -> tuple[Audit, Told]:
    told = Told()
    return audit(DataSpec(**settings), tokenizer, limit, told.append), told


FITS = ("q", "a")  # 22 tokens
CUT = ("r", "a" * 10)  # 31 tokens; 20 of them before the answer
GONE = ("q" * 20, "a")  # 41 tokens; 39 of them before the answer


def test_every_count_is_one_that_can_be_made_by_hand(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    train = rows(FITS, CUT, GONE)
    result, told = run(tokenizer, train=train, held_out=held)
    assert told.table == {
        "train": {"rows": 3, "sequences": 3, "tokens": 22 + 31 + 41, "learned tokens": 2 + 11 + 2, "longest": 41,
                  "left out": 0, "cut": 0},
        "held-out": {"rows": 1, "sequences": 1, "tokens": 27, "learned tokens": 4, "longest": 27,
                     "left out": 0, "cut": 0},
    }  # fmt: skip
    assert result.train.record() == {
        "role": "train",
        "source": "rows.jsonl",
        "sha256": hashlib.sha256(Path(train).read_bytes()).hexdigest(),
        "rows": 3,
        "tokens": 94,
        "dropped": 0,
        "license": None,
    }
    assert [example.row for example in result.train.examples] == [0, 1, 2]
    assert told.warnings == []


def test_too_long_rows_stop_the_run_by_default_and_are_listed(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    with pytest.raises(DataError) as caught:
        run(tokenizer, train=rows(FITS, CUT, GONE), held_out=held, max_length=30)
    fact = caught.value.fact
    assert "2 rows longer than 30 tokens" in fact
    assert "rows.jsonl:2: 31 tokens" in fact
    assert "rows.jsonl:3: 41 tokens" in fact
    assert "rows.jsonl:1" not in fact
    assert "to mend it: set data.max_length higher, or choose data.too_long=drop" in fact
    assert caught.value.hint is None  # nothing that data.accept could change


def test_long_lists_are_cut_in_the_message_and_not_in_the_count(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    with pytest.raises(DataError, match=r"8 rows longer (.*\n)*.*rows\.jsonl:5: 31 tokens\n +and 3 more"):
        run(tokenizer, train=rows(*[CUT] * 8), held_out=held, max_length=30)


def test_a_row_of_exactly_the_limit_fits(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    result, _ = run(tokenizer, train=rows(CUT), held_out=held, max_length=31)
    assert result.train.tokens == 31
    with pytest.raises(DataError):
        run(tokenizer, train=rows(CUT), held_out=held, max_length=30)


@pytest.mark.parametrize(("limit", "max_length"), [(30, None), (30, 99), (99, 30), (None, 30), (30, 30)])
def test_the_lower_of_the_bases_limit_and_the_users_holds(
    limit: int | None, max_length: int | None, tokenizer: Tokenizer, rows: Any, held: str
) -> None:
    with pytest.raises(DataError, match="longer than 30 tokens"):
        run(tokenizer, limit, train=rows(FITS, CUT), held_out=held, max_length=max_length)


def test_dropped_rows_are_counted_and_listed(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    train = rows(FITS, CUT, GONE)
    result, told = run(tokenizer, train=train, held_out=held, max_length=30, too_long="drop")
    assert [example.row for example in result.train.examples] == [0]
    assert [Path(place).name for place in result.train.dropped] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert result.train.truncated == ()
    (warning,) = told.warnings
    assert warning.startswith("2 rows left out: longer than 30 tokens")
    assert "rows.jsonl:2" in warning
    assert "rows.jsonl:3" in warning
    assert (told.table["train"]["left out"], told.table["train"]["cut"]) == (2, 0)
    assert result.train.record()["dropped"] == 2


def test_cut_rows_keep_the_start_of_their_answer_and_rows_without_one_are_left_out(
    tokenizer: Tokenizer, rows: Any, held: str
) -> None:
    whole, _ = run(tokenizer, train=rows(FITS, CUT, GONE), held_out=held)
    result, told = run(tokenizer, train=rows(FITS, CUT, GONE), held_out=held, max_length=30, too_long="truncate")
    short, cut = result.train.examples
    assert short == whole.train.examples[0]
    assert cut.input_ids == whole.train.examples[1].input_ids[:30]
    assert cut.labels == whole.train.examples[1].labels[:30]
    assert cut.answer_tokens == 30 - 20
    assert cut.prompt_ids == whole.train.examples[1].prompt_ids
    assert [Path(place).name for place in result.train.truncated] == ["rows.jsonl:2"]
    assert [Path(place).name for place in result.train.dropped] == ["rows.jsonl:3"]
    assert told.table["train"] == {"rows": 3, "sequences": 2, "tokens": 52, "learned tokens": 2 + 10, "longest": 30,
                                   "left out": 1, "cut": 1}  # fmt: skip
    lost_end, lost_all = told.warnings
    assert lost_end.startswith("1 row cut to 30 tokens")
    assert "end-of-turn" in lost_end
    assert lost_all.startswith("1 row left out: their answer begins after 30 tokens")


@pytest.mark.parametrize(("length", "kept"), [(40, 0), (41, 1), (42, 1)])
def test_one_token_of_the_answer_decides_whether_a_row_is_kept(
    length: int, kept: int, tokenizer: Tokenizer, rows: Any, held: str
) -> None:
    train = rows(FITS, ("q" * 21, "a" * 5))  # 40 tokens before the answer
    result, _ = run(tokenizer, train=train, held_out=held, max_length=length, too_long="truncate")
    assert [example.answer_tokens for example in result.train.examples[1:]] == [length - 40] * kept
    assert len(result.train.dropped) == 1 - kept


def test_nothing_left_is_an_error_and_not_an_empty_run(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    for policy in ("drop", "truncate"):
        with pytest.raises(DataError, match=r"no train row of .*rows\.jsonl is left"):
            run(tokenizer, train=rows(GONE, GONE), held_out=held, max_length=30, too_long=policy)


def test_held_out_rows_are_under_the_same_policy(tokenizer: Tokenizer, rows: Any) -> None:
    train, held = rows(FITS), rows(("s", "b"), GONE, name="held.jsonl")
    with pytest.raises(DataError, match=r"1 row longer (.*\n)*.*held\.jsonl:2: 41 tokens"):
        run(tokenizer, train=train, held_out=held, max_length=30)
    result, told = run(tokenizer, train=train, held_out=held, max_length=30, too_long="drop")
    assert len(result.held_out.examples) == 1
    assert told.warnings[0].startswith("1 row left out")


def test_several_sequences_of_one_row_count_as_one_row(tmp_path: Path, rows: Any, held: str) -> None:
    """A template that rewrites the past makes one sequence per answer; users count rows."""
    write_tokenizer(tmp_path, THINKING)
    many = {
        "messages": [{"role": role, "content": "long text " * 5} for _ in range(3) for role in ("user", "assistant")]
    }
    train = rows(many, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    whole, _ = run(load_tokenizer(tmp_path), train=train, held_out=held)
    assert [example.row for example in whole.train.examples] == [0, 0, 0, 1]
    with pytest.raises(DataError, match="1 row longer"):
        run(load_tokenizer(tmp_path), train=train, held_out=held, max_length=30)
    result, told = run(load_tokenizer(tmp_path), train=train, held_out=held, max_length=30, too_long="drop")
    assert len(result.train.dropped) == 1
    assert told.warnings[0].startswith("1 row left out")


def test_limits_on_rows_take_the_first_ones(tokenizer: Tokenizer, rows: Any) -> None:
    train, held = rows(*[(f"q{i}", "a") for i in range(5)]), rows(*[(f"h{i}", "a") for i in range(5)], name="h.jsonl")
    result, told = run(tokenizer, train=train, held_out=held, max_train_rows=2, max_held_out_rows=3)
    assert [row.messages[0]["content"] for row in result.train.rows] == ["q0", "q1"]
    assert [row.messages[0]["content"] for row in result.held_out.rows] == ["h0", "h1", "h2"]
    assert (told.table["train"]["rows"], told.table["held-out"]["rows"]) == (2, 3)


def test_without_a_held_out_file_a_seeded_share_is_set_aside(tokenizer: Tokenizer, rows: Any) -> None:
    train = rows(*[(f"question {i}", f"answer {i}") for i in range(40)])

    def sides(**settings: Any) -> tuple[set[str], set[str], Told]:
        result, told = run(tokenizer, train=train, held_out_share=0.25, **settings)
        questions = [{str(row.messages[0]["content"]) for row in part.rows} for part in (result.train, result.held_out)]
        assert result.train.sha256 == result.held_out.sha256
        return questions[0], questions[1], told

    learned, held, told = sides(seed=1)
    assert (len(learned), len(held)) == (30, 10)
    assert not learned & held
    assert sides(seed=1)[:2] == (learned, held)
    assert sides(seed=2)[1] != held
    assert any("10 rows set aside with seed 1" in note.text for note in told.of(Note))


def test_answers_to_one_question_stay_on_one_side(tokenizer: Tokenizer, rows: Any) -> None:
    train = rows(*[(f"question {q}", f"answer {a}") for q in range(8) for a in range(3)])
    result, _ = run(tokenizer, train=train, held_out_share=0.25)
    sides = [{str(row.messages[0]["content"]) for row in part.rows} for part in (result.train, result.held_out)]
    assert (len(sides[0]), len(sides[1])) == (6, 2)
    assert not sides[0] & sides[1]


def test_one_question_alone_can_still_be_divided(tokenizer: Tokenizer, rows: Any) -> None:
    result, _ = run(tokenizer, train=rows(*[("tell a story", f"story {n}") for n in range(8)]), held_out_share=0.25)
    assert (len(result.train.rows), len(result.held_out.rows)) == (6, 2)


def test_questions_that_stand_once_are_divided_as_ever(tokenizer: Tokenizer, rows: Any) -> None:
    """Splits made before questions were kept together hold: by the SHA-256 of seed and content."""
    train = rows(*[(f"question {n}", f"answer {n}") for n in range(8)])
    result, _ = run(tokenizer, train=train, held_out_share=0.25)
    both = [*result.train.rows, *result.held_out.rows]
    ordered = sorted(both, key=lambda row: hashlib.sha256(f"0\0{(row.messages, row.text)!r}".encode()).digest())
    assert {row.where for row in result.held_out.rows} == {row.where for row in ordered[:2]}


def test_a_held_out_file_is_used_whole_and_trains_nothing(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    result, told = run(tokenizer, train=rows(FITS, CUT), held_out=held)
    assert len(result.train.rows) == 2
    assert Path(result.held_out.source).name == "held.jsonl"
    assert not any("set aside" in note.text for note in told.of(Note))


NINE = "one two three four five six seven eight nine"


@pytest.mark.parametrize(("question", "share"), [(NINE, 1.0), ("zero " + NINE[4:], 0.5), ("something else", 0.0)])
def test_held_out_questions_that_stand_in_training_are_warned_about(
    question: str, share: float, tokenizer: Tokenizer, rows: Any
) -> None:
    """Nine words are two 8-grams: both, one or none of them in training."""
    held = rows((question, "a"), ("of no matter", "b"), name="h.jsonl")
    result, told = run(tokenizer, train=rows((NINE, "x"), FITS), held_out=held)
    assert result.overlap == share
    assert any(f"{share:.2f}" in note.text for note in told.of(Note))
    assert any("with the question of a training row" in text for text in told.warnings) == (share == 1.0)


def test_answers_and_system_turns_do_not_count_as_overlap(tokenizer: Tokenizer, rows: Any) -> None:
    """Rows of one task share both by design."""
    train, held = (
        rows({"prompt": "a", "completion": NINE, "system": NINE}),
        rows({"prompt": "b", "completion": NINE, "system": NINE}, name="h.jsonl"),
    )
    assert run(tokenizer, train=train, held_out=held)[0].overlap == 0.0


def test_an_added_end_of_turn_is_announced_with_its_count(tmp_path: Path, rows: Any, held: str) -> None:
    write_tokenizer(tmp_path, None)
    _, told = run(load_tokenizer(tmp_path), train=rows(FITS, CUT), held_out=held, template="plain")
    assert [text for text in told.warnings if "end-of-sequence token was added to 3 rows" in text]


def test_without_training_data_nothing_is_read(tokenizer: Tokenizer, held: str) -> None:
    with pytest.raises(DataError, match=r"data\.train is not set") as caught:
        run(tokenizer, held_out=held)
    assert "data.train=" in str(caught.value.hint)


def test_the_rendering_of_a_run_comes_back_from_its_recorded_settings() -> None:
    spec = DataSpec(train="x.jsonl", loss="last", think="strip", template="plain", template_kwargs={"a": 1})
    assert recorded_rendering({"data": spec.model_dump(mode="json"), "train": {}}) == spec.rendering
    assert recorded_rendering({"data": {**spec.model_dump(mode="json"), "of_a_later_version": 1}}) == spec.rendering
    assert recorded_rendering({}) == recorded_rendering({"data": None}) == DataSpec().rendering


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 120), length=st.integers(2, 40))
def test_a_split_text_predicts_every_token_once_in_even_windows(
    size: int, length: int, tokenizer: Tokenizer, rows: Any
) -> None:
    text = {"text": "".join(chr(97 + at % 26) for at in range(size))}
    held = rows({"text": "zz"}, name="held.jsonl")
    whole, _ = run(tokenizer, train=rows(text), held_out=held)
    result, _ = run(tokenizer, train=rows(text), held_out=held, max_length=length, too_long="split")
    (ids,) = (example.input_ids for example in whole.train.examples)
    windows = [example.input_ids for example in result.train.examples]
    assert ids == windows[0] + [token for window in windows[1:] for token in window[1:]]
    assert all(after[0] == before[-1] for before, after in pairwise(windows))
    assert all(len(window) <= length for window in windows)
    assert max(map(len, windows)) - min(map(len, windows)) <= 1 + (len(windows) == 1)
    assert result.train.answer_tokens == whole.train.answer_tokens == len(ids) - 1
    assert (result.train.dropped, result.train.truncated) == ((), ())


def test_a_conversation_is_not_split(tokenizer: Tokenizer, rows: Any, held: str) -> None:
    with pytest.raises(DataError, match="1 row longer than 30 tokens"):
        run(tokenizer, train=rows(FITS, CUT), held_out=held, max_length=30, too_long="split")
