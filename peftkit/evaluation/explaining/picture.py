"""An explanation as a picture of shaded words, and as a page that needs nothing else."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence

from markupsafe import Markup

from peftkit.charts import COLOURS
from peftkit.evaluation.explaining.explanation import Explanation
from peftkit.evaluation.explaining.words import SPECIAL, Word
from peftkit.page import Section, clean, facts_html, figure_html, page, paragraph_html, table_html

_CHARACTER, _LINE, _SPACE, _WIDTH, _TOP = 7.8, 30, 6, 700, 34  # 13 px in a type of one width
_LONGEST = 60
_STRONGEST = 0.6  # opacity: the word keeps its contrast on light and on dark paper
_ABOUT = (
    "Integrated gradients (Sundararajan, Taly and Yan 2017) of this score with respect to the input embeddings. The "
    "words' shares add up to the score minus the score of the baseline; special tokens are the same in both and have "
    "no share. A share says what this model reads the score from, not what is true of the text."
)


def explanation_page(explanation: Explanation, title: str) -> str:
    """A whole HTML document: the prediction, the shaded words, and the words' shares as a table."""
    rows = [(word.text, word.part, word.value) for word in sorted(explanation.words, key=lambda word: -abs(word.value))]
    shares = [(label, value) for label, value in explanation.probabilities.items()]
    sections = [
        Section("Prediction", facts_html(explanation.facts())),
        Section("Words", figure_html(words_picture(explanation.words, explanation.what)) + paragraph_html(_ABOUT)),
        Section("Shares", table_html(("word", "of", "share"), rows)),
    ]
    if shares:
        sections.insert(1, Section("Probabilities", table_html(("label", "probability"), shares)))
    return page(title, sections)


def words_picture(words: Sequence[Word], what: str) -> Markup:
    """The words in their order as SVG: blue speaks for the score, orange with a line below it against.

    The largest share of either sign has the full colour.
    """
    largest = max((abs(word.value) for word in words), default=0.0)
    body, x, y, part = [_legend(largest)], 0.0, float(_TOP), ""
    for word in words:
        shown = word.text if len(word.text) <= _LONGEST else word.text[: _LONGEST - 1] + "…"
        width = _CHARACTER * max(_columns(shown), 1) + 6
        changes = bool(part) and word.part not in (part, SPECIAL)
        if x and (x + width > _WIDTH or changes):
            x, y = 0.0, y + _LINE
        part = part if word.part == SPECIAL else word.part
        body.append(_word(x, y, width, shown, word, largest))
        x += width + _SPACE
    told = f"{clean(what)}; " + "; ".join(f"{word.text} {word.value:+.3g}" for word in words)
    key = hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()[:12]
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h:g}" role="img" aria-labelledby="t{k} d{k}" '
        'font-family="ui-monospace, monospace" font-size="13"><title id="t{k}">shares of {title}</title>'
        '<desc id="d{k}">{told}</desc>{body}</svg>\n'
    ).format(w=_WIDTH, h=y + _LINE, k=key, title=clean(what), told=clean(told), body=Markup("").join(body))


def _word(x: float, y: float, width: float, shown: str, word: Word, largest: float) -> Markup:
    share = abs(word.value) / largest if largest else 0.0
    colour = COLOURS[0] if word.value >= 0 else COLOURS[1]
    box = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="20" rx="3" fill="{}" fill-opacity="{:.3f}"/>')
    parts = [box.format(x, y, width, colour, _STRONGEST * share)]
    if word.value < 0 and share >= 0.05:  # so that a print without colours can be read
        line = Markup('<path d="M{:.1f} {:.1f}h{:.1f}" stroke="{}" stroke-width="1.5" stroke-dasharray="3 2"/>')
        parts.append(line.format(x, y + 22, width, colour))
    # The browser's own type may be wider: the length is given, and the letters are fitted to it.
    text = Markup(
        '<text x="{:.1f}" y="{:.1f}" textLength="{:.1f}" lengthAdjust="spacingAndGlyphs"{} fill="currentColor">'
        "{}</text>"
    )
    faint = Markup(' fill-opacity="0.55"') if word.part == SPECIAL else ""
    parts.append(text.format(x + 3, y + 14.5, width - 6, faint, clean(shown)))
    name = Markup("<title>{} ({}): {:+.4g}</title>").format(clean(word.text), word.part, word.value)
    return Markup("<g>{}{}</g>").format(name, Markup("").join(parts))


def _legend(largest: float) -> Markup:
    """What the colours mean, and the share that has the full colour."""
    parts = []
    for at, (colour, told) in enumerate(((COLOURS[0], "for the score, "), (COLOURS[1], "against it, "))):
        sign = "-" if at else "+"
        box = Markup('<rect x="{}" y="2" width="24" height="16" rx="3" fill="{}" fill-opacity="{}"/>')
        text = Markup('<text x="{}" y="14" fill="currentColor" font-size="12">{}</text>')
        full = f"{told}full colour {sign}{largest:.3g}" if math.isfinite(largest) else told
        parts += [box.format(300 * at, colour, _STRONGEST), text.format(300 * at + 32, full)]
    return Markup("").join(parts)


def _columns(text: str) -> int:
    """Characters, East Asian ones twice: they are as wide as two."""
    return sum(2 if unicodedata.east_asian_width(char) in ("W", "F") else 1 for char in text)
