"""Which keys PEFT's configurations have, and of what kind each is, read from the installed PEFT.

After an upgrade of PEFT: `.venv/bin/python tests/registry/intake/method_table.py` rewrites the keys in
peftkit/registry/intake/peft_methods.json and keeps the rest, which is written by hand; then look at the difference:
a new method needs its tensors, a new key perhaps a kind of its own in KINDS below.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # first: peft would import bitsandbytes with its Hub kernels

# isort: split

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import peftkit.registry.intake

TABLE = Path(peftkit.registry.intake.__file__).with_name("peft_methods.json")

KINDS = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"), "names?"),
    **dict.fromkeys(("layers_pattern", "target_parameters"), "names?"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern"), "pattern?"),
    **dict.fromkeys(("block_size_pattern", "target_svd_config"), "pattern?"),
    **dict.fromkeys(("layers_to_transform", "alora_invocation_tokens", "token_indices"), "indices?"),
    **dict.fromkeys(("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"), "indices?"),
    **dict.fromkeys(("r", "init_r", "target_r", "subspace_rank", "mini_r"), "rank"),
    **dict.fromkeys(("random_seed", "random_loc_seed", "projection_prng_key", "proj_seed"), "seed?"),
    **dict.fromkeys(("projection_seed", "generator_seed"), "seed?"),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"), "dropped"),
    **dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"), "dropped"),
    **dict.fromkeys(("arrow_config", "kasa_config", "layer_replication"), "refused"),
    **dict.fromkeys(("tokenizer_kwargs", "prompt_tuning_init_state_dict_path"), "refused"),
    **dict.fromkeys(("auto_mapping", "megatron_config", "megatron_core", "task_type", "peft_type"), "own"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "init_lora_weights", "shadow_model"), "own"),
    "trainable_token_indices": "token-indices?",
    "bias": "word",
    "delora_lambda": "number",
    "alpha": "number?",
    "adapters": "refused",
    "target_modules_bd_a": "names?",
    "target_modules_bd_b": "names?",
}


def known_keys() -> dict[str, dict[str, Any]]:
    """PEFT type → key → kind, for every method of the installed PEFT."""
    return {method.value: _keys(config) for method, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _keys(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {
        field.name: _kind(field.name, hints[field.name], field.default)
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name)
    }


def _kind(name: str, hint: Any, default: Any) -> Any:
    options = set(_options(hint))
    optional = "?" if default is None or type(None) in options else ""
    options.discard(type(None))
    if name == "r" and not default:
        return "rank?" if default is None else "whole"  # OFT: 0 says that the block size counts
    if name == "lora_alpha":
        return "number" + optional
    if name in KINDS:
        return KINDS[name]
    if name.endswith(("dropout", "dropout_p")):
        return "fraction"
    if nested := [option for option in options if dataclasses.is_dataclass(option)]:
        return {key: kind for key, kind in _keys(nested[0]).items() if key != "peft_type"}
    literals = [value for option in options for value in _choices(option)]
    if literals:
        return "choice:" + "|".join(sorted({*literals, *(("true", "false") if bool in options else ())})) + optional
    for kind, spelled in ((str, "word"), (bool, "bool"), (float, "number"), (int, "whole")):
        if kind in options:
            return "choice:false|true|uniform" if {str, bool} <= options else spelled + optional
    raise NotImplementedError(f"{name}: {hint}: give it a kind in KINDS")


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(hint) for option in _options(part))
    return (hint,)


def _choices(option: Any) -> list[str]:
    if typing.get_origin(option) is typing.Literal:
        return [str(value) for value in typing.get_args(option)]
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return [str(value.value) for value in option]
    return []


def spelled(table: dict[str, Any]) -> str:
    """The table as it is committed: one line for each thing said about a method."""
    methods = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"   {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(said.items())
        )
        + "\n  }"
        for name, said in sorted(table["methods"].items())
    ]
    head = "".join(f" {json.dumps(key)}: {json.dumps(table[key])},\n" for key in sorted(table) if key != "methods")
    return "{\n" + head + ' "methods": {\n' + ",\n".join(methods) + "\n }\n}\n"


if __name__ == "__main__":
    table = json.loads(TABLE.read_text())
    table["peft"] = peft.__version__
    table["task_types"] = sorted(task.value for task in peft.TaskType)
    for method, keys in known_keys().items():
        table["methods"].setdefault(method, {"refused": "not looked at yet"})["keys"] = keys
    TABLE.write_text(spelled(table))
