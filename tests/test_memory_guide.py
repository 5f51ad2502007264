"""The guide's table of what fits is what `peftkit plan` says, for bases whose configurations are recorded."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from peftkit.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/guide/memory.md").read_text(encoding="utf-8")
CONFIGS = json.loads((ROOT / "benchmarks/published_memory.json").read_text(encoding="utf-8"))["models"]
NAMES = {
    "qwen2.5-1.5b": "Qwen2.5 1.5B",
    "llama-3.2-3b": "Llama 3.2 3B",
    "mistral-7b": "Mistral 7B",
    "llama-3.1-8b": "Llama 3.1 8B",
    "llama-2-13b": "Llama 2 13B",
    "codellama-34b": "Code Llama 34B",
}
BUDGETS = ("8GB", "12GB", "24GB")


def plan(base: Path, *asked: str) -> tuple[dict[str, Any] | None, str]:
    """The plan as JSON, or what was said instead."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["plan", "qlora_sft", f"base={base}", "data.max_length=1024", *asked, "--json"])
    return (json.loads(out.getvalue()) if code == 0 else None), err.getvalue()


def least(base: Path, bits: int) -> str:
    found, said = plan(base, f"quant.bits={bits}", "--budget", "1GB")
    assert found is None
    (smallest,) = re.findall(r"a budget of at least ([\d.]+) GB", said)
    return f"{smallest} GB"


def settings(base: Path, budget: str) -> str:
    found, _ = plan(base, "--budget", budget)
    if found is None:
        return "–"
    setting = found["setting"]
    assert setting["bits"] == 4
    rows = f"{setting['micro_batch']} row{'s' if setting['micro_batch'] > 1 else ''}"
    if not setting["gradient_checkpointing"]:
        return rows
    return f"{rows}, {setting['checkpointed_blocks'] or 'all'} blocks again"


def table(folder: Path) -> str:
    lines = ["| base | least, 4 bits | least, 8 bits | least, 16 bits | 8 GB | 12 GB | 24 GB |", "|---" * 7 + "|"]
    for key, name in NAMES.items():
        base = folder / key
        base.mkdir()
        (base / "config.json").write_text(json.dumps(CONFIGS[key]))
        cells = [least(base, bits) for bits in (4, 8, 16)] + [settings(base, budget) for budget in BUDGETS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.full  # 36 plans, 15 seconds
def test_the_table_of_what_fits(tmp_path: Path) -> None:
    (shown,) = re.findall(r"<!-- table: .*? -->\n(.*?)\n<!-- end of table -->", PAGE, re.DOTALL)
    assert table(tmp_path) == shown, "plans changed: write the new table into the guide"


def test_the_figures_of_trust_are_those_of_the_results() -> None:
    published = json.loads((ROOT / "benchmarks/results/plan_published.json").read_text())["summary"]
    assert f"Of {published['scored']} published figures of other toolkits, {published['within']} are met" in PAGE
    ledger = json.loads((ROOT / "benchmarks/results/plan_ledger.json").read_text())
    cells = sum(ledger[part]["summary of cells"]["peak"]["cells"] for part in ("development", "kept_out"))
    assert f"on {cells} settings of eight architectures" in PAGE
