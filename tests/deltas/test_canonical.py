"""The canonical checkpoint: PEFT loads it without a key too many or too few, and computes what the deltas say."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import pytest
import torch
from deltas.variants import VARIANTS, Variant, attached, inputs, write_adapter, write_base
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from peftkit.base.dense import dense_tensors
from peftkit.deltas.canonical import Checkpoint, canonical_lora, write
from peftkit.deltas.combining.combine import combine
from peftkit.deltas.combining.methods import METHODS, How
from peftkit.deltas.delta import Added, Deltas, LowRank, Place
from peftkit.deltas.reading.read import read_deltas
from peftkit.errors import DeltaError
from peftkit.registry.intake.config import check_config

BY_NAME = {variant.name: variant for variant in VARIANTS}
LOW_RANK = (
    *("lora", "rslora", "patterns", "rslora-patterns", "lora-bias", "conv1d", "conv1d-bias", "gpt2-head", "embedding"),
    *("head", "tied-head", "tied-embedding", "tied-both", "convolutions", "experts", "experts-one"),
    *("tied-together", "experts-untransposed", "adalora", "adalora-alpha", "vera", "miss"),
)
Made = Callable[[str], tuple[Any, Deltas, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Variant → (its base, its deltas, what PEFT computes with it attached); each made once."""
    root = tmp_path_factory.mktemp("variants")
    bases: dict[str, Any] = {}
    kept: dict[str, tuple[Any, Deltas, Any]] = {}

    def make(name: str) -> tuple[Any, Deltas, Any]:
        variant = BY_NAME[name]
        if name not in kept:
            if variant.base not in bases:
                bases[variant.base] = write_base(root / variant.base, variant.base)
            write_adapter(variant, bases[variant.base], root / name)
            logits = run(attached(variant, bases[variant.base], root / name), variant)
            kept[name] = bases[variant.base], deltas_of(root / name, root / variant.base, name), logits
        return kept[name]

    make.root = root  # type: ignore[attr-defined]
    return make


def deltas_of(folder: Path, base: Path, name: str) -> Deltas:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    return read_deltas(
        name, "peft", config, tensors, dense_tensors(base), json.loads((base / "config.json").read_text())
    )


def run(model: Any, variant: Variant) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(variant)).logits.double()


def loaded(base: Any, folder: Path) -> Any:
    """What PEFT makes of a folder; a key that the file lacks is an error, and so is one that the model lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        keys = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(keys) == set(load_file(str(folder / "adapter_model.safetensors")))
    return model


def relative(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> float:
    """The error as a share of what the adapter changes."""
    return float((found - expected).norm() / (expected - base).norm())


@pytest.mark.parametrize("name", LOW_RANK)
def test_peft_computes_the_same_with_the_canonical_checkpoint(made: Made, name: str, tmp_path: Path) -> None:
    """For every variant that has factors: by `exact` with weight 1, which is the identity."""
    base, deltas, logits = made(name)
    folder = made.root / BY_NAME[name].base  # type: ignore[attr-defined]
    combined = combine([deltas], [1.0], How("exact"), dense_tensors(folder))
    checkpoint = canonical_lora(combined, task_type=None)
    config = checkpoint.config
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert config["fan_in_fan_out"] == any(place.layer == "conv1d" for place in deltas.places.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.tensors.values())
    check_config(dict(config), list(checkpoint.tensors))
    found = run(loaded(base, write(checkpoint, tmp_path)), BY_NAME[name])
    assert relative(found, logits, run(base, BY_NAME[name])) < 1e-5
    direct = canonical_lora(deltas, task_type=None)
    assert direct.config == config
    for key, tensor in checkpoint.tensors.items():
        if not deltas.shared:  # the factors of a head that is the embedding share the scaling the other way round
            torch.testing.assert_close(direct.tensors[key], tensor)
    again = deltas_of(tmp_path, folder, name)
    assert set(again.changes) >= set(deltas.changes)
    for tensor, delta in deltas.changes.items():
        assert again.places[tensor] == deltas.places[tensor]
        dense = delta.rows(0, delta.matrix[0])  # type: ignore[attr-defined]
        torch.testing.assert_close(again.changes[tensor].rows(0, delta.matrix[0]), dense, rtol=0, atol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dora", "conv1d-dora", "convolutions-dora", "loha", "lokr", "ia3", "oft", "hira"])
def test_kinds_without_factors_become_lora_at_full_rank(made: Made, name: str, tmp_path: Path) -> None:
    """`svd` on this base at a rank that keeps everything: PEFT computes what the adapter itself does."""
    base, deltas, logits = made(name)
    folder = made.root / BY_NAME[name].base  # type: ignore[attr-defined]
    combined = combine([deltas], [1.0], How("svd"), dense_tensors(folder), rank=72)
    found = run(loaded(base, write(canonical_lora(combined, task_type=None), tmp_path)), BY_NAME[name])
    assert relative(found, logits, run(base, BY_NAME[name])) < 1e-5
    assert combined.converted


def test_adapters_of_other_ranks_scalings_and_layers_add_up_in_peft(made: Made, tmp_path: Path) -> None:
    """0.7 · rsLoRA with patterns + (−1.2) · a head: the dense sum put into the base by hand gives the same logits."""
    base, one, _ = made("rslora-patterns")
    _, other, _ = made("head")
    files = dense_tensors(made.root / "llama")  # type: ignore[attr-defined]
    combined = combine([one, other], [0.7, -1.2], How("exact"), files)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for deltas, weight in ((one, 0.7), (other, -1.2)):
            for name, delta in deltas.changes.items():
                assert isinstance(delta, LowRank)
                product = delta.scale * (delta.left.double() @ delta.right.double())
                model.get_parameter(name).add_(weight * product)
    variant = BY_NAME["lora"]
    found = run(loaded(base, write(canonical_lora(combined, task_type=None), tmp_path)), variant)
    assert relative(found, run(model, variant), run(base, variant)) < 1e-5


def test_the_same_deltas_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    _, deltas, _ = made("patterns")
    files = dense_tensors(made.root / "llama")  # type: ignore[attr-defined]
    written = []
    for at in range(2):
        backwards = dict(reversed(deltas.changes.items())) if at else deltas.changes
        given = Deltas(deltas.reference, backwards, deltas.places)
        combined = combine([given], [1.0], How("dare_linear", {"seed": 3}), files, rank=9, max_residual=2)
        folder = write(canonical_lora(combined), tmp_path / str(at))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"adapter_config.json", "adapter_model.safetensors"}


class Twins(torch.nn.Module):
    """`lin` and `inner.lin`: the first one's whole name is the other's ending."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)
        self.inner = torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["lin"](self.lin(x))


def test_a_module_whose_name_ends_alike_is_not_matched(tmp_path: Path) -> None:
    delta = LowRank((4, 4), torch.ones(4, 1), torch.ones(1, 4))
    deltas = Deltas("a@1", {"lin.weight": delta}, {"lin.weight": Place("lin", "linear")})
    naive = write(canonical_lora(deltas, task_type=None), tmp_path / "naive")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(Twins(), str(naive))
    checkpoint = canonical_lora(deltas, task_type=None, modules=["lin", "inner.lin", "inner"])
    assert checkpoint.config["exclude_modules"] == ["inner.lin"]
    base = Twins()
    model = loaded(base, write(checkpoint, tmp_path / "whole"))
    x = torch.arange(4.0)
    torch.testing.assert_close(model(x), base.inner["lin"](base.lin(x) + x.sum()))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_every_dimension(dims: int, tmp_path: Path) -> None:
    kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    base = torch.nn.ModuleDict({"conv": kind(3, 5, 2)})
    shape = tuple(base["conv"].weight.shape)
    random = torch.Generator().manual_seed(1)
    delta = LowRank(shape, torch.randn(5, 2, generator=random), torch.randn(2, 3 * 2**dims, generator=random), 0.5)
    deltas = Deltas("a@1", {"conv.weight": delta}, {"conv.weight": Place("conv", "conv")})
    model = loaded(base, write(canonical_lora(deltas, task_type=None), tmp_path))
    x = torch.randn(1, 3, *[4] * dims, generator=random)
    changed = copy.deepcopy(base["conv"])
    changed.weight.data += (0.5 * delta.left @ delta.right).reshape(shape)
    torch.testing.assert_close(model.base_model.model["conv"](x), changed(x))


def test_only_the_layers_that_change_are_named(made: Made) -> None:
    _, deltas, _ = made("experts")
    config = canonical_lora(deltas).config
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    experts = "model.layers.0.mlp.experts"
    assert config["target_parameters"] == [f"{experts}.down_proj", f"{experts}.gate_up_proj"]


@pytest.mark.parametrize(
    ("layer", "delta", "said"),
    [
        ("linear", Added((4, 4), torch.ones(4, 4)), r"x\.weight \(values\)"),
        ("other", LowRank((4, 4), torch.ones(4, 1), torch.ones(1, 4)), r"x\.weight \(LoRA\)"),
        ("bias", Added((4,), torch.ones(1, 4)), "the bias of x changes and its weight does not"),
        ("linear", LowRank((4, 4), torch.full((4, 1), 1e30), torch.ones(1, 4), 1e30), "float32"),
    ],
)
def test_what_lora_cannot_hold_is_refused_by_name(layer: Any, delta: Any, said: str) -> None:
    with pytest.raises(DeltaError, match=said):
        canonical_lora(Deltas("a@1", {"x.weight": delta}, {"x.weight": Place("x", layer)}))


def test_a_mixture_that_peft_cannot_hold_is_refused() -> None:
    places = {"a": Place("a", "linear"), "b": Place("a", "bias", "bias"), "wte": Place("wte", "embedding")}
    low = LowRank((4, 4), torch.ones(4, 1), torch.ones(1, 4))
    deltas = Deltas("a@1", {"a": low, "b": Added((4,), torch.ones(1, 4)), "wte": low}, places)
    with pytest.raises(DeltaError, match="bias and embedding together: b, wte"):
        canonical_lora(deltas)


# --- beside PEFT ---


def weighted(base: Any, folder: Path, **settings: Any) -> Checkpoint | Any:
    """PEFT's add_weighted_adapter of one adapter with weight 1."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), adapter_name="one")
    model.add_weighted_adapter(["one"], [1.0], "merged", **settings)
    model.set_adapter("merged")
    return model.eval()


@pytest.mark.parametrize(
    ("name", "wrong"), [("lora", 0.0), ("rslora", 3**0.5 - 1), ("lora-bias", None), ("dora", None)]
)
def test_pefts_identity_is_wrong_where_ours_holds(
    made: Made, name: str, wrong: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contract with peft 0.21: its merge of one adapter is √r too large for rsLoRA and loses biases and DoRA's norms.

    When this fails because PEFT is right, `docs` and the benchmark's reading change too (peft issue 3761).
    """
    base, deltas, logits = made(name)
    root: Path = made.root  # type: ignore[attr-defined]
    theirs = weighted(base, root / name)
    still = run(base, BY_NAME[name])
    their_error = relative(run(theirs, BY_NAME[name]), logits, still)
    how, rank = (How("svd"), 24) if name == "dora" else (How("exact"), None)
    combined = combine([deltas], [1.0], how, dense_tensors(root / BY_NAME[name].base), rank=rank)
    ours = run(loaded(base, write(canonical_lora(combined, task_type=None), tmp_path)), BY_NAME[name])
    our_error = relative(ours, logits, still)
    with capsys.disabled():
        print(f"\n  one adapter of weight 1 ({name}): logits of PEFT off by {their_error:.2g}, ours by {our_error:.1g}")
    assert our_error < 1e-5
    if wrong == 0.0:
        assert their_error < 1e-5
    else:
        assert their_error > 0.05
    if wrong:  # of each ΔW exactly
        module = theirs.base_model.model.model.layers[0].self_attn.q_proj
        one, merged = module.get_delta_weight("one"), module.get_delta_weight("merged")
        torch.testing.assert_close(merged, (1 + wrong) * one)


def test_pefts_linear_is_not_the_sum_of_the_deltas_and_ours_is(made: Made, tmp_path: Path) -> None:
    """Two random adapters: PEFT adds up A and B apart, and is off by about the size of the sum itself."""
    base, one, _ = made("lora")
    files = dense_tensors(made.root / "llama")  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(3)
    changes = {
        name: LowRank(delta.shape, torch.randn(delta.left.shape, generator=random), delta.right.roll(1, 1), 0.5)
        for name, delta in one.changes.items()
        if isinstance(delta, LowRank)
    }
    other = Deltas("other@1", changes, one.places)
    for name, deltas in (("one", one), ("other", other)):
        write(canonical_lora(deltas, task_type=None), tmp_path / name)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "other"), "other")
    model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "merged", combination_type="linear")
    combined = combine([one, other], [0.5, 0.5], How("linear"), files, rank=6)
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = 0.5 * (module.get_delta_weight("one") + module.get_delta_weight("other")).double()
    theirs = module.get_delta_weight("merged").double()
    ours = combined.changes["model.layers.0.self_attn.q_proj.weight"].dense(lambda first, last: torch.empty(0))
    assert float((theirs - expected).norm() / expected.norm()) > 0.5
    assert float((ours - expected).norm() / expected.norm()) < 1e-6


def test_every_method_gives_a_checkpoint_that_peft_loads(made: Made, tmp_path: Path) -> None:
    base, one, _ = made("lora")
    _, other, _ = made("rslora")
    files = dense_tensors(made.root / "llama")  # type: ignore[attr-defined]
    for name, method in METHODS.items():
        rank = 16 if method.ranked else None
        combined = combine([one, other], [0.6, 0.4], How(name), files, rank=rank)
        folder = write(canonical_lora(combined, task_type=None), tmp_path / name)
        assert loaded(base, folder) is not None, name
