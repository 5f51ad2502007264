"""`peftkit generate`: one prompt, answered by each adapter on one loaded base."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's turn.")],
    adapters: Annotated[list[str], typer.Option("--adapter", metavar="NAME", help="Answer with it; repeatable.")],
    with_base: Annotated[bool, typer.Option("--with-base", help="Answer with the bare base, too.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt once per adapter; the base is loaded once.

    Example: peftkit generate "My lamp arrived broken." --adapter tickets --adapter tickets@prod --with-base
    """
    store = open_registry(registry)
    versions = list({version.reference: version for version in map(store.resolve, adapters)}.values())
    from peftkit.generation.answer import answer
    from peftkit.generation.engine import Sampling
    from peftkit.tuning.attach import names_for, open_adapters

    with Reporter(as_json=as_json, warnings_only=True) as report:
        host = open_adapters(
            versions, locations.cache_root().path, base=base, bits=bits, other_base=other_base, report=report
        )
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    asked: list[str | None] = [None] if with_base else []
    answers = []
    for name in [*asked, *names_for(versions)]:
        with host.using(name):
            sampling = Sampling(temperature=temperature, seed=seed)
            text = answer(host, versions[0], turns, max_new_tokens=max_new_tokens, sampling=sampling)
        reference = host.versions[name].reference if name else None
        answers.append({"adapter": reference, "answer": text})
    lines = [f"{each['adapter'] or 'base'}:\n{each['answer']}" for each in answers]
    value = {"prompt": prompt, "answers": answers, "receipts": list(host.receipts)}
    show(value, as_json=as_json, text="\n\n".join(lines))
