"""`peftkit chat`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from peftkit import locations
from peftkit.cli.asking import MaxNewTokens, Seed, System, Temperature, TopK, TopP, asked, cut_off, refuse
from peftkit.cli.console import Reporter, console, harmless, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, open_registry
from peftkit.errors import PeftkitError, TuningError
from peftkit.generation.requests import Request
from peftkit.registry.store import Version

_HELP = "/base, /NAME to swap; /new to forget; /quit; Ctrl-C stops an answer"
_COMMANDS = ("new", "quit", "exit")


def chat(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Adapters to talk to; the first one begins.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this, print the answer, and end.")] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """Talk to an adapter, and swap to another or to the base without loading again.

    Example: peftkit chat tickets --prompt "My lamp arrived broken, order A-48213."
    """
    if prompt is None:
        refuse({"--json": as_json}, "only the answer to one --prompt is shown as JSON")
    like = asked(max_new_tokens, temperature, top_p, top_k, seed)
    store = open_registry(registry)
    versions = [store.resolve(name) for name in names]
    from peftkit.generation.answer import answered, record
    from peftkit.generation.opening import find_base, open_engine

    cache = locations.cache_root().path
    with Reporter(as_json=as_json, warnings_only=prompt is not None) as report:
        found = find_base(versions, cache, base=base, bits=bits, report=report)
        opened = open_engine(found, versions, cache, other_base=other_base, report=report)
    session = _Session(opened, versions, system, like)
    if prompt is None:
        _talk(session)
        return
    ticket = session.submit([{"role": "user", "content": prompt}])
    opened.engine.run()
    answer = answered(ticket)
    if answer.finish == "length":
        report(cut_off("the answer was", like))
    value = {**record(answer, opened.backbone.tokenizer), "receipts": list(opened.fleet.receipts)}
    show(value, as_json=as_json, text=answer.text)


def _talk(session: _Session) -> None:
    show(None, as_json=False, text=f"talking to {session.active}; {_HELP}")
    while True:
        try:
            line = input(f"{session.active}> ").strip()
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
                _show_answer(session.ask(line))
        except PeftkitError as error:
            show(None, as_json=False, text=f"! {error}")


def _show_answer(pieces: Iterator[str]) -> None:
    """Print an answer as it comes where somebody watches it come, and whole elsewhere."""
    terminal = console()
    if not terminal.is_terminal:
        show(None, as_json=False, text="".join(pieces))
        return
    try:
        for piece in pieces:
            terminal.print(harmless(piece), markup=False, end="")
    finally:
        terminal.print()


class _Session:
    """One conversation; the turns stay when the adapter is swapped."""

    def __init__(self, opened: Any, versions: list[Version], system: str | None, like: Request) -> None:
        from peftkit.tuning.attach import names_for

        self.opened, self.system, self.like = opened, system, like
        self.versions: dict[str, Version | None] = {
            version.reference if name in _COMMANDS else name: version
            for name, version in zip(names_for(versions), versions, strict=True)
        }
        self.versions["base"] = None
        self.active = next(iter(self.versions))
        self.turns: list[dict[str, str]] = []

    def swap(self, name: str) -> None:
        if name not in self.versions:
            known = ", ".join(self.versions)
            raise TuningError(f"no adapter named {name!r} is part of this chat", expected=f"one of: {known}")
        self.active = name

    def ask(self, text: str) -> Iterator[str]:
        """The answer as it comes; one that was stopped stays in the conversation as far as it came."""
        from peftkit.generation.answer import answered

        turns = [*self.turns, {"role": "user", "content": text}]
        ticket = self.submit(turns)
        with _stopping(ticket):
            yield from self.opened.engine.stream(ticket)
        said = answered(ticket).text
        if said or not ticket.cancelled:
            self.turns = [*turns, {"role": "assistant", "content": said}]

    def submit(self, turns: list[dict[str, str]]) -> Any:
        """Queue a conversation for the active adapter."""
        from peftkit.generation.answer import ask

        system = [{"role": "system", "content": self.system}] if self.system else []
        return ask(self.opened, self.versions[self.active], [*system, *turns], self.like)


@contextmanager
def _stopping(ticket: Any) -> Iterator[None]:
    """Let Ctrl-C end this answer between two tokens; a second one before it has ended interrupts as ever."""

    def stop(number: int, frame: Any) -> None:
        ticket.cancel()
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # outside the main thread signals are not ours to set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
