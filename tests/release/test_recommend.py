"""Onto which weights to merge: the candidates are the merges before rounding, and nothing is guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.quantize import dense_weight
from peftkit.release import recommend as recommend_module
from peftkit.release import room
from peftkit.release.forms import as_trained, over_dequantized, over_original, trained
from peftkit.release.measured import NotMeasured
from peftkit.release.recommend import _judged, needs_choice, recommend_onto

PROMPT = torch.tensor([list(range(3, 40))])


@pytest.mark.parametrize(("bits", "needed"), [(4, True), (8, True), (16, False), (32, False)])
def test_a_choice_is_needed_where_training_saw_quantized_weights(shared: Any, bits: int, needed: bool) -> None:
    assert needs_choice(shared.adapter(f"bits-{bits}", bits=bits)) is needed


def test_without_a_choice_nothing_is_measured(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend_module, "_scored", lambda *given: pytest.fail("it was measured"))
    found = recommend_onto(shared.adapter("plain", bits=32), NotMeasured("no rows"), shared.cache)
    assert found.onto == "original"
    assert "not quantized" in found.reason


def logits(side: Any) -> torch.Tensor:
    with side.open() as loaded, torch.no_grad():
        return loaded.model(input_ids=PROMPT).logits.double()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_candidates_are_the_two_merges_before_they_are_rounded(shared: Any, bits: int) -> None:
    """Against weights added up by hand in float64: original + ΔW, and what bitsandbytes dequantizes to + ΔW."""
    version = shared.adapter(f"bits-{bits}", bits=bits)
    form = trained(version, shared.cache)
    quantized = quantized_linears(shared.backbone(bits).model)
    for side, dequantized in ((over_original(form), False), (over_dequantized(form), True)):
        base = AutoModelForCausalLM.from_pretrained(str(shared.base), dtype=torch.float32)
        if dequantized:
            for name, layer in quantized.items():
                base.get_submodule(name).weight.data.copy_(dense_weight(layer))
        merged = PeftModel.from_pretrained(base, str(version.path)).merge_and_unload()
        with torch.no_grad():
            expected = merged(input_ids=PROMPT).logits.double()
        assert float((logits(side) - expected).abs().max()) < 1e-4
    assert float((logits(over_original(form)) - logits(over_dequantized(form))).abs().max()) > 1e-2
    # On a CPU the dequantized weights are those that training computed with.
    assert float((logits(as_trained(form)) - logits(over_dequantized(form))).abs().max()) < 1e-3


def test_all_three_forms_are_measured_and_one_is_recommended(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend_module, "release", lambda device: None)  # 0.2 s in this process
    version = shared.adapter("bits-4", bits=4)
    rows = shared.rows()
    found = recommend_onto(version, rows, shared.cache)
    assert found.onto in ("original", "dequantized")
    assert [form.name for form in found.forms] == ["bits-4 as trained", "original + ΔW", "dequantized + ΔW"]
    assert found.forms[0].change.point == 0
    assert abs(found.forms[2].change.point) < 1e-4
    record = found.record()
    assert record["onto"] == found.onto
    assert record["answer_tokens"] > 1000
    assert record["rows_sha256"] == rows.sha256
    assert set(record["forms"]) == {form.name for form in found.forms}


@pytest.mark.parametrize(
    ("original", "dequantized", "onto", "why"),
    [
        (1.2, 1.0, "dequantized", "lower than on original weights by 0.2000"),
        (1.0, 1.2, "original", "lower than on dequantized weights by 0.2000"),
        (1.0, 1.0, "original", "can be quantized again"),
    ],
)
def test_the_lower_nll_is_recommended_and_original_where_they_are_equal(
    shared: Any, original: float, dequantized: float, onto: str, why: str
) -> None:
    part = shared.rows().part(shared.base)
    nll = [[level * e.answer_tokens for e in part.examples] for level in (1.0, original, dequantized)]
    found = _judged(["trained", "original", "dequantized"], nll, part, 0)
    assert found.onto == onto
    assert why in found.reason
    assert "still worse than in training" not in found.reason


def test_a_choice_that_is_worse_than_training_says_so(shared: Any) -> None:
    part = shared.rows().part(shared.base)
    nll = [[level * e.answer_tokens for e in part.examples] for level in (1.0, 1.5, 1.3)]
    found = _judged(["trained", "original", "dequantized"], nll, part, 0)
    assert found.onto == "dequantized"
    assert "still worse than in training, by 0.3000" in found.reason


def test_nothing_is_recommended_without_figures(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = shared.adapter("bits-4", bits=4)
    missing = recommend_onto(version, NotMeasured("no rows"), shared.cache)
    few = recommend_onto(version, shared.rows(4, "few.jsonl"), shared.cache)
    monkeypatch.setattr(room, "available", lambda quant: 1000)
    full = recommend_onto(version, shared.rows(), shared.cache)
    assert [found.onto for found in (missing, few, full)] == [None] * 3
    assert missing.reason == "not measured: no rows"
    assert few.reason.endswith("at least 1,000 are needed")
    assert full.reason.endswith("1.0 kB are free")


def test_a_base_that_is_only_there_in_few_bits_leaves_no_choice(
    shared: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend_module, "_scored", lambda *given: pytest.fail("it was measured"))
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(str(shared.base), quantization_config=options, dtype=torch.float32)
    model.save_pretrained(str(tmp_path / "upload"))
    found = recommend_onto(shared.adapter("bits-4", bits=4), shared.rows(), shared.cache, base=str(tmp_path / "upload"))
    assert found.onto == "dequantized"
    assert "hold no other weights" in found.reason
