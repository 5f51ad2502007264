"""What is left of a real adapter after it was merged into 4-bit and int8 weights: PEFT's merge, and ours.

    python benchmarks/dead_zone.py tickets --rows runs/demo-data/tickets.held_out.jsonl

Dequantized weights stand on the grid that they are quantized to again, so a small ΔW rounds back to where it began.
For each way of merging: the share of ΔW that is kept, ⟨ΔŴ, ΔW⟩ / ‖ΔW‖², and the answer NLL on the adapter's held-out
rows against base + adapter. Results go to benchmarks/results/dead_zone.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import torch
from peft import PeftModel

from peftkit import locations
from peftkit.backbone.contain import contain_bitsandbytes, quantized_linears
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, longest_sequence, read_config
from peftkit.data.audit import DataSpec, encode
from peftkit.data.formats import load_rows
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merge import MergeSettings, merge
from peftkit.deltas.reading.read import deltas_of
from peftkit.environment import environment
from peftkit.evaluation.compare import mean_nll, paired_nll
from peftkit.generation.forward import row_nll
from peftkit.registry.store import Registry, Version
from peftkit.tuning.attach import Attached
from peftkit.tuning.stored import read

ROWS = 48
"""As many held-out rows as the demo measures on."""
RESULTS = Path(__file__).with_name("results") / "dead_zone.json"


class Rows:
    """Held-out rows, and the NLL of models on them."""

    def __init__(self, backbone: Backbone, path: Path) -> None:
        source = load_rows(path)
        limit = longest_sequence(read_config(backbone.base.folder))
        part = encode(source.rows[:ROWS], source, "held_out", backbone.tokenizer, DataSpec(), limit)
        self.examples, self.pad_id = part.examples, backbone.tokenizer.pad_id
        self.tokens = [example.answer_tokens for example in self.examples]

    def nll(self, model: Any) -> list[float]:
        """Summed answer NLL of every row, nats."""
        return row_nll(model, self.examples, pad_id=self.pad_id, device=torch.device("cpu"), batch_size=16)

    def line(self, way: str, nll: list[float], reference: list[float], kept: float | None) -> dict[str, Any]:
        """One measurement: the NLL per token, and its change against base + adapter."""
        change = paired_nll(reference, nll, self.tokens)
        interval = {"point": change.point, "low": change.low, "high": change.high}
        line = {"way": way, "kept": kept, "answer_nll": mean_nll(nll, self.tokens).point, "change": interval}
        print(json.dumps(line), flush=True)
        return line


@contextmanager
def loaded(source: str, bits: int) -> Iterator[Backbone]:
    """A backbone, in float32 where nothing is quantized."""
    yield load_backbone(BaseSpec(source=source), QuantSpec(bits=bits), locations.cache_root().path)


def by_peft(version: Version, bits: int, deltas: Deltas, rows: Rows) -> tuple[list[float], float]:
    """PEFT's merge into the quantized layers: NLL, and the share of ΔW kept."""
    with loaded(version.manifest.base.source, bits) as backbone:
        layers = quantized_linears(backbone.model)
        before = {name: dense_weight(layer).double() for name, layer in layers.items()}
        model = PeftModel.from_pretrained(backbone.model, str(version.path)).merge_and_unload()
        contain_bitsandbytes(model)
        projected = whole = 0.0
        for name, layer in quantized_linears(model).items():
            delta = deltas.changes[f"{name}.weight"].dense(lambda first, last, name=name: before[name][first:last])
            projected += float(((dense_weight(layer).double() - before[name]) * delta).sum())
            whole += float(delta.square().sum())
        model.eval()
        return rows.nll(model), projected / whole


def by_us(version: Version, bits: int, deltas: Deltas, rows: Rows) -> Iterator[tuple[str, list[float], float]]:
    """Our merges: what it is, NLL, and the share kept that the receipt states."""
    code = "nf4" if bits == 4 else "int8"
    trained = {**(version.manifest.base.quantization or {}), "bits": bits}
    ways = {
        "onto original, float32": {"onto": "original", "dtype": "float32"},
        "onto original, bfloat16": {"onto": "original", "dtype": "bfloat16"},
        f"onto dequantized {code}, float32": {"onto": "dequantized", "dtype": "float32"},
        f"onto dequantized {code}, bfloat16": {"onto": "dequantized", "dtype": "bfloat16"},
        f"onto dequantized {code}, quantized again": {"onto": "dequantized", "quantize": code},
        f"onto dequantized {code}, quantized again at random": {
            "onto": "dequantized",
            "quantize": code,
            "rounding": "stochastic",
        },
        f"onto original, then {code}": {"onto": "original", "quantize": code},
    }
    with loaded(version.manifest.base.source, 32) as backbone:
        base = backbone.base
    for way, settings in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "merged"
            receipt = merge(base, deltas, out, MergeSettings(force=True, **settings), trained_on=trained)
            with loaded(str(out), bits if "quantize" in settings else 32) as merged:
                yield way, rows.nll(merged.model), receipt.whole.share


def main() -> None:
    """Measure over NF4 and int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--rows", type=Path, required=True, help="held-out rows of that adapter")
    parser.add_argument("--registry", type=Path, default=Path("adapters"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    version = Registry(arguments.registry).resolve(arguments.adapter)
    results: dict[str, Any] = {"adapter": version.reference, "environment": environment(), "bits": {}}
    for bits in (4, 8):
        with loaded(version.manifest.base.source, bits) as backbone:
            rows, host = Rows(backbone, arguments.rows), Attached(backbone)
            bare = rows.nll(backbone.model)
            with host.using(host.attach(version)) as model:
                reference = rows.nll(model)
            deltas = deltas_of(read(version), backbone.base.folder)
        lines = [rows.line("base", bare, reference, 0.0), rows.line("base + adapter", reference, reference, 1.0)]
        nll, kept = by_peft(version, bits, deltas, rows)
        lines.append(rows.line("PEFT merge_and_unload", nll, reference, kept))
        lines += [rows.line(way, nll, reference, kept) for way, nll, kept in by_us(version, bits, deltas, rows)]
        results["bits"][str(bits)] = lines
        results["rows"], results["answer_tokens"] = len(rows.tokens), sum(rows.tokens)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
