"""`peftkit combine` and `merge` as a user types them, over adapters of a real tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.published import Factors
from safetensors.torch import load_file

from peftkit.cli.weighted import parse_rows
from peftkit.errors import DeltaError
from peftkit.registry import Registry

Cli = Callable[..., tuple[int, str, str]]


def dense(adapters: dict[str, Factors], module: str, weights: dict[str, float]) -> torch.Tensor:
    """Σ weight · 2 B A of a module, float64."""
    found = torch.zeros(64, 64, dtype=torch.float64)
    for name, weight in weights.items():
        if module in adapters[name]:
            a, b = adapters[name][module]
            found += weight * 2 * (b.double() @ a.double())
    return found


def test_a_combination_is_registered_with_its_receipt(cli: Cli, adapters: dict[str, Factors], places: Path) -> None:
    code, out, err = cli("combine", "tickets:0.6", "tone@latest:0.4", "--save-as", "both", "--tag", "prod", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert (value["combined"]["method"], value["combined"]["rank"], value["combined"]["residual"]) == ("exact", None, 0)
    version = Registry(places / "registry").resolve("both@prod")
    assert value["version"] == version.reference
    assert [receipt["type"] for receipt in version.manifest.receipts] == ["combine"]
    assert {parent.relation for parent in version.manifest.parents} == {"combined"}
    code, out, _ = cli(
        "combine", "tickets", "tone", "--method", "ties", "--set", "density=1", "--rank", "64", "--save-as", "t"
    )
    assert code == 0
    assert "error of ΔW" in out
    code, out, _ = cli("log", "both")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tickets:nan", "--save-as", "x"), "no finite number"),
        (("tickets:0", "tone:0", "--save-as", "x"), "all weights"),
        (("tickets:1e300", "--save-as", "x"), "cannot be a weight"),
        (("tickets", "--save-as", "latest"), "latest"),
        (("tickets", "--save-as", "x", "--method", "tiez"), "tiez"),
        (("tickets", "--save-as", "x", "--method", "ties", "--set", "density=abc", "--rank", "2"), "no number is set"),
        (("tickets", "--save-as", "x", "--method", "ties", "--rank", "1"), "--rank"),
        (("tickets", "tickets:-1", "--save-as", "x"), "cancel"),
        (("tickets", "--save-as", "x", "--rows", "tickets="), "an adapter without a file"),
        (("tickets", "--save-as", "x", "--gate", "0.9"), "--rows tickets="),
        (("tickets", "--save-as", "x", "--gate", "2"), "no share to keep"),
    ],
)
def test_refusals_say_why_and_register_nothing(
    cli: Cli, adapters: dict[str, Factors], places: Path, arguments: tuple[str, ...], says: str
) -> None:
    code, _, err = cli("combine", *arguments)
    assert (code, says in err) == (1, True), err
    assert Registry(places / "registry").names() == ["tickets", "tone"]


def test_a_merge_is_the_sum_in_the_file_and_says_what_it_kept(
    cli: Cli, adapters: dict[str, Factors], tiny_base: Path, places: Path
) -> None:
    code, out, err = cli("merge", "tickets", "tone:0.5", "--out", "merged", "--dtype", "float32", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["weights"]["kept"] == pytest.approx(1, abs=1e-6)
    assert record == json.loads((places / "merged" / "peftkit_merge.json").read_text())
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, places / "merged"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        change = (
            dense(adapters, module, {"tickets": 1, "tone": 0.5})
            if "self_attn" in name and tensor.shape == (64, 64)
            else 0
        )
        np.testing.assert_array_equal((tensor.double() + change).float().numpy(), after[name].numpy(), err_msg=name)
    code, _, err = cli("merge", "tickets", "--out", "merged")
    assert code == 1
    assert "is not empty" in err


def test_a_dry_run_writes_nothing(cli: Cli, adapters: dict[str, Factors], places: Path) -> None:
    code, out, err = cli("merge", "tickets", "--out", "merged", "--dry-run")
    assert code == 0, err
    assert "4 of 20 are changed: model.layers.0.self_attn.o_proj.weight" in out
    assert not (places / "merged").exists()
    assert not list(places.glob(".merged*"))
    code, out, _ = cli("merge", "tickets", "--out", "merged", "--dry-run", "--json")
    assert (code, len(json.loads(out)["changed"])) == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--out", "registry/x"), 1, "inside the registry"),
        (("--out", "x", "--shard-size", "banana"), 1, "banana"),
        (("--out", "x", "--rounding", "stochastic"), 1, "--quantize is not given"),
        (("--out", "x", "--gate", "--force"), 1, "contradict"),
        (("--out", "x", "--gate"), 1, "does not pass --gate"),
        (("--out", "x", "--onto", "dequantized"), 1, "--onto original"),
        (("--out", "x", "--onto", "sideways"), 2, "sideways"),
        ((), 2, "--out"),
    ],
)
def test_merges_that_make_no_sense_leave_nothing(
    cli: Cli, adapters: dict[str, Factors], places: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    found, _, err = cli("merge", "tickets", *arguments)
    assert (found, says in err) == (code, True), err
    assert not (places / "x").exists()
    assert not list(places.glob(".x*"))


def test_rows_are_parsed_by_name_or_for_all(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.jsonl"
    odd.write_text("")
    assert parse_rows(["a=one.jsonl", "all.jsonl"], ["a", "b@prod"]) == {
        "a": Path("one.jsonl"),
        "b@prod": Path("all.jsonl"),
    }
    assert parse_rows([str(odd)], ["a"]) == {"a": odd}
    for wrong in (["a="], ["=x"], ["one.jsonl", "two.jsonl"]):
        with pytest.raises(DeltaError, match="--rows names"):
            parse_rows(wrong, ["a"])


def test_ctrl_c_is_said_and_a_merge_says_how_to_go_on(
    cli: Cli, adapters: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peftkit.release.combine.combine", interrupt)
    assert cli("combine", "tickets", "--save-as", "x")[::2] == (130, "peftkit: interrupted\n")
    monkeypatch.setattr("peftkit.release.merge.merge", interrupt)
    code, _, err = cli("merge", "tickets", "--out", "x")
    assert code == 130
    assert "goes on where it stopped, rm -r .x.merging gives it up" in err


def test_a_reader_that_leaves_does_not_stop_a_merge(adapters: dict[str, Factors], places: Path) -> None:
    own = {f"PEFTKIT_{name.upper()}": str(places / name) for name in ("registry", "runs", "cache")}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "peftkit", "merge", "tickets", "--out", "merged"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=places, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (places / "merged" / "peftkit_merge.json").is_file()
