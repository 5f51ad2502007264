"""The tables of docs/decisions/0018 are what `benchmarks/ulmfit_shape.py` has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/decisions/0018-ulmfit-shape-rule.md").read_text()
FOUND = json.loads((ROOT / "benchmarks/results/ulmfit_shape.json").read_text())


def errors(arm: str) -> str:
    """One arm's row of the table of errors; an edge of the rates that were tried is marked."""
    cells = [arm]
    for by_rows in FOUND["cells"].values():
        for arms in by_rows.values():
            if arm not in arms:
                cells.append("")
                continue
            cell = arms[arm]
            error = cell["error"]
            edge = "*" if cell["rate_at_edge"] else ""
            cells.append(f"{error['point']:.1f} ({error['low']:.1f}–{error['high']:.1f}){edge}")
    published = next(iter(FOUND["cells"].values()))["100"][arm]["published"]
    cells += [f"{published[name]:.2f}" if name in published else "" for name in ("IMDb", "AG")]
    return f"| {' | '.join(cells)} |"


def claimed(line: dict[str, Any]) -> str:
    """One verdict's row: of several rivals, the nearest difference."""
    rival, found = min(line["difference"].items(), key=lambda each: each[1]["point"])
    against = f" ({rival})" if len(line["difference"]) > 1 else ""
    shown = f"{found['point']:+.1f} ({found['low']:+.1f} … {found['high']:+.1f}){against}"
    return f"| {line['claim']} | {line['n']:,} | {shown} | {line['kind']} {line['margin']:g} | **{line['verdict']}** |"


def test_the_page_has_every_error_and_every_verdict_that_was_measured() -> None:
    rows = [*map(errors, FOUND["cells"]["sst2"]["100"]), *map(claimed, FOUND["verdicts"])]
    assert [row for row in rows if row not in PAGE.splitlines()] == []
    assert len(rows) == 11 + 20


if __name__ == "__main__":  # the rows, to be put into the page
    print("\n".join(map(errors, FOUND["cells"]["sst2"]["100"])))
    print("\n".join(map(claimed, FOUND["verdicts"])))
