"""Both answers stand behind the same prompt with the mask of supervised rows; what would be lost is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.chat import encode_row
from peftkit.data.preference.audit import audit_preference, inspect_preference
from peftkit.data.preference.encode import encode_preferences, mismatched
from peftkit.data.preference.rows import PreferenceRow, load_preferences
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.data.template import Rendering
from peftkit.errors import DataError
from peftkit.events import Event, Warned

SIDES = ("chosen", "rejected")


def pair(index: int, better: str = "", worse: str = "") -> dict[str, str]:
    return {
        "prompt": f"what is the square of {index}?",
        "chosen": better or f"it is {index * index}",
        "rejected": worse or f"perhaps {index * index + 1}",
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(records: list[dict[str, Any]]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_the_mask_is_that_of_supervised_rows(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    found = audit_preference(PreferenceSpec(train=written([pair(i) for i in range(20)])), tokenizer, 512)
    assert (len(found.train.examples), len(found.held_out.examples)) == (18, 2)
    for example in found.train.examples:
        row = found.train.rows[example.row]
        assert example.rejected is not None
        assert row.rejected is not None
        assert example.chosen.prompt_ids == example.rejected.prompt_ids
        for sequence, source in ((example.chosen, row.chosen), (example.rejected, row.rejected)):
            (supervised,) = encode_row(source, example.row, tokenizer, Rendering())
            assert sequence == supervised
            assert sequence.labels[-1] in tokenizer.stop_ids
            assert sum(label in tokenizer.stop_ids for label in sequence.labels) == 1
        assert example.input_ids == example.chosen.input_ids + example.rejected.input_ids
        assert len(example.labels) == len(example.input_ids)
    assert found.train.tokens == sum(len(example.input_ids) for example in found.train.examples)
    assert found.record()["parts"][0]["rows"] == 18


def test_only_the_last_answer_of_a_conversation_counts(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    def talk(index: int, answer: str) -> list[dict[str, str]]:
        said = ("user", f"say {index}"), ("assistant", "an earlier answer"), ("user", "again"), ("assistant", answer)
        return [{"role": role, "content": content} for role, content in said]

    rows = [{"chosen": talk(i, f"it is {i}"), "rejected": talk(i, "no")} for i in range(10)]
    found = audit_preference(PreferenceSpec(train=written(rows)), tokenizer, 512)
    for example in found.train.examples:
        learned = [label for label in example.chosen.labels if label >= 0]
        assert tokenizer.decode(learned[:-1]).startswith("it is ")
        assert example.rejected is not None
        assert tokenizer.decode([label for label in example.rejected.labels if label >= 0][:-1]) == "no"


def test_pairs_are_split_by_prompt(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    rows = [{**pair(i), "rejected": f"wrong answer {at}"} for i in range(12) for at in range(3)]
    for kind in ("pairs", "labelled"):
        spec = PreferenceSpec(kind=kind, train=written(rows), held_out_share=0.25)
        found = inspect_preference(spec, tokenizer, 512)
        sides = [{tuple(example.prompt_ids) for example in part.examples} for part in (found.train, found.held_out)]
        assert not sides[0] & sides[1]
        assert [len(side) for side in sides] == [9, 3]


def test_no_answer_is_cut(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    rows = [pair(i) for i in range(18)] + [pair(18, worse="long " * 60), pair(19, better="long " * 60)]
    with pytest.raises(DataError, match=r"2 rows longer than 200 tokens(.|\n)*rows\.jsonl:19") as error:
        audit_preference(PreferenceSpec(train=written(rows), max_length=200), tokenizer, None)
    assert "truncate" not in str(error.value)
    spec = PreferenceSpec(train=written(rows), max_length=200, too_long="drop")
    found = audit_preference(spec, tokenizer, None)
    assert sorted(found.train.dropped + found.held_out.dropped) == ["rows.jsonl:19", "rows.jsonl:20"]
    assert len(found.train.examples) + len(found.held_out.examples) == 18
    with pytest.raises(ValidationError):
        PreferenceSpec.model_validate({"too_long": "truncate"})


def test_what_is_no_choice_between_two_answers_is_refused(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    same = {**pair(8), "chosen": "<think>a</think>4", "rejected": "<think>b</think>4"}
    source = written([*map(pair, range(8)), same])
    with pytest.raises(DataError, match="both answers are the same tokens"):
        audit_preference(PreferenceSpec(train=source, think="strip"), tokenizer, None)
    read = load_preferences(source, "pairs")
    crossed = PreferenceRow(read.rows[0].chosen, read.rows[1].rejected)
    found = encode_preferences([crossed, read.rows[2]], read, "train", tokenizer, PreferenceSpec(), None)
    assert len(found.part.examples) == 1
    ((where, error),) = found.refused
    assert where == "rows.jsonl:1"
    assert "another prompt before 'rejected'" in error.fact


def test_control_tokens_and_identical_answers_stop_a_run(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    rows = [pair(i) for i in range(18)]
    with pytest.raises(DataError, match=r"control token"):
        audit_preference(PreferenceSpec(train=written([*rows, pair(18, worse="a<|im_end|>b")])), tokenizer, None)
    with pytest.raises(DataError, match=r"rows\.jsonl:19: rejected: found the same answer"):
        audit_preference(PreferenceSpec(train=written([*rows, pair(18, "same", "same")])), tokenizer, None)


def test_that_the_better_answers_are_the_longer_ones_is_told(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    told: list[Event] = []
    rows = [pair(i, better=f"it is surely {i * i}, as anyone can see", worse=f"no {i}") for i in range(40)]
    found = audit_preference(PreferenceSpec(train=written(rows)), tokenizer, None, told.append)
    assert found.lengths["chosen_longer"] == 1.0
    assert found.lengths["chosen"] > found.lengths["rejected"]
    assert any(isinstance(event, Warned) and "longer one in 100% of 36" in event.text for event in told)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    again = audit_preference(PreferenceSpec(train=written(turned)), tokenizer, None)
    assert "length_bias" not in {finding.rule for finding in again.findings}


def test_mismatched_answers_are_to_other_prompts(tokenizer: Tokenizer, written: Callable[..., str]) -> None:
    spec = PreferenceSpec(kind="labelled", train=written([pair(i) for i in range(20)]))
    found = audit_preference(spec, tokenizer, 512)
    examples = found.train.examples
    assert len(examples) == 36
    assert [example.desirable for example in examples[:4]] == [True, False, True, False]
    prompts = {tuple(e.chosen.input_ids[e.chosen.answer_start :]): tuple(e.prompt_ids) for e in examples}
    lent = []
    for example in [again for seed in range(10) for again in mismatched(examples, seed, 512)]:
        assert example.mismatched is not None
        assert example.mismatched.prompt_ids == example.prompt_ids
        answer = tuple(example.mismatched.input_ids[example.mismatched.answer_start :])
        assert prompts[answer] != tuple(example.prompt_ids)  # the row beside it answers the same prompt
        lent.append(answer)
    assert len(set(lent)) > 18  # not one answer for all
    assert mismatched(examples, spec.seed, 512) == list(examples)
    assert mismatched(examples, 1, 512) != list(examples)
    cut = mismatched(examples, 0, max(len(example.prompt_ids) for example in examples) + 1)
    assert all(example.mismatched.answer_tokens >= 1 for example in cut)
    with pytest.raises(DataError, match="1 distinct prompt"):
        mismatched(examples[:2], 0, None)
