"""The table of the guide to tasks is what `benchmarks/tasks.py` has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_NAMES = {
    "macro_f1": "macro-F1", "rmse": "RMSE", "span_f1": "span F1", "f1": "F1", "chrf": "chrF", "rougeL": "ROUGE-L",
    "preference_accuracy": "accuracy", "answer_nll": "NLL",
}  # fmt: skip
_BASES = {"embedded:smollm2-135m": "LLM", "embedded:minilm": "encoder", "embedded:efficientnet-lite0": "image net"}


def line(name: str, found: dict[str, Any]) -> str:
    """One arm's row of the table."""
    score, best, digits = found["score"], found["best_baseline"], 1 if found["metric"] == "chrf" else 3
    rival, change = found["baselines"][best], found["difference"]
    cells = [
        name,
        f"{found['recipe']}, {_BASES[found['base']]}",
        f"{found['n_train']:,} / {found['n_held']}",
        f"{_NAMES[found['metric']]} {score['point']:.{digits}f} ({score['low']:.{digits}f}–{score['high']:.{digits}f})",
        f"{best} {rival['point']:.{digits}f}",
        f"{change['point']:+.{digits}f} ({change['low']:+.{digits}f} … {change['high']:+.{digits}f})",
        f"{found['cpu_seconds']:.0f}",
        f"{found['peak_bytes'] / 1e9:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_the_guide_stands_in_the_results() -> None:
    recipes = json.loads((ROOT / "benchmarks/results/tasks.json").read_text())["recipes"]
    shown = [row for row in (ROOT / "docs/guide/tasks.md").read_text().splitlines() if row.startswith("|")]
    table = [row for row in shown if row.split(" | ")[0].removeprefix("| ") in recipes]
    assert table == [line(name, found) for name, found in recipes.items()]
