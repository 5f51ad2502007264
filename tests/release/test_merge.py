"""Merging registered adapters: what is published was judged first, and what could not be measured is never a pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.deltas.combining.methods import How
from peftkit.errors import DataError, DeltaError, RegistryError
from peftkit.evaluation.compare import Interval
from peftkit.release import examine as examine_module
from peftkit.release.drift import Drift
from peftkit.release.judging import Judging
from peftkit.release.merge import Order, merge_adapters


@pytest.fixture(scope="module")
def lab(shared: Any) -> Any:
    """A lab with the adapters `plain`, and `packed` that was trained over 4 bits."""
    shared.adapter("plain", size=0.3)
    shared.adapter("packed", bits=4)
    return shared


def merged(lab: Any, out: Path, name: str = "plain", rows: int = 60, **order: Any) -> dict[str, Any]:
    """What the receipt says of the model on the adapter's rows; `rows` of them are named, 0 names none."""
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
    (found,) = receipt.model.values()
    return dict(found)


class Changed:
    """Measures once, and says that the change of NLL has these ends."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self._true, self._found = examine_module.measure_merge, list[Drift]()

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
    monkeypatch.setattr(examine_module, "measure_merge", change)
    change.low, change.high = 0.01, 0.03
    with pytest.raises(DeltaError, match=r"worse than base \+ adapter: plain@\w+, by 0.0200 nats"):
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


def judged(lab: Any, out: Path, *weighted: tuple[str, float], rows: dict[str, Path], **order: Any) -> dict[str, Any]:
    """The whole receipt of a merge with rows by the names that were typed."""
    places = {"cache": lab.cache, "runs": lab.folder / "runs"}
    receipt = merge_adapters(lab.registry, Order(weighted, **order), out, judging=Judging(rows=rows), **places)
    return receipt.as_record()


def test_every_adapter_of_a_sum_is_measured_on_its_own_rows(lab: Any, tmp_path: Path) -> None:
    lab.adapter("other", seed=2, size=0.3)
    files = {name: lab.folder / f"{name}.jsonl" for name in ("plain", "other")}
    for seed, path in enumerate(files.values()):
        lab.rows(60, path.name, seed=seed)
    lab.registry.tag("other", "prod")
    called = {"plain": files["plain"], "other@prod": files["other"]}
    record = judged(lab, tmp_path / "out", ("plain", 0.5), ("other@prod", 0.7), rows=called, gate=True)
    versions = [lab.registry.resolve(name).reference for name in ("plain", "other")]
    assert list(record["model"]) == versions
    assert len({found["rows_sha256"] for found in record["model"].values()}) == 2
    assert all(found["kl"]["max"] < 1e-8 for found in record["model"].values())
    assert record["versions"] == [
        {"reference": reference, "weight": weight} for reference, weight in zip(versions, (0.5, 0.7), strict=True)
    ]


def test_what_no_adapter_can_be_compared_with_is_refused_by_the_gate_before_it_is_merged(
    lab: Any, tmp_path: Path
) -> None:
    lab.adapter("other", seed=2, size=0.3)
    lab.rows(60, "60.jsonl")
    rows = dict.fromkeys(("plain", "other"), lab.folder / "60.jsonl")
    how = How("dare_ties", {"density": 0.4, "seed": 3})
    with pytest.raises(DeltaError, match="by dare_ties of these adapters exists only as merged weights"):
        judged(lab, tmp_path / "out", ("plain", 1.0), ("other", 1.0), rows=rows, how=how, gate=True)
    assert list(tmp_path.iterdir()) == []
    record = judged(lab, tmp_path / "out", ("plain", 1.0), ("other", 1.0), rows=rows, how=how)
    assert not any(found["measured"] for found in record["model"].values())
    assert record["method"] == "dare_ties"
    assert record["options"] == {"density": 0.4, "scale": 1.0, "seed": 3}


def test_rows_under_an_unknown_name_are_an_error(lab: Any, tmp_path: Path) -> None:
    lab.rows(60, "60.jsonl")
    with pytest.raises(DeltaError, match="rows are given for plane, which is not among the adapters"):
        judged(lab, tmp_path / "out", ("plain", 1.0), rows={"plane": lab.folder / "60.jsonl"})


def test_gate_and_force_contradict(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="--gate and --force contradict one another"):
        merged(lab, tmp_path / "out", gate=True, written={"force": True})


def test_rows_that_cannot_be_read_are_an_error_before_anything_is_written(lab: Any, tmp_path: Path) -> None:
    broken = lab.folder / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match="found an empty text"):
        judged(lab, tmp_path / "out", ("plain", 1.0), rows={"plain": broken})
    assert list(tmp_path.iterdir()) == []


def test_a_merge_into_the_registry_is_refused(lab: Any) -> None:
    with pytest.raises(RegistryError, match="lies inside the registry"):
        merged(lab, lab.registry.root / "out")


def test_stochastic_rounding_is_for_few_bits(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="--quantize is not given"):
        merged(lab, tmp_path / "out", written={"rounding": "stochastic"})
