"""Fixtures of all tests: a tiny real base made on the spot, the embedded base, and a network that is not there."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bases import write_base

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two OpenMP threads each on two cores spend their time waiting for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection: a tiny run collects after each measurement, which takes
    longer than its steps where much is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs without a network: connecting or looking a name up fails loudly.

    A test marked `loopback` reaches 127.0.0.1, where it runs a server of its own, and nothing else. A socket in a
    folder is no network.
    """
    loopback = request.node.get_closest_marker("loopback") is not None

    def guarded(true: Callable[..., Any], host: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            in_a_folder = isinstance(args[0], socket.socket) and args[0].family == socket.AF_UNIX
            if in_a_folder or (loopback and host(*args) == "127.0.0.1"):
                return true(*args, **kwargs)
            raise AssertionError(f"a test tried to reach the network: {args!r}")

        return call

    for name in ("connect", "connect_ex"):
        true = getattr(socket.socket, name)
        monkeypatch.setattr(socket.socket, name, guarded(true, lambda self, address: address[0]))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *rest: host))


@pytest.fixture(scope="session")
def cache() -> Path:
    """The cache that `make setup` filled; the embedded base is in it."""
    from peftkit import locations

    return locations.cache_root().path


@pytest.fixture(scope="session")
def embedded(cache: Path) -> Path:
    """Folder of the embedded base; skipped, and counted, where `make setup` did not run."""
    from peftkit.backbone.locate import locate
    from peftkit.base import embedded as shipped
    from peftkit.base.ref import BaseSpec

    if not shipped.gguf_path("smollm2-135m", cache).exists():
        pytest.skip("the embedded base is not in the cache: run `make setup`")
    return locate(BaseSpec(), cache).folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real data sets, named by PEFTKIT_TEST_DATA; skipped, and counted, without it."""
    folder = os.environ.get("PEFTKIT_TEST_DATA")
    if not folder:
        pytest.skip("PEFTKIT_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama base with a ChatML template."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny")
