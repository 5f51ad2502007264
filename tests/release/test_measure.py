"""Base + adapter against merged weights: figures by a full softmax in float64, and two models never at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peftkit.data.part import Part
from peftkit.errors import DeltaError
from peftkit.release import drift as drift_module
from peftkit.release import measure as measure_module
from peftkit.release import room
from peftkit.release.drift import Drift, Side, drift
from peftkit.release.forms import merged_quant
from peftkit.release.measure import measure_merge
from peftkit.release.measured import NotMeasured
from peftkit.release.positions import Loaded
from peftkit.release.rows import first_tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_collection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes 0.2 s in this process, and only one test is about it."""
    if "is_gone" not in request.node.name:
        monkeypatch.setattr(drift_module, "release", lambda device: None)


class Table(torch.nn.Module):
    """A model whose logits depend on the last token alone: row `token` of a matrix."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        text = SimpleNamespace(vocab_size=table.shape[1])
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, logits_to_keep]])


def table(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(259, 259, generator=torch.Generator().manual_seed(seed))


def side(values: torch.Tensor, name: str = "table") -> Side:
    @contextmanager
    def load() -> Iterator[Loaded]:
        yield Loaded(Table(values), CPU, torch.float32)

    return Side(name, load)


@pytest.fixture(scope="module")
def part(shared: Any) -> Part:
    found: Part = shared.rows().part(shared.base)
    assert found.answer_tokens > 1000
    return found


def naive(first: torch.Tensor, second: torch.Tensor, part: Part) -> dict[str, Any]:
    """Every figure by loops over answer tokens, in float64 numpy, neither torch nor peftkit."""
    one, other = first.double().numpy(), second.double().numpy()

    def log_probabilities(row: Any) -> Any:
        highest = max(row)
        return row - highest - np.log(sum(np.exp(value - highest) for value in row))

    kl, nll, logits, same = [], [0.0, 0.0], [], 0
    for example in part.examples:
        for before, label in zip(example.input_ids, example.labels[1:], strict=False):
            if label == -100:
                continue
            p, q = log_probabilities(one[before]), log_probabilities(other[before])
            kl.append(float(np.sum(np.exp(p) * (p - q))))
            nll[0] -= p[label]
            nll[1] -= q[label]
            logits.append(np.abs(one[before] - other[before]))
            same += int(np.argmax(p) == np.argmax(q))
    n = len(kl)
    return {
        "kl": (np.mean(kl), sorted(kl)[round(0.95 * (n - 1))], max(kl)),
        "nll": (nll[0] / n, nll[1] / n),
        "logits": (np.mean(logits), np.max(logits)),
        "same": same / n,
        "n": n,
    }


def test_every_figure_is_that_of_a_full_softmax_over_each_answer_token(part: Part, tmp_path: Path) -> None:
    first = table(0)
    second = first + table(1, 0.05)
    found = drift(side(first), side(second), part, pad_id=2, scratch=tmp_path)
    assert isinstance(found, Drift)
    expected = naive(first, second, part)
    assert found.answer_tokens == expected["n"] == part.answer_tokens
    assert (found.first.point, found.second.point) == pytest.approx(expected["nll"], abs=1e-6)
    assert found.change.point == pytest.approx(expected["nll"][1] - expected["nll"][0], abs=1e-6)
    assert found.change.low < found.change.point < found.change.high
    assert (found.kl_mean, found.kl_max) == pytest.approx((expected["kl"][0], expected["kl"][2]), rel=1e-9)
    assert found.kl_p95 == pytest.approx(expected["kl"][1], rel=0.02)  # of two ranks next to each other
    assert (found.logit_mean, found.logit_max) == pytest.approx(expected["logits"], rel=1e-6)
    assert found.agreement == expected["same"]
    assert 0 < found.agreement < 1
    assert found.sha256 == part.sha256
    assert found.rows == 60


def test_identical_models_differ_in_nothing(part: Part, tmp_path: Path) -> None:
    found = drift(side(table(0)), side(table(0)), part, pad_id=2, scratch=tmp_path)
    assert isinstance(found, Drift)
    figures = (found.kl_mean, found.kl_p95, found.kl_max, found.logit_mean, found.logit_max, found.change.point)
    assert figures == (0.0,) * 6
    assert found.agreement == 1.0
    assert not found.worse


def test_chunks_and_batches_change_no_figure(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = side(table(0)), side(table(0) + table(1, 0.05))
    part = first_tokens(part, 300)
    records = []
    for positions, batch in ((64, 8), (1, 8), (1000, 1), (7, 3)):
        monkeypatch.setattr(drift_module, "POSITIONS", positions)
        found = drift(*sides, part, pad_id=2, scratch=tmp_path, batch_size=batch)
        assert isinstance(found, Drift)
        figures = [found.change.point, found.kl_mean, found.kl_p95, found.kl_max, found.logit_mean, found.logit_max]
        records.append([*figures, found.agreement])
    for record in records[1:]:
        assert record == pytest.approx(records[0], rel=1e-12)


def test_a_model_is_gone_before_the_next_one_is_loaded_and_no_file_is_left(part: Part, tmp_path: Path) -> None:
    models: list[weakref.ref[Any]] = []

    @contextmanager
    def load() -> Iterator[Loaded]:
        assert [reference() for reference in models] == [None] * len(models)
        model = Table(table(0))
        model.itself = [model]  # as transformers' models, it is only freed by the collector
        models.append(weakref.ref(model))
        yield Loaded(model, CPU, torch.float32)

    gc.disable()
    try:
        drift(Side("one", load), Side("other", load), part, pad_id=2, scratch=tmp_path)
    finally:
        gc.enable()
    assert len(models) == 2
    assert models[1]() is None
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_an_error(part: Part, tmp_path: Path) -> None:
    broken = table(0)
    broken[:, 7] = float("nan")
    with pytest.raises(DeltaError, match="NaN or infinite logits"):
        drift(side(table(0)), side(broken), part, pad_id=2, scratch=tmp_path)


def test_another_vocabulary_is_an_error(part: Part, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="260 logits, the other model 259"):
        drift(side(table(0)), side(torch.zeros(259, 260), "wider"), part, pad_id=2, scratch=tmp_path)


def test_without_room_for_the_logits_nothing_is_measured(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    found = drift(side(table(0)), side(table(0)), part, pad_id=2, scratch=tmp_path)
    assert isinstance(found, NotMeasured)
    assert found.reason.startswith("not measured: needs 1.")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def merged(shared: Any) -> Path:
    """The shared base with the adapter `a` added to its weights in float64, saved in float32."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = shared.adapter("a")
    tensors = load_file(str(version.path / "adapter_model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(str(shared.base), dtype=torch.float32)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = 2.0 * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        weight = model.get_submodule(module).weight
        weight.data = (weight.data.double() + delta).float()
    folder: Path = shared.folder / "merged"
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(shared.base)).save_pretrained(str(folder))
    return folder


def test_a_true_merge_is_the_adapted_base_but_for_rounding(shared: Any, merged: Path) -> None:
    version = shared.registry.resolve("a")
    found = measure_merge(version, merged, shared.rows(), shared.cache)
    assert isinstance(found, Drift)
    assert found.logit_max < 1e-4
    assert found.kl_max < 1e-8
    assert found.agreement == 1.0
    record = found.record()
    assert record["measured"] is True
    assert record["answer_tokens"] > 1000
    assert record["rows_sha256"] == shared.rows().sha256


def test_the_base_itself_is_not_taken_for_the_merged_model(shared: Any, merged: Path) -> None:
    found = measure_merge(shared.registry.resolve("a"), shared.base, shared.rows(), shared.cache)
    assert isinstance(found, Drift)
    assert found.kl_mean > 1e-2


def test_too_few_rows_are_not_measured(shared: Any, merged: Path) -> None:
    few = shared.rows(5, "few.jsonl")
    tokens = few.part(shared.base).answer_tokens
    found = measure_merge(shared.registry.resolve("a"), merged, few, shared.cache)
    assert isinstance(found, NotMeasured)
    assert found.record() == {
        "measured": False,
        "reason": f"not measured: {tokens} answer tokens, at least 1,000 are needed",
    }


def test_without_rows_the_reason_is_passed_on(shared: Any, merged: Path) -> None:
    missing = NotMeasured("no rows")
    assert measure_merge(shared.registry.resolve("a"), merged, missing, shared.cache) is missing


def test_without_room_in_memory_nothing_is_loaded(shared: Any, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available", lambda quant: 1000)
    monkeypatch.setattr(measure_module, "drift", lambda *given, **more: pytest.fail("it was measured"))
    found = measure_merge(shared.registry.resolve("a"), merged, shared.rows(), shared.cache)
    assert isinstance(found, NotMeasured)
    assert found.reason.startswith("not measured: needs ")
    assert found.reason.endswith("1.0 kB are free")


def test_the_first_rows_are_taken_up_to_the_limit(part: Part) -> None:
    counts = np.cumsum([example.answer_tokens for example in part.examples])
    for limit in (1, int(counts[0]), int(counts[3]), int(counts[3]) + 1, 10**9):
        kept = first_tokens(part, limit)
        assert len(kept.examples) == max(1, int((counts <= limit).sum()))


@pytest.mark.parametrize(
    ("config", "bits"),
    [({"dtype": "float32"}, 32), ({"torch_dtype": "bfloat16"}, 16), ({"dtype": "float16"}, 16), ({}, 16)],
)
def test_a_merged_model_is_loaded_in_the_dtype_of_its_files(config: Any, bits: int, tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert merged_quant(tmp_path).bits == bits


def test_a_merge_into_four_bits_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    import json

    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stored}))
    quant = merged_quant(tmp_path)
    assert (quant.bits, quant.quant_type, quant.double_quant) == (4, "nf4", False)
