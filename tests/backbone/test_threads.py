"""Threads: a quota or an affinity below the host's cores counts, and what a user has set stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.backbone.threads import Cores, cpu_quota, decide_threads, physical_cores

HOST = (64, 32)


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "contents", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/pod/app\n", {"pod/cpu.max": "150000 100000\n", "pod/app/cpu.max": "max 100000\n"}, 1.5),
        ("0::/pod/app\n", {"pod/cpu.max": "400000 100000", "pod/app/cpu.max": "300000 100000"}, 3.0),
        ("0::/../../elsewhere\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n",
            {"cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        # Without a namespace the group's path is the host's, and the mounted root is the container's own.
        ("4:cpu:/docker/a\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2.0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "0\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/a\n", {"cpuset/a/cpu.max": "100000 100000"}, None),
        ("1:cpu:/\n0::/a\n", {"unified/a/cpu.max": "300000 100000"}, 3.0),
        ("nonsense\n\n", {"cpu.max": "a b c\n"}, None),
        (None, {"cpu.max": "100000 100000\n"}, 1.0),
    ],
)
def test_the_quota_is_the_smallest_of_the_group_and_those_above(
    tmp_path: Path, membership: str | None, contents: dict[str, str], quota: float | None
) -> None:
    root = files(tmp_path / "cgroup", contents)
    own = tmp_path / "self"
    if membership is not None:
        own.write_text(membership)
    assert cpu_quota(root, own) == quota


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path / "none either") is None


@pytest.mark.parametrize(
    ("current", "cores", "variables", "choice", "because"),
    [
        (64, Cores(HOST, 64, 2.0), {}, 2, "2 of them by its CPU quota"),
        (32, Cores(HOST, 64, 1.5), {}, 2, "1.5 of them"),
        (64, Cores(HOST, 64, 0.1), {}, 1, "0.1 of them"),
        (64, Cores(HOST, 4, None), {}, 4, "4 of 64 cores"),
        (4, Cores(HOST, 4, 2.0), {}, 2, "2 of them"),
        (32, Cores(HOST, 64, None), {}, 32, "torch's own number"),
        (2, Cores(HOST, 64, 2.0), {}, 2, "torch's own number"),
        (64, Cores(HOST, 64, 2.0), {"OMP_NUM_THREADS": "64"}, 64, "OMP_NUM_THREADS=64"),
        (64, Cores(HOST, 64, 2.0), {"MKL_NUM_THREADS": "64"}, 64, "MKL_NUM_THREADS=64"),
        (64, Cores(HOST, 64, 2.0), {"OMP_NUM_THREADS": ""}, 2, "quota"),
        (12, Cores(HOST, 64, 2.0), {}, 12, "torch.set_num_threads"),
        (8, Cores(HOST, 16, 2.0, 8), {}, 2, "2 of them by its CPU quota, and torch had started with 8"),
        (8, Cores(HOST, 16, 2.0, None), {}, 8, "torch.set_num_threads"),
        (8, Cores(HOST, 64, 2.0), {"OMP_NUM_THREADS": "1"}, 8, "by the program (torch.set_num_threads), not by OMP"),
        (8, Cores(HOST, 64, 2.0), {"OMP_NUM_THREADS": "8,2"}, 8, "OMP_NUM_THREADS=8,2"),
        (8, Cores(HOST, 64, 2.0), {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "8"}, 8, "MKL_NUM_THREADS=8"),
    ],
)
def test_threads(current: int, cores: Cores, variables: dict[str, str], choice: int, because: str) -> None:
    found = decide_threads(current, cores, variables)
    assert (found.what, found.choice) == ("threads", str(choice))
    assert because in found.reason


@pytest.mark.parametrize(("quota", "said"), [(8.0, False), (2.0, False), (1.5, True)])
def test_a_quota_is_named_where_it_limits(quota: float, said: bool) -> None:
    assert ("quota" in decide_threads(1, Cores((4, 2), 2, quota), {}).reason) is said


def test_physical_cores_of_a_mask_are_those_that_share_no_siblings(tmp_path: Path) -> None:
    listed = {f"cpu{core}/topology/thread_siblings_list": f"{core % 4},{core % 4 + 4}\n" for core in range(8)}
    root = files(tmp_path, listed)
    assert physical_cores({0, 1, 4, 5}, root) == 2
    assert physical_cores({0, 1, 2, 7}, root) == 4
    assert physical_cores({0, 9}, root) is None


def test_a_smaller_affinity_is_followed_in_a_real_process() -> None:
    """torch starts with the cores it sees when it is imported; the affinity shrinks behind its back."""
    import os

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    program = (
        "import os, torch; before = torch.get_num_threads(); "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from peftkit.backbone.threads import settle_threads; d = settle_threads(); "
        "print(before, d.choice, torch.get_num_threads())"
    )
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    before, choice, after = map(int, done.stdout.split())
    assert before > 1
    assert (choice, after) == (1, 1)
