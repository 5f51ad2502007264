"""The table of docs/guide/methods.md is the one that the code would write.

To write it anew: PEFTKIT_WRITE_GUIDE=1 pytest tests/test_methods_guide.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from partial_lab import moved, publish, write_gpt2
from tiny_bases import write_base

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.registry.store import Registry
from peftkit.release.method_table import COLUMNS, as_markdown
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.partial import dense_layers

GUIDE = Path(__file__).resolve().parents[1] / "docs/guide/methods.md"
START, END = "<!-- table: tests/test_methods_guide.py -->\n", "\n<!-- end of table -->"
NEEDED: dict[str, dict[str, Any]] = {"trainable_tokens": {"tokens": [7]}, "patterns": {"patterns": ["*.norm.weight"]}}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Any, Path]]:
    """An adapter of every method, on a base of two blocks; for biases, one that has some."""
    top = tmp_path_factory.mktemp("methods")
    registry, cache, found = Registry(top / "registry"), top / "cache", {}
    bases = {"llama": write_base(top / "llama"), "gpt2": write_gpt2(top / "gpt2")}
    rows = [Example([10, 20, 30, 40, 50, 60, 70, 80] * 3, [10] * 24, 0, 0, "made:1")]
    for name, method in METHODS.items():
        base = bases["gpt2" if name == "bias_only" else "llama"]
        spec = AdapterSpec.model_validate(
            {"method": name, **({"r": 4} if name == "eva" else {}), **NEEDED.get(name, {})}
        )
        quant = QuantSpec.model_validate({"bits": max(method.bits), "device": "cpu"})
        backbone = load_backbone(BaseSpec(source=str(base)), quant, cache, dense=dense_layers(spec))
        tuned = moved(inject(backbone, spec, rows=rows))
        found[name] = publish(registry, f"by-{name}".replace("_", "-"), tuned, top / "payload" / name, cache), base
    return found


def test_the_guide_has_the_table_of_the_code(examples: Any) -> None:
    table, text = as_markdown(examples), GUIDE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    written, _, after = rest.partition(END)
    if os.environ.get("PEFTKIT_WRITE_GUIDE"):
        GUIDE.write_text(before + START + table + END + after, encoding="utf-8")
        written = table
    assert written == table
    lines = table.splitlines()
    assert len(lines) == len(METHODS) + 2
    assert all(line.count(" | ") == len(COLUMNS) - 1 for line in lines)


def test_what_is_known_of_some_methods(examples: Any) -> None:
    rows = {line.split("`")[1]: line.split(" | ")[4:] for line in as_markdown(examples).splitlines()[2:]}
    assert rows["lora"] == ["yes", "yes", "yes |"]
    assert rows["loftq"] == ["onto dequantized", "merged", "merged |"]
    assert rows["ia3"] == ["yes", "merged", "merged |"]
    assert rows["prefix_tuning"] == ["no", "no", "no |"]
    assert rows["norms"] == ["yes", "merged", "merged |"]
