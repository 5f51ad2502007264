"""Adapter tensors → ΔW, against formulas in numpy, against what PEFT computes, and refused where there is none."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from deltas import reference
from deltas.variants import BASES, VARIANTS, Variant, attached, inputs, write_adapter, write_base
from safetensors.torch import load_file

from peftkit.base.dense import Dense, dense_tensors
from peftkit.base.ref import read_config
from peftkit.deltas.delta import Delta, Deltas, LowRank, Rows
from peftkit.deltas.reading.names import CONV1D_TYPES, TRANSPOSED_EXPERTS_TYPES
from peftkit.deltas.reading.patterns import for_module
from peftkit.deltas.reading.products import factored
from peftkit.deltas.reading.read import READERS, deltas_of, read_deltas
from peftkit.errors import DeltaError
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry
from peftkit.tuning.stored import read

BY_NAME = {variant.name: variant for variant in VARIANTS}

# What PEFT saves beside a method's tensors is not part of the numpy reference; the logits cover it.
BESIDE = ("saved", "tokens", "grown", "biases", "together", "norms")


@dataclass(frozen=True)
class Base:
    """One tiny base in memory and on disk."""

    model: Any
    folder: Path
    tensors: dict[str, Dense]
    config: dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """One adapter on disk, and its base."""

    variant: Variant
    base: Base
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        found: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        return found

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """adapter_model.safetensors."""
        return load_file(self.folder / "adapter_model.safetensors")

    def read(self, **changed: Any) -> Deltas:
        """Its deltas, after changing what `read_deltas` is given."""
        given = {"config": self.config, "tensors": self.tensors, "base": self.base.tensors, **changed}
        return read_deltas(self.variant.name, "peft", base_config=self.base.config, **given)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def base(name: str) -> Base:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = write_base(folder, name)
            made[name] = Base(model, folder, dense_tensors(folder), read_config(folder))
        return made[name]

    return base


@pytest.fixture(scope="module")
def adapter(base: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    made: dict[str, Adapter] = {}

    def adapter(name: str) -> Adapter:
        if name not in made:
            variant, folder = BY_NAME[name], tmp_path_factory.mktemp(name)
            write_adapter(variant, base(variant.base).model, folder)
            made[name] = Adapter(variant, base(variant.base), folder)
        return made[name]

    return adapter


def rows_of(dense: Dense, delta: Delta) -> Rows:
    """Rows of a base's tensor; asking for one that it lacks is an error."""
    columns = delta.matrix[1]

    def rows(first: int, last: int) -> torch.Tensor:
        assert 0 <= first <= last <= math.prod(dense.shape) // columns
        return torch.from_numpy(dense.part(first * columns, last * columns).astype(np.float64)).reshape(-1, columns)

    return rows


def whole(name: str, deltas: Deltas, base: Mapping[str, Dense], step: int | None = None) -> torch.Tensor:
    """A merged tensor, computed `step` rows at a time."""
    delta = deltas.changes[name]
    rows, read = delta.matrix[0], rows_of(base[deltas.sources.get(name, name)], delta)
    step = step or max(rows, 1)
    pieces = [delta.merged(first, min(first + step, rows), read) for first in range(0, rows, step)]
    return torch.cat(pieces).reshape(delta.shape)


def with_merged(base: Base, deltas: Deltas) -> Any:
    """The base's model with every changed tensor in its place."""
    model = copy.deepcopy(base.model)
    if deltas.untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name in deltas.changes:
        module, _, parameter = name.rpartition(".")
        getattr(model.get_submodule(module), parameter).data = whole(name, deltas, base.tensors).float()
    return model


@pytest.mark.parametrize("name", BY_NAME)
def test_merged_logits_are_those_of_peft(name: str, adapter: Callable[[str], Adapter]) -> None:
    """PEFT's own model with the adapter attached, and the base with W′ in W's place, in float32."""
    one = adapter(name)
    given = inputs(one.variant)
    with torch.no_grad():
        expected = attached(one.variant, one.base.model, one.folder)(**given).logits
        found = with_merged(one.base, one.read())(**given).logits
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", [name for name, one in BY_NAME.items() if one.method != "LORA" or not any(word in name for word in BESIDE)]
)
def test_deltas_are_those_of_the_formulas(name: str, adapter: Callable[[str], Adapter]) -> None:
    """Merged tensors, whole and by uneven pieces of rows, and ΔW, within rounding of float64."""
    one = adapter(name)
    deltas, expected = one.read(), reference.merged(one.base.folder, one.folder)
    before = reference.read_file(one.base.folder / "model.safetensors")
    assert set(deltas.changes) - set(deltas.sources) == set(expected) - set(deltas.sources)
    for tensor, delta in deltas.changes.items():
        if tensor in deltas.sources:  # a tied head of its own: the logits cover it
            continue
        for step in (None, 5):
            np.testing.assert_allclose(whole(tensor, deltas, one.base.tensors, step), expected[tensor], atol=1e-12)
        change = delta.dense(rows_of(one.base.tensors[tensor], delta)).reshape(delta.shape)
        np.testing.assert_allclose(change, expected[tensor] - before[tensor], atol=1e-12)
        assert change.abs().max() > 1e-3 or name == "adalora-pruned"


def test_every_reader_and_base_is_covered() -> None:
    assert {variant.method for variant in VARIANTS} == set(READERS)
    assert {variant.base for variant in VARIANTS} == set(BASES)
    assert len(BY_NAME) == len(VARIANTS) == 78


def test_layers_that_shapes_do_not_tell_are_those_of_transformers() -> None:
    """The model types with Conv1D layers, and those with transposed experts, are found in the installed sources."""
    models = Path(transformers.__file__).parent / "models"
    conv1d, transposed = set(), set()
    for path in models.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^from .*pytorch_utils import .*\bConv1D\b", text, re.MULTILINE):
            conv1d.add(path.parent.name)
        if re.search(r"use_experts_implementation\([^)]*is_transposed=True", text):
            transposed.add(path.parent.name)
    assert conv1d == {name.replace("openai-gpt", "openai") for name in CONV1D_TYPES}
    assert transposed == set(TRANSPOSED_EXPERTS_TYPES) - {"aria_text"}


@pytest.mark.parametrize("name", ["conv1d", "gpt2-head", "ia3-conv1d"])
def test_files_may_leave_out_the_inner_models_name(name: str, adapter: Callable[[str], Adapter]) -> None:
    """GPT-2's own files begin with `h.0.`, not `transformer.h.0.`; the deltas get the names of the files."""
    one = adapter(name)
    short = {tensor.removeprefix("transformer."): dense for tensor, dense in one.base.tensors.items()}
    found, expected = one.read(base=short), one.read()
    assert list(found.changes) == [tensor.removeprefix("transformer.") for tensor in expected.changes]
    for tensor in found.changes:
        full = tensor if tensor in expected.changes else f"transformer.{tensor}"
        assert torch.equal(whole(tensor, found, short), whole(full, expected, one.base.tensors))


@pytest.mark.parametrize("name", ["loha", "loha-effective", "lokr", "lokr-whole", "lokr-both", "lokr-effective"])
def test_hadamard_and_kronecker_products_have_exact_factors(name: str, adapter: Callable[[str], Adapter]) -> None:
    one = adapter(name)
    for tensor, delta in one.read().changes.items():
        low = factored(delta)
        assert isinstance(low, LowRank)
        rows = rows_of(one.base.tensors[tensor], delta)
        torch.testing.assert_close(low.dense(rows), delta.dense(rows), rtol=0, atol=1e-12)
        if name == "loha":
            assert low.rank == 9


def test_a_saved_copy_of_the_bases_embedding_is_no_change(adapter: Callable[[str], Adapter]) -> None:
    """PEFT saves one beside the factors of a targeted embedding; the delta stays additive."""
    for name in ("embedding-kept", "tied-embedding-kept"):
        assert any("base_layer.weight" in key for key in adapter(name).tensors)
        assert all(isinstance(delta, LowRank) for delta in adapter(name).read().changes.values())


@pytest.mark.parametrize("name", ["grown", "tied-grown-embedding"])
def test_rows_that_the_base_lacks_are_changes_as_they_are(name: str, adapter: Callable[[str], Adapter]) -> None:
    """The base has 40 rows of the 44 and is not asked for more."""
    deltas, tensor = adapter(name).read(), "model.embed_tokens.weight"
    delta, base = deltas.changes[tensor], adapter(name).base.tensors
    merged, rows = whole(tensor, deltas, base), rows_of(base[tensor], delta)
    assert delta.shape == (44, 16)
    changed = torch.cat([delta.change(first, min(first + 3, 44), rows) for first in range(0, 44, 3)])
    merged[:40] -= rows(0, 40)
    torch.testing.assert_close(changed, merged, rtol=0, atol=1e-12)


def test_norms_of_columns_are_those_of_the_base_that_is_asked(adapter: Callable[[str], Adapter]) -> None:
    """One delta is merged onto the original and onto what was dequantized."""
    one = adapter("conv1d-dora")
    name, delta = next(iter(one.read().changes.items()))
    rows = rows_of(one.base.tensors[name], delta)

    def doubled(first: int, last: int) -> torch.Tensor:
        return 2 * rows(first, last)

    fresh = one.read().changes[name].merged(0, 3, doubled)
    before = delta.merged(0, 3, rows)
    assert torch.equal(delta.merged(0, 3, doubled), fresh)
    assert torch.equal(delta.merged(0, 3, rows), before)
    assert not torch.allclose(fresh, before)


def test_a_pattern_is_the_end_of_a_name_at_a_dot_or_all_of_it() -> None:
    module = "model.layers.0.q_proj"
    assert [for_module({name: 2}, module, 1) for name in ("q_proj", "0.q_proj", module, f"^{module}")] == [2, 2, 2, 2]
    assert [for_module({name: 2}, module, 1) for name in ("proj", "^q_proj", "v_proj", "layers")] == [1, 1, 1, 1]
    assert for_module({"0.q_proj": 3, "q_proj": 2}, module, 1) == 3


def test_factors_stay_in_the_dtype_that_they_are_stored_in(adapter: Callable[[str], Adapter]) -> None:
    one = adapter("lora")
    halves = {name: tensor.bfloat16() for name, tensor in one.tensors.items()}
    for delta in one.read(tensors=halves).changes.values():
        assert isinstance(delta, LowRank)
        assert delta.left.dtype == torch.bfloat16
        assert torch.equal(delta.rows(0, 2), (delta.left[:2].double() * delta.scale) @ delta.right.double())


def test_places_say_how_peft_names_a_tensor(adapter: Callable[[str], Adapter]) -> None:
    layers = {}
    for name in ("lora", "conv1d", "tied-both", "convolutions", "experts", "lora-bias"):
        layers |= {
            (place.module.rpartition(".")[2], place.parameter): place.layer
            for place in adapter(name).read().places.values()
        }
    wanted = {
        ("q_proj", "weight"): "linear",
        ("c_attn", "weight"): "conv1d",
        ("embed_tokens", "weight"): "embedding",
        ("lm_head", "weight"): "linear",
        ("convolution", "weight"): "conv",
        ("q_proj", "bias"): "bias",
        ("experts", "gate_up_proj"): "experts",
        ("experts", "down_proj"): "experts",
    }
    assert wanted.items() <= layers.items()


def test_deltas_of_a_registered_version_are_those_of_its_files(
    adapter: Callable[[str], Adapter], tmp_path: Path
) -> None:
    one = adapter("dora")
    payload = tmp_path / "payload"
    payload.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(one.folder / name, payload)
    origin = {"source": "tiny", "fingerprint": 64 * "0"}
    version = Registry(tmp_path / "registry").publish("tone", payload, Draft(kind="peft", base=origin))
    found, expected = deltas_of(read(version), one.base.folder), one.read()
    assert found.reference == version.reference
    assert found.places == expected.places
    for name in expected.changes:
        assert torch.equal(whole(name, found, one.base.tensors), whole(name, expected, one.base.tensors))


def test_tensors_kind_replaces_and_takes_a_tied_head_along(base: Callable[[str], Base]) -> None:
    """As tuning/tensors.py attaches them: the embedding with the head, unless the head is given too."""
    one = base("tied")
    embedding, head = torch.randn(40, 16), torch.randn(40, 16)
    names = "model.embed_tokens.weight", "lm_head.weight"

    def read(tensors: dict[str, torch.Tensor]) -> Deltas:
        return read_deltas("a@1", "tensors", {}, tensors, one.tensors, one.config)

    assert read({names[0]: embedding}).sources == {}
    for given in ({names[1]: head}, {names[0]: embedding, names[1]: head}):
        found = read(given)
        assert found.sources == {names[1]: names[0]}
        assert set(found.changes) == set(given)
        for name, values in given.items():
            assert torch.equal(whole(name, found, one.tensors), values.double())


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("lora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ("lora", {"arrow_config": {"top_k": 1}}, "arrow_config"),
        ("lora", {"kasa_config": {"beta": 1}}, "kasa_config"),
        ("lora", {"layer_replication": [[0, 1]]}, "layer_replication"),
        ("lora", {"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ("lora", {"use_qalora": True}, "use_qalora"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ("lora", {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ("lora", {"use_dora": True}, "lora_magnitude_vector"),
        ("lora", {"rank_pattern": {"q_(proj)?": 2}}, "q_(proj)?"),
        ("lora", {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ("lora", {"peft_type": "LILY"}, "depends on the input"),
        ("lora", {"peft_type": "BOFT"}, "BOFT"),
        ("lora", {"peft_type": "IA3"}, "holds tensors that are no known part of IA3"),
        ("lora", {"r": 4}, "factors of rank 3"),
        ("patterns", {"rank_pattern": {}}, "factors of rank"),
        ("embedding", {"r": 4}, "factors of rank 3"),
        ("experts", {"r": 4}, "factors of rank 3"),
        ("adalora", {"init_r": 5}, "factors of rank 4"),
        ("adalora-pruned", {"rank_pattern": None}, "factors of rank"),
        ("loha", {"r": 4}, "factors of rank 3"),
        ("lokr", {"r": 3}, "factors of rank 2"),
        ("delora", {"r": 4}, "factors of rank 3"),
        ("lora", {"lora_alpha": None}, "tensors or settings"),
        ("loha", {"alpha": "much"}, "tensors or settings"),
        ("miss", {"init_weights": "bat"}, "init_weights='bat'"),
        ("tokens", {"trainable_token_indices": {"wte": [7, 3]}}, "which tokens"),
        ("tokens", {"trainable_token_indices": [7, 40]}, "token 40"),
        ("tokens", {"trainable_token_indices": [7]}, "shape"),
        ("oft", {"block_share": True}, "shape"),
        ("saved-norms", {"modules_to_save": None}, "input_layernorm.weight"),
    ],
)
def test_what_has_no_exact_delta_is_refused_by_name(
    name: str, changed: dict[str, Any], said: str, adapter: Callable[[str], Adapter]
) -> None:
    one = adapter(name)
    with pytest.raises(DeltaError, match=re.escape(said)):
        one.read(config=one.config | changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_tensor(value: float, adapter: Callable[[str], Adapter]) -> None:
    one = adapter(next(iter(BY_NAME)))
    key = sorted(one.tensors)[0]
    broken = one.tensors[key].clone()
    broken.view(-1)[-1] = value
    with pytest.raises(DeltaError, match=f"NaN or infinite numbers in {re.escape(key)}"):
        one.read(tensors=one.tensors | {key: broken})


@pytest.mark.parametrize("name", BY_NAME)
def test_a_tensor_too_many_or_too_few_is_refused(name: str, adapter: Callable[[str], Adapter]) -> None:
    """Nothing is passed over: neither a tensor that no reader takes nor one that a reader misses."""
    one = adapter(name)
    tensors = one.tensors
    with pytest.raises(DeltaError, match="other_thing"):
        one.read(tensors=tensors | {"base_model.model.model.layers.0.other_thing": torch.zeros(1)})
    methods = ("lora_A", "lora_B", "lora_E", "hada_", "vera_", "hira_", "delora_")
    for key in sorted(tensors):
        if any(part in key for part in methods) and not key.endswith("bias"):
            for wrong in ({}, {key: torch.zeros(3)}, {key: torch.zeros(3, 5, 7)}):
                with pytest.raises(DeltaError):
                    one.read(tensors={other: value for other, value in tensors.items() if other != key} | wrong)
            break


def test_another_base_is_refused(adapter: Callable[[str], Adapter], base: Callable[[str], Base]) -> None:
    """Modules that the base has not, tensors of another shape, experts that the files hold one by one."""
    with pytest.raises(DeltaError, match="hold no tensor"):
        adapter("lora").read(base=base("gpt2").tensors)
    one = adapter("lora")
    cut = {name: tensor[:, :-1] if "lora_A" in name else tensor for name, tensor in one.tensors.items()}
    with pytest.raises(DeltaError, match="the base's tensor"):
        one.read(tensors=cut)
    loose = {name: dense for name, dense in adapter("head").base.tensors.items() if name != "lm_head.weight"}
    with pytest.raises(DeltaError, match="hold no tensor lm_head"):  # not tied, says its config.json
        adapter("head").read(base=loose)
    wide = one.tensors | {"base_model.model.model.layers.0.self_attn.o_proj.weight": torch.zeros(17, 16)}
    with pytest.raises(DeltaError, match="o_proj"):
        one.read(tensors=wide, config=one.config | {"modules_to_save": ["o_proj"]})
    fused = adapter("experts")
    single = {name.replace("experts.", "experts.0."): dense for name, dense in fused.base.tensors.items()}
    with pytest.raises(DeltaError, match="one by one"):
        fused.read(base=single)


def test_a_bias_that_the_base_lacks_is_refused(adapter: Callable[[str], Adapter]) -> None:
    """PEFT cannot merge it either."""
    one = adapter("lora")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    with pytest.raises(DeltaError, match=r"q_proj\.bias"):
        one.read(tensors=one.tensors | {key: torch.zeros(16)}, config=one.config | {"lora_bias": True})


def test_vera_without_its_projections_is_refused(adapter: Callable[[str], Adapter]) -> None:
    one = adapter("vera")
    kept = {name: tensor for name, tensor in one.tensors.items() if "lambda" in name}
    with pytest.raises(DeltaError, match="save_projection"):
        one.read(tensors=kept)


def test_a_vocabulary_that_grew_on_one_side_is_refused(adapter: Callable[[str], Adapter]) -> None:
    """PEFT saves only the embedding when it is a target of its own: the head's new rows are lost."""
    one = adapter("grown")
    kept = {name: tensor for name, tensor in one.tensors.items() if "lm_head" not in name}
    with pytest.raises(DeltaError, match="44 rows"):
        one.read(tensors=kept)


def test_a_convolution_of_patches_is_refused_for_oft(adapter: Callable[[str], Adapter]) -> None:
    one = adapter("oft-convolutions")
    tensors = {name.replace("shortcut", "layer.1"): tensor for name, tensor in one.tensors.items()}
    with pytest.raises(DeltaError, match="1x1"):
        one.read(tensors=tensors)


def test_a_changed_tied_embedding_parts_from_its_head_unless_both_follow(adapter: Callable[[str], Adapter]) -> None:
    """As PEFT computes it (the logits above): a change of one of the two leaves the other as it was."""
    parted = {name: adapter(name).read().untied for name in BY_NAME if BY_NAME[name].base == "tied"}
    assert parted == {
        **dict.fromkeys(("tied-head", "tied-embedding", "tied-embedding-kept", "tied-both"), True),
        **dict.fromkeys(("tied-saved-embedding", "tied-saved-head", "tied-saved-both"), True),
        **dict.fromkeys(("tied-tokens-apart", "tied-tokens-head"), True),
        **dict.fromkeys(("tied-grown-embedding", "tied-grown-head"), True),
        **dict.fromkeys(("tied-together", "tied-saved-together", "tied-tokens", "tied-grown"), False),
        "tied-trainable-tokens": False,
    }
