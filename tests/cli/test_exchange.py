"""`import`, `export`, `push`, `pull` on a LoRA that PEFT itself saved: consent, messages, and a folder PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry.exchange.fake_hub import TOKEN, FakeHub, serve

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the tiny base, with random B, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    folder = tmp_path_factory.mktemp("saved") / "Lamps"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        # What HF_ENDPOINT sets when huggingface_hub is first imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def reply(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def imported(cli: Cli, saved: Path, tiny_base: Path) -> str:
    return str(reply(cli("import", str(saved), "--base", str(tiny_base), "--json"))["version"])


def test_an_import_names_the_base_and_what_was_changed(cli: Cli, saved: Path, tiny_base: Path) -> None:
    code, _, err = cli("import", str(saved))
    assert code == 1
    assert "is not on this machine" in err
    assert "--base" in err
    code, out, err = cli("import", str(saved), "--base", str(tiny_base), "--as", "mine", "--tag", "prod")
    assert code == 0, err
    assert "mine@" in out
    assert f"for the base {tiny_base.name}" in out
    assert "left out: README.md" in out.replace("'", "")
    shown = reply(cli("show", "mine@prod", "--json"))
    assert (shown["name"], shown["adapter"]["method"], shown["base"]["source"]) == ("mine", "lora", tiny_base.name)
    assert "was " in cli("import", str(saved), "--base", str(tiny_base), "--as", "mine")[1]


def test_an_exported_folder_loads_with_plain_peft_and_imports_again(
    cli: Cli, imported: str, saved: Path, tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    value = reply(cli("export", "lamps", "--out", "out", "--license", "mit", "--json"))
    assert {file["path"] for file in value["files"]} == {path.name for path in (tmp_path / "out").iterdir()}
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    logits = []
    for folder in (saved, tmp_path / "out"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert torch.equal(*logits)
    again = reply(cli("import", "out", "--registry", "elsewhere", "--json"))
    assert again == {"version": imported, "latest_before": None, "receipt": again["receipt"], "not_attachable": None}
    assert cli("push", "lamps", "elsewhere")[0] == 0
    assert cli("export", "lamps", "--out", "out")[0] == 1


@pytest.mark.loopback
def test_a_push_lists_what_leaves_and_asks(cli: Cli, imported: str, hub: FakeHub) -> None:
    code, out, err = cli("push", "lamps", "hub:me/lamps", "--dry-run")
    assert code == 0, err
    for said in (
        "adapter_model.safetensors",
        "manifest.json",
        "README.md",
        "no rows of data",
        "base.source",
        "(private)",
    ):
        assert said in out, said
    code, out, err = cli("push", "lamps", "hub:me/lamps")
    assert code == 1
    assert "--yes" in err
    assert hub.requests == []
    sent = reply(cli("push", "lamps", "hub:me/lamps", "--yes", "--json"))
    assert sent["commit"] == hub.repos["me/lamps"].head
    assert hub.repos["me/lamps"].private
    code, out, err = cli("push", "lamps", "hub:me/lamps", "--yes")
    assert "nothing to do" in out
    came = reply(cli("pull", "hub:me/lamps", "--registry", "other", "--json"))
    assert came["version"] == imported
    assert TOKEN not in out + err + json.dumps([sent, came])


@pytest.mark.loopback
def test_a_wrong_answer_on_the_terminal_sends_nothing(
    cli: Cli, imported: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkit.cli.exchange._can_ask", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, abort: _no(text, abort))
    code, out, _ = cli("push", "lamps", "hub:me/lamps")
    assert code == 130
    assert "does not exist yet and will be made" in out
    assert hub.repos == {}


def _no(text: str, abort: bool) -> None:
    import typer

    assert "hub:me/lamps" in text
    assert abort
    raise typer.Abort


@pytest.mark.loopback
def test_failures_are_short_and_keep_the_token(cli: Cli, imported: str, hub: FakeHub) -> None:
    for arguments, says in (
        (("pull", "hub:me/nothing"), "shows no repository me/nothing"),
        (("pull", "hub:nothing"), "names no repository"),
        (("pull", "somewhere"), "source.not-folder"),
        (("pull", "somewhere", "--revision", "x"), "--revision only with hub:"),
    ):
        code, out, err = cli(*arguments)
        assert code == 1, arguments
        assert says in err
        assert TOKEN not in out + err
    hub.refuse["/api/repos/create"] = 403
    code, _, err = cli("push", "lamps", "hub:me/lamps", "--yes")
    assert code == 1
    assert "hf auth login" in err
    assert TOKEN not in err
