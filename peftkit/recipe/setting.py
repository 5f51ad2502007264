"""A recipe's settings as a plan takes them, and what a plan has changed as the recipe's settings again."""

from __future__ import annotations

from typing import Any

from peftkit.planning.architecture import Architecture
from peftkit.planning.setting import Setting
from peftkit.recipe.groups import Groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.measuring import measuring
from peftkit.recipe.target import Target
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.spec import TrainSpec
from peftkit.tuning.layers import chosen_layers
from peftkit.tuning.methods import AdapterSpec


def setting_of(architecture: Architecture, given: Groups, lengths: Lengths, target: Target) -> Setting:
    """A recipe's settings on a base and a target, as the plan takes them.

    Layers that thaw bit by bit count as thawed, and those that freeze as they begin. Raises TuningError for layers that
    the base does not have.
    """
    quant, train = given.quant, given.train
    compute = quant.planned_compute_dtype(target.capability)
    plain = compute if quant.dtype == "auto" else quant.dtype
    measured = measuring(given.evaluate, lengths.held_out_rows, has_head=lengths.task is not None)
    return Setting(
        **what_is_trained(architecture, given.adapter),
        **what_regularizers_hold(train.regularize),
        trunk_cache=train.trunk_cache,
        bits=quant.bits,
        double_quant=quant.double_quant,
        compute_dtype=compute,
        dtype="float32" if quant.bits == 32 else plain,
        attention="sdpa" if quant.attention == "auto" else quant.attention,
        rows_per_step=train.rows_per_step,
        micro_batch=train.per_device_train_batch_size,
        gradient_checkpointing=train.gradient_checkpointing,
        checkpointed_blocks=train.checkpointed_blocks,
        activation_offloading=train.activation_offloading,
        optim=target.optimizer(quant.bits) if train.optim == "auto" else train.optim,  # type: ignore[arg-type]
        longest=lengths.longest,
        labelled=min(lengths.labelled, lengths.longest),
        evaluation_batch=given.evaluate.batch_size,
        evaluation_longest=lengths.held_out_longest,
        max_new_tokens=measured.max_new_tokens,
        asked_rows=measured.asked_rows,
        asked_tokens=_asked_tokens(given, lengths) if measured.asked_rows else 0,
        compares_answers=isinstance(train, PreferenceTrainSpec),
        compared_at_once=_compared_at_once(train),
        device=target.device,
    )


def what_is_trained(architecture: Architecture, adapter: AdapterSpec) -> dict[str, Any]:
    """The fields of a Setting that say what is trained; those that the method does not have stay at their defaults."""
    modules, layers = adapter.target_modules, adapter.layers
    chosen: str | tuple[int, ...] = "all"
    if layers not in (None, "all"):
        chosen = tuple(sorted(chosen_layers(layers, architecture.layers)))
    values = {
        "r": adapter.init_r or adapter.r,  # AdaLoRA begins with more
        "lora_dropout": adapter.lora_dropout,
        "target_modules": tuple(modules) if isinstance(modules, list) else modules,
        "feedforward_modules": tuple(adapter.feedforward_modules or ()),
        "top_layers": adapter.top_layers,
        "train_head": adapter.train_head,
        "patterns": tuple(adapter.patterns or ()),
        "oft_block_size": adapter.oft_block_size,
        "decompose_factor": adapter.decompose_factor,
        "num_virtual_tokens": adapter.num_virtual_tokens,
        "trained_tokens": len(set(adapter.tokens or ())),
    }
    return {"method": adapter.method, "layers": chosen} | {n: value for n, value in values.items() if value is not None}


def what_regularizers_hold(regularize: RegularizeSpec) -> dict[str, Any]:
    """The fields of a Setting that say what regularizers hold besides."""
    copies = int(bool(regularize.l2_sp or regularize.mixout))
    rows = "padded" if regularize.on_embeddings else "flat"  # noise is as long as the row that it is added to
    return {
        "row_copies": 2 if regularize.r_drop else 1,
        "starts": copies,
        "mixout": regularize.mixout > 0,
        "passes": rows,
    }


def changes(given: Groups, before: Setting, after: Setting) -> dict[str, Any]:
    """The recipe's settings that make `before` into `after`, by dotted key; the effective batch stays."""
    train, quant, evaluate, data = (given.names[group] for group in ("train", "quant", "evaluate", "data"))
    values: dict[str, Any] = {}
    if after.micro_batch != before.micro_batch:
        values[f"{train}.per_device_train_batch_size"] = after.micro_batch
        values[f"{train}.gradient_accumulation_steps"] = after.rows_per_step // after.micro_batch
    for name, key in (
        ("gradient_checkpointing", train),
        ("checkpointed_blocks", train),
        ("activation_offloading", train),
        ("optim", train),
        ("bits", quant),
    ):
        if getattr(after, name) != getattr(before, name):
            values[f"{key}.{name}"] = getattr(after, name)
    if after.bits != before.bits:  # what train.optim=auto means depends on them
        values[f"{train}.optim"] = after.optim
    if after.evaluation_batch != before.evaluation_batch:
        values[f"{evaluate}.batch_size"] = after.evaluation_batch
    limit = max(after.longest, after.evaluation_longest)
    if limit != max(before.longest, before.evaluation_longest):
        values |= {f"{data}.max_length": limit, f"{data}.too_long": "truncate"}
    return values


def _asked_tokens(given: Groups, lengths: Lengths) -> int:
    """Tokens of a prompt of solved rows and a question, none longer than the longest held-out row, and its answer."""
    evaluate = given.evaluate
    return int((evaluate.shots + 1) * lengths.held_out_longest + evaluate.max_new_tokens)


def _compared_at_once(train: TrainSpec) -> int:
    if not isinstance(train, PreferenceTrainSpec) or not train.eval_steps:
        return 0
    return 1 if train.loss == "kto" else 2
