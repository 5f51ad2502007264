"""The settings of a distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from peftkit.config import Spec
from peftkit.events import Warned

TEACHER_UNPLANNED = Warned(
    "the plan does not count the teacher: neither its weights, nor its pass over every row",
    "distil.teacher_bits=4 holds another base in few bits",
)


class DistilSpec(Spec):
    """From whom to learn, and how much; Hinton, Vinyals and Dean 2015, arXiv 1503.02531."""

    shorthand: ClassVar[str] = "teacher"

    teacher: str | None = None
    """An adapter of the registry (name, name@version or name@alias), or a base with the same vocabulary.

    An adapter of the base that is trained runs over its tensors: no second base is in memory.
    """
    teacher_bits: Literal[4, 8, 16, 32] = 4
    """Bits that a teacher with a base of its own is held in."""
    temperature: float = Field(default=2.0, gt=0, le=100)
    """T: both distributions are softmax(logits / T); above 1, what the teacher finds unlikely counts more."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """w: (1 - w) · cross-entropy of the answer + w · T² · KL(teacher ‖ student); 0 is training without a teacher."""
