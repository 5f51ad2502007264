"""From an AdapterSpec to the config that PEFT makes layers from: one function a method, nothing left to a guess."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from collections.abc import Callable, Collection
from typing import Any

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from transformers.pytorch_utils import Conv1D

from peftkit.backbone.heads import head_modules
from peftkit.backbone.load import Backbone
from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import TuningError
from peftkit.tuning.attachable import task_type
from peftkit.tuning.feedforward import check_feedforward, keys_values_feedforward
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.target_modules import ending, is_target, linear_endings, linears_below, targets

PEFT_TYPES = {
    "adalora": "ADALORA",
    "ia3": "IA3",
    "vera": "VERA",
    "loha": "LOHA",
    "lokr": "LOKR",
    "oft": "OFT",
    "prompt_tuning": "PROMPT_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
    "trainable_tokens": "TRAINABLE_TOKENS",
}
"""Method → what it is in an adapter_config.json, where that is not LORA."""
_LINEAR_ONLY = ("loha", "lokr", "oft")
"""PEFT 0.21.2 has no layer of these for Conv1D."""
_WITHOUT_HEAD = ("prompt_tuning", "prefix_tuning", "trainable_tokens")


def peft_type(method: str) -> str:
    """The `peft_type` of a method's checkpoints."""
    return PEFT_TYPES.get(method, "LORA")


def peft_config(backbone: Backbone, spec: AdapterSpec) -> Any:
    """The PEFT config of a spec over a backbone.

    Raises TuningError for modules, layers and tokens that the base does not have.
    """
    if spec.method in _LINEAR_ONLY:
        _check_linear(backbone, spec)
    if spec.method in _WITHOUT_HEAD and backbone.head is not None:
        raise TuningError(
            f"adapter.method={spec.method} goes with a language head, and this base has a task's",
            expected="a method with layers of its own, such as lora, or tensors of the base, such as top_layers",
            hint="adapter.method=lora",
        )
    if spec.method == "eva" and backbone.head is not None and backbone.head.kind in ("image", "seq2seq"):
        kinds = {"image": "images", "seq2seq": "an encoder-decoder base"}
        raise TuningError(
            f"adapter.method=eva reads rows as tokens of one text, which {kinds[backbone.head.kind]} cannot give it",
            expected="an encoder or a causal base, or another method",
            hint="adapter.method=lora",
        )
    return _CONFIGS.get(spec.method, _lora)(backbone, spec)


def token_ids(tokenizer: Tokenizer, tokens: Collection[str | int]) -> list[int]:
    """Ids of tokens that are given as text or as ids, sorted. Raises TuningError for what is not one token."""
    found = set()
    for token in tokens:
        ids = [token] if isinstance(token, int) else tokenizer.encode(token)
        if len(ids) != 1:
            pieces = [tokenizer.decode([each], skip_special_tokens=False) for each in ids]
            raise TuningError(
                f"adapter.tokens: the tokenizer splits {token!r} into {len(ids)} tokens: {pieces}",
                expected="text that is one token of the vocabulary, or the id of a token",
                hint=f"adapter.tokens={ids} trains all of them",
            )
        if not 0 <= ids[0] < len(tokenizer.hf):
            raise TuningError(
                f"adapter.tokens: no token has the id {ids[0]}", expected=f"ids from 0 to {len(tokenizer.hf) - 1}"
            )
        found.add(ids[0])
    return sorted(found)


def _lora(backbone: Backbone, spec: AdapterSpec) -> Any:
    """PiSSA's has twice the rank and twice the numerator, so its scaling is that of the rank that is trained."""
    times = 2 if spec.method == "pissa" else 1
    rows = {_embedding(backbone): token_ids(backbone.tokenizer, spec.tokens)} if spec.tokens else None
    return LoraConfig(
        r=times * _given(spec.r),
        lora_alpha=times * _given(spec.lora_alpha),
        lora_dropout=spec.lora_dropout or 0.0,
        use_rslora=spec.method == "rslora",
        use_dora=spec.method == "dora",
        trainable_token_indices=rows,
        **_places(backbone, spec),
    )


def _adalora(backbone: Backbone, spec: AdapterSpec) -> Any:
    """`total_step` and its phases are set when the length of the run is known (tuning/allocator.py)."""
    return AdaLoraConfig(
        init_r=_given(spec.init_r),
        target_r=_given(spec.r),
        lora_alpha=_given(spec.lora_alpha),
        lora_dropout=spec.lora_dropout or 0.0,
        orth_reg_weight=_given(spec.orth_reg_weight),
        total_step=2,
        **_places(backbone, spec),
    )


def _ia3(backbone: Backbone, spec: AdapterSpec) -> Any:
    """Keys, values and what goes into the MLP's last layer (arXiv 2205.05638, section 3.3)."""
    wanted, inputs = spec.target_modules or "auto", list(spec.feedforward_modules or [])
    if wanted == "auto":
        wanted, inputs = keys_values_feedforward(backbone)
    check_feedforward(backbone, wanted, inputs)
    layers = spec.layers or "all"
    chosen = targets(backbone.model, wanted, layers)
    return IA3Config(
        **_task(backbone),
        target_modules=chosen,
        feedforward_modules=targets(backbone.model, inputs, layers) if inputs else [],
    )


def _vera(backbone: Backbone, spec: AdapterSpec) -> Any:
    return VeraConfig(r=_given(spec.r), projection_prng_key=spec.seed, save_projection=True, **_places(backbone, spec))


def _loha(backbone: Backbone, spec: AdapterSpec) -> Any:
    return LoHaConfig(r=_given(spec.r), alpha=_given(spec.lora_alpha), **_places(backbone, spec))


def _lokr(backbone: Backbone, spec: AdapterSpec) -> Any:
    return LoKrConfig(
        r=_given(spec.r),
        alpha=_given(spec.lora_alpha),
        decompose_factor=_given(spec.decompose_factor),
        **_places(backbone, spec),
    )


def _oft(backbone: Backbone, spec: AdapterSpec) -> Any:
    return OFTConfig(r=0, oft_block_size=_given(spec.oft_block_size), **_places(backbone, spec))


def _check_linear(backbone: Backbone, spec: AdapterSpec) -> None:
    """Raise TuningError where the adapted layers are GPT-2's, which hold their weight as (in, out)."""
    wanted = spec.target_modules or "all-linear"
    named = backbone.model.named_modules()
    found = [name for name, module in named if isinstance(module, Conv1D) and is_target(name, module, wanted)]
    if found:
        raise TuningError(
            f"adapter.method={spec.method} knows no layers of type Conv1D, and {len(found)} of "
            f"{type(backbone.model).__name__} are: {found[0]}",
            expected="a base of nn.Linear, or a method that knows both: lora, rslora, dora, pissa, eva, ia3 or vera",
            hint="adapter.method=lora",
        )


def _prompt(backbone: Backbone, spec: AdapterSpec) -> Any:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_given(spec.num_virtual_tokens))


def _prefix(backbone: Backbone, spec: AdapterSpec) -> Any:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_given(spec.num_virtual_tokens))


def _tokens(backbone: Backbone, spec: AdapterSpec) -> Any:
    ids = token_ids(backbone.tokenizer, spec.tokens or [])
    return TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=ids, target_modules=[_embedding(backbone)])


def _places(backbone: Backbone, spec: AdapterSpec) -> dict[str, Any]:
    asked = spec.target_modules or "all-linear"
    whole = spec.layers in (None, "all")  # no head stands in a block
    if asked == "all-linear" and whole and (heads := head_modules(backbone.model)):
        asked = linears_below(backbone.model, heads)
        if not asked:
            raise TuningError(
                f"adapter.target_modules=all-linear: {type(backbone.model).__name__} has no linear layers but its "
                "head's",
                expected="endings of module names: " + ", ".join(linear_endings(backbone.model)),
                hint="adapter.target_modules=[convolution]",
            )
    wanted = targets(backbone.model, asked, spec.layers or "all")
    return {**_task(backbone), "target_modules": wanted}


def _task(backbone: Backbone) -> dict[str, Any]:
    """What PEFT is told about the head: its own modules are trained whole and stored with the adapter."""
    if backbone.head is None:
        return {"task_type": "CAUSAL_LM"}
    saved = list(head_modules(backbone.model))
    return {"task_type": task_type(backbone.head), "modules_to_save": saved or None}


def _embedding(backbone: Backbone) -> str:
    """The last part of the name of the module with the embeddings of tokens."""
    table = backbone.model.get_input_embeddings()
    names = (name for name, module in backbone.model.named_modules() if module is table)
    return ending(str(next(names)))


def _given(value: Any) -> Any:
    assert value is not None  # AdapterSpec fills in what its method has
    return int(value) if isinstance(value, float) and value.is_integer() else value


_CONFIGS: dict[str, Callable[[Backbone, AdapterSpec], Any]] = {
    "adalora": _adalora,
    "ia3": _ia3,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "prompt_tuning": _prompt,
    "prefix_tuning": _prefix,
    "trainable_tokens": _tokens,
}
