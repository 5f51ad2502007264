"""An adapter that LoftQ began belongs to the quantized weights, and so does what was made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import write_base
from tiny_families import write_bpe

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import DeltaError
from peftkit.events import Decision, Warned
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft
from peftkit.release.export.entry import ExportOptions, export_for
from peftkit.release.merge import Order, merge_adapters, plan_adapters
from peftkit.release.repaired import repairs
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


@pytest.fixture
def loftq(lab: Any) -> tuple[Any, torch.Tensor]:
    """A version that LoftQ began over 4 bits, and its logits."""
    return mended(lab)


def mended(lab: Any) -> tuple[Any, torch.Tensor]:
    backbone = load_backbone(BaseSpec(source=str(lab.base)), QuantSpec(bits=4, device="cpu"), lab.cache)
    tuned = inject(backbone, AdapterSpec(method="loftq", r=16))
    with torch.no_grad():
        found = tuned.model(input_ids=IDS).logits
    return publish(lab, "mended", tuned), found


def publish(lab: Any, name: str, tuned: Any, parents: tuple[dict[str, str], ...] = ()) -> Any:
    folder = save_adapter(tuned, lab.folder / "payload" / name)
    fields = {"kind": "peft", "base": base_fields(tuned.backbone), "adapter": tuned.spec.record(), "parents": parents}
    record = tuned.backbone.identity.record
    return lab.registry.publish(name, folder, Draft.model_validate(fields), base=record)


def test_onto_the_original_weights_is_refused(lab: Any, loftq: Any, tmp_path: Path) -> None:
    version, _ = loftq
    order = Order([("mended", 1.0)], onto="original")
    for call in (plan_adapters, merge_adapters):
        more = {} if call is plan_adapters else {"runs": tmp_path / "runs"}
        with pytest.raises(DeltaError, match="add it twice") as caught:
            call(lab.registry, order, tmp_path / "out", cache=lab.cache, **more)
        assert version.reference in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_left_open_it_is_merged_onto_the_dequantized_ones(lab: Any, loftq: Any, tmp_path: Path) -> None:
    _, found = loftq
    events: list[Any] = []
    order, places = (
        Order([("mended", 1.0)], written={"dtype": "float32"}),
        {"cache": lab.cache, "runs": tmp_path / "runs"},
    )
    merge_adapters(lab.registry, order, tmp_path / "out", report=events.append, **places)
    assert any(isinstance(e, Decision) and e.choice == "dequantized" for e in events)
    merged = load_backbone(BaseSpec(source=str(tmp_path / "out")), QuantSpec(bits=32, device="cpu"), lab.cache)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(input_ids=IDS).logits, found, rtol=1e-4, atol=1e-4)


def export(lab: Any, engine: str, out: Path, **options: Any) -> Any:
    settings = ExportOptions(base=str(lab.base), **options)
    events: list[Any] = []
    receipt = export_for(engine, lab.registry, ["mended"], out, lab.cache, options=settings, report=events.append)
    return receipt, events


def test_a_merged_gguf_is_onto_the_dequantized_weights_alone(lab: Any, tmp_path: Path) -> None:
    lab.base = write_base(tmp_path / "base", vocab_size=300)
    write_bpe(lab.base)  # a tokenizer that llama.cpp knows
    mended(lab)
    with pytest.raises(DeltaError, match="add it twice"):
        export(lab, "gguf", tmp_path / "out", merged=True, onto="original")
    assert not (tmp_path / "out").exists()
    receipt, events = export(lab, "gguf", tmp_path / "out", merged=True, dtype="float32")
    assert receipt.versions["mended"]["merge"]["settings"]["onto"] == "dequantized"
    assert any(isinstance(e, Decision) and e.choice == "dequantized" for e in events)


@pytest.mark.parametrize("engine", ["vllm", "gguf", "ollama"])
def test_engines_with_weights_of_their_own_are_refused(lab: Any, loftq: Any, tmp_path: Path, engine: str) -> None:
    with pytest.raises(DeltaError, match="do not have the error that it repairs") as caught:
        export(lab, engine, tmp_path / "out")
    assert "peftkit merge mended --onto dequantized --out FOLDER" in str(caught.value)
    assert "--onto original" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_for_peft_it_is_written_with_a_warning(lab: Any, loftq: Any, tmp_path: Path) -> None:
    receipt, events = export(lab, "peft", tmp_path / "out")
    assert any(isinstance(e, Warned) and "loftq" in e.text for e in events)
    assert any("loftq" in finding for finding in receipt.versions["mended"]["findings"])


def test_what_was_made_of_it_is_known_too(lab: Any, loftq: Any) -> None:
    version, _ = loftq
    backbone = load_backbone(BaseSpec(source=str(lab.base)), QuantSpec(bits=4, device="cpu"), lab.cache)
    parent = {"name": version.name, "version": version.id, "relation": "combined"}
    child = publish(lab, "both", inject(backbone, AdapterSpec(r=4)), (parent,))
    other = lab.adapter("plain", bits=4)
    assert repairs(lab.registry, [other, child]) == version.reference
    assert repairs(lab.registry, [other]) is None
