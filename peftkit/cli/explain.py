"""`peftkit explain`: which words of a text an adapter's prediction comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.style import Style
from rich.text import Text

from peftkit import locations
from peftkit.atomic import replace_file
from peftkit.cli.console import Reporter, console, harmless, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, Reference, RegistryRoot, open_registry
from peftkit.evaluation.explaining.spec import MOST_STEPS, ExplainSpec

if TYPE_CHECKING:
    from peftkit.evaluation.explaining.explanation import Explanation

_FAINT = 0.05  # of the largest share: below it a word has no colour


def explain(
    name: Reference,
    text: Annotated[str, typer.Option("--text", help="The text; the context of a question.")],
    pair: Annotated[str | None, typer.Option("--pair", help="The second text; the question.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="LABEL", help="Default: what is predicted.")] = None,
    word: Annotated[int | None, typer.Option("--word", min=1, metavar="N", help="Explain the tag of word N.")] = None,
    baseline: Annotated[
        Literal["pad", "mask", "zero"], typer.Option("--baseline", help="What stands for no text.")
    ] = "pad",
    steps: Annotated[
        int,
        typer.Option("--steps", min=1, max=MOST_STEPS, metavar="N", help="To begin with; doubled until it adds up."),
    ] = 32,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="Write a page with the words.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Show which words speak for a prediction and which against it, by integrated gradients.

    Example: peftkit explain topics --text "Shares fell after the merger" --out why.html
    """
    if out is not None and out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; --overwrite replaces it", param_hint="--out")
    version = open_registry(registry).resolve(name)
    from peftkit.evaluation.explaining.explain import explain_version
    from peftkit.evaluation.explaining.picture import explanation_page

    spec = ExplainSpec(target=target, word=word, baseline=baseline, steps=steps)
    with Reporter(as_json=as_json) as report:
        found = explain_version(
            version,
            text,
            pair,
            spec,
            cache=locations.cache_root().path,
            base=base,
            bits=bits,
            other_base=other_base,
            report=report,
        )
    if out is not None:
        replace_file(out, explanation_page(found, f"{version.reference}: {found.what}"))
    if not as_json:
        console().print(shaded(found))
    show({"adapter": version.reference, **found.record()}, as_json=as_json, text="\n" + found.text())


def shaded(found: Explanation) -> Text:
    """The words with their shares: blue for the score, red and underlined against it."""
    largest = max((abs(word.value) for word in found.words), default=0.0)
    line = Text()
    for word in found.words:
        strong = abs(word.value) > _FAINT * largest
        style = (
            Style(color="blue" if word.value > 0 else "red", underline=word.value < 0) if strong else Style(dim=True)
        )
        line.append(harmless(word.text), style)
        line.append(f"({word.value:+.2g}) " if strong else " ", Style(dim=True))
    line.rstrip()
    return line
