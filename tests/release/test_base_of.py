"""One way to find and check the base of a version, for combinations, merges and exports."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftkit.base.identity import identify
from peftkit.errors import BaseMismatch
from peftkit.release.base_of import base_of, differing_parts, find_base


def test_the_base_is_found_and_another_is_named_by_what_differs(lab: Any) -> None:
    version = lab.adapter("one")
    found = base_of(version, lab.cache, str(lab.base))
    assert found.located.folder == lab.base
    assert found.identity.fingerprint == version.manifest.base.fingerprint == identify(lab.base).fingerprint
    other = lab.folder / "other"
    shutil.copytree(lab.base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BaseMismatch, match="differs in: weights, chat template") as caught:
        base_of(version, lab.cache, str(other))
    assert "--base" in str(caught.value.hint)
    assert find_base(version, lab.cache, str(other))[1].folder == other  # which compares nothing


def test_what_a_manifest_does_not_state_is_not_known_to_be_the_same() -> None:
    whole = {"weights": "a", "chat_template": "b"}
    assert differing_parts(whole, "f", whole, "f") == []
    assert differing_parts(whole, "f", whole, "g") == ["fingerprint"]
    assert differing_parts({"weights": "a"}, "f", whole, "f") == ["chat template"]
    assert differing_parts(whole, "f", {"weights": "x", "chat_template": "b"}, "g") == ["weights"]
