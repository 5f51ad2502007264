"""What a merge did to a task's model: the outputs of its head, base + adapter against the merged weights.

A head gives no answer tokens, so both models are given the same drawn inputs. They are not the task's: the figures say
that the merge computes what was trained, not how good that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbone.heads import outputs_of
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.base.head import Head
from peftkit.base.raw import weight_files
from peftkit.base.ref import BaseSpec, longest_sequence, read_config
from peftkit.events import Note, Report, silent
from peftkit.generation.forward import autocast
from peftkit.registry.manifest import Version
from peftkit.release.forms import merged_quant, trained
from peftkit.release.measured import NotMeasured
from peftkit.release.room import available
from peftkit.render import size
from peftkit.training.memory import release
from peftkit.tuning.attach import attach, head_of

ROWS, TOKENS = 16, 32
_OWN_IMAGE = 224


@dataclass(frozen=True)
class Moved:
    """How far the outputs of two models are apart on the same inputs."""

    inputs: str
    largest: float
    """max |merged − attached|, over all rows and outputs."""
    size: float
    """max |attached|."""
    same_choice: float | None
    """Share of rows, of a tagger of tokens, whose highest score is the same; None for one output or several labels."""

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        outputs = {"largest": self.largest, "size": self.size}
        return {"measured": True, "inputs": self.inputs, "outputs": outputs, "same_choice": self.same_choice}


def moved(
    version: Version,
    folder: Path,
    cache: Path,
    *,
    base: str | None = None,
    seed: int = 0,
    report: Report = silent,
) -> Moved | NotMeasured:
    """Compare the merged model in `folder` with base + adapter, the base held as it was while it was trained.

    Not measured for a decoder's head, and where a model would not fit into the memory that is free. Raises BaseError
    when the base is not here, BaseMismatch when it is another one, BackboneError when a model cannot be loaded.
    """
    head = head_of(version)
    assert head is not None
    if head.kind == "seq2seq":
        why = f"{version.reference} writes texts from texts, and a merge is measured on prompts with answers"
        return NotMeasured(why, f"peftkit eval {version.name} --data FILE measures base + adapter")
    form = trained(version, cache, base=base, report=report)
    weights = max(sum(file.stat().st_size for file in weight_files(each)) for each in (form.folder, folder))
    if 2 * weights > (free := available(form.quant)):  # 16-bit files are held in 32 bits on a CPU
        return NotMeasured(f"needs {size(2 * weights)}, {size(free)} are free", "close other programs")
    given, told = _inputs(head, folder, seed)
    backbone = form.load(form.quant)
    one, device = _outputs(attach(backbone, version, report=report).model, backbone, head, given), backbone.device
    del backbone
    release(device)
    merged = load_backbone(BaseSpec(source=str(folder)), merged_quant(folder), cache, head=head, report=report)
    other = _outputs(merged.model, merged, head, given)
    alone = head.problem in ("regression", "multi_label")
    same = None if alone else float((one.argmax(-1) == other.argmax(-1)).double().mean())
    found = Moved(told, float((one - other).abs().max()), float(one.abs().max()), same)
    report(Note(f"base + adapter against merged: outputs differ by {found.largest:.2g} at most, on {told}"))
    return found


def _inputs(head: Head, folder: Path, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """Drawn inputs for the model whose config.json lies in `folder`, and what they are."""
    config = read_config(folder)
    draw = torch.Generator().manual_seed(seed)
    if head.kind == "image":
        pixels = config.get("image_size", _OWN_IMAGE)
        height, width = pixels if isinstance(pixels, list | tuple) else (pixels, pixels)
        shape = (ROWS, int(config.get("num_channels", 3)), height, width)
        return {"pixel_values": torch.randn(shape, generator=draw)}, f"{ROWS} drawn images of {height} × {width}"
    text = config.get("text_config")
    words = int(config.get("vocab_size") or (text["vocab_size"] if isinstance(text, dict) else 0))
    tokens = min(TOKENS, longest_sequence(config) or TOKENS)
    ids = torch.randint(0, words, (ROWS, tokens), generator=draw)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given, f"{ROWS} rows of {tokens} drawn tokens"


def _outputs(model: Any, backbone: Backbone, head: Head, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 on the CPU, of shape (rows, …, labels)."""
    model.eval()
    held = {name: tensor.to(backbone.device) for name, tensor in given.items()}
    with torch.inference_mode(), autocast(backbone.device, backbone.placement.compute_dtype):
        return outputs_of(head, model(**held)).cpu()
