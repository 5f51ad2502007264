"""A model of what a disk may hold after a crash.

What an operation did (`recorder.py`) is replayed here. Everything stays pending until it is made durable: the bytes of
a file by fsync of that file, the entries of a folder by fsync of that folder. After a crash the disk holds what is
durable and any subset of what is pending; a pending file may be complete, empty, cut in half or zeros.

What the model assumes of a file system, as journalling ones give it: a rename is kept or lost as a whole and durable
once either of its folders is fsynced; of two changes to one entry (the same name in the same folder) the later is never
kept without the earlier. It assumes no order between different entries, not even within one folder, and that fsync of
a file says nothing about the entry that names it. The modes of files are not modelled.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Slot = tuple[int, str]
"""One entry: the number of the folder's inode, and a name."""
Tree = dict[str, bytes | None]
"""What a folder holds by relative path: the bytes of a file, None for a folder."""

TOP = 0
_EXHAUSTIVE = 64
_SAMPLES = 24


@dataclass(frozen=True)
class Event:
    """One change of the disk, or one fsync."""

    kind: str  # create, mkdir, link, unlink, rmdir, rename, write, fsync
    inode: int
    slots: tuple[Slot, ...] = ()
    data: bytes = b""
    sites: tuple[str, ...] = ()
    """For an fsync, which lines of the registry's code asked for it."""

    @property
    def adds(self) -> Slot | None:
        """The entry that names the inode from now on."""
        return self.slots[-1] if self.kind in ("create", "mkdir", "link", "rename") else None

    @property
    def drops(self) -> Slot | None:
        """The entry that is gone."""
        return self.slots[0] if self.kind in ("unlink", "rmdir", "rename") else None


class Disk:
    """What is durable, and what is pending, in the order in which it was done."""

    def __init__(self, hidden: Callable[[str], bool]) -> None:
        self.hidden = hidden  # whether no reader looks at this path, relative to the top
        self.folders: dict[int, dict[str, int]] = {TOP: {}}
        self.files: dict[int, bytes] = {}
        self.pending: list[Event] = []
        self.next = TOP + 1

    @classmethod
    def holding(cls, tree: Tree, hidden: Callable[[str], bool]) -> Disk:
        """A disk on which all of `tree` is durable."""
        disk = cls(hidden)
        at = {"": TOP}
        for path in sorted(tree):
            folder, _, name = path.rpartition("/")
            at[path] = inode = disk.new()
            data = tree[path]
            if data is None:
                disk.folders[inode] = {}
            else:
                disk.files[inode] = data
            disk.folders[at[folder]][name] = inode
        return disk

    def copy(self) -> Disk:
        """The same disk, to go on from twice."""
        other = Disk(self.hidden)
        other.folders = {inode: dict(entries) for inode, entries in self.folders.items()}
        other.files = dict(self.files)
        other.pending = list(self.pending)
        other.next = self.next
        return other

    def new(self) -> int:
        """A number for an inode that was not there."""
        self.next += 1
        return self.next - 1

    def feed(self, event: Event) -> None:
        """Do one more thing; an fsync makes durable what it covers."""
        self.next = max(self.next, event.inode + 1)
        if event.kind == "fsync":
            self._fsync(event.inode)
            return
        if event.kind == "mkdir":
            self.folders[event.inode] = {}
        elif event.kind == "create":
            self.files[event.inode] = b""
        self.pending.append(event)

    def live(self) -> dict[str, int]:
        """The inode of every path, as processes see it before the crash."""
        return dict(_walk(self._after(range(len(self.pending))), TOP, ""))

    def tree(self) -> Tree:
        """What processes see before the crash."""
        return self._render(range(len(self.pending)), {})

    def crash_states(self, dice: random.Random) -> Iterator[Tree]:
        """What the disk may hold if the power fails now: all of it if that is at most 64 states, else a sample.

        What no reader can ever see, because it is hidden or was never linked, is either all kept or
        all lost: it only decides which leftovers there are.
        """
        seen = self._visible()
        entries = [n for n, event in enumerate(self.pending) if any(slot[0] in seen for slot in event.slots)]
        unsynced = sorted({event.inode for event in self.pending if event.kind == "write" and event.inode in seen})
        choices: list[Sequence[object]] = [(True, False)] * len(entries) + [("all", "none", "half", "zeros")] * len(
            unsynced
        )
        others = [n for n in range(len(self.pending)) if n not in entries and self.pending[n].kind != "write"]
        for chosen in _choose(choices, dice):
            kept = {n for n, keep in zip(entries, chosen, strict=False) if keep is True}
            if any(earlier not in kept for n in kept for earlier in self._before(n) if earlier in entries):
                continue  # a later change of an entry is never kept without the earlier one
            torn = {inode: str(how) for inode, how in zip(unsynced, chosen[len(entries) :], strict=True)}
            if not others or dice.random() < 0.5:
                kept |= {n for n in others if all(e in kept or e in others for e in self._before(n))}
            yield self._render(self._with_earlier(kept), torn)

    def pending_visible(self) -> bool:
        """Whether something is pending that a reader could see."""
        seen = self._visible()
        return any(
            event.inode in seen if event.kind == "write" else any(slot[0] in seen for slot in event.slots)
            for event in self.pending
        )

    def _fsync(self, inode: int) -> None:
        covered = {
            n
            for n, event in enumerate(self.pending)
            if (event.kind == "write" and event.inode == inode) or any(slot[0] == inode for slot in event.slots)
        }
        durable = self._with_earlier(covered)
        for n in durable:
            _apply(self.pending[n], self.folders, self.files)
        self.pending = [event for n, event in enumerate(self.pending) if n not in set(durable)]

    def _before(self, number: int) -> list[int]:
        """The pending changes that must be kept if this one is: earlier ones of the same entries."""
        slots = set(self.pending[number].slots)
        return [n for n in range(number) if slots & set(self.pending[n].slots)]

    def _with_earlier(self, kept: set[int]) -> list[int]:
        slots: set[Slot] = set()
        found = []
        for n in range(len(self.pending) - 1, -1, -1):
            if n in kept or slots & set(self.pending[n].slots):
                found.append(n)
                slots |= set(self.pending[n].slots)
        return found[::-1]

    def _visible(self) -> set[int]:
        """Every inode that some crash state shows where readers look."""
        union = {inode: [(name, child) for name, child in names.items()] for inode, names in self.folders.items()}
        for event in self.pending:
            if event.adds:
                union[event.adds[0]].append((event.adds[1], event.inode))
        found, waiting = {TOP}, [(TOP, "")]
        while waiting:
            inode, path = waiting.pop()
            for name, child in union[inode]:
                where = f"{path}/{name}" if path else name
                if child not in found and not self.hidden(where):
                    found.add(child)
                    if child in union:
                        waiting.append((child, where))
        return found

    def _after(self, kept: Sequence[int]) -> dict[int, dict[str, int]]:
        folders = {inode: dict(entries) for inode, entries in self.folders.items()}
        for n in kept:
            _apply(self.pending[n], folders, None)
        return folders

    def _render(self, kept: Sequence[int], torn: dict[int, str]) -> Tree:
        tree: Tree = {}
        for path, inode in _walk(self._after(kept), TOP, ""):
            tree[path] = None if inode in self.folders else self._content(inode, torn.get(inode, "all"))
        return tree

    def _content(self, inode: int, how: str) -> bytes:
        before = self.files[inode]
        written = b"".join(event.data for event in self.pending if event.kind == "write" and event.inode == inode)
        rest = {"all": written, "none": b"", "half": written[: len(written) // 2], "zeros": bytes(len(written))}[how]
        return before + rest if rest else before


def _apply(event: Event, folders: dict[int, dict[str, int]], files: dict[int, bytes] | None) -> None:
    if event.kind == "write":
        if files is not None:
            files[event.inode] += event.data
        return
    if event.drops:
        folders[event.drops[0]].pop(event.drops[1], None)
    if event.adds:
        folders[event.adds[0]][event.adds[1]] = event.inode


def _walk(folders: dict[int, dict[str, int]], inode: int, path: str) -> Iterator[tuple[str, int]]:
    for name in sorted(folders[inode]):
        child = folders[inode][name]
        where = f"{path}/{name}" if path else name
        yield where, child
        if child in folders:
            yield from _walk(folders, child, where)


def _choose(choices: list[Sequence[object]], dice: random.Random) -> Iterator[tuple[object, ...]]:
    count = 1
    for each in choices:
        count *= len(each)
    if count <= _EXHAUSTIVE:
        yield from itertools.product(*choices)
        return
    everything = [each[0] for each in choices]
    nothing = [False if each[0] is True else "none" for each in choices]
    found = [tuple(everything), tuple(nothing)]
    for at, each in enumerate(choices):
        found += [(*everything[:at], other, *everything[at + 1 :]) for other in each[1:]]
        found.append((*nothing[:at], each[0], *nothing[at + 1 :]))
    found += [tuple(dice.choice(each) for each in choices) for _ in range(_SAMPLES)]
    yield from dict.fromkeys(found)
