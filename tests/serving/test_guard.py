"""Who may ask a server what. Every guard is asked twice: as it is, and taken away, when the same request passes."""

from __future__ import annotations

import http.client
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from generation.adapters_lab import Lab
from pydantic import SecretStr
from serving.server_lab import SECONDS, Server, ask, serving, until

from peftkit.errors import ConfigError
from peftkit.events import Warned
from peftkit.serving.http import trust
from peftkit.serving.http.guard import Served
from peftkit.serving.spec import ServeSpec

pytestmark = pytest.mark.loopback

T = TypeVar("T")
API, ADMIN = "api-key-for-tests", "admin-key-for-tests"
SITE = "https://app.example"
EVIL = "https://evil.example"


def told(server: Server, kind: type[T]) -> list[T]:
    """Events of one kind; they come a moment after the response."""
    return [event for event in server.events if isinstance(event, kind)]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(lab: Lab) -> Iterator[Server]:
    """A server with both keys, another name, and a site whose pages may ask."""
    spec = {"api_key": API, "admin_key": ADMIN, "allow_hosts": ["box.example"], "allow_origins": [SITE]}
    with serving(lab, ["tickets"], max_body_bytes=1000, **spec) as running:
        yield running


@dataclass(frozen=True)
class Case:
    """A request that a guard refuses, and nothing else does."""

    guard: str
    method: str
    path: str
    headers: Mapping[str, str]
    status: int
    code: str
    value: Any = None
    on: str = "server"
    only: str = field(default="")

    def __str__(self) -> str:
        return self.only or f"{self.guard}-{self.code}"


RELOAD = ("POST", "/v1/adapters/reload")
READ = ("GET", "/v1/adapters")
CASES = [
    Case("check_host", *READ, {"Host": "evil.example"}, 403, "host_not_allowed"),
    Case("check_host", *READ, {"Host": "evil.example:8000"}, 403, "host_not_allowed", only="host-port"),
    Case("check_host", *READ, {"Host": "localhost.evil.example"}, 403, "host_not_allowed", only="host-longer"),
    Case("check_host", *READ, {"Host": "[::1].evil.example"}, 403, "host_not_allowed", only="host-after-address"),
    Case("check_host", *READ, {"Host": "localhost:evil.example"}, 403, "host_not_allowed", only="host-as-port"),
    Case("check_host", *READ, {"Host": "[localhost]"}, 403, "host_not_allowed", only="host-name-in-brackets"),
    Case("check_host", *READ, {"Host": "192.0.2.1"}, 403, "host_not_allowed", only="host-other-address"),
    Case("check_host", *READ, {"Host": "box.example"}, 403, "host_not_allowed", only="host-not-allowed-here"),
    Case("check_host", "GET", "/health", {"Host": "evil.example"}, 403, "host_not_allowed", only="host-health"),
    Case("check_origin", *RELOAD, {"Origin": EVIL}, 403, "origin_not_allowed"),
    Case("check_origin", *RELOAD, {"Origin": "null"}, 403, "origin_not_allowed", only="origin-null"),
    Case("check_origin", *RELOAD, {"Origin": "http://localhost:1"}, 403, "origin_not_allowed", only="other-port"),
    Case(
        "check_origin", *RELOAD, {"Host": "localhost", "Origin": "app://localhost"}, 403, "origin_not_allowed",
        only="other-scheme",
    ),
    Case(
        "check_origin", *RELOAD, {"Host": "localhost", "Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
        403, "origin_not_allowed", only="http-page-of-an-https-server",
    ),
    Case("check_origin", *READ, {"Sec-Fetch-Site": "cross-site"}, 403, "origin_not_allowed", only="site"),
    Case("check_origin", *READ, {"Sec-Fetch-Site": "same-site"}, 403, "origin_not_allowed", only="same-site"),
    Case(
        "check_origin", "GET", "/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "iframe"}, 403, "origin_not_allowed", only="framed",
    ),
    Case("check_body", *RELOAD, {"Content-Type": "text/plain"}, 415, "unsupported_media_type", {}),
    Case(
        "check_body", *RELOAD, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type", {},
        only="form",
    ),
    Case("check_key", *READ, {}, 401, "invalid_api_key", on="locked"),
    Case("check_key", *READ, bearer("wrong-key-for-tests"), 401, "invalid_api_key", on="locked", only="wrong-key"),
    Case("check_key", *READ, bearer(API[:-1]), 401, "invalid_api_key", on="locked", only="shorter-key"),
    Case("check_key", *READ, {"Authorization": API}, 401, "invalid_api_key", on="locked", only="no-scheme"),
    Case("check_key", "GET", "/metrics", {}, 401, "invalid_api_key", on="locked", only="metrics"),
    Case("check_key", *RELOAD, {}, 401, "invalid_api_key", on="locked", only="admin-without"),
    Case("check_key", *RELOAD, bearer(API), 403, "admin_key_required", on="locked"),
    Case("check_key", "GET", "/runs", bearer(API), 403, "admin_key_required", on="locked", only="runs"),
    Case("check_key", "GET", "/registry", bearer(API), 403, "admin_key_required", on="locked", only="registry"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_guard_refuses_and_nothing_else_would(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue(case.on)
    reply = ask(server, case.method, case.path, case.value, case.headers)
    assert (reply.status, reply.error["code"]) == (case.status, case.code)
    assert reply.headers["content-type"] == "application/json"
    monkeypatch.setattr(trust, case.guard, lambda *anything: None)
    assert ask(server, case.method, case.path, case.value, case.headers).status < 300


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost"},
        {"Host": "LOCALHOST:8000"},
        {"Host": "127.0.0.1:1"},
        {"Host": "[::1]:8000"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
        {"Host": "localhost:8443", "Origin": "https://localhost:8443", "Sec-Fetch-Site": "same-origin"},
    ],
    ids=str,
)
def test_its_own_page_and_programs_pass(server: Server, headers: dict[str, str]) -> None:
    assert ask(server, *READ, headers=headers).status == 200
    assert ask(server, *RELOAD, headers=headers).status == 200


def test_a_link_to_the_page_is_followed_and_to_nothing_else(server: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask(server, "GET", "/", headers=link).status == 200
    assert ask(server, *READ, headers=link).status == 403


def test_keys_open_what_they_are_for(locked: Server) -> None:
    for path in ("/", "/health"):
        assert ask(locked, "GET", path).status == 200
    assert ask(locked, *READ, headers=bearer(API)).status == 200
    assert ask(locked, *READ, headers={"authorization": f"bearer  {API}"}).status == 200
    for method, path in (READ, RELOAD, ("GET", "/runs"), ("GET", "/registry"), ("GET", "/metrics")):
        assert ask(locked, method, path, headers=bearer(ADMIN)).status == 200
    assert ask(locked, *READ).headers["www-authenticate"] == "Bearer"
    assert ask(locked, "GET", "/health", headers={"Host": "box.example"}).status == 200


def test_without_an_admin_key_the_api_key_is_asked_for_here_and_nothing_opens_elsewhere() -> None:
    here, there = ServeSpec(api_key=API), ServeSpec(host="0.0.0.0", api_key=API)
    trust.check_key(*RELOAD, {"authorization": f"Bearer {API}"}, here)
    for method, path in (
        RELOAD,
        ("DELETE", "/v1/adapters/x"),
        ("GET", "/runs"),
        ("GET", "/runs/x"),
        ("GET", "/registry"),
    ):
        with pytest.raises(trust.Refused) as refused:
            trust.check_key(method, path, {"authorization": f"Bearer {API}"}, there)
        assert (refused.value.status, refused.value.code) == (403, "admin_closed")
    trust.check_key("GET", "/v1/adapters", {"authorization": f"Bearer {API}"}, there)


def test_any_address_is_this_servers_where_all_are_served_and_no_name() -> None:
    spec = ServeSpec(host="0.0.0.0", api_key=API)
    for host in ("192.0.2.1:8000", "[2001:db8::1]:8000", "2001:db8::1", "localhost"):
        trust.check_host({"host": host}, spec)
    for host in ("evil.example", "", "192.0.2.1.evil.example", "[::1].evil.example", "[::1]:evil.example"):
        with pytest.raises(trust.Refused):
            trust.check_host({"host": host}, spec)


def test_pages_of_other_origins_are_answered_only_where_that_was_asked_for(server: Server, locked: Server) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = ask(locked, "OPTIONS", "/v1/chat/completions", headers={"Origin": SITE, **asked})
    assert (preflight.status, preflight.body) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == SITE
    assert preflight.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
    read = ask(locked, *READ, headers={"Origin": SITE, "Sec-Fetch-Site": "cross-site", **bearer(API)})
    assert (read.status, read.headers["access-control-allow-origin"], read.headers["vary"]) == (200, SITE, "Origin")
    assert ask(locked, *READ, headers={"Origin": SITE}).status == 401
    for one, headers in ((locked, {"Origin": EVIL}), (server, {"Origin": SITE}), (server, {"Origin": EVIL})):
        for reply in (
            ask(one, "OPTIONS", "/v1/adapters", headers={**headers, **asked}),
            ask(one, *READ, headers=headers),
        ):
            assert reply.status == 403
            assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_body_is_as_large_as_it_may_be_and_no_larger(locked: Server) -> None:
    def body(size: int) -> bytes:
        return b"{" + b" " * (size - 2) + b"}"

    assert ask(locked, *RELOAD, body(1000), bearer(ADMIN)).status == 200
    for size in (1001, 10 << 20):
        reply = ask(locked, *RELOAD, body(size), bearer(ADMIN))
        assert (reply.status, reply.error["code"]) == (413, "too_large")
        assert "1,000 bytes" in reply.error["message"]


def test_after_a_body_that_was_refused_the_connection_goes_on(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    for body, status in ((b" " * (3 << 20), 413), (b"{}", 200)):
        connection.request(*RELOAD, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    connection.close()


def test_browsers_are_told_to_keep_nothing_and_to_run_nothing(server: Server) -> None:
    for reply in (ask(server, *READ), ask(server, "GET", "/nowhere"), ask(server, *READ, headers={"Origin": EVIL})):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        assert "server" not in reply.headers
    page = ask(server, "GET", "/")
    assert page.headers["x-frame-options"] == "DENY"
    assert "script-src" in page.headers["content-security-policy"]  # its own


def test_what_is_nowhere_and_what_is_not_done_there(server: Server) -> None:
    for path in ("/nowhere", "/v1/adapters/", "/v1//adapters", "/../etc/passwd"):
        reply = ask(server, "GET", path)
        assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    reply = ask(server, "PATCH", "/v1/adapters")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert set(reply.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD", "POST"}
    assert reply.headers["allow"] in reply.error["message"]


def test_a_request_is_told_in_a_line_without_what_was_asked(server: Server) -> None:
    def chats() -> int:
        return sum((each.method, each.path) == ("POST", "/v1/chat/completions") for each in told(server, Served))

    before = chats()  # others' lines may still come: a request is told of after its answer
    value = {"model": "tickets", "messages": [{"role": "user", "content": "the-secret-prompt"}], "max_tokens": 2}
    ask(server, "POST", "/v1/chat/completions?token=the-secret-query", value, bearer("the-secret-key"))
    until(lambda: chats() == before + 1, "the request is told of")
    assert "secret" not in json.dumps([event.as_record() for event in server.events])


def test_every_error_is_counted_once_by_its_status(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> Counter[str]:
        said = ask(server, "GET", "/metrics").body.decode()
        found = re.findall(r'^peftkit_refused_total\{status="(\d+)"\} (\d+)', said, re.MULTILINE)
        return Counter({status: int(number) for status, number in found})

    def broken() -> None:
        raise ZeroDivisionError

    before = counted()
    text = {"model": "nobody", "prompt": "a"}
    for status, (method, path), value, headers in (
        (403, READ, None, {"Origin": EVIL}),
        (404, ("GET", "/nowhere"), None, {}),
        (405, ("PATCH", "/v1/adapters"), None, {}),
        (404, ("POST", "/v1/adapters"), {"model": "nobody"}, {}),
        (404, ("POST", "/v1/completions"), text, {}),
        (415, RELOAD, {}, {"Content-Type": "text/plain"}),
    ):
        assert ask(server, method, path, value, headers).status == status
    with monkeypatch.context() as patch:
        patch.setattr(server.host, "models", broken)
        assert ask(server, *READ).status == 500
    assert counted() - before == {"403": 1, "404": 3, "405": 1, "415": 1, "500": 1}


def test_what_nobody_foresaw_is_told_without_its_words(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*anything: Any) -> None:
        raise ZeroDivisionError("the-secret-prompt")

    del server.events[:]
    monkeypatch.setattr(server.host, "models", broken)
    reply = ask(server, *READ)
    assert (reply.status, reply.error["message"]) == (500, "internal error")
    until(lambda: told(server, Warned) != [], "the error is told of")
    (warned,) = told(server, Warned)
    assert "ZeroDivisionError" in warned.text
    assert "test_guard.py" in warned.text
    assert "secret" not in json.dumps([event.as_record() for event in server.events])


def test_keys_are_never_shown() -> None:
    spec = ServeSpec(api_key=API, admin_key=ADMIN)
    for shown in (repr(spec), str(spec), spec.model_dump_json(), str(spec.model_dump())):
        assert API not in shown
        assert ADMIN not in shown
    with pytest.raises(ConfigError) as wrong:
        ServeSpec.of({"api_key": API, "host": "0.0.0.0", "admin_key": "short", "port": -1, "rows": "x"})
    assert API not in str(wrong.value)
    with pytest.raises(ValueError) as raised:
        ServeSpec(api_key=SecretStr("has a space"))
    assert "has a space" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "openssl rand -hex 24"),
        ({"host": "box.example"}, "there is no api_key"),
        ({"host": "::", "api_key": "0123456789abcde"}, "fewer than 16 characters"),
        ({"host": "0.0.0.0", "api_key": API, "admin_key": "short"}, "admin_key has fewer"),
        ({"host": ""}, "neither an address nor a name"),
        ({"api_key": ""}, "no spaces"),
        ({"api_key": "grün"}, "of ASCII"),
        ({"allow_origins": ["*"]}, "not one origin"),
        ({"allow_origins": ["https://app.example/path"]}, "not one origin"),
        ({"allow_hosts": ["*"]}, "neither an address nor a name"),
        ({"port": 65536}, "port: "),
        ({"rows": 0}, "rows: "),
        ({"read_seconds": float("inf")}, "read_seconds: "),
        ({"default_new_tokens": 9000}, "max_new_tokens 4096"),
        ({"apikey": API}, "apikey: "),
    ],
    ids=str,
)
def test_settings_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        ServeSpec.of(given)
    assert said in str(wrong.value)
