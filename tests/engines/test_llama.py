"""llama.cpp reads what we wrote: the same logits, the same greedy tokens, the same token ids as transformers.

PEFTKIT_ENGINE_LLAMA names the Python of an environment that has llama-cpp-python; without it the tests are skipped and
counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, write_bpe, write_family

from peftkit.base import embedded as shipped
from peftkit.base.dense import dense_tensors
from peftkit.base.raw import json_file
from peftkit.deltas.delta import Deltas, LowRank, Place
from peftkit.deltas.reading.read import read_deltas
from peftkit.release.export.gguf_lora import write_lora_gguf
from peftkit.release.export.gguf_model import write_model_gguf

FORCED = [[1, 5, 17, 42, 99, 200, 3, 280, 64], list(range(3, 60))]
QUESTIONS = [
    "My lamp arrived broken and I want my money back.",
    "What is 12 + 30?",
    "Order 4711-23 has not come. Write to me at 17:45.",
    "Name three colours.",
]
TEXTS = [
    "Hello world 12345 and 3.14",
    "it's I'LL don't WE'VE 'sup",
    "two  spaces\tand\n\nlines\r\n   end   ",
    "Grüße, 東京! مرحبا 🙂 e\u0301",
    "<|im_start|>user\nx<|im_end|>\n<think>a</think>",
    "  f(x)=x**2;//--> {}[]!!! ???",
    "\n \n\u00a0\u2003x\u200by",
]
NEW_TOKENS = 24

pytestmark = pytest.mark.engines


@pytest.fixture
def llama(engine: Callable[[str], Any]) -> Any:
    """llama.cpp."""
    return engine("llama")


def reference(model: Any, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].double().numpy()


def tolerance(kind: str) -> float:
    """Of the largest logit: float32 sums, and for Gemma ggml's GELU, which is a table of float16 (2^-11 each layer).

    A forgotten permutation or norm offset costs more than a tenth.
    """
    return 5e-3 if kind.startswith("gemma") else 1e-5


LINEAR_LAYERS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in FAMILIES},
    "gemma3_text, six layers": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 16}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("qwen2", {"rope_parameters": LINEAR}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_families(llama: Any, record: Callable[..., None], variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    model = write_family(tmp_path / "hf", kind, **changes)
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32").path
    answer = llama.ask(model=str(path), forced=FORCED)
    worst = 0.0
    for row, found in zip(FORCED, answer["forced"], strict=True):
        expected = reference(model, row)
        worst = max(worst, float(np.abs(np.array(found) - expected).max() / np.abs(expected).max()))
    assert worst < tolerance(kind), variant
    record("llama", answer["version"], f"logits: {variant}", largest_relative_difference=float(f"{worst:.2g}"))


def low_rank(model: Any, modules: list[str], scale: float) -> Deltas:
    """Random LoRA of different ranks for modules of a tiny model, each with a scaling of its own."""
    random, changes, places = torch.Generator().manual_seed(5), {}, {}
    for number, module in enumerate(modules):
        weight = model.get_parameter(f"{module}.weight")
        left = torch.randn(weight.shape[0], number + 2, generator=random) * 0.05
        right = torch.randn(number + 2, weight.shape[1], generator=random)
        changes[f"{module}.weight"] = LowRank(tuple(weight.shape), left, right, scale * (number + 1))
        places[f"{module}.weight"] = Place(module, "embedding" if module.endswith("embed_tokens") else "linear")
    return Deltas("tiny@1", changes, places)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_lora_of_every_family(llama: Any, record: Callable[..., None], kind: str, tmp_path: Path) -> None:
    model = write_family(tmp_path / "hf", kind)
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f32").path
    modules = [f"model.layers.{i}.{part}" for i in (0, 1) for part in LINEAR_LAYERS]
    modules += [] if model.config.tie_word_embeddings else ["model.embed_tokens", "lm_head"]
    deltas = low_rank(model, modules, 0.3)
    lora = write_lora_gguf(deltas, tmp_path / "hf", tmp_path / "lora.gguf").path
    bare = [reference(model, row) for row in FORCED]
    with torch.no_grad():
        for name, delta in deltas.changes.items():
            model.get_parameter(name).add_(delta.rows(0, delta.shape[0]).float())
    answer = llama.ask(model=str(path), lora=str(lora), forced=FORCED)
    worst = 0.0
    for row, found, before in zip(FORCED, answer["forced"], bare, strict=True):
        expected = reference(model, row)
        largest = np.abs(expected).max()
        worst = max(worst, float(np.abs(np.array(found) - expected).max() / largest))
        assert np.abs(before - expected).max() > 0.1 * largest
    assert worst < tolerance(kind)
    figures = {"tensors": len(modules), "largest_relative_difference": float(f"{worst:.2g}")}
    record("llama", answer["version"], f"logits with LoRA: {kind}", **figures)


def pre_tokenizers() -> dict[str, tuple[Any, dict[str, Any]]]:
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

    def split(name: str) -> Any:
        parts = [pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")]
        return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": (words, {}),
        "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]), {}),
        "qwen2": (split("qwen2"), {}),
        "llama-bpe": (split("llama-bpe"), {"ignore_merges": True}),
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_tokenizers(llama: Any, record: Callable[..., None], name: str, tmp_path: Path) -> None:
    write_family(tmp_path / "hf", "qwen2", vocab_size=600)
    pre, model = pre_tokenizers()[name]
    fast = write_bpe(tmp_path / "hf", pre, across=TEXTS, **model)
    path = write_model_gguf(tmp_path / "hf", tmp_path / "m.gguf", "f16").path
    answer = llama.ask(model=str(path), texts=TEXTS)
    expected = [fast.encode(text, add_special_tokens=False) for text in TEXTS]
    assert answer["tokens"] == expected
    assert answer["with_bos"] == expected  # add_bos_token is false in the file, and llama.cpp keeps to it
    record("llama", answer["version"], f"tokenizer: {name}", texts=len(TEXTS), equal=len(TEXTS))
    others = [key for key in pre_tokenizers() if key != name]
    planted = {
        other: [write_bpe(tmp_path / "x", pre_tokenizers()[other][0], across=TEXTS).encode(text) for text in TEXTS]
        for other in others
    }
    assert all(found != expected for found in planted.values())  # texts on which a wrong name shows


def made(folder: Path, base: Path) -> Path:
    """A random adapter with rsLoRA, rank and alpha patterns, large enough to change every answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"q_proj": 12},
        alpha_pattern={"v_proj": 1, "mlp.down_proj": 4},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def tickets() -> Path:
    """The demo's own adapter, where this checkout has trained one."""
    from peftkit import locations
    from peftkit.registry import Registry

    registry = Registry(locations.registry_root(None).path)
    if "tickets" not in registry.names():
        pytest.skip("this checkout has no adapter `tickets`: run `make demo`")
    return registry.resolve("tickets").path


def read(folder: Path, base: Path) -> Deltas:
    from safetensors.torch import load_file

    config, base_config = json_file(folder / "adapter_config.json"), json_file(base / "config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    return read_deltas(f"{folder.name}@1", "peft", config, tensors, dense_tensors(base), base_config)


def greedy(model: Any, prompts: list[list[int]], stop: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stop
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def compared(model: Any, prompts: list[list[int]], answers: list[list[int]], found: list[Any]) -> dict[str, float]:
    """Over the reference's answers: tokens that the engine finds most likely too, and how far its logits are off."""
    same, total, squared, size = 0, 0, 0.0, 0.0
    for prompt, answer, logits in zip(prompts, answers, found, strict=True):
        mine = np.array(logits)[len(prompt) - 1 : -1]
        true = reference(model, prompt + answer)[len(prompt) - 1 : -1]
        same, total = same + int((mine.argmax(-1) == np.array(answer)).sum()), total + len(answer)
        squared, size = squared + float(((mine - true) ** 2).sum()), size + float((true**2).sum())
    return {
        "share_of_tokens_equal": same / total,
        "relative_distance_of_logits": float(f"{(squared / size) ** 0.5:.3g}"),
    }


@pytest.mark.base
@pytest.mark.parametrize("name", ["made", "tickets"])
def test_adapters(
    llama: Any, record: Callable[..., None], name: str, embedded: Path, cache: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made(tmp_path / "made", embedded) if name == "made" else tickets()
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [list(tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]) for talk in talks]
    request = {"prompts": prompts, "max_tokens": NEW_TOKENS, "stop": [2]}
    wanted = greedy(model, prompts, 2)
    with model.disable_adapter():
        bare = greedy(model, prompts, 2)
    assert all(a != b for a, b in zip(wanted, bare, strict=True))
    base = write_model_gguf(embedded, tmp_path / "base.gguf", "f32").path
    lora = write_lora_gguf(read(folder, embedded), embedded, tmp_path / "lora.gguf").path
    merged_folder = tmp_path / "merged"
    whole = model.merge_and_unload()
    whole.save_pretrained(str(merged_folder))
    tokenizer.save_pretrained(str(merged_folder))
    own = shipped.gguf_path("smollm2-135m", cache)

    def keep(case: str, **figures: Any) -> None:
        record("llama", given["version"], case, questions=QUESTIONS, new_tokens=NEW_TOKENS, dtype="float32", **figures)

    assert llama.ask(model=str(base), **request)["answers"] == bare
    given = llama.ask(model=str(base), lora=str(lora), texts=QUESTIONS, **request)
    assert given["answers"] == wanted
    assert given["tokens"] == [tokenizer.encode(question) for question in QUESTIONS]
    texts = {"answers": [tokenizer.decode(row) for row in wanted], "without": [tokenizer.decode(row) for row in bare]}
    keep(f"{name}: LoRA over the base in f32", questions_equal=len(prompts), **texts)

    merged = write_model_gguf(merged_folder, tmp_path / "merged.gguf", "f32", like=own).path
    assert llama.ask(model=str(merged), **request)["answers"] == wanted
    keep(f"{name}: merged, in f32", questions_equal=len(prompts))

    # The base's own file is Q4_1: llama.cpp rounds activations to 8 bits there, so near ties may fall otherwise.
    forced = [prompt + answer for prompt, answer in zip(prompts, wanted, strict=True)]
    figures = {}
    for label, path in (("with the adapter", str(lora)), ("without", None)):
        logits = llama.ask(model=str(own), lora=path, forced=forced)["forced"]
        figures[label] = compared(whole, prompts, wanted, logits)
    keep(f"{name}: LoRA over the base's own Q4_1 file", **figures)
    assert figures["with the adapter"]["share_of_tokens_equal"] >= 0.9
    distance = {label: each["relative_distance_of_logits"] for label, each in figures.items()}
    assert distance["with the adapter"] < distance["without"]
