"""The guides are true: their commands exist, their Python runs with a tiny base in place of the Hub id."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peftkit.cli.main import app

GUIDES = Path(__file__).resolve().parents[1] / "docs/guide"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(GUIDES.glob("*.md"))}


def console_lines() -> list[str]:
    blocks = [block for text in TEXTS.values() for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)]
    return [line[2:].partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line[:2] == "$ "]


def test_every_command_exists_with_its_options() -> None:
    commands: Any = get_command(app)
    lines = console_lines()
    assert len(lines) > 10
    for line in lines:
        _, name, *rest = shlex.split(line)
        command = commands.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_the_python_of_the_registry_guide(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftkit import AdapterSpec, BaseSpec, QuantSpec, Registry, inject, load_backbone
    from peftkit.recipe.fields import base_fields
    from peftkit.registry import Draft
    from peftkit.tuning.inject import save_adapter

    monkeypatch.chdir(tmp_path)
    backbone = load_backbone(BaseSpec(source=str(tiny_base)), QuantSpec(bits=4), tmp_path / "cache")
    payload = save_adapter(inject(backbone, AdapterSpec(r=2)), tmp_path / "payload")
    store = Registry(tmp_path / "adapters")
    for number in range(2):
        fields = {"kind": "peft", "base": base_fields(backbone), "metrics": {"other": {"n": number}}}
        store.publish(
            "tickets", payload, Draft.model_validate(fields), ["prod"][number:], base=backbone.identity.record
        )
    shutil.rmtree(payload)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["registry.md"], re.DOTALL)
    exec(compile(code.replace("Qwen/Qwen3-4B", str(tiny_base)), "registry.md", "exec"), {})
    first, second = store.resolve("tickets").reference, store.resolve("tickets@prod").reference
    assert capsys.readouterr().out.splitlines() == [f"{first} {sorted([first, second])}", "LlamaForCausalLM"]
