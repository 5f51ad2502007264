"""A base is its content: what changes nothing keeps every digest, and one changed part changes that digest alone."""

from __future__ import annotations

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

from peftkit.base import identity
from peftkit.base.identity import identify, tensors, weight_files
from peftkit.errors import BaseError


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_digests_are_those_of_the_tensors_as_another_reader_sees_them(base: Path) -> None:
    import hashlib

    names = {torch.float32: "F32"}
    loaded = load_file(base / "model.safetensors")
    expected = sorted(
        f"{name} {names[t.dtype]} {list(t.shape)} {hashlib.sha256(t.numpy().tobytes()).hexdigest()}"
        for name, t in loaded.items()
    )
    assert len(expected) > 10
    assert identify(base).weights == hashlib.sha256("\n".join(expected).encode()).hexdigest()


def test_a_sharded_and_a_single_file_copy_are_the_same_base(base: Path, tmp_path: Path) -> None:
    loaded = load_file(base / "model.safetensors")
    before = identify(base)
    names = sorted(loaded, reverse=True)
    (base / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        tensors_of_part = {name: loaded[name] for name in part}
        save_file(tensors_of_part, base / f"model-0000{number}-of-00002.safetensors", {"shard": str(number)})
    assert len(weight_files(base)) == 2
    assert identify(base) == before


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


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_any_one_byte_of_any_tensor_counts(place: str, base: Path) -> None:
    before = identify(base)
    file = base / "model.safetensors"
    spans = sorted((start, end) for *_, start, end in tensors(file))
    flip(file, {"first": spans[0][0], "middle": spans[len(spans) // 2][0] + 1, "last": spans[-1][1] - 1}[place])
    assert identify(base).differences(before.parts()) == ["weights"]


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
    for damage in ("", '{"lines": ["model', "[]"):
        entries[0].write_text(damage)
        assert identify(base, tmp_path / "cache") == first


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
