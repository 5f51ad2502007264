"""The section of `peftkit diff` on delta weights, over adapters of a real tiny base; the rest is in test_adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.published import factors, publish
from tiny_bases import write_base

Cli = Callable[..., tuple[int, str, str]]


def weights(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)["weights"]


def test_figures_against_dense_matrices(cli: Cli, places: Path, tiny_base: Path) -> None:
    one, other = factors(tiny_base, 3, 1), factors(tiny_base, 2, 2, ["q_proj"])
    publish(places, tiny_base, "one", one, alpha=3)
    publish(places, tiny_base, "other", other, alpha=4)
    found = weights(cli("diff", "one", "other", "--json"))
    left = {f"{module}.weight": (b.double() @ a.double()).numpy() for module, (a, b) in one.items()}
    right = {f"{module}.weight": 2 * (b.double() @ a.double()).numpy() for module, (a, b) in other.items()}
    assert [each["name"] for each in found["tensors"]] == sorted(right)
    for each in found["tensors"]:
        a, b = left[each["name"]], right[each["name"]]
        distance = each["distance"]
        assert distance["left_norm"] == pytest.approx(np.linalg.norm(a), rel=1e-6)
        assert distance["right_norm"] == pytest.approx(np.linalg.norm(b), rel=1e-6)
        assert distance["relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
        want = float((a * b).sum()) / np.linalg.norm(a) / np.linalg.norm(b)
        assert distance["cosine"] == pytest.approx(want, abs=1e-6)
    assert found["only_left"] == sorted(left.keys() - right.keys())
    out = cli("diff", "one", "other")[1]
    for words in ("‖A − B‖ / ‖A‖", "only A changes 2", "layers.0.self_attn.q_proj.weight", "principal angles"):
        assert words in out


def test_the_same_weights_in_another_gauge(cli: Cli, places: Path, tiny_base: Path) -> None:
    one = factors(tiny_base, 3, 1)
    publish(places, tiny_base, "one", one)
    publish(places, tiny_base, "again", {module: (a / 2, b * 2) for module, (a, b) in one.items()})
    code, out, err = cli("diff", "one", "again")
    assert code == 0, err
    assert "delta weights: the same in all 4 tensors" in out
    assert "adapter_model.safetensors" in out  # though the files differ
    assert weights(cli("diff", "one", "again", "--json"))["overall"]["relative"] < 1e-12


def test_why_delta_weights_are_not_compared(cli: Cli, places: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=7)
    publish(places, tiny_base, "one", factors(tiny_base, 2, 1))
    publish(places, tiny_base, "two", factors(tiny_base, 2, 2))
    publish(places, other, "else", factors(other, 2, 3), base_fields={"source": "another"})
    code, out, err = cli("diff", "one", "else")
    assert code == 0, err
    assert "delta weights are not compared: one@" in out
    assert "on another (" in out
    value = json.loads(cli("diff", "one", "two", "--no-weights", "--json")[1])
    assert (value["weights"], value["weights_missing"]) == (None, "--no-weights")
    assert "delta weights" not in cli("diff", "one", "two", "--no-weights")[1]
    shutil.rmtree(places / "cache")
    value = json.loads(cli("diff", "one", "two", "--json")[1])
    assert value["weights"] is None
    assert "not on this machine" in value["weights_missing"]
    assert value["rows"]


def test_without_weights_it_starts_light(places: Path, cli: Cli, tiny_base: Path) -> None:
    publish(places, tiny_base, "one", factors(tiny_base, 2, 1))
    code = (
        "import sys; from peftkit.cli.main import main\n"
        "assert main(['diff', 'one', 'one', '--no-weights']) == 0\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
