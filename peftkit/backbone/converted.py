"""Which modules of a base bitsandbytes quantizes: transformers is asked, on a model that has shapes and no numbers."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.heads import linear_names, model_class, settings_of
from peftkit.backbone.quiet import quiet
from peftkit.backbone.roundtrip import Format
from peftkit.base.head import Head
from peftkit.errors import BackboneError


def quantization_config(form: Format) -> dict[str, Any]:
    """The `quantization_config` of an upload in this format, as transformers writes it."""
    return dict(_bitsandbytes_config(form).to_dict())


def converted_weights(
    config: Mapping[str, Any], form: Format, tensors: Mapping[str, Any], head: Head | None = None
) -> dict[str, bool]:
    """Tensors of a base's files that become quantized layers → whether the file has them transposed (GPT-2's Conv1D).

    The head, tied weights and what the architecture keeps in float32 are not among them. Raises BackboneError when the
    model cannot be built, or when a layer has no tensor of its own in the files.
    """
    model = shapes_only(config, head)
    asked = _bitsandbytes_config(form)
    if head is not None:
        asked.llm_int8_skip_modules = skipped(model, list(linear_names(model)))
    with quiet():
        AutoHfQuantizer.from_config(asked, pre_quantized=False).preprocess_model(
            model, dtype=torch.float32, device_map=None
        )
    found = {}
    for module, layer in quantized_linears(model).items():
        name = tensor_of(module, model.base_model_prefix, tensors)
        if name is None:
            raise BackboneError(
                f"the layer {module} would be quantized, and the base's files have no tensor for it alone",
                expected="one tensor for each linear layer",
                hint="choose --onto original, without --quantize",
            )
        found[name] = issubclass(layer.source_cls, Conv1D)
    return found


def skipped(model: Any, kept: Sequence[str]) -> list[str] | None:
    """The patterns of what is not quantized: upstream's own (head and tied weights), which any list replaces, and ours.

    Upstream matches names as regular expressions from the start, and as plain endings.
    """
    if not kept:
        return None
    return [*get_keys_to_not_convert(model), *(re.escape(name) + "$" for name in kept)]


def tensor_of(module: str, prefix: str, tensors: Container[str]) -> str | None:
    """Name of a module's weight in the base's files, which may lack or have the model's `prefix`; None without one."""
    names = (module, module.partition(".")[2], f"{prefix}.{module}")
    return next((f"{name}.weight" for name in names if f"{name}.weight" in tensors), None)


def shapes_only(config: Mapping[str, Any], head: Head | None = None) -> Any:
    """The model that config.json describes, with shapes and no numbers. Raises BackboneError when there is none."""
    kind = str(config.get("model_type", "none"))
    if kind not in CONFIG_MAPPING:
        raise BackboneError(f"this transformers does not know the model type {kind!r}", expected="a known architecture")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    plain |= settings_of(head, kind)
    try:
        with quiet(), torch.device("meta"):
            return model_class(head).from_config(AutoConfig.for_model(**plain), trust_remote_code=False)
    except Exception as error:  # a broken config.json makes transformers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"config.json describes no model that can be built: {reason}") from error


def _bitsandbytes_config(form: Format) -> BitsAndBytesConfig:
    if form.code == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form.code,
        bnb_4bit_use_double_quant=form.double_quant,
        bnb_4bit_compute_dtype=form.dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )
