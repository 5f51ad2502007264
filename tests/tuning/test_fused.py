"""LoRA in one step of autograd: the arithmetic of PEFT's four, nothing kept twice, and no trace of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from training.passes.lab import CPU, adapted, apart, gradients, moved, tiny, turns

from peftkit.generation.forward import autocast, pad
from peftkit.training.memory import checkpoint_activations
from peftkit.training.regularize.losses import TokenLoss
from peftkit.tuning.fused import _Added, _Linear, fused_lora
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

ROWS = turns((9, 5, 12))


@pytest.fixture
def tuned(load: Callable[..., Any]) -> Callable[..., Any]:
    """An adapter in the tiny base, or in another folder's; keywords of AdapterSpec."""

    def tuned(folder: Path | None = None, *, bits: int, **settings: Any) -> Any:
        return inject(load(folder, bits=bits), AdapterSpec(**settings))

    return tuned


def losses(model: Any, *, fused: bool, compute: torch.dtype = torch.float32) -> tuple[float, int, dict[str, Any]]:
    """One pass: its loss, how many layers were fused in it, and its gradients."""
    model.train()
    batch, count = pad(ROWS, 2, CPU), 0
    if fused:
        with fused_lora(model) as count, autocast(CPU, compute):
            loss, _ = TokenLoss()(model, batch)
            loss.backward()
    else:
        with autocast(CPU, compute):
            loss, _ = TokenLoss()(model, batch)
        loss.backward()
    return float(loss.detach()), count, gradients(model)


def assert_same(model: Any, layers: int, *, within: float = 1e-5, compute: torch.dtype = torch.float32) -> None:
    """So many layers are fused, and what they compute is what PEFT computes."""
    plain, none, wanted = losses(model, fused=False, compute=compute)
    again = losses(model, fused=False, compute=compute)[2]
    assert (none, apart(again, wanted)) == (0, 0), "the pass is deterministic"
    found, count, trained = losses(model, fused=True, compute=compute)
    assert count == layers
    assert found == pytest.approx(plain, rel=within)
    assert apart(trained, wanted) <= within


def by_hand(x: Any, result: Any, a: Any, b: Any, scaling: float, pull: Any) -> tuple[Any, ...]:
    """The sum and its slopes by result, x, A and B, one position at a time, in float64."""
    x, result, a, b, pull = (value.detach().double() for value in (x, result, a, b, pull))
    added, by_x = torch.zeros_like(result), torch.zeros_like(x)
    by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
    for at in range(x.shape[0]):
        for i in range(b.shape[0]):
            for j in range(a.shape[0]):
                low = float((a[j] * x[at]).sum())
                added[at, i] += scaling * b[i, j] * low
                by_x[at] += pull[at, i] * scaling * b[i, j] * a[j]
                by_a[j] += pull[at, i] * scaling * b[i, j] * x[at]
                by_b[i, j] += pull[at, i] * scaling * low
    return result + added, pull, by_x, by_a, by_b


def numbers(dtype: torch.dtype = torch.float64, scaling: float = 1.5) -> tuple[Any, ...]:
    torch.manual_seed(0)
    shapes = ((7, 6), (7, 5), (3, 6), (5, 3))  # x, result, A, B
    return (*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes), scaling)


@pytest.mark.parametrize("layout", ["own memory", "a view", "not contiguous"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1)])
def test_the_product_and_its_slopes_are_those_of_the_definition(layout: str, shape: tuple[int, ...]) -> None:
    x, result, a, b, scaling = numbers()
    base = {
        "own memory": lambda value: value.clone(),
        "a view": lambda value: value.clone().flatten().view(value.shape),
        "not contiguous": lambda value: value.clone().t().contiguous().t(),
    }[layout](result.view(*shape, 5) if layout != "not contiguous" else result)
    base = base.view(*shape, 5) if layout != "not contiguous" else base
    given = x.view(*shape, 6) if layout != "not contiguous" else x
    found = _Added.apply(base, given, a, b, scaling)
    pull = torch.randn(7, 5, dtype=torch.float64)
    slopes = torch.autograd.grad(found, (result, x, a, b), pull.view(found.shape))
    wanted, *right = by_hand(x, result, a, b, scaling, pull)
    torch.testing.assert_close(found.view(7, 5), wanted, rtol=1e-12, atol=1e-12)
    for slope, expected in zip(slopes, right, strict=True):
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (1, 2, 3), (2, 3), (2,), (3,), (0,)])
def test_gradcheck(needed: tuple[int, ...]) -> None:
    """In float64, with gradients of some inputs alone: the lowest layer's x needs none."""
    x, result, a, b, scaling = numbers()
    values = [value.detach().requires_grad_(at in needed) for at, value in enumerate((result, x, a, b))]

    def added(*changed: torch.Tensor) -> torch.Tensor:
        inputs = list(values)
        for at, value in zip(needed, changed, strict=True):
            inputs[at] = value
        # A layer's result is not a leaf: what is added to it goes over it.
        return _Added.apply(inputs[0].clone(), *inputs[1:], scaling)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(added, [values[at] for at in needed])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needed", [(0, 1, 2), (1, 2)])
def test_gradcheck_of_a_whole_layer(bias: bool, needed: tuple[int, ...]) -> None:
    x, _, a, b, scaling = numbers()
    weight, added = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if bias else None
    values = [value.detach().requires_grad_(at in needed) for at, value in enumerate((x, a, b))]

    def whole(*changed: torch.Tensor) -> torch.Tensor:
        inputs = list(values)
        for at, value in zip(needed, changed, strict=True):
            inputs[at] = value
        return _Linear.apply(inputs[0].view(1, 7, 6), weight, added, *inputs[1:], scaling)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(whole, [values[at] for at in needed])
    base = x.detach() @ weight.t() + (added if added is not None else 0)
    wanted = by_hand(x, base, a, b, scaling, torch.zeros(7, 5))[0]
    torch.testing.assert_close(whole(*(values[at] for at in needed))[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_positions_at_all(shape: tuple[int, ...]) -> None:
    """What an adapted head is given while its input is read off."""
    layer = get_peft_model(nn.Sequential(nn.Linear(64, 128)), LoraConfig(r=4, target_modules=["0"]))
    with fused_lora(layer) as count:
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 128)
    assert count == 1


def test_the_result_is_written_over_where_it_may_be() -> None:
    x, result, a, b, scaling = numbers(torch.float32)
    own = result.detach().clone()
    assert _Added.apply(own, x, a, b, scaling).data_ptr() == own.data_ptr()
    whole = result.detach().clone()
    view = whole.view(7, 5)
    assert _Added.apply(view, x, a, b, scaling).data_ptr() != whole.data_ptr()
    assert torch.equal(whole, result.detach()), "the tensor that it is a view of stays as it was"


def test_x_and_its_low_product_are_kept_and_nothing_else_of_their_size() -> None:
    torch.manual_seed(0)
    layer = get_peft_model(nn.Sequential(nn.Linear(64, 128)), LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(50, 64, requires_grad=True)
    kept: dict[bool, list[tuple[int, ...]]] = {}
    for fused in (False, True):
        shapes: list[tuple[int, ...]] = []

        def keep(value: torch.Tensor, shapes: list[tuple[int, ...]] = shapes) -> torch.Tensor:
            shapes.append(tuple(value.shape))
            return value

        around = fused_lora(layer) if fused else nullcontext()
        with around, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            layer(x).sum().backward()
        kept[fused] = sorted(shape for shape in shapes if shape[0] == 50)
    assert kept[True] == [(50, 4), (50, 64)]
    assert len(kept[False]) >= len(kept[True])


@pytest.mark.parametrize(
    ("name", "layers"), [("LlamaForCausalLM", 14), ("GPT2LMHeadModel", 8), ("Gemma2ForCausalLM", 14)]
)
def test_a_whole_model(name: str, layers: int) -> None:
    assert_same(adapted(tiny(name)).model, layers)


@pytest.mark.parametrize(
    ("lora", "layers"),
    [
        ({"use_rslora": True}, 14),
        ({"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 30}}, 14),
        ({"target_modules": ["q_proj", "lm_head"]}, 3),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 2),
        ({"modules_to_save": ["lm_head"]}, 14),
        ({"bias": "lora_only"}, 14),
        ({"use_dora": True}, 0),
        ({"lora_bias": True}, 0),
        ({"fan_in_fan_out": False, "init_lora_weights": "gaussian"}, 14),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_fused_and_what_is_left_alone(lora: dict[str, Any], layers: int) -> None:
    """Equal either way: a variant of PEFT's own keeps its place."""
    assert_same(adapted(tiny("LlamaForCausalLM"), **lora).model, layers)


def test_a_base_that_is_watched_or_trained_computes_its_own_product() -> None:
    model = adapted(tiny("LlamaForCausalLM")).model
    bases = [layer.base_layer for layer in model.modules() if hasattr(layer, "lora_A")]
    seen: list[torch.Size] = []
    bases[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    bases[5].weight.requires_grad_(True)
    assert_same(model, 14)
    assert len(seen) == 3, "the hook ran in every pass"
    assert "layers.0.mlp.up_proj.base_layer.weight" in "".join(losses(model, fused=True)[2])


def test_names_and_tensors_are_the_same_while_it_lasts() -> None:
    """An optimizer, a penalty or a checkpoint that looks inside a pass sees the model it knows."""
    model = adapted(tiny("Qwen2ForCausalLM")).model
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    keys = list(model.state_dict())
    with fused_lora(model) as count:
        assert count == 14
        assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
        assert list(model.state_dict()) == keys


def test_dropout_is_left_alone() -> None:
    model = adapted(tiny("LlamaForCausalLM"), lora_dropout=0.3).model
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        loss, count, trained = losses(model, fused=fused)
        assert count == 0
        found.append((loss, trained))
    assert found[0][0] == found[1][0]
    assert apart(found[0][1], found[1][1]) == 0


@pytest.mark.parametrize("method", ["adalora", "ia3", "loha"])
def test_other_methods_are_left_alone(tuned: Callable[..., Any], method: str) -> None:
    assert_same(moved(tuned(bits=32, method=method)).model, 0)


def test_two_adapters_at_once_merged_and_disabled_ones_are_left_alone() -> None:
    model = adapted(tiny("LlamaForCausalLM")).model
    with model.disable_adapter(), fused_lora(model) as count:
        assert count == 0
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with fused_lora(model) as count:
        assert count == 14
    model.base_model.set_adapter(["default", "other"])
    with fused_lora(model) as count:
        assert count == 0, "which of the two comes first is PEFT's concern"
    model.set_adapter("other")
    with fused_lora(model) as count:
        assert count == 2
    model.set_adapter("default")
    model.merge_adapter()
    with fused_lora(model) as count:
        assert count == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantized_weights(tuned: Callable[..., Any], make_base: Any, tmp_path: Path, bits: int) -> None:
    """int8 multiplies rounded numbers: what comes before a layer must not differ by a rounding, so 1e-3."""
    base = make_base(tmp_path / "base", initializer_range=0.2)
    assert_same(moved(tuned(base, bits=bits)).model, 14, within=1e-5 if bits == 4 else 1e-3)


@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 14), (torch.bfloat16, 14)])
def test_beneath_autocast(dtype: torch.dtype, layers: int) -> None:
    """bfloat16 rounds to 3 digits, and PEFT adds in another order: a few roundings, not more, and in every tensor."""
    model = adapted(tiny("LlamaForCausalLM", dtype=dtype), compute=torch.bfloat16).model
    plain, _, wanted = losses(model, fused=False, compute=torch.bfloat16)
    found, count, trained = losses(model, fused=True, compute=torch.bfloat16)
    assert count == layers
    assert found == pytest.approx(plain, rel=16 * torch.finfo(torch.bfloat16).eps)
    assert {value.dtype for value in trained.values()} == {value.dtype for value in wanted.values()}
    assert {name: value.dtype for name, value in trained.items()} == dict.fromkeys(trained, torch.float32)
    assert apart(trained, wanted) < 0.2


def test_a_bfloat16_base_without_autocast() -> None:
    """Factors are float32 there, and PEFT casts x up to them: so does the fused step."""
    model = adapted(tiny("LlamaForCausalLM", dtype=torch.bfloat16)).model
    assert_same(model, 14, within=0.1)


def test_with_checkpointing() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    wanted = losses(tuned.model, fused=False)
    checkpoint_activations(tuned)
    found = losses(tuned.model, fused=True)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert apart(found[2], wanted[2]) < 1e-5


def state(model: nn.Module) -> list[Any]:
    """What `fused_lora` touches, of every layer."""
    return [
        (dict(layer.lora_variant), layer.cast_input_dtype_enabled, id(layer.base_layer), sorted(layer.__dict__))
        for layer in model.modules()
        if hasattr(layer, "lora_variant")
    ]


@pytest.mark.parametrize("fails", ["within", "in a backward pass"])
def test_layers_are_as_they_were_after_an_exception(fails: str) -> None:
    model = adapted(tiny("LlamaForCausalLM"), use_rslora=True).model
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_variant")]
    layers[3].cast_input_dtype_enabled = False  # somebody else's choice
    before = state(model)
    assert len(before) == 14

    def stop(gradient: torch.Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), fused_lora(model):
        assert all(set(layer.lora_variant) == {"default"} for layer in layers), "PEFT's own place for it"
        if fails == "within":
            raise RuntimeError("stop")
        loss, _ = TokenLoss()(model, pad(ROWS, 2, CPU))
        loss.register_hook(stop)
        loss.backward()
    assert state(model) == before
    assert all(not layer.lora_variant for layer in layers)


def test_peft_writes_the_same_checkpoint_afterwards(tuned: Callable[..., Any], tmp_path: Path) -> None:
    """Byte by byte, by PEFT's own hand and by ours."""
    one = moved(tuned(bits=4))
    written: list[dict[str, bytes]] = []
    for at in range(2):
        folders = [tmp_path / f"peft {at}", save_adapter(one, tmp_path / f"ours {at}")]
        one.model.save_pretrained(str(folders[0]), save_embedding_layers=False)
        written.append({f"{f.name[:4]}/{p.name}": p.read_bytes() for f in folders for p in sorted(f.iterdir())})
        losses(one.model, fused=True)
    assert written[0] == written[1]
    assert {"peft/adapter_model.safetensors", "ours/adapter_model.safetensors"} <= written[0].keys()


def test_a_step_of_training_changes_the_tensors_that_peft_saves() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    named = {name for name, value in losses(tuned.model, fused=True)[2].items() if float(value.norm()) > 0}
    assert named == set(tuned.names)
