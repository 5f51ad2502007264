"""What a manifest says about a run: its base, and its settings without the folders of this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.base.ref import LocatedBase

if TYPE_CHECKING:
    from peftkit.backbone.load import Backbone


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


def without_paths(config: dict[str, Any], base: LocatedBase) -> dict[str, Any]:
    """Settings as the registry keeps them: names without the folders of this machine, instructions as a digest."""
    data, evaluate = dict(config.get("data") or {}), dict(config.get("evaluate") or {})
    if isinstance(config.get("base"), dict):
        config = {**config, "base": {**config["base"], "source": base.portable}}
    for group, key in ((data, "train"), (data, "held_out"), (evaluate, "retention")):
        if isinstance(group.get(key), str):
            group[key] = Path(group[key]).name
    if evaluate.get("instructions"):
        evaluate["instructions"] = "sha256:" + hashlib.sha256(str(evaluate["instructions"]).encode()).hexdigest()
    return {**config, **({"data": data} if data else {}), **({"evaluate": evaluate} if evaluate else {})}
