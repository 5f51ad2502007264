"""`export --to`: folders for other programs, several adapters at once, and refusals that say what works instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., tuple[int, str, str]]


def reply(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs and a DoRA of the tiny base, as PEFT saves them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    settings: dict[str, dict[str, Any]] = {"lamps": {"use_rslora": True}, "doors": {"r": 9}, "dora": {"use_dora": True}}
    for name, each in settings.items():
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **each}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(**options))
        model.save_pretrained(folder / name, save_embedding_layers=False)
    return {name: folder / name for name in settings}


@pytest.fixture
def imported(cli: Cli, saved: dict[str, Path], tiny_base: Path) -> dict[str, str]:
    done = {name: cli("import", str(folder), "--base", str(tiny_base), "--json") for name, folder in saved.items()}
    return {name: reply(result)["version"] for name, result in done.items()}


def test_a_folder_for_peft_says_what_was_folded(cli: Cli, imported: dict[str, str], tmp_path: Path) -> None:
    code, out, err = cli("export", "lamps", "--to", "peft", "--out", "out")
    assert code == 0, err
    assert f"{imported['lamps']} is in out for peft" in out
    assert "rsLoRA (use_rslora): folded" in out
    assert "read back: ΔW differs by" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, config["r"])
    assert cli("export", "lamps", "--to", "peft", "--out", "out")[0] == 1  # an export never writes over files


def test_several_adapters_for_vllm(cli: Cli, imported: dict[str, str], tiny_base: Path, tmp_path: Path) -> None:
    value = reply(cli("export", "lamps", "doors", "--to", "vllm", "--out", "serving", "--json"))
    assert value["engine"] == "vllm"
    assert set(value["versions"]) == {"lamps", "doors"}
    assert set(value["files"]) == {str(p.relative_to(tmp_path / "serving")) for p in walk(tmp_path / "serving")}
    assert value["command"][:3] == ["vllm", "serve", str(tiny_base)]
    assert value["command"][value["command"].index("--max-lora-rank") + 1] == "16"
    code, out, err = cli("export", "lamps", "--to", "vllm", "--out", "other")
    assert code == 0, err
    assert "start it with other/serve.sh" in out


def walk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_refusals_are_short_and_leave_nothing(cli: Cli, imported: dict[str, str], tmp_path: Path) -> None:
    for arguments, says in (
        (("dora", "--to", "vllm"), "peftkit combine dora --method svd --rank R"),
        (("lamps", "doors", "--to", "peft"), "2 adapters for peft"),
        (("lamps", "doors"), "--to vllm takes several"),
        (("lamps", "--dtype", "float16"), "--dtype means nothing with --to peftkit"),
        (("lamps", "--to", "peft", "--merged", "--license", "mit"), "--license, --merged means nothing with --to peft"),
        (("lamps", "--to", "vllm", "--force"), "force without a merge or a rank"),
        (("lamps", "--to", "gguf", "--force"), "leave --force out"),
        (("lamps", "--to", "gguf", "--onto", "original"), "add --merged"),
        (("lamps", "--to", "gguf", "--merged", "--rank", "1"), "leave --rank out"),
        (("lamps", "--to", "peft", "--dtype", "int3"), "float32 or bfloat16 or float16"),
        (("nothing", "--to", "vllm"), "peftkit"),
        (("lamps", "lamps", "--to", "vllm"), "is named twice"),
    ):
        code, out, err = cli("export", *arguments, "--out", "out")
        assert (code, out) == (1, ""), arguments
        assert says in err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
    assert cli("export", "lamps", "--to", "floppy", "--out", "out")[0] == 2
    assert cli("export", "--to", "vllm", "--out", "out")[0] == 2


def test_a_rank_can_be_cut(cli: Cli, imported: dict[str, str]) -> None:
    value = reply(cli("export", "doors", "--to", "vllm", "--rank", "8", "--force", "--out", "out", "--json"))
    assert value["versions"]["doors"]["rank"] == 8
    assert 0 < value["versions"]["doors"]["cut"]["error"] < 1
    assert value["command"][value["command"].index("--max-lora-rank") + 1] == "8"


def test_the_help_lists_every_dtype(cli: Cli) -> None:
    code, out, _ = cli("export", "--help")
    assert code == 0
    assert all(name in out for name in ("float32", "bfloat16", "float16", "q8_0", "--force"))


def test_a_merged_model_says_what_its_file_keeps(cli: Cli, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny_families import write_family

    model = write_family(tmp_path / "base", "llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, options).save_pretrained(tmp_path / "lamps", save_embedding_layers=False)
    reply(cli("import", str(tmp_path / "lamps"), "--base", str(tmp_path / "base"), "--json"))
    code, out, err = cli("export", "lamps", "--to", "gguf", "--merged", "--dtype", "q8_0", "--out", "out")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if "merged onto original" in line)
    assert "kept of ΔW in the file: LoRA in q8_0: " in line
