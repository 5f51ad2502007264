"""Adapters that no bank can hold, each with a model of its own beside the base, and what it takes."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached
from peftkit.tuning.skeleton import places


class OwnModels:
    """Models by version; they share every tensor of the base."""

    def __init__(self, backbone: Backbone, *, other_base: bool) -> None:
        self.backbone = backbone
        self._host, self._other_base = Attached(backbone), other_base

    def build(self, version: Version) -> tuple[Any, int]:
        """A version's model, and the bytes of its tensors that the base does not have. Raises what `attach` raises."""
        name = self._host.attach(version, version.reference, other_base=self._other_base)
        with self._host.using(name) as model:
            return model, self._own_bytes(model)

    def keep_only(self, references: Collection[str]) -> None:
        """Free all others, also one whose loading was interrupted; whoever calls such a model gets an error."""
        for name in self._host.versions.keys() - set(references):
            self._host.detach(name)

    def _own_bytes(self, model: Any) -> int:
        base = {tensor.untyped_storage().data_ptr() for _, _, tensor in places(self.backbone.model)}
        storages = [tensor.untyped_storage() for _, _, tensor in places(model) if not tensor.is_meta]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in base}.values())


def stored_bytes(version: Version) -> int:
    """Bytes of a version's stored tensors: about what its model takes."""
    total = 0
    for name, file in version.manifest.files.items():
        if name.endswith(".safetensors"):
            with (
                suppress(OSError),
                open(version.path / name, "rb") as stream,
            ):  # whoever reads it all says what is wrong
                total += max(0, file.bytes - 8 - int.from_bytes(stream.read(8), "little"))
    return total
