"""Tiny bases of four blocks for the tests of the trunk cache: one of each way in which a family differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_bases import write_base, write_tokenizer
from tiny_families import write_family

BLOCKS = 4


def write_gpt2(folder: Path, dropout: float = 0.0) -> None:
    """GPT-2: learned positions are added before the first block, and dropout is everywhere by default."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    config = GPT2Config(
        vocab_size=259, n_positions=64, n_embd=64, n_layer=BLOCKS, n_head=2, bos_token_id=1, eos_token_id=2, **rates
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(str(folder))
    write_tokenizer(folder)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda folder: write_base(folder, num_hidden_layers=BLOCKS),
    "untied": lambda folder: write_base(folder, num_hidden_layers=BLOCKS, tie_word_embeddings=False),
    "qwen2": lambda folder: write_family(folder, "qwen2", num_hidden_layers=BLOCKS),
    "gemma2": lambda folder: write_family(folder, "gemma2", num_hidden_layers=BLOCKS),
    "gpt2": write_gpt2,
    "gpt2 with dropout": lambda folder: write_gpt2(folder, 0.1),
}
