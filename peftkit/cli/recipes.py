"""`peftkit recipes`: list, show, copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from peftkit import recipe as recipes
from peftkit import render
from peftkit.cli.console import show
from peftkit.cli.options import AsJson
from peftkit.config import json_schema

app = typer.Typer(help="The runnable files that peftkit ships.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes.

    Example: peftkit recipes list
    """
    rows = [(name, recipes.load(path).summary) for name, path in recipes.shipped().items()]
    value = [{"name": name, "summary": summary} for name, summary in rows]
    show(value, as_json=as_json, text=render.table(("recipe", ""), rows, max_width=120))


@app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe, or a path.")],
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's settings with their defaults and meanings.

    Example: peftkit recipes show qlora_sft
    """
    recipe = recipes.load(recipes.find(name))
    if schema or as_json:
        show(json_schema(recipe.config), as_json=True, text="")
        return
    rows = list(_fields(recipe.config, ""))
    text = f"{recipe.name}: {recipe.summary}\n{recipe.path}\n\n" + render.table(("setting", "default", ""), rows, 130)
    show(None, as_json=False, text=text + f"\n\npresets: {', '.join(recipe.presets)}")


@app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")] = Path("."),
) -> None:
    """Copy a recipe to edit it; nothing is overwritten.

    Example: peftkit recipes copy qlora_sft my_recipe.py
    """
    path = recipes.copy(name, target)
    show(None, as_json=False, text=f"copied to {path}; run it with: peftkit train {path} data.train=rows.jsonl")


def _fields(model: type[BaseModel], prefix: str, given: BaseModel | None = None) -> list[tuple[str, Any, str]]:
    """Dotted key, default and description of every setting; `given` holds the defaults of a group in its recipe."""
    rows: list[tuple[str, Any, str]] = []
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True) if given is None else getattr(given, name)
        if isinstance(default, BaseModel):
            rows += _fields(type(default), f"{prefix}{name}.", default)
        else:
            rows.append((prefix + name, default, info.description or ""))
    return rows
