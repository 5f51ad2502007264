"""`peftkit serve` as a user types it, up to where it would listen; tests/serving has it as a process."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.cli import serve
from peftkit.errors import ConfigError
from peftkit.serving.spec import ServeSpec

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (serve.API_KEY, serve.ADMIN_KEY):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "export PEFTKIT_API_KEY=$(openssl rand -hex 24)"),
        (["--host", "no such host"], "neither an address nor a name"),
        (["--port", "70000"], "port: "),
        (["--allow-origin", "*"], "not one origin"),
        (["--allow-host", "http://box"], "neither an address nor a name"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["--admin-key-file", "."], "cannot be read: Is a directory"),
        (["nobody"], "nobody"),
        ([], "neither an adapter nor a base was named"),
        (["--base", "nowhere/at-all"], "nowhere/at-all"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_loaded(cli: Cli, arguments: list[str], said: str) -> None:
    code, out, err = cli("serve", "--port", "0", *arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens"),
        (["--engine", "other"], "--engine"),
        (["--api-key", "secret"], "No such option"),
        (["--", "--max-model-len", "100"], "only vLLM"),
        (["--engine", "vllm", "--other-base"], "its base alone"),
    ],
    ids=str,
)
def test_wrong_usage(cli: Cli, arguments: list[str], said: str) -> None:
    code, _, err = cli("serve", *arguments)
    assert code == 2
    assert said in err


def test_limits_reach_the_settings(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"rows": 3, "waiting": 4, "max_body_bytes": 5 << 20, "max_prompt_tokens": 6, "max_new_tokens": 7}
    taken: dict[str, object] = {}

    def of(given: dict[str, object]) -> None:
        taken.update(given)
        raise ConfigError(["enough"])

    monkeypatch.setattr(ServeSpec, "of", of)
    options = ("--rows=3", "--waiting=4", "--max-body=5", "--max-prompt-tokens=6", "--max-new-tokens=7")
    assert cli("serve", *options)[0] == 1
    assert {name: taken[name] for name in limits} == limits


def test_a_key_comes_from_its_file_or_the_environment_and_is_not_shown(
    cli: Cli, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "key.txt").write_text("too-short-a-key\n")
    code, _, err = cli("serve", "--host", "0.0.0.0", "--api-key-file", "key.txt")
    assert (code, "fewer than 16 characters" in err, "too-short-a-key" in err) == (1, True, False)
    (places / "key.txt").write_bytes(b"\xff\xfe")
    code, _, err = cli("serve", "--api-key-file", "key.txt")
    assert (code, "it is not text" in err) == (1, True)
    monkeypatch.setenv(serve.API_KEY, "has a space")
    code, _, err = cli("serve")
    assert (code, "no spaces" in err, "has a space" in err) == (1, True, False)


def test_a_port_that_is_taken(cli: Cli, adapters: object) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, _, err = cli("serve", "tickets", "--port", port)
    assert (code, f"port {port} is taken by another program" in err, "--port 0 takes a free one" in err) == (
        1,
        True,
        True,
    )


def test_an_address_of_another_machine(cli: Cli, adapters: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.API_KEY, "0123456789abcdef")
    code, _, err = cli("serve", "tickets", "--host", "192.0.2.1", "--port", "0")
    assert (code, "192.0.2.1 is no address of this machine" in err) == (1, True)


def test_a_port_of_the_system(cli: Cli, adapters: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: socket.socket, address: object) -> None:  # root, whom tests may run as, is not refused
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refused)
    code, _, err = cli("serve", "tickets", "--port", "80")
    assert (code, "port 80 is not open to this user" in err, "--port 8000" in err) == (1, True, True)
