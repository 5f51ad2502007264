"""Settings of a server."""

from __future__ import annotations

from peftkit.config import Spec


class ServeSpec(Spec):
    """Where a server listens, who may ask, and how much."""

    host: str = "127.0.0.1"
    """An address of this machine. Any but loopback needs `api_key`."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """What `Authorization: Bearer …` must say on every route but /health and the page's own files."""
    admin_key: str | None = None
    """The same for routes that change what is served, and for runs and the registry. Without it they are open on
    loopback, where `api_key` (when there is one) opens them too, and closed elsewhere."""
    allow_hosts: tuple[str, ...] = ()
    """Names beside the address and localhost that the Host header may have (DNS rebinding)."""
    allow_origins: tuple[str, ...] = ()
    """Pages of other origins that may ask (CORS), as https://example.org."""
    rows: int = 16
    """Requests that are answered at once."""
    waiting: int = 256
    """Requests that may wait; the next one gets 429 with Retry-After."""
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    """None: the base's positions."""
    max_new_tokens: int = 4096
    """The most that a request may ask for."""
    default_new_tokens: int = 512
    """Where a request does not say."""
    request_seconds: float = 600.0
    """After so many seconds an answer is cut off, with an error."""
    read_seconds: float = 20.0
    """For the head of a request, and for its body."""
    write_seconds: float = 60.0
    """For a piece of a response: whoever does not read so long is cut off."""
    drain_seconds: float = 30.0
    """What answers on their way are given after SIGTERM."""
    connections: int = 1024
    """More are refused with 503."""
    follow_seconds: float = 1.0
    """How often the registry is looked at for moved aliases and new versions; 0 is never."""
