"""Which versions `list` shows: filters that are applied one after the other, so that an empty result can say why."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peftkit.base.record import plain
from peftkit.errors import RegistryError
from peftkit.registry.index import Contents, Summary
from peftkit.registry.layout import LATEST

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*([^<>=!]+)")
_LONGEST_CONDITION = 200
_DIGEST = re.compile(r"[0-9a-f]{4,64}")
_SECTIONS = {"after": 0, "other": 1, "before": 2}
_CENTRES = (".mean", ".point")
"""What may be left out at the end of a path: `score` is the mean of the score."""
_SHOWN = 6


@dataclass(frozen=True)
class Filters:
    """What to look for; a field that is left out lets every version through."""

    base: str | None = None
    """Part of the source, or the first 4 or more digits of the fingerprint or the record."""
    tag: str | None = None
    method: str | None = None
    recipe: str | None = None
    metrics: tuple[str, ...] = ()
    """Conditions such as `score > 0.8`; all must hold."""
    data: str | None = None
    """The name of a data file, or the first 4 or more digits of its digest."""


_ALL = Filters()


@dataclass(frozen=True)
class Selection:
    """The versions found, and, where there is none, a sentence that says which filter left nothing."""

    versions: tuple[Summary, ...]
    reason: str | None = None


@dataclass(frozen=True)
class _Filter:
    text: str
    passes: Callable[[Summary], bool]
    seen: Callable[[Summary], Iterable[str]]
    """What a version has where the filter looks."""


def select(contents: Contents, filters: Filters = _ALL, *, every: bool = False) -> Selection:
    """The latest version of each name that passes all filters; with `every`, or a tag, of all versions those that pass.

    A damaged version passes no filter. Raises RegistryError for a metric that no version has, or that means several.
    """
    wide = every or filters.tag is not None
    found = list(contents.versions) if wide else latest(contents)
    said = [f"{len(found)} {'versions' if wide else 'adapters'}"]
    for each in _filters(filters, contents.versions):
        passed = [summary for summary in found if summary.problem is None and each.passes(summary)]
        if found and not passed:
            seen = sorted({value for summary in found for value in each.seen(summary)})
            there = f" (there is {_some(seen)})" if seen else ""
            return Selection((), f"{', '.join(said)}, none with {each.text}{there}{_earlier(contents, filters, wide)}")
        said.append(f"{len(passed)} with {each.text}")
        found = passed
    return Selection(tuple(found))


def latest(contents: Contents) -> list[Summary]:
    """The version that `latest` points at, by name; the newest one where the record of `latest` cannot be used."""
    found: dict[str, Summary] = {}
    for summary in contents.versions:
        lost = f"{summary.name}@{LATEST}" in contents.problems
        if LATEST in summary.aliases or (lost and summary.name not in found):
            found[summary.name] = summary
    return list(found.values())


def _earlier(contents: Contents, filters: Filters, wide: bool) -> str:
    count = 0 if wide else len(select(contents, filters, every=True).versions)
    return f"; --all finds {count} that are not the latest of their name" if count else ""


def _filters(filters: Filters, versions: Sequence[Summary]) -> list[_Filter]:
    found = []
    if filters.base is not None:
        found.append(_base(filters.base))
    if filters.tag is not None:
        tag = filters.tag
        found.append(_Filter(f"alias {tag!r}", lambda each: tag in each.aliases, lambda each: each.aliases))
    if filters.method is not None:
        found.append(_word("method", filters.method, lambda each: each.method))
    if filters.recipe is not None:
        found.append(_word("recipe", filters.recipe, lambda each: each.recipe))
    if filters.data is not None:
        found.append(_data(filters.data))
    return found + [_metric(condition, versions) for condition in filters.metrics]


def _base(text: str) -> _Filter:
    wanted = text.lower()

    def passes(each: Summary) -> bool:
        digests = (each.fingerprint, each.record or "") if _DIGEST.fullmatch(wanted) else ()
        return wanted in each.base.lower() or any(digest.startswith(wanted) for digest in digests)

    return _Filter(f"base {text!r}", passes, lambda each: [each.base] if each.base else [])


def _word(what: str, text: str, value: Callable[[Summary], str | None]) -> _Filter:
    wanted = text.lower()
    return _Filter(
        f"{what} {text!r}",
        lambda each: (value(each) or "").lower() == wanted,
        lambda each: [found] if (found := value(each)) else [],
    )


def _data(text: str) -> _Filter:
    def passes(each: Summary) -> bool:
        return any(
            text in (rows.source, rows.source.rsplit("/", 1)[-1])
            or (_DIGEST.fullmatch(text.lower()) and rows.sha256.startswith(text.lower()))
            for rows in each.data
        )

    return _Filter(f"data {text!r}", passes, lambda each: [rows.source for rows in each.data])


def _metric(condition: str, versions: Sequence[Summary]) -> _Filter:
    parts = _CONDITION.fullmatch(condition.strip()[:_LONGEST_CONDITION])  # the pattern takes cubic time
    try:
        if parts is None or math.isnan(bound := float(parts[3])):
            raise ValueError
    except ValueError:
        raise RegistryError(
            f"{condition!r} is no condition on a metric",
            expected="a metric, one of < <= > >= = !=, and a number",
            hint="peftkit list --metric 'score > 0.8'",
        ) from None
    path, compare = metric_path(parts[1], versions), _OPERATORS[parts[2]]
    return _Filter(
        f"{path} {parts[2]} {parts[3].strip()}",
        lambda each: path in each.figures and compare(each.figures[path], bound),
        lambda each: [f"{each.figures[path]:.4g}"] if path in each.figures else [],
    )


def metric_path(name: str, versions: Sequence[Summary]) -> str:
    """The one dotted path that ends in `name`: after training before other figures, and the shortest.

    Raises RegistryError, naming what is near, where there is none or more than one.
    """
    known = {path for each in versions for path in each.figures}
    if name in known:
        return name
    matches = [path for path in known if any(_ends_in(spelled, name) for spelled in _spellings(path))]
    if not matches:
        words = sorted({word for path in known for word in _suffixes(path)})
        near = difflib.get_close_matches(name, words, n=_SHOWN, cutoff=0.5)
        raise RegistryError(
            f"no version has a metric {name!r}" + (f"; did you mean {' or '.join(map(plain, near))}?" if near else ""),
            expected=f"the end of a path such as {_some(sorted(known))}" if known else "a version with metrics",
            hint="peftkit show NAME --json shows all metrics",
        )
    ranked = sorted(matches, key=_rank)
    same = [path for path in ranked if _rank(path)[:2] == _rank(ranked[0])[:2]]
    if len(same) > 1:
        raise RegistryError(
            f"{name!r} stands for {len(same)} metrics",
            expected=f"one of {_some(same)}",
            hint=f"--metric '{plain(same[0])} …'",
        )
    return ranked[0]


def _rank(path: str) -> tuple[int, int, str]:
    return _SECTIONS.get(path.split(".", 1)[0], len(_SECTIONS)), path.count("."), path


def _spellings(path: str) -> list[str]:
    return [path, *(path.removesuffix(centre) for centre in _CENTRES if path.endswith(centre))]


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _suffixes(path: str) -> list[str]:
    parts = [spelled.split(".") for spelled in _spellings(path)]
    return [".".join(each[start:]) for each in parts for start in range(1, len(each))]


def _some(values: Sequence[str]) -> str:
    return ", ".join(map(plain, values[:_SHOWN])) + (" …" if len(values) > _SHOWN else "")
