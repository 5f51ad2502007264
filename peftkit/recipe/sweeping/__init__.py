"""Sweeps: many runs of a recipe with other settings, chosen by what the earlier ones gave."""

from peftkit.recipe.sweeping.plan import Plan, continued, load_plan, read_plan, started, sweeps_folder
from peftkit.recipe.sweeping.search import sweep
from peftkit.recipe.sweeping.table import Sweep

__all__ = ["Plan", "Sweep", "continued", "load_plan", "read_plan", "started", "sweep", "sweeps_folder"]
