"""A base is its content: what changes nothing keeps every digest, and one changed part changes that digest alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.base import identity, raw
from peftkit.base.identity import (
    fitting_revisions,
    identify,
    license_of,
    tensors,
    weight_files,
)
from peftkit.base.places import known_places, remember_place
from peftkit.errors import BaseError


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def sha256_of(value: Any) -> str:
    """Of the canonical spelling, written out here a second time."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_digests_are_those_of_the_tensors_as_another_reader_sees_them(base: Path) -> None:
    names = {torch.float32: "F32"}
    loaded = load_file(base / "model.safetensors")
    expected = {
        name: {
            "dtype": names[t.dtype],
            "shape": list(t.shape),
            "sha256": hashlib.sha256(t.numpy().tobytes()).hexdigest(),
        }
        for name, t in loaded.items()
    }
    assert len(expected) > 10
    found = identify(base)
    assert {name: tensor.as_json() for name, tensor in found.record.tensors.items()} == expected
    assert found.weights == sha256_of(expected)
    assert found.fingerprint == sha256_of({"config": found.config, "weights": found.weights})
    assert found.record.shapes() == {name: tuple(t.shape) for name, t in loaded.items()}


def test_a_sharded_and_a_single_file_copy_are_the_same_base(base: Path, tmp_path: Path) -> None:
    loaded = load_file(base / "model.safetensors")
    before = identify(base)
    names = sorted(loaded, reverse=True)
    (base / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        tensors_of_part = {name: loaded[name] for name in part}
        save_file(tensors_of_part, base / f"model-0000{number}-of-00002.safetensors", {"shard": str(number)})
    assert len(weight_files(base)) == 2
    after = identify(base)
    assert after == before
    assert after.record.encode() == before.record.encode()


def test_a_tensor_that_stands_in_two_files_is_refused_by_name(base: Path) -> None:
    loaded = load_file(base / "model.safetensors")
    save_file({"model.norm.weight": loaded["model.norm.weight"]}, base / "more.safetensors")
    with pytest.raises(BaseError) as caught:
        identify(base)
    assert "model.norm.weight stands twice" in caught.value.fact
    assert "more.safetensors" in caught.value.fact


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", lambda b: flip(b / "model.safetensors", -1)),
        ("config", lambda b: edit_json(b / "config.json", lambda c: c.update(rms_norm_eps=1e-3))),
        ("chat_template", lambda b: (b / "chat_template.jinja").write_text("{{ messages }}")),
        ("chat_template", lambda b: (b / "chat_template.jinja").unlink()),
        ("special_tokens", lambda b: edit_json(b / "tokenizer_config.json", lambda c: c.update(eos_token="!"))),
        ("tokenizer", lambda b: edit_json(b / "tokenizer.json", lambda c: c["model"]["vocab"].update({"!!": 259}))),
    ],
)
def test_one_changed_part_changes_that_digest_only(part: str, change: Callable[[Path], object], base: Path) -> None:
    before = identify(base)
    change(base)
    after = identify(base)
    assert after.differences(before.parts()) == [part]
    assert (after.fingerprint != before.fingerprint) == (part in ("weights", "config"))


def changed_at(file: Path, place: str, spans: list[tuple[int, int]]) -> int:
    return {"first": spans[0][0], "middle": spans[len(spans) // 2][0] + 1, "last": file.stat().st_size - 1}[place]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_any_one_byte_of_any_tensor_counts(place: str, base: Path) -> None:
    before = identify(base)
    file = base / "model.safetensors"
    spans = sorted((start, end) for *_, start, end in tensors(file))
    flip(file, changed_at(file, place, spans))
    after = identify(base)
    assert after.differences(before.parts()) == ["weights"]
    changed = [name for name, tensor in after.record.tensors.items() if before.record.tensors[name] != tensor]
    owner = next(name for name, *_, start, end in tensors(file) if start <= changed_at(file, place, spans) < end)
    assert changed == [owner]
    assert after.explain(before.record) == [f"tensors: 1 of {len(spans)} differ in their bytes ({owner})"]


def test_a_renamed_or_reshaped_tensor_is_another_base(base: Path) -> None:
    before = identify(base).weights
    loaded = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    save_file({("other" if n == name else n): t for n, t in loaded.items()}, base / "model.safetensors")
    renamed = identify(base).weights
    save_file({n: t.reshape(8, 8) if n == name else t for n, t in loaded.items()}, base / "model.safetensors")
    reshaped = identify(base).weights
    save_file(loaded, base / "model.safetensors")
    assert len({before, renamed, reshaped}) == 3
    assert identify(base).weights == before


def test_what_a_loader_or_a_saver_writes_changes_nothing(base: Path) -> None:
    before = identify(base)
    edit_json(base / "config.json", lambda c: c.update(_name_or_path="/x", transformers_version="0", use_cache=False))
    edit_json(base / "tokenizer.json", lambda c: c.update(padding={"strategy": "BatchLongest"}, truncation=None))
    (base / "README.md").write_text("hello")
    save_file({"lora_A": torch.zeros(1)}, base / "adapter_model.safetensors")
    assert identify(base) == before


def test_a_template_in_the_tokenizer_config_counts_as_the_same_template(base: Path) -> None:
    before = identify(base)
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    assert identify(base) == before


def test_a_part_that_was_not_recorded_is_no_difference(base: Path) -> None:
    assert identify(base).differences({}) == []
    assert identify(base).differences({"weights": "?"}) == ["weights"]


def test_weights_are_read_once_until_the_file_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    real = identity.tensors
    monkeypatch.setattr(identity, "tensors", lambda path: (reads.append(path), real(path))[1])
    first = identify(base, tmp_path / "cache")
    assert identify(base, tmp_path / "cache") == first == identify(base, None)
    assert len(reads) == 2  # the first time, and without a cache
    stat = (base / "model.safetensors").stat()
    flip(base / "model.safetensors", -1)
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identify(base, tmp_path / "cache").differences(first.parts()) == ["weights"]
    assert len(reads) == 3


def test_a_damaged_cache_entry_is_made_again(base: Path, tmp_path: Path) -> None:
    first = identify(base, tmp_path / "cache")
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(entries) == 1
    whole = entries[0].read_text()
    digest = first.record.tensors["model.norm.weight"].sha256
    other = whole.replace(digest, ("0" if digest[0] != "0" else "1") + digest[1:])
    assert other != whole
    for damage in ("", '{"tensors": {"model', "[]", "7", "\0", other):
        entries[0].write_text(damage)
        assert identify(base, tmp_path / "cache") == first
        assert entries[0].read_text() == whole


def test_a_cache_that_cannot_be_written_stops_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    assert identify(base, tmp_path / "cache") == identify(base)
    remember_place(identify(base), base, tmp_path / "cache")
    assert known_places(identify(base).id, tmp_path / "cache") == []


def header(content: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content)) + content + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 1 << 40) + b"{}",
        header(b"{"),
        header(b"[]"),
        header(b"\xff\xfe"),
        header(b'{"a": 1}'),
        header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"abc"),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 4]}}', b"abcd"),
        header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},' * 2 + b'"b": 1}', b"a"),
        header(b"[" * 200_000),
    ],
)
def test_a_file_that_is_no_whole_safetensors_is_refused(content: bytes, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseError, match="not a whole safetensors file"):
        identify(base, tmp_path / "cache")


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_download_is_refused_and_not_remembered(lost: int, base: Path, tmp_path: Path) -> None:
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    with pytest.raises(BaseError, match="not a whole safetensors file"):
        identify(base, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_by_name_and_never_opened(name: str, base: Path) -> None:
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(BaseError) as caught:
        identify(base)
    assert name in caught.value.fact
    assert "can run code" in caught.value.fact
    assert "safetensors" in str(caught.value.expected)


def test_a_folder_without_weights_says_so(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="holds no weights"):
        identify(base)


def test_a_config_with_infinity_is_identified_as_transformers_spells_it(base: Path) -> None:
    edit_json(base / "config.json", lambda c: c.update(time_step_limit=[0.0, float("inf")]))
    assert "Infinity" in (base / "config.json").read_text()
    assert identify(base).record.config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_a_tensor_is_read_in_pieces_and_hashed_as_a_whole(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = identify(base)
    sizes: list[int] = []
    real = identity.pieces
    monkeypatch.setattr(raw, "CHUNK", 1000)
    monkeypatch.setattr(identity, "pieces", lambda *span: (sizes.append(len(p)) or p for p in real(*span)))
    assert identify(base) == whole
    assert max(sizes) == 1000
    assert sum(sizes) == sum(end - start for *_, start, end in tensors(base / "model.safetensors"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_nested_too_deeply_is_an_error_and_no_crash(name: str, base: Path) -> None:
    for depth in range(300, 1100, 50):  # parser and writer give up at depths of their own
        (base / name).write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        with contextlib.suppress(BaseError):
            identify(base)
    (base / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(BaseError, match=str(base)):
        identify(base)


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds two whole revisions of owner/name, and three broken ones."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshots = tmp_path / "hub" / "models--owner--name" / "snapshots"
    shutil.copytree(base, snapshots / ("a" * 40))
    shutil.copytree(base, snapshots / ("b" * 40))
    (snapshots / ("b" * 40) / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(base, snapshots / ("c" * 40))
    (snapshots / ("c" * 40) / "model.safetensors").unlink()
    shutil.copytree(base, snapshots / ("d" * 40))
    (snapshots / ("d" * 40) / "config.json").write_text("{")
    (snapshots / ("e" * 40)).mkdir()
    (snapshots / "a file").write_text("")
    return snapshots


def test_the_revision_that_an_adapter_fits_is_found_among_the_downloaded_ones(base: Path, hub: Path) -> None:
    parts = identify(base).parts()
    assert fitting_revisions(parts, "owner/name") == ["a" * 40]
    other = identify(hub / ("b" * 40)).parts()
    assert other != parts
    assert fitting_revisions(other, "owner/name") == ["b" * 40]
    without = {name: digest for name, digest in parts.items() if name != "chat_template"}
    os.utime(hub / ("a" * 40), ns=(1, 1))
    assert fitting_revisions(without, "owner/name") == ["b" * 40, "a" * 40]  # the newest first
    assert fitting_revisions({**parts, "weights": "0" * 64}, "owner/name") == []
    assert fitting_revisions({}, "owner/name") == []


def test_weights_are_not_read_where_a_small_file_already_differs(
    base: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = identity.tensors
    monkeypatch.setattr(identity, "tensors", lambda path: (reads.append(path.parent.name), real(path))[1])
    parts = identify(base).parts()
    reads.clear()
    assert fitting_revisions(parts, "owner/name") == ["a" * 40]
    assert reads == ["a" * 40]


@pytest.mark.parametrize(
    "source", ["", "none/here", "../hub/models--owner--name", "/", "a/b/c", "owner", "x\0/y", "../.."]
)
def test_a_source_that_is_no_downloaded_hub_id_fits_nothing(source: str, base: Path, hub: Path) -> None:
    assert fitting_revisions(identify(base).parts(), source) == []


def test_places_are_remembered_newest_first_and_only_while_they_exist(base: Path, tmp_path: Path) -> None:
    found, cache = identify(base), tmp_path / "cache"
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert known_places(found.id, cache) == []
    for source in (base, "owner/name@abc", copy, base):
        remember_place(found, source, cache)
    assert known_places(found.id, cache) == [str(base), str(copy), "owner/name@abc"]
    shutil.rmtree(copy)
    assert known_places(found.id, cache) == [str(base), "owner/name@abc"]
    assert [path.name for path in (cache / "places").iterdir()] == [f"{found.id}.json"]
    for number in range(50):
        remember_place(found, f"owner/name@{number}", cache)
    assert len(known_places(found.id, cache)) == 16
    assert known_places(found.id, cache)[0] == "owner/name@49"


@pytest.mark.parametrize("damage", ["", "{", "{}", "[1, null]", "\udcff", "[" * 100_000])
def test_a_damaged_note_of_places_is_ignored_and_written_again(damage: str, base: Path, tmp_path: Path) -> None:
    found, cache = identify(base), tmp_path / "cache"
    remember_place(found, base, cache)
    (note,) = (cache / "places").iterdir()
    note.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert known_places(found.id, cache) == []
    remember_place(found, base, cache)
    assert known_places(found.id, cache) == [str(base)]


@pytest.mark.parametrize("record_id", ["", "..", "../identity/x", "0" * 15, "A" * 16, "0" * 64])
def test_what_is_no_record_id_has_no_places(record_id: str, tmp_path: Path) -> None:
    assert known_places(record_id, tmp_path) == []


@pytest.mark.parametrize(
    ("readme", "stated"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n", "apache-2.0"),
        ("---\r\nlanguage:\r\n- en\r\nlicense: mit\r\n---\r\n", "mit"),
        ("\ufeff---\nlicense: mit\n---", "mit"),
        ("---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n", "other (qwen, LICENSE)"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: mit\nlicense_name: surplus\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: no\n---\n", "no"),
        ('---\nlicense: "a\\e[31m\\nb"\n---\n', "a\\x1b[31m\\nb"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n? [a]\n: b\n---\n", None),
        ("---\na: " + "[" * 5000 + "\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_front_matter_states(readme: str, stated: str | None, tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert license_of(tmp_path) == stated


def test_half_a_character_in_a_base_is_spelled_and_not_a_traceback(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "halves"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "\ud800"}))
    assert identify(folder).record.config["note"] == "\\ud800"
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["\ud800"] = header.pop(next(name for name in header if name != "__metadata__"))
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(BaseError, match="half a character"):
        identify(folder)
