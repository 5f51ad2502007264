"""One offline HTML document from titled sections: escaped, no script, nothing fetched, light and dark, phone and print.

What shows up here comes from strangers: rows, file names, error messages. So a text becomes part of a page only through
`markupsafe`: every function below escapes what it is given, unless it is `Markup` that another of them made.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from peftkit.render import number

# A row may hold a whole book; a page that holds many such rows would not open on a phone.
LONGEST_CELL = 2_000
LONGEST_TEXT = 20_000

Kind = Literal["error", "warning", "good", "soft", "plain"]

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --raised: #f6f8fa;
  --error: #b3261e; --warning: #8a5300; --good: #1a6b35 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --soft: #9aa4af; --line: #3a424c;
  --raised: #1d2127; --error: #ff8a80; --warning: #f2b45c; --good: #7ed492 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0 1rem }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem }
nav ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem }
a { color: inherit }
p { margin: .5rem 0; max-width: 50rem }
pre, .text { white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace; background: var(--raised);
  padding: .5rem .75rem; border-radius: .4rem; margin: .5rem 0; max-width: none }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line);
  min-width: 4rem; max-width: 32rem; white-space: pre-wrap }
thead th { color: var(--soft); font-weight: 600 }
.n { text-align: right; white-space: nowrap }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; margin: .5rem 0 }
dt { color: var(--soft) }
dd { margin: 0; white-space: pre-wrap }
.badge { border: 1px solid; border-radius: .6rem; padding: 0 .5rem; font-size: .85em; white-space: nowrap }
.error { color: var(--error) } .warning { color: var(--warning) } .good { color: var(--good) }
.soft, figcaption { color: var(--soft); font-size: .9rem }
figure { margin: .75rem 0 }
figure svg { display: block; width: 100%; max-width: 45rem; height: auto }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 1.5rem }
summary { cursor: pointer }
@media print { body { max-width: none; padding: 0; font-size: 10pt } nav { display: none }
  figure, tr, dl { break-inside: avoid } h2, h3 { break-after: avoid } .scroll { overflow: visible } }
"""
# The style is named by its digest, so a style or script that slips in some other way is not obeyed.
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"
_CONTENTS_FROM = 4  # sections; with fewer a list of contents only takes room


@dataclass(frozen=True)
class Section:
    """A part of a page; `html` is Markup from the functions of this module, and anything else is shown as text."""

    title: str
    html: str


def page(title: str, sections: Sequence[Section], refresh_seconds: int | None = None) -> str:
    """A whole document; with `refresh_seconds` the browser reads the file again after so many seconds."""
    refresh = Markup('<meta http-equiv="refresh" content="{}">\n').format(refresh_seconds) if refresh_seconds else ""
    names = _anchors([section.title for section in sections])
    body = Markup("\n").join(
        Markup('<section id="{}">\n<h2>{}</h2>\n{}\n</section>').format(name, clean(section.title), clean(section.html))
        for name, section in zip(names, sections, strict=True)
    )
    contents = _contents(names, sections) if len(sections) >= _CONTENTS_FROM else ""
    document = Markup(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n{refresh}<title>{title}</title>\n<style>{style}</style>\n'
        "</head>\n<body>\n<header><h1>{title}</h1></header>\n{contents}<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    parts = {"policy": Markup(_POLICY), "style": Markup(_STYLE), "refresh": refresh, "contents": contents, "body": body}
    return str(document.format(title=clean(title), **parts))


def table_html(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table; a column of numbers stands right, None is "-".

    Raises ValueError when a row has another length than `columns`.
    """
    kept = [list(row) for row in rows]
    for row in kept:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns")
    right = [_is_numeric([row[index] for row in kept]) for index in range(len(columns))]
    heads = (_cell("th", column, end) for column, end in zip(columns, right, strict=True))
    head = Markup("<thead><tr>{}</tr></thead>\n").format(Markup("").join(heads)) if any(columns) else Markup("")
    lines = Markup("\n").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell("td", c, end) for c, end in zip(row, right, strict=True)))
        for row in kept
    )
    # A wide table scrolls by itself, by touch or by keys, instead of making the whole page wide.
    return Markup('<div class="scroll" tabindex="0"><table>{}<tbody>\n{}\n</tbody></table></div>\n').format(head, lines)


def facts_html(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and their values, one pair a line."""
    lines = (Markup("<dt>{}</dt><dd>{}</dd>\n").format(clean(name), shown(value)) for name, value in pairs)
    return Markup("<dl>\n{}</dl>\n").format(Markup("").join(lines))


def text_html(text: str) -> Markup:
    """A text as it stands, with its line ends, in a type of one width; a very long one is cut, and says so."""
    return Markup('<div class="text">{}</div>\n').format(clean(_cut(text, LONGEST_TEXT)))


def paragraph_html(text: str, kind: Kind = "plain") -> Markup:
    """One paragraph of prose; `kind` gives it a colour."""
    return Markup('<p class="{}">{}</p>\n').format(kind, shown(text))


def badge_html(text: str, kind: Kind = "plain") -> Markup:
    """A word in a coloured frame, for a cell of a table or a fact."""
    return Markup('<span class="badge {}">{}</span>').format(kind, clean(text))


def heading_html(text: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>\n").format(clean(text))


def figure_html(svg: Markup, caption: str = "") -> Markup:
    """A picture from `peftkit.charts`, with a line below it."""
    below = Markup("<figcaption>{}</figcaption>").format(clean(caption)) if caption else ""
    return Markup("<figure>{}{}</figure>\n").format(svg, below)


def side_by_side_html(figures: Iterable[Markup]) -> Markup:
    """Figures beside each other where the screen is wide enough, below each other where it is not."""
    return Markup('<div class="charts">\n{}</div>\n').format(Markup("").join(figures))


def details_html(summary: str, html: str) -> Markup:
    """A part that stays folded until it is opened."""
    return Markup("<details><summary>{}</summary>\n{}</details>\n").format(clean(summary), clean(html))


def shown(value: Any) -> str:
    """A value as a cell shows it: Markup as it is, numbers as `render.number` writes them, a long text cut."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    return clean(_cut(str(value), LONGEST_CELL))


def clean(text: str) -> str:
    """Text without control characters, overrides of direction and halves of a character; line ends and tabs stay."""
    if isinstance(text, Markup) or (text.isascii() and text.isprintable()):
        return text
    return "".join(char if _is_harmless(char) else "\N{REPLACEMENT CHARACTER}" for char in text)


def _is_harmless(char: str) -> bool:
    # Joiners (emoji of several parts, Persian, Indic scripts) change no order and hide nothing.
    return char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs")


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… (cut: {len(text):,} characters)"


def _cell(tag: Literal["th", "td"], value: Any, right: bool) -> Markup:
    kind = Markup(' class="n"') if right else Markup("")
    scope = Markup(' scope="col"') if tag == "th" else Markup("")
    return Markup("<{0}{1}{2}>{3}</{0}>").format(Markup(tag), scope, kind, shown(value))


def _is_numeric(cells: Sequence[Any]) -> bool:
    known = [cell for cell in cells if cell is not None]
    return bool(known) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in known)


def _anchors(titles: Sequence[str]) -> list[str]:
    names: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _contents(names: Sequence[str], sections: Sequence[Section]) -> Markup:
    links = (
        Markup('<li><a href="#{}">{}</a></li>').format(name, clean(section.title))
        for name, section in zip(names, sections, strict=True)
    )
    return Markup('<nav aria-label="contents"><ul>{}</ul></nav>\n').format(Markup("").join(links))
