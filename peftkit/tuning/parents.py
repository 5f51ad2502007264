"""What a registered version was trained as; nothing heavy is imported for versions that were trained here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from peftkit.errors import TuningError
from peftkit.registry.store import Version
from peftkit.tuning.methods import METHODS, AdapterSpec


def parent_spec(version: Version, spec: AdapterSpec, asked: Collection[str] | None) -> AdapterSpec:
    """What a version was trained as.

    Raises TuningError when the user asks for something else, and when the manifest says what no method has.
    """
    parent = _recorded_spec(version)
    if asked is None:
        asked = spec.model_fields_set
    wanted = {key: getattr(spec, key) for key in asked if key != "seed"}
    differ = {key: value for key, value in wanted.items() if getattr(parent, key) != value}
    if differ:
        raise TuningError(
            f"init_from={version.reference} has {', '.join(f'{key}={getattr(parent, key)}' for key in differ)}, "
            f"but the settings ask for {', '.join(f'adapter.{key}={value}' for key, value in differ.items())}",
            expected="the parent's own adapter settings",
            hint="leave adapter.* out when continuing from an adapter",
        )
    return parent


def _recorded_spec(version: Version) -> AdapterSpec:
    recorded: Mapping[str, Any] = version.manifest.adapter
    if version.manifest.kind == "tensors" and recorded.get("method") not in list(METHODS):  # an imported one
        from peftkit.tuning.stored import read

        recorded = {"method": "patterns", "patterns": sorted(read(version).tensors)}
    try:
        return AdapterSpec.model_validate({key: recorded[key] for key in AdapterSpec.model_fields if key in recorded})
    except ValidationError as error:
        found = [
            (".".join(["adapter", *map(str, each["loc"])]), each["msg"]) for each in error.errors(include_url=False)
        ]
        raise TuningError(
            f"{version.reference} cannot be continued: its manifest says what no method has: "
            + "; ".join(f"{where}: {what}" for where, what in found),
            expected="adapter settings as peftkit records them",
            hint=f"peftkit show {version.name} lists them; it can still be attached, combined and merged",
        ) from error
