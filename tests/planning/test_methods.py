"""Plan against ledger: what every method and strategy really holds in a step, within 5 % in every term."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from plan_lab import CLOSE, check_terms, planned_terms, step_terms
from tiny_bases import write_base, write_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peftkit.backbone.load import load_backbone
from peftkit.backbone.quantize import footprint
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, read_config
from peftkit.data.chat import IGNORED, Example
from peftkit.planning.activations import activations
from peftkit.planning.architecture import architecture
from peftkit.planning.concessions import BITS_OF, choices
from peftkit.planning.disk import disk_plan
from peftkit.planning.families import FAMILIES
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.time import training_flops
from peftkit.planning.weights import trained_parameters
from peftkit.recipe.ahead import weights_held
from peftkit.recipe.setting import what_is_trained, what_regularizers_hold
from peftkit.training.memory import checkpoint_activations
from peftkit.training.objective import objective
from peftkit.training.passes.trying import paths_for
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.partial import dense_layers, partial_names

MODELS = json.loads((Path(__file__).parents[2] / "benchmarks" / "published_memory.json").read_text())["models"]
SMOLLM2 = MODELS["smollm2-135m"]
BLOCKS, ROWS, TOKENS = 5, 2, 64
LLAMA = {"num_hidden_layers": BLOCKS, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
SPECS: list[dict[str, Any]] = [
    {"method": "lora", "r": 8},
    {"method": "lora", "r": 8, "layers": "0,2,4"},
    {"method": "lora", "r": 8, "layers": "top:2"},
    {"method": "lora", "r": 8, "layers": "bottom:1", "tokens": [9]},
    {"method": "rslora", "r": 4},
    {"method": "lora_plus", "r": 4, "lora_dropout": 0.1},
    {"method": "pissa", "r": 4},
    {"method": "dora", "r": 8},
    {"method": "dora", "r": 8, "layers": "1-3"},
    {"method": "adalora", "r": 4, "init_r": 8},
    {"method": "ia3"},
    {"method": "ia3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"], "layers": "top:3"},
    {"method": "vera", "r": 64},
    {"method": "vera", "r": 64, "layers": "1,3"},
    {"method": "loha", "r": 8},
    {"method": "lokr", "r": 4},
    {"method": "lokr", "r": 64, "decompose_factor": 4},
    {"method": "oft"},
    {"method": "oft", "oft_block_size": 64, "layers": "top:1"},
    {"method": "prompt_tuning"},
    {"method": "prefix_tuning"},
    {"method": "trainable_tokens", "tokens": [5, 6, 7]},
    {"method": "full"},
    {"method": "top_layers", "top_layers": 2},
    {"method": "top_layers", "top_layers": 1},
    {"method": "top_layers", "top_layers": 0},
    {"method": "top_layers", "top_layers": 4, "train_head": False},
    {"method": "norms"},
    {"method": "norms", "layers": "0,3"},
    {"method": "patterns", "patterns": ["*.q_proj.weight"]},
    {"method": "patterns", "patterns": ["model.embed_tokens.weight", "model.norm.weight"]},
    {"method": "patterns", "patterns": ["lm_head.weight", "model.layers.3.mlp*"]},
    {"method": "ia3", "target_modules": "all-linear"},
    {"method": "ia3", "target_modules": "all-linear", "feedforward_modules": ["down_proj"]},
    {"method": "norms", "layers": f"top:{BLOCKS}"},
    {"method": "patterns", "patterns": ["*input_layernorm*"]},
    {"method": "lora", "r": 4, "tokens": [9, 9, 7]},
]


@dataclass(frozen=True)
class Cell:
    """One way to train on one base."""

    spec: AdapterSpec
    bits: int
    checkpointing: bool
    compute: Literal["float32", "bfloat16"] = "float32"
    regularize: RegularizeSpec = field(default_factory=RegularizeSpec)
    blocks: int | None = None
    """Of those that checkpointing recomputes."""

    def __str__(self) -> str:
        settings = {name: value for name, value in self.spec.model_dump(exclude_unset=True).items() if name != "method"}
        words = "-".join(f"{name}={value}" for name, value in settings.items()).replace("'", "")
        return f"{self.spec.method}-{words}-{self.bits}-{'checkpointing' * self.checkpointing}"


def cells() -> Iterator[Cell]:
    """Every method over the bits that it trains over, without and with checkpointing."""
    for values in SPECS:
        spec = AdapterSpec(**values)
        for bits in (32, 4):
            for checkpointing in (False, True):
                if bits in METHODS[spec.method].bits and not (checkpointing and spec.method == "prefix_tuning"):
                    yield Cell(spec, bits, checkpointing)


CELLS = list(cells())
QUICK = CELLS[::11]
"""Every eleventh: bits and checkpointing come by turns."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "llama", **LLAMA)


def made_rows(count: int, length: int) -> list[Example]:
    draw = random.Random(0)
    rows = [[draw.randrange(3, 259) for _ in range(length)] for _ in range(count)]
    return [Example(ids, [IGNORED, *ids[1:]], 1, index, f"made:{index}") for index, ids in enumerate(rows)]


def measured(folder: Path, cell: Cell, cache: Path) -> dict[str, int]:
    """The terms of a real step."""
    quant = QuantSpec(bits=cell.bits, compute_dtype=cell.compute, device="cpu")  # type: ignore[arg-type]
    backbone = load_backbone(BaseSpec(source=str(folder)), quant, cache, dense=dense_layers(cell.spec))
    tuned = inject(backbone, cell.spec)
    around = objective(tuned, cell.regularize)
    if cell.checkpointing:
        checkpoint_activations(tuned, cell.blocks)
    paths = paths_for(tuned, TrainSpec(regularize=cell.regularize))
    return step_terms(tuned, made_rows(ROWS, TOKENS), around, paths)


def setting_of(folder: Path, cell: Cell) -> Setting:
    base = architecture(read_config(folder))
    return Setting(
        **what_is_trained(base, cell.spec), **what_regularizers_hold(cell.regularize), bits=cell.bits,  # type: ignore[arg-type]
        compute_dtype=cell.compute, dtype=cell.compute, device="cpu", micro_batch=ROWS, rows_per_step=ROWS,
        longest=TOKENS, labelled=TOKENS - 1, evaluation_batch=1, gradient_checkpointing=cell.checkpointing,
        checkpointed_blocks=cell.blocks,
    )  # fmt: skip


def planned(folder: Path, cell: Cell) -> dict[str, int]:
    return planned_terms(architecture(read_config(folder)), setting_of(folder, cell))


def highest(folder: Path, cell: Cell) -> int:
    """The highest peak of the plan that `planned` is of, without the process."""
    plan = plan_memory(architecture(read_config(folder)), setting_of(folder, cell))
    return plan.stage("train").bytes.high - plan.part("context").bytes.high - plan.part("mapped file").bytes.high


def check(folder: Path, cell: Cell, cache: Path) -> None:
    check_terms(planned(folder, cell), measured(folder, cell, cache))


GPT2 = {"model_type": "gpt2", "vocab_size": 259, "n_embd": 128, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128,
        "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip
TINY_LLAMA = {"model_type": "llama", "vocab_size": 259, **LLAMA}
QWEN2, QWEN3 = ({**TINY_LLAMA, "model_type": name} for name in ("qwen2", "qwen3"))
EVERYWHERE = [
    {"method": "full"}, {"method": "top_layers", "top_layers": 2}, {"method": "top_layers", "top_layers": 0},
    {"method": "norms"}, {"method": "norms", "layers": "1,3"}, {"method": "norms", "layers": f"top:{BLOCKS}"},

]  # fmt: skip
BIASES = [{"method": "bias_only"}, *({"method": "bias_only", "layers": each} for each in (f"top:{BLOCKS}", "2"))]
PATTERNS = {  # norms and biases one by one
    "llama": ["*input_layernorm*"], "gpt2": ["*.ln_2.bias", "*.1.ln_1.weight", "*.c_fc.bias"],
    "qwen2": ["*.0.post_attention_layernorm*", "*.k_proj.bias"], "qwen3": ["*.q_norm.weight", "*.2.input_layernorm*"],
}  # fmt: skip
COUNTED = [
    (config, values)
    for config in (TINY_LLAMA, GPT2, QWEN2, QWEN3)
    for values in (
        *EVERYWHERE, *(BIASES if config in (GPT2, QWEN2) else ()),
        {"method": "patterns", "patterns": PATTERNS[str(config["model_type"])]},
    )
]  # fmt: skip


@pytest.mark.parametrize(("config", "values"), COUNTED, ids=lambda each: "-".join(map(str, each.values()))[:40])
def test_as_many_numbers_are_planned_as_are_trained(config: dict[str, Any], values: dict[str, Any]) -> None:
    model, base, spec = without_numbers(json.dumps(config)), architecture(config), AdapterSpec(**values)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    planned = trained_parameters(base, Setting(**what_is_trained(base, spec)))
    assert planned == sum(tensors[name].numel() for name in partial_names(model, spec))


@lru_cache
def without_numbers(config: str) -> Any:
    values = json.loads(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values.pop("model_type")](**values))
    model.tie_weights()
    return model


@pytest.mark.parametrize("values", [each for each in SPECS if each["method"] in ("ia3", "vera") or "tokens" in each],
                         ids=lambda values: "-".join(map(str, values.values())))  # fmt: skip
def test_as_many_numbers_are_planned_as_an_adapter_has(llama: Path, values: dict[str, Any], tmp_path: Path) -> None:
    base, spec = architecture(read_config(llama)), AdapterSpec(**values)
    tuned = inject(load_backbone(BaseSpec(source=str(llama)), QuantSpec(bits=32), tmp_path), spec)
    planned = trained_parameters(base, Setting(**what_is_trained(base, spec)))
    assert planned == sum(parameter.numel() for parameter in tuned.trainable.values())


def test_every_method_has_cells() -> None:
    tried = {cell.spec.method for cell in CELLS}
    # EVA's factors and LoftQ's are LoRA's, begun elsewhere from data or quantized weights; Llama has no biases.
    assert set(METHODS) - tried == {"eva", "loftq", "bias_only"}
    assert len(CELLS) == 138
    assert len(QUICK) == 13


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_step_holds_what_was_planned(llama: Path, cell: Cell, tmp_path: Path) -> None:
    check(llama, cell, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in QUICK], ids=str)
def test_every_cell_holds_what_was_planned(llama: Path, cell: Cell, tmp_path: Path) -> None:
    check(llama, cell, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "values",
    [{"method": "lora", "r": 8, "lora_dropout": 0.1}, {"method": "top_layers", "top_layers": 2}],
    ids=lambda each: each["method"],
)
@pytest.mark.parametrize("regularize", [RegularizeSpec(l2_sp=0.1), RegularizeSpec(mixout=0.5)],
                         ids=["l2_sp", "mixout"])  # fmt: skip
def test_regularizers(llama: Path, values: dict[str, Any], regularize: RegularizeSpec, checkpointing: bool,
                      tmp_path: Path) -> None:  # fmt: skip
    check(llama, Cell(AdapterSpec(**values), 4, checkpointing, regularize=regularize), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_r_drop(llama: Path, checkpointing: bool, tmp_path: Path) -> None:
    spec = AdapterSpec(method="lora", r=8, lora_dropout=0.1)
    check(llama, Cell(spec, 4, checkpointing, regularize=RegularizeSpec(r_drop=1.0)), tmp_path)


SOME = [({"method": "lora", "r": 8}, bits, count) for bits in (32, 4) for count in range(1, BLOCKS + 1)]
SOME += [({"method": "full"}, 32, count) for count in (1, 2, 4)]
SOME += [({"method": "lora", "r": 8, "layers": "top:4"}, 32, count) for count in (1, 3)]
SOME += [({"method": "lora", "r": 8, "layers": "0,2,4"}, 4, count) for count in (1, 2, 3)]
SOME += [({"method": "top_layers", "top_layers": 2}, 32, 1), ({"method": "dora", "r": 8}, 4, 2)]


def check_some_blocks(folder: Path, values: dict[str, Any], bits: int, count: int, cache: Path) -> None:
    check(folder, Cell(AdapterSpec(**values), bits, True, blocks=count), cache)


@pytest.mark.parametrize(("values", "bits", "count"), [SOME[1], SOME[12]], ids=["lora", "full"])
def test_some_blocks_are_computed_again(llama: Path, values: dict[str, Any], bits: int, count: int,
                                        tmp_path: Path) -> None:  # fmt: skip
    check_some_blocks(llama, values, bits, count, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("values", "bits", "count"), SOME, ids=lambda each: str(each).replace("'", ""))
def test_any_number_of_blocks_is_computed_again(llama: Path, values: dict[str, Any], bits: int, count: int,
                                                tmp_path: Path) -> None:  # fmt: skip
    check_some_blocks(llama, values, bits, count, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("values", [{"method": "loha", "r": 8}, {"method": "lokr", "r": 4}], ids=lambda v: v["method"])
def test_factors_over_8_bits(llama: Path, values: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    check(llama, Cell(AdapterSpec(**values), 8, checkpointing), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "values",
    [{"method": "lora", "r": 8}, {"method": "adalora", "r": 4, "init_r": 8}, {"method": "vera", "r": 256}],
    ids=lambda values: values["method"],
)
def test_16_bit_products(llama: Path, values: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    """The peak is up to 6 % too low in 16 bits (docs/decisions/0009): it has to be below the plan's high estimate."""
    cell = Cell(AdapterSpec(**values), 4, checkpointing, compute="bfloat16")
    plan, real = planned(llama, cell), measured(llama, cell, tmp_path)
    errors = {name: plan[name] / real[name] - 1 for name in real}
    assert -0.065 <= errors.pop("peak") <= CLOSE
    assert all(abs(error) <= CLOSE for error in errors.values()), errors
    assert real["peak"] <= highest(llama, cell)


@pytest.mark.parametrize("values", [{"method": "top_layers", "top_layers": 2}, {"method": "vera", "r": 64}],
                         ids=lambda values: values["method"])  # fmt: skip
def test_the_probes_table_sets_like_against_like(llama: Path, values: dict[str, Any], tmp_path: Path) -> None:
    cell = Cell(AdapterSpec(**values), 4, False)
    backbone = load_backbone(BaseSpec(source=str(llama)), QuantSpec(bits=4), tmp_path, dense=dense_layers(cell.spec))
    real = footprint(inject(backbone, cell.spec).backbone.model)
    planned = weights_held(plan_memory(architecture(read_config(llama)), setting_of(llama, cell)))
    assert planned == pytest.approx(real.linear_bytes + real.other_bytes, rel=0.005)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "values",
    [{"method": "bias_only"}, {"method": "bias_only", "layers": "top:2"}, {"method": "norms", "layers": "1,3"},
     {"method": "bias_only", "layers": f"top:{BLOCKS}"},
     {"method": "top_layers", "top_layers": 2}, {"method": "full"}, {"method": "ia3"}],
    ids=lambda values: "-".join(map(str, values.values())),
)  # fmt: skip
def test_a_base_with_biases_and_learned_positions(values: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gpt2"](**{key: value for key, value in GPT2.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path / "gpt2"))
    write_tokenizer(tmp_path / "gpt2")
    check(tmp_path / "gpt2", Cell(AdapterSpec(**values), 32, checkpointing), tmp_path / "cache")


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tensors_are_found_by_the_names_that_the_models_give_them(name: str) -> None:
    """Every family's paths, counted: what patterns with these names train is what the model has under them."""
    fields = {"vocab_size": 259, "num_attention_heads": 4, "pad_token_id": 0}
    if name == "gpt2":
        fields = {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 4}
    elif name == "opt":
        fields |= {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
    else:
        fields |= {"hidden_size": 64, "num_hidden_layers": 2}
    if name not in ("falcon", "gpt2", "gpt_neox", "opt"):  # which call it otherwise, or have no such thing
        fields |= {"num_key_value_heads": 2, "intermediate_size": 128}
    config = CONFIG_MAPPING[name](**fields)
    with torch.device("meta"):
        tensors = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    base = architecture(config.to_dict())
    for patterns in ([f"{base.family.names.blocks}.1.*"], ["*"], [f"{base.family.names.embedding}.weight"]):
        real = sum(p.numel() for n, p in tensors.items() if any(fnmatchcase(n, pattern) for pattern in patterns))
        planned = trained_parameters(base, Setting(method="patterns", patterns=tuple(patterns)))
        assert planned == real, patterns


def test_budgets_try_the_bits_that_a_method_trains_over_and_no_others() -> None:
    for name, method in METHODS.items():
        assert BITS_OF.get(name, (4, 8, 16, 32)) == method.bits, name
        for bits in method.bits:
            asked = Setting(method=name, bits=bits)  # type: ignore[arg-type]
            lower = {each for each in method.bits if each < min(bits, 16)}
            assert set(choices(asked, "bits", frozenset())) == {bits, *lower}, name
    prefix = Setting(method="prefix_tuning", num_virtual_tokens=4)
    assert choices(prefix, "gradient_checkpointing", frozenset()) == (False,)


def test_partial_training_over_packed_weights_by_hand() -> None:
    """Two of SmolLM2's 30 blocks and the head: these layers unpacked in 16 bits, everything trained once more in 32."""
    base = architecture(SMOLLM2)
    block, head, norms = 3_538_944, 49152 * 576, (2 * 2 + 1) * 576
    setting = Setting(method="top_layers", top_layers=2, gradient_checkpointing=True)
    parts = {part.name: part.bytes.expected for part in plan_memory(base, setting).parts}
    assert parts["linear layers"] == 28 * block // 2
    assert parts["unpacked linear layers"] == 2 * block * 2
    assert parts["trained copies"] == parts["gradients"] == (2 * block + norms + head) * 4
    assert parts["optimizer"] == 2 * parts["gradients"]


def test_a_cached_trunk_is_not_in_memory_and_runs_once() -> None:
    base = architecture(SMOLLM2)
    setting = Setting(method="top_layers", top_layers=10, bits=16, gradient_checkpointing=True)
    cached = replace(setting, trunk_cache=True)
    frozen = 20 * (3_538_944 + 2 * 576) * 2  # the tied embedding stays: the head reads it
    plans = [plan_memory(base, each) for each in (setting, cached)]
    assert plans[1].part("released trunk").bytes.expected == pytest.approx(frozen, rel=1e-4)
    assert plans[0].stage("train").bytes.expected - plans[1].stage("train").bytes.expected >= plans[1].part(
        "released trunk").bytes.expected  # fmt: skip
    saved = training_flops(base, setting, 0) - training_flops(base, cached, 0)
    assert saved == pytest.approx(2 * 20 * 3_538_944)
    parts = disk_plan(base, cached, base_present=True, save_total_limit=1, keeps_best=False, cached_tokens=1000)
    assert next(part.bytes for part in parts if part.name == "trunk cache") == 1000 * 576 * 2


def test_what_regularizers_and_rank_scores_hold() -> None:
    base = architecture(SMOLLM2)
    plain = Setting(r=8, micro_batch=2, rows_per_step=4, longest=128, labelled=128, lora_dropout=0.1)
    twice = activations(base, replace(plain, row_copies=2))  # whole distributions, of rows side by side
    assert twice == activations(base, replace(plain, micro_batch=4, rows_per_step=8, passes="plain"))
    count = trained_parameters(base, plain)
    held = plan_memory(base, replace(plain, starts=1))
    assert held.part("where training began").bytes.expected == 4 * count
    scores = plan_memory(base, replace(plain, method="adalora"))
    assert scores.part("scores of ranks").bytes.expected == 12 * (count + 8 * 7 * 30)  # a singular value a direction


def test_what_lies_below_the_lowest_trained_layer_keeps_nothing() -> None:
    """With the first block's norms trained too, the backward pass goes through all that lies between."""
    base = architecture(SMOLLM2)
    setting = Setting(method="norms", layers=tuple(range(20, 30)), longest=128, labelled=8)
    top = activations(base, setting).kept
    down = activations(base, replace(setting, layers=(0, *setting.layers))).kept
    assert down > 2 * top
