"""Base against adapter on the same rows: exact where it must be, silent about the rows, and honest about small sets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import write_base

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.audit import DataSpec, Part, encode
from peftkit.data.formats import load_rows
from peftkit.errors import DataError
from peftkit.evaluation.held_out import COLUMNS, Comparison, Contestant, Held, Measured, compare, prepare
from peftkit.evaluation.metrics import json_fields
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Warned, silent
from peftkit.generation.requests import Completion

SECRET = "zanzibar"
QUICK = EvaluateSpec(max_new_tokens=4, retention_passages=3, batch_size=4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("lively")
    write_base(folder, seed=5, initializer_range=0.2, tie_word_embeddings=False)
    return load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=32, device="cpu"), folder / "cache")


def records(number: int = 6) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{SECRET} question {i}", "completion": f"{SECRET} " + "yes " * (i + 1), "kind": "ab"[i % 2]}
        for i in range(number)
    ]


@pytest.fixture
def rows(tmp_path: Path, backbone: Backbone) -> Callable[..., Part]:
    def build(given: list[dict[str, Any]], **settings: Any) -> Part:
        path = tmp_path / "held.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in given))
        source = load_rows(path)
        spec = DataSpec(**settings)
        return encode(source.rows, source, "held_out", backbone.tokenizer, spec, spec.max_length)

    return build


def contestants(backbone: Backbone, amount: float) -> tuple[Contestant, Contestant]:
    """The base, and the base with one weight moved by `amount` while it is used."""

    @contextmanager
    def moved() -> Iterator[Any]:
        weight = backbone.model.lm_head.weight
        before = weight.detach().clone()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight += amount * noise
        try:
            yield backbone.model
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return Contestant("base", lambda: nullcontext(backbone.model)), Contestant("moved", moved)


def comparison(backbone: Backbone, part: Part, amount: float, spec: EvaluateSpec = QUICK, **more: Any) -> Comparison:
    base, adapter = contestants(backbone, amount)
    held = prepare(part, DataSpec().rendering, spec, backbone, silent)
    return compare(base, adapter, held, spec, backbone, **more)


def nll(model: Any, ids: list[int], labels: list[int]) -> float:
    """Written out in float64: the sum of -log p of every label."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0]
    model.float()
    total = 0.0
    for position, label in enumerate(labels[1:]):
        if label != -100:
            total += float(torch.logsumexp(logits[position], 0) - logits[position][label])
    return total


def test_the_base_against_itself_changes_by_exactly_nothing(backbone: Backbone, rows: Any) -> None:
    result = comparison(backbone, rows(records()), 0.0)
    for interval in (result.learned, result.forgotten, result.gained()):
        assert interval is not None
        assert (interval.point, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert not interval.excludes(0.0)
    figures = result.figures()
    assert figures["before"] == figures["after"]


def test_a_change_is_seen_with_its_sign(backbone: Backbone, rows: Any) -> None:
    result = comparison(backbone, rows(records()), 0.5)
    assert result.learned.point > 0
    assert result.learned.excludes(0.0)
    assert result.forgotten is not None
    assert result.forgotten.excludes(0.0)
    figures = result.figures()
    before, after = (figures[side]["answer_nll"]["point"] for side in ("before", "after"))
    assert figures["other"]["answer_nll_change"]["point"] == pytest.approx(after - before, rel=1e-12)


def test_the_figure_is_the_mean_over_answer_tokens_and_nothing_else(backbone: Backbone, rows: Any) -> None:
    part = rows(records())
    result = comparison(backbone, part, 0.0)
    sums = [nll(backbone.model, e.input_ids, e.labels) for e in part.examples]
    tokens = [len(row.messages[-1]["content"]) + 1 for row in part.rows]  # a byte a token, and the end of turn
    assert result.held.answer_tokens == tokens
    # float32 forward of two layers, 64 wide, sums of about 30 tokens: a relative 2⁻²³ per product, few hundred of them
    assert result.base.nll == pytest.approx(sums, rel=300 * 2**-23)
    expected = math.fsum(sums) / sum(tokens)
    assert result.figures()["before"]["answer_nll"]["point"] == pytest.approx(expected, rel=300 * 2**-23)


def test_figures_hold_no_text_of_any_row_and_samples_do(backbone: Backbone, rows: Any) -> None:
    spec = QUICK.model_copy(update={"instructions": f"Say {SECRET}.", "shots": 1, "group_by": "kind"})
    part = rows(records())
    result = comparison(backbone, part, 0.1, spec, train_rows=part.rows)
    text = json.dumps(result.figures())
    assert SECRET not in text
    assert "question" not in text
    assert "held.jsonl" not in text
    samples = result.samples()
    assert len(samples) == 6
    assert all(SECRET in sample["reference"] for sample in samples)
    names = {"where", "reference", "base + instructions", "base + 1 examples", "adapter", "score", "detail"}
    assert all(set(sample) == names for sample in samples)


@pytest.mark.parametrize("value", ["1", "null"])
def test_an_invented_field_name_is_text_too_and_stays_out_of_the_figures(value: str, rows: Any) -> None:
    """An untrained base may answer `{"<the customer's words>": …}`: only fields of the references may be named."""
    part = rows([{"prompt": f"{SECRET}?", "completion": '{"city": "x"}'} for _ in range(2)])
    held = Held(part, DataSpec().rendering, None, "json_fields", "")
    answer = f'{{"{SECRET} said": {value}, "city": "x"}}'
    scores = [json_fields(answer, '{"city": "x"}', {}) for _ in part.rows]
    base = Measured("base", [1.0, 2.0], [], [Completion(answer, [5], True)] * 2, scores)
    text = json.dumps(Comparison(held, base, base, (), EvaluateSpec()).figures())
    assert '"city"' in text
    assert SECRET not in text


@pytest.mark.parametrize("number", [1, 2])
def test_figures_of_very_few_rows_are_still_json(number: int, backbone: Backbone, rows: Any) -> None:
    """One row says nothing about the spread; the manifest, canonical JSON, knows no infinity."""
    spec = QUICK.model_copy(update={"retention_passages": number})
    result = comparison(backbone, rows(records(number)), 0.1, spec)
    figures = result.figures()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_scores_per_group_are_counted_and_a_missing_column_is_named(backbone: Backbone, rows: Any) -> None:
    spec = QUICK.model_copy(update={"group_by": "kind"})
    result = comparison(backbone, rows(records(5)), 0.0, spec)
    assert result.by_group(result.adapter) == [("a", 3, 0.0), ("b", 2, 0.0)]
    # A column may hold people's names: the figures say how many groups there are, not how they are called.
    assert result.figures()["other"]["by_kind"] == {"groups": 2, "lowest": 0.0, "median": 0.0}
    missing = QUICK.model_copy(update={"group_by": "sort"})
    with pytest.raises(DataError, match=r"evaluate\.group_by=sort") as caught:
        comparison(backbone, rows(records(2)), 0.0, missing).figures()
    assert "kind" in str(caught.value.expected)


def test_the_prompted_base_is_the_rival_and_the_plain_one_is_not_generated(backbone: Backbone, rows: Any) -> None:
    spec = QUICK.model_copy(update={"instructions": "Answer yes.", "shots": 2})
    part = rows(records())
    result = comparison(backbone, part, 0.0, spec, train_rows=part.rows)
    assert [measured.name for measured in result.prompted] == ["base + instructions", "base + 2 examples"]
    assert result.base.answers == []
    assert len(result.base.nll) == 6
    assert all(measured.nll == [] and len(measured.answers) == 6 for measured in result.prompted)
    table = result.rows()
    assert [line[0] for line in table] == ["base", "base + instructions", "base + 2 examples", "moved"]
    assert {len(line) for line in table} == {len(COLUMNS)}
    assert set(result.figures()["other"]) >= {"base + instructions", "base + 2 examples", "score_change"}


def test_examples_that_the_base_has_no_positions_for_are_named_and_left_out(backbone: Backbone, rows: Any) -> None:
    spec = QUICK.model_copy(update={"instructions": "Answer yes.", "shots": 1})
    long = rows([{"prompt": "x" * 600, "completion": "yes", "kind": "a"}]).rows
    events: list[Any] = []
    result = comparison(backbone, rows(records()), 0.0, spec, train_rows=long, report=events.append)
    assert [measured.name for measured in result.prompted] == ["base + instructions"]
    (warned,) = [event for event in events if isinstance(event, Warned)]
    assert warned.text.startswith("base + 1 examples is not measured: its prompts have up to 6")
    assert "the base has 512 positions" in warned.text


def test_prompts_that_the_base_has_no_positions_for_count_as_unanswered(backbone: Backbone, rows: Any) -> None:
    part = rows([*records(2), {"prompt": "x" * 600, "completion": "yes", "kind": "a"}], too_long="truncate")
    events: list[Any] = []
    result = comparison(backbone, part, 0.0, QUICK, report=events.append)
    assert [answer.finish == "failed" for answer in result.base.answers] == [False, False, True]
    assert result.base.scores[2].value == 0
    told = [event.text for event in events if isinstance(event, Warned)]
    assert told == ["1 of 3 prompts have as many tokens as the base has positions (512): they count as unanswered"] * 2


def test_instructions_are_a_text_or_a_file_and_a_lost_file_is_no_text(
    backbone: Backbone, rows: Any, tmp_path: Path
) -> None:
    part = rows(records(2))
    (tmp_path / "schema.txt").write_text("Answer yes.\n")
    given = [
        comparison(backbone, part, 0.0, QUICK.model_copy(update={"instructions": text})).prompted[0].answers
        for text in ("Answer yes.", str(tmp_path / "schema.txt"))
    ]
    assert given[0] == given[1]
    with pytest.raises(DataError, match="neither a file nor a sentence"):
        comparison(backbone, part, 0.0, QUICK.model_copy(update={"instructions": str(tmp_path / "lost.txt")}))


def test_figures_taken_earlier_are_not_taken_again(backbone: Backbone, rows: Any) -> None:
    part = rows(records())
    first = comparison(backbone, part, 0.1)

    def refuse() -> Any:
        raise AssertionError("the base was measured twice")

    _, adapter = contestants(backbone, 0.1)
    again = compare(Contestant("base", refuse), adapter, first.held, QUICK, backbone, before=first.base)
    assert again.figures() == first.figures()


def test_likelihood_only_generates_nothing(backbone: Backbone, rows: Any) -> None:
    spec = QUICK.model_copy(update={"max_generated_rows": 0, "retention": None})
    result = comparison(backbone, rows(records()), 0.1, spec)
    assert (result.base.answers, result.adapter.answers, result.gained(), result.forgotten) == ([], [], None, None)
    assert result.samples() == []
    assert set(result.figures()["after"]) == {"answer_nll"}


def test_rows_that_were_left_out_are_not_generated_either(backbone: Backbone, rows: Any) -> None:
    """A row above the limit is out of the likelihood; its answer would be scored on a prompt the base cannot hold."""
    given = [*records(2), {"prompt": "long " * 40, "completion": "no", "kind": "a"}, *records(1)]
    part = rows(given, max_length=100, too_long="drop")
    assert len(part.examples) == 3
    result = comparison(backbone, part, 0.0)
    assert len(result.base.nll) == 3
    assert len(result.adapter.answers) == 3


def test_text_rows_have_a_likelihood_and_no_answers(backbone: Backbone, rows: Any) -> None:
    result = comparison(backbone, rows([{"text": f"{SECRET} {i}"} for i in range(3)]), 0.1)
    assert len(result.adapter.nll) == 3
    assert result.adapter.answers == []
    assert SECRET not in json.dumps(result.figures())
