"""Whether a server can answer, and what it has done: `/health` and `/metrics`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peftkit.serving.host import Host
from peftkit.serving.metrics import CONTENT_TYPE, Metrics


def routes(host: Host, metrics: Metrics) -> list[Route]:
    """The routes of one host."""

    async def health(request: Request) -> Response:
        trouble = host.trouble()
        status = "ok" if trouble is None else "draining" if host.draining else "trouble"
        # It is open to everybody, so it tells how many models there are, and not their names.
        said = {"status": status, "base": host.base, "fingerprint": host.fingerprint, "models": len(host.models())}
        return JSONResponse(said | ({"trouble": trouble} if trouble else {}), 200 if trouble is None else 503)

    async def numbers(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return [Route("/health", health, methods=["GET"]), Route("/metrics", numbers, methods=["GET"])]
