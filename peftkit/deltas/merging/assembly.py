"""The tensors of a merged model written into their files, from where an earlier attempt stopped."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftkit.deltas.merging.building import Building
from peftkit.deltas.merging.journal import Journal, Line
from peftkit.deltas.merging.kept import Kept
from peftkit.deltas.merging.layout import Shard, Unit
from peftkit.deltas.merging.product import Job, Product
from peftkit.deltas.merging.shard import ShardWriter, verified
from peftkit.deltas.merging.stream import pieces, workers
from peftkit.errors import DeltaError
from peftkit.events import Note, Phase, Progress, Report
from peftkit.render import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Start:
    """Where to go on in one file: after these units, with this digest of what is there."""

    done: list[Line]
    digest: hashlib._Hash


@dataclass(frozen=True)
class _Placed(Product):
    """A product on its way into a file."""

    product: Product
    shard: int
    last: bool
    """Whether it is the last of the file."""

    @property
    def unit(self) -> Unit:
        return self.product.unit

    def jobs(self) -> Iterator[Job]:
        return self.product.jobs()


def starts(shards: Sequence[Shard], building: Building, journal: Journal, report: Report) -> list[Start]:
    """What an earlier attempt with the same inputs finished; what another one left is removed."""
    lines = journal.read()
    if lines is None:
        if building.model.exists():
            report(Note(f"{building.folder} holds a merge of other inputs: beginning anew"))
        building.clear()
    building.model.mkdir(exist_ok=True)
    found: list[Start] = []
    whole = True
    for shard in shards:
        mine = [line for line in lines or [] if line.file == shard.file] if whole else []
        planned = [unit.name for unit in shard.units]
        fitting = mine if [line.unit for line in mine] == planned[: len(mine)] else []
        start = Start(*verified(building.model / shard.file, fitting))
        whole = len(start.done) == len(planned)
        found.append(start)
    journal.begin([line for start in found for line in start.done])
    kept = sum(len(start.done) for start in found)
    if kept:
        report(Note(f"going on after {kept} tensors that an earlier attempt finished"))
    return found


def write_shards(
    shards: Sequence[Shard],
    made: Mapping[str, Product],
    begun: Sequence[Start],
    building: Building,
    journal: Journal,
    report: Report,
) -> tuple[list[Line], dict[str, str]]:
    """Write what is missing; the lines of all units, and the digest of each file.

    `made` has the product of each unit by the unit's name. Raises DeltaError when the disk is full; what was finished
    is kept then, as it is after any other error.
    """
    lines = [line for start in begun for line in start.done]
    digests = {shard.file: start.digest.hexdigest() for shard, start in zip(shards, begun, strict=True)}
    report(Phase("merging", sum(len(shard.units) for shard in shards), "tensors"))
    writer: ShardWriter | None = None
    kept: Kept | None = None
    try:
        with workers() as pool:
            for placed, piece, last in pieces(pool, _missing(shards, made, begun)):
                shard, start = shards[placed.shard], begun[placed.shard]
                writer = writer or ShardWriter(building.model / shard.file, shard, start.done, start.digest, journal)
                for data in piece.data:
                    writer.write(data)
                kept = piece.kept if kept is None or piece.kept is None else kept + piece.kept
                if last:
                    lines.append(writer.finished(placed.unit.name, kept))
                    kept = None
                    report(Progress(len(lines), {}))
                if last and placed.last:
                    digests[shard.file] = writer.close()
                    writer = None
    except OSError as error:
        raise interrupted(error, building) from error
    finally:
        if writer is not None:
            writer.abandon()
    return lines, digests


def interrupted(error: OSError, building: Building) -> DeltaError:
    """The error for a disk that is full or fails."""
    if error.errno not in _FULL:
        return DeltaError(f"{building.out} cannot be written: {error}", expected="a disk that takes what is written")
    there = sum(path.stat().st_size for path in building.model.glob("*") if path.is_file())
    return DeltaError(
        f"the disk of {building.out} is full after {size(there)}: {error.strerror}",
        expected="room for the whole model",
        hint=f"free some space and repeat the command: it goes on from there; or give up: rm -r {building.folder}",
    )


def _missing(shards: Sequence[Shard], made: Mapping[str, Product], begun: Sequence[Start]) -> Iterator[_Placed]:
    for number, (shard, start) in enumerate(zip(shards, begun, strict=True)):
        left = shard.units[len(start.done) :]
        for unit in left:
            yield _Placed(made[unit.name], number, unit is left[-1])
