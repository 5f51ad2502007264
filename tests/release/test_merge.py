"""Merging registered adapters: what is published was judged first, and what could not be measured is never a pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import DeltaError
from peftkit.evaluation.compare import Interval
from peftkit.release import merge as merge_module
from peftkit.release.combine import Judging
from peftkit.release.drift import Drift
from peftkit.release.merge import Order, merge_adapters


@pytest.fixture(scope="module")
def lab(shared: Any) -> Any:
    """A lab with the adapters `plain`, and `packed` that was trained over 4 bits."""
    shared.adapter("plain", size=0.3)
    shared.adapter("packed", bits=4)
    return shared


def merged(lab: Any, out: Path, name: str = "plain", rows: int = 60, **order: Any) -> dict[str, Any]:
    """What the receipt says of the model; `rows` held-out rows are named, 0 names none."""
    if rows:
        lab.rows(rows, f"{rows}.jsonl")
    named = {name: lab.folder / f"{rows}.jsonl"} if rows else {}
    receipt = merge_adapters(
        lab.registry,
        Order([(name, 1.0)], **order),
        out,
        cache=lab.cache,
        runs=lab.folder / "runs",
        judging=Judging(rows=named),
    )
    assert json.loads((out / "peftkit_merge.json").read_text())["model"] == receipt.model
    return dict(receipt.model)


class Changed:
    """Measures once, and says that the change of NLL has these ends."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self._true, self._found = merge_module.measure_merge, list[Drift]()

    def __call__(self, *given: Any, **more: Any) -> Drift:
        if not self._found:
            found = self._true(*given, **more)
            assert isinstance(found, Drift)
            self._found.append(found)
        change = Interval((self.low + self.high) / 2, self.low, self.high, 0.95, n=60)
        return replace(self._found[0], change=change)


def test_a_merge_that_was_measured_passes_the_gate(lab: Any, tmp_path: Path) -> None:
    model = merged(lab, tmp_path / "out", gate=True)
    assert model["measured"] is True
    assert model["answer_tokens"] >= 1000
    assert model["kl"]["max"] < 1e-8


@pytest.mark.parametrize(
    ("rows", "why"), [(0, "no run here says that it made plain@"), (5, "at least 1,000 are needed")]
)
def test_what_could_not_be_measured_never_passes_the_gate(lab: Any, tmp_path: Path, rows: int, why: str) -> None:
    with pytest.raises(DeltaError, match="does not pass --gate") as caught:
        merged(lab, tmp_path / "gated", rows=rows, gate=True)
    assert why in str(caught.value)
    assert not (tmp_path / "gated").exists()
    model = merged(lab, tmp_path / "out", rows=rows)
    assert model["measured"] is False
    assert why in model["reason"]


def test_a_model_that_is_worse_beyond_the_interval_needs_force(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = Changed()
    monkeypatch.setattr(merge_module, "measure_merge", change)
    change.low, change.high = 0.01, 0.03
    with pytest.raises(DeltaError, match=r"worse than base \+ adapter by 0.0200 nats"):
        merged(lab, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged(lab, tmp_path / "out", written={"force": True})
    change.low = -0.01
    merged(lab, tmp_path / "within", gate=True)


def test_an_adapter_of_a_quantized_base_is_told_which_weights_and_nothing_is_written(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="--onto does not say which weights are meant") as caught:
        merged(lab, tmp_path / "out", "packed")
    assert "is recommended: " in str(caught.value)
    with pytest.raises(DeltaError, match="no run here says that it made packed@"):
        merged(lab, tmp_path / "out", "packed", rows=0)
    assert list(tmp_path.iterdir()) == []
