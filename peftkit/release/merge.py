"""Merge registered adapters into the weights of their base: onto which is chosen knowingly, and the result measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftkit.deltas.combining.lineup import check_heads
from peftkit.deltas.combining.methods import How
from peftkit.deltas.combining.together import merged_deltas
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merge import MergePlan, MergeReceipt, MergeSettings, Provenance, merge, plan_merge
from peftkit.errors import DeltaError
from peftkit.events import Decision, Report, silent
from peftkit.registry.exchange.export import check_target
from peftkit.registry.store import Registry
from peftkit.release.examine import Examiner, counterpart
from peftkit.release.judging import Judging
from peftkit.release.measured import NotMeasured
from peftkit.release.parents import Parents, open_parents
from peftkit.release.recommend import Onto, Recommendation, needs_choice, recommend_onto
from peftkit.release.repaired import check_onto, repairs
from peftkit.release.rows import HeldOut, rows_by_version
from peftkit.tuning.attach import head_of


@dataclass(frozen=True)
class Order:
    """What to merge: adapters with weights, how they are combined, onto which weights, and how it is written."""

    weighted: Sequence[tuple[str, float]]
    how: How = field(default_factory=How)
    onto: Onto | None = None
    """None where there is only one kind of weights, or to have it measured and recommended."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Fields of MergeSettings: dtype, shard_size, quantize, rounding, seed, force."""
    base: str | None = None
    gate: bool = False
    """Publish only what was measured, and is not worse than base + adapter beyond the interval."""

    @property
    def force(self) -> bool:
        """Whether a result that lost the adapter is published too."""
        return bool(self.written.get("force"))

    @property
    def names(self) -> list[str]:
        """The adapters as they were called."""
        return [name for name, _ in self.weighted]

    @property
    def weights(self) -> list[float]:
        """The weight of each."""
        return [weight for _, weight in self.weighted]

    @property
    def alone(self) -> bool:
        """Whether one adapter is merged as it is."""
        return self.weights == [1] and self.how == How()


def plan_adapters(
    registry: Registry, order: Order, out: Path, *, cache: Path, report: Report = silent
) -> tuple[MergePlan, MergeSettings]:
    """What a merge would change, write and need; nothing is written or measured. Raises what `merge_adapters` does.

    Where `onto` is open, the figures are those of `original`, or of `dequantized` where LoftQ began an adapter.
    """
    _check_asked(registry, order, out)
    parents = open_parents(registry, order.names, cache, base=order.base, report=report)
    if not order.alone:
        check_heads(parents.deltas)
    check_onto(registry, parents.versions, order.onto)
    open_onto: Onto = "dequantized" if repairs(registry, parents.versions) else "original"
    settings = MergeSettings(onto=order.onto or open_onto, **order.written)
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

    Before it is published the merged model is compared with base + adapter on every adapter's held-out rows, where
    there are rows and memory. Raises DeltaError when it has to be told onto which weights, when less than 90 % of the
    delta is kept or the NLL is worse beyond its interval (unless forced), and with `gate` when an adapter's rows could
    not be measured.
    """
    _check_asked(registry, order, out)
    judging = judging or Judging()
    parents = open_parents(registry, order.names, cache, base=order.base, report=report)
    if not order.alone:
        check_heads(parents.deltas)
    check_onto(registry, parents.versions, order.onto)
    rows = rows_by_version(judging.rows, order.names, parents.versions, runs)
    repaired = repairs(registry, parents.versions)
    if repaired is not None and order.onto is None:
        order = replace(order, onto="dequantized")
        report(Decision("merge onto", "dequantized", f"{repaired} repairs their error, which original weights lack"))
    onto, recommended = _onto(parents, order, rows, cache, judging, report)
    settings = MergeSettings(onto=onto, **order.written)
    named = list(zip(parents.references, order.weights, strict=True))
    with counterpart(parents, order.weights, order.how, cache) as reference:
        examiner = Examiner(reference, rows, cache, order.base, judging.batch_size, judging.seed, report)
        if order.gate:
            examiner.check_measurable()
        return merge(
            parents.located,
            _deltas(parents, order),
            out,
            settings,
            trained_on=parents.quantization,
            provenance=Provenance(named, order.how, recommended.record() if recommended else None),
            cache=cache,
            examine=lambda folder: examiner.judged(folder, out, gate=order.gate, force=order.force),
            report=report,
        )


def _check_asked(registry: Registry, order: Order, out: Path) -> None:
    """Refuse what contradicts itself, and a place where nothing can be published."""
    check_target(registry, out)
    if order.gate and order.force:
        raise DeltaError("--gate and --force contradict one another", expected="one of the two")
    if order.written.get("rounding") == "stochastic" and not order.written.get("quantize"):
        raise DeltaError(
            "--rounding stochastic is for few bits, and --quantize is not given",
            expected="--quantize nf4, fp4 or int8 with it",
            hint="leave --rounding out: 16 and 32 bits are rounded to the nearest",
        )


def _onto(
    parents: Parents,
    order: Order,
    rows: Mapping[str, HeldOut | NotMeasured],
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
    first = quantized[0]
    held = str((parents.quantization or {}).get("label", "quantized"))
    fact = f"{first.reference} was trained on {held} weights, and --onto does not say which weights are meant"
    expected = "original (the base's files), or dequantized (what training computed with)"
    found = recommend_onto(
        first,
        rows[first.reference] if order.alone else NotMeasured("measured for one adapter at a time"),
        cache,
        base=order.base,
        batch_size=judging.batch_size,
        seed=judging.seed,
        report=report,
    )
    if found.onto is not None and not found.forms:
        report(Decision("merge onto", found.onto, found.reason))
        return found.onto, found
    if found.onto is not None:
        raise DeltaError(fact, expected=expected, hint=f"--onto {found.onto} is recommended: {found.reason}")
    measure = "name held-out rows to have both measured (--rows held_out.jsonl)"
    if head_of(first) is not None:
        measure = "--onto dequantized keeps the outputs that were measured in training"
    elif not order.alone:
        measure = f"peftkit merge {first.name} --out FOLDER measures both for one adapter"
    raise DeltaError(f"{fact}; {found.reason}", expected=expected, hint=f"{measure}, or choose one")


def _deltas(parents: Parents, order: Order) -> Deltas:
    if order.alone:
        return parents.deltas[0]
    return merged_deltas(parents.deltas, order.weights, order.how, parents.base)
