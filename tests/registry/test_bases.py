from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peftkit.base.record import BaseRecord, TensorDigest
from peftkit.base.relations import Relation
from peftkit.errors import AdapterDamaged, RegistryError
from peftkit.registry import Draft, Registry, bases, check_root, collect

RECORD = BaseRecord(
    config={"model_type": "llama", "eps": 1e-6},
    tokenizer="a" * 64,
    special_tokens={"eos_token": "</s>"},
    chat_template="{{ ü }}\n",
    tensors={"w": TensorDigest("F32", (2, 3), "b" * 64)},
)
OTHER = dataclasses.replace(RECORD, chat_template=None)


def base_of(record: BaseRecord) -> dict[str, Any]:
    return {
        "source": "x",
        "record": record.id,
        "fingerprint": record.fingerprint,
        "parts": record.parts(),
    }


def test_a_record_is_stored_once_and_comes_back(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    first = registry.publish("tickets", make_payload(), make_draft(base=base_of(RECORD)), base=RECORD)
    path = registry.root / "bases" / f"{RECORD.id}.json"
    before = path.stat()
    assert path.read_bytes() == RECORD.encode()
    assert before.st_mode & 0o777 == 0o444
    second = registry.publish("tickets", make_payload(seed=1), make_draft(base=base_of(RECORD)), base=RECORD)
    third = registry.publish("sql", make_payload(seed=1), make_draft(base=base_of(RECORD)))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert bases.ids(registry.layout.bases) == [RECORD.id]
    for version in (first, second, third):
        assert bases.record_of(version) == RECORD
        assert RECORD.fingerprint == version.manifest.base.fingerprint
    none = registry.publish("old", make_payload(), make_draft())
    assert bases.record_of(none) is None
    assert check_root(registry.root) == {}


@pytest.mark.parametrize(
    ("named", "given", "sentence"),
    [
        (RECORD, None, f"names the base record {RECORD.id}, which is neither given nor in this registry"),
        (RECORD, OTHER, f"names the base record {RECORD.id}, and {OTHER.id} is given"),
        (None, OTHER, f"names no base record, and {OTHER.id} is given"),
    ],
)
def test_a_draft_and_its_record_must_agree(
    registry: Registry,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    named: BaseRecord | None,
    given: BaseRecord | None,
    sentence: str,
) -> None:
    draft = make_draft(base=base_of(named)) if named else make_draft()
    with pytest.raises(RegistryError, match=sentence):
        registry.publish("tickets", make_payload(), draft, base=given)
    assert not registry.root.exists()


def test_a_record_that_is_collected_meanwhile_stops_the_publish(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    """A version never names a record that is not there, also when the record went while the publish waited."""
    with registry.writing("keep"):
        bases.keep(registry.layout, RECORD)

    class Waiting(Registry):
        @contextmanager
        def writing(self, purpose: str) -> Iterator[None]:
            assert collect(registry).paths == (f"bases/{RECORD.id}.json",)
            with super().writing(purpose):
                yield

    with pytest.raises(RegistryError, match="neither given nor in this registry"):
        Waiting(registry.root).publish("tickets", make_payload(), make_draft(base=base_of(RECORD)))
    assert registry.names() == []
    assert check_root(registry.root) == {}


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_record_is_told_and_can_be_mended(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], how: str
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft(base=base_of(RECORD)), base=RECORD)
    path = registry.root / "bases" / f"{RECORD.id}.json"
    path.chmod(0o644)
    if how == "changed":
        path.write_bytes(OTHER.encode())
        assert set(check_root(registry.root)) == {f"bases/{RECORD.id}.json"}
        with pytest.raises(AdapterDamaged, match=f"was changed(.|\n)*rm {path}"):
            registry.publish("tickets", make_payload(), make_draft(base=base_of(RECORD)), base=RECORD)
    else:
        path.unlink()
        assert check_root(registry.root) == {
            version.reference: [f"It names the base record {RECORD.id}, which is missing."]
        }
    with pytest.raises(AdapterDamaged, match="publish an adapter of the same base again"):
        bases.record_of(version)
    assert registry.resolve("tickets") == version, "the adapter itself is whole"
    path.unlink(missing_ok=True)
    assert registry.publish("tickets", make_payload(), make_draft(base=base_of(RECORD)), base=RECORD) == version
    assert bases.record_of(version) == RECORD
    assert check_root(registry.root) == {}


def test_a_relation_is_found_either_way_round(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    version = registry.publish("tickets", make_payload(), make_draft(base=base_of(RECORD)), base=RECORD)
    assert bases.relations(registry.layout) == []
    there = Relation(RECORD.sha256, OTHER.sha256, "cast", {"w": 0.001}, added=("x",))
    elsewhere = Relation("0" * 64, OTHER.sha256, "gguf", {"w": 0.5})
    with registry.writing("keep"):
        ids = {bases.keep_relation(registry.layout, relation) for relation in (there, elsewhere, there)}
    assert ids == {there.id, elsewhere.id}
    assert set(bases.relations(registry.layout)) == {there, elsewhere}
    assert bases.relation_of(version, OTHER.id) == there
    assert bases.relation_of(version, "0" * 16) is None
    other = registry.publish("sql", make_payload(), make_draft(base=base_of(OTHER)), base=OTHER)
    assert bases.relation_of(other, RECORD.id) == there
    assert bases.relation_of(other, "0" * 16) == elsewhere
    assert check_root(registry.root) == {}


@pytest.mark.parametrize("folder", ["bases", "relations"])
def test_what_is_no_record_is_named_and_passed_over(registry: Registry, folder: str) -> None:
    with registry.writing("keep"):
        kept = bases.keep(registry.layout, RECORD)
        related = bases.keep_relation(registry.layout, Relation("0" * 64, "1" * 64, "other", {"w": 0.5}))
    place = registry.root / folder
    (place / "README.md").write_text("x")
    (place / "0000.json").write_text("{}")
    (place / f"{'1' * 16}.json").mkdir()
    os.symlink(place / f"{kept if folder == 'bases' else related}.json", place / f"{'2' * 16}.json")
    assert set(bases.problems(registry.layout)) == {
        f"{folder}/{name}" for name in ("README.md", "0000.json", f"{'1' * 16}.json", f"{'2' * 16}.json")
    }


@pytest.mark.parametrize("text", [b"", b"[]\n", b"{}\n", b'{"format":"peftkit/1"}\n', b'"x"', b"[" * 99_999])
@pytest.mark.parametrize("folder", ["bases", "relations"])
def test_a_file_with_a_right_name_and_no_record_in_it(registry: Registry, folder: str, text: bytes) -> None:
    name = hashlib.sha256(text).hexdigest()[:16]
    (registry.root / folder).mkdir(parents=True)
    (registry.root / folder / f"{name}.json").write_bytes(text)
    (sentence,) = bases.problems(registry.layout)[f"{folder}/{name}.json"]
    assert "this is no" in sentence
    with pytest.raises(AdapterDamaged, match=f"rm .*{name}"):
        bases.read(registry.layout, name) if folder == "bases" else bases.relations(registry.layout)
