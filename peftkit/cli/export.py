"""`peftkit export`: an adapter in a folder that another program reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peftkit import locations, render
from peftkit.cli.console import Reporter, show
from peftkit.cli.exchange import License, files_of, listing
from peftkit.cli.options import AsJson, Base, RegistryRoot, open_registry
from peftkit.errors import DeltaError
from peftkit.registry.store import Registry

if TYPE_CHECKING:
    from peftkit.release.export.entry import ExportReceipt


Target = Literal["peftkit", "peft", "vllm", "gguf", "ollama"]
Onto = Literal["original", "dequantized"]
# What each target has no use for: nothing is ignored.
_USELESS = {
    "peftkit": ("--dtype", "--rank", "--merged", "--onto", "--force", "--base"),
    "peft": ("--license", "--merged", "--onto"),
    "vllm": ("--license", "--merged", "--onto"),
    "gguf": ("--license",),
    "ollama": ("--license",),
}
_DTYPES = "float32, bfloat16 or float16; also q8_0 for a model in GGUF (gguf --merged, ollama)."
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="name, name@version or name@alias; several for vllm.")]


def export_adapter(
    names: Names,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new or empty folder.")],
    to: Annotated[Target, typer.Option("--to", help="Who reads it.")] = "peftkit",
    dtype: Annotated[str | None, typer.Option("--dtype", help=_DTYPES)] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut larger ranks to this one by SVD.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="gguf, ollama: the whole merged model.")] = False,
    onto: Annotated[Onto | None, typer.Option("--onto", help="With --merged: original or dequantized.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --merged or --rank: write it if it loses much of ΔW.")
    ] = False,
    base: Base = None,
    license: License = None,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter into a folder that PEFT, vLLM, llama.cpp, Ollama or another peftkit reads right.

    Example: peftkit export tickets sql --to vllm --out ./serving
    """
    store = open_registry(registry)
    given = {"--dtype": dtype, "--rank": rank, "--merged": merged or None, "--onto": onto, "--force": force or None}
    _check_options(to, {**given, "--base": base, "--license": license})
    if to == "peftkit":
        _as_it_is(store, names, out.expanduser(), license, as_json)
        return
    from peftkit.release.export.entry import ExportOptions, export_for

    cache = locations.cache_root().path
    options = ExportOptions(dtype=dtype, rank=rank, base=base, merged=merged, onto=onto, force=force)
    with Reporter(as_json=as_json, warnings_only=True) as report:
        receipt = export_for(to, store, names, out.expanduser(), cache, options=options, report=report)
    show(receipt.as_record(), as_json=as_json, text=_describe(receipt))


def _check_options(to: Target, given: dict[str, object]) -> None:
    useless = [option for option in _USELESS[to] if given[option] is not None]
    if useless:
        raise DeltaError(
            f"{', '.join(useless)} means nothing with --to {to}",
            expected="--license with --to peftkit; --dtype, --rank, --base with the others; --merged with gguf, ollama",
            hint="leave it out, or choose another --to",
        )


def _as_it_is(store: Registry, names: list[str], out: Path, license: str | None, as_json: bool) -> None:
    """The version as the registry holds it, with manifest, base record and model card."""
    from peftkit.registry.exchange import export

    if len(names) != 1:
        raise DeltaError(f"{len(names)} adapters for one folder", expected="one; --to vllm takes several")
    reference = store.resolve(names[0]).reference
    pieces = export(store, reference, out, license)
    value = {"version": reference, "folder": str(out), "files": files_of(pieces)}
    show(value, as_json=as_json, text=f"{reference} is in {out}\n{listing(pieces)}")


def _describe(receipt: ExportReceipt) -> str:
    lines = []
    for name, each in receipt.versions.items():
        lines.append(f"{each['version']} is in {receipt.folder} for {receipt.engine}, as {name}")
        # What is read right over another base was a warning already.
        lines += [f"  {line}" for line in each["findings"] if ": differs: " not in line]
        if error := each.get("error"):
            lines.append(f"  read back: ΔW differs by {render.number(error['max'])} at most ({error['tensor']})")
        if merge := each.get("merge"):
            written = each["written"]
            kept = ", ".join(f"{name}: {render.number(figures['kept'])}" for name, figures in written["groups"].items())
            lines.append(f"  merged onto {merge['settings']['onto']}; kept of ΔW in the file: {kept}")
        if cut := each.get("cut"):
            lines.append(f"  cut to rank {cut['rank']}: {render.number(cut['error'])} of ‖ΔW‖ is lost")
    lines += [f"  {path}" for path in receipt.files]
    if receipt.engine == "vllm":
        lines += ["", f"start it with {shlex.quote(str(receipt.folder / 'serve.sh'))}, which runs:"]
    elif receipt.command:
        lines += ["", f"in {receipt.folder}:"]
    lines += ["  " + shlex.join(receipt.command)] if receipt.command else []
    return "\n".join(lines)
