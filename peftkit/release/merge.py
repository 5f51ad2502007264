"""Merge registered adapters into the weights of their base: onto which is chosen knowingly, and the result measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.deltas.combining.combine import combine
from peftkit.deltas.combining.methods import How
from peftkit.deltas.combining.together import merged_deltas
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merge import MergePlan, MergeReceipt, MergeSettings, merge, plan_merge
from peftkit.errors import DeltaError
from peftkit.events import Decision, Report, silent
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry
from peftkit.release.candidate import trial
from peftkit.release.combine import Judging
from peftkit.release.drift import Drift
from peftkit.release.measure import measure_merge
from peftkit.release.measured import NotMeasured
from peftkit.release.parents import Parents, open_parents
from peftkit.release.recommend import Onto, Recommendation, needs_choice, recommend_onto
from peftkit.release.rows import HeldOut, held_out_rows


@dataclass(frozen=True)
class Order:
    """What to merge: adapters with weights, how they are combined, onto which weights, and how it is written."""

    weighted: Sequence[tuple[str, float]]
    how: How = field(default_factory=How)
    onto: Onto | None = None
    """None where there is only one kind of weights, or to have it measured and recommended."""
    written: Mapping[str, Any] | None = None
    """Fields of MergeSettings: dtype, shard_size, quantize, rounding, seed, force."""
    base: str | None = None
    gate: bool = False
    """Publish only what was measured, and is not worse than base + adapter beyond the interval."""

    @property
    def force(self) -> bool:
        """Whether a result that lost the adapter is published too."""
        return bool((self.written or {}).get("force"))


def plan_adapters(
    registry: Registry, order: Order, out: Path, *, cache: Path, report: Report = silent
) -> tuple[MergePlan, MergeSettings]:
    """What a merge would change, write and need; nothing is written or measured. Raises what `merge_adapters` does.

    Where `onto` is open, the figures are those of `original`.
    """
    parents = open_parents(registry, [name for name, _ in order.weighted], cache, base=order.base, report=report)
    settings = MergeSettings(onto=order.onto or "original", **(order.written or {}))
    trained_on = parents.quantization
    return plan_merge(parents.located, _deltas(parents, order), out, settings, trained_on=trained_on), settings


def merge_adapters(
    registry: Registry,
    order: Order,
    out: Path,
    *,
    cache: Path,
    runs: Path,
    judging: Judging | None = None,
    report: Report = silent,
) -> MergeReceipt:
    """Merge adapters into the folder `out`, with a receipt of what the weights kept and how the answers moved.

    Before it is published the merged model is compared with base + adapter on held-out rows, where there are rows and
    memory. Raises DeltaError when it has to be told onto which weights, when less than 90 % of the delta is kept or
    the NLL is worse beyond its interval (unless forced), and with `gate` when nothing could be measured.
    """
    judging = judging or Judging()
    parents = open_parents(registry, [name for name, _ in order.weighted], cache, base=order.base, report=report)
    rows = _rows(parents, order, runs, judging)
    onto, recommended = _onto(parents, order, rows, cache, judging, report)
    settings = MergeSettings(onto=onto, **(order.written or {}))
    bench = _Bench(parents, order, rows, cache, judging, report)

    def examine(folder: Path) -> dict[str, Any]:
        found = bench.measured(folder)
        bench.judge(found, out)
        said = {"recommended": recommended.record()} if recommended else {}
        return {**found.record(), **said}

    deltas = _deltas(parents, order)
    trained_on = parents.quantization
    return merge(
        parents.located, deltas, out, settings, trained_on=trained_on, cache=cache, examine=examine, report=report
    )


@dataclass(frozen=True)
class _Bench:
    """What measuring one merge needs."""

    parents: Parents
    order: Order
    rows: HeldOut | NotMeasured
    cache: Path
    judging: Judging
    report: Report

    def measured(self, folder: Path) -> Drift | NotMeasured:
        """The merged model in `folder` against base + adapter."""
        if _alone(self.order):
            return self._against(self.parents.versions[0], folder)
        if not self.order.how.entry.additive or not all(_factors(deltas) for deltas in self.parents.deltas):
            what = f"a combination by {self.order.how.method} of these adapters"
            return NotMeasured(f"{what} exists only as merged weights: there is no adapter to compare them with")
        weights = [weight for _, weight in self.order.weighted]
        together = combine(self.parents.deltas, weights, How(), self.parents.base)
        with trial(self.parents, self.cache) as bench:
            return self._against(bench.version(together), folder)

    def _against(self, version: Version, folder: Path) -> Drift | NotMeasured:
        return measure_merge(
            version,
            folder,
            self.rows,
            self.cache,
            base=self.order.base,
            batch_size=self.judging.batch_size,
            seed=self.judging.seed,
            report=self.report,
        )

    def judge(self, found: Drift | NotMeasured, out: Path) -> None:
        """Raise DeltaError for a result that must not be published."""
        kept = f"what was merged is kept beside {out}: --force publishes it without merging again"
        if isinstance(found, Drift) and found.worse and not self.order.force:
            change = found.change
            raise DeltaError(
                f"the merged model is worse than base + adapter by {change.point:.4f} nats per answer token "
                f"({change.low:.4f} to {change.high:.4f}) on {found.answer_tokens:,} answer tokens",
                expected="a change whose interval holds 0; nothing was published",
                hint=f"choose another --onto, --dtype or --rounding; {kept}",
            )
        if isinstance(found, NotMeasured) and self.order.gate:
            raise DeltaError(
                f"the merge was {found.reason}, so it does not pass --gate",
                expected="at least 1,000 answer tokens of held-out rows; nothing was published",
                hint=(found.hint or "name them: --rows held_out.jsonl") + "; or merge without --gate",
            )


def _onto(
    parents: Parents,
    order: Order,
    rows: HeldOut | NotMeasured,
    cache: Path,
    judging: Judging,
    report: Report,
) -> tuple[Onto, Recommendation | None]:
    """The weights to merge onto. Raises DeltaError, with what was measured, when the user has to choose."""
    if order.onto is not None:
        return order.onto, None
    quantized = [version for version in parents.versions if needs_choice(version)]
    if not quantized:
        report(Decision("merge onto", "original", "the adapter was trained on weights that are not quantized"))
        return "original", None
    held = str((parents.quantization or {}).get("label", "quantized"))
    fact = f"{quantized[0].reference} was trained on {held} weights, and --onto does not say which weights are meant"
    expected = "original (the base's files), or dequantized (what training computed with)"
    if not _alone(order):
        raise DeltaError(fact, expected=expected, hint="peftkit merge NAME alone measures both for one adapter")
    found = recommend_onto(
        quantized[0],
        rows,
        cache,
        base=order.base,
        batch_size=judging.batch_size,
        seed=judging.seed,
        report=report,
    )
    if found.onto is None:
        raise DeltaError(
            f"{fact}; {found.reason}",
            expected=expected,
            hint="name held-out rows to have both measured (--rows held_out.jsonl), or choose one",
        )
    raise DeltaError(fact, expected=expected, hint=f"--onto {found.onto} is recommended: {found.reason}")


def _rows(parents: Parents, order: Order, runs: Path, judging: Judging) -> HeldOut | NotMeasured:
    """Held-out rows of the first adapter that has any; those that are named win."""
    found: HeldOut | NotMeasured = NotMeasured("no held-out rows are named", "name them: --rows held_out.jsonl")
    for version in reversed(parents.versions):
        rows = held_out_rows(version, runs, judging.rows)
        found = rows if isinstance(rows, HeldOut) or isinstance(found, NotMeasured) else found
    return found


def _deltas(parents: Parents, order: Order) -> Deltas:
    if _alone(order):
        return parents.deltas[0]
    return merged_deltas(parents.deltas, [weight for _, weight in order.weighted], order.how, parents.base)


def _alone(order: Order) -> bool:
    """Whether one adapter is merged as it is."""
    return len(order.weighted) == 1 and order.weighted[0][1] == 1 and order.how == How()


def _factors(deltas: Deltas) -> bool:
    return all(delta.additive for delta in deltas.changes.values())
