"""What is measured of a classic task: settings only, so that reading them loads nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.config import Spec

MetricName = Literal[
    "auto", "accuracy", "macro_f1", "micro_f1", "subset_accuracy", "pearson", "spearman", "rmse", "r2",
    "span_f1", "token_accuracy", "f1", "exact_match", "chrf", "bleu", "rouge1", "rouge2", "rougeL",
]  # fmt: skip


class TaskEvaluateSpec(Spec):
    """What is measured before and after."""

    metric: MetricName = "auto"
    """What contestants are ranked by: macro_f1 (micro_f1 of several labels), rmse, span_f1, f1, chrf or rougeL."""
    baselines: bool = True
    """Measure what needs no network too: the most frequent label, TF-IDF, the first sentences, the copied source."""
    shots: int = Field(default=0, ge=0)
    """A further baseline on a causal base: it is asked in words, and sees so many solved training rows first."""
    max_prompted_rows: int = Field(default=48, gt=0)
    """Ask the prompted base about the first so many held-out rows; the others are compared on these rows too."""
    instructions: str | None = None
    """Text, or a file with text, that the prompted base gets instead of the task's own instruction."""
    batch_size: int = Field(default=16, gt=0)
    """Rows measured at once."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Several labels: those of at least this probability are given."""
    max_answer_tokens: int = Field(default=30, gt=0)
    """Extractive QA: longest answer, in tokens."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Longest translation, summary or answer of the prompted base, in tokens."""
    slices: tuple[str, ...] = ()
    """Columns by whose values the score is listed too, such as a language, a source or a gender."""
    resamples: int = Field(default=2000, ge=100)
    """Draws of each bootstrap interval."""
    seed: int = 0
    """Seed of those draws."""
