"""`peftkit serve`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftkit import locations, render
from peftkit.cli.asking import refuse
from peftkit.cli.console import Reporter, show
from peftkit.cli.options import AsJson, Base, Bits, OtherBase, RegistryRoot, RunsRoot, open_registry
from peftkit.errors import ConfigError
from peftkit.events import Event, Note, Report
from peftkit.extras import extra
from peftkit.registry.store import Registry, Version

API_KEY, ADMIN_KEY = "PEFTKIT_API_KEY", "PEFTKIT_ADMIN_KEY"


NamesOption = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME…]", help="Adapters to answer with: name, name@alias.")
]
EngineOption = Annotated[Literal["peftkit", "vllm"], typer.Option("--engine", help="What computes.")]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen at; all but loopback need a key.")]
PortOption = Annotated[int, typer.Option("--port", help="0 takes a free one.")]
ApiKeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help=f"Holds the key; or {API_KEY} is it.")
]
AdminKeyFileOption = Annotated[
    Path | None,
    typer.Option("--admin-key-file", metavar="FILE", help=f"The key to change what is served; or {ADMIN_KEY}."),
]
AllowHostOption = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name of this server; repeatable.")
]
AllowOriginOption = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", metavar="ORIGIN", help="A site whose pages may ask (CORS); repeatable."),
]
RowsOption = Annotated[int, typer.Option("--rows", min=1, help="Requests answered at once.")]
WaitingOption = Annotated[int, typer.Option("--waiting", min=0, help="Requests that may wait; the next gets 429.")]
MaxBodyOption = Annotated[int, typer.Option("--max-body", metavar="MIB", min=1, help="Of a request.")]
MaxPromptTokensOption = Annotated[
    int | None, typer.Option("--max-prompt-tokens", min=1, help="Of a request; else the base's positions.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="The most that a request may ask for.")
]


def serve(
    names: NamesOption = None,
    base: Base = None,
    bits: Bits = None,
    other_base: OtherBase = False,
    engine: EngineOption = "peftkit",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: ApiKeyFileOption = None,
    admin_key_file: AdminKeyFileOption = None,
    allow_host: AllowHostOption = None,
    allow_origin: AllowOriginOption = None,
    rows: RowsOption = 64,
    waiting: WaitingOption = 256,
    max_body: MaxBodyOption = 1,
    max_prompt_tokens: MaxPromptTokensOption = None,
    max_new_tokens: MaxNewTokensOption = 4096,
    registry: RegistryRoot = None,
    runs: RunsRoot = None,
    as_json: AsJson = False,
) -> None:
    """Serve adapters and their base: OpenAI's API, a page to compare them, and routes to change what is served.

    With --json one line says where it listens, and standard error has one line for each event. Ctrl-C and SIGTERM let
    the answers on their way end; a second one does not wait. Keys are no options: a list of processes would show them.
    With --engine vllm, what stands after -- are arguments of `vllm serve`.

    Example: peftkit serve tickets sql@prod --port 8080
    """
    from peftkit.serving.http.listening import bind
    from peftkit.serving.spec import ServeSpec

    settings = ServeSpec.of(
        {
            "host": host,
            "port": port,
            "api_key": _key(api_key_file, "--api-key-file", API_KEY),
            "admin_key": _key(admin_key_file, "--admin-key-file", ADMIN_KEY),
            "allow_hosts": allow_host or (),
            "allow_origins": allow_origin or (),
            "rows": rows,
            "waiting": waiting,
            "max_body_bytes": max_body << 20,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "default_new_tokens": min(max_new_tokens, ServeSpec.model_fields["default_new_tokens"].default),
        }
    )
    named, arguments = _split(names or [])
    _check_engine(engine, arguments, other_base)
    store, cache = open_registry(registry), locations.cache_root().path
    versions = [store.resolve(name) for name in named]
    with Reporter(as_json=as_json) as reporter, bind(settings) as listening:
        with extra("serve", "serving"):
            from peftkit.serving.host import Host
            from peftkit.serving.http.server import Server, run

        report = reporter if as_json else _in_words(reporter)
        opening = _Opening.of(versions, store, cache, base, bits, settings, report)
        # Outside of the event loop, where a signal would wait until all is loaded.
        local = None if engine == "vllm" else opening.local(other_base)

        async def opened() -> Server:
            answering = local or await opening.vllm(arguments)
            root = locations.runs_root(runs).path
            return Server(Host(answering, store, settings), settings, listening, runs=root, report=report)

        code = run(opened, named, lambda server: _ready(server, as_json))
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class _Opening:
    """What an engine is opened with."""

    found: Any
    versions: list[Version]
    store: Registry
    cache: Path
    limits: Any
    report: Report

    @classmethod
    def of(
        cls,
        versions: list[Version],
        store: Registry,
        cache: Path,
        base: str | None,
        bits: Any,
        spec: Any,
        report: Report,
    ) -> _Opening:
        """With the base of the versions, or the one that is asked for."""
        from peftkit.generation.limits import Limits  # torch: seconds
        from peftkit.generation.opening import find_base

        found = find_base(versions, cache, base=base, bits=bits, report=report)
        return cls(found, versions, store, cache, Limits(rows=spec.rows, waiting=spec.waiting), report)

    def local(self, other_base: bool) -> Any:
        from peftkit.generation.opening import open_engine
        from peftkit.serving.local import LocalEngine

        chosen = {"other_base": other_base, "limits": self.limits, "report": self.report}
        return LocalEngine.opened_by(lambda: open_engine(self.found, self.versions, self.cache, **chosen))

    async def vllm(self, arguments: list[str]) -> Any:
        with extra("serve", "--engine vllm"):
            from peftkit.serving.vllm.start import start_vllm

        more = {"arguments": arguments, "limits": self.limits, "report": self.report}
        return await start_vllm(self.found, self.versions, self.store, self.cache, **more)


def _split(names: list[str]) -> tuple[list[str], list[str]]:
    """Names, each once, and what stands after `--`: arguments of vLLM's."""
    at = next((at for at, name in enumerate(names) if name.startswith("-")), len(names))
    return list(dict.fromkeys(names[:at])), names[at:]


def _check_engine(engine: str, arguments: list[str], other_base: bool) -> None:
    """Raise typer.BadParameter for what the engine that was chosen does not take."""
    if engine == "peftkit":
        refuse({"after --": arguments or None}, "only vLLM (--engine vllm) is given arguments of its own")
    else:
        refuse({"--other-base": other_base}, "vLLM is given adapters of its base alone")


def _key(file: Path | None, option: str, variable: str) -> str | None:
    """A key from its file or the environment. Raises ConfigError for a file that cannot be read."""
    if file is None:
        return os.environ.get(variable) or None
    try:
        return file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "it is not text"
        raise ConfigError([f"{file} cannot be read: {why}"], where=option) from error


def _in_words(report: Report) -> Report:
    """A report that tells of requests in lines of text."""
    from peftkit.serving.http.guard import Served

    def told(event: Event) -> None:
        if isinstance(event, Served):
            status = "the client left" if event.status is None else event.status
            event = Note(f"{event.method} {event.path} {status} {event.milliseconds} ms")
        report(event)

    return told


def _ready(server: Any, as_json: bool) -> None:
    """Say what is served, where, and how to ask."""
    address = server.address
    models = {each.id: each.version.reference if each.version else None for each in server.host.models()}
    if as_json:
        line = {"address": address, "api": f"{address}/v1", "pid": os.getpid(), "models": models}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        return
    facts = [("page", f"{address}/"), ("API", f"{address}/v1")]
    facts += [("model", name if version is None else f"{name}  ({version})") for name, version in models.items()]
    first = next((name for name, version in models.items() if version), "base")
    text = f"\n{render.facts(facts)}\n\nto ask (Ctrl-C ends the server):\n{_curl(address, first, server.spec)}\n"
    show(None, as_json=False, text=text)


def _curl(address: str, model: str, settings: Any) -> str:
    """A request that a user can copy."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${API_KEY}"' if settings.api_key else ""
    return f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
