"""Which PEFT methods can be attached, over which bits, and why the others cannot.

Each row was tried (tests/tuning/test_methods.py): the logits of a reloaded adapter are bitwise those it was saved
with, over 4 and 8 bits they are those over the dequantized weights within 1e-5, and no byte of the base changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftkit.base.head import Head, HeadKind
from peftkit.errors import TuningError

_ALL, _FROM_8, _FROM_16 = (4, 8, 16, 32), (8, 16, 32), (16, 32)

ATTACHABLE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("LORA", "ADALORA", "VERA", "PVERA", "RANDLORA", "HIRA", "GRALORA", "VBLORA"), _ALL),
    **dict.fromkeys(("MISS", "SHIRA", "C3A", "FOURIERFT", "WAVEFT"), _ALL),
    **dict.fromkeys(("OFT", "BOFT", "IA3", "BEFT", "ROAD", "LN_TUNING", "TRAINABLE_TOKENS"), _ALL),
    **dict.fromkeys(("ADAPTION_PROMPT", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _ALL),
    **dict.fromkeys(("LOHA", "LOKR", "DEFT"), _FROM_8),
    **dict.fromkeys(("HRA", "DELORA", "GLORA", "PEANUT", "SUPERTUNING", "TINYLORA", "UNILORA"), _FROM_16),
}
"""Method (PEFT's `peft_type`) → bits of the bases it computes rightly over, in peft 0.21.2."""

_TASKS: dict[HeadKind, str | None] = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "image": None,
    "seq2seq": "SEQ_2_SEQ_LM",
}

_REFACTORS = "factorizes the base's weights again when it loads, so its numbers depend on the machine's LAPACK"
NOT_ATTACHABLE: dict[str, str] = {
    "FROD": _REFACTORS,
    "OSF": _REFACTORS,
    "PSOFT": _REFACTORS,
    "ADAMSS": "factorizes and clusters the base's weights again when it loads, and needs scikit-learn",
    "LILY": "mixes its experts by the mean over all tokens of a batch, so an answer depends on padding and neighbours",
    "SHADOW": "runs a second network beside the base, which a prompt prefix that is read once does not reach",
    "XLORA": "loads other adapters by path",
    "MULTITASK_PROMPT_TUNING": "needs a task id with every input",
    "POLY": "needs a task id with every input",
}
"""Method → why it is refused."""

# Settings that name code to import, other files, or a change of the base itself.
_REFUSED_SETTINGS = (
    "auto_mapping",
    "megatron_config",
    "layer_replication",
    "target_parameters",
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
)
_MODULE_LISTS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
# PEFT runs the others (pissa, olora, corda …) again when it loads, and they rewrite the base's own weights.
_HARMLESS_INITS = (True, False, None, "gaussian")


def task_type(head: Head | None) -> str | None:
    """PEFT's word for what a base with this head does; it has none for images."""
    return "CAUSAL_LM" if head is None else _TASKS[head.kind]


def check_config(config: Mapping[str, Any], reference: str, bits: int, task: str | None = "CAUSAL_LM") -> None:
    """Raise TuningError when an adapter with this `adapter_config.json` cannot lie beside a base of `bits` bits.

    `task` is what the base's head does, as PEFT calls it.
    """
    problems = _method_problems(config.get("peft_type"), bits) or [
        *_value_problems(config, task),
        *(f"{key} is set, which peftkit does not attach" for key in _REFUSED_SETTINGS if config.get(key)),
    ]
    if problems:
        raise TuningError(f"the adapter_config.json of {reference} cannot be used: " + "; ".join(problems))


def _method_problems(method: Any, bits: int) -> list[str]:
    if isinstance(method, str) and method in NOT_ATTACHABLE:
        return [f"peft_type is {method}, which {NOT_ATTACHABLE[method]}"]
    if not isinstance(method, str) or method not in ATTACHABLE:
        return [f"peft_type is {method!r}, expected one of {', '.join(sorted(ATTACHABLE))}"]
    if bits not in ATTACHABLE[method]:
        fine = " or ".join(str(number) for number in ATTACHABLE[method])
        return [f"peft_type is {method}, which computes with a base of {fine} bits, and this one has {bits}"]
    return []


def _value_problems(config: Mapping[str, Any], task: str | None) -> list[str]:
    problems = []
    if config.get("task_type") not in (task, None):
        problems.append(f"task_type is {config['task_type']!r}, expected {task}")
    for key in _MODULE_LISTS:
        value = config.get(key)
        # A string is a pattern that PEFT would run, and this file is not trusted; a plain name matches itself alone.
        if not (value is None or value == "all-linear" or isinstance(value, int) or _is_name(value) or _is_list(value)):
            problems.append(f"{key} is {value!r}, expected a list of module names, or all-linear")
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _pattern_problems(key, config.get(key))
    for key in ("r", "lora_alpha"):
        if config["peft_type"] == "LORA" and not _is_positive(config.get(key), whole=key == "r"):
            problems.append(f"{key} is {config.get(key)!r}, expected a {'whole ' if key == 'r' else ''}number above 0")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which would change the base's weights")
    if config.get("bias", "none") not in ("none", False, None):
        problems.append(f"bias is {config['bias']!r}, which would train the base's own biases")
    return problems


def _pattern_problems(key: str, value: Any) -> list[str]:
    """PEFT matches the keys as regular expressions; a module name is one that means itself, give or take its dots."""
    if value is None or (isinstance(value, dict) and all(_is_name(name) for name in value)):
        return []
    return [f"{key} is {value!r}, expected numbers by module name"]


def _is_name(value: Any) -> bool:
    plain = value.removeprefix("^").replace("\\.", ".") if isinstance(value, str) else ""
    return plain.replace(".", "").replace("_", "").isalnum()


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) or _is_name(item) for item in value)


def _is_positive(value: Any, *, whole: bool) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value > 0 and (not whole or value == int(value))
