"""Every PEFT method: where it begins, how much it trains, what training changes, and that it comes back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from partial_lab import write_bases
from tiny_families import write_family

from peftkit.backbone.contain import base_tensors
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.errors import TrainingError, TuningError
from peftkit.events import Warned
from peftkit.generation.forward import pad, token_nll
from peftkit.registry.manifest import Draft
from peftkit.release.merge import Order, merge_adapters
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.attach import attach, resume_adapter
from peftkit.tuning.attachable import ATTACHABLE, check_config
from peftkit.tuning.configs import peft_type, token_ids
from peftkit.tuning.depth import depths
from peftkit.tuning.initial import common_tokens
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.tuned import Tuned

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])
NAMES = [name for name, method in METHODS.items() if method.kind == "peft"]
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"r": 4} if "r" in METHODS[name].fields else {} for name in NAMES},
    "adalora": {"r": 4, "init_r": 6},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "trainable_tokens": {"tokens": ["a", 50]},
}
ROUNDED = {"dora": 1e-6, "oft": 1e-6, "pissa": 1e-5}
"""Methods whose beginning is the base's logits to rounding alone."""
ELSEWHERE = ("loftq", "prompt_tuning", "prefix_tuning")
"""Methods that begin somewhere else."""
PAIRS = [
    pytest.param(name, bits, marks=[] if bits == min(METHODS[name].bits) else pytest.mark.full)
    for name in NAMES
    for bits in (4, 8, 32)
    if bits in METHODS[name].bits
]

# (out, in) of q, k, v, o, gate, up, down of the tiny base, which has two layers
LINEARS = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]


def lora(r: int) -> int:
    return sum(r * (out + into) for out, into in LINEARS)


COUNTS = {
    **dict.fromkeys(("lora", "rslora", "lora_plus", "loftq", "eva"), lora(4)),
    "dora": lora(4) + sum(out for out, _ in LINEARS),
    "pissa": lora(8),
    "adalora": lora(6) + 6 * len(LINEARS),
    "ia3": 2 * (32 + 32 + 128),  # L (d_k + d_v + d_ff)
    "vera": sum(out + 4 for out, _ in LINEARS),
    "loha": 2 * lora(4),
    # 64 = 8·8, 32 = 4·8, 128 = 8·16; the large factor is a product of rank 4 where that is less than half its width
    "lokr": 2 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (64 + 4 * (16 + 8))),
    "oft": sum(into * 31 // 2 for _, into in LINEARS),
    "prompt_tuning": 3 * 64,
    "prefix_tuning": 2 * 2 * 3 * 32,
    "trainable_tokens": 2 * 64,
}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def spec_of(method: str, **settings: Any) -> AdapterSpec:
    return AdapterSpec.model_validate({"method": method, **SETTINGS[method], **settings})


def examples(lengths: tuple[int, ...] = (9, 14, 11, 7, 12, 8)) -> list[Example]:
    draw = random.Random(0)
    rows = [[draw.randrange(3, 259) for _ in range(length)] for length in lengths]
    return [
        Example(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :], len(ids) // 2, at, f"made:{at}")
        for at, ids in enumerate(rows)
    ]


def trained(tuned: Tuned, folder: Path, steps: int = 3, **settings: Any) -> Tuned:
    spec = TrainSpec(
        max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=1, num_train_epochs=50, **settings
    )
    train(tuned, examples(), spec, folder / "trainer")
    return tuned


def disturbed(tuned: Tuned, size: float = 0.1) -> Tuned:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def assert_same(found: torch.Tensor, expected: torch.Tensor, method: str) -> None:
    """Bitwise; AdaLoRA's file leaves out the ranks that were pruned, and a product over fewer rounds otherwise."""
    if method == "adalora":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.fixture
def publish_tuned(registry: Any, tmp_path: Path) -> Callable[..., Any]:
    from peftkit.recipe.fields import base_fields

    def publish_tuned(tuned: Tuned, name: str = "x") -> Any:
        folder = save_adapter(tuned, tmp_path / "payload" / name)
        fields = {"kind": "peft", "base": base_fields(tuned.backbone), "adapter": tuned.spec.record()}
        return registry.publish(name, folder, Draft.model_validate(fields), base=tuned.backbone.identity.record)

    return publish_tuned


def merged_logits(load: Callable[..., Any], registry: Any, tmp_path: Path, base: Path | None = None) -> torch.Tensor:
    """What the files of a merge of the adapter x compute."""
    written, out = {"dtype": "float32"}, tmp_path / "merged"
    order = Order([("x", 1.0)], onto="original", written=written, base=str(base) if base else None)
    merge_adapters(registry, order, out, cache=tmp_path / "cache", runs=tmp_path / "runs")
    return logits(load(out, bits=32).model)


# -- all of them


@pytest.mark.parametrize(("method", "bits"), PAIRS)
def test_from_the_beginning_to_the_registry_and_back(
    load: Callable[..., Any], publish_tuned: Callable[..., Any], tmp_path: Path, method: str, bits: int
) -> None:
    backbone = load(bits=bits)
    base = logits(backbone.model)
    tensors = {name: tensor.clone() for name, tensor in base_tensors(backbone.model).items()}
    tuned = inject(backbone, spec_of(method), rows=examples())

    begun = logits(tuned.model)
    if method in ELSEWHERE:
        assert float((begun - base).abs().max()) > 1e-4
    elif method in ROUNDED:
        assert float((begun - base).norm() / base.norm()) < ROUNDED[method]
    else:
        assert torch.equal(begun, base)
    assert {parameter.dtype for parameter in tuned.trainable.values()} == {torch.float32}
    assert tuned.trainable_parameters == COUNTS[method]

    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    trained(tuned, tmp_path)
    changed = {name for name, p in tuned.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(tuned.names)
    with tuned.as_base() as model:
        assert torch.equal(logits(model), base)

    version = publish_tuned(tuned)
    config = json.loads((tmp_path / "payload/x/adapter_config.json").read_text())
    check_config(config, "x", bits)
    assert config["peft_type"] == peft_type(method)
    fresh = load(bits=bits)
    host = attach(fresh, version)
    assert_same(logits(host.model), logits(tuned.model), method)
    after = base_tensors(fresh.model)
    assert len(after) == len(tensors)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())

    continued = resume_adapter(load(bits=bits), version, AdapterSpec(method=method, **SETTINGS[method]))
    assert_same(logits(continued.model), logits(tuned.model), method)
    assert continued.spec.record() == tuned.spec.record()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "vera"])
def test_over_16_bits_the_numbers_stay_as_they_were_trained(
    load: Callable[..., Any], publish_tuned: Callable[..., Any], method: str, dtype: str
) -> None:
    """PEFT rounds what it loads into a model on the meta device to the base's dtype."""
    tuned = [disturbed(inject(load(bits=16, dtype=dtype), spec_of(method, seed=seed))) for seed in (0, 1)]
    first, second = (publish_tuned(each, name) for each, name in zip(tuned, ("first", "second"), strict=True))
    host = attach(load(bits=16, dtype=dtype), first)
    assert torch.equal(logits(host.model), logits(tuned[0].model))
    spare = host.model.base_model if method in ("lora", "pissa") else None  # others are built anew
    host.detach("first")
    host.activate(host.attach(second))
    assert torch.equal(logits(host.model), logits(tuned[1].model))
    assert spare in (None, host.model.base_model)


MERGED = {name: {} for name in NAMES if name not in ("loftq", "prompt_tuning", "prefix_tuning")}
MERGED["lora with tokens"] = {"tokens": [40, 50]}


@pytest.mark.full
@pytest.mark.parametrize("case", MERGED)
def test_merged_into_the_base_it_computes_the_same(
    load: Callable[..., Any], registry: Any, publish_tuned: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    spec = spec_of(case.partition(" ")[0], **MERGED[case])
    tuned = disturbed(inject(load(bits=32), spec, rows=examples()))
    publish_tuned(tuned)
    merged = merged_logits(load, registry, tmp_path)
    torch.testing.assert_close(merged, logits(tuned.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", NAMES)
def test_a_method_trains_over_no_bits_that_it_cannot_be_attached_over(method: str) -> None:
    assert set(METHODS[method].bits) <= set(ATTACHABLE[peft_type(method)])


@pytest.mark.parametrize(
    ("method", "bits", "reason"),
    [
        ("loha", 4, "shape of the packed weight"),
        ("lokr", 4, "shape of the packed weight"),
        ("loftq", 32, "these weights are not quantized"),
        ("loftq", 16, "these weights are not quantized"),
    ],
)
def test_pairs_that_do_not_go_are_refused_with_the_reason(
    load: Callable[..., Any], method: str, bits: int, reason: str
) -> None:
    backbone = load(bits=bits)
    with pytest.raises(TuningError, match=reason):
        inject(backbone, spec_of(method))
    assert inject(backbone, spec_of("lora")).names, "nothing was left behind"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "adalora", "r": 8, "init_r": 8},
        {"method": "lora", "target_modules": "auto"},
        {"method": "ia3", "feedforward_modules": ["down_proj"]},
        {"method": "ia3", "r": 4},
        {"method": "trainable_tokens"},
        {"method": "trainable_tokens", "tokens": []},
        {"method": "prompt_tuning", "layers": "top:1"},
    ],
)
def test_settings_that_contradict_the_method(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(settings["method"])):
        AdapterSpec.model_validate(settings)


# -- LoRA's gradients (Hu et al. 2021), and DoRA's norms


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa"])
def test_gradients_are_the_full_ones_seen_through_the_factors(load: Callable[..., Any], method: str) -> None:
    """∇B = s G Aᵀ and ∇A = s Bᵀ G, with G of the merged weight; at B = 0 the second is exactly 0."""
    tuned = inject(load(bits=32), spec_of(method))
    layers = {n: m for n, m in tuned.model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}
    assert len(layers) == 14
    for begun in (True, False):
        if not begun:
            disturbed(tuned)
        tuned.model.zero_grad()
        tuned.model(input_ids=IDS, labels=IDS).loss.backward()
        merged = load(bits=32).model
        with torch.no_grad():
            for name, layer in layers.items():
                inner = merged.get_submodule(name.removeprefix("base_model.model."))
                inner.weight += (
                    layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                )
        merged.requires_grad_(True)
        merged(input_ids=IDS, labels=IDS).loss.backward()
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            full = merged.get_submodule(name.removeprefix("base_model.model.")).weight.grad
            wanted_a = layer.scaling["default"] * b.T.detach() @ full
            wanted_b = layer.scaling["default"] * full @ a.T.detach()
            if method == "pissa":  # the second half is the beginning, which stays
                wanted_a[4:], wanted_b[:, 4:] = 0, 0
            elif begun:
                assert not a.grad.any()
            torch.testing.assert_close(a.grad, wanted_a, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(b.grad, wanted_b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_what_adalora_divides_by_is_not_trained(bases: dict[str, Path], bits: int, tmp_path: Path) -> None:
    """Over layers that compute in 16 bits too, where PEFT makes a trained parameter of the rank that is left."""
    quant = QuantSpec.model_validate({"bits": bits, "compute_dtype": "float32" if bits == 32 else "bfloat16"})
    tuned = inject(load_backbone(BaseSpec(source=str(bases["llama"])), quant, tmp_path / "cache"), spec_of("adalora"))
    assert tuned.trainable_parameters == COUNTS["adalora"]
    assert not any("ranknum" in name for name in tuned.names)


def test_dora_keeps_every_row_at_its_magnitude(load: Callable[..., Any]) -> None:
    tuned = disturbed(inject(load(bits=32), spec_of("dora")))
    found = 0
    for layer in tuned.model.modules():
        if "default" in getattr(layer, "lora_magnitude_vector", {}):
            with torch.no_grad():
                weight = layer(torch.eye(layer.in_features)).T
            magnitude = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(weight.norm(dim=1), magnitude.abs(), rtol=1e-5, atol=1e-6)
            found += 1
    assert found == 14


# -- where they go


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2"])
def test_layers_are_found_in_every_family(load: Callable[..., Any], bases: dict[str, Path], kind: str) -> None:
    for method in ("lora", "ia3", "vera"):
        whole = inject(load(bases[kind], bits=32), spec_of(method))
        part = inject(load(bases[kind], bits=32), spec_of(method, layers="top:1"))
        at = depths(whole.model)
        assert set(part.names) == {name for name in whole.names if at.of[name] == 2}
        assert 2 * len(part.names) == len(whole.names)


def test_layers_with_endings_and_with_none(load: Callable[..., Any]) -> None:
    spec = spec_of("lora", layers="0", target_modules=["q_proj", "mlp.up_proj"])
    names = inject(load(bits=4), spec).names
    assert sorted({name.split(".lora_")[0].partition("layers.")[2] for name in names}) == [
        "0.mlp.up_proj",
        "0.self_attn.q_proj",
    ]
    with pytest.raises(TuningError, match="names nothing in the layers 0"):
        inject(load(bits=4), spec_of("lora", layers="0", target_modules=["c_attn"]))
    with pytest.raises(TuningError, match="layers 0 to 1"):
        inject(load(bits=4), spec_of("vera", layers="1-2"))


def test_ia3_over_an_unknown_base_says_what_to_set(
    load: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_base(tmp_path / "other")
    backbone = load(folder, bits=32)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"model_type": "llama"', '"model_type": "llama-of-mine"'))
    with pytest.raises(TuningError, match="keys, values and feed-forward ends") as caught:
        inject(backbone, AdapterSpec(method="ia3"))
    assert "adapter.feedforward_modules" in str(caught.value)
    given = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    assert inject(backbone, AdapterSpec(method="ia3", **given)).trainable_parameters == COUNTS["ia3"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]},
        {"target_modules": "all-linear", "feedforward_modules": ["mlp.down_proj"], "layers": "top:1"},
    ],
)
def test_ia3_is_attached_however_its_layers_were_named(
    load: Callable[..., Any], publish_tuned: Callable[..., Any], settings: dict[str, Any]
) -> None:
    tuned = disturbed(inject(load(bits=32), spec_of("ia3", **settings)))
    layers = {name: layer for name, layer in tuned.model.named_modules() if hasattr(layer, "is_feedforward")}
    assert {name for name in layers if layers[name].is_feedforward} == {n for n in layers if n.endswith("down_proj")}
    version = publish_tuned(tuned)
    assert torch.equal(logits(attach(load(bits=32), version).model), logits(tuned.model))
    again = resume_adapter(load(bits=32), version, tuned.spec)
    assert torch.equal(logits(again.model), logits(tuned.model))


@pytest.mark.parametrize(
    ("targets", "inputs", "mended"),
    [
        (["k_proj"], ["down_proj"], r"adapter.target_modules=\[k_proj,down_proj\]"),
        ("all-linear", ["w2"], "adapter.feedforward_modules, from: .*down_proj"),
    ],
)
def test_ia3_refuses_feedforward_layers_that_it_does_not_adapt(
    load: Callable[..., Any], targets: Any, inputs: list[str], mended: str
) -> None:
    backbone = load(bits=32)
    with pytest.raises(TuningError, match=mended):
        inject(backbone, spec_of("ia3", target_modules=targets, feedforward_modules=inputs))
    assert inject(backbone, spec_of("lora")).names, "nothing was left behind"


@pytest.mark.parametrize("method", NAMES)
def test_over_layers_of_gpt2_a_method_works_or_says_which_does(
    load: Callable[..., Any], bases: dict[str, Path], method: str
) -> None:
    backbone = load(bases["gpt2"], bits=8 if method == "loftq" else 32)
    if method not in ("loha", "lokr", "oft"):
        assert inject(backbone, spec_of(method), rows=examples()).names
        return
    with pytest.raises(TuningError, match=r"knows no layers of type Conv1D.*transformer\.h\.0\.attn\.c_attn") as caught:
        inject(backbone, spec_of(method))
    assert "all-linear" not in str(caught.value)
    assert "adapter.method=lora" in str(caught.value)


def test_specs_share_no_list() -> None:
    for method in ("lora", "ia3"):
        for name, value in spec_of(method).model_dump().items():
            if isinstance(value, list):
                getattr(spec_of(method), name).append("x")
                assert getattr(spec_of(method), name) == value


def test_vera_draws_its_projections_from_the_seed(load: Callable[..., Any]) -> None:
    first, again, other = (inject(load(bits=32), spec_of("vera", seed=seed)).model for seed in (0, 0, 1))
    for name in ("vera_A", "vera_B"):
        drawn = [getattr(model.base_model, name)["default"] for model in (first, again, other)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


def test_oft_says_when_it_takes_another_block_size(load: Callable[..., Any]) -> None:
    events: list[Any] = []
    tuned = inject(load(bits=32), spec_of("oft", oft_block_size=24), report=events.append)
    (said,) = [event.text for event in events if isinstance(event, Warned)]
    assert "14 layers have blocks of another size than oft_block_size=24" in said
    assert tuned.names


# -- tokens


def test_tokens_are_given_as_text_or_as_ids(load: Callable[..., Any]) -> None:
    tokenizer = load(bits=32).tokenizer
    assert token_ids(tokenizer, ["<|im_end|>", 7, 7]) == [2, 7]
    with pytest.raises(TuningError, match=r"splits 'ab' into 2 tokens: \['a', 'b'\]"):
        token_ids(tokenizer, ["ab"])
    with pytest.raises(TuningError, match="no token has the id 259"):
        token_ids(tokenizer, [259])


@pytest.mark.parametrize("method", ["trainable_tokens", "lora"])
def test_only_the_rows_of_the_tokens_change(
    load: Callable[..., Any], publish_tuned: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    """The head of this base is tied: its rows of these tokens change with them, and no others."""
    tuned = inject(load(bits=4), spec_of(method, tokens=[50, 60]))
    if method == "lora":
        assert tuned.trainable_parameters == COUNTS["lora"] + 2 * 64
    ids = torch.arange(259)[None]
    table = tuned.model.get_input_embeddings()
    with torch.no_grad():
        before = table(ids)
    trained(tuned, tmp_path)
    with torch.no_grad():
        changed = (table(ids) != before).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == [50, 60]
    assert torch.equal(logits(attach(load(bits=4), publish_tuned(tuned)).model), logits(tuned.model))


# -- virtual tokens


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_begin_as_real_ones(load: Callable[..., Any], method: str, bits: int) -> None:
    backbone = load(bits=bits)
    ids = common_tokens(backbone, 3, seed=5)
    assert len(set(ids)) == 3
    assert min(ids) > 2, "control tokens are not among them"
    given = torch.cat([torch.tensor([ids, ids]), IDS], dim=1)
    expected = logits(backbone.model, given)[:, 3:]
    events: list[Any] = []
    tuned = inject(backbone, spec_of(method, seed=5), report=events.append)
    torch.testing.assert_close(logits(tuned.model), expected, rtol=1e-5, atol=1e-5)
    assert any("the logits are not the base's" in str(event) for event in events)


def test_prefixes_fit_heads_that_are_not_a_share_of_the_width(load: Callable[..., Any], tmp_path: Path) -> None:
    write_family(tmp_path / "qwen3", "qwen3")  # 2 heads of keys, 128 wide each, over a width of 64
    backbone = load(tmp_path / "qwen3", bits=32)
    given = torch.cat([torch.tensor([common_tokens(backbone, 3, seed=0)] * 2), IDS], dim=1)
    expected = logits(backbone.model, given)[:, 3:]
    tuned = inject(backbone, spec_of("prefix_tuning"))
    assert tuned.trainable_parameters == 2 * 2 * 3 * 2 * 128
    torch.testing.assert_close(logits(tuned.model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_padding_changes_nothing_in_training(load: Callable[..., Any], method: str) -> None:
    tuned = disturbed(inject(load(bits=32), spec_of(method)))
    tuned.model.train()
    rows, device = examples(), torch.device("cpu")
    together = token_nll(tuned.model, pad(rows, 2, device)).sum(dim=1)
    alone = torch.stack([token_nll(tuned.model, pad([row], 2, device)).sum() for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    together.sum().backward()
    (parameter,) = tuned.trainable.values()
    gradient, parameter.grad = parameter.grad, None
    alone.sum().backward()
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_prefixes_do_not_go_with_checkpointing(load: Callable[..., Any], tmp_path: Path) -> None:
    tuned = inject(load(bits=32), spec_of("prefix_tuning"))
    with pytest.raises(TrainingError, match="prefixes lie in the cache"):
        trained(tuned, tmp_path, gradient_checkpointing=True)


@pytest.mark.full
def test_prompts_train_alike_with_checkpointing(load: Callable[..., Any], tmp_path: Path) -> None:
    one, other = (inject(load(bits=32), spec_of("prompt_tuning")) for _ in range(2))
    trained(one, tmp_path / "one")
    trained(other, tmp_path / "other", gradient_checkpointing=True)
    for name, parameter in one.trainable.items():
        torch.testing.assert_close(parameter, other.trainable[name], rtol=1e-4, atol=1e-6)
