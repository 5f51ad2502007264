"""The receipt of a merge: what it refuses, and that FORMAT.md names its fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import peftkit.registry
from peftkit.deltas.combining.methods import How
from peftkit.deltas.merge import MergeReceipt, MergeSettings, Provenance
from peftkit.deltas.merging.kept import Kept
from peftkit.errors import DeltaError


def receipt(**settings: Any) -> MergeReceipt:
    """A LoRA that was rounded away beside a saved norm that is a billion times as large and whole."""
    gone = Kept(entries=100, unchanged=99, delta=1.0, base=100.0, lost=-0.98, noise=1.0)
    whole = Kept(entries=10, unchanged=0, delta=1e9, base=1.0, lost=0.0, noise=0.0)
    return MergeReceipt(
        {"record": "r", "weights": "w"},
        "d",
        Provenance([("a@1", 1.0)], How("ties", {"density": 0.5})),
        MergeSettings(onto="dequantized", quantize="nf4", **settings),
        {"bits": 4},
        {"torch": "2"},
        {"q": gone, "norm": whole},
        {"q": "LoRA in nf4", "norm": "a saved tensor in float32"},
    )


def test_a_large_tensor_does_not_hide_that_the_others_were_rounded_away() -> None:
    made = receipt()
    assert made.whole.share == pytest.approx(1)
    dropped: list[bool] = []
    with pytest.raises(DeltaError, match=r"keep 2.0 % of the delta \(LoRA in nf4; q: 2.0 %\)"):
        made.check_or(lambda: dropped.append(True))
    assert dropped == [True]
    receipt(force=True).check_or(lambda: dropped.append(True))
    assert dropped == [True]


def test_the_format_names_every_field() -> None:
    page = (Path(peftkit.registry.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `merge` \| (.*) \|$", page, re.MULTILINE)
    record = receipt().as_record()
    named = set(re.findall(r"`([a-z_0-9]+)`", row))
    assert record.keys() - {"type"} <= named
    assert record["groups"].keys() == {"LoRA in nf4", "a saved tensor in float32"}
    assert (record["method"], record["options"]["density"]) == ("ties", 0.5)
