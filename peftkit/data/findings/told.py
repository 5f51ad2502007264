"""What is said of the data of a run: warnings, tables, and the one error for all that stops it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftkit.data.findings.finding import Finding
from peftkit.data.part import PartOf
from peftkit.errors import DataError
from peftkit.events import Note, Report, Table, Warned
from peftkit.render import sparkline


def heed(findings: Sequence[Finding], report: Report) -> None:
    """Report every warning. Raises DataError with all findings that stop a run."""
    for finding in findings:
        if finding.severity == "warning":
            report(Warned(f"{finding.text}: {_places(finding)}" if finding.examples else finding.text, finding.mend))
    if errors := stopping(findings):
        raise refusal(errors)


def heed_measured(findings: Sequence[Finding], report: Report, mend: str) -> None:
    """As `heed`, of rows that are measured alone; `mend` is what can be done about long ones there."""
    other = {"too_long": mend, "left_out": "", "cut": ""}
    heed([replace(finding, mend=other.get(finding.rule, finding.mend)) for finding in findings], report)


def stopping(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings that stop a run."""
    return tuple(finding for finding in findings if finding.severity == "error")


def refusal(errors: Sequence[Finding]) -> DataError:
    """One error for all findings that stop a run."""
    listed = "\n".join(f"- {describe(finding)}" for finding in errors)
    many = "1 finding stops" if len(errors) == 1 else f"{len(errors)} findings stop"
    return DataError(f"{many} this run:\n{listed}", hint=consent(errors))


def consent(errors: Sequence[Finding]) -> str | None:
    """The setting that lets a run start all the same, where there is one."""
    rules = [finding.rule for finding in errors if not finding.final]
    return f"if it is meant so: data.accept=[{','.join(rules)}]" if rules else None


def describe(finding: Finding) -> str:
    """A finding with its examples and how to mend it, in several lines."""
    examples = [f"\n    {seen.where}: {seen.excerpt}" for seen in finding.examples]
    rest = finding.count - len(examples)
    more = f"\n    and {rest:,} more" if examples and rest > 0 else ""
    accepted = " (accepted)" if finding.accepted else ""
    mend = f"\n    to mend it: {finding.mend}" if finding.mend else ""
    return f"{finding.rule}{accepted}: {finding.text}{''.join(examples)}{more}{mend}"


def counts(parts: Sequence[PartOf[Any, Any]], *, examples: str = "sequences", learned: str = "learned tokens") -> Table:
    """How much there is of each part; `examples` are what rows become, `learned` what the loss falls on."""
    columns = ("data", "rows", examples, "tokens", learned, "longest", "left out", "cut")
    return Table("data", columns, tuple(map(_counted, parts)))


def token_line(tokens: Mapping[str, Any]) -> Note:
    """Tokens per sequence as a little picture; `tokens` are counts between edges."""
    return Note(f"tokens per sequence, 0 to {tokens['edges'][-1]:,}: {sparkline(tokens['counts'])}")


def tell(findings: Sequence[Finding], report: Report) -> None:
    """Report the table of findings, where there are any."""
    if findings:
        found = tuple((f.severity, f.rule, f.count, f"{f.share:.1%}", _first(f), f.text) for f in findings)
        report(Table("findings", ("severity", "rule", "count", "share", "first", "what"), found))


def _counted(part: PartOf[Any, Any]) -> tuple[Any, ...]:
    return (
        part.role.replace("_", "-"),
        len(part.rows),
        len(part.examples),
        part.tokens,
        part.answer_tokens,
        part.longest,
        len(part.dropped),
        len(part.truncated),
    )


def _first(finding: Finding) -> str | None:
    return finding.examples[0].where if finding.examples else None


def _places(finding: Finding) -> str:
    rest = finding.count - len(finding.examples)
    return ", ".join(seen.where for seen in finding.examples) + (f" and {rest:,} more" if rest > 0 else "")
