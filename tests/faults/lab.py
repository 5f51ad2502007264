"""Runs operations with a recorder, crashes them in the model, and judges what is left.

A trace is what happened to one registry: operations, the last of which may have been cut off by a kill or an error.
`Lab.explore` cuts the power after every change and looks at every state that the disk may then hold.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from faults.disk import Disk, Event, Tree
from faults.operations import OPERATIONS, Items, Plan, find, mixed
from faults.recorder import Fault, Killed, Recorder, write_tree
from faults.stock import EXPORTED, Stock

from peftkit.errors import RegistryError
from peftkit.registry import Registry
from peftkit.registry import aliases as alias_records

ROOT = "deep/registry"  # its parent is missing too at first


@dataclass
class Step:
    """One operation as it went; `after` is what it gives, also if it was cut off."""

    plan: Plan
    events: list[Event]
    before: Items
    after: Items
    finished: bool = True


@dataclass
class Trace:
    """Steps from one state of the disk on; only the last step is crashed, the ones before it give what is pending."""

    start: Disk
    steps: list[Step]


@dataclass
class Report:
    """What exploring found."""

    points: int = 0
    states: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Count another report in."""
        self.points += other.points
        self.states += other.states
        self.outcomes += other.outcomes
        self.bad += other.bad


@dataclass
class Run:
    """One operation in a fresh folder."""

    events: list[Event]
    calls: list[str]
    disk: Disk
    error: RegistryError | None = None
    killed: bool = False


Found = tuple[Items, set[str], list[str]]
_Key = frozenset[tuple[str, bytes | None]]


class Lab:
    """Works below `folder`, best in memory; remembers what it has looked at, by content."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.stock = Stock(folder / "stock")
        self.dice = random.Random(seed)
        self._numbers = itertools.count()
        self._found: dict[_Key, Found] = {}
        self._again: dict[tuple[str, _Key, _Key], Found] = {}

    @property
    def distinct(self) -> int:
        """How many different states were laid out on a real disk and read."""
        return len(self._found)

    def start(self, stocked: bool) -> Disk:
        """Nothing at all, or a registry with something of everything, all of it durable."""
        disk = Disk.holding({}, hidden)
        if not stocked:
            return disk
        plan = Plan("fill", self.stock.fill, lambda one, other: False)
        return Disk.holding(self.run(disk, plan).disk.tree(), hidden)

    def plan(self, disk: Disk, name: str) -> Plan | None:
        """The operation with its arguments, if it makes sense there."""
        with self._laid_out(disk.tree()) as top:
            return OPERATIONS[name](Registry(top / ROOT), self.stock)

    def run(self, disk: Disk, plan: Plan, fault: Fault | None = None) -> Run:
        """Do it on a real folder, recorded; nothing may change that folder unseen."""
        with self._laid_out(disk.tree()) as top:
            recorder = Recorder(top, disk, fault)
            error, killed = None, False
            try:
                with recorder.recording(), still_clock():
                    plan.act(Registry(top / ROOT, lock_timeout=0))
            except Killed:
                killed = True
            except RegistryError as raised:
                error = raised
            recorder.check()
        return Run(recorder.events, recorder.calls, recorder.disk, error, killed)

    def step(self, disk: Disk, plan: Plan) -> tuple[Step, Disk] | None:
        """Do it whole; None if the registry refuses it, which must leave all items as they were."""
        run = self.run(disk, plan)
        before, after = self.items(disk), self.items(run.disk)
        if run.error is not None:
            assert before == after, f"{plan.name} was refused and changed something: {run.error}"
            return None
        return Step(plan, run.events, before, after), run.disk

    def cut_off(self, disk: Disk, plan: Plan, number: int, whole: Step) -> tuple[Step, Disk]:
        """Kill it before its call with this number."""

        def fault(call: int, kind: str, path: str) -> None:
            if call == number:
                raise Killed

        run = self.run(disk, plan, fault)
        assert run.killed
        return Step(plan, run.events, whole.before, whole.after, finished=False), run.disk

    def items(self, disk: Disk) -> Items:
        """What readers find before any crash; it must be sound."""
        items, _, wrong = self.look(disk.tree())
        assert not wrong, wrong
        return items

    def look(self, tree: Tree) -> Found:
        """What readers find; they never look into tmp/."""
        visible = _visible(tree)
        key = frozenset(visible.items())
        if key not in self._found:
            with self._laid_out(visible) as top:
                self._found[key] = find(top / ROOT)
        return self._found[key]

    def repeat(self, tree: Tree, plan: Plan) -> Found:
        """What readers find after doing it in this state, leftovers and all."""
        visible = frozenset(_visible(tree).items())
        left = frozenset(tree.items()) - visible if plan.name.startswith("collect") else frozenset()
        key = (plan.name, visible, left)
        if key not in self._again:
            with self._laid_out(tree) as top:
                try:
                    with still_clock():
                        plan.act(Registry(top / ROOT, lock_timeout=0))
                    self._again[key] = find(top / ROOT)
                except RegistryError as error:
                    self._again[key] = ({}, set(), [f"done again, it stopped with {error}"])
        return self._again[key]

    def explore(self, trace: Trace, *, without: str | None = None, again: bool = True) -> Report:
        """Cut the power at every point of the last step, and judge what is left.

        `without` takes the fsyncs that this line asked for out of the trace, as if the line were not there.
        """
        report, disk = Report(), trace.start.copy()
        *earlier, last = trace.steps
        # After another operation was cut off, the crash may take away what this one was about.
        again = again and all(each.finished or each.plan is last.plan for each in earlier)
        for event in _events(earlier, without):
            disk.feed(event)
        for event in _events([last], without):
            disk.feed(event)
            if event.kind != "fsync":
                report.points += 1
                self._judge(report, disk, trace, acknowledged=False, again=again)
        if last.finished:
            report.points += 1
            self._judge(report, disk, trace, acknowledged=True, again=False)
        return report

    def _judge(self, report: Report, disk: Disk, trace: Trace, *, acknowledged: bool, again: bool) -> None:
        step = trace.steps[-1]
        for tree in disk.crash_states(self.dice):
            report.states += 1
            items, unfinished, wrong = self.look(tree)
            complaint = "; ".join(wrong) or _unsound(trace, items, unfinished, acknowledged)
            if not complaint and again and not (step.plan.once and items == step.after):
                complaint = self._not_mended(tree, trace)
            if complaint:
                report.bad.append(f"{' then '.join(each.plan.name for each in trace.steps)}: {complaint}")
            report.outcomes["old" if items == step.before else "new" if items == step.after else "between"] += 1

    def _not_mended(self, tree: Tree, trace: Trace) -> str | None:
        step = trace.steps[-1]
        items, unfinished, wrong = self.repeat(tree, step.plan)
        if wrong or unfinished:
            return "; ".join(wrong) or f"still without latest: {unfinished}"
        if all(each.finished for each in trace.steps[:-1]) and items != step.after:
            return f"done again, it gives {items}, not {step.after}"
        return None

    def _laid_out(self, tree: Tree) -> _LaidOut:
        return _LaidOut(self.folder / str(next(self._numbers)), tree)


class _LaidOut:
    """A tree as a real folder, for a while."""

    def __init__(self, top: Path, tree: Tree) -> None:
        self.top, self.tree = top, tree

    def __enter__(self) -> Path:
        write_tree(self.top, self.tree)
        return self.top

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.top)


def memory() -> Path | None:
    """A folder in memory, where fsync costs nothing, if this system has one."""
    found = Path("/dev/shm")
    return found if os.access(found, os.W_OK) else None


def _unsound(trace: Trace, items: Items, unfinished: set[str], acknowledged: bool) -> str | None:
    *earlier, step = trace.steps
    cut_off = [each for each in earlier if not each.finished]
    publishing = cut_off if acknowledged else [*cut_off, step]
    if unfinished and not any(each.plan.name.startswith("publish") for each in publishing):
        return f"without latest: {unfinished}"
    if not cut_off:
        if acknowledged:
            return None if items == step.after else f"acknowledged, but {items} is not {step.after}"
        return mixed(step.plan, step.before, step.after, items)
    kept = step.plan.promised | {
        item for item in step.before.keys() | step.after.keys() if step.before.get(item) != step.after.get(item)
    }
    states = [step.before, step.after, *(each.before for each in cut_off)]
    for item in {item for state in (*states, items) for item in state}:
        value = items.get(item)
        if acknowledged and item in kept and value != step.after.get(item):
            return f"acknowledged, but {item} is {value}, not {step.after.get(item)}"
        if value not in [state.get(item) for state in states]:
            return f"{item} is {value}, which it never was"
    return None


def _events(steps: Iterable[Step], without: str | None) -> Iterable[Event]:
    return (event for step in steps for event in step.events if without is None or without not in event.sites)


def hidden(path: str) -> bool:
    """Whether `path` lies where no reader looks: in tmp/, or in an export that is still being built."""
    return path == f"{ROOT}/tmp" or path.startswith((f"{ROOT}/tmp/", f"deep/.{EXPORTED}"))


def _visible(tree: Tree) -> Tree:
    return {path: data for path, data in tree.items() if not hidden(path)}


def still_clock() -> mock._patch[mock.MagicMock]:
    """The same operations write the same bytes."""
    return mock.patch.object(alias_records, "timestamp", return_value="2026-01-01T00:00:00.000000Z")
