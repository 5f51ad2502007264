"""`peftkit generate`: a prompt, or every row of a file, answered by each adapter on one loaded base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.asking import (
    JsonSchema,
    Logprobs,
    MaxNewTokens,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    asked,
    cut_off,
    refuse,
)
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.data.readers import SUFFIXES
from peftkit.generation.requests import Request
from peftkit.recipe import Interrupted
from peftkit.registry.store import Registry, Version

_OF_ROWS = "PROMPT is no file of rows"


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT|FILE", help="The user's turn, or a file of rows to answer.")],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME", help="Answer with it; repeatable.")
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Answer with the bare base, too.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where answers to rows go.")] = None,
    adapter_column: Annotated[
        str | None, typer.Option("--adapter-column", metavar="NAME", help="Column that names the adapter of a row.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows answered at once; 32 if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted run kept.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    logprobs: Logprobs = None,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or every row of a file, once per adapter; the base is loaded once.

    Answers to a file are kept as they come: the same command goes on after an interruption.

    Example: peftkit generate "My lamp arrived broken." --adapter tickets --adapter tickets@prod --with-base
    """
    like = asked(max_new_tokens, temperature, top_p, top_k, seed, stop, json_schema, logprobs)
    loaded = {"base": base, "bits": bits, "other_base": other_base}
    bulk = _is_file_of_rows(prompt)
    if not adapters and not (bulk and adapter_column):
        raise typer.BadParameter("name at least one adapter", param_hint="--adapter")
    if not bulk:
        given: dict[str, Any] = {"--out": out, "--adapter-column": adapter_column, "--batch": batch}
        refuse({**given, "--fresh": fresh, "--overwrite": overwrite}, _OF_ROWS)
        if not as_json:
            refuse({"--logprobs": logprobs}, "they are shown with --json only")
        _answer(prompt, adapters or [], with_base, system, like, open_registry(registry), loaded, as_json)
        return
    refuse({"--system": system}, "rows have a column 'system' for it")
    if out is None:
        raise typer.BadParameter("say where the answers go", param_hint="--out")
    chosen: dict[str, Any] = {"with_base": with_base, "adapter_column": adapter_column, **loaded}
    chosen |= {"fresh": fresh, "overwrite": overwrite, **({"batch": batch} if batch else {})}
    _answer_rows(prompt, adapters or [], out.expanduser(), like, open_registry(registry), chosen, as_json)


def _answer(
    prompt: str,
    adapters: list[str],
    with_base: bool,
    system: str | None,
    like: Request,
    store: Registry,
    loaded: dict[str, Any],
    as_json: bool,
) -> None:
    versions = list({version.reference: version for version in map(store.resolve, adapters)}.values())
    from peftkit.generation.answer import answered, ask, record
    from peftkit.generation.opening import find_base, open_engine

    cache, other_base = locations.cache_root().path, loaded.pop("other_base")
    with Reporter(as_json=as_json, warnings_only=True) as report:
        found = find_base(versions, cache, **loaded, report=report)
        opened = open_engine(found, versions, cache, other_base=other_base, report=report)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        who: list[Version | None] = [*([None] if with_base else []), *versions]
        tickets = [ask(opened, version, turns, like) for version in who]
        opened.engine.run()
        answers = [record(answered(ticket), opened.backbone.tokenizer) for ticket in tickets]
        if cut := [each["adapter"] or "base" for each in answers if each["finish"] == "length"]:
            report(cut_off(f"answers of {', '.join(cut)} were", like))
    lines = [f"{each['adapter'] or 'base'}:\n{each['answer']}" for each in answers]
    value = {"prompt": prompt, "answers": answers, "receipts": list(opened.fleet.receipts)}
    show(value, as_json=as_json, text="\n\n".join(lines))


def _answer_rows(
    rows: str, adapters: list[str], out: Path, like: Request, store: Registry, chosen: dict[str, Any], as_json: bool
) -> None:
    from peftkit.generation.bulk.bulk import generate_file

    cache = locations.cache_root().path
    with Reporter(as_json=as_json) as report:
        try:
            done = generate_file(store, rows, adapters, out, cache=cache, like=like, **chosen, report=report)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "interrupted") from None
        if done.cut:
            report(cut_off(f"{done.cut:,} of {done.answers:,} answers were", like))
    if done.asked:
        rate = f" ({done.tokens:,} tokens, {done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s)"
        text = f"{out} holds {done.answers:,} answers; {done.asked:,} were asked now{rate}"
    else:
        text = f"{out} holds {done.answers:,} answers: already answered, nothing was asked"
    if done.failed:
        text += f"\n! {done.failed:,} of {done.answers:,} could not be answered"
        text += f", first {done.first_error}" if done.first_error else "; their lines say why, --overwrite asks again"
    show(done.as_record(), as_json=as_json, text=text)
    if done.failed:
        raise typer.Exit(1)


def _is_file_of_rows(argument: str) -> bool:
    """Whether it is a file. Raises DataError for the name of one that is not there, rather than asking a model."""
    if os.path.isfile(os.path.expanduser(argument)):
        return True
    if argument.lower().removesuffix(".gz").endswith(SUFFIXES) and not any(letter.isspace() for letter in argument):
        from peftkit.data.readers import read

        read(Path(argument))
    return False
