"""What is served, and changing it: `/v1/adapters`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peftkit.errors import PeftkitError
from peftkit.registry.layout import parse_reference
from peftkit.registry.store import Registry
from peftkit.serving.host import Host, Model
from peftkit.serving.openai.fields import Fields

_RECORDS = 99_999_999  # the numbers of an alias's records have 8 digits


def routes(host: Host) -> list[Route]:
    """The routes of one host. What is wrong with a request is raised, and the application answers for it."""

    async def shown_or_attached(request: Request) -> Response:
        # One route: of two at one path, a wrong method would be told those of the first alone.
        return await (attach(request) if request.method == "POST" else shown())

    async def shown() -> Response:
        attached = host.models()[1:]
        return JSONResponse({"data": await asyncio.to_thread(_records, attached, host.registry)})

    async def attach(request: Request) -> Response:
        fields = await _fields(request)
        name = fields.text("model", required=True)
        _check(fields)
        model = await host.attach(str(name))
        return await _answer(host, [model], 201)

    async def detach(request: Request) -> Response:
        name = request.path_params["model"]
        await host.detach(name)
        return JSONResponse({"model": name, "detached": True})

    async def reload(request: Request) -> Response:
        fields = await _fields(request)
        name = fields.text("model")
        _check(fields)
        return await _answer(host, await host.reload(name))

    async def move(request: Request) -> Response:
        fields = await _fields(request)
        version = fields.text("version", required=True)
        _check(fields)
        return await _answer(host, await host.move(**request.path_params, version=str(version)))

    async def restore(request: Request) -> Response:
        fields = await _fields(request)
        to = fields.whole("to", 1, _RECORDS)
        _check(fields)
        return await _answer(host, await host.restore(**request.path_params, to=to))

    alias = "/v1/adapters/{name}/aliases/{alias}"
    return [
        Route("/v1/adapters", shown_or_attached, methods=["GET", "POST"]),
        Route("/v1/adapters/reload", reload, methods=["POST"]),
        Route("/v1/adapters/{model}", detach, methods=["DELETE"]),
        Route(alias, move, methods=["PUT"]),
        Route(f"{alias}/restore", restore, methods=["POST"]),
    ]


async def _fields(request: Request) -> Fields:
    return Fields.of(await request.body() or b"{}")


def _check(fields: Fields) -> None:
    fields.close()
    fields.problems.check()


async def _answer(host: Host, models: Sequence[Model], status: int = 200) -> Response:
    return JSONResponse({"data": await asyncio.to_thread(_records, models, host.registry)}, status)


def _records(models: Sequence[Model], registry: Registry) -> list[dict[str, Any]]:
    return [_record(model, registry) for model in models]


def _record(model: Model, registry: Registry) -> dict[str, Any]:
    """What answers to a name, and what the registry says of it."""
    name = parse_reference(model.id).name
    try:
        said: dict[str, Any] = {"version": registry.resolve(model.id).id, "aliases": registry.aliases(name)}
    except PeftkitError as error:
        said = {"version": None, "aliases": {}, "error": error.fact}
    return {
        "model": model.id,
        "name": name,
        "version": model.version.id if model.version else None,
        "since": int(model.since),
        "trouble": model.trouble,
        "registry": said,
    }
