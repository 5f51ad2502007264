"""What this machine really runs: found by doing it, not by reading version numbers."""

from __future__ import annotations

import psutil
import torch

from peftkit.backbone.bnb import Linear4bit, Linear8bitLt, Params4bit
from peftkit.backbone.contain import contain_bitsandbytes, is_repacked
from peftkit.backbone.decide import place
from peftkit.backbone.quantize import dequantize, quantize
from peftkit.backbone.spec import QuantSpec
from peftkit.render import size


def diagnose() -> dict[str, str]:
    """Facts about device, memory and bitsandbytes, by name; a failure is a fact too."""
    placement = place(QuantSpec())
    device = placement.device
    memory = psutil.virtual_memory()
    facts = {
        "device": str(device),
        "compute dtype": f"{placement.compute_dtype} ({placement.decisions[2].reason})".replace("torch.", "", 1),
        "attention": f"{placement.attention} ({placement.decisions[4].reason})",
        "memory": f"{size(memory.total)}, {size(memory.available)} free",
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts["GPU"] = f"{torch.cuda.get_device_name(device)}, {size(total)}, {size(free)} free"
    checks = {
        "4-bit round trip": _round_trip,
        "4-bit training and evaluation agree": _four_bit_paths,
        "8-bit rows independent of neighbours": _eight_bit_rows,
    }
    for name, check in checks.items():
        try:
            facts[name] = check(device)
        except Exception as error:  # a doctor reports what is broken instead of failing on it
            facts[name] = f"FAILED: {type(error).__name__}: {error}"
    return facts


def _round_trip(device: torch.device) -> str:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    error = ((dequantize(quantize(weight)).float() - weight) ** 2).mean() / (weight**2).mean()
    # Gaussian weights in blocks of 64 lose 0.00846 of their energy; 0.012 is INT4's figure.
    return f"{'ok' if error < 0.012 else 'WRONG'}: nf4 relative error {float(error):.5f} on {device.type}"


def _four_bit_paths(device: torch.device) -> str:
    layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(128, 128), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    contain_bitsandbytes(layer)
    x = torch.randn(4, 128, device=device)
    trained = layer.train()(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        evaluated = layer.eval()(x)
    agree = torch.equal(trained, evaluated) if device.type == "cpu" else torch.allclose(trained, evaluated, rtol=1e-3)
    return "ok" if agree and not is_repacked(layer) else "WRONG: evaluation re-packs or differs from training"


def _eight_bit_rows(device: torch.device) -> str:
    layer = Linear8bitLt(128, 128, bias=False, has_fp16_weights=False, threshold=6.0).to(device)
    contain_bitsandbytes(layer)
    x = torch.randn(8, 128, device=device)
    x[1] *= 40  # an outlier that must not change its neighbours
    with torch.no_grad():
        together, alone = layer(x)[0], layer(x[:1])[0]
    difference = float((together - alone).abs().max() / alone.abs().max())
    return f"{'ok' if difference < 1e-5 else 'WRONG'}: relative difference {difference:.1e}"
