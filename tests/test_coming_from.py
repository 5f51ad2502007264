"""The map from other tools' settings: every setting, recipe and command on our side of it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peftkit.cli.main import app
from peftkit.config import resolve
from peftkit.config.spec import leaves
from peftkit.errors import ConfigError
from peftkit.recipe.files import Recipe, load, shipped

PAGE = Path(__file__).resolve().parents[1] / "docs/guide/coming-from.md"
RECIPES = {name: load(path) for name, path in shipped().items()}
GROUPS = ("base", "quant")  # a group alone is set by its shorthand: base=Qwen/Qwen3-4B


def rows(text: str) -> list[tuple[str, str, str]]:
    """The lines of the tables, without their heads."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| .* \|.*\|", line)]
    assert all(len(each) == 3 for each in cells)
    found = [(theirs.strip(), ours.strip(), differs.strip()) for theirs, ours, differs in cells]
    return [row for row in found if row[1] != "peftkit"]


def named(ours: str) -> list[str]:
    return re.findall(r"`([^`]+)`", ours)


def problem(entry: str, recipes: dict[str, Recipe] = RECIPES) -> str | None:
    """Why an entry of our side is not one of ours."""
    if entry in recipes:
        return None
    if entry.startswith("peftkit "):
        return _command_problem(shlex.split(entry)[1:])
    key, equals, _ = entry.partition("=")
    having = [recipe for recipe in recipes.values() if key in dict(leaves(recipe.config())) or key in GROUPS]
    if not having:
        return f"no recipe has {key}"
    if equals:
        reasons = [_refused(recipe, entry) for recipe in having]
        return None if None in reasons else reasons[0]
    return None


def _refused(recipe: Recipe, entry: str) -> str | None:
    try:
        resolve(recipe.config, overrides=[entry])
    except ConfigError as error:
        return str(error)
    return None


def _command_problem(words: list[str]) -> str | None:
    commands: Any = get_command(app)
    command = commands.commands.get(words[0])
    if hasattr(command, "commands") and words[1:]:
        command = command.commands.get(words[1])
    if command is None:
        return f"no command {' '.join(words)}"
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = {word for word in words if word.startswith("--")} - known
    return f"no option {unknown}" if unknown else None


TABLES = dict(re.findall(r"^## (Axolotl|LLaMA-Factory|Unsloth)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))


@pytest.mark.parametrize("tool", ["Axolotl", "LLaMA-Factory", "Unsloth"])
def test_our_side_exists(tool: str) -> None:
    table = rows(TABLES[tool])
    assert len(table) > 25
    wrong = [f"{entry}: {why}" for _, ours, _ in table for entry in named(ours) if (why := problem(entry))]
    assert wrong == []


@pytest.mark.parametrize("tool", ["Axolotl", "LLaMA-Factory", "Unsloth"])
def test_a_setting_without_a_counterpart_says_what_there_is_instead(tool: str) -> None:
    assert [theirs for theirs, ours, differs in rows(TABLES[tool]) if not named(ours) and not differs] == []
    assert [theirs for theirs, *_ in rows(TABLES[tool]) if not named(theirs) and not theirs] == []


@pytest.mark.parametrize(
    "entry", ["adapter.rank", "data.loss=none", "peftkit fuse", "peftkit merge --onto-base", "sft"]
)
def test_what_is_not_ours_is_found(entry: str) -> None:
    assert problem(entry)


def test_defaults_that_the_page_states() -> None:
    config: Any = RECIPES["qlora_sft"].config()
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.lora_dropout) == (16, 32, 0)
    assert (config.data.held_out_share, config.data.too_long, config.data.loss) == (0.1, "raise", "assistant")
    assert (config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps) == (8, 1)
    assert (config.train.weight_decay, config.train.report_to) == (0, [])
