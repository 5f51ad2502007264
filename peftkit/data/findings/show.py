"""An audit as sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from peftkit.charts import histogram
from peftkit.data.findings.finding import Finding
from peftkit.page import Kind, Section, badge_html, figure_html, heading_html, paragraph_html, table_html

_KINDS: dict[str, Kind] = {"error": "error", "warning": "warning", "note": "plain"}


def sections(
    findings: Sequence[Finding], tokens: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> list[Section]:
    """Counts, lengths and findings, as `Audit.record` has them."""
    columns = ("role", "source", "rows", "tokens", "dropped")
    counts = table_html(columns, [[part[column] for column in columns] for part in parts])
    picture = figure_html(histogram(tokens["counts"], tokens["edges"], "tokens per sequence"))
    return [
        Section("Rows", counts),
        Section("Tokens per sequence", picture),
        Section("Findings", _findings(findings)),
    ]


def _findings(findings: Sequence[Finding]) -> Markup:
    if not findings:
        return paragraph_html("Nothing was found.", "good")
    rows = [(badge_html(f.severity, _KINDS[f.severity]), f.rule, f.count, f"{f.share:.1%}", f.text) for f in findings]
    parts = [table_html(("severity", "rule", "count", "share", "what"), rows)]
    for finding in findings:
        parts.append(heading_html(f"{finding.rule}{' (accepted)' if finding.accepted else ''}"))
        parts.append(paragraph_html(f"{finding.text}. To mend it: {finding.mend}."))
        if finding.examples:
            parts.append(table_html(("where", "excerpt"), [(seen.where, seen.excerpt) for seen in finding.examples]))
    return Markup("").join(parts)
