"""What a merge did to the model: base + adapter as it was trained against the merged weights, on held-out rows."""

from __future__ import annotations

from pathlib import Path

from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.part import Part
from peftkit.events import Note, Report, silent
from peftkit.registry.manifest import Version
from peftkit.release.drift import Drift, Side, drift
from peftkit.release.forms import Trained, as_trained, merged_in, merged_quant, trained
from peftkit.release.measured import LEAST_TOKENS, NotMeasured, too_few
from peftkit.release.room import lacking
from peftkit.release.rows import HeldOut, first_tokens

MOST_TOKENS = 4_096
"""Answer tokens measured unless told otherwise: their logits take 2.5 GB of disk for 150,000 tokens of vocabulary."""


def measure_merge(
    version: Version,
    merged: Path | Side,
    rows: HeldOut | NotMeasured,
    cache: Path,
    *,
    base: str | None = None,
    other_base: bool = False,
    least_tokens: int = LEAST_TOKENS,
    most_tokens: int = MOST_TOKENS,
    batch_size: int = 8,
    seed: int = 0,
    report: Report = silent,
) -> Drift | NotMeasured:
    """Measure the merged model against base + adapter, the base held as it was while the adapter was trained.

    `merged` is the folder of a merge, or a model that knows how to be loaded. The first rows with at most `most_tokens`
    answer tokens are used. Not measured without rows, with fewer than `least_tokens` answer tokens, and where either
    model would not fit into the memory that is free. Raises BaseError when the base is not here, BaseMismatch when it
    is another one, BackboneError when a model cannot be loaded.
    """
    form = trained(version, cache, base=base, other_base=other_base, report=report)
    part = _ready(form, merged, rows, least_tokens, most_tokens, batch_size, report)
    if isinstance(part, NotMeasured):
        report(Note(f"base + adapter against merged: {part.reason}"))
        return part
    second = merged if isinstance(merged, Side) else merged_in(merged, cache, report)
    return drift(
        as_trained(form),
        second,
        part,
        pad_id=load_tokenizer(form.folder).pad_id,
        scratch=cache / "scratch",
        batch_size=batch_size,
        seed=seed,
        report=report,
    )


def _ready(
    form: Trained,
    merged: Path | Side,
    rows: HeldOut | NotMeasured,
    least_tokens: int,
    most_tokens: int,
    batch_size: int,
    report: Report,
) -> Part | NotMeasured:
    """The rows to measure on, or why nothing can be measured."""
    if isinstance(rows, NotMeasured):
        return rows
    part = first_tokens(rows.part(form.folder, report), most_tokens)
    short = too_few(part.answer_tokens, least_tokens)
    short = short or lacking(form.folder, form.quant, part, batch_size=batch_size)
    return short or _no_room(merged, part, batch_size) or part


def _no_room(merged: Path | Side, part: Part, batch_size: int) -> NotMeasured | None:
    if isinstance(merged, Side):
        return None
    return lacking(merged, merged_quant(merged), part, batch_size=batch_size)
