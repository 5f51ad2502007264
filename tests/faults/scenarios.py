"""What the tests and the benchmark run: every operation, cut off or failing at every call, alone and in sequence."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from faults.disk import Disk
from faults.lab import ROOT, Lab, Report, Step, Trace, hidden
from faults.operations import OPERATIONS, mixed
from faults.recorder import Fault

ERRORS = {
    errno.ENOSPC: ("open", "write", "fsync", "mkdir", "rename", "link"),
    errno.EIO: ("open", "write", "fsync", "mkdir", "rename", "link", "unlink", "rmdir"),
    errno.EROFS: ("open", "mkdir", "rename", "link", "unlink", "rmdir"),
    errno.EXDEV: ("rename", "link"),
}
"""Which calls fail with which error."""
_TIDY = ("publish", "tag", "untag", "restore", "relate")


@dataclass
class Case:
    """An operation on a disk, as it goes when nothing fails."""

    name: str
    start: Disk
    step: Step
    calls: list[str]
    end: Disk


def case_of(lab: Lab, disk: Disk, name: str) -> Case | None:
    """The operation as it goes; None where it makes no sense or is refused, which must change nothing."""
    plan = lab.plan(disk, name)
    if plan is None:
        return None
    run = lab.run(disk, plan)
    before, after = lab.items(disk), lab.items(run.disk)
    if run.error is None:
        return Case(name, disk, Step(plan, run.events, before, after), run.calls, run.disk)
    assert before == after, f"{name} was refused and changed something: {run.error}"
    return None


def cases(lab: Lab, disk: Disk) -> Iterator[Case]:
    """Every operation that makes sense on this disk and is not refused."""
    return (case for name in OPERATIONS if (case := case_of(lab, disk, name)) is not None)


def starts(lab: Lab) -> list[Disk]:
    """Nothing at all, and a registry with something of everything."""
    return [lab.start(stocked=False), lab.start(stocked=True)]


def after_a_kill(lab: Lab, case: Case, followers: Sequence[str] = (), stride: int = 1) -> Iterator[Trace]:
    """Killed before each of its calls, then done again, or followed by another operation.

    Where nothing visible is pending, the same operation follows, and only every `stride`-th call is tried.
    """
    for number in range(1, len(case.calls) + 1):
        cut, disk = lab.cut_off(case.start, case.step.plan, number, case.step)
        pending = disk.pending_visible()
        if not pending and number % stride:
            continue
        for name in dict.fromkeys([case.name, *(followers if pending else ())]):
            # What is visible but not durable yet must not be built upon: nobody knows that its writer died.
            plan = case.step.plan if name == case.name else lab.plan(disk, name)
            step = lab.step(disk, plan) if plan is not None else None
            if step is not None:
                yield Trace(case.start, [cut, step[0]])


def failing(lab: Lab, case: Case, code: int, number: int, *, lasting: bool) -> tuple[str, Report]:
    """Its call with this number fails, and all later ones if `lasting`; says the outcome, and what is bad."""
    plan, before, after = case.step.plan, case.step.before, case.step.after
    run = lab.run(case.start, plan, _failing(code, number, lasting))
    items, unfinished, damage = lab.look(run.disk.tree())
    wrong = list(damage)
    report = Report(points=1, states=1)
    if run.error is None and items != after:
        wrong.append("no error, and not the new state")
    if run.error is not None:
        facts = ("deep/exported" if plan.name.startswith("export") else ROOT, os.strerror(code))
        wrong += [f"the error does not say {fact!r}: {run.error.fact}" for fact in facts if fact not in run.error.fact]
    if complaint := mixed(plan, before, after, items):
        wrong.append(complaint)
    if unfinished and not plan.name.startswith("publish"):
        wrong.append(f"without latest: {unfinished}")
    if not lasting and plan.name.startswith(_TIDY) and case.calls[number - 1] not in ("unlink", "rmdir"):
        left = run.disk.live().keys() - case.start.live().keys()
        wrong += [f"{path} was left" for path in left if hidden(path) and path != f"{ROOT}/tmp"]
    outcome = "old" if items == before else "new" if items == after else "between"
    report.outcomes[outcome] += 1
    if not (plan.once and items == after) and not wrong:
        again = lab.step(run.disk, plan)
        if again is None or again[0].after != after:
            wrong.append(f"done again, it gives {again and again[0].after}")
        else:
            cut = Step(plan, run.events, before, after, finished=False)
            deeper = lab.explore(Trace(case.start, [cut, again[0]]), again=False)
            report.states += deeper.states
            report.bad += deeper.bad
    report.bad += [f"{plan.name}, {errno.errorcode[code]} at call {number}: {each}" for each in wrong]
    return outcome, report


def error_points(case: Case) -> Iterator[tuple[int, int]]:
    """Every error and the number of every call that can fail with it."""
    for code, kinds in ERRORS.items():
        yield from ((code, number) for number, kind in enumerate(case.calls, 1) if kind in kinds)


@dataclass
class Level:
    """All sequences of one length, by the state that they lead to: equal states need to be tried only once."""

    states: dict[object, Disk]
    sequences: Counter[object]


def first_level(disk: Disk) -> Level:
    """Before any operation."""
    key = _key(disk)
    return Level({key: disk}, Counter({key: 1}))


def next_level(lab: Lab, level: Level, seen: set[object]) -> tuple[Level, list[Case]]:
    """One operation longer; the cases that were not met in a shorter sequence."""
    longer, fresh = Level({}, Counter()), []
    for key, disk in level.states.items():
        for case in cases(lab, disk):
            to = _key(case.end)
            longer.states.setdefault(to, case.end)
            longer.sequences[to] += level.sequences[key]
            if (key, case.name) not in seen:
                seen.add((key, case.name))
                fresh.append(case)
    return longer, fresh


def _key(disk: Disk) -> object:
    assert not disk.pending_visible(), "something acknowledged is not durable"
    tree = disk.tree()
    return frozenset((path, None if hidden(path) else data) for path, data in tree.items())


def _failing(code: int, number: int, lasting: bool) -> Fault:
    def fault(call: int, kind: str, path: str) -> None:
        if call == number or (lasting and call > number and kind in ERRORS[code]):
            raise OSError(code, os.strerror(code), path)

    return fault
