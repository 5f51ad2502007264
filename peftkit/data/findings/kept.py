"""What the audit finds in the words of rows, looked for once: the tally of the same rows is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from peftkit.data.encoded_key import checking_key, digest_rows
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.apart import examine_apart
from peftkit.data.findings.finding import Tally
from peftkit.data.formats import Row
from peftkit.events import Note

_FEWEST = 1_000  # rows; to look at fewer takes half a second


def examine(
    train: Sequence[Row],
    held_out: Sequence[Row],
    control: Collection[str],
    against: tuple[str, Sequence[Row]] | None,
    overlap: Callable[[], float],
    store: EncodedStore | None = None,
    digests: tuple[str, str] = ("", ""),
) -> Callable[[], tuple[Tally, float]]:
    """Begin to look at the texts, or find what was found before; the result waits for the end.

    `overlap` says how much of the held-out prompts stands in the training prompts, and is returned beside the tally;
    `digests` are those of the training and the held-out rows.
    """
    if store is None or len(train) + len(held_out) < _FEWEST:
        tally = examine_apart(train, held_out, control, against)
        return lambda: _both(overlap, tally)
    key = checking_key(*digests, control, (against[0], digest_rows(against[1])) if against else None)
    entry = store.load(key)
    if entry is not None:
        store.report(Note(f"what is in these rows was looked for before: {entry.folder}"))
        found = Tally.of_record(entry.facts["tally"]), float(entry.facts["overlap"])
        return lambda: found
    begun = examine_apart(train, held_out, control, against)

    def wait() -> tuple[Tally, float]:
        tally, highest = _both(overlap, begun)
        store.save(key, {"tally": tally.as_record(), "overlap": highest})
        return tally, highest

    return wait


def _both(overlap: Callable[[], float], tally: Callable[[], Tally]) -> tuple[Tally, float]:
    highest = overlap()  # while the second process looks at the texts
    return tally(), highest
