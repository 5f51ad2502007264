from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from peftkit.errors import RegistryError
from peftkit.registry import Draft, Registry, is_alias, is_name, parse_reference, remove, remove_adapter
from peftkit.registry.headers import header_problems
from peftkit.registry.layout import Layout, check_alias, check_file, check_name

BAD_NAMES = [
    "", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0b", "a b", "a\n", "Tickets", "ü", "ı", "-a", "_a", "a-", "~",
    "a@b", "a.b", ".hidden", "x" * 65, "con", "nul", "com1", "base", "base_model", "lora", "default", "tmp", "latest",
    "%2e",
]  # fmt: skip
BAD_ALIASES = [
    "", ".", "..", "../latest", "/x", "a/b", "a\0b", "Prod", "prod ", ".x", "x.", "nul", "nul.x", "dead", "0" * 16,
]  # fmt: skip
BAD_FILES = [
    "", "../x.json", "/x.json", "a/../x.json", "a//x.json", "./x.json", "x.json/", "a\\x.json", "x\0.json", "x.json\n",
    "manifest.json", "MANIFEST.json", "model.bin", "model.pt", "model.pkl", "code.py", "x.safetensors.bin", ".json",
    "a/b/c/d/x.json", "x" * 200 + ".json", "é.json",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_everywhere_and_write_nothing(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], name: str
) -> None:
    assert not is_name(name)
    for call in (
        lambda: registry.publish(name, make_payload(), make_draft()),
        lambda: registry.resolve(name),
        lambda: registry.versions(name),
        lambda: registry.aliases(name),
        lambda: registry.tag(name, "prod"),
        lambda: registry.history(name),
        lambda: registry.history(name, "prod"),
        lambda: registry.restore(name),
        lambda: registry.untag(name, "prod"),
        lambda: remove(registry, name),
        lambda: remove_adapter(registry, name),
    ):
        with pytest.raises(RegistryError):
            call()
    assert not registry.root.exists()


@pytest.mark.parametrize("alias", BAD_ALIASES)
def test_bad_aliases_are_refused_and_write_nothing(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], alias: str
) -> None:
    assert not is_alias(alias)
    with pytest.raises(RegistryError):
        registry.publish("tickets", make_payload(), make_draft(), aliases=[alias])
    with pytest.raises(RegistryError):
        registry.tag("tickets", alias)
    with pytest.raises(RegistryError):
        registry.untag("tickets", alias)
    with pytest.raises(RegistryError):
        registry.history("tickets", alias)
    assert not registry.root.exists()


@pytest.mark.parametrize("relative", BAD_FILES)
def test_bad_file_names_are_refused(relative: str) -> None:
    with pytest.raises(RegistryError):
        check_file(relative)


@given(st.text(max_size=80) | st.text("abAB01._-/@~\\\0", max_size=12) | st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,70}\Z"))
@example("com9")
def test_a_name_is_safe_or_refused(text: str) -> None:
    root = Path("/registry")
    if not is_name(text):
        with pytest.raises(RegistryError) as caught:
            check_name(text)
        assert caught.value.expected
        assert caught.value.hint
        return
    assert check_name(text) == text
    assert parse_reference(text).name == text
    assert text == text.casefold()
    assert text.isascii()
    path = Layout(root).adapter(text)
    assert Path(os.path.normpath(path)) == path == root / text
    assert path.parent == root


@given(st.text("abcdef0123._-zZ/", max_size=20) | st.text(max_size=70))
def test_an_alias_is_never_read_as_a_version(text: str) -> None:
    try:
        check_alias(text)
    except RegistryError:
        assert not is_alias(text)
        return
    found = parse_reference(f"tickets@{text}")
    assert is_alias(text)
    assert (found.alias, found.prefix) == (text, None)


@given(st.text(max_size=40) | st.text("ab/._\\0", max_size=20).map(lambda text: text + ".json"))
def test_a_file_name_stays_in_its_folder(text: str) -> None:
    try:
        check_file(text)
    except RegistryError:
        return
    assert os.path.normpath(os.path.join("/version", text)) == f"/version/{text}"


def damaged_payload(folder: Path, how: str) -> None:
    model = folder / "adapter_model.safetensors"
    match how:
        case "pickle":
            (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
        case "other file":
            (folder / "README.md").write_text("hello")
        case "link":
            model.rename(folder.parent / "outside.safetensors")
            model.symlink_to(folder.parent / "outside.safetensors")
        case "link to a folder":
            (folder / "sub").symlink_to(folder.parent)
        case "link up":
            (folder / "x.json").symlink_to("../../../etc/passwd")
        case "pipe":
            os.mkfifo(folder / "pipe.json")
        case "bad name in a folder":
            (folder / "..sub").mkdir()
            (folder / "..sub/x.json").write_text("{}")
        case "no config":
            (folder / "adapter_config.json").unlink()
        case "pickle called safetensors":
            model.write_bytes(b"\x80\x04\x95" + bytes(40))
        case "cut off":
            model.write_bytes(model.read_bytes()[:-1])
        case "bad json":
            (folder / "adapter_config.json").write_text('{"r": NaN}')
        case "case":
            (folder / "Adapter_config.json").write_text("{}")
        case "manifest":
            (folder / "manifest.json").write_text("{}")
        case "base record":
            (folder / "base.json").write_text("{}")


HOWS = [
    "pickle", "other file", "link", "link to a folder", "link up", "pipe", "bad name in a folder", "no config",
    "pickle called safetensors", "cut off", "bad json", "case", "manifest", "base record",
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_bad_payloads_are_refused_with_nothing_written(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], how: str
) -> None:
    source = make_payload()
    damaged_payload(source, how)
    with pytest.raises(RegistryError) as caught:
        registry.publish("tickets", source, make_draft())
    assert caught.value.expected
    assert caught.value.hint
    assert not registry.root.exists()


def test_plain_sub_folders_are_kept(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    source = make_payload()
    (source / "extra/deep").mkdir(parents=True)
    (source / "extra/deep/notes.json").write_text('{"a": 1}')
    version = registry.publish("tickets", source, make_draft())
    assert (version.path / "extra/deep/notes.json").read_text() == '{"a": 1}'
    assert "extra/deep/notes.json" in version.manifest.files


def test_a_linked_adapter_folder_is_not_written_through(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft], tmp_path: Path
) -> None:
    registry.publish("sql", make_payload(), make_draft())
    (tmp_path / "elsewhere").mkdir()
    (registry.root / "tickets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="symbolic link"):
        registry.publish("tickets", make_payload(), make_draft())
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert registry.names() == ["sql"]


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": {"after": {"loss": math.nan}}},
        {"adapter": {"deep": [{"x": math.inf}]}},
        {"receipts": [{"type": "import", "x": -math.inf}]},
        {"receipts": [{"x": 1}]},
        {"base": {"source": "x", "fingerprint": "f"}},
        {"base": {"source": "x", "fingerprint": "f" * 64, "parts": {"weights": "w"}}},
        {"base": {"source": "x", "fingerprint": "f" * 64, "parts": {"surprise": "3" * 64}}},
        {"base": {"source": "x", "fingerprint": "f" * 64, "quantization": {"a": math.nan}}},
        {"surprise": 1},
        {"kind": "pickle"},
        {"created": "2026-01-31T09:30:00"},
        {"created": "yesterday"},
        {"recipe": {"name": "x", "sha256": "1" * 64, "config": {}, "config_sha256": "2" * 64}},
        {"data": [{"role": "train", "source": "x", "sha256": "2" * 64, "rows": -1}]},
        {"data": [{"role": "test", "source": "x", "sha256": "2" * 64, "rows": 1}]},
        {"parents": [{"name": "a", "version": "latest", "relation": "combined"}]},
    ],
)
def test_bad_drafts_are_refused(make_draft: Callable[..., Draft], fields: Any) -> None:
    with pytest.raises(ValidationError):
        make_draft(**fields)


def test_times_are_utc_with_one_spelling(make_draft: Callable[..., Draft]) -> None:
    assert make_draft(created="2026-01-31T10:30:00+01:00").created == "2026-01-31T09:30:00.000000Z"


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "room", "problem"),
    [
        ({"a": ENTRY}, 8, None),
        ({"__metadata__": {"format": "pt"}, "a": ENTRY, "e": ENTRY | {"shape": [0], "data_offsets": [8, 8]}}, 8, None),
        ({"a": ENTRY}, 7, "7 bytes of tensors"),
        ({"a": ENTRY}, 9, "9 bytes of tensors"),
        ({"a": ENTRY, "b": ENTRY}, 8, "overlap"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, 20, "hole"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, 12, "hole"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "not what F32"),
        ({"a": ENTRY | {"shape": [3]}}, 8, "not what F32"),
        ({"a": ENTRY | {"shape": [1 << 62] * 9999}}, 8, "not what F32"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, 8, "not whole numbers"),
        ({"a": ENTRY | {"shape": [True, 2]}}, 8, "not whole numbers"),
        ({"a": ENTRY | {"dtype": "PICKLE"}}, 8, "unknown dtype"),
        ({"a": ENTRY | {"more": 1}}, 8, "without exactly"),
        ({"a": 1}, 8, "without exactly"),
        ({"__metadata__": {"a": 1}}, 0, "metadata"),
        ([], 0, "not a JSON object"),
        ('{"a": 1, "a": 2}', 0, "stands twice"),
        ('{"a": 1e999}', 0, "too large"),
        ("[" * 100_000, 0, "nested too deeply"),
        ("{", 0, "not JSON"),
    ],
)  # fmt: skip
def test_headers(tmp_path: Path, header: Any, room: int, problem: str | None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(room))
    found = header_problems(path)
    assert found == [] if problem is None else problem in found[0]


def test_a_huge_header_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"", b"1234567", struct.pack("<Q", 1 << 63), struct.pack("<Q", 1)):
        path.write_bytes(data)
        assert header_problems(path)


def test_registry_root_may_be_text(tmp_path: Path) -> None:
    assert Registry(str(tmp_path / "r")).names() == []  # type: ignore[arg-type]
