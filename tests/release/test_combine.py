"""Combining registered adapters: the published LoRA is the sum it says, judged first, and nothing else is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_bases import write_base
from transformers import AutoModelForCausalLM

from peftkit.deltas.combining.methods import How
from peftkit.errors import BaseMismatch, ConfigError, DeltaError, PeftkitError
from peftkit.events import Event, Warned
from peftkit.registry.manifest import Version
from peftkit.release.combine import Outcome, combine_adapters
from peftkit.release.gate import likelihoods
from peftkit.release.judging import GateSettings, Judging, SearchSettings
from peftkit.release.recommend import needs_choice
from peftkit.release.rows import held_out_rows
from peftkit.tuning.attach import attach

PROMPT = torch.tensor([list(range(3, 40))])
LETTERS = {"one": "ab", "two": "xy"}


@pytest.fixture(scope="module")
def pair(shared: Any, taught: dict[str, Path]) -> Any:
    """A lab with the trained adapters `one` and `two`, and held-out rows for each."""
    for name, letters in LETTERS.items():
        shared.taught(name, taught[name])
        shared.rows(60, f"{name}.jsonl", seed=9, letters=letters)
    return shared


def rows(lab: Any, *names: str) -> dict[str, Path]:
    return {name: lab.folder / f"{name}.jsonl" for name in names or LETTERS}


def together(
    lab: Any, weighted: Sequence[tuple[str, float]], method: str = "exact", name: str = "both", **more: Any
) -> Outcome:
    places = {"cache": lab.cache, "runs": lab.folder / "runs"}
    return combine_adapters(lab.registry, weighted, How(method), save_as=name, **places, **more)


def delta_weights(version: Version) -> dict[str, torch.Tensor]:
    """ΔW of every layer in float64, from the files alone."""
    tensors = load_file(str(version.path / "adapter_model.safetensors"))
    config = json.loads((version.path / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    keys = [key for key in tensors if key.endswith("lora_A.weight")]
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * (tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double())
        for key in keys
    }


def payload(version: Version) -> dict[str, bytes]:
    return {name: (version.path / name).read_bytes() for name in version.manifest.files}


def test_the_published_adapter_is_the_weighted_sum_and_peft_computes_with_it(pair: Any) -> None:
    found = together(pair, [("one", 0.6), ("two", 0.4)])
    parents = [delta_weights(pair.registry.resolve(name)) for name in LETTERS]
    result = delta_weights(found.version)
    assert set(result) == set(parents[0])
    base = AutoModelForCausalLM.from_pretrained(str(pair.base), dtype=torch.float64)
    for name, delta in result.items():
        expected = 0.6 * parents[0][name] + 0.4 * parents[1][name]
        assert float((delta - expected).norm() / expected.norm()) < 1e-6
        base.get_submodule(name).weight.data += expected
    with torch.no_grad():
        wanted = base(input_ids=PROMPT).logits
        plain = AutoModelForCausalLM.from_pretrained(str(pair.base), dtype=torch.float32)
        got = PeftModel.from_pretrained(plain, str(found.version.path))(input_ids=PROMPT).logits
    assert float((got - wanted).abs().max()) < 1e-4


def test_the_manifest_says_what_it_was_made_of(pair: Any) -> None:
    version = together(pair, [("one", 0.6), ("two", 0.4)], aliases=["prod"]).version
    parents = [pair.registry.resolve(name) for name in LETTERS]
    manifest = version.manifest
    assert [(p.name, p.version, p.relation) for p in manifest.parents] == [
        (parent.name, parent.id, "combined") for parent in parents
    ]
    assert manifest.base == parents[0].manifest.base
    assert manifest.adapter["r"] == manifest.adapter["lora_alpha"] == 8
    assert [receipt["type"] for receipt in manifest.receipts] == ["combine"]
    receipt = manifest.receipts[0]
    assert receipt["parents"] == [
        {"reference": parents[0].reference, "weight": 0.6},
        {"reference": parents[1].reference, "weight": 0.4},
    ]
    assert receipt["residual"] == 0
    assert receipt["search"] is None
    assert pair.registry.resolve("both@prod").id == version.id


def test_the_same_input_gives_the_same_bytes(pair: Any) -> None:
    for method, more in (("exact", {}), ("svd", {"rank": 6, "max_residual": 1.0})):
        one, again = (together(pair, [("one", 0.6), ("two", 0.4)], method, **more).version for _ in "ab")
        assert payload(one) == payload(again)
        assert one.manifest.receipts == again.manifest.receipts
    other = together(pair, [("one", 0.4), ("two", 0.6)], "svd", rank=6, max_residual=1.0).version
    assert payload(other) != payload(again)


def test_a_gate_that_is_passed_is_recorded(pair: Any) -> None:
    found = together(pair, [("one", 1.0)], name="alone", keep=GateSettings(0.99), judging=Judging(rows(pair, "one")))
    reference = pair.registry.resolve("one").reference
    assert found.gate is not None
    assert found.gate.passed
    receipt = found.version.manifest.receipts[1]
    assert (receipt["type"], receipt["passed"], receipt["keep"]) == ("gate", True, 0.99)
    assert receipt["tasks"][reference]["kept"]["point"] == pytest.approx(1, abs=1e-5)
    metrics = found.version.manifest.metrics
    assert metrics.after[reference]["answer_nll"]["point"] < metrics.before[reference]["answer_nll"]["point"]
    assert metrics.other[reference]["share_kept"] == receipt["tasks"][reference]["kept"]


def test_a_gate_that_is_not_passed_registers_nothing_and_says_which_task_lost(pair: Any) -> None:
    before = pair.registry.names()
    with pytest.raises(DeltaError) as caught:
        together(
            pair,
            [("one", 1.0), ("two", 0.005)],
            name="weak",
            keep=GateSettings(0.9),
            judging=Judging(rows(pair)),
        )
    assert "so nothing is registered" in caught.value.fact
    assert f"- {pair.registry.resolve('two').reference}: keeps " in caught.value.fact
    assert "the lower end must reach 90%" in caught.value.fact
    assert pair.registry.names() == before
    assert list((pair.cache / "scratch").iterdir()) == []


def test_missing_rows_do_not_pass_and_nothing_is_combined_before_that_is_said(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkit.release.combine.combine", lambda *given, **more: pytest.fail("it was combined"))
    with pytest.raises(DeltaError) as caught:
        together(pair, [("one", 0.6), ("two", 0.4)], keep=GateSettings(0.5), judging=Judging(rows(pair, "one")))
    assert caught.value.fact.startswith("1 of 2 adapters have no held-out rows")
    assert caught.value.hint == "name them: --rows two=held_out.jsonl"


def test_too_few_rows_do_not_pass(pair: Any) -> None:
    pair.rows(5, "few.jsonl", seed=9, letters="ab")
    with pytest.raises(DeltaError, match="answer tokens, at least 1,000 are needed"):
        together(
            pair,
            [("one", 1.0)],
            keep=GateSettings(0.5),
            judging=Judging({"one": pair.folder / "few.jsonl"}),
        )


def test_rows_for_an_adapter_that_is_not_combined_are_an_error(pair: Any) -> None:
    with pytest.raises(DeltaError, match="rows are given for three, which is not among the adapters"):
        together(pair, [("one", 1.0)], keep=GateSettings(0.5), judging=Judging({"three": pair.folder / "one.jsonl"}))


def test_a_share_out_of_range_is_said_before_anything_is_read(pair: Any) -> None:
    with pytest.raises(ConfigError, match="no share to keep"):
        together(pair, [("absent", 1.0)], keep=GateSettings(1.5))


def test_weights_are_searched_on_other_rows_than_they_are_judged_on(pair: Any) -> None:
    found = together(
        pair,
        [("one", 1.0), ("two", 1.0)],
        name="searched",
        search=SearchSettings(trials=6, min_tokens=100),
        keep=GateSettings(0.01, min_tokens=100),
        judging=Judging(rows(pair), batch_size=32),
    )
    assert found.search is not None
    assert len(found.search.trials) == 6
    assert dict(found.combined.parents) == dict(zip(found.search.parents, found.search.best.weights, strict=True))
    combined, gate = found.version.manifest.receipts
    assert len(combined["search"]["trials"]) == 6
    assert combined["search"]["best"] == found.search.best.number
    assert {task["rows"] for task in gate["tasks"].values()} == {30}
    alone = next(trial for trial in found.search.trials if trial.weights == (1.0, 0.0))
    # A parent alone is as good as itself on its own rows: the first half of them, which were searched on.
    half = held_out_rows(pair.registry.resolve("one"), pair.folder, rows(pair)).halves()[0].part(pair.base)
    host = attach(pair.backbone(32), pair.registry.resolve("one"))
    assert alone.nll[0] == pytest.approx(sum(likelihoods(host, "one", half, 8)) / half.answer_tokens, rel=1e-5)
    assert list((pair.cache / "scratch").iterdir()) == []


def test_one_parent_is_best_at_about_its_own_weight(pair: Any) -> None:
    """It was trained at weight 1: far from it on either side the NLL is higher."""
    found = together(
        pair,
        [("one", 0.3)],
        name="scaled",
        search=SearchSettings(trials=6, min_tokens=100),
        judging=Judging(rows(pair, "one"), batch_size=32),
    )
    assert found.search is not None
    assert found.search.best.weights[0] == pytest.approx(1.0, abs=0.5)
    low = [trial for trial in found.search.trials if trial.weights[0] < 0.2]
    assert all(trial.objective > found.search.best.objective for trial in low)


def test_too_few_rows_to_search_on_are_an_error(pair: Any) -> None:
    pair.rows(5, "few.jsonl", seed=9, letters="ab")
    with pytest.raises(DeltaError, match="weights cannot be searched for on the rows of one@"):
        together(
            pair,
            [("one", 1.0)],
            search=SearchSettings(trials=4),
            judging=Judging({"one": pair.folder / "few.jsonl"}),
        )


def test_a_result_too_far_from_its_rank_is_refused(pair: Any) -> None:
    before = pair.registry.names()
    with pytest.raises(DeltaError, match="at rank 1 the result of svd is off by"):
        together(pair, [("one", 0.5), ("two", 0.5)], "svd", name="cut", rank=1)
    assert pair.registry.names() == before


def test_adapters_of_different_bases_are_refused(pair: Any, tmp_path: Path) -> None:
    other = type(pair)(tmp_path, write_base(tmp_path / "other", seed=8), pair.registry)
    other.adapter("elsewhere")
    with pytest.raises(BaseMismatch, match="the two differ in: weights"):
        together(pair, [("one", 0.5), ("elsewhere", 0.5)])


def test_another_base_than_the_recorded_one_is_refused(pair: Any, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=8)
    with pytest.raises(BaseMismatch, match="differs in: weights"):
        together(pair, [("one", 1.0)], base=str(other))


def test_no_adapters_are_an_error(pair: Any) -> None:
    with pytest.raises(DeltaError, match="no adapters are named"):
        together(pair, [])


def test_a_merge_of_it_asks_for_the_weights_when_one_parent_was_trained_on_few_bits(pair: Any) -> None:
    pair.adapter("packed", bits=4)
    told: list[Event] = []
    found = together(pair, [("one", 0.5), ("packed", 0.5)], name="mixed", report=told.append)
    assert needs_choice(found.version)
    warning = next(event for event in told if isinstance(event, Warned))
    assert warning.text == "the adapters were trained on float32, nf4+dq weights; nf4+dq is taken for all"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"name": "../evil"}, "evil"),
        ({"name": "latest"}, "latest"),
        ({"aliases": ["../x"]}, r"\.\./x"),
        ({"judging": Judging(rows={"one": Path("x.jsonl")})}, "nothing is measured on them"),
    ],
)
def test_what_would_be_refused_at_the_end_is_refused_first(pair: Any, more: dict[str, Any], said: str) -> None:
    events: list[Event] = []
    with pytest.raises(PeftkitError, match=said):
        together(pair, [("one", 1.0)], report=events.append, **more)
    assert events == []


def test_adapters_that_cancel_are_not_registered(pair: Any) -> None:
    with pytest.raises(DeltaError, match="cancel: nothing is left"):
        together(pair, [("one", 1.0), ("one", -1.0)], name="nothing")
    with pytest.raises(DeltaError, match="cancel: nothing is left"):
        together(pair, [("one", 0.0)], name="nothing")
    assert "nothing" not in pair.registry.names()


def test_the_name_of_a_parent_is_warned_of(pair: Any) -> None:
    events: list[Event] = []
    together(pair, [("one", 1.0)], name="again")
    together(pair, [("again", 0.5)], name="again", report=events.append)
    assert any(isinstance(event, Warned) and "again is one of the adapters" in event.text for event in events)
