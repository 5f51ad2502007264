"""Real `kill -9` of a child process at random points of its work."""

from __future__ import annotations

import pytest
from faults.kills import kill_at_random
from faults.lab import Lab


def test_a_sample_of_kills(lab: Lab) -> None:
    report = kill_at_random(lab, 20, seed=1)
    assert report.bad == []
    assert report.points == 20
    assert report.outcomes["new"] < 20, "some kills hit an operation before its end"


@pytest.mark.full
def test_three_hundred_kills(lab: Lab) -> None:
    report = kill_at_random(lab, 300, seed=2)
    assert report.bad == []
    assert report.points == 300
    assert min(report.outcomes[outcome] for outcome in ("old", "between", "new")) > 10
