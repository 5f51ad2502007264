"""The commands over what partial fine-tuning learned: kind `tensors`, whose method has no rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import partial_lab
import pytest

from peftkit.recipe.keeping import described
from peftkit.registry.store import Registry, Version

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def top(places: Path, tiny_base: Path) -> Version:
    """The last block and the parted head of a tied base in 4 bits, and a LoRA beside it."""
    made = {"top": {"method": "top_layers", "top_layers": 1}, "beside": {"method": "lora", "r": 2}}
    registry, found = Registry(places / "registry"), {}
    for name, settings in made.items():
        tuned = partial_lab.moved(partial_lab.tune(tiny_base, places / "cache", 4, **settings))
        found[name] = partial_lab.publish(registry, name, tuned, places / "payloads" / name, places / "cache")
    return found["top"]


def done(cli: Cli, *arguments: str) -> str:
    code, out, err = cli(*arguments)
    assert code == 0, err
    return out


def test_it_is_listed_shown_verified_compared_and_exchanged(cli: Cli, top: Version, places: Path) -> None:
    assert "top_layers" in done(cli, "list", "--method", "top_layers")
    assert "beside" not in done(cli, "list", "--method", "top_layers")
    shown = done(cli, "show", "top")
    assert all(words in shown for words in ("kind", "tensors", "top_layers=1", "nf4+dq"))
    assert "all whole" in done(cli, "verify")
    assert "depends on the base's weights" in done(cli, "diff", "top", "beside")
    assert "refuses these adapters: 11 tensors have no factors" in done(cli, "preview", "top", "beside")
    done(cli, "export", "top", "--out", "left")
    shutil.rmtree(places / "registry")
    assert top.reference in done(cli, "import", "left", "--as", "top")


def test_it_is_merged_and_extracted(cli: Cli, top: Version, places: Path) -> None:
    assert "11 of 21 are changed" in done(cli, "merge", "top", "--out", "merged", "--dry-run")
    code, _, err = cli("combine", "top", "--method", "svd", "--rank", "64", "--save-as", "made")
    assert (code, "--drop leaves them out" in err) == (1, True), err
    options = ("--method", "svd", "--rank", "64", "--drop", "--max-residual", "0.1", "--save-as", "made", "--json")
    assert 0 < json.loads(done(cli, "combine", "top", *options))["combined"]["residual"] < 0.1


@pytest.mark.full
def test_it_answers_and_is_measured(cli: Cli, top: Version, places: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ef", "completion": "gh"}]
    (places / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = done(cli, "eval", "top", "beside", "--data", "rows.jsonl")
    assert "top" in measured
    assert done(cli, "generate", "hello", "--adapter", "top", "--with-base", "--max-new-tokens", "2")


def test_what_an_interrupted_run_kept_is_taken_over(cli: Cli, top: Version, places: Path, tiny_base: Path) -> None:
    """The folder that the message names imports with the base, and then it is continued by its names."""
    from peftkit.tuning.methods import AdapterSpec
    from peftkit.tuning.parents import parent_spec

    folder = places / "payloads" / "top"
    assert described(folder) == f"trained tensors in {folder}, which peftkit import takes with --base"
    assert described(places / "payloads" / "beside").startswith("a PEFT checkpoint in ")
    out = done(cli, "import", str(folder), "--as", "kept", "--base", str(tiny_base))
    assert "are not the base's" not in out  # lm_head.weight of a tied base is the head's own
    version = Registry(places / "registry").resolve("kept")
    spec = parent_spec(version, AdapterSpec(), [])
    assert spec.method == "patterns"
    assert "lm_head.weight" in (spec.patterns or [])
