"""A version that leaves comes back as itself; a stranger's adapter comes in checked, bound to a base, or not at all."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.exchange.conftest import SECRET_ROW
from registry.intake.adapters import sound

from peftkit.base.record import BaseRecord
from peftkit.base.record import decode as decode_record
from peftkit.canonical import strict_json
from peftkit.errors import AdapterDamaged, BaseMismatch, RegistryError
from peftkit.registry import Registry, Version, check, check_root
from peftkit.registry.exchange import ImportBase, export, import_adapter
from peftkit.registry.intake import AdapterRefused

Make = Callable[..., Version]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.chmod(0o644)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(registry: Registry, version: Version, tmp_path: Path) -> Path:
    export(registry, version.reference, tmp_path / "out")
    return tmp_path / "out"


def test_an_export_holds_the_version_byte_for_byte_its_base_and_a_card(
    folder: Path, version: Version, record: BaseRecord
) -> None:
    held = contents(folder)
    assert {name: data for name, data in held.items() if name in contents(version.path)} == contents(version.path)
    assert decode_record(held["base.json"]) == record
    assert set(held) == {*contents(version.path), "base.json", "README.md"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert SECRET_ROW.encode() not in b"".join(held.values())


def test_what_was_exported_imports_as_the_same_version(
    folder: Path, version: Version, other: Registry, record: BaseRecord
) -> None:
    came = import_adapter(other, folder, aliases=["prod"])
    assert came.reference == version.reference
    assert contents(came.path) == contents(version.path)
    assert other.aliases("tickets") == {"latest": version.id, "prod": version.id}
    assert (other.layout.bases / f"{record.id}.json").read_bytes() == record.encode()
    assert check_root(other.root) == {}
    assert list(other.layout.tmp.iterdir()) == []
    assert import_adapter(other, folder).path == came.path


def test_another_name_is_another_version_that_says_where_it_came_from(
    folder: Path, version: Version, other: Registry
) -> None:
    came = import_adapter(other, folder, name="mails")
    assert (came.name, came.id == version.id) == ("mails", False)
    assert came.manifest.receipts[-1]["source"] == version.reference
    assert came.manifest.files == version.manifest.files
    assert came.manifest.metrics == version.manifest.metrics
    assert import_adapter(other, folder, name="mails").id == came.id
    assert other.names() == ["mails"]


def test_a_version_folder_of_a_registry_imports_with_its_base(
    version: Version, other: Registry, base: ImportBase
) -> None:
    with pytest.raises(AdapterDamaged, match=r"lacks base\.json"):
        import_adapter(other, version.path)
    assert import_adapter(other, version.path, base=base).reference == version.reference


@pytest.mark.parametrize("stated", ["embedded:smollm2-135m", "my model"])
def test_an_adapter_of_a_base_without_a_hub_id_comes_back_too(
    make_version: Make, registry: Registry, other: Registry, tmp_path: Path, record: BaseRecord, stated: str
) -> None:
    fields = make_version().manifest.base.model_dump() | {"source": stated}
    version = make_version("own", {"base_model_name_or_path": stated}, base=fields)
    export(registry, "own", tmp_path / "out")
    assert import_adapter(other, tmp_path / "out").id == version.id


def test_an_export_never_writes_over_files(folder: Path, registry: Registry, version: Version, tmp_path: Path) -> None:
    before = contents(folder)
    with pytest.raises(RegistryError, match=r"is not empty: it holds .*README\.md"):
        export(registry, "tickets", folder)
    assert contents(folder) == before
    with pytest.raises(RegistryError, match="inside the registry"):
        export(registry, "tickets", registry.root / "out")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(RegistryError, match="not a folder"):
        export(registry, "tickets", tmp_path / "link")
    (tmp_path / "empty").mkdir()
    export(registry, "tickets", tmp_path / "empty")
    assert contents(tmp_path / "empty") == before


def test_a_damaged_version_is_not_exported(registry: Registry, version: Version, tmp_path: Path) -> None:
    weights = version.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(AdapterDamaged, match="digest"):
        export(registry, "tickets", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    moved = path.rename(path.with_suffix(".moved"))
    path.symlink_to(moved)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("adapter_model.safetensors", flip, "was changed"),
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8]), "beyond|header|bytes"),
        ("adapter_model.safetensors", Path.unlink, "lacks adapter_model"),
        ("adapter_model.safetensors", link, "symbolic link"),
        ("adapter_config.json", lambda path: edit(path, lambda value: value.update(r=4)), "rank"),
        ("base.json", flip, "record"),
        ("base.json", Path.unlink, r"lacks base\.json"),
        ("base.json", link, "cannot be read"),
        ("manifest.json", link, "cannot be read"),
        ("manifest.json", lambda path: path.write_bytes(b'{"format":"peftkit/1","format":"x"}'), "twice"),
        ("manifest.json", lambda path: edit(path, lambda value: value.update(format="peftkit/9")), "peftkit/9"),
        ("manifest.json", lambda path: edit(path, lambda value: value.update(more=1)), "more"),
        ("manifest.json", lambda path: edit(path, lambda value: value.update(name="../x")), "cannot be used"),
        (
            "manifest.json",
            lambda path: edit(path, lambda v: v["files"].update({"../x.json": {"sha256": "0" * 64, "bytes": 1}})),
            r"\.\./x\.json",
        ),
        (
            "manifest.json",
            lambda path: edit(path, lambda v: v["files"].update({"tokenizer.json": {"sha256": "0" * 64, "bytes": 1}})),
            "brings nothing else in",
        ),
        ("manifest.json", lambda path: edit(path, lambda v: v["base"]["parts"].update(weights="0" * 64)), "different"),
    ],
)
def test_an_export_that_was_tampered_with_changes_nothing(
    folder: Path, other: Registry, name: str, change: Callable[[Path], object], says: str
) -> None:
    change(folder / name)
    with pytest.raises(RegistryError, match=says):
        import_adapter(other, folder)
    assert other.names() == []
    assert list(other.root.rglob("tmp/*")) == []
    assert not other.layout.bases.exists()


def test_nothing_of_an_exported_adapter_may_be_rewritten(
    make_version: Make, registry: Registry, other: Registry, tmp_path: Path
) -> None:
    make_version(config={"init_lora_weights": "gaussian", "base_model_name_or_path": "/home/someone/base"})
    export(registry, "tickets", tmp_path / "out")
    with pytest.raises(RegistryError, match="may not keep: base_model_name_or_path, init_lora_weights"):
        import_adapter(other, tmp_path / "out")
    assert other.names() == []


def test_a_base_that_is_not_the_recorded_one_is_refused(folder: Path, other: Registry, record: BaseRecord) -> None:
    another = BaseRecord({"model_type": "qwen"}, record.tokenizer, record.special_tokens, None, record.tensors)
    with pytest.raises(BaseMismatch, match="model_type"):
        import_adapter(other, folder, base=ImportBase(another, "someone/else"))


def test_a_plain_peft_checkpoint_comes_in_bound_to_the_base_that_was_named(
    other: Registry, base: ImportBase, tmp_path: Path, record: BaseRecord
) -> None:
    adapter = sound()
    adapter.config["init_lora_weights"] = "gaussian"
    adapter.after = lambda folder: (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    source = adapter.write(tmp_path / "My Adapter")
    came = import_adapter(other, source, base=base)
    assert came.name == "my-adapter"
    assert check(came) == []
    manifest = came.manifest
    assert manifest.base.record == record.id
    assert (manifest.base.source, manifest.base.license) == ("someone/base", "apache-2.0")
    assert manifest.base.parts == record.parts()
    assert {"method": "lora", "r": 2, "lora_alpha": 4}.items() <= manifest.adapter.items()
    (receipt,) = manifest.receipts
    assert (receipt["type"], receipt["source"], receipt["bound"]) == ("import", "My Adapter", "user")
    assert "gaussian" in str(receipt["notes"])
    assert "optimizer.pt" in str(receipt["left_out"])
    stored = strict_json((came.path / "adapter_config.json").read_bytes())
    assert stored["init_lora_weights"] is True
    assert str(tmp_path) not in (came.path / "manifest.json").read_text()


def test_the_config_may_name_the_base_where_it_is_found(other: Registry, base: ImportBase, tmp_path: Path) -> None:
    source = sound().write(tmp_path / "adapter")
    asked: list[str] = []
    with pytest.raises(RegistryError, match="names someone/base, which is not on this machine") as caught:
        import_adapter(other, source, find_base=lambda stated: asked.append(stated))
    assert "--base" in str(caught.value)
    came = import_adapter(other, source, find_base=lambda stated: base)
    assert asked == ["someone/base"]
    assert came.manifest.receipts[0]["bound"] == "config"


def test_what_intake_refuses_does_not_come_in(other: Registry, base: ImportBase, tmp_path: Path) -> None:
    adapter = sound()
    adapter.config["auto_map"] = "x"
    with pytest.raises(AdapterRefused, match=r"config\.auto-map"):
        import_adapter(other, adapter.write(tmp_path / "a"), base=base)
    with pytest.raises(AdapterRefused, match=r"source\.missing"):
        import_adapter(other, tmp_path)
    with pytest.raises(AdapterRefused, match=r"source\.not-folder"):
        import_adapter(other, tmp_path / "nowhere")
    assert other.names() == []


CALLS = [(os, "rename"), (os, "link"), (os, "fsync"), (os, "open"), (os, "mkdir"), (os, "fchmod"), (builtins, "open")]


@pytest.mark.parametrize("foreign", [False, True])
def test_an_import_that_fails_anywhere_leaves_the_old_state_or_the_new_one(
    folder: Path, other: Registry, base: ImportBase, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    if foreign:
        (folder / "manifest.json").unlink()
    calls = 0

    def at(number: int) -> Callable[..., Any]:
        def guard(true: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return true(*args, **options)

            return call

        return guard

    step, finished = 1, False
    while not finished:
        shutil.rmtree(other.root, ignore_errors=True)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            for module, name in CALLS:
                patch.setattr(module, name, at(step)(getattr(module, name)))
            try:
                import_adapter(other, folder, name="tickets", base=base)
                finished = calls < step
            except (RegistryError, OSError):
                pass
        problems = {where: found for where, found in check_root(other.root).items() if "cut off" not in found[0]}
        assert problems == {}, step
        for version in other.versions("tickets") if other.names() else []:
            assert check(version) == []
        step += 1
    assert other.names() == ["tickets"]
    assert step > 60
