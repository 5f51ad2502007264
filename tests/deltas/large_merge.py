"""Merge into a synthetic sharded bfloat16 model of more than 2 GB and print its peak memory above the imports.

large_merge.py FOLDER make|measure
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from peftkit.deltas.delta import Deltas, LowRank
from peftkit.deltas.merge import MergeSettings, merge

LAYERS, SHAPE, WORDS, RANK = 12, (8192, 8192), 32000, 16
"""Twelve matrices of 134 MB, and an embedding of 524 MB."""


def make(folder: Path) -> None:
    """Write the model."""
    base = folder / "base"
    base.mkdir()
    block = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    placed = {}
    for layer in range(LAYERS):
        name, file = f"model.layers.{layer}.weight", f"model-{layer:05}.safetensors"
        save_file({name: block}, base / file, {"format": "pt"})
        placed[name] = file
    save_file({"model.embed_tokens.weight": block.repeat(4, 1)[:WORDS].contiguous()}, base / "model-embed.safetensors")
    placed["model.embed_tokens.weight"] = "model-embed.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "tokenizer.json").write_text("{}")
    print(json.dumps({"model": sum(path.stat().st_size for path in base.iterdir()), "largest": WORDS * SHAPE[1] * 2}))


def peak() -> int:
    """Bytes that this process has held at most; ru_maxrss would begin with those of the process that started it."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def measure(folder: Path) -> None:
    """Merge into it."""
    before = peak()
    factors = torch.randn(2, SHAPE[0], RANK, generator=torch.Generator().manual_seed(1)) / 10
    changes = {
        f"model.layers.{layer}.weight": LowRank(SHAPE, factors[0].clone(), factors[1].T.clone())
        for layer in range(LAYERS)
    }
    adapter = sum(4 * (delta.left.numel() + delta.right.numel()) for delta in changes.values())
    merge(folder / "base", Deltas("large@1", changes, {}), folder / "out", MergeSettings(onto="original"))
    print(json.dumps({"peak": peak() - before, "adapter": adapter}))


if __name__ == "__main__":
    {"make": make, "measure": measure}[sys.argv[2]](Path(sys.argv[1]))
