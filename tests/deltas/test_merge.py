"""Merged weights against float64 references, and against what PEFT computes with the adapter attached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import numpy as np
import pytest
import torch
import transformers
from deltas import reference
from deltas.test_rounding import exact
from deltas.variants import BASES, VARIANTS, Variant, attached, inputs, write_adapter, write_base
from safetensors.torch import load_file, save_file
from tiny_bases import CHATML, write_tokenizer

from peftkit.base.dense import dense_tensors
from peftkit.base.raw import tensors as raw_tensors
from peftkit.base.ref import read_config
from peftkit.deltas.delta import Added, Deltas, LowRank
from peftkit.deltas.merge import MergeReceipt, MergeSettings, merge, plan_merge
from peftkit.deltas.merging import plan, product
from peftkit.deltas.reading.read import read_deltas
from peftkit.errors import BackboneError, BaseError, DeltaError

ORIGINAL = MergeSettings(onto="original")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT = [variant for variant in VARIANTS if variant.base != "resnet"]
SOME = {"lora", "conv1d", "conv1d-dora", "tied-head", "tied-grown", "tied-saved-both", "experts", "ia3", "oft"}
Case = tuple[Variant, Any, Path, Deltas, Path]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A variant, its base in memory and on disk, and its deltas and checkpoint."""
    root = tmp_path_factory.mktemp("merge")
    models: dict[str, Any] = {}
    cases: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in cases:
            variant = next(variant for variant in VARIANTS if variant.name == name)
            base = root / variant.base
            if variant.base not in models:
                models[variant.base] = write_base(base, variant.base)
                write_tokenizer(base)
            adapter = root / name
            write_adapter(variant, models[variant.base], adapter)
            cases[name] = (variant, models[variant.base], base, deltas_of(base, adapter), adapter)
        return cases[name]

    return make


def deltas_of(base: Path, adapter: Path) -> Deltas:
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    return read_deltas("case@1", "peft", config, tensors, dense_tensors(base), read_config(base))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora", "conv1d"])
def test_merged_is_the_sum_rounded_once(case: Callable[[str], Case], tmp_path: Path, name: str, dtype: str) -> None:
    _, _, base, deltas, adapter = case(name)
    merge(base, deltas, tmp_path / "out", MergeSettings(onto="original", dtype=dtype))
    found, expected = tensors(tmp_path / "out"), reference.merged(base, adapter)
    assert set(deltas.changes) <= set(expected)
    compared = 0
    for tensor in deltas.changes:
        assert found[tensor].dtype == DTYPES[dtype]
        numbers = found[tensor].double().flatten().tolist()
        nearest = [exact(float(value), DTYPES[dtype]) for value in expected[tensor].flatten()]
        assert numbers == [float(value) for value in nearest if value is not None], tensor
        compared += len(numbers)
    assert compared > 700


def test_untouched_tensors_are_the_bases_bytes(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    merge(base, deltas, tmp_path / "out", ORIGINAL)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    untouched = before.keys() - deltas.changes.keys()
    assert len(untouched) >= 6
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def half_way(folder: Path) -> tuple[Path, Deltas]:
    """A base and a delta whose sums lie just beside the middle between two bfloat16 numbers."""
    shape = (64, 96)
    base = write_small(folder / "base", torch.ones(shape, dtype=torch.bfloat16))
    right = torch.full((1, shape[1]), 2.0**-8 + 2.0**-31)
    return base, Deltas("half@1", {"model.w.weight": LowRank(shape, torch.ones(shape[0], 1), right)}, {})


def write_small(folder: Path, weight: torch.Tensor, **others: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file({"model.w.weight": weight, **others}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": weight.shape[0]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_planted_double_rounding_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, deltas = half_way(tmp_path)
    merge(base, deltas, tmp_path / "right", ORIGINAL)
    assert (tensors(tmp_path / "right")["model.w.weight"] == 1 + 2.0**-7).all()

    def twice(values: torch.Tensor, dtype: torch.dtype, single: torch.Tensor | None = None) -> torch.Tensor:
        return values.to(torch.float32).to(dtype)

    monkeypatch.setattr(product, "round_once", twice)
    merge(base, deltas, tmp_path / "wrong", MergeSettings(onto="original", force=True))
    wrong = tensors(tmp_path / "wrong")["model.w.weight"] != tensors(tmp_path / "right")["model.w.weight"]
    print(f"{int(wrong.sum())} of {wrong.numel()} entries differ by rounding twice")
    assert wrong.all()


@pytest.mark.parametrize("size", [1, 5_000, 1 << 40])
def test_any_shard_size_gives_the_same_bits(case: Callable[[str], Case], tmp_path: Path, size: int) -> None:
    _, _, base, deltas, _ = case("lora")
    merge(base, deltas, tmp_path / "one", ORIGINAL)
    merge(base, deltas, tmp_path / "out", MergeSettings(onto="original", shard_size=size))
    one, found = tensors(tmp_path / "one"), tensors(tmp_path / "out")
    assert one.keys() == found.keys()
    assert all(torch.equal(one[name], found[name]) for name in one)
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    for file in written:
        held = sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())
        assert held <= size or len(load_file(file)) == 1
    if size == 1 << 40:
        assert [file.name for file in written] == ["model.safetensors"]
        return
    count = len(written)
    assert [file.name for file in written] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    assert {name: file.name for file in written for name in load_file(file)} == index["weight_map"]


def test_streaming_is_what_one_piece_gives(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, base, deltas, _ = case("lora")
    found = {}
    for step in (1, 100, 1 << 30):
        monkeypatch.setattr(product, "STEP", step)
        merge(base, deltas, tmp_path / str(step), ORIGINAL)
        found[step] = tensors(tmp_path / str(step))
    assert all(torch.equal(found[1][name], found[step][name]) for step in found for name in found[1])


def test_the_same_inputs_give_the_same_bytes(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("dora")
    for name in ("one", "two"):
        merge(base, deltas, tmp_path / name, MergeSettings(onto="original", dtype="bfloat16"))
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "name", [pytest.param(v.name, marks=[] if v.name in SOME else pytest.mark.full) for v in TEXT], ids=str
)
def test_merged_logits_are_the_attached_ones(case: Callable[[str], Case], tmp_path: Path, name: str) -> None:
    variant, model, base, deltas, adapter = case(name)
    merge(base, deltas, tmp_path / "out", ORIGINAL)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    with torch.no_grad():
        expected = attached(variant, model, adapter)(**inputs(variant)).logits
        found = loaded.eval()(**inputs(variant)).logits
        before = model(**inputs(replace(variant, grown=0))).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if before.shape == found.shape:
        assert float((before - found).abs().max()) > 1e-3, "the adapter must do something"
    grown = model.config.vocab_size + variant.grown
    assert loaded.config.vocab_size == grown
    tied = bool(model.config.tie_word_embeddings) and not deltas.untied
    assert loaded.config.tie_word_embeddings is tied


def test_tokenizer_template_and_settings_come_along(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    for surplus in ("modeling_own.py", "pytorch_model.bin", "model.safetensors.index.json.bak", "notes.md"):
        (base / surplus).write_bytes(b"x")
    (base / "LICENSE").write_text("a licence")
    merge(base, deltas, tmp_path / "out", MergeSettings(onto="original", dtype="bfloat16"))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    for surplus in ("modeling_own.py", "pytorch_model.bin", "model.safetensors.index.json.bak", "notes.md"):
        assert surplus not in found
        (base / surplus).unlink()
    assert {"LICENSE", "config.json", "generation_config.json", "tokenizer.json", "peftkit_merge.json"} <= found
    one, two = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert one.chat_template == two.chat_template == CHATML
    turns = [{"role": "user", "content": "Hé?"}]
    assert one.apply_chat_template(turns, tokenize=True) == two.apply_chat_template(turns, tokenize=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_receipt_says_what_happened(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, adapter = case("lora")
    receipt = merge(base, deltas, tmp_path / "out", MergeSettings(onto="original", dtype="bfloat16"))
    record = json.loads((tmp_path / "out" / "peftkit_merge.json").read_text())
    assert record == json.loads(json.dumps(receipt.as_record()))
    for name, facts in record["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (facts["sha256"], facts["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert set(files(tmp_path / "out")) == {*record["files"], "peftkit_merge.json"}
    before, after, expected = reference.read_file(base / "model.safetensors"), tensors(tmp_path / "out"), {}
    for name, merged in reference.merged(base, adapter).items():
        change, found = merged - before[name], after[name].double().numpy() - before[name]
        alone = torch.tensor(before[name]).to(torch.bfloat16)
        expected[name] = {
            "kept": (found * change).sum() / (change**2).sum(),
            "noise": np.linalg.norm(found - change) / np.linalg.norm(change),
            "delta_norm": np.linalg.norm(change),
            "delta_to_base": np.linalg.norm(change) / np.linalg.norm(before[name]),
            "entries": change.size,
            "unchanged": int((alone == after[name]).sum()),
        }
    assert record["tensors"].keys() == expected.keys()
    for name, figures in expected.items():
        assert record["tensors"][name] == pytest.approx(figures, rel=1e-5)
    assert record["weights"]["kept"] == pytest.approx(1, abs=0.01)
    assert record["weights"]["entries"] == sum(figures["entries"] for figures in expected.values())


def test_the_plan_tells_the_bytes(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    settings = MergeSettings(onto="original", dtype="bfloat16", shard_size=4000)
    told = plan_merge(base, deltas, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    merge(base, deltas, tmp_path / "out", settings)
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert told.files == tuple(file.name for file in written)
    assert told.bytes_out == sum(file.stat().st_size for file in written)
    assert told.tensors == len(tensors(tmp_path / "out"))
    assert told.changed == tuple(sorted(deltas.changes))


def test_a_full_disk_is_refused_before_anything_is_written(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, base, deltas, _ = case("lora")
    monkeypatch.setattr(plan, "_COMPANIONS", 1 << 60)
    assert plan_merge(base, deltas, tmp_path / "out", ORIGINAL).disk_needed > 1 << 60
    with pytest.raises(DeltaError, match="free"):
        merge(base, deltas, tmp_path / "out", ORIGINAL)
    assert not (tmp_path / "out").exists()


def low_rank(shape: tuple[int, int], value: float = 0.01) -> LowRank:
    return LowRank(shape, torch.full((shape[0], 1), value), torch.ones(1, shape[1]))


W = "model.w.weight"
REFUSED = {
    "absent": ({"model.v.weight": low_rank((8, 8))}, {}, r"model\.v\.weight"),
    "nan": ({W: low_rank((8, 8), float("nan"))}, {}, rf"8 NaN or infinite numbers for {W}"),
    "width": ({W: low_rank((8, 6))}, {}, r"\(8, 6\)"),
    "overflow": ({W: low_rank((8, 8), 70000.0)}, {"dtype": "float16"}, rf"{W}: 64 of \d+ numbers"),
    "nothing": ({}, {}, "changes nothing"),
    "not trained in few bits": ({W: low_rank((8, 8))}, {"onto": "dequantized"}, "nothing was dequantized"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    changes, settings, match = REFUSED[kind]
    base = write_small(tmp_path / "base", torch.ones(8, 8))
    with pytest.raises(DeltaError, match=match) as caught:
        merge(base, Deltas("a@1", changes, {}), tmp_path / "out", MergeSettings(**{"onto": "original", **settings}))
    assert not (tmp_path / "out").exists()
    if kind == "overflow":
        assert "--dtype" in str(caught.value.hint)


def test_a_base_that_holds_nan_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(8, 8)
    weight[3, 3] = float("nan")
    base = write_small(tmp_path / "base", weight)
    with pytest.raises(DeltaError, match=W):
        merge(base, Deltas("a@1", {W: low_rank((8, 8))}, {}), tmp_path / "out", ORIGINAL)


def test_an_output_that_exists_is_left_alone(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    for action in (merge, plan_merge):
        with pytest.raises(DeltaError, match="exists already"):
            action(base, deltas, tmp_path / "out", ORIGINAL)
    assert files(tmp_path / "out") == {"mine.txt": b"keep me"}


def test_an_empty_output_folder_is_used(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    (tmp_path / "out").mkdir()
    receipt = merge(base, deltas, tmp_path / "out", ORIGINAL)
    assert isinstance(receipt, MergeReceipt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_delta_below_the_steps_of_bfloat16_is_refused(tmp_path: Path) -> None:
    base = write_small(tmp_path / "base", torch.ones(64, 64, dtype=torch.bfloat16))
    deltas = Deltas("weak@1", {W: low_rank((64, 64), 2.0**-10)}, {})
    with pytest.raises(DeltaError, match=r"keep 0\.0 % of the delta .* 100 % of the entries") as caught:
        merge(base, deltas, tmp_path / "out", ORIGINAL)
    assert "--dtype float32" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert merge(base, deltas, tmp_path / "out", MergeSettings(onto="original", dtype="float32")).whole.share == 1
    forced = merge(base, deltas, tmp_path / "forced", MergeSettings(onto="original", force=True))
    assert forced.whole.share == 0
    assert forced.whole.unchanged == 64 * 64


def test_other_tensors_survive(tmp_path: Path) -> None:
    """Integers, a scalar, an empty tensor, and a bias beside the weights."""
    others = {
        "model.b.bias": torch.arange(5.0, dtype=torch.float16),
        "model.count": torch.tensor([7, 8, 9]),
        "model.empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "model.flag": torch.tensor(True),
        "model.scale": torch.tensor(2.5, dtype=torch.float64),
    }
    base = write_small(tmp_path / "base", torch.ones(8, 8))
    save_file(others, base / "another.safetensors", {"format": "pt"})  # ends at an odd byte, before the weight
    bias = Added((5,), torch.full((1, 5), 0.5))
    deltas = Deltas("a@1", {W: low_rank((8, 8)), "model.b.bias": bias}, {})
    merge(base, deltas, tmp_path / "out", ORIGINAL)
    found = tensors(tmp_path / "out")
    for name in others.keys() - {"model.b.bias"}:
        assert found[name].dtype == others[name].dtype
        assert torch.equal(found[name], others[name])
    assert found["model.b.bias"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    widths = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
    stored = list(raw_tensors(tmp_path / "out" / "model.safetensors"))
    assert len(stored) == 6
    assert all(start % widths[dtype] == 0 for _, dtype, _, start, _ in stored), "readers that map files need this"


def test_a_damaged_base_is_named(case: Callable[[str], Case], tmp_path: Path) -> None:
    _, _, base, deltas, _ = case("lora")
    (tmp_path / "base").mkdir()
    for path in base.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes()[: -200 if "safetensors" in path.name else None])
    with pytest.raises(BaseError, match="not a whole safetensors"):
        merge(tmp_path / "base", deltas, tmp_path / "out", ORIGINAL)


def test_other_quantizations_are_refused(case: Callable[[str], Case], tmp_path: Path) -> None:
    base = write_small(tmp_path / "base", torch.ones(8, 8))
    (base / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises((DeltaError, BackboneError), match="gptq"):
        merge(base, Deltas("a@1", {W: low_rank((8, 8))}, {}), tmp_path / "out", ORIGINAL)


def test_every_base_of_the_variants_is_covered() -> None:
    assert {variant.base for variant in TEXT} == BASES.keys() - {"resnet"}
    assert {variant.name for variant in TEXT} >= SOME
