"""Real `kill -9`: a child works through operations and is killed from outside at a point of its progress.

The child writes one byte before each call that changes the disk and one letter for each operation that has returned.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

from faults.disk import Disk
from faults.lab import ROOT, Lab, Report, hidden, still_clock
from faults.operations import OPERATIONS, find, mixed
from faults.recorder import Recorder, read_tree, write_tree
from faults.scenarios import Case, case_of

from peftkit.registry import Registry

_FRESH = 25
"""After so many kills the registry starts anew, so that histories stay short."""


def kill_at_random(lab: Lab, kills: int, seed: int) -> Report:
    """Kill a child `kills` times, look at what is left, finish what was cut off, and go on from there."""
    dice, report = random.Random(seed), Report()
    top = lab.folder / f"killed-{seed}"
    for number in range(kills):
        if number % _FRESH == 0:
            shutil.rmtree(top, ignore_errors=True)
            write_tree(top, lab.start(stocked=number % (2 * _FRESH) > 0).tree())
        chain = _chain(lab, Disk.holding(read_tree(top), hidden), dice)
        returned = _work_and_die(top, chain, dice)
        report.points += 1
        report.states += 1
        _judge(report, top, chain, returned)
    shutil.rmtree(top)
    return report


def _chain(lab: Lab, disk: Disk, dice: random.Random) -> list[Case]:
    """Up to three operations that follow one another, as they go when nobody is killed."""
    chain: list[Case] = []
    while len(chain) < 3:
        case = case_of(lab, disk, dice.choice(list(OPERATIONS)))
        if case is not None:
            chain.append(case)
            disk = case.end
    return chain


def _work_and_die(top: Path, chain: list[Case], dice: random.Random) -> int:
    """How many operations had returned when the child was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(top, chain, writing)
    os.close(writing)
    target = dice.randint(1, sum(len(case.calls) for case in chain))
    heard = b""
    while heard.count(b".") < target and (more := os.read(reading, 1)):
        heard += more
    for _ in range(dice.randint(0, 3000)):
        pass  # up to some tens of microseconds, so that the kill falls between two calls or into one
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    while more := os.read(reading, 4096):
        heard += more
    os.close(reading)
    assert b"!" not in heard, "the child stopped by itself"
    return heard.count(b"R")


def _work(top: Path, chain: list[Case], writing: int) -> None:
    write = os.write
    try:
        recorder = Recorder(top, chain[0].start, lambda *_: bool(write(writing, b".")) and None)
        with recorder.recording(), still_clock():
            for case in chain:
                case.step.plan.act(Registry(top / ROOT, lock_timeout=0))
                write(writing, b"R")
        signal.pause()  # killed after the last operation has returned
    finally:
        write(writing, b"!")
        os._exit(1)


def _judge(report: Report, top: Path, chain: list[Case], returned: int) -> None:
    step = chain[min(returned, len(chain) - 1)].step
    items, unfinished, wrong = find(top / ROOT)
    complaint: str | None = "; ".join(wrong)
    if not complaint and returned == len(chain):
        complaint = None if items == step.after else f"all had returned, but there is {items}"
    elif not complaint:
        complaint = mixed(step.plan, step.before, step.after, items)
    if not complaint and unfinished and not step.plan.name.startswith("publish"):
        complaint = f"without latest: {unfinished}"
    report.outcomes["old" if items == step.before else "new" if items == step.after else "between"] += 1
    if not complaint and items != step.after:
        with still_clock():
            step.plan.act(Registry(top / ROOT, lock_timeout=0))
        items, unfinished, wrong = find(top / ROOT)
        if wrong or unfinished or items != step.after:
            complaint = f"done again, it gives {items}: {wrong}"
    if complaint:
        report.bad.append(f"{step.plan.name} killed: {complaint}")
