"""Which quick ways each architecture gets, and the models that must not get them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training.passes.lab import CPU, adapted, apart, gradients, tiny, turns
from transformers import LlamaForCausalLM

from peftkit.events import Decision
from peftkit.generation.forward import pad
from peftkit.training.passes import trying
from peftkit.training.passes.head import Head, amplified, states_before
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths, paths_for
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step

NO_POSITIONS = "takes no position_ids"
EAGER = "eager attention would score all pairs"
NOT_THOSE = "laid flat are not those of the rows"
NOT_TOLD = "does not tell its attention where rows begin"


@dataclass(frozen=True)
class Chosen:
    """What an architecture gets."""

    flat: bool = True
    longest: int | None = None
    head: tuple[float, float | None] | None = (1.0, None)
    """Scale and cap."""
    why: str = ""
    lora: tuple[str, ...] = ()
    """target_modules, where PEFT does not take every linear layer."""
    full: bool = True
    """Only in the full tier."""


ARCHITECTURES = {
    "LlamaForCausalLM": Chosen(full=False),
    "GPT2LMHeadModel": Chosen(full=False),
    "Gemma2ForCausalLM": Chosen(False, head=(1.0, 5.0), why=EAGER, full=False),
    "GPTNeoForCausalLM": Chosen(False, why=EAGER, full=False),
    "CohereForCausalLM": Chosen(head=(0.0625, None), full=False),
    "GraniteForCausalLM": Chosen(head=(0.125, None), full=False),
    "MixtralForCausalLM": Chosen(),
    "Gemma3ForCausalLM": Chosen(longest=16),
    "Cohere2ForCausalLM": Chosen(longest=4096, head=(0.0625, None)),
    "MistralForCausalLM": Chosen(longest=4096),
    "Llama4ForCausalLM": Chosen(longest=13, lora=("q_proj", "v_proj")),
    "ModernBertDecoderForCausalLM": Chosen(longest=14),
    "Exaone4ForCausalLM": Chosen(longest=13),
    "Olmo3ForCausalLM": Chosen(longest=13),
    "VaultGemmaForCausalLM": Chosen(False, head=(1.0, 30.0), why=EAGER),
    **dict.fromkeys(
        (
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM"),
            *("PhiForCausalLM", "Phi3ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "SmolLM3ForCausalLM"),
            *("Starcoder2ForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM", "ApertusForCausalLM"),
            *("GPTNeoXForCausalLM", "GPTBigCodeForCausalLM", "OPTForCausalLM"),
            *("ArceeForCausalLM", "PersimmonForCausalLM", "BitNetForCausalLM", "BioGptForCausalLM"),
        ),
        Chosen(),
    ),
    "BloomForCausalLM": Chosen(False, why=NO_POSITIONS, full=False),
    "MptForCausalLM": Chosen(False, why=NO_POSITIONS, full=False),
    "Mamba2ForCausalLM": Chosen(False, why=NO_POSITIONS, lora=("in_proj",), full=False),
    "Lfm2ForCausalLM": Chosen(False, why=NOT_THOSE, full=False),
    "BambaForCausalLM": Chosen(False, why=NOT_THOSE),
    "JambaForCausalLM": Chosen(False, why=NOT_THOSE, lora=("q_proj", "v_proj")),
    "MiniMaxForCausalLM": Chosen(False, why=NOT_THOSE),
    "DogeForCausalLM": Chosen(False, why="with a mask or a window of None cannot be laid out flat"),
    "RwkvForCausalLM": Chosen(False, why=NO_POSITIONS),
    "Qwen3NextForCausalLM": Chosen(False, why="it cannot be called with rows laid flat"),
    "FalconForCausalLM": Chosen(False, why=NOT_THOSE),
    **dict.fromkeys(("XGLMForCausalLM", "GPTJForCausalLM", "CodeGenForCausalLM"), Chosen(False, why=EAGER)),
    "GptOssForCausalLM": Chosen(False, why=EAGER, full=False),
    "StableLmForCausalLM": Chosen(False, why=NOT_TOLD, full=False),
    "NemotronForCausalLM": Chosen(False, why=NOT_TOLD),
    "RecurrentGemmaForCausalLM": Chosen(False, head=None, why="something of its own to its head's output"),
}


def chosen_of(name: str) -> Paths:
    lora = ARCHITECTURES[name].lora
    return find_paths(adapted(tiny(name), **({"target_modules": list(lora)} if lora else {})))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if one.full else name for name, one in ARCHITECTURES.items()]
)
def test_every_architecture(name: str) -> None:
    found, wanted = chosen_of(name), ARCHITECTURES[name]
    assert (found.flat, found.longest) == (wanted.flat, wanted.longest), found.reasons
    assert (found.head and (found.head.scale, found.head.cap)) == wanted.head, found.reasons
    assert wanted.why in "; ".join(found.reasons)
    assert bool(found.reasons) is bool(wanted.why)
    assert found.fused
    assert found.keeps_some


def test_how_many_architectures_lie_flat() -> None:
    """32 of 53: the others attend eagerly, mix rows, take no positions, or do not pass on where rows begin."""
    flat = [name for name, one in ARCHITECTURES.items() if one.flat]
    assert (len(flat), len(ARCHITECTURES)) == (32, 53)
    assert sum(one.head is not None for one in ARCHITECTURES.values()) == 52


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_step_of_every_architecture(name: str) -> None:
    """Whatever was chosen, the step's loss and gradients are the plain ones."""
    lora = ARCHITECTURES[name].lora
    tuned = adapted(tiny(name), **({"target_modules": list(lora)} if lora else {}))
    paths = find_paths(tuned)
    tuned.model.train()
    rows = turns((3, 17, 9, 26, 5))
    found = []
    for way, tokens in ((Paths(), 1), (paths, 40)):  # the plain way one row at a time: nothing is padded
        loss = Step(tuned.model, rows, pad_id=2, device=CPU, paths=way).run(tokens).loss
        found.append((loss, gradients(tuned.model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert {name: value for name, value in found[0][1].items() if value.norm() == 0} == {}
    assert apart(found[1][1], found[0][1]) < 1e-5


class OwnCap(LlamaForCausalLM):  # type: ignore[misc]
    """Caps its logits by a rule of its own, which does next to nothing to small ones."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 50 * torch.tanh(out.logits / 50)
        return out


class Swallows(LlamaForCausalLM):  # type: ignore[misc]
    """Takes whatever it is given, and passes on the tokens and the mask alone."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        del position_ids, kwargs
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


class Averages(LlamaForCausalLM):  # type: ignore[misc]
    """A token of the row before reaches the first of a row, as a convolution over two tokens would let it."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], dim=1)
        kwargs["inputs_embeds"] = embedded + 0.1 * before
        return super().forward(position_ids=position_ids, **kwargs)


class Whispers(LlamaForCausalLM):  # type: ignore[misc]
    """The same, so faintly that rows pass for their own: 1e-5 of a state, with the tolerance at 1e-4."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        before = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], dim=1)
        kwargs["inputs_embeds"] = embedded + 1e-5 * before
        return super().forward(position_ids=position_ids, **kwargs)


class Twice(LlamaForCausalLM):  # type: ignore[misc]
    """Calls its head two times."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class Headless(LlamaForCausalLM):  # type: ignore[misc]
    """Names no head."""

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("kind", "head", "why"),
    [
        (OwnCap, False, "something of its own to its head's output"),
        (Swallows, True, NOT_TOLD),
        (Averages, True, NOT_THOSE),
        (Whispers, True, "rows laid flat see one another"),
        (Twice, False, "called its head 2 times"),
        (Headless, False, "names no head"),
    ],
)
def test_models_that_must_not(kind: Any, head: bool, why: str) -> None:
    found = find_paths(adapted(tiny("LlamaForCausalLM", kind=kind)))
    assert not found.flat
    assert (found.head is not None) is head
    assert why in "; ".join(found.reasons)


def test_eager_attention_keeps_rows_apart() -> None:
    """It could lie flat with transformers' own mask, and would score all pairs of all rows' tokens."""
    plain = tiny("LlamaForCausalLM")
    plain.set_attn_implementation("eager")
    found = find_paths(adapted(plain))
    assert not found.flat
    assert EAGER in "; ".join(found.reasons)
    assert found.head is not None


def test_small_logits_hide_a_cap_and_large_ones_show_it() -> None:
    """Why logits are compared a second time, amplified: without that, a wrong head would be taken."""
    model = tiny("LlamaForCausalLM", kind=OwnCap, initializer_range=0.002)
    batch = pad(turns((9,)), 2, CPU)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**inputs).logits
        head = Head(model.lm_head, plain.shape[-1])
        states = states_before(model.lm_head, model, **inputs)
        apart_small = float((head.logits(states) - plain).abs().max() / plain.abs().max())
        factor = float(100 / plain.abs().max())
        with amplified(model.lm_head, factor):
            large = model(**inputs).logits
    assert apart_small < 1e-4, "the two cannot be told apart"
    assert float((head.logits(states * factor) - large).abs().max() / large.abs().max()) > 0.1
    assert find_paths(adapted(model)).head is None
    assert not model.lm_head._forward_pre_hooks


def test_a_cap_is_found_where_logits_are_small() -> None:
    found = find_paths(adapted(tiny("Gemma2ForCausalLM", initializer_range=0.002, final_logit_softcapping=30.0)))
    assert found.head is not None
    assert found.head.cap == 30.0


def test_trying_changes_nothing() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    tuned.model.train()
    before = {name: value.clone() for name, value in tuned.model.state_dict().items()}
    drawn = torch.get_rng_state()
    find_paths(tuned)
    assert tuned.model.training
    assert tuned.inner.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in tuned.model.parameters())
    hooks = [module for module in tuned.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=["float32", "16 bit"]
)
def test_lower_precision_gets_the_same_ways(dtype: torch.dtype, compute: torch.dtype) -> None:
    found = find_paths(adapted(tiny("LlamaForCausalLM", dtype=dtype), compute=compute))
    assert (found.flat, found.fused, found.head is not None) == (True, True, True), found.reasons


def test_what_a_run_asks_for_takes_ways_away() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    told: list[Any] = []
    assert find_paths(tuned, sharded=True, report=told.append).reasons[0].startswith("FSDP")
    assert told == [Decision("passes", "the model's own", "FSDP gathers weights as the model calls its modules")]
    side_by_side = find_paths(tuned, rows_as_batch=True)
    assert (side_by_side.flat, side_by_side.head is not None, side_by_side.fused) == (False, True, True)
    whole = find_paths(tuned, logits=True)
    assert (whole.flat, whole.head) == (True, None)
    for regularize, flat, head in [
        (RegularizeSpec(), True, True),
        (RegularizeSpec(neftune_alpha=5.0), False, True),
        (RegularizeSpec(r_drop=1.0), False, False),
        (RegularizeSpec(label_smoothing=0.1), True, True),
    ]:
        found = paths_for(tuned, TrainSpec(regularize=regularize))
        assert (found.flat, found.head is not None) == (flat, head), regularize


def test_virtual_tokens_keep_the_models_own_ways() -> None:
    tuned = adapted(tiny("LlamaForCausalLM"))
    tuned.model.virtual_tokens = 4
    found = find_paths(tuned)
    assert (found.flat, found.head, found.fused) == (False, None, False)
    assert "virtual tokens" in found.reasons[0]


def test_the_head_of_a_part_is_its_own() -> None:
    tuned, other = adapted(tiny("LlamaForCausalLM")), adapted(tiny("LlamaForCausalLM"))
    found = find_paths(tuned)
    assert found.head is not None
    part = found.of(other)
    assert part.head == replace(found.head, module=other.inner.lm_head)
    assert Paths().of(other) == Paths()


def test_the_default_is_the_plain_way() -> None:
    assert Paths() == Paths(None, False, False, None, False, 0, ())
    with Paths().laid(SimpleNamespace(), turns((3, 5)), flat=False, pad_id=2, device=CPU) as batch:
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_the_rows_that_are_tried_differ_and_stay_within_the_vocabulary() -> None:
    made = [trying._made(length, at, 259) for at, length in enumerate((5, 11, 8))]
    assert len({tuple(row.input_ids[:5]) for row in made}) == 3
    assert all(0 <= token < 259 for row in made for token in row.input_ids)
