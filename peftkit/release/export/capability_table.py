"""What each engine makes of what an adapter may have: data, each cell with its source.

Read in November 2026: peft 0.21.2, vLLM 0.32.0 (read, and run on a CPU against PEFT: greedy tokens equal, log
probabilities within 3e-6), llama.cpp's convert_lora_to_gguf.py (0b03adaa) and Ollama's convert.go (01cf7445) as source.
SGLang: source (0ceb81fe) and issues only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["peft", "vllm", "sglang", "gguf", "ollama"]
Outcome = Literal["ok", "folded", "differs", "refused", "misread", "untried"]
"""`ok`: read as PEFT reads it. `folded`: misread or refused as it is stored; the canonical export has the same numbers
without it. `differs`: read right, over a base other than the one it was trained on. `refused`: the engine stops.
`misread`: the engine computes something else and says nothing. `untried`: nothing shows what the engine does."""

BLOCKING: tuple[Outcome, ...] = ("refused", "misread", "untried")

RANKS: dict[str, tuple[int, ...]] = {"vllm": (1, 8, 16, 32, 64, 128, 256, 320, 512)}
"""Engine → the ranks that it may be started with, where there is a list (vLLM: vllm/config/lora.py, MaxLoRARanks)."""

FEATURES: dict[str, str] = {
    "linear": "LoRA of linear layers",
    "rslora": "rsLoRA (use_rslora)",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "mixed_ranks": "ranks that differ between modules",
    "rank": "a rank above the engine's largest",
    "dora": "DoRA",
    "lora_bias": "biases of the LoRA layers (lora_bias)",
    "bias": "biases of the base's own layers (bias)",
    "modules_to_save": "whole modules (modules_to_save)",
    "vocabulary": "whole embedding or head weights, or more rows than the base has",
    "token_rows": "single token rows (trainable_token_indices)",
    "embedding": "LoRA of the embedding",
    "head": "LoRA of the head",
    "tied": "a change that parts the head from the embedding it is tied to",
    "convolution": "LoRA of convolutions",
    "experts": "LoRA of fused experts (target_parameters)",
    "method": "a method other than LoRA",
    "tensors": "tensors that replace the base's or are added to it (kind tensors)",
    "vectors": "norms, biases and other tensors that no LoRA holds (kind tensors)",
    "quantized_base": "a quantized base that it was trained over",
    "repaired": "a beginning that repairs the error of its quantized base (loftq)",
}

MERGE = "peftkit merge {name} --onto original --out FOLDER, and serve that folder as a model of its own"
AS_LORA = (
    "peftkit combine {name} --method svd --rank R --save-as {name}-lora: the best LoRA of rank R, with its error; or "
    + MERGE
)
EXTRACTED = AS_LORA.replace(" --save-as", " --drop --save-as").replace(
    "with its error", "without norms, with its error"
)
DEQUANTIZED = MERGE.replace("--onto original", "--onto dequantized")
AS_IT_IS = "peftkit export {name} --to peftkit --out FOLDER: PEFT reads it as it is stored; or "
STORED = AS_IT_IS.replace("PEFT reads it", "peftkit reads it")
SMALLER = "--rank R cuts it to rank R by SVD and states the error; or " + MERGE


@dataclass(frozen=True)
class Cell:
    """What an engine does with a feature, how that is known, and what works instead."""

    outcome: Outcome
    fact: str
    source: str
    instead: str = ""


OTHER_WEIGHTS = "computes with weights of its own, which do not have the error that it repairs"
_HELPER = "vllm/lora/peft_helper.py, _validate_features; run"
_RUN = "run: vLLM 0.32.0 against PEFT on a tied Llama"
_CONVERTER = "convert_lora_to_gguf.py"
_OLLAMA = "ollama: convert/convert.go, AdapterParameters"
_PEFT = "peft 0.21.2, tests/release/export"
_SGLANG = "sglang: python/sglang/srt/lora/lora_config.py"
_ISSUE_SGLANG = "sgl-project/sglang#40835"


def _peft() -> dict[str, Cell]:
    stays = AS_IT_IS + AS_LORA
    no_factors = "the canonical folder holds plain LoRA alone"
    return {
        **dict.fromkeys(
            ("linear", "embedding", "head", "tied", "convolution", "experts"), Cell("ok", "reads it", _PEFT)
        ),
        **dict.fromkeys(
            ("rslora", "rank_pattern", "alpha_pattern", "mixed_ranks"),
            Cell("folded", "reads it; written without it, so that whoever reads the folder next does too", _PEFT),
        ),
        "rank": Cell("ok", "has no largest rank", _PEFT),
        "lora_bias": Cell("ok", "reads it, and scales it as the factors", "peft/tuners/lora/layer.py, Linear.forward"),
        "dora": Cell("refused", no_factors, "peft/tuners/lora/dora.py", stays),
        "bias": Cell("refused", no_factors, "peft/tuners/lora/config.py, bias", stays),
        "modules_to_save": Cell("refused", no_factors, "peft/utils/other.py, ModulesToSaveWrapper", stays),
        "vocabulary": Cell("refused", no_factors, "peft/utils/save_and_load.py, save_embedding_layers", stays),
        "token_rows": Cell("refused", no_factors, "peft/tuners/trainable_tokens", stays),
        "method": Cell("refused", no_factors, "peft/mapping.py", stays),
        "tensors": Cell(
            "refused",
            "knows no such files",
            "peftkit/registry/FORMAT.md",
            STORED + EXTRACTED,
        ),
        "vectors": Cell("refused", "knows no such files", "peftkit/registry/FORMAT.md", STORED + MERGE),
        "quantized_base": Cell("ok", "loads the base as the caller asks", _PEFT),
        "repaired": Cell("differs", "loads the base as the caller asks, and it is right over the quantized one", _PEFT),
    }


def _vllm() -> dict[str, Cell]:
    whole = Cell("refused", "knows only score and classifier of classification models", _HELPER, MERGE)
    return {
        **dict.fromkeys(("linear", "embedding", "head", "tied"), Cell("ok", "reads it", _RUN)),
        "rslora": Cell("folded", "0.32 reads it, earlier ones and fused experts do not", "vllm#10798, vllm#55545; run"),
        **dict.fromkeys(
            ("rank_pattern", "alpha_pattern"),
            Cell(
                "folded",
                "0.32 reads it, earlier ones dropped it",
                "vllm/lora/peft_helper.py, get_rank_and_scaling; run",
            ),
        ),
        "mixed_ranks": Cell("folded", "0.32 fills smaller ranks up with zeros; written with one rank", _RUN),
        "rank": Cell("refused", "starts with no rank above 512", "vllm/config/lora.py, MaxLoRARanks", SMALLER),
        "dora": Cell("refused", "does not support DoRA", _HELPER, AS_LORA),
        "lora_bias": Cell("refused", "does not support lora_bias", _HELPER, MERGE),
        "bias": Cell("refused", "does not support it", "vllm/lora/peft_helper.py, validate_legal", MERGE),
        "modules_to_save": whole,
        "vocabulary": Cell(
            "misread",
            "leaves out saved embedding and head weights and says nothing: 0.78 in log probability",
            "vllm/lora/utils.py, is_base_embedding_weights; run",
            MERGE,
        ),
        "token_rows": Cell(
            "refused", "knows no such tensor", "vllm/lora/utils.py, parse_fine_tuned_lora_name; run", MERGE
        ),
        "convolution": Cell(
            "refused", "has LoRA for linear layers only", "vllm/lora/utils.py, is_supported_lora_module", MERGE
        ),
        "experts": Cell("untried", "reads them for some models", "vllm/lora/layers/fused_moe.py; vllm#55545", MERGE),
        "method": Cell(
            "refused", "needs r, lora_alpha, lora_A and lora_B", "vllm/lora/peft_helper.py, from_dict", AS_LORA
        ),
        "tensors": Cell("refused", "knows no such files", "vllm/lora/lora_model.py, from_local_checkpoint", EXTRACTED),
        "vectors": Cell("refused", "knows no such files", "vllm/lora/lora_model.py, from_local_checkpoint", MERGE),
        "quantized_base": Cell(
            "differs", "serves the base at the precision it is told", "vllm serve --quantization", MERGE
        ),
        "repaired": Cell("misread", OTHER_WEIGHTS, "vllm serve --quantization", DEQUANTIZED),
    }


def _sglang() -> dict[str, Cell]:
    unknown = Cell("untried", "was not read or run for this", _SGLANG, MERGE)
    return {
        **dict.fromkeys(FEATURES, unknown),
        "linear": Cell("ok", "reads it", _SGLANG),
        "rslora": Cell("folded", "divides by r, not √r: the update is √r times too weak", _ISSUE_SGLANG),
        "rank_pattern": Cell("folded", "has one rank for all modules", _SGLANG),
        "alpha_pattern": Cell("folded", "has one scaling for all modules", _SGLANG),
        "mixed_ranks": Cell("folded", "has one rank for all modules", _SGLANG),
        "rank": Cell("ok", "takes the largest rank of its adapters", "sglang: docs/advanced_features/lora.md"),
        "quantized_base": Cell(
            "differs", "serves the base at the precision it is told", "sglang --quantization", MERGE
        ),
        "repaired": Cell("misread", OTHER_WEIGHTS, "sglang --quantization", DEQUANTIZED),
    }


def _gguf() -> dict[str, Cell]:
    read_alpha = "reads lora_alpha alone, divided by the rank of each tensor"
    ignored = Cell("folded", read_alpha, f"{_CONVERTER}; llama.cpp: src/llama-adapter.h, get_scale")
    stops = Cell("refused", "its converter stops at the tensor's name", f"{_CONVERTER}, get_tensors", MERGE)
    return {
        "linear": Cell("ok", "reads it", _CONVERTER),
        **dict.fromkeys(("rslora", "rank_pattern", "alpha_pattern", "mixed_ranks"), ignored),
        "rank": Cell("ok", "has no largest rank", _CONVERTER),
        **dict.fromkeys(("dora", "lora_bias", "bias", "modules_to_save", "token_rows"), stops),
        "vocabulary": Cell(
            "misread", "leaves out base_layer weights and says nothing", f"{_CONVERTER}, get_tensors", MERGE
        ),
        "embedding": Cell("untried", "reads it transposed", f"{_CONVERTER}, modify_tensors", MERGE),
        "head": Cell("ok", "reads it where the GGUF has a head of its own", f"{_CONVERTER}, modify_tensors"),
        "tied": Cell("refused", "has no tensor for the head of a tied base", "ggml-org/llama.cpp#9065", MERGE),
        "convolution": Cell("untried", "names no convolution", _CONVERTER, MERGE),
        "experts": Cell("untried", "stacks experts in its own order", _CONVERTER, MERGE),
        "method": Cell("refused", "knows lora_A and lora_B alone", f"{_CONVERTER}, get_tensors", AS_LORA),
        "tensors": Cell("refused", "knows no such files", _CONVERTER, EXTRACTED),
        "vectors": Cell("refused", "knows no such files", _CONVERTER, MERGE),
        "quantized_base": Cell("differs", "computes with the GGUF it is told", "llama.cpp --lora", MERGE),
        "repaired": Cell("misread", OTHER_WEIGHTS, "llama.cpp --lora", DEQUANTIZED),
    }


def _ollama() -> dict[str, Cell]:
    """Ollama runs llama.cpp, and is handed the LoRA as GGUF: its own converter knows llama and gemma2 only."""
    scaling = "reads lora_alpha alone, as a whole number"
    folded = dict.fromkeys(("rslora", "rank_pattern", "alpha_pattern", "mixed_ranks"), Cell("folded", scaling, _OLLAMA))
    return {**_gguf(), **folded}


CELLS: dict[Engine, dict[str, Cell]] = {
    "peft": _peft(),
    "vllm": _vllm(),
    "sglang": _sglang(),
    "gguf": _gguf(),
    "ollama": _ollama(),
}
"""Engine → feature → cell."""
