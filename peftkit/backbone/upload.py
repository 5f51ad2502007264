"""Bases that were uploaded in few bits: which load as they are, and which are refused."""

from __future__ import annotations

from typing import Any

from peftkit.backbone.spec import QuantSpec
from peftkit.errors import BackboneError


def agree_with_upload(quant: QuantSpec, config: dict[str, Any], source: str) -> QuantSpec:
    """Take over the quantization of an already quantized bitsandbytes upload, or refuse by name."""
    stored = config.get("quantization_config")
    if not stored:
        return quant
    if not isinstance(stored, dict):
        raise BackboneError(f"{source} has a quantization_config that is no object", expected="a JSON object")
    method = str(stored.get("quant_method", "unknown"))
    if method != "bitsandbytes":
        raise BackboneError(
            f"{source} is already quantized with {method}",
            expected="a 16- or 32-bit upload, or one quantized with bitsandbytes",
            hint="use the 16-bit upload of the same model: peftkit quantizes it while loading (quant.bits=4)",
        )
    bits = 4 if stored.get("load_in_4bit") else 8
    if quant.bits != bits:
        raise BackboneError(
            f"{source} is stored in {bits} bits, but quant.bits={quant.bits}",
            expected=f"quant.bits={bits}",
            hint=f"set quant.bits={bits}, or use the 16-bit upload of the same model",
        )
    if bits == 8:
        return quant
    return quant.model_copy(
        update={
            "quant_type": str(stored.get("bnb_4bit_quant_type", "fp4")),
            "double_quant": bool(stored.get("bnb_4bit_use_double_quant", False)),
        }
    )
