"""Recipes: runnable files, the Run that they use, and running them."""

from peftkit.recipe.execute import Result, execute
from peftkit.recipe.files import Recipe, configure, copy, default_name, find, load, recipe_of, recipes_folder, shipped
from peftkit.recipe.resume import recipe_and_settings
from peftkit.recipe.run import Interrupted, Run
from peftkit.recipe.showing import report_comparison

__all__ = [
    "Interrupted",
    "Recipe",
    "Result",
    "Run",
    "configure",
    "copy",
    "default_name",
    "execute",
    "find",
    "load",
    "recipe_and_settings",
    "recipe_of",
    "recipes_folder",
    "report_comparison",
    "shipped",
]
