"""config.json as GGUF metadata, and a refusal for whatever llama.cpp would compute differently.

Keys and their meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What is checked against a constant
here is a constant in llama.cpp's own code (llama-model.cpp), which no key of the file can change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from peftkit.base.raw import Array
from peftkit.errors import DeltaError
from peftkit.release.export.gguf_names import Layout

_SLIDING_EVERY = {"gemma2": 2, "gemma3": 6}
"""Every n-th layer looks at everything, those between at a window."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, which alone scale attention by their width."""
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def add_hyperparameters(writer: gguf.GGUFWriter, config: Mapping[str, Any], plan: Layout) -> None:
    """Add widths, heads, rotary settings and softcaps. Raises DeltaError for settings that llama.cpp does not have."""
    arch, heads = plan.family.arch, int(config["num_attention_heads"])
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_key_length(plan.head_dim)
    writer.add_value_length(plan.head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(plan.head_dim)
    if arch in _SLIDING_EVERY:
        _add_gemma(writer, config, plan)
    elif config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise _refused(f"{arch} layers with a sliding window", "attention over the whole context in every layer")
    rope = _rope(config, "full_attention")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default" and not (kind == "llama3" and arch == "llama"):
        raise _refused(f"rotary embeddings of type {kind!r}", "default, linear or, for Llama, llama3")


def rope_factors(config: Mapping[str, Any], plan: Layout) -> Array | None:
    """What llama3's scaling divides each rotary frequency by, float64 of shape (head_dim / 2); None for other types.

    llama.cpp reads them from a tensor `rope_freqs.weight`. Source: transformers, `_compute_llama3_parameters`.
    """
    rope = _rope(config, "full_attention")
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    factor, low, high, context = (float(rope[key]) for key in _LLAMA3)
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, plan.head_dim, 2) / plan.head_dim)
    turns = context * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Array = 1 / ((1 - smooth) / factor + smooth)
    return factors


def _rope(config: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """The rotary settings of a kind of layers, in transformers' spelling of version 5 or of version 4."""
    found = config.get("rope_parameters")
    if found is None:
        found = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
        if layers == "sliding_attention":
            found = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    elif layers in found:
        found = found[layers]
    return {"rope_theta": 10000.0, **found}


def _add_gemma(writer: gguf.GGUFWriter, config: Mapping[str, Any], plan: Layout) -> None:
    arch, layers = plan.family.arch, int(config["num_hidden_layers"])
    every = _SLIDING_EVERY[arch]
    expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if list(config.get("layer_types") or expected) != expected:
        raise _refused(f"{arch} layers in another order", f"full attention in every {every}th layer")
    wide = int(config["hidden_size"]) / int(config["num_attention_heads"])
    scale = wide if layers == _LARGEST[arch] else plan.head_dim
    if float(config.get("query_pre_attn_scalar", scale)) != scale:
        raise _refused(f"query_pre_attn_scalar {config['query_pre_attn_scalar']}", f"{scale}, fixed in llama.cpp")
    if not plan.tied:
        raise _refused("a Gemma whose head is not its embedding", "tie_word_embeddings: true")
    if config.get("use_bidirectional_attention"):
        raise _refused("bidirectional attention", "causal attention")
    writer.add_sliding_window(int(config["sliding_window"]))
    caps = config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")
    if arch == "gemma2":
        if not all(caps):
            raise _refused(f"softcaps {caps}", "both softcaps of Gemma 2")
        writer.add_attn_logit_softcapping(float(caps[0]))  # type: ignore[arg-type]
        writer.add_final_logit_softcapping(float(caps[1]))  # type: ignore[arg-type]
        return
    if any(caps):
        raise _refused(f"softcaps {caps}", "none in Gemma 3")
    writer.add_rope_freq_base_swa(float(_rope(config, "sliding_attention")["rope_theta"]))


def _refused(what: str, expected: str) -> DeltaError:
    return DeltaError(
        f"llama.cpp would compute this model differently: it has {what}",
        expected=expected,
        hint="see whether llama.cpp's own converter takes it: python convert_hf_to_gguf.py FOLDER --outfile OUT.gguf",
    )
