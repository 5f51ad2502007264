"""A version's settings, which are looked at before its tensors are."""

from __future__ import annotations

import hashlib
from typing import Any

from peftkit.canonical import strict_json
from peftkit.registry.store import Version
from peftkit.tuning.stored import read

_CONFIG = "adapter_config.json"


def config_of(version: Version) -> dict[str, Any]:
    """A version's `adapter_config.json`, whose digest is compared. Raises AdapterDamaged when it differs."""
    if version.manifest.kind != "peft":
        return {}
    try:
        content = (version.path / _CONFIG).read_bytes()
        if hashlib.sha256(content).hexdigest() == version.manifest.files[_CONFIG].sha256:
            return dict(strict_json(content))
    except (OSError, KeyError, ValueError, TypeError):
        pass  # reading all of it says what is wrong
    return read(version).config
