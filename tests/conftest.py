"""Fixtures of all tests: a tiny real base made on the spot, the embedded base, and a network that is not there."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs without a network: connecting or looking a name up fails loudly."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a test tried to reach the network: {args!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def cache() -> Path:
    """The cache that `make setup` filled; the embedded base is in it."""
    from peftkit import locations

    return locations.cache_root().path


@pytest.fixture(scope="session")
def embedded(cache: Path) -> Path:
    """Folder of the embedded base; skipped, and counted, where `make setup` did not run."""
    from peftkit.backbone.locate import locate
    from peftkit.base import embedded as shipped
    from peftkit.base.ref import BaseSpec

    if not shipped.gguf_path("smollm2-135m", cache).exists():
        pytest.skip("the embedded base is not in the cache: run `make setup`")
    return locate(BaseSpec(), cache).folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data sets, named by PEFTKIT_TEST_DATA; skipped, and counted, without it."""
    folder = os.environ.get("PEFTKIT_TEST_DATA")
    if not folder:
        pytest.skip("PEFTKIT_TEST_DATA is not set")
    return Path(folder)


def write_tokenizer(folder: Path, template: str | None = CHATML) -> None:
    """A byte-level tokenizer without merges: every byte is a token, plus three control tokens; pad is eos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(control + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = template
    fast.save_pretrained(str(folder))


def write_base(folder: Path, *, seed: int = 0, template: str | None = CHATML, **config: object) -> Path:
    """A tiny random Llama base on disk: widths are multiples of 64, which bitsandbytes needs on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "tie_word_embeddings": True,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(str(folder))
    write_tokenizer(folder, template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama base with a ChatML template."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")
