"""The page at `/`, and what it asks for besides the API: cards, the registry, runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from peftkit import render
from peftkit.errors import AdapterNotFound, RunError
from peftkit.plain import as_utf8
from peftkit.registry.index import Contents, contents
from peftkit.registry.lineage import lineage
from peftkit.registry.store import Registry
from peftkit.runs.page import run_page
from peftkit.runs.status import RunStatus, list_runs, load_run
from peftkit.serving.host import Host, Model
from peftkit.serving.openai.failures import Refused
from peftkit.serving.page.card import card, row
from peftkit.serving.page.document import document

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def routes(host: Host, runs: Path) -> list[Route]:
    """`/`, `/cards`, `/registry`, `/runs` and `/runs/{id}`; who may ask for which is the guard's business."""

    async def page(request: Request) -> Response:
        found = document()
        return HTMLResponse(found.html, headers={**_HEADERS, "Content-Security-Policy": found.policy})

    async def cards(request: Request) -> Response:
        base, *attached = host.models()
        return _json({"base": base.id, "models": await run_in_threadpool(_cards, host.registry, attached)})

    async def registry(request: Request) -> Response:
        return _json(await run_in_threadpool(_registry, host.registry, host.models()))

    async def listed(request: Request) -> Response:
        return _json({"runs": [_run(each) for each in await run_in_threadpool(list_runs, runs)]})

    async def run(request: Request) -> Response:
        html = await run_in_threadpool(_run_page, runs, request.path_params["id"])
        return HTMLResponse(html, headers={**_HEADERS, "Content-Security-Policy": document().policy_of_runs})

    return [
        Route("/", page),
        Route("/cards", cards),
        Route("/registry", registry),
        Route("/runs", listed),
        Route("/runs/{id}", run),
    ]


def _json(value: dict[str, Any]) -> Response:
    return JSONResponse(as_utf8(value), headers=_HEADERS)


def _cards(registry: Registry, models: list[Model]) -> list[dict[str, Any]]:
    known = contents(registry)
    return [
        {"model": each.id, "since": each.since, "trouble": each.trouble, **_card(registry, known, each)}
        for each in models
    ]


def _card(registry: Registry, known: Contents, model: Model) -> dict[str, Any]:
    version = model.version
    assert version is not None  # only the base has none
    try:
        found = lineage(registry, version.reference, known)
    except AdapterNotFound:  # removed, while its last version is still answered
        found = None
    return card(version, found, [each for each in known.versions if each.name == version.name])


def _registry(registry: Registry, models: list[Model]) -> dict[str, Any]:
    known = contents(registry)
    served: defaultdict[str, list[str]] = defaultdict(list)
    for model in models:
        if model.version is not None:
            served[model.version.reference].append(model.id)
    rows = [row(each, served.get(each.reference, ())) for each in known.versions]
    return {"versions": rows, "problems": known.problems}


def _run(status: RunStatus) -> dict[str, Any]:
    """A line of the list; figures and errors, which may hold rows, stay with the run's own page."""
    kept = ("id", "recipe", "state", "started", "ended", "saved_as")
    return {**{name: getattr(status, name) for name in kept}, "took": render.duration(status.seconds)}


def _run_page(runs: Path, run_id: str) -> str:
    try:
        # The id is looked up among the names of the folder, so no other place can be asked for.
        status = load_run(runs, run_id)
    except RunError as error:
        raise Refused(404, error.fact, param="id", code="run_not_found") from None
    return run_page(status.path)
