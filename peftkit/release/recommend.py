"""Onto which weights to merge an adapter that was trained on quantized ones: measured, never guessed.

Training saw the dequantized weights; the original ones are usually the better base, and sometimes the adapter does not
work on them at all (unsloth-zoo#810, Falcon-H1). A merge onto either is the sum of a 16-bit base and ΔW, so its NLL
before rounding is that of the 16-bit base with the adapter attached beside it: no candidate is written for this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.part import Part
from peftkit.evaluation.compare import Interval, mean_nll, paired_nll
from peftkit.events import Phase, Report, Table, silent
from peftkit.generation.forward import autocast, row_nll
from peftkit.registry.manifest import Version
from peftkit.release.drift import Side
from peftkit.release.forms import SIXTEEN, Trained, as_trained, over_dequantized, over_original, trained
from peftkit.release.measured import LEAST_TOKENS, NotMeasured, interval_record, too_few
from peftkit.release.room import lacking, needed
from peftkit.release.rows import HeldOut
from peftkit.training.memory import release

Onto = Literal["original", "dequantized"]
COLUMNS = ("form", "answer NLL", "change against training", "95 %")


@dataclass(frozen=True)
class Form:
    """One form of the adapted base on the held-out rows; nats per answer token."""

    name: str
    nll: Interval
    change: Interval
    """Against the form that the adapter was trained in."""


@dataclass(frozen=True)
class Recommendation:
    """Which weights to merge onto, or why nothing is recommended."""

    onto: Onto | None
    reason: str
    forms: tuple[Form, ...] = ()
    answer_tokens: int = 0
    sha256: str | None = None

    def rows(self) -> tuple[tuple[str, str, str, str], ...]:
        """The table that a user reads; its columns are COLUMNS."""
        return tuple(
            (f.name, f"{f.nll.point:.4f}", f"{f.change.point:+.4f}", f"{f.change.low:+.4f} to {f.change.high:+.4f}")
            for f in self.forms
        )

    def record(self) -> dict[str, Any]:
        """As receipts keep it."""
        forms = {f.name: {"nll": interval_record(f.nll), "change": interval_record(f.change)} for f in self.forms}
        measured = {"answer_tokens": self.answer_tokens, "rows_sha256": self.sha256, "forms": forms}
        return {"onto": self.onto, "reason": self.reason, **(measured if self.forms else {})}


def needs_choice(version: Version) -> bool:
    """Whether `original` and `dequantized` are different weights for this version."""
    return (version.manifest.base.quantization or {}).get("bits", 16) in (4, 8)


def recommend_onto(
    version: Version,
    rows: HeldOut | NotMeasured,
    cache: Path,
    *,
    base: str | None = None,
    other_base: bool = False,
    least_tokens: int = LEAST_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    report: Report = silent,
) -> Recommendation:
    """Measure training's form, original + ΔW and dequantized + ΔW on the same rows, and recommend one of the latter.

    Recommended is the one with the lower NLL; where the paired interval of the two holds 0, `original`, because it
    can be quantized again: on the dequantized weights' own grid ΔW rounds away. Nothing is recommended where nothing
    could be measured. Raises what `measure_merge` raises.
    """
    if not needs_choice(version):
        return Recommendation("original", f"{version.reference} was trained on weights that are not quantized")
    form = trained(version, cache, base=base, other_base=other_base, report=report)
    if form.uploaded_in_few_bits:
        return Recommendation("dequantized", f"the files of {form.located.source} hold no other weights")
    if isinstance(rows, NotMeasured):
        return Recommendation(None, rows.reason)
    part = rows.part(form.folder, report)
    missing = too_few(part.answer_tokens, least_tokens) or _no_room(form, part, batch_size)
    if missing is not None:
        return Recommendation(None, missing.reason)
    pad_id = load_tokenizer(form.folder).pad_id
    sides = (as_trained(form), over_original(form), over_dequantized(form))
    nll = [_scored(side, part, pad_id, batch_size, report) for side in sides]
    found = _judged([side.name for side in sides], nll, part, seed)
    report(Table("base to merge onto", COLUMNS, found.rows()))
    return found


def _no_room(form: Trained, part: Part, batch_size: int) -> NotMeasured | None:
    # The quantized layers are still there while the 16-bit ones take their numbers.
    quantized = needed(form.folder, form.quant, part, batch_size=batch_size)
    return lacking(form.folder, SIXTEEN, part, batch_size=batch_size, besides=quantized)


def _scored(side: Side, part: Part, pad_id: int, batch_size: int, report: Report) -> list[float]:
    nll, device = _likelihoods(side, part, pad_id, batch_size, report)
    release(device)  # only here is the model gone
    return nll


def _likelihoods(side: Side, part: Part, pad_id: int, batch_size: int, report: Report) -> tuple[list[float], Any]:
    report(Phase(f"measure {side.name}", None, "rows"))
    with side.open() as loaded, autocast(loaded.device, loaded.compute_dtype):
        device = loaded.device
        return row_nll(loaded.model, part.examples, pad_id=pad_id, device=device, batch_size=batch_size), device


def _judged(names: list[str], nll: list[list[float]], part: Part, seed: int) -> Recommendation:
    counts = [example.answer_tokens for example in part.examples]
    options: dict[str, Any] = {"groups": [str(example.row) for example in part.examples], "seed": seed}
    forms = tuple(
        Form(name, mean_nll(values, counts, **options), paired_nll(nll[0], values, counts, **options))
        for name, values in zip(names, nll, strict=True)
    )
    apart = paired_nll(nll[1], nll[2], counts, **options)
    onto: Onto = "dequantized" if apart.high < 0 else "original"
    between = f"{abs(apart.point):.4f} nats per token (95 %: {apart.low:+.4f} to {apart.high:+.4f})"
    if apart.excludes(0.0):
        other = "original" if onto == "dequantized" else "dequantized"
        reason = f"its NLL is lower than on {other} weights by {between}"
    else:
        reason = (
            f"the two differ by {between}, which is within the interval, and the original weights can be "
            "quantized again without losing the adapter"
        )
    chosen = forms[2 if onto == "dequantized" else 1]
    if chosen.change.low > 0:
        reason += f"; it is still worse than in training, by {chosen.change.point:.4f}"
    return Recommendation(onto, reason, forms, part.answer_tokens, part.sha256)
