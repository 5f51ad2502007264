"""Adapters of a registry for the engine: some in the bank, more in host memory, all of them on disk.

Who is asked for gets a seat; who was not asked for longest makes room. An adapter that no bank can hold gets a model
of its own (tuning/attach.py), within the same memory.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from threading import RLock
from typing import Any, Literal

import torch

from peftkit.backbone.load import Backbone
from peftkit.errors import TuningError
from peftkit.events import Report, silent
from peftkit.generation.bank.bank import Bank, Factors
from peftkit.generation.bank.factors import factors_of, why_not
from peftkit.generation.bank.layout import NO_SLOT
from peftkit.generation.fleet.host import HostMemory, bytes_of
from peftkit.generation.fleet.learned import Learned
from peftkit.generation.fleet.own_models import OwnModels, stored_bytes
from peftkit.generation.fleet.room import Need, Resident, Room
from peftkit.generation.fleet.settings import config_of
from peftkit.generation.fleet.statistics import Statistics
from peftkit.generation.seats import Alone, Seat
from peftkit.registry.store import Version
from peftkit.tuning.fit import check_bare, check_base
from peftkit.tuning.resident import check_config_of
from peftkit.tuning.stored import Stored, read

_HOST_MEMORY = 2 << 30


class Fleet:
    """Gives seats to adapters by name, as `seats.Adapters` promises.

    `identify` and `statistics` may be called from any thread; seats are given and taken back one at a time. Whatever
    is raised, who was resident still is, unless it has made room already.
    """

    def __init__(
        self,
        backbone: Backbone,
        resolve: Callable[[str], Version],
        *,
        slots: int = 16,
        memory: int | None = None,
        host_memory: int = _HOST_MEMORY,
        other_base: bool = False,
        report: Report = silent,
    ) -> None:
        """`resolve` says what a name means now, such as `Registry.resolve`.

        `slots` adapters fit into the bank, and as many may have models of their own. Together they take `memory` bytes
        at most; a model of its own is measured once it is built, and let go again when it is too large. Factors that
        had to make room wait in `host_memory` bytes on the CPU.
        """
        check_bare(backbone)
        self.backbone = backbone
        self.bank = Bank(backbone.model, dtype=backbone.placement.compute_dtype, device=backbone.device, slots=slots)
        self._held_paths = self.bank.paths
        self._resolve, self._other_base, self._report = resolve, other_base, report
        self._alone, self._waiting = OwnModels(backbone, other_base=other_base), HostMemory(host_memory)
        self._room = Room(self.bank, memory)
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._pins: dict[str, str] = {}
        self._learned = Learned()
        self._receipts: tuple[dict[str, Any], ...] = ()
        self._forgotten: set[str] = set()
        self._counted = Statistics()
        self._checking, self._lock = RLock(), RLock()

    @property
    def receipts(self) -> tuple[dict[str, Any], ...]:
        """What was gone on with by `other_base`, for whatever is made here."""
        return self._receipts

    def identify(self, name: str | None) -> Version | None:
        """The version that a name means now; None is the base.

        Raises AdapterNotFound for a name that there is not, BaseMismatch for an adapter of another base (unless
        `other_base`), TuningError for settings that cannot be used, AdapterDamaged when these are not as published.
        """
        if name is None:
            return None
        version = self._resolve(name)
        self._checked(version)
        return version

    def seat(self, identity: Version | None) -> Seat | None:
        """A seat for a version until it is released, loading it when it has to be; None while there is no room.

        Raises AdapterDamaged when its files are not what was published, TuningError when it does not fit the base, or
        not into the memory beside what is pinned.
        """
        if identity is None:
            return Seat(self.bank, NO_SLOT, self.backbone.identity.fingerprint)
        with self._lock:
            resident = self._residents.get(identity.id)
            if resident is not None:
                self._counted = replace(self._counted, hits=self._counted.hits + 1)
            else:
                with torch.inference_mode(False), torch.no_grad():  # the stacks outlive whatever mode this is called in
                    resident = self._load(identity)
            if resident is None:
                return None
            self._residents.move_to_end(identity.id)
            self._forgotten.discard(identity.id)
            resident.users += 1
            return resident.seat

    def release(self, seat: Seat) -> None:
        """Give a seat back. Raises TuningError when it was given back already."""
        if seat.reference is None:
            return
        with self._lock:
            resident = self._residents.get(seat.digest)
            if resident is None or not resident.users:
                raise TuningError(f"the seat of {seat.reference} was given back already", expected="once for each seat")
            resident.users -= 1
            if not resident.users and seat.digest in self._forgotten:
                self.forget(seat.digest)

    def forget(self, version_id: str) -> None:
        """Let go of a version and of all that is known of it: now, or with its last seat. One that is pinned stays,
        and one that is asked for again is looked at and loaded as if it were new."""
        with self._lock, self._checking:
            resident = self._residents.get(version_id)
            if resident is not None and (resident.users or self._is_pinned(resident)):
                self._forgotten.add(version_id)
                return
            self._forgotten.discard(version_id)
            self._residents.pop(version_id, None)
            self._waiting.drop(version_id)
            self._learned.forget(version_id)
            self._free_models()
            if not self._residents:
                self.bank.resize(0, {})

    def pin(self, name: str) -> None:
        """Load what a name means now, and never let it make room. While there is no room it is loaded when it is asked
        for. Raises what `identify` and `seat` raise; then nothing is pinned."""
        version = self.identify(name)
        if version is None:
            return
        with self._lock:
            seat = self.seat(version)
            self._pins[name] = version.id
            if seat is not None:
                self.release(seat)

    def unpin(self, name: str) -> None:
        """Let what was pinned under a name make room again. Raises TuningError when nothing was."""
        with self._lock:
            if name not in self._pins:
                raise TuningError(f"{name} is not pinned", expected=f"one of: {', '.join(self._pins) or 'none'}")
            del self._pins[name]

    def statistics(self) -> Statistics:
        """What has happened so far, and who is where."""
        with self._lock:
            everyone = list(self._residents.values())
            return replace(
                self._counted,
                resident=tuple(resident.version.reference for resident in everyone),
                alone=tuple(resident.version.reference for resident in everyone if resident.need.ranks is None),
                in_host_memory=len(self._waiting.ids),
                bytes=self._room.used(everyone),
            )

    def close(self) -> None:
        """Let go of every adapter and of its memory. Raises TuningError while seats are in use."""
        with self._lock:
            seated = [resident.version.reference for resident in self._residents.values() if resident.users]
            if seated:
                raise TuningError(f"{len(seated)} adapters are in use: {', '.join(seated[:3])}", expected="no seats")
            self._pins.clear()
            self._residents.clear()
            self._free_models()
            self._waiting.clear()
            self.bank.resize(0, {})

    def _checked(self, version: Version) -> str | None:
        """Look at a version's settings and base once; returns why it cannot lie in the bank, as far as they tell."""
        with self._checking:
            if version.id not in self._learned.reasons:
                config = config_of(version)
                check_config_of(Stored(version, config, {}), self.backbone)
                found = check_base(version, self.backbone, other_base=self._other_base, report=self._report)
                self._receipts += tuple(receipt for receipt in found if receipt not in self._receipts)
                self._learned.reasons[version.id] = why_not(version.manifest.kind, config)
            return self._learned.reasons[version.id]

    def _load(self, version: Version) -> Resident | None:
        """Make a version resident; None while there is no room for it."""
        begun, reason = time.perf_counter(), self._checked(version)
        need = self._learned.needs.get(version.id, Need({})) if reason is None else self._need_alone(version)
        if self._who_goes(version, need) is None:
            return None  # known before anything is read: the engine asks again at every step
        factors = self._waiting.get(version.id) if reason is None else None
        from_host = factors is not None
        if reason is None and factors is None:
            factors = self._from_disk(version)
        resident = self._by_itself(version) if factors is None else self._in_bank(version, factors)
        if resident is None:
            return None
        size = resident.need.own if factors is None else bytes_of(factors)
        where: Literal["from_host", "from_disk"] = "from_host" if from_host else "from_disk"
        self._counted = self._counted.missed(where, time.perf_counter() - begun, size)
        return resident

    def _from_disk(self, version: Version) -> Factors | None:
        """A version's factors; None, and known from now on, when its tensors are none that a bank can hold."""
        stored = read(version)
        try:
            factors = factors_of(stored, self.backbone)
        except TuningError as error:
            self._learned.reasons[version.id] = error.fact
            return None
        if others := factors.keys() - self._held_paths:
            named = ", ".join(sorted(others)[:3])
            self._learned.reasons[version.id] = f"it changes layers that are not given every token: {named}"
            return None
        return factors

    def _in_bank(self, version: Version, factors: Factors) -> Resident | None:
        ranks = {path: int(right.shape[0]) for path, (right, _) in factors.items()}
        need = self._learned.ranks(version.id, ranks)
        if not self._make_room(version, need):
            self._waiting.put(version.id, factors)
            return None
        slot = self._room.make(self._residents.values(), need)
        self.bank.fill(slot, factors)
        seat = Seat(self.bank, slot, version.id, version.reference)
        self._waiting.drop(version.id)
        return self._residents.setdefault(version.id, Resident(version, need, seat))

    def _by_itself(self, version: Version) -> Resident | None:
        """A model of its own. What it takes is known once it is built; when that is too much, it goes again."""
        self._free_models()
        need = self._need_alone(version)
        if not self._make_room(version, need):
            return None
        self._room.make(self._residents.values(), need)
        try:
            model, own = self._alone.build(version)
            need = self._learned.needs[version.id] = Need(None, own)
            if not self._make_room(version, need):
                return None
            self._room.make(self._residents.values(), need)
            seat = Seat(Alone(model), NO_SLOT, version.id, version.reference)
            return self._residents.setdefault(version.id, Resident(version, need, seat))
        finally:
            self._free_models()

    def _need_alone(self, version: Version) -> Need:
        """What its model takes as far as is known; a guess makes room, and refuses nobody."""
        known, guess = self._learned.needs.get(version.id), Need(None, stored_bytes(version))
        if known is not None and known.ranks is None:
            return known
        return guess if self._room.fits(self._held(), guess, idle=True) else Need(None)

    def _make_room(self, version: Version, need: Need) -> bool:
        """Let others go until one more fits; False, and nobody has gone, while that does not suffice."""
        going = self._who_goes(version, need)
        for resident in going or ():
            self._evict(resident)
        return going is not None

    def _who_goes(self, version: Version, need: Need) -> list[Resident] | None:
        """Raises TuningError when there would be no room even if nobody but the pinned were here."""
        held = self._held()
        if not self._room.fits(held, need, idle=True):
            raise self._room.too_small(version, need, held)
        return self._room.victims(list(self._residents.values()), need, self._is_pinned)

    def _held(self) -> list[Resident]:
        return [resident for resident in self._residents.values() if self._is_pinned(resident)]

    def _is_pinned(self, resident: Resident) -> bool:
        return resident.version.id in self._pins.values()

    def _evict(self, resident: Resident) -> None:
        """Let an adapter that nobody uses make room; its factors go to host memory."""
        identity, ranks = resident.version.id, resident.need.ranks
        if ranks is not None and self._waiting.has_room_for(self.bank.bytes_for(1, ranks)):
            self._waiting.put(identity, self.bank.take(resident.seat.slot, ranks))
        del self._residents[identity]
        self._counted = replace(self._counted, evictions=self._counted.evictions + 1)
        if ranks is None:
            self._free_models()

    def _free_models(self) -> None:
        """Free the models of those who are not resident."""
        self._alone.keep_only([resident.version.reference for resident in self._residents.values()])
