"""Sound adapters, written byte by byte, that a test can bend in exactly one place before they are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAYER = "model.layers.0.self_attn"
Q = f"base_model.model.{LAYER}.q_proj"
V = f"base_model.model.{LAYER}.v_proj"
BASE = {
    "model.embed_tokens.weight": (32, 8),
    f"{LAYER}.q_proj.weight": (8, 8),
    f"{LAYER}.q_proj.bias": (8,),
    f"{LAYER}.v_proj.weight": (4, 8),
    f"{LAYER}.k_proj.weight": (4, 8),
    "model.norm.weight": (8,),
}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "someone/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "auto_mapping": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "rank_pattern": {},
    "bias": "none",
}
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1, "C64": 8}


def values(shape: tuple[int, ...], dtype: str = "F32") -> bytes:
    """Small numbers of any dtype: 0.5 where it is floating point."""
    count = 1
    for extent in shape:
        count *= extent
    one = {"F64": struct.pack("<d", 0.5), "F32": struct.pack("<f", 0.5), "F16": b"\x00\x38", "BF16": b"\x00\x3f"}
    return one.get(dtype, b"\x01" + bytes(WIDTH[dtype] - 1)) * count


@dataclass
class Adapter:
    """What will be written: a test changes a field, or leaves a step for after the writing in `after`."""

    config: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(CONFIG)))
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    config_bytes: Callable[[bytes], bytes] = bytes
    header: Callable[[dict[str, Any]], Any] = lambda entries: None
    header_bytes: Callable[[bytes], bytes] = bytes
    weights_bytes: Callable[[bytes], bytes] = bytes
    after: Callable[[Path], None] = lambda folder: None
    weights_name: str = "adapter_model.safetensors"

    def add(self, name: str, shape: tuple[int, ...], dtype: str = "F32", data: bytes | None = None) -> None:
        self.tensors[name] = (dtype, shape, values(shape, dtype) if data is None else data)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        if self.config:
            text = json.dumps(self.config, indent=2).encode()
            (folder / "adapter_config.json").write_bytes(self.config_bytes(text))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        body = b""
        for name, (dtype, shape, data) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        self.header(entries)
        text = self.header_bytes(json.dumps(entries).encode())
        weights = struct.pack("<Q", len(text)) + text + body
        (folder / self.weights_name).write_bytes(self.weights_bytes(weights))
        self.after(folder)
        return folder


def sound() -> Adapter:
    """A LoRA of rank 2 on q_proj and v_proj of BASE."""
    adapter = Adapter()
    for module, width in ((Q, 8), (V, 4)):
        adapter.add(f"{module}.lora_A.weight", (2, 8))
        adapter.add(f"{module}.lora_B.weight", (width, 2))
    return adapter
