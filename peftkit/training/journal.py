"""What a training run did so far: figures and decisions that a resumed run goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from peftkit.training.spec import TrainSpec
from peftkit.training.step import StepResult


@dataclass
class Journal:
    """The run so far, as plain values; a checkpoint keeps it."""

    tokens_at_once: int
    """Tokens that go through the model at once; fewer than planned after the device ran out of memory."""
    gradient_checkpointing: bool
    """Switched on when one row at a time is still too much."""
    checkpointed_blocks: int | None = None
    """How many of the blocks are recomputed then; None for all."""
    passes: list[str] = field(default_factory=list)
    """The shortcuts of its passes: other ones would round differently."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps, earlier processes of the run included."""
    first_loss: float | None = None
    last_loss: float | None = None
    best_step: int | None = None
    """The step after which the held-out rows were most likely."""
    best_nll: float | None = None
    worse: int = 0
    """Measurements in a row without a better one, from the last thaw on."""
    watchdog: dict[str, Any] = field(default_factory=dict)

    def add(self, result: StepResult, seconds: float) -> None:
        """One optimizer step more."""
        self.step += 1
        self.tokens += result.tokens
        self.answer_tokens += result.answer_tokens
        self.seconds += seconds
        self.first_loss = result.loss if self.first_loss is None else self.first_loss
        self.last_loss = result.loss

    def measured(self, nll: float, *, counts: bool = True) -> bool:
        """One measurement of the held-out rows more, in nats per answer token; whether it is the best so far.

        One that is not and `counts` is one more in a row without a better one.
        """
        if self.best_nll is not None and not nll < self.best_nll:
            self.worse += counts
            return False
        self.best_step, self.best_nll, self.worse = self.step, nll, 0
        return True

    def concedes(self, spec: TrainSpec) -> bool:
        """Whether more is recomputed than the settings say."""
        asked = spec.gradient_checkpointing, spec.checkpointed_blocks
        return (self.gradient_checkpointing, self.checkpointed_blocks) != asked

    def as_state(self) -> dict[str, Any]:
        """As plain JSON values; `Journal(**state)` is equal."""
        return asdict(self)
