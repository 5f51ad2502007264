"""After a crash at any point a registry is in its old or its new state, and nothing acknowledged is missing."""

from __future__ import annotations

import random

import pytest
from faults.lab import Lab, Report, Trace
from faults.operations import OPERATIONS
from faults.scenarios import Case, after_a_kill, cases, first_level, next_level, starts


def test_every_operation_crashed_at_every_call(lab: Lab, single: list[Case]) -> None:
    report = Report()
    for case in single:
        found = lab.explore(Trace(case.start, [case.step]))
        assert found.bad == []
        assert {"old", "new"} <= set(found.outcomes) or case.step.before == case.step.after, case.name
        report.add(found)
    assert {case.name for case in single} == set(OPERATIONS), "every operation was possible somewhere"
    assert len(single) >= 20
    assert report.points > 300
    assert report.states > 400


def test_crashed_after_a_kill_that_nobody_knows_of(lab: Lab, after_kills: list[Trace]) -> None:
    """A kill loses nothing; what is done next must not build on what is visible and not durable."""
    report = Report()
    for trace in after_kills:
        report.add(lab.explore(trace, again=False))
    assert report.bad == []
    assert len(after_kills) > 200
    assert report.states > 4000


def test_a_sample_of_sequences(lab: Lab) -> None:
    """A seeded walk through sequences of three operations; `make test-full` takes all of them."""
    dice, report, lengths = random.Random(5), Report(), []
    for walk in range(24):
        disk, length = lab.start(stocked=walk % 2 == 1), 0
        for _ in range(3):
            plan = lab.plan(disk, dice.choice(list(OPERATIONS)))
            step = lab.step(disk, plan) if plan is not None else None
            if step is not None:
                report.add(lab.explore(Trace(disk, [step[0]])))
                disk, length = step[1], length + 1
        lengths.append(length)
    assert report.bad == []
    assert sum(length == 3 for length in lengths) >= 3
    assert sum(lengths) > 36


@pytest.mark.full
@pytest.mark.parametrize("stocked", [False, True])
def test_all_sequences_of_up_to_three(lab: Lab, stocked: bool) -> None:
    dice, report, seen = random.Random(6), Report(), set[object]()
    level = first_level(lab.start(stocked))
    counts = []
    for length in (1, 2, 3):
        level, fresh = next_level(lab, level, seen)
        for case in fresh:
            # Doing it again takes most of the time, and depends on little but the last operation.
            again = length < 3 or dice.random() < 0.2
            report.add(lab.explore(Trace(case.start, [case.step]), again=again))
        counts.append(sum(level.sequences.values()))
    assert report.bad == []
    assert counts[2] > (800 if stocked else 200), counts
    assert report.states > (20_000 if stocked else 4000)


@pytest.mark.full
def test_every_kill_followed_by_every_operation(lab: Lab, single: list[Case]) -> None:
    report, pairs = Report(), 0
    for case in single:
        for trace in after_a_kill(lab, case, list(OPERATIONS)):
            report.add(lab.explore(trace, again=case.step.plan is trace.steps[-1].plan))
            pairs += 1
    assert report.bad == []
    assert pairs > 1500
    assert report.states > 20_000


def test_what_is_refused_changes_nothing(lab: Lab) -> None:
    assert all(list(cases(lab, start)) for start in starts(lab))  # `cases` compares before and after
