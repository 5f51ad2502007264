"""A preview as one HTML page that needs no network: cosines as a picture, the spectrum, norms by layer, all tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from peftkit.charts import line_chart
from peftkit.deltas.previewing.figures import TENSOR_COLUMNS, Pair, Preview, tensor_row
from peftkit.events import Table
from peftkit.heat import heat
from peftkit.page import (
    Section,
    details_html,
    facts_html,
    figure_html,
    heading_html,
    page,
    side_by_side_html,
    table_html,
)

_MOST_LINES = 4  # a chart has that many colours and dashes
_PICTURED: dict[str, Callable[[Pair], float | None]] = {
    "cosine of ΔW": lambda pair: pair.cosine,
    "write: mean cosine of the principal angles": lambda pair: pair.write.mean if pair.write else None,
    "read: mean cosine of the principal angles": lambda pair: pair.read.mean if pair.read else None,
}


def preview_page(preview: Preview) -> str:
    """The page; names of adapters and tensors are shown as text, whatever is in them."""
    facts, *tables = preview.tables()
    names = short_names(preview.references)
    pictures = side_by_side_html([*_heats(preview), _spectrum(preview), *_norms(preview)])
    every = table_html(TENSOR_COLUMNS, [tensor_row(tensor) for tensor in preview.tensors])
    return page(
        "Preview: " + " + ".join(f"{weight:g} · {name}" for name, weight in zip(names, preview.weights, strict=True)),
        [
            Section("What it would be", facts_html(facts.rows)),
            Section("Pictures", pictures),
            Section("Figures", Markup("").join(_table(table) for table in tables)),
            Section("Tensors", details_html(f"all {len(preview.tensors)}", every)),
        ],
    )


def short_names(references: Sequence[str]) -> list[str]:
    """`name` where that tells the adapters apart, `name@version` where it does not."""
    names = [reference.partition("@")[0] for reference in references]
    return [name if names.count(name) == 1 else full for name, full in zip(names, references, strict=True)]


def _table(table: Table) -> Markup:
    return heading_html(table.title) + table_html(table.columns, table.rows)


def _heats(preview: Preview) -> list[Markup]:
    if len(preview.references) < 2:
        return []
    names = short_names(preview.references)
    pictures = []
    for title, value in _PICTURED.items():
        values = _square(len(names), [value(pair) for pair in preview.overall.pairs])
        pictures.append(figure_html(heat(names, values, title), title))
    return pictures


def _square(count: int, values: Sequence[float | None]) -> list[list[float | None]]:
    """The symmetric matrix of what is known of all pairs, in the order of `itertools.combinations`."""
    rest = iter(values)
    found: list[list[float | None]] = [[1.0 if i == j else None for j in range(count)] for i in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            found[i][j] = found[j][i] = next(rest)
    return found


def _spectrum(preview: Preview) -> Markup:
    points = [(float(at), value) for at, value in enumerate(preview.spectrum, 1)]
    marks = [(float(rank), f"{share} % at {rank}") for share, rank in preview.ranks.items() if rank]
    drawn = line_chart({"combination": points}, "rank", "singular value over all tensors", marks=marks[:1])
    return figure_html(drawn, "At rank k, the root of the sum of the squares of every tensor's k-th singular value.")


def _norms(preview: Preview) -> list[Markup]:
    """‖ΔW‖ of every tensor in the order of its name, at most four adapters to a picture."""
    names = short_names(preview.references)
    pictures = []
    for first in range(0, len(names), _MOST_LINES):
        lines = {
            names[index]: [
                (float(at), norm)
                for at, tensor in enumerate(preview.tensors, 1)
                if (norm := tensor.figures.norms[index]) is not None
            ]
            for index in range(first, min(first + _MOST_LINES, len(names)))
        }
        pictures.append(figure_html(line_chart(lines, "tensor", "‖ΔW‖"), "In the order of the tensors' names."))
    return pictures
