"""The configuration of an untrusted adapter: read strictly, compared with the table of methods, and made harmless."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.canonical import strict_json
from peftkit.registry.intake.methods import Method, methods, peft_version, task_types
from peftkit.registry.intake.rules import DEEPEST_CONFIG, AdapterRefused, shown
from peftkit.registry.intake.tensors import modules_of
from peftkit.registry.intake.values import check_text, check_value, is_plain

# They choose where a training starts; PEFT overwrites what they set by the file's tensors.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_BASE_NAME = re.compile(r"(embedded:)?[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}", re.ASCII)
_RETIRED = ("enable_lora", "merge_weights")

_REFUSED_SETTINGS = {
    "layer_replication": ("config.base-rewriting", "it repeats layers of the base"),
    "kasa_config": ("config.base-rewriting", "KaSA truncates the base's weights when PEFT loads it"),
    "arrow_config": ("config.other-adapters", "Arrow routes between other adapters"),
    "tokenizer_kwargs": ("config.tokenizer", "PEFT would load a tokenizer with them"),
    "prompt_tuning_init_state_dict_path": ("config.path", "PEFT would load that file"),
}


def read_config(path: Path, digest: str) -> dict[str, Any]:
    """The JSON object of the copy at `path`; AdapterRefused when not every parser reads it alike, or it changed."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise AdapterRefused("file.changed", f"{path.name} changed between copy and check")
    try:
        config = strict_json(data)
    except ValueError as error:
        rule = "config.duplicate-key" if "stands twice" in str(error) else "config.json"
        raise AdapterRefused(rule, f"adapter_config.json: {shown(str(error))}") from error
    if not isinstance(config, dict):
        raise AdapterRefused("config.json", "adapter_config.json is not a JSON object")
    _check_depth(config)
    return config


def method_of(config: dict[str, Any]) -> Method:
    """What the table says of the configuration's method; AdapterRefused for one that is unknown or refused by name."""
    name = config.get("peft_type")
    method = methods().get(name) if isinstance(name, str) else None
    if method is None:
        known = ", ".join(sorted(name for name, said in methods().items() if not said.refused))
        raise AdapterRefused("config.method", f"peft_type is {shown(name)}", expected=f"one of {known}")
    if method.refused:
        raise AdapterRefused("config.refused-method", f"{name} adapters are not taken: {method.refused}")
    return method


def check_config(config: dict[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The harmless configuration to store and notes on what was changed; `names` are those of the tensors.

    AdapterRefused names the rule that a value breaks.
    """
    method = method_of(config)
    _check_keys(config, method)
    notes: list[str] = list(method.notes)
    kept = {key: value for key, value in config.items() if key not in _RETIRED}
    _check_own(kept, notes)
    _name_targets(kept, method, names, notes)
    for key, kind in method.keys.items():
        if key not in kept or kind == "own":
            continue
        if kind == "refused":
            _check_refused(key, kept[key])
        elif kind == "dropped":
            _drop(kept, key, notes)
        else:
            check_value(key, kept[key], kind)
    _check_in_file(kept, method)
    return kept, notes


def _check_keys(config: dict[str, Any], method: Method) -> None:
    if "auto_map" in config:
        raise AdapterRefused("config.auto-map", f"auto_map is {shown(config['auto_map'])}", hint="remove the key")
    unknown = sorted(key for key in config if key not in method.keys)
    for key in list(unknown):
        if key in _RETIRED and not config[key]:
            unknown.remove(key)
    if unknown:
        raise AdapterRefused(
            "config.unknown-key",
            f"{method.name} has no key {', '.join(shown(key) for key in unknown[:5])} in peft {peft_version()}",
            hint="remove it, or use a peftkit that knows the newer peft it was saved by",
        )


def _check_own(config: dict[str, Any], notes: list[str]) -> None:
    if config.get("megatron_config") is not None or config.get("megatron_core") not in (None, "megatron.core"):
        value = config.get("megatron_config") or config.get("megatron_core")
        raise AdapterRefused("config.megatron", f"megatron settings are {shown(value)}", hint="set them to null")
    if config.get("auto_mapping") is not None:
        config["auto_mapping"] = None
        notes.append("auto_mapping, which names a library to import, was set to null")
    if config.get("task_type") not in (None, *task_types()):
        value = shown(config["task_type"])
        raise AdapterRefused("config.value", f"task_type is {value}", expected=f"one of {', '.join(task_types())}")
    if config.get("shadow_model", "mirror") != "mirror":
        raise AdapterRefused("config.path", f"shadow_model is {shown(config['shadow_model'])}, expected mirror")
    bias = config.get("bias", "none")
    if isinstance(bias, str) and not (bias in ("none", "all") or bias.endswith("_only")):
        raise AdapterRefused("config.value", f"bias is {shown(bias)}", expected="none, all or one that ends in _only")
    for key, form in (("base_model_name_or_path", _BASE_NAME), ("revision", _REVISION)):
        _check_origin(config, key, form, notes)
    if config.get("inference_mode") is False:
        config["inference_mode"] = True
        notes.append("inference_mode was set to true, as PEFT does when it saves")
    _check_init(config, notes)


def _check_origin(config: dict[str, Any], key: str, form: re.Pattern[str], notes: list[str]) -> None:
    value = config.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        raise AdapterRefused("config.type", f"{key} is {shown(value)}", expected="text")
    check_text(key, value)
    if not form.fullmatch(value) or ".." in value:
        config[key] = None
        notes.append(f"{key} was {shown(value)}, no plain name, and was set to null")


def _check_init(config: dict[str, Any], notes: list[str]) -> None:
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool):
        return
    if init not in _HARMLESS_INITS:
        raise AdapterRefused(
            "config.base-rewriting",
            f"init_lora_weights is {shown(init)}: PEFT would rewrite the base's weights by it",
            hint="save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes "
            "a plain LoRA of it",
        )
    config["init_lora_weights"] = True
    notes.append(f"init_lora_weights was {init!r}, which only chose where the training started, and was set to true")


def _name_targets(config: dict[str, Any], method: Method, names: Sequence[str], notes: list[str]) -> None:
    """Replace target_modules that are a pattern by the modules that have tensors; a stranger's pattern is never run."""
    targets = config.get("target_modules")
    if not isinstance(targets, str) or is_plain(targets):
        return
    modules = modules_of(names, method)
    if not modules:
        raise AdapterRefused(
            "config.pattern",
            f"target_modules is the pattern {shown(targets)}, and no tensor says what it stands for",
            hint="write the names of the modules out, in the folder's adapter_config.json",
        )
    config["target_modules"] = modules
    notes.append(
        f"target_modules was the pattern {shown(targets)}; the {len(modules)} modules with tensors stand there"
    )


def _check_refused(key: str, value: Any) -> None:
    if value:
        rule, why = _REFUSED_SETTINGS[key]
        raise AdapterRefused(rule, f"{key} is {shown(value)}: {why}")


def _drop(config: dict[str, Any], key: str, notes: list[str]) -> None:
    if config.pop(key) not in (None, {}, "RANDOM"):
        notes.append(f"{key}, which only a training or a first start uses, was left out")


def _check_in_file(config: dict[str, Any], method: Method) -> None:
    for key in method.must_be_true:
        if config.get(key) is False:
            hint = f"load it where it was trained and save it again with {key} true"
            raise AdapterRefused(
                "config.not-in-file", f"{key} is false: PEFT would draw or compute it again", hint=hint
            )
    for key in method.must_be_given:
        if key in config and config[key] is None:
            raise AdapterRefused("config.not-in-file", f"{key} is null: PEFT would draw it anew at every load")


def _check_depth(value: Any, level: int = 1) -> None:
    if not isinstance(value, dict | list):
        return
    if level > DEEPEST_CONFIG:
        raise AdapterRefused("limit.depth", f"adapter_config.json is nested more than {DEEPEST_CONFIG} deep")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(item, level + 1)
