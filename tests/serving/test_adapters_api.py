"""`/v1/adapters` over a real socket: what is served, and changing it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from generation.adapters_lab import Lab, damage
from serving.host_lab import files
from serving.server_lab import Server, serving

from peftkit.registry.store import Version

pytestmark = pytest.mark.loopback


@pytest.fixture(scope="module")
def chairs(lab: Lab) -> tuple[Version, Version]:
    """Two versions of `chair`; `chair@prod` is the first one, `chair@damaged` cannot be used."""
    bad = lab.lora("chair", 502)
    one, two = lab.lora("chair", 500), lab.lora("chair", 501)
    damage(bad.path / "adapter_model.safetensors")
    lab.registry.tag(bad.reference, "damaged")
    lab.registry.tag(one.reference, "prod")
    return one, two


@pytest.fixture
def server(lab: Lab, chairs: tuple[Version, Version]) -> Iterator[Server]:
    with serving(lab, ["chair@prod"]) as running:
        yield running


def call(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}{path}", data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def models(server: Server) -> dict[str, str]:
    _, said = call(server, "GET", "/v1/adapters")
    return {each["model"]: each["version"] for each in said["data"]}


def test_what_is_served_and_what_the_registry_says(server: Server, chairs: tuple[Version, Version]) -> None:
    one, two = chairs
    status, said = call(server, "GET", "/v1/adapters")
    (chair,) = said["data"]
    since = chair.pop("since")
    assert status == 200
    assert isinstance(since, int)
    assert chair == {
        "model": "chair@prod", "name": "chair", "version": one.id, "trouble": None,
        "registry": {"version": one.id, "aliases": server.host.registry.aliases("chair")},
    }  # fmt: skip
    assert chair["registry"]["aliases"]["latest"] == two.id


def test_attach_move_restore_reload_and_detach(server: Server, lab: Lab, chairs: tuple[Version, Version]) -> None:
    one, two = chairs
    status, said = call(server, "POST", "/v1/adapters", {"model": "chair"})
    assert (status, [each["model"] for each in said["data"]]) == (201, ["chair"])
    assert models(server) == {"chair@prod": one.id, "chair": two.id}
    status, said = call(server, "PUT", "/v1/adapters/chair/aliases/prod", {"version": two.id[:8]})
    assert (status, [(each["model"], each["version"]) for each in said["data"]]) == (200, [("chair@prod", two.id)])
    assert lab.registry.resolve("chair@prod") == two
    status, said = call(server, "POST", "/v1/adapters/chair/aliases/prod/restore")
    assert (status, [each["version"] for each in said["data"]]) == (200, [one.id])
    status, said = call(server, "POST", "/v1/adapters/chair/aliases/prod/restore", {"to": 2})
    assert (status, [each["version"] for each in said["data"]]) == (200, [two.id])
    lab.registry.tag(one.reference, "prod")
    assert models(server)["chair@prod"] == two.id
    assert call(server, "POST", "/v1/adapters/reload", {"model": "chair@prod"})[0] == 200
    assert models(server)["chair@prod"] == one.id
    status, said = call(server, "POST", "/v1/adapters/reload")
    assert (status, len(said["data"])) == (200, 2)
    assert call(server, "DELETE", "/v1/adapters/chair@prod") == (200, {"model": "chair@prod", "detached": True})
    assert models(server) == {"chair": two.id}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "said"),
    [
        ("POST", "", {"modell": "sql"}, 400, None, "did you mean 'model'"),
        ("POST", "", {}, 400, None, "model is missing"),
        ("POST", "", {"model": 3}, 400, None, "expected a string"),
        ("POST", "", b"{", 400, "invalid_json", "JSON"),
        ("POST", "", [], 400, "invalid_json", "expected a JSON object"),
        ("POST", "", {"model": "nobody"}, 404, "model_not_found", "no adapter is called 'nobody'"),
        ("POST", "", {"model": "base"}, 400, None, "'base' is the base"),
        ("POST", "", {"model": "No/Body"}, 400, None, "cannot be used"),
        ("POST", "", {"model": "chair@damaged"}, 500, "adapter_damaged", "is damaged"),
        ("DELETE", "/sql", None, 404, "model_not_found", "'sql' is not served"),
        ("POST", "/reload", {"model": "sql"}, 404, "model_not_found", "'sql' is not served"),
        ("POST", "/reload", {"models": "sql"}, 400, None, "did you mean 'model'"),
        ("PUT", "/chair/aliases/prod", {}, 400, None, "version is missing"),
        ("PUT", "/chair/aliases/prod", {"version": "0000"}, 404, "model_not_found", "starts with 0000"),
        ("PUT", "/chair/aliases/prod", {"version": "damaged"}, 500, "adapter_damaged", "is damaged"),
        ("PUT", "/chair/aliases/PROD", {"version": "latest"}, 400, None, "cannot be used"),
        ("PUT", "/sql/aliases/prod", {"version": "latest"}, 404, "model_not_found", "'sql' is not served"),
        ("POST", "/chair/aliases/prod/restore", {"to": 77}, 404, "model_not_found", "no record 77"),
        ("POST", "/chair/aliases/prod/restore", {"to": -1}, 400, None, "expected a whole number"),
        ("POST", "/chair/aliases/prod/restore", {"too": 1}, 400, None, "did you mean 'to'"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(
    method: str, path: str, body: Any, status: int, code: str | None, said: str, fixed: Server, lab: Lab
) -> None:
    before = files(lab.registry.root), models(fixed)
    found, answer = call(fixed, method, f"/v1/adapters{path}", body)
    assert (found, answer["error"]["code"]) == (status, code), answer
    assert said in answer["error"]["message"]
    assert (files(lab.registry.root), models(fixed)) == before


@pytest.fixture(scope="module")
def fixed(lab: Lab, chairs: tuple[Version, Version]) -> Iterator[Server]:
    """One server for all that must change nothing."""
    with serving(lab, ["chair@prod"]) as running:
        yield running


def test_a_trouble_is_shown_with_what_the_registry_says(
    server: Server, lab: Lab, chairs: tuple[Version, Version]
) -> None:
    folder = lab.registry.layout.adapter("chair")
    folder.rename(lab.folder / "chair-away")
    try:
        call(server, "POST", "/v1/adapters/reload")
        (chair,) = call(server, "GET", "/v1/adapters")[1]["data"]
    finally:
        (lab.folder / "chair-away").rename(folder)
    assert chair["version"] == lab.registry.resolve("chair@prod").id
    assert "no adapter is called 'chair'" in chair["trouble"]
    assert chair["registry"]["version"] is None
    assert "no adapter is called 'chair'" in chair["registry"]["error"]
