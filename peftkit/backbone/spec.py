"""How a base is held in memory."""

from __future__ import annotations

from typing import ClassVar, Literal

from peftkit.config import Spec

Dtype = Literal["float32", "bfloat16", "float16"]


def compute_dtype(bits: int, capability: tuple[int, int] | None) -> tuple[Dtype, str]:
    """The dtype of matrix products for a CUDA capability, or None for a CPU, and the reason."""
    if bits == 32:
        return "float32", "32 bits asked for"
    if capability is None:
        return (
            "float32",
            "CPU: exact; quant.compute_dtype=measured takes bfloat16 where it is faster",
        )
    model = f"SM {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        return "bfloat16", f"{model} has bfloat16"
    # QLoRA's README: with float16 compute only about 80 % of 7B runs finish.
    return "float32", f"{model} has no bfloat16, and float16 overflows in training"


class QuantSpec(Spec):
    """Bits per weight of the linear layers, and the dtypes around them."""

    shorthand: ClassVar[str] = "bits"

    bits: Literal[4, 8, 16, 32] = 4
    """4 and 8 quantize the linear layers with bitsandbytes; 16 and 32 leave them as they are."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code: nf4 fits normally distributed weights best (QLoRA, arXiv 2305.14314, section 3)."""
    double_quant: bool = True
    """Quantize the 4-bit code's block constants too: 4.127 instead of 4.5 bits per weight."""
    compute_dtype: Literal["auto", "measured", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix products; auto decides by device and says why.

    measured is auto on CUDA; on a CPU it times float32 and bfloat16 for a second and takes bfloat16 where it is faster.
    """
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of what is not quantized (embeddings, norms, head); auto takes the compute dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when torch can use it."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention kernel; auto takes flash_attention_2 when it is installed and can run, sdpa otherwise."""

    def planned_compute_dtype(self, capability: tuple[int, int] | None) -> Dtype:
        """The dtype to plan with for a CUDA capability, or None for a CPU; `measured` counts as float32, the larger."""
        if self.compute_dtype == "auto" or self.compute_dtype == "measured":
            return compute_dtype(self.bits, capability)[0]
        return self.compute_dtype

    @property
    def label(self) -> str:
        """Short name for tables: `nf4+dq`, `int8`, `16-bit`."""
        if self.bits == 4:
            return self.quant_type + ("+dq" if self.double_quant else "")
        return "int8" if self.bits == 8 else f"{self.bits}-bit"
