"""A mixture's shares are those of its weights; its rows are told apart by file; nothing held out is trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.config import resolve
from peftkit.data.audit import Audit, DataSpec, inspect
from peftkit.data.mixture import counts, digest, drawn, mix
from peftkit.data.tasks.spec import TaskSpec
from peftkit.errors import DataError
from peftkit.events import Event, Table

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)
weights = st.floats(0.2, 5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def write(path: Path, *questions: str) -> str:
    path.write_text("".join(json.dumps({"prompt": q, "completion": f"to {q}"}) + "\n" for q in questions))
    return str(path)


def audited(tokenizer: Tokenizer, **settings: Any) -> tuple[Audit, list[Event]]:
    told: list[Event] = []
    return inspect(DataSpec(**settings), tokenizer, None, told.append), told


def asked(rows: Any) -> list[str]:
    return [row.messages[0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("of", "by", "rows"),
    [
        ((100, 900), (1, 1), [500, 500]),  # each row of the small set five times, five ninths of the large one
        ((100, 900), (1, 9), [100, 900]),
        ((3, 7), (0.7, 0.3), [7, 3]),  # as decimals: floats would give the 7 a remainder
        ((5, 5), (2, 1), [7, 3]),  # 6.67 and 3.33: the larger remainder is rounded up
        ((4, 4, 4), (1, 1, 2), [3, 3, 6]),
        ((6,), (0.1,), [6]),
    ],
)
def test_counts_are_the_shares_of_the_weights(of: Any, by: Any, rows: list[int]) -> None:
    assert counts(of, by) == rows


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=4), st.integers(0, 3))
def test_shares_are_met_and_no_row_stands_in_an_epoch_more_often_than_it_must(
    given_sets: list[tuple[int, float]], seed: int
) -> None:
    sets = [[(number, at) for at in range(size)] for number, (size, _) in enumerate(given_sets)]
    by = [weight for _, weight in given_sets]
    total = sum(map(len, sets))
    assume(min(by) / sum(by) * total >= 1)  # a smaller weight is refused: below
    mixed = mix(sets, by, seed=seed)
    assert len(mixed) == total
    assert mixed == mix(sets, by, seed=seed)
    for number, rows in enumerate(sets):
        times = Counter(row for row in mixed if row[0] == number)
        assert abs(sum(times.values()) - total * by[number] / sum(by)) < 1 + 1e-9
        least = sum(times.values()) // len(rows)
        assert {times[row] for row in rows} <= {least, least + 1}


@settings(deadline=None)
@given(sizes)
def test_weights_that_are_the_sizes_give_every_row_once(of: list[int]) -> None:
    sets = [[(number, at) for at in range(size)] for number, size in enumerate(of)]
    assert sorted(mix(sets, of, seed=0)) == [row for rows in sets for row in rows]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.2, 5), st.integers(1, 120))
def test_the_first_rows_have_the_shares_of_all(one: int, other: int, weight: float, most: int) -> None:
    of = [one, other]
    try:
        expected = counts(of, [weight, 1])
    except DataError:
        return
    first = mix([["a"] * one, ["b"] * other], [weight, 1], seed=0)[:most]
    assert abs(first.count("a") - len(first) * expected[0] / sum(of)) <= 1


def test_another_seed_draws_other_rows() -> None:
    sets = [list(range(50)), list(range(100, 150))]
    draws = {tuple(sorted(mix(sets, [1, 3], seed=seed))) for seed in range(5)}
    assert len(draws) == 5


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 5))
def test_a_smaller_draw_is_part_of_a_larger_one(size: int, count: int, seed: int) -> None:
    rows = list(range(size))
    found = drawn(rows, count, seed)
    assert len(found) == min(size, count)
    assert found == sorted(set(found))
    assert set(found) <= set(drawn(rows, count + 3, seed))


@pytest.mark.parametrize(
    ("of", "by", "fact"),
    [((5, 0), (1, 1), "5, 0 rows"), ((5, 5), (1, 0), "weights"), ((5, 5), (1000, 1), "gives none"), ((), (), "no")],
)
def test_a_mixture_that_would_leave_out_a_set_is_refused(of: Any, by: Any, fact: str) -> None:
    with pytest.raises(DataError, match=fact):
        counts(of, by)


def test_the_digest_is_of_the_sets_and_their_weights() -> None:
    assert digest(["aa", "bb"], [1, 2]) == digest(["aa", "bb"], [1.0, 2.0])
    others = [(["aa", "bb"], [2, 1]), (["bb", "aa"], [1, 2]), (["aa", "bc"], [1, 2]), (["aa"], [1])]
    assert len({digest(*other) for other in [(["aa", "bb"], [1, 2]), *others]}) == 5


@pytest.mark.parametrize(("spec", "more"), [(DataSpec, {}), (TaskSpec, {"task": "regression"})])
@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"train": "a.jsonl", "mixture": {"b.jsonl": 1.0}}, "both set"),
        ({"mixture": {"a.jsonl": 0.0, "b.jsonl": 1.0}}, r"above 0, and \{'a.jsonl': 0.0\}"),
        ({"mixture": {"x/a.jsonl": 1.0, "y/a.jsonl": 1.0}}, "several files are named a.jsonl"),
    ],
)
def test_settings_that_say_two_things_are_refused(spec: Any, more: Any, settings: Any, fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        spec(**settings, **more)


def test_a_mixture_is_given_on_the_command_line() -> None:
    spec = resolve(DataSpec, overrides=["mixture={data/a.jsonl: 3, b.jsonl: 0.5}"]).config
    assert spec.mixture == {"data/a.jsonl": 3.0, "b.jsonl": 0.5}


def test_rows_of_a_mixture_keep_their_file_and_nothing_held_out_is_trained_on(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = write(tmp_path / "small.jsonl", *(f"s{n}" for n in range(10)), *(f"both{n}" for n in range(10)))
    large = write(tmp_path / "large.jsonl", *(f"l{n}" for n in range(50)), *(f"both{n}" for n in range(10)))
    result, told = audited(tokenizer, mixture={small: 3, large: 1}, held_out_share=0.3, too_long="drop")
    train, held = result.train, result.held_out
    assert not set(asked(train.rows)) & set(asked(held.rows))
    assert {*asked(train.rows), *asked(held.rows)} >= {f"both{n}" for n in range(10)}
    assert Counter(Counter(asked(held.rows)).values()).keys() <= {1, 2}  # a row of both files stands there twice
    where = Counter(row.where.file for row in train.rows)
    assert where["small.jsonl"] == pytest.approx(0.75 * len(train.rows), abs=1)
    assert {row.where.file for row in held.rows} == {"small.jsonl", "large.jsonl"}
    assert len(train.examples) == len(train.rows)
    (table,) = [event for event in told if isinstance(event, Table) and event.title == "mixture"]
    assert [line[0] for line in table.rows] == [small, large]
    assert [line[4] for line in table.rows] == [where["small.jsonl"], where["large.jsonl"]]
    assert train.record()["source"] == "small.jsonl (3) + large.jsonl (1)"
    assert str(tmp_path) not in str(train.record())


def test_the_copies_of_a_mixture_are_no_duplicates_and_a_row_in_two_files_is_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "a question of many different words that nobody asks twice, number {}"
    a = write(tmp_path / "a.jsonl", *(text.format(f"a{n}") for n in range(4)))
    b = write(tmp_path / "b.jsonl", *(f"{n} is another one" for n in range(40)))
    held = write(tmp_path / "held.jsonl", "held")

    def duplicates(**settings: Any) -> int:
        found = audited(tokenizer, held_out=held, **settings)[0].findings
        return sum(finding.count for finding in found if finding.rule == "duplicate")

    assert duplicates(mixture={a: 1, b: 1}) == 0
    again = write(tmp_path / "again.jsonl", *(text.format(f"a{n}") for n in range(4)))
    assert duplicates(mixture={a: 1, again: 1}) > 0


def test_problems_of_every_file_of_a_mixture_are_listed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = {}
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        good = [json.dumps({"prompt": f"{name}{n}", "completion": "yes"}) for n in range(5)]
        path.write_text("\n".join([*good, json.dumps({"prompt": f"{name}5", "completion": 5})]) + "\n")
        files[str(path)] = 1.0
    held = write(tmp_path / "held.jsonl", "held")
    result, _ = audited(tokenizer, mixture=files, held_out=held)
    (finding,) = [finding for finding in result.findings if finding.rule == "unreadable"]
    assert finding.count == 2
    assert {seen.where for seen in finding.examples} == {"a.jsonl:6", "b.jsonl:6"}


def test_a_set_whose_rows_are_all_held_out_elsewhere_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = [f"q{n}" for n in range(6)]
    a = write(tmp_path / "a.jsonl", *whole)
    found = []
    for n in range(6):
        for other in range(n):
            b = write(tmp_path / f"b{n}{other}.jsonl", whole[n], whole[other])
            try:
                audited(tokenizer, mixture={a: 1, b: 1}, held_out_share=0.5)
            except DataError as error:
                found.append(str(error))
    assert found
    assert all("is left to train on" in text for text in found)


def test_drawn_rows_are_another_sample_for_another_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *(f"q{n}" for n in range(40)))
    held = write(tmp_path / "held.jsonl", "held")

    def first(draw: int | None, most: int = 8) -> list[str]:
        return asked(audited(tokenizer, train=rows, held_out=held, max_train_rows=most, draw=draw)[0].train.rows)

    assert first(None) == [f"q{n}" for n in range(8)]
    draws = [first(seed) for seed in range(4)]
    assert len({tuple(rows) for rows in draws}) == 4
    assert all(len(set(rows)) == 8 for rows in draws)
    assert first(0) == draws[0]
    assert set(first(0, 4)) < set(draws[0])
