"""The folder for vLLM: ranks, names, and a command line that a shell reads as it was meant."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import DeltaError

Export = Callable[..., Any]


def run_script(folder: Path, tools: Path, *more: str) -> list[str]:
    """What a program called vllm is started with by the script in `folder`."""
    tools.mkdir()
    heard = tools / "heard"
    program = tools / "vllm"
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{heard}'\n")
    program.chmod(0o755)
    subprocess.run([folder / "serve.sh", *more], check=True, env={"PATH": f"{tools}:/usr/bin:/bin"}, cwd="/")
    return heard.read_text().split("\0")[:-1]


def test_several_adapters_with_the_smallest_rank_that_holds_them(
    export: Export, biased_base: Path, tmp_path: Path
) -> None:
    receipt = export("vllm", "plain", "all")
    given = run_script(receipt.folder, tmp_path / "tools", "--port", "8001")
    assert given == [*receipt.command[1:], "--port", "8001"]
    assert given[:2] == ["serve", str(biased_base)]
    assert given[given.index("--max-lora-rank") + 1] == "8"
    assert given[given.index("--max-loras") + 1] == "2"
    modules = [json.loads(each) for each in given[given.index("--lora-modules") + 1 : -2]]
    assert [each["name"] for each in modules] == ["plain", "all"]
    for each in modules:
        config = json.loads((receipt.folder / each["path"] / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
    notes = (receipt.folder / "README.txt").read_text()
    assert "rank 8" in notes
    assert "127.0.0.1" in notes


def test_hostile_folder_names_reach_vllm_unharmed(
    registry: Any, export: Export, biased_base: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / 'it\'s $(touch pwned) "b" `touch pwned`; a=b, c'
    shutil.copytree(biased_base, hostile / "base")
    out = hostile / "-o $HOME\nx"
    receipt = export("vllm", "rslora", out=out, base=str(hostile / "base"))
    given = run_script(out, tmp_path / "tools")
    assert given[1] == str(hostile / "base")
    assert given == list(receipt.command[1:])
    assert not list(Path("/").glob("pwned"))
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (321, 512), (512, 512)]
)
def test_the_rank_is_the_smallest_that_vllm_allows(rank: int, allowed: int) -> None:
    from peftkit.release.export.vllm import allowed_rank

    assert allowed_rank(rank) == allowed


def test_a_rank_above_the_largest_is_refused_with_the_error_of_cutting_it() -> None:
    import torch

    from peftkit.base.ref import LocatedBase
    from peftkit.deltas.delta import Deltas, LowRank, Place
    from peftkit.release.export.capabilities import check, features_of, refuse
    from peftkit.release.export.entry import _offers
    from peftkit.release.export.source import Source
    from peftkit.release.export.vllm import allowed_rank

    with pytest.raises(DeltaError, match="rank 513"):
        allowed_rank(513)
    # Singular values 3 (512 of them) and 4 · 513⁻⁰ … : 1 for the 513th, so √(1 / (512 · 9 + 1)) is lost.
    values = torch.full((513,), 3.0)
    values[-1] = 1.0
    delta = LowRank((513, 520), torch.diag(values), torch.eye(513, 520))
    deltas = Deltas("big@1", {"q.weight": delta}, {"q.weight": Place("q", "linear")})
    features = features_of(deltas, {"peft_type": "LORA"})
    base = LocatedBase(source="b", kind="folder", revision=None, folder=Path("b"))
    offers = _offers("vllm", Source(None, base, deltas, features))  # type: ignore[arg-type]
    with pytest.raises(DeltaError) as caught:
        refuse("vllm", "big", check("vllm", features), offers)
    assert f"--rank 512: loses {(1 / (512 * 9 + 1)) ** 0.5:.2g}" in str(caught.value.hint)


def test_two_versions_of_one_name_are_told_apart(registry: Any) -> None:
    from peftkit.release.export.vllm import served_names

    plain, other = registry.resolve("plain"), registry.resolve("all")
    assert served_names([plain, other]) == ["plain", "all"]
    older = replace(plain, id="0123456789abcdef")
    assert served_names([plain, other, older]) == [f"plain-{plain.id[:8]}", "all", "plain-01234567"]
    with pytest.raises(DeltaError, match="named twice"):
        served_names([plain, plain])


def test_a_base_of_the_hub_is_named_with_its_revision() -> None:
    from peftkit.base.ref import LocatedBase
    from peftkit.release.export.vllm import command

    base = LocatedBase(source="Qwen/Qwen3-4B", kind="hub", revision="a" * 40, folder=Path("/x"))
    given = command(base, {"tickets": "./tickets"}, 3)
    assert given[:5] == ["vllm", "serve", "Qwen/Qwen3-4B", "--revision", "a" * 40]
