"""Device, dtypes and kernels: each choice comes with the reason that is printed once at the start of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available

from peftkit.backbone.measured import Measure, measure, measured_dtype
from peftkit.backbone.spec import QuantSpec, compute_dtype
from peftkit.errors import BackboneError
from peftkit.events import Decision
from peftkit.process_group import launched


@dataclass(frozen=True)
class Placement:
    """Where and how a backbone computes."""

    device: torch.device
    compute_dtype: torch.dtype
    dtype: torch.dtype
    attention: str
    decisions: tuple[Decision, ...]


def place(spec: QuantSpec, *, fused: bool = True, timing: Measure = measure) -> Placement:
    """Decide device, dtypes and attention kernel for `spec` on this machine; not `fused`: the model takes eager alone.

    `timing` is asked where `compute_dtype=measured` is left to a measurement.
    Raises BackboneError when the spec asks for what the machine or the bit width does not have.
    """
    device, device_why = device_of(spec)
    compute, compute_why = _compute_dtype(spec, device, timing)
    dtype, dtype_why = _plain_dtype(spec, compute)
    attention, attention_why = _attention(spec, device, compute, fused)
    decisions = (
        Decision("device", str(device), device_why),
        Decision("weights", spec.label, _weights_reason(spec, dtype)),
        Decision("compute dtype", _name(compute), compute_why),
        Decision("embeddings, norms, head", _name(dtype), dtype_why),
        Decision("attention", attention, attention_why),
    )
    return Placement(device, compute, dtype, attention, decisions)


def label(spec: QuantSpec, placement: Placement) -> str:
    """What the weights are held in: `nf4+dq`, `int8`, or the dtype where nothing is quantized."""
    return spec.label if spec.bits in (4, 8) else _name(placement.dtype)


def optimizer(device: torch.device, quantized: bool, *, sharded: bool = False) -> Decision:
    """The optimizer for adapters on this device: `choice` is transformers' name for it."""
    if device.type != "cuda":
        return Decision("optimizer", "adamw_torch", "no CUDA: paged and 8-bit optimizers need it")
    if sharded:
        return Decision("optimizer", "adamw_torch", "FSDP: states are spread over the processes as the adapter is")
    if quantized:
        return Decision("optimizer", "paged_adamw_8bit", "CUDA and quantized weights: states in 8 bits, paged to host")
    return Decision("optimizer", "adamw_torch_fused", "CUDA, weights not quantized: one fused kernel per step")


def device_of(spec: QuantSpec) -> tuple[torch.device, str]:
    """The device that `spec` asks for on this machine, and the reason. Raises BackboneError where there is none."""
    available = torch.cuda.is_available()
    if spec.device == "cuda" and not available:
        raise BackboneError(
            f"quant.device=cuda, but torch {torch.__version__} sees no CUDA device",
            expected="a CUDA build of torch and a working driver",
            hint="run `peftkit doctor`, or set quant.device=cpu",
        )
    if spec.device == "cpu" or not available:
        return torch.device("cpu"), "asked for" if spec.device == "cpu" else "torch sees no CUDA device"
    index = launched().local_rank
    if index >= torch.cuda.device_count():
        raise BackboneError(
            f"process {index} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}",
            expected="one GPU for each process",
            hint="start fewer processes (--num_processes), or set quant.device=cpu",
        )
    name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return torch.device("cuda", index), f"{name}, SM {major}.{minor}"


def _compute_dtype(spec: QuantSpec, device: torch.device, timing: Measure) -> tuple[torch.dtype, str]:
    if spec.compute_dtype == "measured" and device.type == "cpu":
        found, why = measured_dtype(spec.bits, timing)
        return getattr(torch, found), why
    if spec.compute_dtype not in ("auto", "measured"):
        chosen: torch.dtype = getattr(torch, spec.compute_dtype)
        if spec.bits == 32 and chosen != torch.float32:
            raise BackboneError(
                f"quant.bits=32 with quant.compute_dtype={spec.compute_dtype}",
                expected="float32 for 32 bits",
                hint="set quant.bits=16, or remove quant.compute_dtype",
            )
        return chosen, "asked for"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name, reason = compute_dtype(spec.bits, capability)
    return getattr(torch, name), reason


def _plain_dtype(spec: QuantSpec, compute: torch.dtype) -> tuple[torch.dtype, str]:
    if spec.bits == 32 and spec.dtype not in ("auto", "float32"):
        raise BackboneError(
            f"quant.bits=32 with quant.dtype={spec.dtype}",
            expected="float32 for 32 bits",
            hint="set quant.bits=16, or remove quant.dtype",
        )
    if spec.dtype == "auto":
        return compute, "the compute dtype; nothing is up-cast behind your back"
    return getattr(torch, spec.dtype), "asked for"


def _attention(spec: QuantSpec, device: torch.device, compute: torch.dtype, fused: bool) -> tuple[str, str]:
    if spec.attention != "auto":
        return spec.attention, "asked for"
    if not fused:
        return "eager", "the model changes attention scores in a way that no fused kernel of torch does"
    if device.type != "cuda":
        return "sdpa", "torch's own kernel; flash_attention_2 needs CUDA"
    if not is_flash_attn_2_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "torch's own flash kernel; flash_attn is not installed, or the GPU is older than SM 8.0"
    if compute == torch.float32:
        return "sdpa", "flash_attention_2 needs 16-bit inputs"
    return "flash_attention_2", "flash_attn is installed and the inputs are 16-bit"


def _weights_reason(spec: QuantSpec, dtype: torch.dtype) -> str:
    if spec.bits == 4:
        return "linear layers packed in 4 bits, " + ("constants in 8 bits" if spec.double_quant else "constants in 32")
    return (
        "linear layers in 8 bits (LLM.int8)"
        if spec.bits == 8
        else f"linear layers not quantized, held in {_name(dtype)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
