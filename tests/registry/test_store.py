from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry import Draft, Registry, Version, check, check_root, manifest


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def published(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    count: int,
    name: str = "tickets",
) -> list[Version]:
    return [
        registry.publish(name, make_payload(seed=n), make_draft(created=f"2026-01-{n + 1:02}T00:00:00Z"))
        for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["peft", "tensors"])
def test_round_trip(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], kind: str
) -> None:
    source, draft = make_payload(kind), make_draft(kind, metrics={"other": {"ü": [1, None, 0.1, "x"]}})
    version = registry.publish("tickets", source, draft, aliases=["prod"])
    again = Registry(registry.root).resolve("tickets")
    assert again == version
    assert again.reference == f"tickets@{version.id}"
    assert again.path == registry.root / "tickets" / "versions" / version.id
    for field in type(draft).model_fields:
        assert getattr(again.manifest, field) == getattr(draft, field), field
    copied = {name: data for name, data in everything(again.path).items() if name != "manifest.json"}
    assert copied == everything(source)
    assert set(again.manifest.files) == set(copied)
    assert registry.aliases("tickets") == {"latest": version.id, "prod": version.id}
    assert check(again) == []
    assert check_root(registry.root) == {}
    assert registry.names() == ["tickets"]
    assert registry.list() == [version] == registry.versions("tickets")


def test_creating_and_reading_write_nothing(registry: Registry) -> None:
    assert registry.names() == []
    assert registry.list() == []
    with pytest.raises(AdapterNotFound, match="registry is empty"):
        registry.resolve("tickets")
    with pytest.raises(AdapterNotFound):
        registry.tag("tickets", "prod")
    assert not registry.root.exists()


def test_a_version_is_written_once(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft())
    for path in version.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    before = {path: path.stat().st_mtime_ns for path in [version.path, *version.path.iterdir()]}
    assert registry.publish("tickets", make_payload(), make_draft()) == version
    assert before == {path: path.stat().st_mtime_ns for path in [version.path, *version.path.iterdir()]}
    assert len(registry.versions("tickets")) == 1
    assert list((registry.root / "tmp").iterdir()) == []


def test_same_content_over_a_damaged_version_is_an_error(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft())
    target = version.path / "adapter_model.safetensors"
    target.chmod(0o644)
    target.write_bytes(target.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterDamaged, match="digest"):
        registry.publish("tickets", make_payload(), make_draft())


def test_a_second_publish_makes_a_second_version_and_moves_latest(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    first, second = published(registry, make_payload, make_draft, 2)
    assert first.id != second.id
    assert registry.versions("tickets") == [second, first]
    assert registry.resolve("tickets") == registry.resolve("tickets@latest") == second
    assert check(first) == check(second) == []
    moves = [(move.alias, move.number, move.version) for move in registry.history("tickets")]
    assert moves == [("latest", 1, first.id), ("latest", 2, second.id)]


@pytest.mark.parametrize("change", [{"environment": {"torch": "3"}}, {"created": "2027-01-01T00:00:00Z"}])
def test_the_id_covers_the_draft(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], change: Any
) -> None:
    ids = {registry.publish("tickets", make_payload(), draft).id for draft in (make_draft(), make_draft(**change))}
    assert len(ids) == 2


def test_resolve_by_prefix_and_alias(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    first, second = published(registry, make_payload, make_draft, 2)
    assert registry.tag(f"tickets@{first.id[:6]}", "prod") == first
    assert registry.resolve("tickets@prod") == registry.resolve(first.reference) == first
    assert registry.tag("tickets", "prod") == second
    assert registry.resolve("tickets@prod") == second
    assert registry.tag(first.reference, "latest") == first
    assert registry.resolve("tickets") == first


def test_an_ambiguous_prefix_names_its_matches(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true_id = manifest.compute_id
    monkeypatch.setattr(manifest, "compute_id", lambda fields: "abcd" + true_id(fields)[:12])
    ids = sorted(version.id for version in published(registry, make_payload, make_draft, 2))
    with pytest.raises(RegistryError, match=f"2 versions: {ids[0]}, {ids[1]}") as caught:
        registry.resolve("tickets@abcd")
    assert not isinstance(caught.value, AdapterNotFound)
    assert registry.resolve(f"tickets@{ids[1]}").id == ids[1]


def test_not_found_says_what_there_is(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (version,) = published(registry, make_payload, make_draft, 1)
    registry.publish("sql", make_payload(), make_draft(), aliases=["prod"])
    with pytest.raises(AdapterNotFound, match=r"did you mean tickets\?\n.*sql, tickets\n.*peftkit list"):
        registry.resolve("tickest")
    with pytest.raises(AdapterNotFound, match=r"did you mean sql@prod\?"):
        registry.resolve("sql@prd")
    with pytest.raises(AdapterNotFound, match=f"starts with 0000\n.*{version.id}"):
        registry.resolve("tickets@0000")


def test_a_damaged_alias_stops_only_itself_and_can_be_mended(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (version,) = published(registry, make_payload, make_draft, 1)
    registry.tag("tickets", "prod")
    for number, text in enumerate(("", "garbage\n", "0" * 16 + "\n", "[1]", "[" * 99_999), start=1):
        path = registry.root / f"tickets/aliases/prod/{number:08d}"
        path.chmod(0o644)
        path.write_text(text)
        with pytest.raises(AdapterDamaged, match="peftkit tag tickets@VERSION prod"):
            registry.resolve("tickets@prod")
        assert registry.resolve("tickets") == version
        assert set(check_root(registry.root)) == {"tickets@prod"}
        assert registry.tag("tickets", "prod") == version == registry.resolve("tickets@prod")
        problems = check_root(registry.root)["tickets@prod"]
        assert len(problems) == number, "what was damaged stays named, the records after it are sound"


def test_a_cut_off_first_publish_is_no_name_yet(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (version,) = published(registry, make_payload, make_draft, 1)
    (registry.root / "tickets/aliases/latest/00000001").unlink()
    assert registry.names() == []
    assert "tickets" in check_root(registry.root)
    with pytest.raises(AdapterNotFound, match=f"peftkit tag {version.reference} latest"):
        registry.resolve("tickets")
    registry.tag(version.reference, "latest")
    assert registry.list() == [version]


def test_a_missing_marker_is_told(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (version,) = published(registry, make_payload, make_draft, 1)
    marker = registry.root / "registry.json"
    text = marker.read_bytes()
    marker.unlink()
    with pytest.raises(RegistryError, match=r"format is unknown\n.*\n.*echo") as caught:
        registry.names()
    assert text.decode().strip() in str(caught.value)
    assert set(check_root(registry.root)) == {"registry.json"}
    marker.write_bytes(text)
    assert registry.list() == [version]


def test_a_reader_beside_the_first_writer_sees_an_empty_or_a_sound_registry(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole first publish happens between two looks of the reader: for the marker, and for adapters."""
    true_is_file, published_now = Path.is_file, []

    def is_file(path: Path) -> bool:
        found = true_is_file(path)
        if path == registry.layout.marker and not published_now:
            published_now.append(path)
            published(registry, make_payload, make_draft, 1)
        return found

    monkeypatch.setattr(Path, "is_file", is_file)
    assert registry.names() == ["tickets"]
    assert len(published_now) == 1


def test_a_busy_lock_is_explained(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    published(registry, make_payload, make_draft, 1)
    impatient = Registry(registry.root, lock_timeout=0.05)
    with (
        registry.writing("hold the lock"),
        pytest.raises(RegistryError, match=rf"locked for 0.05 seconds by process {os.getpid()} on .*hold the lock"),
    ):
        impatient.tag("tickets", "prod")
    impatient.tag("tickets", "prod")


def test_a_vanished_version_is_not_there_and_an_alias_on_it_is_damaged(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    first, second = published(registry, make_payload, make_draft, 2)
    shutil.rmtree(second.path)
    with pytest.raises(AdapterNotFound, match=f"{second.id} is not there\n.*{first.id}"):
        registry.load("tickets", second.id)
    with pytest.raises(AdapterDamaged, match=f"points at the version {second.id}, which is not there"):
        registry.resolve("tickets")
    assert registry.versions("tickets") == [first]


def test_an_alias_that_moves_on_while_it_is_read_is_read_again(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader holds no lock: between its two steps the alias may move on and the old version may be removed."""
    first, second = published(registry, make_payload, make_draft, 2)
    registry.restore("tickets")
    true_load, calls = Registry.load, []

    def load(self: Registry, name: str, version_id: str) -> Version:
        calls.append(version_id)
        if len(calls) == 1:
            Registry(registry.root).tag(second.reference, "latest")
            shutil.rmtree(first.path)
            calls[:] = [version_id]
        return true_load(self, name, version_id)

    monkeypatch.setattr(Registry, "load", load)
    assert registry.resolve("tickets") == second
    assert calls == [first.id, second.id]


def test_import_is_light() -> None:
    code = (
        "import sys, peftkit.registry; heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'safetensors'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
