"""`peftkit data`: check, preview."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from peftkit import locations
from peftkit.base.ref import BaseSpec, longest_sequence, read_config
from peftkit.cli.console import Reporter, console, harmless, show
from peftkit.cli.options import AsJson

if TYPE_CHECKING:
    from peftkit.data.audit import Audit

app = typer.Typer(help="Look at rows the way training will see them.", no_args_is_help=True, rich_markup_mode=None)
Source = Annotated[str, typer.Argument(metavar="ROWS", help="A file of rows, or a Hub data set.")]
BaseName = Annotated[str, typer.Option("--base", help="Whose tokenizer and chat template render the rows.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of `data.*`, without the prefix.")
]
EMBEDDED = "embedded:smollm2-135m"


@app.command()
def check(
    source: Source,
    settings: Settings = None,
    base: BaseName = EMBEDDED,
    against: Annotated[str | None, typer.Option("--against", help="A file that must not be learned.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the audit as one page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read, render and examine all rows; what is wrong is listed with its places and how to mend it.

    The exit code is 1 when a finding would stop a run.

    Example: peftkit data check tickets.jsonl --base Qwen/Qwen3-4B
    """
    from peftkit.data.audit import inspect
    from peftkit.data.findings.told import consent, describe

    given = [*(settings or []), *([f"against={against}"] if against else [])]
    spec, tokenizer, limit, report = _prepare(source, given, base, as_json)
    result = inspect(spec, tokenizer, limit, report)
    if html:
        _write_page(html, source, result)
    if as_json:
        value = result.record()
        value["train"], value["held_out"] = value.pop("parts")
        show(value, as_json=True, text="")
    else:
        found = "\n\n".join(f"{finding.severity} {describe(finding)}" for finding in result.findings)
        counts = Counter(finding.severity for finding in result.findings)
        many = ", ".join(f"{counts[kind]} {kind}{'s' * (counts[kind] != 1)}" for kind in ("error", "warning", "note"))
        verdict = (
            "; ".join(filter(None, ["a run stops here", consent(result.errors)]))
            if result.errors
            else "a run can start"
        )
        show(
            None, as_json=False, text=f"{found}\n\n{many}: {verdict}" if found else "nothing was found: a run can start"
        )
    if result.errors:
        raise typer.Exit(1)


def _write_page(path: Path, source: str, result: Audit) -> None:
    from peftkit.atomic import replace_file
    from peftkit.data.findings.show import sections
    from peftkit.page import page

    parts = [result.train.record(), result.held_out.record()]
    replace_file(path, page(f"Audit of {Path(source).name}", sections(result.findings, result.tokens, parts)))


@app.command()
def preview(
    source: Source,
    settings: Settings = None,
    base: BaseName = EMBEDDED,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show rendered rows with the loss mask: learned tokens in colour (or between ⟦ ⟧ without a terminal).

    Example: peftkit data preview tickets.jsonl --rows 2
    """
    from peftkit.data.audit import encode
    from peftkit.data.chat import segments
    from peftkit.data.formats import load_rows

    spec, tokenizer, limit, _ = _prepare(source, settings, base, as_json)
    loaded = load_rows(source, spec.format)
    lengths = [length for length in (spec.max_length, limit) if length]
    part = encode(loaded.rows[:rows], loaded, "train", tokenizer, spec, min(lengths, default=None))
    if as_json:
        value = [
            {"where": e.where, "segments": [{"text": t, "learned": m} for t, m in segments(e, tokenizer)]}
            for e in part.examples
        ]
        show(value, as_json=True, text="")
        return
    out = console()
    for example in part.examples:
        out.print(f"── {example.where}: {len(example.input_ids)} tokens, {example.answer_tokens} learned", markup=False)
        for text, learned in segments(example, tokenizer):
            text = harmless(text)
            if out.is_terminal:
                out.print(Text(text, style="bold green" if learned else "dim"), end="")
            else:
                out.print(f"⟦{text}⟧" if learned else text, end="", markup=False)
        out.print()


def _prepare(
    source: str, settings: list[str] | None, base: str, as_json: bool
) -> tuple[Any, Any, int | None, Reporter]:
    from peftkit.backbone.locate import locate
    from peftkit.base.tokenizer import load_tokenizer
    from peftkit.config import resolve
    from peftkit.data.audit import DataSpec

    spec = resolve(DataSpec, overrides=[f"train={source}", *(settings or [])]).config
    report = Reporter(as_json=as_json)
    located = locate(BaseSpec(source=base), locations.cache_root().path, report)
    return spec, load_tokenizer(located.folder), longest_sequence(read_config(located.folder)), report
