"""`peftkit doctor` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftkit.backbone.measured import measure
from peftkit.recipe import examine, oracle

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same procedure in NF4 and float32 with the shorter rows: the whole of it is tested in tests/recipes."""
    monkeypatch.setattr(examine, "BITS", (4,))
    monkeypatch.setattr(examine, "_dtypes", lambda device: ("float32",))
    monkeypatch.setitem(examine.LENGTHS, "cpu", (32,))


def test_without_a_card_it_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = cli("doctor", "--gpu")
    assert code == 1
    assert "sees no CUDA device" in err
    assert "doctor --cpu" in err


def test_base_and_out_belong_to_an_examination(cli: Cli) -> None:
    assert cli("doctor", "--out", "x.json")[0] == 2


def test_threads_and_both_dtypes_are_shown(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    facts = json.loads(out)
    assert int(facts["threads"].split()[0]) == torch.get_num_threads()
    found = measure()  # the one that was shown: it is made once in a process
    assert found.text in facts["products on the CPU"]
    assert "float32" in found.text
    assert "bfloat16" in found.text
    assert ("quant.compute_dtype=measured" in facts["products on the CPU"]) == found.faster


@pytest.mark.usefixtures("short")
def test_the_figures_are_shown_and_kept(cli: Cli, tiny_base: Path, places: Path) -> None:
    code, out, err = cli("doctor", "--cpu", "--base", str(tiny_base))
    assert code == 0, err + out
    for text in ("gradients", "a planted error", "nf4+dq, float32", "2 × 32 tokens, checkpointing", "first step of",
                 "checks hold", "peftkit-doctor-cpu.json"):  # fmt: skip
        assert text in out
    record = json.loads((places / "peftkit-doctor-cpu.json").read_text())
    assert (record["format"], record["device"], record["base"], record["failed"]) == (1, "cpu", "tiny", [])
    assert {"torch", "bitsandbytes", "processor", "card", "host_memory"} <= record["facts"].keys()
    step = next(check for check in record["checks"] if check["what"] == "step")
    assert step["measured"] > 0
    assert step["expected"] > 0
    assert str(tiny_base) not in json.dumps(record)


@pytest.mark.usefixtures("short")
def test_a_failed_check_ends_with_1_and_says_what_to_do(
    cli: Cli, tiny_base: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "TIMES", 0.0)  # nothing may differ from float64
    monkeypatch.setitem(examine.LENGTHS, "cpu", ())
    code, out, _ = cli("doctor", "--cpu", "--base", str(tiny_base), "--out", "mine.json")
    assert code == 1
    assert "! gradients, nf4+dq, float32" in out
    assert "what to do: do not train in this precision" in out
    assert "gradients, nf4+dq, float32" in json.loads((places / "mine.json").read_text())["failed"]
