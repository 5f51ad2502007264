from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftkit.registry
from peftkit.errors import AdapterDamaged
from peftkit.registry import Draft, Registry, check, check_root
from peftkit.registry.verify import check_folder

FORMAT_PAGE = Path(peftkit.registry.__file__).parent / "FORMAT.md"


def rewrite(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["peft", "tensors"])
def test_a_bit_flip_anywhere_is_found(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], kind: str
) -> None:
    version = registry.publish("tickets", make_payload(kind), make_draft(kind))
    flipped = 0
    for path in sorted(version.path.rglob("*")):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 40)):
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            rewrite(path, bytes(changed))
            # White space between the manifest's fields carries no meaning; everything else must be noticed.
            same = path.name == "manifest.json" and equal_json(data, bytes(changed))
            assert same or check(version), f"{path.name} byte {at}"
            assert same or list(check_root(registry.root)) == [version.reference]
            flipped += not same
        rewrite(path, data)
        assert check(version) == []
    assert flipped > 80


def equal_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


DAMAGE: dict[str, Callable[[Path], object]] = {
    "is missing": lambda folder: (folder / "adapter_config.json").unlink(),
    "is not in the manifest": lambda folder: rewrite(folder / "extra.json", b"{}"),
    "were published": lambda folder: rewrite(folder / "adapter_model.safetensors", b"short"),
    "has the digest": lambda folder: rewrite(
        folder / "adapter_config.json", (folder / "adapter_config.json").read_bytes().replace(b"2", b"3")
    ),
    "is not a plain file": lambda folder: (folder / "link.json").symlink_to("/etc/passwd"),
    "is an empty folder": lambda folder: (folder / "sub").mkdir(),
    "was changed": lambda folder: rewrite(
        folder / "manifest.json", (folder / "manifest.json").read_bytes().replace(b"Qwen3-4B", b"Qwen3-8B")
    ),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").unlink(),
    "is not a JSON object": lambda folder: rewrite(folder / "manifest.json", b"[]"),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_each_damage_has_its_sentence(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], sentence: str
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft())
    DAMAGE[sentence](version.path)
    problems = check(version)
    assert len(problems) == 1
    assert sentence in problems[0]
    assert problems[0].endswith(".")
    assert bool(check(version, read_data=False)) is (sentence != "has the digest")


def forge(folder: Path, change: Any) -> Path:
    """A manifest changed by someone who also computes the right id: only the content checks are left to notice."""
    fields = json.loads((folder / "manifest.json").read_bytes())
    del fields["id"]
    change(fields)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    fields["id"] = hashlib.sha256(text).hexdigest()[:16]
    rewrite(folder / "manifest.json", json.dumps(fields).encode())
    return folder.rename(folder.with_name(fields["id"]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.update(surprise=1), "surprise"),
        (lambda f: f.update(name="sql"), "belongs to the adapter 'sql'"),
        (
            lambda f: f["files"].update({"../../x.json": {"sha256": "0" * 64, "bytes": 1}}),
            "cannot be part of an adapter",
        ),
        (lambda f: f.update(format=2), "format 2, this peftkit reads format 1"),
        (lambda f: f.update(kind="tensors"), "does not name tensors.safetensors"),
        (lambda f: f["base"].pop("fingerprint"), "base.fingerprint"),
    ],
)
def test_a_forged_manifest(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], change: Any, sentence: str
) -> None:
    folder = forge(registry.publish("tickets", make_payload(), make_draft()).path, change)
    problems = check_folder(folder, "tickets", folder.name)
    assert sentence in problems[0]
    if sentence != "does not name tensors.safetensors":
        with pytest.raises(Exception, match=re.escape(sentence)):
            registry.resolve(f"tickets@{folder.name}")


def test_files_with_right_digests_and_wrong_content(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    folder = registry.publish("tickets", make_payload(), make_draft()).path
    for relative, data, sentence in (
        ("adapter_model.safetensors", struct.pack("<Q", 2) + b"{}" + b"hole", "4 bytes of tensors"),
        ("adapter_config.json", b'{"r": NaN}', "is not JSON"),
    ):
        good = (folder / relative).read_bytes()
        rewrite(folder / relative, data)
        digest = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        folder = forge(folder, lambda fields, r=relative, d=digest: fields["files"].update({r: d}))
        (problem,) = check_folder(folder, "tickets", folder.name)
        assert sentence in problem
        rewrite(folder / relative, good)
        digest = {"sha256": hashlib.sha256(good).hexdigest(), "bytes": len(good)}
        folder = forge(folder, lambda fields, r=relative, d=digest: fields["files"].update({r: d}))
        assert check_folder(folder, "tickets", folder.name) == []


def test_a_damaged_manifest_is_never_returned(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft())
    data = (version.path / "manifest.json").read_bytes()
    for changed in (b"", data[:100], data.replace(b"2.5", b"2.6"), data.replace(b"10", b"1e999"), b"[" * 99999):
        assert changed != data
        rewrite(version.path / "manifest.json", changed)
        with pytest.raises(AdapterDamaged, match="peftkit verify tickets"):
            registry.resolve("tickets")


def plain_read(root: Path, name: str) -> dict[str, Any]:
    """A reader written from FORMAT.md with nothing but the standard library."""
    assert json.loads((root / "registry.json").read_bytes()) == {"format": 1}
    version_id = (root / name / "aliases/latest").read_text().removesuffix("\n")
    folder = root / name / "versions" / version_id
    fields: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    assert fields.pop("id") == version_id
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    assert hashlib.sha256(canonical).hexdigest()[:16] == version_id
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del found["manifest.json"]
    assert {path: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for path, d in found.items()} == fields[
        "files"
    ]
    return fields


@pytest.mark.parametrize("kind", ["peft", "tensors"])
def test_a_standard_library_reader_reads_each_kind(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], kind: str
) -> None:
    registry.publish(
        "tickets", make_payload(kind), make_draft(kind, metrics={"other": {"ü€😀": [1e-7, 1e22, -0.0, 10**20]}})
    )
    fields = plain_read(registry.root, "tickets")
    page = FORMAT_PAGE.read_text()
    section = page.split("## 5.")[1].split("## 6.")[0]
    named = {cell.split(".")[0] for cell in re.findall(r"^\| `([a-z_.]+)`", section, re.M)}
    assert named == {*fields, "id"}, "FORMAT.md lists exactly the fields of a manifest"


def test_the_loader_printed_in_the_format_page_works(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(), re.S)
    assert len(code.strip().splitlines()) <= 22
    scope: dict[str, Any] = {}
    exec(code, scope)
    version = registry.publish("heads", make_payload("tensors", seed=3), make_draft("tensors"))
    assert scope["load"](version.path) == {
        "a": ("F32", [4], struct.pack("<4f", 3, 4, 5, 6)),
        "b": ("F32", [2], bytes(8)),
    }
    path = version.path / "tensors.safetensors"
    rewrite(path, path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AssertionError, match="tensors were changed"):
        scope["load"](version.path)


def test_safetensors_reads_what_was_published(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    safetensors = pytest.importorskip("safetensors")
    version = registry.publish("tickets", make_payload(), make_draft())
    data = (version.path / "adapter_model.safetensors").read_bytes()
    assert {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(data)} == {
        "a": struct.pack("<4f", 0, 1, 2, 3),
        "b": bytes(8),
    }
