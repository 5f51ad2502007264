"""Which languages the rows are in; py3langid, on texts long enough to tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from peftkit.data.findings.finding import Hit, RowText, Tally

# Chosen by measurement: of 600 captions in each language py3langid knows 99.8 % (en) and 100 % (de) in 0.03 ms,
# lingua's small models 95 % and 99 % in 0.2 ms, its large ones 100 % in 1.2 ms and with 1 GB; its wheel has 96 MB.
_LETTERS = 60  # fewer, and a name decides
_CJK_LETTERS = 15
_SURE = 0.999
_START = slice(0, 160)
_SAMPLE = 20_000  # rows looked at; more change no share
_TRANSLATION = 0.2  # above this share another language is the task
# Told apart badly on short texts, and near enough for a reader of one to notice the other.
_ALIKE = (
    {"id", "ms", "jv"},
    {"hr", "sr", "bs", "sl"},
    {"no", "nb", "nn", "da", "sv"},
    {"cs", "sk"},
    {"es", "gl", "pt", "ca"},
)


def check_all(rows: Sequence[RowText], tally: Tally) -> None:
    """Find answers in another language than their prompt, and rows in another language than most."""
    every = max(1, len(rows) // _SAMPLE)
    told: list[tuple[RowText, str]] = []
    translated: list[tuple[RowText, Hit]] = []
    both = 0
    for row in rows[::every]:
        asked = language(row.prompt[_START])
        answered = language(row.answers[-1][_START]) if row.answers else language(row.whole[_START])
        both += bool(asked and answered and row.answers)
        if asked and answered and row.answers and not _alike(asked, answered):
            start = row.whole.rindex(row.answers[-1])
            translated.append((row, Hit("answer_language", start, start + 60, f"{asked} → {answered}")))
        if answered:
            told.append((row, answered))
    tally.totals["sample"] = len(rows[::every])
    if len(translated) <= max(2, _TRANSLATION * both):
        for row, hit in translated:
            tally.add(row, [hit])
    counts = Counter(name for _, name in told)
    if not counts:
        return
    most, count = counts.most_common(1)[0]
    if count >= 0.8 * len(told):
        for row, name in told:
            if not _alike(name, most):
                tally.add(row, [Hit("language_mix", said=name, end=60)])
        tally.say("language_mix", 0, most)


def language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None where it is too short, code, or not clear."""
    letters = text if text.isascii() else "".join(filter(str.isalpha, text))
    cjk = 0 if text.isascii() else sum("\u3040" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7af" for char in letters)
    if cjk >= _CJK_LETTERS and cjk > 0.5 * len(letters):
        kana = sum("\u3040" <= char <= "\u30ff" for char in letters)
        hangul = sum("\uac00" <= char <= "\ud7af" for char in letters)
        return "ko" if hangul > 0.5 * cjk else "ja" if kana > 0.1 * cjk else "zh"
    count = sum(map(str.isalpha, letters))
    if count < _LETTERS or count < 0.7 * len(text.replace(" ", "")):
        return None
    name, sure = _identifier().classify(text)
    return str(name) if sure >= _SURE else None


def _alike(one: str, other: str) -> bool:
    return one == other or any(one in group and other in group for group in _ALIKE)


@lru_cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
