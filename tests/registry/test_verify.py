from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import Draft, Registry, bases, check, check_root
from peftkit.registry.verify import check_folder


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
            assert check(version), f"{path.name} byte {at}"
            assert list(check_root(registry.root)) == [version.reference]
            flipped += 1
        rewrite(path, data)
        assert check(version) == []
    assert flipped > 80


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
    changed = change(fields)
    written = json.dumps(changed if changed == [fields] else fields).encode()
    rewrite(folder / "manifest.json", written)
    return folder.rename(folder.with_name(hashlib.sha256(written).hexdigest()[:16]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.update(surprise=1), "surprise"),
        (lambda f: f.update(name="sql"), "belongs to the adapter 'sql'"),
        (
            lambda f: f["files"].update({"../../x.json": {"sha256": "0" * 64, "bytes": 1}}),
            "cannot be part of an adapter",
        ),
        (lambda f: f.update(format="peftkit/2"), "format 'peftkit/2', this peftkit reads format 'peftkit/1'"),
        (lambda f: f.update(format=1), "format 1, this peftkit reads format 'peftkit/1'"),
        (lambda f: f.update(kind="tensors"), "does not name tensors.safetensors"),
        (lambda f: f["base"].pop("fingerprint"), "base.fingerprint"),
        (lambda f: f["base"].update(fingerprint="f"), "base.fingerprint"),
        (lambda f: f["base"].update(parts={"surprise": "3" * 64}), "base.parts"),
        (lambda f: f["base"].pop("license"), "base: a field is missing"),
        (lambda f: f.pop("created"), "created: a field is missing"),
        (lambda f: f.pop("receipts"), "receipts: a field is missing"),
        (lambda f: f.update(created="2026-01-31T10:30:00+01:00"), "created: a field is missing or spelt in another"),
        (lambda f: [f], "is not a JSON object"),
        (lambda f: f["base"].update(record="0" * 16), "names the base record 0000000000000000, which is missing"),
    ],
)
def test_a_forged_manifest(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], change: Any, sentence: str
) -> None:
    folder = forge(registry.publish("tickets", make_payload(), make_draft()).path, change)
    (problem,) = check_root(registry.root)[f"tickets@{folder.name}"][:1]
    assert sentence in problem
    if "base record" in sentence:
        with pytest.raises(AdapterDamaged, match=r"0000000000000000.json cannot be read(.|\n)*publish an adapter"):
            bases.record_of(registry.resolve(f"tickets@{folder.name}"))
    elif sentence != "does not name tensors.safetensors":
        with pytest.raises(RegistryError, match=re.escape(sentence)):
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


def test_a_version_that_is_removed_while_it_is_checked(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Verify holds no lock: nothing is raised, and a version that is gone is no damage of the registry."""
    version = registry.publish("tickets", make_payload(), make_draft())
    registry.publish("tickets", make_payload(seed=1), make_draft())
    kept, aside = version.path, registry.root / "tmp/aside"
    true_walk, walked = os.walk, []

    def walk(folder: Path) -> Iterator[Any]:
        found = list(true_walk(folder))
        if folder == kept:
            walked.append(folder)
            kept.rename(aside)
        yield from found

    monkeypatch.setattr(os, "walk", walk)
    assert "manifest.json cannot be read" in " ".join(check(version))
    aside.rename(kept)
    assert check_root(registry.root) == {}
    assert len(walked) == 2


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
