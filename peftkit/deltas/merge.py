"""Merge an adapter into the weights of its base, one tensor at a time, and say how much of it was kept.

The result is written beside its place, synced as it grows, and published by one rename. A merge that was interrupted
goes on where it stopped and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.base.identity import identify
from peftkit.base.ref import LocatedBase, read_config
from peftkit.canonical import digest_json
from peftkit.deltas.delta import Deltas
from peftkit.deltas.merging.assembly import interrupted, starts, write_shards
from peftkit.deltas.merging.building import Building
from peftkit.deltas.merging.companions import companions, merged_config, spelled
from peftkit.deltas.merging.journal import FORMAT, Journal, Line
from peftkit.deltas.merging.kept import Kept
from peftkit.deltas.merging.layout import Shard, index, shards
from peftkit.deltas.merging.plan import MergePlan, plan_of
from peftkit.deltas.merging.product import Product, Rounded
from peftkit.deltas.merging.receipt import FILE, MergeReceipt, Provenance, digest_of
from peftkit.deltas.merging.requantized import Requantized
from peftkit.deltas.merging.settings import MergeSettings
from peftkit.deltas.merging.weight import Unwritable
from peftkit.deltas.merging.work import Task, products, written_config
from peftkit.durable import digest_file
from peftkit.environment import versions
from peftkit.events import Report, silent

__all__ = ["MergePlan", "MergeReceipt", "MergeSettings", "Provenance", "merge", "plan_merge"]

Examine = Callable[[Path], Mapping[str, Mapping[str, Any]]]
_VERSIONS = ("peftkit", "torch", "transformers", "bitsandbytes")


def plan_merge(
    base: LocatedBase | Path,
    deltas: Deltas,
    out: Path,
    settings: MergeSettings,
    *,
    trained_on: Mapping[str, Any] | None = None,
) -> MergePlan:
    """What a merge would write and need, from headers alone. Raises what `merge` refuses before it writes."""
    building = Building(out)
    building.check_out()
    model = _Model.of(_task(base, deltas, settings, trained_on))
    return model.plan(building)


def merge(
    base: LocatedBase | Path,
    deltas: Deltas,
    out: Path,
    settings: MergeSettings,
    *,
    trained_on: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    cache: Path | None = None,
    examine: Examine | None = None,
    report: Report = silent,
) -> MergeReceipt:
    """Write base + ΔW to the folder `out`: each tensor is computed in float64 and rounded once, or quantized.

    `trained_on` is the manifest's `base.quantization`, which `onto="dequantized"` needs; `provenance` is what the
    receipt says of the deltas; `cache` keeps the base's digests. `examine` looks at the complete folder before it is
    published, and returns what the receipt says of the model; what it raises stops the merge, which goes on from there
    when it is asked for again. Raises DeltaError for deltas that do not fit the base, numbers that are not finite, a
    disk without room, another process at work on `out`, and a result that keeps less than 90 % of the delta without
    `force`; nothing is published then.
    """
    building = Building(out)
    building.check_out()
    task = _task(base, deltas, settings, trained_on)
    model = _Model.of(task)
    identity = identify(task.folder, cache)
    facts = {"record": identity.record.sha256, "weights": identity.weights}
    added = digest_of(deltas)
    origin = provenance or Provenance([(deltas.reference, 1.0)])
    with building.held():
        journal = Journal(building.journal, _inputs(facts, added, task))
        begun = starts(model.shards, building, journal, report)
        model.plan(building).check_room()
        try:
            lines, digests = write_shards(model.shards, model.made, begun, building, journal, report)
        except Unwritable:
            building.drop()
            raise
        kept, forms = model.kept(lines), model.forms()
        head = deltas.headed.record() if deltas.headed else None
        receipt = MergeReceipt(facts, added, origin, settings, trained_on, _versions(), kept, forms, head)
        receipt.check_or(building.drop)
        try:
            files = model.weights(digests) | _write_companions(model, building)
            receipt = replace(receipt, files=files, model=examine(building.model) if examine else {})
            building.write(FILE, spelled(receipt.as_record()))
            building.publish()
        except OSError as error:
            raise interrupted(error, building) from error
    return receipt


@dataclass(frozen=True)
class _Model:
    """What will be written: units in files, and the product that makes each."""

    task: Task
    shards: tuple[Shard, ...]
    made: Mapping[str, Product]

    @classmethod
    def of(cls, task: Task) -> _Model:
        """Lay out the files. Raises what `products` raises."""
        found = products(task)
        units = [product.unit for product in found]
        made = {unit.name: product for unit, product in zip(units, found, strict=True)}
        return cls(task, shards(units, task.settings.shard_size), made)

    def plan(self, building: Building) -> MergePlan:
        """Its figures."""
        return plan_of(list(self.made.values()), self.shards, self.task.deltas, building)

    def kept(self, lines: list[Line]) -> dict[str, Kept]:
        """What each changed tensor keeps, by the tensor's own name (a unit has that of its first constant)."""
        found = {}
        for line in lines:
            product = self.made[line.unit]
            if line.kept is not None and isinstance(product, Rounded | Requantized):
                found[product.weight.name] = line.kept
        return found

    def forms(self) -> dict[str, str]:
        """Tensor with a delta → its kind, and what it is written as."""
        found = {}
        for product in self.made.values():
            if isinstance(product, Rounded | Requantized) and product.weight.delta is not None:
                code = (
                    product.form.code if isinstance(product, Requantized) else str(product.dtype).removeprefix("torch.")
                )
                found[product.weight.name] = f"{product.weight.delta.kind} in {code}"
        return found

    def weights(self, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Digest and size of each file of weights."""
        return {shard.file: {"sha256": digests[shard.file], "bytes": shard.bytes} for shard in self.shards}


def _task(
    base: LocatedBase | Path, deltas: Deltas, settings: MergeSettings, trained_on: Mapping[str, Any] | None
) -> Task:
    folder = base.folder if isinstance(base, LocatedBase) else base
    config = read_config(folder)
    return Task(folder, config, merged_config(config, folder, deltas, settings), deltas, settings, trained_on)


def _inputs(base: Mapping[str, str], added: str, task: Task) -> str:
    """Digest of all that the bytes depend on; `force` changes none."""
    settings = task.settings.model_dump(exclude={"force"})
    trained_on = dict(task.trained_on) if task.trained_on else None
    return digest_json([FORMAT, dict(base), added, settings, trained_on, _versions()])


def _versions() -> dict[str, str]:
    return {name: version for name, version in versions().items() if name in _VERSIONS}


def _write_companions(model: _Model, building: Building) -> dict[str, dict[str, Any]]:
    """config.json, the index, and the small files of the base; the digests of what was written."""
    contents = {name: (model.task.folder / name).read_bytes() for name in companions(model.task.folder)}
    contents["config.json"] = spelled(written_config(model.task))
    if len(model.shards) > 1:
        contents["model.safetensors.index.json"] = index(model.shards)
    found = {}
    for name, content in sorted(contents.items()):
        building.write(name, content)
        found[name] = {"sha256": digest_file(building.model / name), "bytes": len(content)}
    return found
