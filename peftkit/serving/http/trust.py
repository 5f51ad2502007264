"""Who may ask for what: the name that was asked for, the page that asks, the key, and the kind of a body."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping

from pydantic import SecretStr

from peftkit.serving.openai.failures import Refused
from peftkit.serving.spec import ServeSpec, is_loopback

_READS = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/", "/health")
_SCHEMES = ("http", "https")
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^:\[\]]+))(?::\d{1,5})?")
_WILDCARD = ("0.0.0.0", "::")
_OWN_PAGE = (None, "same-origin", "none")  # of Sec-Fetch-Site: no browser, this server's page, typed by the user


def check_host(headers: Mapping[str, str], spec: ServeSpec) -> None:
    """Refuse a request for another name than this server's, which is how a foreign page gets past a browser's rules.

    https://en.wikipedia.org/wiki/DNS_rebinding: it needs a name, so an address is enough where all are served.
    """
    asked = _name_of(headers.get("host", ""))
    if asked in ("localhost", spec.host, *spec.allow_hosts):
        return
    if _is_address(asked) and (spec.host in _WILDCARD or (is_loopback(asked) and spec.is_local)):
        return
    said = f"this server is not {asked!r} (the Host header)" if asked else "the request has no Host header"
    raise Refused(
        403,
        f"{said}\n  expected: localhost or {spec.host}\n  to mend it: peftkit serve --allow-host NAME",
        code="host_not_allowed",
    )


def check_origin(method: str, path: str, headers: Mapping[str, str], spec: ServeSpec) -> None:
    """Refuse what a page of another origin sends, unless it may; a link to the server's own page is followed."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        if allowed_origin(headers, spec) or (site in _OWN_PAGE and _is_own(origin, headers)):
            return
    elif site in _OWN_PAGE or _is_link(method, path, headers):
        return
    raise Refused(
        403,
        f"a page of another origin asked{f': {origin}' if origin else ''}\n"
        "  expected: this server's own page, or a program\n  to mend it: peftkit serve --allow-origin ORIGIN",
        code="origin_not_allowed",
    )


def check_key(method: str, path: str, headers: Mapping[str, str], spec: ServeSpec) -> None:
    """Refuse whoever does not have the key that a route asks for."""
    if path in _OPEN and method in _READS:
        return
    admin = is_admin(method, path)
    if admin and spec.admin_key is None and not spec.is_local:
        raise Refused(
            403,
            f"{path} is closed to other machines: there is no admin key\n"
            "  to mend it: start the server with PEFTKIT_ADMIN_KEY=$(openssl rand -hex 24)",
            code="admin_closed",
        )
    wanted = (spec.admin_key or spec.api_key) if admin else spec.api_key
    if wanted is None:
        return
    given = _bearer(headers)
    if any(_same(given, key) for key in (wanted, spec.admin_key) if key is not None):
        return
    if admin and spec.admin_key and spec.api_key and _same(given, spec.api_key):
        raise Refused(403, f"{path} asks for the admin key, and this is the API key", code="admin_key_required")
    said = "this is not the key" if given else "a key is asked for"
    kind = "PEFTKIT_ADMIN_KEY" if admin and spec.admin_key else "PEFTKIT_API_KEY"
    raise Refused(
        401,
        f"{said}\n  expected: Authorization: Bearer KEY, with the {kind} that the server was started with",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def check_body(headers: Mapping[str, str], spec: ServeSpec) -> None:
    """Refuse a body that is not JSON (a form on any page could send it) or says that it is too large."""
    declared = int(headers.get("content-length", "0"))
    if not declared and "transfer-encoding" not in headers:
        return
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body is {kind or 'of no type'}\n  expected: Content-Type: application/json"
        raise Refused(415, message, code="unsupported_media_type")
    if declared > spec.max_body_bytes:
        raise too_large(spec)


def too_large(spec: ServeSpec) -> Refused:
    """What a body over the limit is answered with."""
    return Refused(413, f"the body is too large\n  expected: at most {spec.max_body_bytes:,} bytes", code="too_large")


def is_admin(method: str, path: str) -> bool:
    """Whether a request changes what is served, or reads runs or the registry."""
    if _under(path, "/runs") or _under(path, "/registry"):
        return True
    return _under(path, "/v1/adapters") and method not in _READS


def allowed_origin(headers: Mapping[str, str], spec: ServeSpec) -> str | None:
    """The page of another origin that asks and may; None for all others."""
    origin = headers.get("origin", "").lower()
    return origin if origin in spec.allow_origins else None


def _under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _name_of(host: str) -> str:
    """A Host header without its port: forwarded ports are other ones than the server's own."""
    host = host.strip().lower()
    found = _HOST.fullmatch(host)
    return (found["address"] or found["name"]) if found else host  # an IPv6 address may stand there bare


def _is_own(origin: str, headers: Mapping[str, str]) -> bool:
    """Whether an origin is what was asked; behind a proxy it is https, and only the browser knows which was asked."""
    scheme, _, name = origin.lower().partition("://")
    return scheme in _SCHEMES and name == headers.get("host", "").strip().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_link(method: str, path: str, headers: Mapping[str, str]) -> bool:
    followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return method == "GET" and path == "/" and followed


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, key: SecretStr) -> bool:
    """Whether they are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), key.get_secret_value().encode())
