"""Combine registered adapters into one: weights searched if asked, judged by the gate if asked, then published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftkit.deltas.combining.combine import Combined, combine
from peftkit.deltas.combining.lineup import check_heads
from peftkit.deltas.combining.methods import How
from peftkit.deltas.delta import LowRank
from peftkit.deltas.reading.kinds import Replaced
from peftkit.deltas.spectrum import norm
from peftkit.errors import DeltaError
from peftkit.events import Note, Report, Warned, silent
from peftkit.registry import receipts
from peftkit.registry.layout import check_alias, check_name
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.release.candidate import candidates, draft_of, scores, write_payload
from peftkit.release.gate import GateResult, Task, beside, check_keep, gate
from peftkit.release.judging import GateSettings, Judging, SearchSettings
from peftkit.release.measured import NotMeasured, interval_record, too_few
from peftkit.release.parents import Parents, open_parents
from peftkit.release.rows import HeldOut, rows_by_version
from peftkit.release.search import Search, search_weights
from peftkit.tuning.attach import Attached


@dataclass(frozen=True)
class Outcome:
    """What combining gave."""

    version: Version
    combined: Combined
    gate: GateResult | None
    search: Search | None


def combine_adapters(
    registry: Registry,
    weighted: Sequence[tuple[str, float]],
    how: How,
    *,
    save_as: str,
    cache: Path,
    runs: Path,
    rank: int | None = None,
    max_residual: float = 0.05,
    drop: bool = False,
    keep: GateSettings | None = None,
    search: SearchSettings | None = None,
    judging: Judging | None = None,
    base: str | None = None,
    aliases: Sequence[str] = (),
    report: Report = silent,
) -> Outcome:
    """Combine adapters (reference, weight) of one base and publish the result, a plain LoRA, as `save_as`.

    With `search`, the weights given are replaced by the best ones found on every other held-out row, and the gate
    judges on the rest. With `keep`, nothing is published unless every parent's task passes. The same adapters,
    settings and seed give the same payload, byte for byte. `drop` leaves out what no LoRA adapter can hold. Raises
    BaseMismatch for adapters of different bases, DeltaError for what cannot be combined, for missing rows that gate or
    search need, and for a failed gate.
    """
    judging = judging or Judging()
    _check_asked(save_as, aliases, keep, search, judging)
    parents = open_parents(registry, [reference for reference, _ in weighted], cache, base=base, report=report)
    check_heads(parents.deltas)
    if save_as in {version.name for version in parents.versions}:
        report(Warned(f"{save_as} is one of the adapters that are combined: its `latest` will be the combination"))
    limits = {"rank": rank, "max_residual": max_residual, "drop": drop}
    bench = _Bench([name for name, _ in weighted], parents, how, limits, cache, judging, report)
    weights = [weight for _, weight in weighted]
    rows = bench.rows(runs) if keep or search else {}
    chosen, judged = _divided(rows, search is not None)
    searched = bench.search(chosen, search) if search else None
    if searched is not None:
        weights = list(searched.best.weights)
    combined = bench.combined(weights)
    _check_left(combined, parents)
    _tell_packed(combined, parents, report)
    found = bench.gate(combined, judged, keep) if keep else None
    version = _publish(registry, save_as, parents, combined, found, searched, aliases)
    report(Note(f"{version.reference}: {how.method} of {len(weights)} adapters"))
    return Outcome(version, combined, found, searched)


def _check_asked(
    name: str, aliases: Sequence[str], keep: GateSettings | None, search: SearchSettings | None, judging: Judging
) -> None:
    """Refuse, before anything is computed, what would be refused at the end."""
    check_name(name)
    for alias in aliases:
        check_alias(alias)
    if keep is not None:
        check_keep(keep.keep)
    if judging.rows and keep is None and search is None:
        raise DeltaError(
            f"rows are given for {', '.join(judging.rows)}, and nothing is measured on them",
            expected="rows with a gate or a search",
            hint="add --gate 0.9 or --search 20, or leave --rows out",
        )


def _check_left(combined: Combined, parents: Parents) -> None:
    """Raise DeltaError when the adapters cancel one another, so that the result would do nothing."""
    weights = [weight for _, weight in combined.parents]
    sizes = [
        weight * norm(delta)
        for weight, parent in zip(weights, parents.deltas, strict=True)
        for delta in parent.changes.values()
        if isinstance(delta, LowRank)
    ]
    if combined.norm <= 1e-9 * math.hypot(*sizes):
        raise DeltaError(
            f"{', '.join(f'{reference}:{weight:g}' for reference, weight in combined.parents)} cancel: nothing is left",
            expected="adapters and weights whose ΔW differs from 0",
            hint="peftkit preview shows what cancels",
        )


def _tell_packed(combined: Combined, parents: Parents, report: Report) -> None:
    """Warn where layers that training held unquantized are packed again under the LoRA that stands for them."""
    whole = [tensor for tensor, kind in combined.converted.items() if kind == Replaced.kind]
    quantization = parents.quantization or {}
    if whole and quantization.get("bits") in (4, 8):
        fact = (
            f"{len(whole)} tensors were trained unquantized, and their ΔW counts from the base's original numbers: "
            f"over {quantization.get('label')} weights the LoRA lies beside packed ones"
        )
        report(Warned(fact, "use it with --bits 16, or let --gate measure it over the packed weights"))


class _Bench:
    """Parents, their base in memory when something is measured, and the settings of one combination."""

    def __init__(
        self,
        named: Sequence[str],
        parents: Parents,
        how: How,
        limits: Mapping[str, Any],
        cache: Path,
        judging: Judging,
        report: Report,
    ) -> None:
        self.named, self.parents, self.how = named, parents, how
        self.limits, self.cache, self.judging, self.report = limits, cache, judging, report
        self._host: Attached | None = None

    @property
    def host(self) -> Attached:
        """The base, loaded once."""
        if self._host is None:
            self._host = Attached(self.parents.backbone(self.cache, self.report))
        return self._host

    def combined(self, weights: Sequence[float], report: Report | None = None) -> Combined:
        """The combination with these weights."""
        p = self.parents
        return combine(p.deltas, weights, self.how, p.base, report=report or self.report, **self.limits)

    def rows(self, runs: Path) -> dict[str, HeldOut]:
        """Every parent's held-out rows. Raises DeltaError, naming all that are missing."""
        found = rows_by_version(self.judging.rows, self.named, self.parents.versions, runs)
        missing = {name: rows for name, rows in found.items() if isinstance(rows, NotMeasured)}
        if missing:
            said = "".join(f"\n- {name}: {rows.reason}" for name, rows in missing.items())
            hints = dict.fromkeys(rows.hint for rows in missing.values() if rows.hint)
            raise DeltaError(
                f"{len(missing)} of {len(found)} adapters have no held-out rows to be judged by:{said}",
                expected="rows for every adapter: what is not measured does not pass",
                hint="; ".join(hints),
            )
        return {name: rows for name, rows in found.items() if isinstance(rows, HeldOut)}

    def search(self, rows: Mapping[str, HeldOut], settings: SearchSettings) -> Search:
        """Weights on these rows. Raises DeltaError for too few of them."""
        folder = self.parents.located.folder
        parts = {reference: held.part(folder, self.report) for reference, held in rows.items()}
        for reference, part in parts.items():
            if short := too_few(part.answer_tokens, settings.min_tokens):
                raise DeltaError(f"weights cannot be searched for on the rows of {reference}: {short.why}")
        versions = {version.reference: version for version in self.parents.versions}
        own = []
        for reference, part in parts.items():
            with beside(self.host, versions[reference], False):
                own += scores(self.host, reference, {reference: part}, self.judging.batch_size)
        with candidates(self.parents, self.cache) as bench:

            def score(weights: Sequence[float]) -> list[float]:
                version = bench.version(self.combined(weights, silent))
                with beside(self.host, version, False):
                    found = scores(self.host, version.reference, parts, self.judging.batch_size)
                bench.drop(version)
                return found

            return search_weights(
                self.parents.references,
                score,
                own,
                trials=settings.trials,
                seed=self.judging.seed,
                objective=settings.objective,
                report=self.report,
            )

    def gate(self, combined: Combined, rows: Mapping[str, HeldOut], settings: GateSettings) -> GateResult:
        """Judge a combination. Raises DeltaError, with every task, when it does not pass."""
        with candidates(self.parents, self.cache) as bench:
            found = gate(
                self.host,
                self.parents.versions,
                bench.version(combined),
                rows,
                settings.keep,
                min_tokens=settings.min_tokens,
                batch_size=self.judging.batch_size,
                seed=self.judging.seed,
                report=self.report,
            )
        if not found.passed:
            raise DeltaError(
                f"{len(found.failed)} of {len(found.tasks)} tasks do not pass the gate, so nothing is registered:"
                + found.describe(),
                expected=f"every task measured, and the lower end of what it keeps at {settings.keep:.0%} or more",
                hint=_mended(found),
            )
        return found


def _mended(found: GateResult) -> str:
    """What helps: rows where something was not measured, else another combination."""
    missing = [task for task in found.tasks.values() if isinstance(task, NotMeasured)]
    hints = dict.fromkeys(task.hint for task in missing if task.hint)
    other = ["try other weights (--search), another method or a higher rank; or lower --gate"]
    return "; ".join([*hints, *(other if len(missing) < len(found.failed) else [])]) or other[0]


def _divided(rows: Mapping[str, HeldOut], searched: bool) -> tuple[Mapping[str, HeldOut], Mapping[str, HeldOut]]:
    """Rows to choose weights by, and rows to judge by: weights chosen on a row would pass on that row too easily."""
    if not searched:
        return {}, rows
    halves = {reference: held.halves() for reference, held in rows.items()}
    return {name: pair[0] for name, pair in halves.items()}, {name: pair[1] for name, pair in halves.items()}


def _publish(
    registry: Registry,
    name: str,
    parents: Parents,
    combined: Combined,
    found: GateResult | None,
    searched: Search | None,
    aliases: Sequence[str],
) -> Version:
    with TemporaryDirectory(prefix="peftkit-combined-") as scratch:
        payload = Path(scratch) / "adapter"
        fields = draft_of(parents, write_payload(combined, parents, payload))
        made: list[dict[str, Any]] = [
            receipts.combined(**combined.as_record(), search=searched.record() if searched else None)
        ]
        if found is not None:
            made.append(receipts.gated(**found.record()))
            fields["metrics"] = _metrics(found)
        return registry.publish(name, payload, Draft.model_validate({**fields, "receipts": made}), aliases)


def _metrics(found: GateResult) -> dict[str, Any]:
    """Figures by parent, on its own rows: before is the base, after the combination."""
    tasks = {name: task for name, task in found.tasks.items() if isinstance(task, Task)}
    return {
        "before": {name: {"answer_nll": interval_record(task.base)} for name, task in tasks.items()},
        "after": {name: {"answer_nll": interval_record(task.candidate)} for name, task in tasks.items()},
        "other": {
            name: {
                "parent_answer_nll": interval_record(task.parent),
                "change_from_parent": interval_record(task.lost),
                "share_kept": interval_record(task.kept),
            }
            for name, task in tasks.items()
        },
    }
