"""`peftkit preview` as a user types it, over adapters of a real tiny base."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.published import Factors, factors, publish
from tiny_bases import write_base

from peftkit.cli.weighted import parse_weighted
from peftkit.errors import DeltaError

Cli = Callable[..., tuple[int, str, str]]


def test_json_against_dense_matrices(cli: Cli, adapters: dict[str, Factors]) -> None:
    code, out, err = cli("preview", "tickets:0.6", "tone:-0.4", "--rank", "5", "--json")
    assert code == 0, err
    found = json.loads(out)
    one, other = (
        {module: 2 * (b.double() @ a.double()).numpy() for module, (a, b) in each.items()} for each in adapters.values()
    )
    total = {module: 0.6 * each - 0.4 * other.get(module, np.zeros((64, 64))) for module, each in one.items()}

    def norm(of: dict[str, Any]) -> float:
        return math.sqrt(sum(float((each**2).sum()) for each in of.values()))

    overall = found["overall"]
    assert overall["norms"] == pytest.approx([norm(one), norm(other)], rel=1e-6)
    assert overall["combined_norm"] == pytest.approx(norm(total), rel=1e-6)
    product = sum(float((one[module] * each).sum()) for module, each in other.items())
    assert overall["pairs"][0]["cosine"] == pytest.approx(product / norm(one) / norm(other), abs=1e-6)
    tails = [np.linalg.svd(each, compute_uv=False)[5:] for each in total.values()]
    want = math.sqrt(sum(float((tail**2).sum()) for tail in tails)) / norm(total)
    assert found["residuals"]["5"] == pytest.approx(want, rel=1e-6)
    assert {tensor["name"] for tensor in found["tensors"]} == {f"{module}.weight" for module in one}
    assert (found["exact_rank"], found["dense_seconds"] > 0) == (6, True)
    assert found["weights"] == [0.6, -0.4]


def test_text_and_page(cli: Cli, adapters: dict[str, Factors], places: Path) -> None:
    code, out, err = cli("preview", "tickets", "tone@latest:0.5", "--html", "both.html")
    assert code == 0, err
    assert out.index("dense methods") < out.index("sign conflict") < out.index("cosine")
    for words in ("refuses these adapters: their ranks differ", "sampled on", "do not say how good", "o_proj"):
        assert words in out
    page = (places / "both.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "1 · tickets + 0.5 · tone" in page
    assert cli("preview", "tickets", "--html", "no/such/folder.html")[0] == 1


def test_one_adapter_alone(cli: Cli, adapters: dict[str, Factors]) -> None:
    code, out, err = cli("preview", "tickets:-2")
    assert code == 0, err
    assert "cancellation" in out
    assert "pairs" not in out


def test_two_bases_are_refused_by_what_differs(
    cli: Cli, adapters: dict[str, Factors], places: Path, tmp_path: Path
) -> None:
    other = write_base(tmp_path / "other", seed=7)
    publish(places, other, "else", factors(other, 2, 3), base_fields={"source": "another"})
    code, out, err = cli("preview", "tickets", "else")
    assert (code, out) == (1, "")
    for words in ("was trained on tiny (", "else@", "on another (", "weights", "adapters of one base"):
        assert words in err


def test_a_base_that_is_not_here(cli: Cli, adapters: dict[str, Factors], places: Path, tiny_base: Path) -> None:
    shutil.rmtree(places / "cache")
    code, _, err = cli("preview", "tickets", "tone")
    assert (code, "the base tiny of tickets@" in err, "not on this machine" in err) == (1, True, True)
    code, _, err = cli("preview", "tickets", "tone", "--base", str(tiny_base))
    assert code == 0, err


def test_a_hub_base_is_found_in_the_hubs_own_cache(
    cli: Cli, places: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: tests have none."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(places / "hub"))
    commit = "c" * 40
    fields = {"source": "me/tiny", "revision": commit, "record": None}
    publish(places, tiny_base, "tickets", factors(tiny_base, 2, 1), base_fields=fields)
    assert "hf download me/tiny" in cli("preview", "tickets")[2]
    repo = places / "hub" / "models--me--tiny"
    shutil.copytree(tiny_base, repo / "snapshots" / commit)
    code, _, err = cli("preview", "tickets")
    assert code == 0, err


def test_parse_weighted() -> None:
    assert parse_weighted(["a", "a@prod:0.6", "b:-1e-1", "c: 2"]) == [("a", 1), ("a@prod", 0.6), ("b", -0.1), ("c", 2)]
    assert parse_weighted([]) == []


@pytest.mark.parametrize(
    "argument", ["a:nan", "a:inf", "a:-inf", "a:1e999", "a:", "a:x", "a:1:2", ":1", "", " :1", "a:0,5"]
)
def test_what_is_no_weight(argument: str, cli: Cli) -> None:
    with pytest.raises(DeltaError, match=r"no finite number|names no adapter"):
        parse_weighted([argument])
    code, _, err = cli("preview", argument)
    assert code == 1
    assert "NAME:WEIGHT" in err
