"""`peftkit preview`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, RegistryRoot, open_registry
from peftkit.cli.weighted import parse_weighted
from peftkit.errors import DeltaError


def preview(
    adapters: Annotated[list[str], typer.Argument(metavar="NAME[:WEIGHT] …", help="Adapters of one base.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Also say the error at this rank.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write it as one page.")] = None,
    base: Base = None,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Look at what combining adapters would do before it is done: angles, signs, cancellation, ranks; in seconds.

    Everything comes from the adapters' factors; of the base, only the names and shapes of its tensors are read.

    Example: peftkit preview tickets:0.6 tone:0.4
    """
    weighted = parse_weighted(adapters)
    store = open_registry(registry)
    versions = [store.resolve(name) for name, _ in weighted]
    from peftkit.cli.base_here import base_here, check_one_base, deltas_here

    check_one_base(versions)
    from peftkit.deltas.previewing.page import preview_page
    from peftkit.deltas.previewing.preview import RANKS, preview

    cache = locations.cache_root().path
    with Reporter(as_json=as_json) as report:
        folder = _named(base, cache) if base else base_here(versions[0], cache, report)
        parents = [deltas_here(version, folder) for version in versions]
        ranks = sorted({*RANKS, *([rank] if rank else [])})
        found = preview(parents, [weight for _, weight in weighted], ranks=ranks, report=report)
        if html:
            _write(html, preview_page(found))
        if not as_json:
            for table in found.tables():
                report(table)
    show(found.as_record(), as_json=as_json, text=str(html) if html else "")


def _named(source: str, cache: Path) -> Path:
    """The folder of the base that the user names, downloaded if it must be."""
    from peftkit.backbone.locate import locate
    from peftkit.base.ref import BaseSpec

    return locate(BaseSpec(source=source), cache).folder


def _write(target: Path, text: str) -> None:
    from peftkit.atomic import replace_file

    try:
        replace_file(target, text)
    except OSError as error:
        raise DeltaError(
            f"{target} cannot be written: {error.strerror or error}",
            expected="a file in a folder that exists and can be written",
        ) from error
