"""Partial fine-tuning: exactly the named tensors are trained, from the numbers of the base's files; the base stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import partial_lab
import pytest
import torch
from partial_lab import logits, write_bases
from safetensors.torch import load_file

from peftkit.backbone.contain import base_tensors, quantized_linears
from peftkit.backbone.load import load_backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.errors import TuningError
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers, partial_names
from peftkit.tuning.tuned import Tuned

Tune = Callable[..., Tuned]
HEAD = {"method": "top_layers", "top_layers": 0}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def tune(bases: dict[str, Path], tmp_path: Path) -> Tune:
    """A method in a tiny base by name."""

    def tune(base: str = "llama", bits: int = 32, **settings: Any) -> Tuned:
        return partial_lab.tune(bases[base], tmp_path / "cache", bits, **settings)

    return tune


def rows(count: int = 4, length: int = 12) -> list[Example]:
    made = []
    for index in range(count):
        ids = [(7 * index + 11 * at) % 250 + 3 for at in range(length)]
        made.append(Example(ids, [IGNORED] * 4 + ids[4:], 4, index, f"made.jsonl:{index + 1}"))
    return made


def two_steps(tuned: Tuned, folder: Path) -> Tuned:
    spec = TrainSpec(max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, warmup_ratio=0)
    train(tuned, rows(), spec, folder)
    return tuned


def block(index: int, parts: Sequence[str], prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{index}.{part}" for part in parts]


LLAMA = [
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
LLAMA_BLOCK = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
GPT2_BIASES = [f"{part}.bias" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
GPT2_BIAS_BLOCK = 64 + 192 + 64 + 64 + 256 + 64
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
GEMMA_NORMS = [*NORMS, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"]

# id → (base, settings, names, numbers)
CASES: dict[str, tuple[str, dict[str, Any], list[str], int]] = {
    "full": (
        "llama",
        {"method": "full"},
        [EMBED, *block(0, LLAMA), *block(1, LLAMA), NORM],
        259 * 64 + 2 * LLAMA_BLOCK + 64,
    ),
    "head, tied": ("llama", HEAD, [NORM, "lm_head.weight"], 64 + 259 * 64),
    "head, untied": ("untied", HEAD, [NORM, "lm_head.weight"], 64 + 259 * 64),
    "top 1": (
        "llama",
        {"method": "top_layers", "top_layers": 1},
        [*block(1, LLAMA), NORM, "lm_head.weight"],
        LLAMA_BLOCK + 64 + 259 * 64,
    ),
    "top 1 without head": (
        "untied",
        {"method": "top_layers", "top_layers": 1, "train_head": False},
        block(1, LLAMA),
        LLAMA_BLOCK,
    ),
    "top 2": (
        "untied",
        {"method": "top_layers", "top_layers": 2},
        [*block(0, LLAMA), *block(1, LLAMA), NORM, "lm_head.weight"],
        2 * LLAMA_BLOCK + 64 + 259 * 64,
    ),
    "biases of GPT-2": (
        "gpt2",
        {"method": "bias_only"},
        [*block(0, GPT2_BIASES, "transformer.h"), *block(1, GPT2_BIASES, "transformer.h"), "transformer.ln_f.bias"],
        2 * GPT2_BIAS_BLOCK + 64,
    ),
    "biases of one layer": (
        "gpt2",
        {"method": "bias_only", "layers": "top:1"},
        block(1, GPT2_BIASES, "transformer.h"),
        GPT2_BIAS_BLOCK,
    ),
    "biases of Qwen2": (
        "qwen2",
        {"method": "bias_only"},
        [name for at in (0, 1) for name in block(at, [f"self_attn.{part}_proj.bias" for part in "qkv"])],
        2 * (64 + 32 + 32),
    ),
    "norms": ("llama", {"method": "norms"}, [*block(0, NORMS), *block(1, NORMS), NORM], 5 * 64),
    "norms of one layer": ("llama", {"method": "norms", "layers": "0"}, block(0, NORMS), 2 * 64),
    "norms of Gemma-2": (
        "gemma2",
        {"method": "norms"},
        [*block(0, GEMMA_NORMS), *block(1, GEMMA_NORMS), NORM],
        9 * 64,
    ),
    "one block of GPT-2": (
        "gpt2",
        {"method": "patterns", "patterns": ["transformer.h.1.*.c_*.weight"]},
        block(1, [f"{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
              "transformer.h"),
        64 * (192 + 64 + 256 + 256),
    ),
    "patterns": (
        "qwen2",
        {"method": "patterns", "patterns": ["*.0.*.down_proj.weight", "model.norm.*"]},
        ["model.layers.0.mlp.down_proj.weight", NORM],
        64 * 128 + 64,
    ),
    "a tied embedding": ("llama", {"method": "patterns", "patterns": [EMBED]}, [EMBED], 259 * 64),
    "a tied head": ("llama", {"method": "patterns", "patterns": ["lm_head.*"]}, ["lm_head.weight"], 259 * 64),
    "embedding and head stay tied": ("llama", {"method": "patterns", "patterns": [EMBED, "lm_head.*"]}, [EMBED],
                                     259 * 64),
}  # fmt: skip


FULL = pytest.mark.full


def runs(case: str) -> list[Any]:
    """Over 4 bits by default, where the trained layers are loaded apart; `full` knows no such base."""
    every = (32,) if case == "full" else (4, 8, 32)
    return [pytest.param(case, bits, marks=() if bits == every[0] else FULL) for bits in every]


@pytest.mark.parametrize(("case", "bits"), [run for case in CASES for run in runs(case)])
def test_exactly_the_named_tensors_are_trained(tune: Tune, bases: dict[str, Path], case: str, bits: int) -> None:
    base, settings, names, numbers = CASES[case]
    tuned = tune(base, bits, **settings)
    assert sorted(tuned.names) == sorted(names)
    assert tuned.trainable_parameters == numbers
    assert {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad} == set(names)
    assert {parameter.dtype for parameter in tuned.trainable.values()} == {torch.float32}
    assert torch.equal(logits(tuned.model), logits(tuned.backbone.model))
    files = load_file(bases[base] / "model.safetensors")
    for name, value in tuned.trainable.items():
        inner = name.removeprefix("transformer.") if name not in files else name
        if inner not in files:
            inner = EMBED if name == "lm_head.weight" else inner
        assert torch.equal(value.detach(), files[inner]), name


TRAINED = [
    pytest.param("full", 32, marks=FULL),
    ("top 1", 4),
    pytest.param("head, tied", 8, marks=FULL),
    pytest.param("biases of GPT-2", 4, marks=FULL),
    ("biases of Qwen2", 8),
    pytest.param("norms of Gemma-2", 4, marks=FULL),
    ("one block of GPT-2", 4),
    pytest.param("one block of GPT-2", 8, marks=FULL),
    ("a tied embedding", 4),
]


@pytest.mark.parametrize(("case", "bits"), TRAINED)
def test_two_steps_change_them_and_nothing_else(tune: Tune, tmp_path: Path, case: str, bits: int) -> None:
    base, settings, names, _ = CASES[case]
    tuned = tune(base, bits, **settings)
    model, own = tuned.backbone.model, logits(tuned.backbone.model)
    kept = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    before = {name: parameter.detach().clone() for name, parameter in tuned.model.named_parameters()}
    two_steps(tuned, tmp_path / "trainer")
    after = dict(tuned.model.named_parameters())
    assert after.keys() == before.keys()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == set(names)
    assert all(parameter.grad is None for name, parameter in after.items() if name not in names)
    assert not torch.allclose(logits(tuned.model), own, atol=1e-3)
    assert torch.equal(logits(model), own)
    now = base_tensors(model)
    assert now.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in now.items())
    with tuned.as_base() as bare:
        assert torch.equal(logits(bare), own)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("base", "settings", "dense", "every"),
    [
        ("llama", {"method": "top_layers", "top_layers": 1}, 7, 14),
        ("untied", {"method": "top_layers", "top_layers": 1}, 7, 14),
        ("gpt2", {"method": "top_layers", "top_layers": 1, "train_head": False}, 4, 8),
        ("llama", {"method": "patterns", "patterns": ["*.layers.1.*.q_proj.weight"]}, 1, 14),
        ("llama", {"method": "norms"}, 0, 14),
        ("llama", {"method": "patterns", "patterns": [EMBED]}, 0, 14),
    ],
)
def test_the_rest_stays_packed(
    tune: Tune, base: str, settings: dict[str, Any], dense: int, every: int, bits: int
) -> None:
    tuned = tune(base, bits, **settings)
    packed = quantized_linears(tuned.backbone.model)
    assert len(packed) == every - dense
    assert "lm_head" not in packed
    trained = {name.removesuffix(".weight") for name in tuned.names}
    assert not trained & packed.keys()
    assert quantized_linears(tuned.model).keys() == packed.keys()


REFUSED: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "no biases": ("llama", 32, {"method": "bias_only"}, "has no biases"),
    "no match": ("llama", 32, {"method": "patterns", "patterns": ["*.norms.*"]}, "matches none of the base's"),
    "one of two": ("llama", 32, {"method": "patterns", "patterns": [NORM, "x.*"]}, "'x.\\*' matches none"),
    "no patterns": ("llama", 32, {"method": "patterns", "patterns": []}, "is empty"),
    "three of two layers": ("llama", 32, {"method": "top_layers", "top_layers": 3}, "the base has 2 layers"),
    "nothing": ("llama", 32, {**HEAD, "train_head": False}, "trains nothing"),
    "full over 4 bits": ("llama", 4, {"method": "full"}, "does not go with quant.bits=4"),
    "full over 8 bits": ("llama", 8, {"method": "full"}, "does not go with quant.bits=8"),
    "layers beyond": ("llama", 32, {"method": "norms", "layers": "2"}, "layers that the base does not have"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_trained_is_refused(tune: Tune, case: str) -> None:
    base, bits, settings, why = REFUSED[case]
    with pytest.raises(TuningError, match=why):
        tune(base, bits, **settings)


NORMS_ALONE, POSITIONS = {"method": "norms"}, {"method": "patterns", "patterns": ["transformer.wpe.weight"]}
UNLIKE = [
    ("llama", 4, "float32", NORMS_ALONE),
    ("llama", 8, "float32", NORMS_ALONE),
    ("llama", 16, "float32", NORMS_ALONE),
    ("gpt2", 16, "float32", {"method": "bias_only"}),
    ("gpt2", 16, "bfloat16", POSITIONS),
    ("gpt2", 4, "float32", {**HEAD, "top_layers": 1}),
]


@pytest.mark.parametrize(("base", "bits", "compute", "settings"), UNLIKE)
def test_layers_that_cannot_take_what_trained_ones_give_are_refused_with_what_mends_it(
    bases: dict[str, Path], tmp_path: Path, base: str, bits: int, compute: str, settings: dict[str, Any]
) -> None:
    spec = AdapterSpec(**settings)

    def load(dtype: str) -> Any:
        quant = QuantSpec.model_validate({"bits": bits, "dtype": dtype, "compute_dtype": compute, "device": "cpu"})
        return load_backbone(BaseSpec(source=str(bases[base])), quant, tmp_path / "cache", dense=dense_layers(spec))

    backbone = load("bfloat16")
    own = logits(backbone.model)
    with pytest.raises(TuningError, match=f"in bfloat16, computing in {compute}, cannot use them") as caught:
        inject(backbone, spec)
    assert "quant.dtype=float32" in str(caught.value)
    assert torch.equal(logits(backbone.model), own)
    two_steps(inject(load("float32"), spec), tmp_path / "trainer")


@pytest.mark.parametrize("settings", [NORMS_ALONE, {"method": "full"}, {**HEAD, "top_layers": 1}])
def test_beside_bfloat16_under_autocast_they_train(
    bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    spec = AdapterSpec(**settings)
    quant = QuantSpec.model_validate({"bits": 16, "compute_dtype": "bfloat16", "device": "cpu"})
    backbone = load_backbone(BaseSpec(source=str(bases["llama"])), quant, tmp_path / "cache", dense=dense_layers(spec))
    assert backbone.placement.dtype == torch.bfloat16
    two_steps(inject(backbone, spec), tmp_path / "trainer")


def test_fsdp_is_refused(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.process_group import launched

    backbone = tune(method="norms").backbone
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    launched.cache_clear()
    try:
        with pytest.raises(TuningError, match="FSDP"):
            inject(backbone, AdapterSpec(method="norms"))
    finally:
        launched.cache_clear()


@pytest.mark.parametrize(
    ("base", "bits"),
    [("gpt2", 4), ("llama", 8), pytest.param("gpt2", 8, marks=FULL), pytest.param("llama", 4, marks=FULL)],
)
def test_an_upload_in_few_bits_starts_from_its_dequantized_numbers(
    tune: Tune, bases: dict[str, Path], tmp_path: Path, base: str, bits: int
) -> None:
    """Its files hold no others; GPT-2's weight is (in, out) in the module that is trained."""
    name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}[base]
    settings = {"method": "patterns", "patterns": [name]}
    upload = Path(shutil.copytree(bases[base], tmp_path / "upload"))
    (upload / "model.safetensors").unlink()
    packed = tune(base, bits, method="norms").backbone.model
    packed.save_pretrained(str(upload))
    bases["upload"] = upload
    events: list[Any] = []
    tuned = tune("upload", bits, report=events.append, **settings)
    assert any("dequantized" in str(event) for event in events)
    assert quantized_linears(tuned.backbone.model).keys() == quantized_linears(packed).keys()
    value = tuned.trainable[name]
    dense = dense_weight(packed.get_submodule(name.removesuffix(".weight")))
    assert torch.equal(value, dense.T if base == "gpt2" else dense)
    torch.testing.assert_close(logits(tuned.model), logits(tuned.backbone.model), rtol=1e-5, atol=1e-5)
    two_steps(tuned, tmp_path / "trainer")
    assert not torch.equal(logits(tuned.model), logits(tuned.backbone.model))


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def encoder(kind: str, task: str, **settings: Any) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES, **settings)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{task}").from_config(config)


def test_encoders() -> None:
    bert = encoder("bert", "SequenceClassification", vocab_size=100, num_labels=3)
    inside = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 4 * 64  # attention, feed-forward, two norms
    pooler, head = 64 * 64 + 64, 64 * 3 + 3

    def numbers(model: Any, **settings: Any) -> int:
        tensors = dict(model.named_parameters())
        names = partial_names(model, AdapterSpec(**settings))
        assert len(set(names)) == len(names)
        return sum(tensors[name].numel() for name in names)

    assert numbers(bert, **HEAD) == pooler + head
    assert numbers(bert, method="top_layers", top_layers=1) == inside + pooler + head
    biases = 4 * 64 + 128 + 64 + 2 * 64  # a task's head is new, so it is trained whole with every method
    assert numbers(bert, method="bias_only") == 64 + 2 * biases + pooler + head
    assert numbers(bert, method="bias_only", layers="top:1") == biases + pooler + head
    assert numbers(bert, method="norms") == 2 * 64 + 2 * 2 * 2 * 64 + pooler + head
    assert numbers(bert, method="patterns", patterns=["classifier.*"]) == pooler + head
    vit = encoder("vit", "ImageClassification", image_size=32, patch_size=16, num_labels=3)
    assert numbers(vit, **HEAD) == 2 * 64 + head
    assert numbers(vit, method="top_layers", top_layers=1) == inside + 2 * 64 + head
    assert numbers(vit, method="norms", layers="1") == 2 * 2 * 64 + head
