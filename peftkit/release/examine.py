"""The merged model examined before it is published: against base + adapter, on the rows of every adapter in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.deltas.combining.combine import combine
from peftkit.deltas.combining.methods import How
from peftkit.errors import BackboneError, DataError, DeltaError
from peftkit.events import Report
from peftkit.registry.manifest import Version
from peftkit.release.candidate import candidates
from peftkit.release.drift import Drift
from peftkit.release.measure import measure_merge
from peftkit.release.measured import NotMeasured
from peftkit.release.outputs import Moved, moved
from peftkit.release.parents import Parents
from peftkit.release.rows import HeldOut
from peftkit.tuning.attach import head_of


@contextmanager
def counterpart(parents: Parents, weights: Sequence[float], how: How, cache: Path) -> Iterator[Version | NotMeasured]:
    """The adapter that, attached, computes what the merged model should; for the length of a block.

    One adapter is its own; a sum of adapters with factors is one more LoRA. Other combinations exist as merged weights
    only.
    """
    if len(weights) == 1 and weights[0] == 1 and how == How():
        yield parents.versions[0]
        return
    only = f"a combination by {how.method} of these adapters exists only as merged weights"
    if not how.entry.additive:
        yield NotMeasured(only, _COMBINE)
        return
    with candidates(parents, cache) as bench:
        try:
            made: Version | NotMeasured = bench.version(combine(parents.deltas, weights, How(), parents.base))
        except DeltaError as error:
            made = NotMeasured(f"{only}: {error.fact}", _COMBINE)
        yield made


_COMBINE = "peftkit combine … --rank R --gate 0.9 makes an adapter that can be measured; merge that one"


@dataclass(frozen=True)
class Examiner:
    """What examining a merged model needs."""

    reference: Version | NotMeasured
    rows: Mapping[str, HeldOut | NotMeasured]
    """By version that went in."""
    cache: Path
    base: str | None
    batch_size: int
    seed: int
    report: Report

    def check_measurable(self) -> None:
        """Raise DeltaError, before anything is merged, when it is known that a gate cannot be passed."""
        known = {} if isinstance(self.reference, Version) else dict.fromkeys(self.rows, self.reference)
        missing = known or {name: rows for name, rows in self.rows.items() if isinstance(rows, NotMeasured)}
        if missing:
            raise _not_passed(missing)

    def judged(self, folder: Path, out: Path, *, gate: bool, force: bool) -> dict[str, dict[str, Any]]:
        """Version → what was measured on its rows. Raises DeltaError for a model that must not be published."""
        found = {name: self._measured(folder, rows) for name, rows in self.rows.items()}
        worse = {name: drift for name, drift in found.items() if isinstance(drift, Drift) and drift.worse}
        if worse and not force:
            raise DeltaError(
                "the merged model is worse than base + adapter: " + "; ".join(map(_said, worse, worse.values())),
                expected="a change whose interval holds 0; nothing was published",
                hint="choose another --onto, --dtype or --rounding; what was merged is kept, and the same command "
                f"with --force publishes it ({out} is not there yet)",
            )
        missing = {name: drift for name, drift in found.items() if isinstance(drift, NotMeasured)}
        if missing and gate:
            raise _not_passed(missing)
        return {name: drift.record() for name, drift in found.items()}

    def _measured(self, folder: Path, rows: HeldOut | NotMeasured) -> Drift | Moved | NotMeasured:
        if isinstance(self.reference, NotMeasured):
            return self.reference
        try:
            if head_of(self.reference) is not None:
                options: dict[str, Any] = {"base": self.base, "seed": self.seed, "report": self.report}
                return moved(self.reference, folder, self.cache, **options)
            return measure_merge(
                self.reference,
                folder,
                rows,
                self.cache,
                base=self.base,
                batch_size=self.batch_size,
                seed=self.seed,
                report=self.report,
            )
        except (DataError, BackboneError) as error:  # rows of another kind, a model that transformers cannot load
            return NotMeasured(error.fact, error.hint)


def _not_passed(missing: Mapping[str, NotMeasured]) -> DeltaError:
    hints = dict.fromkeys(rows.hint for rows in missing.values() if rows.hint)
    return DeltaError(
        "the merge does not pass --gate: " + "; ".join(f"{name}: {rows.reason}" for name, rows in missing.items()),
        expected="every adapter measured on at least 1,000 answer tokens of its held-out rows; nothing was published",
        hint="; ".join([*hints, "or merge without --gate"]),
    )


def _said(name: str, found: Drift) -> str:
    change = found.change
    return (
        f"{name}, by {change.point:.4f} nats per answer token ({change.low:.4f} to {change.high:.4f}) "
        f"on {found.answer_tokens:,} of them"
    )
