"""`peftkit data`: check, preview."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from peftkit import locations
from peftkit.base.ref import BaseSpec, longest_sequence, read_config
from peftkit.cli.console import Reporter, console, harmless, show
from peftkit.cli.options import AsJson

app = typer.Typer(help="Look at rows the way training will see them.", no_args_is_help=True, rich_markup_mode=None)
Source = Annotated[str, typer.Argument(metavar="ROWS", help="A file of rows, or a Hub data set.")]
BaseName = Annotated[str, typer.Option("--base", help="Whose tokenizer and chat template render the rows.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of `data.*`, without the prefix.")
]
EMBEDDED = "embedded:smollm2-135m"


@app.command()
def check(source: Source, settings: Settings = None, base: BaseName = EMBEDDED, as_json: AsJson = False) -> None:
    """Read, render and count all rows; every row that cannot be used is named.

    Example: peftkit data check tickets.jsonl --base Qwen/Qwen3-4B
    """
    from peftkit.data.audit import audit

    spec, tokenizer, limit, report = _prepare(source, settings, base, as_json)
    result = audit(spec, tokenizer, limit, report)
    value: dict[str, Any] = {"train": result.train.record(), "held_out": result.held_out.record()}
    value["overlap"] = result.overlap
    changed = any(part.dropped or part.truncated for part in (result.train, result.held_out))
    show(value, as_json=as_json, text="some rows are left out or cut" if changed else "every row can be used")


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
