"""What a kind of rows does at each of a run's verbs: conversations, tasks, preferences."""

from peftkit.recipe.work.kinds import Place, Work, work_for

__all__ = ["Place", "Work", "work_for"]
