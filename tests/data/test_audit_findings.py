"""What becomes of findings: severity, consent, counts, masked excerpts, and ways to compute them that must agree."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.audit import Audit, DataSpec, audit, inspect
from peftkit.data.chat import Example, encode_row, encode_rows
from peftkit.data.findings import apart
from peftkit.data.findings.duplicates import check_all
from peftkit.data.findings.examine import examine_texts
from peftkit.data.findings.finding import LISTED, Hit, RowText, Tally, excerpt
from peftkit.data.findings.lengths import histogram
from peftkit.data.findings.private import masked
from peftkit.data.findings.rules import RULES
from peftkit.data.formats import Row, load_rows
from peftkit.data.overlap import Shared, shared_runs
from peftkit.data.readers import Where
from peftkit.data.template import Rendering
from peftkit.errors import ConfigError, DataError
from peftkit.events import Event, Table, Warned


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write training and held-out (question, answer) pairs; returns settings that name the files."""

    def write(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> dict[str, str]:
        for name, pairs in (("train", train), ("held_out", held_out)):
            rows = (json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs)
            (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        return {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out")}

    return write


ROWS = [(f"What stands on page {n}?", f"A picture of {n} boats.") for n in range(40)]


def row(prompt: str, answer: str, index: int = 0) -> RowText:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return RowText(Row(messages, None, None, {}, {}, Where("f.jsonl", index + 1, index)), "train", index)


def severities(result: Audit) -> dict[str, str]:
    return {finding.rule: finding.severity for finding in result.findings if finding.rule != "pad_is_stop"}


@pytest.mark.parametrize(("leaked", "severity"), [(1, "warning"), (2, "error")])
def test_a_leak_is_an_error_from_its_share_on(leaked: int, severity: str, tokenizer: Tokenizer, files: Any) -> None:
    """The rule says 5 % of the held-out rows: 1 of 40 is below, 2 of 40 are not."""
    held = [(f"Who lives in house {n}?", f"Family {n} does.") for n in range(40 - leaked)]
    given = files(ROWS, held + ROWS[:leaked])
    found = {f.rule: f for f in inspect(DataSpec(**given), tokenizer, None).findings}["leak"]
    assert (found.severity, found.count, found.share) == (severity, leaked, leaked / 40)


def test_an_error_stops_the_run_until_it_is_accepted(tokenizer: Tokenizer, files: Any) -> None:
    given = files(ROWS, ROWS[:3])
    with pytest.raises(DataError) as caught:
        audit(DataSpec(**given), tokenizer, None)
    assert "3 held-out rows (100.0%) found in the training rows" in caught.value.fact
    assert "held_out.jsonl:3: like " in caught.value.fact
    assert "to mend it: remove them from one side" in caught.value.fact
    assert caught.value.hint == "if it is meant so: data.accept=[leak]"
    told: list[Event] = []
    result = audit(DataSpec(**given, accept=("leak",)), tokenizer, None, told.append)
    (leak,) = [finding for finding in result.findings if finding.rule == "leak"]
    assert (leak.severity, leak.accepted) == ("note", True)
    assert not [event for event in told if isinstance(event, Warned)]
    (table,) = [event for event in told if isinstance(event, Table) and event.title == "findings"]
    assert ("note", "leak") in [line[:2] for line in table.rows]


def test_every_error_is_told_at_once(tokenizer: Tokenizer, files: Any) -> None:
    rows = [*ROWS, ("Which mark?", "This one: <|im_end|>"), ("How long?", "x" * 300)]
    given = files(rows, ROWS[:3])
    with pytest.raises(DataError) as caught:
        audit(DataSpec(**given, max_length=200), tokenizer, None)
    assert [rule for rule in RULES if f"- {rule}: " in caught.value.fact] == ["too_long", "unusable", "leak"]
    assert caught.value.fact.startswith("3 findings stop this run")


def test_one_warning_for_each_rule_and_not_for_each_row(tokenizer: Tokenizer, files: Any) -> None:
    given = files(ROWS + ROWS[:9], [("Who?", "Nobody.")])
    told: list[Event] = []
    audit(DataSpec(**given), tokenizer, None, told.append)
    (warning,) = [event for event in told if isinstance(event, Warned)]
    assert warning.text.startswith("9 rows repeating an earlier row word for word: ")
    assert warning.text.endswith("and 4 more")


@pytest.mark.parametrize(
    ("name", "says"), [("leek", "did you mean 'leak'"), ("too_long", "cannot be accepted"), ("zz", "known: too_long")]
)
def test_only_findings_that_leave_a_choice_can_be_accepted(name: str, says: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=says):
        DataSpec(accept=(name,))


def test_the_record_has_no_rows_but_examples(tokenizer: Tokenizer, files: Any) -> None:
    result = inspect(DataSpec(**files(ROWS + ROWS[:9], [("Who?", "Nobody.")])), tokenizer, None)
    record = json.loads(json.dumps(result.record()))
    assert set(record) == {"findings", "tokens", "parts", "overlap"}
    (found,) = [finding for finding in record["findings"] if finding["rule"] == "duplicate"]
    assert (found["count"], len(found["examples"])) == (9, LISTED)
    assert set(found["examples"][0]) == {"where", "excerpt"}
    assert sum(record["tokens"]["counts"]) == 50
    assert len(record["tokens"]["edges"]) == len(record["tokens"]["counts"]) + 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_the_histogram_counts_every_sequence_between_its_edges(lengths: list[int]) -> None:
    found = histogram([Example([0] * n, [0] * n, 0, 0, "") for n in lengths])
    edges = found["edges"]
    expected = [sum(low < n <= high for n in lengths) for low, high in pairwise(edges)]
    assert found["counts"] == expected
    assert sum(expected) == len(lengths)


def test_a_row_counts_once_for_a_rule() -> None:
    tally = Tally(2, 0)
    tally.add(row("q", "a", 0), [Hit("email"), Hit("phone"), Hit("email")])
    tally.add(row("q", "a", 1), [Hit("email")])
    assert {finding.rule: finding.count for finding in tally.findings()} == {"email": 2, "phone": 1}


SECRET = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"


@given(st.text(max_size=120), st.text(max_size=120), st.integers(0, 200))
def test_no_window_onto_a_row_shows_its_secret(before: str, after: str, start: int) -> None:
    text = f"{before} {SECRET} {after}"
    shown = excerpt(text, Hit("html", min(start, len(text)), min(start + 5, len(text))))
    assert "16C7e42F" not in shown
    assert "B4a" not in shown.replace(before, "").replace(after, "")
    assert len(masked(text)) == len(text)


def test_two_processes_find_what_one_finds(tokenizer: Tokenizer, files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS, *ROWS[:3], ("Where?", "Write to ruth.amsel@marlow-bakery.de now."), ("Caf\ufffd?", "N/A")]
    given = files(rows, ROWS[:2])
    train, held = load_rows(given["train"]).rows, load_rows(given["held_out"]).rows
    monkeypatch.setattr(apart, "_MANY", 1)
    second = apart.examine_apart(train, held, tokenizer.control, None)().findings()
    assert second == examine_texts(train, held, tokenizer.control).findings()
    assert {"duplicate", "leak", "email", "replacement_char", "empty_answer"} <= {finding.rule for finding in second}


def test_rows_encoded_in_batches_are_those_encoded_alone(tokenizer: Tokenizer, files: Any) -> None:
    """More rows than a batch, some of several turns, some that are refused."""
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = [row(f"q{n}", "a" if n % 50 else "<|im_end|>", n).row for n in range(600)]
    rows += [Row(tuple(turns), None, None, {}, {}, Where("f", 9, 9)), Row((), "text", None, {}, {}, Where("f", 1, 1))]
    for rendering in (Rendering(), Rendering(loss="last")):
        for index, found in enumerate(encode_rows(rows, tokenizer, rendering)):
            if isinstance(found, DataError):
                with pytest.raises(DataError) as caught:
                    encode_row(rows[index], index, tokenizer, rendering)
                assert caught.value.fact == found.fact
            else:
                assert found == encode_row(rows[index], index, tokenizer, rendering)


words = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


@settings(deadline=None)
@given(st.lists(words, max_size=4), st.lists(words, max_size=6), st.integers(1, 2))
def test_shared_runs_equal_the_naive_definition(texts: list[str], inside: list[str], n: int) -> None:
    """With at most six texts no run is the task's own wording, which is more than ten."""

    def grams(text: str) -> set[tuple[str, ...]]:
        parts = text.split()
        return {tuple(parts[at : at + n]) for at in range(len(parts) - n + 1)}

    expected = {}
    for at, text in enumerate(texts):
        counts = [len(grams(text) & grams(other)) for other in inside]
        if counts and max(counts) >= 6:
            expected[at] = Shared(counts.index(max(counts)), max(counts) / len(grams(text)))
    assert shared_runs(texts, inside, n) == expected


def test_near_duplicates_are_those_that_brute_force_finds() -> None:
    """Thirty texts, each with copies that have 1 to 12 words exchanged; 0.8 is the Jaccard share of runs of 3 words."""
    draw = random.Random(3)
    vocabulary = [f"w{n}" for n in range(4000)]
    texts: list[list[str]] = []
    for _ in range(30):
        text = draw.sample(vocabulary, 60)
        texts += [text, *([draw.choice(vocabulary) if at in changed else word for at, word in enumerate(text)]
                          for changed in (set(draw.sample(range(60), k)) for k in (1, 2, 4, 12)))]  # fmt: skip
    rows = [row(" ".join(text), "yes", at) for at, text in enumerate(texts)]
    tally = Tally(len(rows), 0)
    check_all(rows, [], tally)
    found = {finding.rule: finding.count for finding in tally.findings()}

    def runs(text: str) -> set[str]:
        parts = text.split()
        return {" ".join(parts[at : at + 3]) for at in range(len(parts) - 2)}

    kept: list[set[str]] = []
    near = 0
    for one in (runs(f"{r.prompt} yes") for r in rows):
        if any(len(one & other) / len(one | other) >= 0.8 for other in kept):
            near += 1
        else:
            kept.append(one)
    assert 0 < near < 120
    assert found == {"near_duplicate": near}


def test_every_rule_has_words_and_a_way_to_mend_it() -> None:
    for rule in RULES.values():
        text = rule.says.format(rows="2 rows", share="1.0%", detail="x")
        assert text[0] != " "
        assert "{" not in text.replace("{{", "")
        assert rule.mend or rule.id == "pad_is_stop"
        assert rule.error_from is None or rule.severity == "warning"
