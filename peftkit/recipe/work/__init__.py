"""What a kind of rows does at each of a run's verbs: conversations, tasks, preferences."""

from peftkit.recipe.work.kinds import Work, check_planned, planned, work_for

__all__ = ["Work", "check_planned", "planned", "work_for"]
