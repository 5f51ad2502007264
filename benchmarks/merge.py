"""Time a merge of a LoRA adapter (r 16, all linear layers) into a 1.6 GB bfloat16 model, and write one JSON file.

    python benchmarks/merge.py [--scratch FOLDER]

On the same files: peftkit's streaming merge (with the base's digests known, and not), PEFT's `merge_and_unload` with
`save_pretrained`, and a plain copy with fsync, which is the floor. Each runs in a process of its own; memory is the
process's peak after the work less its peak after the imports. PEFT hashes nothing and fsyncs nothing. The model is a
Llama of 14 layers with random weights, in four files. Results go to benchmarks/results/merge.json with versions and
hardware. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "merge.json"
LAYERS, HIDDEN, WIDE, WORDS, RANK = 14, 2048, 5632, 32000, 16
WAYS = ("copy", "ours", "ours, digests of the base unknown", "peft")
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def make(folder: Path) -> None:
    """A base with random weights in four files, and an adapter of it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()

    def random(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        norms = (f"model.layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
        shapes |= named | dict.fromkeys(norms, (HIDDEN,))
    names, files = list(shapes), {}
    for number in range(4):
        mine = names[number::4]
        file = f"model-{number + 1:05}-of-00004.safetensors"
        tensors = {name: (1 if len(shapes[name]) == 1 else 0) + random(*shapes[name]) for name in mine}
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, base / file, {"format": "pt"})
        files |= dict.fromkeys(mine, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(base)
    factors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{module}.lora_A.weight"] = random(RANK, columns)
            factors[f"{module}.lora_B.weight"] = random(rows, RANK, scale=0.005)
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    targets = [name.rpartition(".")[2] for name in LINEARS]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    settings |= {"target_modules": targets, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def copy(base: Path, adapter: Path, out: Path, cache: Path) -> Callable[[], Any]:
    """The floor: every byte read, written and fsynced."""

    def work() -> None:
        out.mkdir()
        for file in base.iterdir():
            with file.open("rb") as reading, (out / file.name).open("wb") as writing:
                shutil.copyfileobj(reading, writing, 1 << 22)
                writing.flush()
                os.fsync(writing.fileno())

    return work


def ours(base: Path, adapter: Path, out: Path, cache: Path) -> Callable[[], Any]:
    """peftkit."""
    from safetensors.torch import load_file

    from peftkit.base.dense import dense_tensors
    from peftkit.base.ref import read_config
    from peftkit.deltas.merge import MergeSettings, merge
    from peftkit.deltas.reading.read import read_deltas

    def work() -> dict[str, Any]:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        deltas = read_deltas("bench@1", "peft", config, tensors, dense_tensors(base), read_config(base))
        receipt = merge(base, deltas, out, MergeSettings(onto="original"), cache=cache)
        return receipt.whole.figures()

    return work


def peft(base: Path, adapter: Path, out: Path, cache: Path) -> Callable[[], Any]:
    """PEFT, as its documentation shows it."""
    import peftkit.backbone.bnb  # noqa: F401  keeps bitsandbytes from the Hub

    # isort: split

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(str(out))

    return work


def peak() -> int:
    """Bytes that this process has held at most; ru_maxrss would begin with those of the process that started it."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def child(way: str, folder: Path, cache: Path) -> None:
    """Do it once in this process and print the figures."""
    prepare = {"copy": copy, "peft": peft}.get(way, ours)
    work = prepare(folder / "base", folder / "adapter", folder / "out", cache)
    imported = peak()
    start = time.perf_counter()
    said = work()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": (peak() - imported) / 1e6, "kept": said}))


def measured(way: str, folder: Path, times: int) -> Iterator[dict[str, Any]]:
    """The figures of `times` processes, the files of the base read before each."""
    for number in range(times):
        shutil.rmtree(folder / "out", ignore_errors=True)
        for file in (folder / "base").iterdir():
            file.read_bytes()
        os.sync()
        known = folder / ("cache" if way == "ours" else f"cache-{number}")
        command = [sys.executable, __file__, "--child", way, "--scratch", str(folder), "--cache", str(known)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure every way and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="a folder for 3.5 GB, on the disk to measure")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the results, such as what else was running")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.scratch, arguments.cache)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        make(folder)
        list(measured("ours", folder, 1))  # fills the cache of digests
        found = {way: list(measured(way, folder, arguments.times)) for way in WAYS}
        total = sum(file.stat().st_size for file in (folder / "base").iterdir())
    report(found, total, arguments.note)


def report(found: dict[str, list[dict[str, Any]]], total: int, note: str) -> None:
    """Print a line for each way and write the results."""
    from peftkit.environment import environment

    lines = {}
    floor = statistics.median(run["seconds"] for run in found["copy"])
    for way, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        lines[way] = {
            "seconds": round(seconds, 2),
            "copies": round(seconds / floor, 2),
            "peak_megabytes_above_imports": round(max(run["megabytes"] for run in runs), 1),
            "all_seconds": [round(run["seconds"], 2) for run in runs],
            "kept": runs[0]["kept"],
        }
        print(json.dumps({"way": way, **lines[way]}), flush=True)
    content = {"model_bytes": total, "r": RANK, "ways": lines, "note": note, "environment": environment()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
