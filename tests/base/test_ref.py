"""A reference is told apart without reading or downloading anything, and every bad one says what was expected."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from peftkit.base import ref
from peftkit.base.embedded import EMBEDDED
from peftkit.base.ref import HUB_FILES, BaseRef, BaseSpec, located, parse, read_config, snapshot
from peftkit.errors import BaseError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(source: str, revision: str | None = None) -> BaseError:
    with pytest.raises(BaseError) as caught:
        parse(BaseSpec(source=source, revision=revision))
    return caught.value


def test_every_kind_of_reference_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = {
        **{f"embedded:{name}": "embedded" for name in EMBEDDED},
        "Qwen/Qwen3-4B": "hub",
        str(tmp_path / "model"): "folder",
        "./model": "folder",
        "model": "folder",
        "~/model": "folder",
        "owner/name": "folder",  # what lies here wins over a Hub id of the same spelling
        str(tmp_path / "model.gguf"): "gguf",
        "model.gguf": "gguf",
        "~/model.gguf": "gguf",
    }
    assert {source: parse(BaseSpec(source=source)).kind for source in kinds} == kinds
    assert len(kinds) == 9 + len(EMBEDDED)


def test_the_default_base_needs_no_hub() -> None:
    assert parse(BaseSpec()).kind == "embedded"


def test_a_revision_belongs_to_a_hub_id_and_is_kept() -> None:
    reference = parse(BaseSpec(source="Qwen/Qwen3-4B", revision="main"))
    assert reference == BaseRef("Qwen/Qwen3-4B", "hub", "main")
    assert str(reference) == "Qwen/Qwen3-4B@main"
    assert str(parse(BaseSpec(source="Qwen/Qwen3-4B"))) == "Qwen/Qwen3-4B"


@pytest.mark.parametrize("source", ["embedded:smollm2-135m", "{folder}", "{gguf}"])
def test_a_revision_of_anything_else_is_refused_and_not_ignored(source: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = source.format(folder=tmp_path, gguf=tmp_path / "m.gguf")
    error = refused(source, "v1")
    assert "'v1'" in error.fact
    assert repr(source) in error.fact
    assert error.expected is not None
    assert "Hub id" in error.expected


@pytest.mark.parametrize(
    "source",
    [
        "embedded:gpt5",
        "embedded:",
        "/no/such/folder",
        "./none",
        "~/none",
        "none",
        "a/b/c",
        "owner/model.gguf",
        "x.gguf",
    ],
)
def test_a_base_that_is_nowhere_is_refused_with_what_would_do(source: str) -> None:
    error = refused(source)
    assert source.removeprefix("embedded:") in error.fact
    assert error.expected is not None
    assert "embedded:smollm2-135m" in error.expected


def test_a_near_miss_of_the_embedded_base_is_named() -> None:
    error = refused("smollm2-135m")
    assert error.hint is not None
    assert "embedded:smollm2-135m" in error.hint
    assert refused("/no/such/thing/at/all").hint is None


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    error = refused(str(tmp_path / "model.bin"))
    assert "model.bin" in error.fact
    assert "not a GGUF" in error.fact
    assert error.expected is not None


@pytest.mark.parametrize("source", ["", "~no-such-user-here/model", "a" * 5000])
def test_what_the_operating_system_chokes_on_is_a_bad_reference_too(source: str) -> None:
    assert refused(source).expected is not None


def test_the_hub_gives_weights_and_texts_but_neither_pickles_nor_code() -> None:
    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES)

    assert all(map(wanted, ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt"]))
    assert not any(
        map(wanted, ["pytorch_model.bin", "model.pt", "model.pth", "modeling_x.py", "model.pkl", "a.gguf", "x.npz"])
    )


def test_a_hub_base_is_bound_to_the_commit_that_was_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reference = parse(BaseSpec(source="Qwen/Qwen3-4B", revision="main"))
    base = located(reference, snapshot(reference))
    assert base.revision == COMMIT
    assert asked.pop("ignore_patterns") == ["consolidated*", "*/*"]  # the weights again, in other formats
    assert asked == {"name": "Qwen/Qwen3-4B", "revision": "main", "allow_patterns": ref.HUB_FILES}


@pytest.mark.parametrize("failure", [OSError("no route\nto host"), ValueError(""), RuntimeError("  ")])
def test_an_unreachable_hub_is_one_line_with_a_way_out(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BaseError) as caught:
        snapshot(BaseRef("Qwen/Qwen3-4B", "hub", "main"))
    assert caught.value.fact.count("\n") == 0
    assert "Qwen/Qwen3-4B@main" in caught.value.fact
    assert (str(failure).strip().splitlines() or [type(failure).__name__])[0] in caught.value.fact
    assert "embedded:smollm2-135m" in str(caught.value.hint)


@pytest.mark.parametrize("content", [None, "{", "[1]", "\udcff"])
def test_a_config_that_is_missing_or_broken_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BaseError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert caught.value.expected is not None


def test_an_adapter_given_as_a_base_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError) as caught:
        read_config(tmp_path)
    assert "adapter" in str(caught.value.hint)
