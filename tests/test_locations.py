"""Where things live: flag > variable > checkout > user folder; and nothing is created by asking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.errors import ConfigError
from peftkit.locations import Located, cache_root, registry_root, runs_root

ROOTS = {"registry": registry_root, "runs": runs_root, "cache": cache_root}
EVERY = pytest.mark.parametrize(("name", "root"), ROOTS.items(), ids=ROOTS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and an empty current folder in it."""
    for name in ("PEFTKIT_REGISTRY", "PEFTKIT_RUNS", "PEFTKIT_CACHE", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def checkout(here: Path, marker: str) -> None:
    (here / "adapters").mkdir()
    if marker == "registry.json":
        (here / "adapters" / "registry.json").write_text("{}")
    if marker == "pyproject":
        (here / "pyproject.toml").write_text('[project]\nname = "peftkit"\n')
    if marker == "readme":
        (here / "adapters" / "README.md").touch()
        (here / "adapters" / ".gitignore").touch()


@EVERY
def test_the_flag_wins_then_the_variable(name: str, root: Callable, home: Path, monkeypatch) -> None:
    checkout(home / "here", "pyproject")
    variable = f"PEFTKIT_{name.upper()}"
    monkeypatch.setenv(variable, "~/by_env")
    assert root("by_flag") == Located(home / "here/by_flag", f"--{name}")
    assert root() == Located(home / "by_env", variable)
    monkeypatch.setenv(variable, "")
    assert root().reason != variable


@pytest.mark.parametrize("marker", ["registry.json", "pyproject", "readme"])
def test_a_checkout_holds_adapters_and_runs_but_no_cache(marker: str, home: Path) -> None:
    checkout(home / "here", marker)
    assert registry_root() == Located(home / "here/adapters", "./adapters of this checkout")
    assert runs_root() == Located(home / "here/runs", "./runs of this checkout")
    assert cache_root().path == home / ".cache/peftkit"


@pytest.mark.parametrize("pyproject", [None, '[project]\nname = "other"\n', "project = 3\n", "[broken", "\x00"])
def test_a_folder_that_is_merely_called_adapters_is_left_alone(pyproject: str | None, home: Path) -> None:
    checkout(home / "here", "none")
    if pyproject is not None:
        (home / "here/pyproject.toml").write_text(pyproject)
    (home / "here/adapters/README.md").touch()
    (home / "here/runs").mkdir()
    assert registry_root().path == home / ".local/share/peftkit/adapters"
    assert runs_root().path == home / ".local/share/peftkit/runs"


def test_the_users_folders_follow_xdg_and_ignore_relative_ones(home: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert registry_root() == Located(home / "data/peftkit/adapters", "XDG_DATA_HOME, the user's folder")
    assert runs_root().path == home / "data/peftkit/runs"
    assert cache_root() == Located(home / ".cache/peftkit", "the user's folder, ~/.cache")


@EVERY
def test_asking_creates_nothing(name: str, root: Callable, home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert not root().path.exists()
    assert sorted(home.rglob("*")) == before


@EVERY
def test_an_empty_flag_and_an_unknown_user_are_errors(name: str, root: Callable, home: Path) -> None:
    with pytest.raises(ConfigError, match=f"--{name}: must name a folder"):
        root("")
    with pytest.raises(ConfigError, match=f"--{name}: ~nobody_here_by_that_name/x cannot be expanded"):
        root("~nobody_here_by_that_name/x")
