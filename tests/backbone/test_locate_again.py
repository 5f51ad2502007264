"""A base is found again by its content: no path of the machine has to stand in a manifest for that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from peftkit.backbone.load import load_backbone
from peftkit.backbone.locate import license_of, locate, locate_again
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.errors import BaseError


def test_a_local_base_is_found_where_it_was_last_loaded(tiny_base: Path, tmp_path: Path) -> None:
    here, cache = Path(shutil.copytree(tiny_base, tmp_path / "here")), tmp_path / "cache"
    backbone = load_backbone(BaseSpec(source=str(here)), QuantSpec(bits=16), cache)
    assert backbone.base.portable == "here"
    record = backbone.identity.id
    assert locate_again("here", None, record, cache).source == str(here)
    there = here.rename(tmp_path / "there")
    with pytest.raises(BaseError, match="not known on this machine") as caught:
        locate_again("here", None, record, cache)
    assert "--base" in str(caught.value)
    load_backbone(BaseSpec(source=str(there)), QuantSpec(bits=16), cache)
    assert locate_again("here", None, record, cache).source == str(there)


def test_a_base_that_anyone_can_fetch_keeps_its_own_name(tmp_path: Path) -> None:
    spec = locate_again("Qwen/Qwen3-4B", "main", "0" * 16, tmp_path)
    assert (spec.source, spec.revision) == ("Qwen/Qwen3-4B", "main")
    assert locate_again("embedded:smollm2-135m", None, None, tmp_path).source == "embedded:smollm2-135m"


@pytest.mark.parametrize(
    ("kind", "source", "portable"),
    [
        ("folder", "/home/me/models/qwen", "qwen"),
        ("gguf", "models/q4.gguf", "q4.gguf"),
        ("hub", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
    ],
)
def test_what_travels_names_no_folder_of_this_machine(kind: str, source: str, portable: str, tmp_path: Path) -> None:
    base = LocatedBase.model_validate({"source": source, "kind": kind, "revision": None, "folder": tmp_path})
    assert base.portable == portable
    assert Path(base.place).is_absolute() is (kind != "hub")


def test_the_licence_is_the_one_that_the_base_states(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "licensed"))
    assert license_of(locate(BaseSpec(source=str(copy)), tmp_path)) is None
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    assert license_of(locate(BaseSpec(source=str(copy)), tmp_path)) == "mit"
    embedded = {"source": "embedded:smollm2-135m", "kind": "embedded", "revision": None, "folder": tmp_path}
    assert license_of(LocatedBase.model_validate(embedded)) == "apache-2.0"
