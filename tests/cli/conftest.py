"""The command line as a user types it, with registry, runs and cache in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.cli.main import main


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """The folder that holds registry, runs and cache, and that the commands run in."""
    return tmp_path


@pytest.fixture
def cli(
    places: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command; exit code, stdout and stderr come back. An error that peftkit did not foresee fails the test."""
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(places / name))
    monkeypatch.chdir(places)

    def cli(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(arguments))
        out, err = capfd.readouterr()
        assert "bug in peftkit" not in err, err
        return code, out, err

    return cli


@pytest.fixture
def adapters(places: Path, tiny_base: Path) -> dict[str, Any]:
    """Factors of `tickets` of rank 4 and `tone` of rank 2, which leaves `o_proj` alone; both scaled by 2."""
    from cli.published import factors, publish  # torch, which most commands do without

    made = {"tickets": factors(tiny_base, 4, 1), "tone": factors(tiny_base, 2, 2, ["q_proj"])}
    publish(places, tiny_base, "tickets", made["tickets"], alpha=8)
    publish(places, tiny_base, "tone", made["tone"], alpha=4)
    return made
