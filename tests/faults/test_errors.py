"""Every call fails with ENOSPC, EIO, EROFS or EXDEV, once or from then on: an error with reason, old or new state."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from typing import Any

import pytest
from faults.lab import ROOT, Lab, Report
from faults.operations import OPERATIONS
from faults.scenarios import ERRORS, Case, cases, error_points, failing, first_level, next_level

from peftkit.registry import check_root


def test_a_sample_of_failing_calls(lab: Lab, single: list[Case]) -> None:
    dice, outcomes, report = random.Random(11), Counter[str](), Report()
    met = set()
    for case in single:
        for code, number in dice.sample(list(error_points(case)), 10):
            outcome, found = failing(lab, case, code, number, lasting=dice.random() < 0.5)
            outcomes[outcome] += 1
            met.add((code, case.calls[number - 1]))
            report.add(found)
    assert report.bad == []
    assert len(single) >= 20
    assert sum(outcomes.values()) == 10 * len(single)
    assert min(outcomes["old"], outcomes["new"], outcomes["between"]) > 10
    assert len(met) >= 0.7 * sum(map(len, ERRORS.values()))


@pytest.mark.full
@pytest.mark.parametrize("lasting", [False, True])
def test_every_call_fails(lab: Lab, single: list[Case], lasting: bool) -> None:
    report, failed = Report(), 0
    for case in single:
        for code, number in error_points(case):
            report.add(failing(lab, case, code, number, lasting=lasting)[1])
            failed += 1
    assert report.bad == []
    assert failed > 1500


@pytest.mark.full
def test_failing_calls_in_sequences(lab: Lab) -> None:
    """The last operation of every sequence of up to three fails at seeded calls."""
    dice, report, failed = random.Random(12), Report(), 0
    for stocked in (False, True):
        level, seen = first_level(lab.start(stocked)), set()
        for _ in range(3):
            level, fresh = next_level(lab, level, seen)
            for case in fresh:
                for code, number in dice.sample(list(error_points(case)), 1):
                    report.add(failing(lab, case, code, number, lasting=dice.random() < 0.5)[1])
                    failed += 1
    assert report.bad == []
    assert failed > 2000


def test_short_writes_are_finished(lab: Lab, single: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """`write` may take fewer bytes than it was given."""
    write, short = os.write, 0

    def half(descriptor: int, data: Any) -> int:
        nonlocal short
        short += len(data) > 1
        return write(descriptor, bytes(data)[: max(1, len(data) // 2)])

    from peftkit.registry import Registry

    root = lab.folder / "short" / ROOT
    monkeypatch.setattr(os, "write", half)
    Registry(root).publish("tickets", lab.stock.sources[0], lab.stock.draft(0), ["prod"])
    monkeypatch.undo()
    assert short > 20
    assert check_root(root) == {}
    assert Registry(root).resolve("tickets@prod")


def test_a_failed_fsync_is_never_tried_again(lab: Lab, single: list[Case]) -> None:
    """After it the kernel may have dropped the data and report success; the recorder stops a second try."""
    failed = 0
    for case in (case for case in single if case.name in ("publish", "collect versions")):
        for number, kind in enumerate(case.calls, 1):
            if kind == "fsync":
                assert failing(lab, case, errno.EIO, number, lasting=False)[1].bad == []
                failed += 1
    assert failed > 25
    assert set(OPERATIONS) >= {case.name for case in single}
    assert next(cases(lab, lab.start(stocked=False)))
