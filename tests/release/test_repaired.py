"""An adapter that LoftQ began belongs to the quantized weights, and so does what was made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import DeltaError
from peftkit.events import Decision
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft
from peftkit.release.merge import Order, merge_adapters, plan_adapters
from peftkit.release.repaired import repairs
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])


@pytest.fixture
def loftq(lab: Any) -> tuple[Any, torch.Tensor]:
    """A version that LoftQ began over 4 bits, and its logits."""
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


def test_what_was_made_of_it_is_known_too(lab: Any, loftq: Any) -> None:
    version, _ = loftq
    backbone = load_backbone(BaseSpec(source=str(lab.base)), QuantSpec(bits=4, device="cpu"), lab.cache)
    parent = {"name": version.name, "version": version.id, "relation": "combined"}
    child = publish(lab, "both", inject(backbone, AdapterSpec(r=4)), (parent,))
    other = lab.adapter("plain", bits=4)
    assert repairs(lab.registry, [other, child]) == version.reference
    assert repairs(lab.registry, [other]) is None
