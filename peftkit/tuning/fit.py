"""Does a registered adapter belong to this backbone: its bytes, its base, its settings, its tensors."""

from __future__ import annotations

import json
from typing import Any

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from peftkit.backbone.load import Backbone
from peftkit.errors import AdapterDamaged, BaseMismatch, TuningError
from peftkit.events import Report, Warned
from peftkit.registry.store import Version
from peftkit.registry.verify import check

# Settings that change what is loaded beyond plain low-rank factors, or that name code to import.
_NOT_PLAIN = (
    "modules_to_save",
    "auto_mapping",
    "megatron_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "lora_bias",
)
# PEFT runs the others (pissa, olora, corda …) again when it loads, and they rewrite the base's own weights.
_HARMLESS_INITS = (True, False, None, "gaussian")


def check_version(version: Version) -> None:
    """Raise AdapterDamaged when a version's files are not what its manifest promises, TuningError for other kinds."""
    problems = check(version)
    if problems:
        raise AdapterDamaged(
            f"{version.reference} is damaged: " + "; ".join(problems),
            expected="the bytes that were published",
            hint=f"peftkit show {version.name} lists its versions",
        )
    if version.manifest.kind != "peft":
        raise TuningError(
            f"{version.reference} is of kind {version.manifest.kind!r}",
            expected="kind 'peft': named tensors replace weights of the base and cannot lie beside it",
        )
    _check_config(version)


def _check_config(version: Version) -> None:
    config: dict[str, Any] = json.loads((version.path / "adapter_config.json").read_text(encoding="utf-8"))
    wanted: dict[str, tuple[bool, str]] = {
        "peft_type": (config.get("peft_type") == "LORA", "LORA"),
        "task_type": (config.get("task_type") in ("CAUSAL_LM", None), "CAUSAL_LM"),
        "r": (_is_number(config.get("r")) and 0 < config["r"] == int(config["r"]), "a whole number above 0"),
        "lora_alpha": (_is_number(config.get("lora_alpha")), "a number"),
        "target_modules": (_is_targets(config.get("target_modules")), "a list of module names, or all-linear"),
    }
    problems = [f"{key} is {config.get(key)!r}, expected {what}" for key, (fine, what) in wanted.items() if not fine]
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which would change the base's weights")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}, which would train the base's own biases")
    problems += [f"{key} is set, which peftkit does not load" for key in _NOT_PLAIN if config.get(key)]
    if problems:
        raise TuningError(f"the adapter_config.json of {version.reference} cannot be used: " + "; ".join(problems))


def check_bare(backbone: Backbone) -> None:
    """Raise TuningError when something was injected into the backbone already."""
    if hasattr(backbone.model, "peft_config"):
        raise TuningError(
            "this backbone already carries an adapter",
            expected="a backbone without one",
            hint="detach it first, or load the backbone again",
        )


def check_base(version: Version, backbone: Backbone, *, other_base: bool, report: Report) -> None:
    """Raise BaseMismatch when the version was trained on other bytes, naming what differs."""
    recorded = version.manifest.base
    differing = backbone.identity.differences(recorded.parts)
    quantized = str((recorded.quantization or {}).get("label", backbone.label))
    if quantized != backbone.label:
        used = backbone.label
        report(Warned(f"{version.reference} was trained on {quantized} weights and is used on {used}"))
    if not differing:
        return
    what = ", ".join(name.replace("_", " ") for name in differing)
    fact = f"{version.reference} was trained on {recorded.source}; {backbone.base.source} differs in: {what}"
    if not other_base:
        hint = f"use base={recorded.source}, or --other-base to go on all the same"
        raise BaseMismatch(fact, expected="the same base, by content", hint=hint)
    report(Warned(fact, "--other-base was given, so the adapter is used all the same"))


def check_tensors(model: PeftModel, version: Version, label: str) -> None:
    """Raise TuningError unless every stored tensor was loaded and every injected one was stored, all finite.

    PEFT loads with strict=False: a missing key silently leaves the base's behaviour.
    """
    loaded = get_peft_model_state_dict(model, adapter_name=label, save_embedding_layers=False)
    with safe_open(str(version.path / "adapter_model.safetensors"), framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    problems = [f"{name} is stored and has no place in the base" for name in sorted(stored.keys() - loaded.keys())]
    problems += [f"{name} is needed and not stored" for name in sorted(loaded.keys() - stored.keys())]
    problems += [
        f"{name}: stored {stored[name]}, needed {tuple(tensor.shape)}"
        for name, tensor in loaded.items()
        if name in stored and stored[name] != tuple(tensor.shape)
    ]
    if problems:
        listed = "\n- ".join(problems[:8])
        raise TuningError(f"{version.reference} has {len(problems)} tensors that do not fit:\n- {listed}")
    if any(not torch.isfinite(tensor).all() for tensor in loaded.values()):
        raise TuningError(f"{version.reference} holds NaN or infinite numbers", expected="finite weights")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_targets(value: Any) -> bool:
    """A list of names; any other string is a pattern that PEFT would run, and this file is not trusted."""
    return value == "all-linear" or (isinstance(value, list) and all(isinstance(item, str) for item in value))
