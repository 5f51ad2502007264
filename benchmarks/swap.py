"""Time a swap between two LoRA adapters (r 16, all linear layers) on the embedded base, and print one JSON line each.

    python benchmarks/swap.py

peftkit: a resident swap, a swap to the base, and one from disk (attach, activate, detach), once the shape is known and
the first time; beside it the floor of one from disk, which is reading, hashing and parsing the file. PEFT 0.21:
`set_adapter`, `load_adapter` with `set_adapter` and `delete_adapter`, `hotswap_adapter`; PEFT hashes nothing. A swap
is timed alone, without the forward pass after it. Lines are appended to benchmarks/results/swap.jsonl with versions
and hardware. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load

from peftkit import locations
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.environment import environment
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry, Version
from peftkit.tuning.attach import Attached
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

RESULTS = Path(__file__).with_name("results") / "swap.jsonl"
IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
Measured = Iterator[tuple[str, list[float]]]


def backbone_of(bits: int) -> Any:
    """The embedded base."""
    return load_backbone(BaseSpec(), QuantSpec(bits=bits), locations.cache_root().path)


def make(bits: int, folder: Path) -> list[Version]:
    """Two published adapters with random tensors."""
    registry, versions = Registry(folder / "registry"), []
    for seed, name in enumerate(("a", "b")):
        tuned = inject(backbone_of(bits), AdapterSpec(r=16, seed=seed))
        with torch.no_grad():
            for parameter in tuned.trainable.values():
                parameter += 0.01 * torch.randn_like(parameter)
        identity = tuned.backbone.identity
        base = {"source": "embedded", "fingerprint": identity.fingerprint, "parts": identity.parts()}
        draft = Draft(kind="peft", base=base, adapter=tuned.spec.model_dump())
        versions.append(registry.publish(name, save_adapter(tuned, folder / name), draft))
    return versions


def timed(action: Callable[[], Any], times: int) -> list[float]:
    """Milliseconds of each call, after one that is not counted."""
    action()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def ours(bits: int, versions: list[Version]) -> Measured:
    """What peftkit takes; yields the logits of the second adapter last."""
    host = Attached(backbone_of(bits))
    for version in versions:
        host.attach(version)
    names = [version.name for version in versions]

    def swap() -> None:
        host.activate(names[host.active == names[0]])

    yield "resident swap", timed(swap, 2000)

    def to_base() -> None:
        host.activate(None if host.active else names[0])

    yield "swap to the base and back, each", timed(to_base, 2000)

    def from_disk() -> None:
        host.detach(names[1])
        host.attach(versions[1])
        host.activate(names[1])

    yield "from disk: detach, attach, activate", timed(from_disk, 40)

    def first() -> None:
        fresh = Attached(host.backbone)
        fresh.activate(fresh.attach(versions[1]))

    yield "from disk, first of its shape", timed(first, 8)
    file = versions[1].path / "adapter_model.safetensors"

    def floor() -> None:
        content = file.read_bytes()
        hashlib.sha256(content).hexdigest()
        load(content)

    yield "floor: read, SHA-256, parse", timed(floor, 40)


def theirs(bits: int, versions: list[Version]) -> Measured:
    """What PEFT takes with the same files."""
    first, second = (str(version.path) for version in versions)
    model = PeftModel.from_pretrained(backbone_of(bits).model, first, adapter_name="a")
    model.load_adapter(second, adapter_name="b")
    names = ["a", "b"]

    def swap() -> None:
        names.reverse()
        model.set_adapter(names[0])

    yield "PEFT set_adapter", timed(swap, 40)
    model.delete_adapter("b")

    def from_disk() -> None:
        model.load_adapter(second, adapter_name="b")
        model.set_adapter("b")
        model.delete_adapter("a")
        model.load_adapter(first, adapter_name="a")
        model.set_adapter("a")
        model.delete_adapter("b")

    yield (
        "PEFT load_adapter, set_adapter, delete_adapter",
        [taken / 2 for taken in timed(from_disk, 6)],
    )
    paths = [first, second]

    def hotswap() -> None:
        paths.reverse()
        hotswap_adapter(model, paths[0], adapter_name="a")

    yield "PEFT hotswap_adapter", timed(hotswap, 20)


def same_logits(bits: int, versions: list[Version]) -> bool:
    """Whether both compute the same for the second adapter, bitwise."""
    host = Attached(backbone_of(bits))
    host.activate(host.attach(versions[1]))
    plain = PeftModel.from_pretrained(backbone_of(bits).model, str(versions[1].path)).eval()
    with torch.no_grad():
        return torch.equal(host.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def main() -> None:
    """Measure in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=[32, 4])
    parser.add_argument("--note", default="", help="said in every line, such as what else was running")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    RESULTS.parent.mkdir(exist_ok=True)
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as scratch:
            versions = make(bits, Path(scratch))
            fixed = {"adapter_bytes": versions[0].manifest.files["adapter_model.safetensors"].bytes}
            fixed |= {"same_logits": same_logits(bits, versions), "threads": torch.get_num_threads()}
            for measure in (ours, theirs):
                for what, taken in measure(bits, versions):
                    report(what, bits, taken, {**fixed, "note": arguments.note})


def report(what: str, bits: int, taken: list[float], fixed: dict[str, Any]) -> None:
    """Print a line and keep it."""
    ordered = sorted(taken)
    p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
    figures = {"bits": bits, "what": what, "times": len(taken), "p50_ms": round(p50, 4), "p99_ms": round(p99, 4)}
    text = json.dumps({**figures, **fixed, "environment": environment()})
    print(text, flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
