"""`peftkit chat`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.errors import PeftkitError
from peftkit.registry.store import Version

_HELP = "/base, /NAME to swap; /new to forget; /quit"


def chat(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Adapters to talk to; the first one begins.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0)] = 0.0,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Talk to an adapter, and swap to another or to the base without loading again.

    Example: peftkit chat tickets --prompt "My lamp arrived broken, order A-48213."
    """
    store = open_registry(registry)
    versions = [store.resolve(name) for name in names]
    from peftkit.generation.engine import Sampling
    from peftkit.tuning.attach import open_adapters

    with Reporter(as_json=as_json, warnings_only=prompt is not None) as report:
        host = open_adapters(
            versions, locations.cache_root().path, base=base, bits=bits, other_base=other_base, report=report
        )
    session = _Session(host, versions, system, max_new_tokens, Sampling(temperature=temperature))
    if prompt is not None:
        answer = session.ask(prompt)
        value = {"adapter": versions[0].reference, "answer": answer, "receipts": list(host.receipts)}
        show(value, as_json=as_json, text=answer)
        return
    _talk(session)


def _talk(session: _Session) -> None:
    show(None, as_json=False, text=f"talking to {session.host.active}; {_HELP}")
    while True:
        try:
            line = input(f"{session.host.active or 'base'}> ").strip()
        except EOFError:
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line == "/new":
                session.turns.clear()
            elif line.startswith("/"):
                session.swap(line[1:])
            elif line:
                show(None, as_json=False, text=session.ask(line))
        except PeftkitError as error:
            show(None, as_json=False, text=f"! {error}")


class _Session:
    """One conversation; the turns stay when the adapter is swapped."""

    def __init__(
        self, host: Any, versions: list[Version], system: str | None, max_new_tokens: int, sampling: Any
    ) -> None:
        self.host, self.versions = host, versions
        self.system, self.max_new_tokens, self.sampling = system, max_new_tokens, sampling
        self.turns: list[dict[str, str]] = []

    def swap(self, name: str) -> None:
        self.host.activate(None if name == "base" else name)

    def ask(self, text: str) -> str:
        from peftkit.generation.answer import answer

        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [*self.turns, {"role": "user", "content": text}]
        replied = answer(
            self.host,
            self.versions[0],
            [*system, *turns],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )
        self.turns = [*turns, {"role": "assistant", "content": replied}]
        return replied
