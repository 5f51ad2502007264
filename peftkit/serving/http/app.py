"""The server's routes, behind its guard."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from peftkit.errors import PeftkitError
from peftkit.events import Report, silent
from peftkit.serving import adapters, health
from peftkit.serving.host import Host
from peftkit.serving.http.guard import Guard
from peftkit.serving.metrics import Metrics
from peftkit.serving.openai import completions
from peftkit.serving.openai.failures import Refused, answer_for
from peftkit.serving.page import routes as page
from peftkit.serving.spec import ServeSpec


def create_app(host: Host, spec: ServeSpec, *, runs: Path, report: Report = silent) -> Guard:
    """The ASGI application over a host: OpenAI's routes, those for adapters, the page and the runs."""
    metrics = Metrics(host)
    routes = [
        *completions.routes(host, spec, metrics),
        *adapters.routes(host),
        *health.routes(host, metrics),
        *page.routes(host, runs),
    ]
    handlers = {HTTPException: _no_route, Refused: _failed, PeftkitError: _failed, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False  # a redirect would leave the host that was asked for
    return Guard(app, spec, draining=lambda: host.draining, refused=metrics.refused, report=report)


async def _failed(request: Request, error: Exception) -> Response:
    return answer_for(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router, in OpenAI's form."""
    asked, headers = f"{request.method} {request.url.path}", dict(error.headers or {})
    if error.status_code == HTTPStatus.NOT_FOUND:
        return answer_for(Refused(404, f"no route {asked}", code="unknown_url", headers=headers))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "")
        message = f"{asked} is not allowed\n  expected: {allowed}"
        return answer_for(Refused(405, message, code="method_not_allowed", headers=headers))
    return answer_for(Refused(error.status_code, str(error.detail), headers=headers))
