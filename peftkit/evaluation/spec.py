"""What is measured: settings only, so that reading them loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.config import Spec


class EvaluateSpec(Spec):
    """What is measured before and after."""

    metric: Literal["auto", "exact_match", "json_fields", "sql_execution"] = "auto"
    """How a generated answer is scored; auto looks at the reference answers and says why."""
    max_generated_rows: int = Field(default=48, ge=0)
    """Generate answers for the first so many held-out rows; 0 measures likelihood only."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest answer."""
    batch_size: int = Field(default=16, gt=0)
    """Rows measured at once; three times as many are answered at once, since an answer holds keys and values only."""
    instructions: str | None = None
    """Text, or a file with text, that the base gets in addition: without training it cannot know the task."""
    shots: int = Field(default=0, ge=0)
    """A second baseline: the base sees so many solved training rows before each question."""
    retention: str | None = "general"
    """Text file on which forgetting is measured; `general` ships with peftkit, null skips it."""
    retention_passages: int | None = Field(default=None, gt=0)
    """Measure forgetting on the first so many passages only."""
    behaviour: str | None = "auto"
    """Prompts with checks that base and adapter answer: a file of one's own, or `general`, which ships with peftkit;
    auto is `general` where a GPU answers them in seconds; null asks nothing."""
    group_by: str | None = None
    """Column by which scores are listed too, such as a template id or a language."""
