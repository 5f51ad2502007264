"""Where a server listens; known before anything large is imported or loaded."""

from __future__ import annotations

import errno
import socket

from peftkit.errors import PeftkitError
from peftkit.serving.spec import ServeSpec


class ServingError(PeftkitError):
    """A server cannot listen where it was told to."""


def bind(spec: ServeSpec) -> socket.socket:
    """A socket at the address of the settings, before anything large is loaded. Raises ServingError."""
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((spec.host, spec.port))
        listening.listen(1)  # two sockets that do not listen may have the same port
    except OSError as error:
        listening.close()
        raise _not_bound(spec, error) from error
    return listening


def address_of(listening: socket.socket) -> str:
    """What a browser opens: a server on all addresses is reached at loopback."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _not_bound(spec: ServeSpec, error: OSError) -> ServingError:
    where = f"{spec.host} port {spec.port}"
    if error.errno == errno.EADDRINUSE:
        return ServingError(f"{where} is taken by another program", hint="--port 0 takes a free one")
    if error.errno == errno.EACCES:
        return ServingError(f"{where} is not open to this user", expected="a port from 1024 on", hint="--port 8000")
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return ServingError(f"{spec.host} is no address of this machine", hint="--host 127.0.0.1, or 0.0.0.0 for all")
    return ServingError(f"{where}: {error.strerror or error}", expected="an address of this machine and a free port")
