"""Tiny random models of the architectures that GGUF files are written for, with a small byte-level BPE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_bases import CHATML

_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEXT = "the quick brown fox jumps over the lazy dog and the other 12345 dogs; hello hello world worlds of words"

_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": False, "head_dim": 128}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 256, "sliding_window": 64}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 256, "sliding_window": 64}),
}
"""model_type → class, settings; a head_dim that transformers' GGUF loader does not read is its class's default."""


def write_bpe(
    folder: Path,
    pre: Any = None,
    *,
    template: str | None = CHATML,
    across: list[str] | None = None,
    **model: Any,
) -> Any:
    """A byte-level BPE tokenizer with some merges; `pre` is its pre-tokenizer, GPT-2's by default.

    With `across`, merges are learned from those texts as wholes: then every difference in pre-tokenizers shows.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 295
    if across is not None:
        tokenizer.pre_tokenizer, size = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), 590
    tokenizer.train_from_iterator(
        (across or [_TEXT]) * 3,
        trainers.BpeTrainer(vocab_size=size, special_tokens=_CONTROL, initial_alphabet=alphabet),
    )
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition = json.loads(tokenizer.to_str())
    definition["model"].update(model)
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return fast


def write_family(folder: Path, kind: str, **changes: Any) -> Any:
    """A model of `kind` on disk whose every parameter is random, norms and biases too; returned in eval mode."""
    import torch
    import transformers

    name, settings = FAMILIES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**{**_SHAPE, **settings, **changes})).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(str(folder))
    write_bpe(folder)
    return model
