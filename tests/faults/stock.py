"""The contents that operations publish: tiny versions, base records and relations, always the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.base.record import BaseRecord
from peftkit.base.relations import Relation
from peftkit.registry import Draft, Registry, bases
from peftkit.registry.exchange import export

EXPORTED = "exported"


class Stock:
    """The contents that operations publish, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.sources = [folder / str(number) for number in range(6)]
        for number, source in enumerate(self.sources):
            (source / "deep").mkdir(parents=True)
            (source / "tensors.safetensors").write_bytes(_tensors(number))
            (source / "deep/extra.json").write_text(json.dumps({"number": number}))
        self.records = [BaseRecord({"model_type": str(n)}, f"{n}" * 64, {}, None, {}) for n in range(3)]
        self.relations = [
            Relation(child.sha256, "f" * 64, "gguf", {"w": 0.5}) for child in (self.records[0], self.records[2])
        ]

        elsewhere = Registry(folder / "elsewhere")
        plain = folder / "plain"
        plain.mkdir()
        (plain / "tensors.safetensors").write_bytes(_tensors(6))
        elsewhere.publish("tickets", plain, self.draft(6, record=1), base=self.records[1])
        self.exported = folder / EXPORTED
        export(elsewhere, "tickets", self.exported)

    def draft(self, number: int, parent: str | None = None, record: int | None = None, month: int = 1) -> Draft:
        """The draft for content `number`; the same arguments give the same version."""
        fields: dict[str, Any] = {
            "kind": "tensors",
            "created": f"2026-{month:02d}-01T00:00:00Z",
            "base": {
                "source": "b",
                "fingerprint": "f" * 64 if record is None else self.records[record].fingerprint,
                "parts": {} if record is None else self.records[record].parts(),
                "record": None if record is None else self.records[record].id,
            },
            "metrics": {"other": {"number": number}},
            "parents": [{"name": parent.split("@")[0], "version": parent.split("@")[1], "relation": "continued"}]
            if parent
            else [],
        }
        return Draft.model_validate(fields)

    def fill(self, registry: Registry) -> None:
        """Something of everything: two adapters, aliases, a child, unneeded versions, records and relations."""
        first = registry.publish("tickets", self.sources[0], self.draft(0), ["prod"])
        registry.publish("tickets", self.sources[5], self.draft(5))
        registry.publish(
            "tickets", self.sources[3], self.draft(3, first.reference, record=0), base=self.records[0], aliases=["next"]
        )
        registry.untag("tickets", "next")
        # The child is the older one by its clock.
        parent = registry.publish("orders", self.sources[4], self.draft(4, month=3))
        registry.publish("orders", self.sources[5], self.draft(5, parent.reference, month=2))
        registry.publish("orders", self.sources[0], self.draft(0))
        with registry.writing("fill"):
            bases.keep(registry.layout, self.records[2])
            for relation in self.relations:
                bases.keep_relation(registry.layout, relation)


def _tensors(number: int) -> bytes:
    data = struct.pack("<2f", number, 1.0)
    header: Mapping[str, Any] = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data
