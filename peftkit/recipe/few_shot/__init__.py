"""Few-shot runs: how good a recipe is with n training rows, over several draws of them, on the same held-out rows."""

from peftkit.recipe.few_shot.curve import Curve
from peftkit.recipe.few_shot.draws import FewShot, few_shot, few_shot_folder, read_few_shot

__all__ = ["Curve", "FewShot", "few_shot", "few_shot_folder", "read_few_shot"]
