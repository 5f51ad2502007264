"""What a manifest says about a run: its base, and its settings without the folders of this machine."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.environment import environment
from peftkit.recipe.files import Recipe

if TYPE_CHECKING:
    from peftkit.backbone.load import Backbone
    from peftkit.tuning.tuned import Tuned


def base_fields(backbone: Backbone) -> dict[str, Any]:
    """What a manifest says about the base that an adapter was trained on."""
    from peftkit.backbone.locate import license_of

    return {
        "source": backbone.base.portable,
        "revision": backbone.base.revision,
        "record": backbone.identity.id,
        "fingerprint": backbone.identity.fingerprint,
        "parts": backbone.identity.parts(),
        "quantization": backbone.quantization_record(),
        "license": license_of(backbone.base),
    }


def trained_fields(
    tuned: Tuned, recipe: Recipe, settings: Mapping[str, Any], besides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a manifest says about an adapter that a recipe has trained: on which base, how, from what.

    `besides` goes with the adapter's settings: a teacher, how images become numbers.
    """
    return {
        "kind": tuned.kind,
        "base": base_fields(tuned.backbone),
        "adapter": {
            **tuned.spec.record(),
            "trainable_parameters": tuned.trainable_parameters,
            **({"head": tuned.backbone.head.record()} if tuned.backbone.head is not None else {}),
            **(besides or {}),
        },
        "recipe": {
            "name": recipe.name,
            "sha256": recipe.sha256,
            "config": without_paths(settings, tuned.backbone.base),
        },
        "environment": environment(),
        "parents": list(tuned.parents),
        "receipts": list(tuned.receipts),
    }


def without_paths(config: Mapping[str, Any], base: LocatedBase) -> dict[str, Any]:
    """Settings as the registry keeps them: names without the folders of this machine, instructions as a digest.

    Any text that names a file or an absolute path keeps its last part alone, whatever group it stands in.
    """
    kept = {key: _without_paths(value) for key, value in config.items()}
    for key, group in config.items():
        if not isinstance(group, Mapping):
            continue
        if group.get("instructions"):
            kept[key]["instructions"] = "sha256:" + hashlib.sha256(str(group["instructions"]).encode()).hexdigest()
        if set(group) == set(BaseSpec.model_fields):
            kept[key]["source"] = base.portable
    return kept


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_without_paths(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    with contextlib.suppress(OSError):
        return Path(text).expanduser().is_absolute() or ("/" in text and Path(text).exists())
    return True


def with_whole_paths(value: Any) -> Any:
    """Settings as a run's folder keeps them: files are named from the root, so that any folder can go on with it."""
    if isinstance(value, Mapping):
        return {key: with_whole_paths(item) for key, item in value.items()} if _names(value) else _of_files(value)
    if isinstance(value, list):
        return [with_whole_paths(item) for item in value]
    if isinstance(value, str) and value and (_is_path(value) or _is_file_here(value)):
        return str(Path(value).expanduser().absolute())
    return value


def _names(value: Mapping[str, Any]) -> bool:
    """Whether the keys are names of settings, and not files, as those of a mixture are."""
    return not any(_is_path(key) or _is_file_here(key) for key in value if key)


def _of_files(value: Mapping[str, Any]) -> dict[str, Any]:
    return {with_whole_paths(key): with_whole_paths(item) for key, item in value.items()}


def _is_file_here(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return "." in text and len(text) < 256 and Path(text).is_file()
    return False
