"""Every error peftkit raises on purpose.

PeftkitError
├── ConfigError            a setting is unknown, misspelt or out of range
├── DataError              a row or a data file cannot be used
├── BaseError              a base cannot be found, read or identified
│   └── BaseMismatch       an adapter meets a base it was not trained on
├── BackboneError          a base cannot be loaded as asked (quantization, device, trust)
├── TuningError            layers cannot be injected, attached or swapped
├── DeltaError             adapters cannot be combined, merged or exported as asked
├── TrainingError          a run cannot go on (non-finite loss, nothing to train)
│   └── OutOfMemory        the device has no memory left for a step or an evaluation
├── RegistryError          the adapter store
│   ├── AdapterNotFound    no such name, version or alias
│   └── AdapterDamaged     bytes on disk differ from what the manifest promises
└── RunError               a run folder cannot be created or read

A message has three parts: the fact with its values, what was expected, and the command or edit that mends it.
"""

from __future__ import annotations

from collections.abc import Sequence


class PeftkitError(Exception):
    """An error that a user can act on; the CLI shows it without a traceback and exits with 1."""

    def __init__(self, fact: str, *, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(fact)
        self.fact = fact
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.fact]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.hint:
            lines.append(f"  to mend it: {self.hint}")
        return "\n".join(lines)


class ConfigError(PeftkitError):
    """One or more settings are wrong; all of them are listed at once."""

    def __init__(self, problems: Sequence[str], *, where: str = "the configuration", hint: str | None = None) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        fact = f"{count} in {where}" + "".join(f"\n- {problem}" for problem in self.problems)
        super().__init__(fact, hint=hint)


class DataError(PeftkitError):
    """A row or a data file cannot be used as it is."""


class BaseError(PeftkitError):
    """A base cannot be found, read or identified."""


class BaseMismatch(BaseError):
    """An adapter meets a base, tokenizer or chat template that it was not trained on."""


class BackboneError(PeftkitError):
    """A base cannot be loaded the way it was asked for."""


class TuningError(PeftkitError):
    """Trainable layers cannot be injected, attached or swapped."""


class DeltaError(PeftkitError):
    """Adapters cannot be combined, merged or exported as asked."""


class TrainingError(PeftkitError):
    """A training run cannot start or cannot go on."""


class OutOfMemory(TrainingError):
    """The device has no memory left for a step or an evaluation."""


class GenerationError(PeftkitError):
    """An answer cannot be generated."""


class EngineBusy(GenerationError):
    """No more requests are taken now."""


class EngineGone(GenerationError):
    """What generates the answers has ended, or cannot be reached."""


class RegistryError(PeftkitError):
    """The adapter store cannot do what was asked."""


class AdapterNotFound(RegistryError):
    """No adapter has this name, version or alias."""


class AdapterDamaged(RegistryError):
    """Bytes on disk differ from what the manifest promises."""


class RunError(PeftkitError):
    """A run folder cannot be created or read."""
