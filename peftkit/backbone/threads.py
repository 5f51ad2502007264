"""How many threads torch may use on a CPU: a container's quota counts, not the host's cores.

torch starts a thread for every core that it sees. Under a quota of 2 CPUs on a host of 64 cores the 64 threads use up
their share at once and are all stopped until the next period (https://docs.kernel.org/scheduler/sched-bwc.html).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from peftkit.events import Decision

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What torch reads its number of threads from."""


@dataclass(frozen=True)
class Cores:
    """What a process may use of a machine."""

    present: tuple[int, ...]
    """Logical and physical cores of the machine: what torch starts with."""
    allowed: int
    """Cores that this process may be scheduled on (affinity, cpuset)."""
    quota: float | None
    """CPUs that its control group may use on average; None without a limit."""
    physical: int | None = None
    """Physical cores among those allowed: what MKL starts with under a mask. None where that cannot be told."""

    @property
    def usable(self) -> int:
        """Threads that can really run: a quota of 1.5 keeps two busy for part of the time."""
        return max(1, self.allowed if self.quota is None else min(self.allowed, math.ceil(self.quota)))


def cores_here() -> Cores:
    """This process's cores and quota."""
    logical = os.cpu_count() or 1
    mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(logical))
    present = logical, psutil.cpu_count(logical=False) or logical
    return Cores(present, len(mask), cpu_quota(), physical_cores(mask))


def physical_cores(mask: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Physical cores among logical ones; None where the kernel does not say which share one.

    Reads `topology/thread_siblings_list`, https://docs.kernel.org/admin-guide/cputopology.html. Never raises.
    """
    siblings = {_read(root / f"cpu{core}" / "topology" / "thread_siblings_list") for core in mask}
    return None if None in siblings else len(siblings)


def decide_threads(current: int, cores: Cores, variables: Mapping[str, str]) -> Decision:
    """How many threads to use, where torch has `current` ones; what a user has set stays."""
    given = {name: variables[name] for name in VARIABLES if variables.get(name)}
    for name, value in given.items():
        if value.split(",")[0].strip() in (str(current), ""):  # OpenMP takes a list, one number for each level
            return Decision("threads", str(current), f"{name}={value}")
    if given:
        set_to = " and ".join(f"{name}={value}" for name, value in given.items())
        return Decision("threads", str(current), f"set by the program (torch.set_num_threads), not by {set_to}")
    if current <= cores.usable:
        return Decision("threads", str(current), f"torch's own number; {_may_use(cores)}")
    if current not in (*cores.present, cores.allowed, cores.physical):
        return Decision("threads", str(current), f"set by the program (torch.set_num_threads); {_may_use(cores)}")
    return Decision("threads", str(cores.usable), f"{_may_use(cores)}, and torch had started with {current}")


def settle_threads() -> Decision:
    """Lower torch's number of threads to what this process may use, unless it was set; the caller reports it."""
    decision = decide_threads(torch.get_num_threads(), cores_here(), os.environ)
    if int(decision.choice) != torch.get_num_threads():
        torch.set_num_threads(int(decision.choice))
    return decision


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The smallest CPU quota of this process's control group and those above it, in CPUs; None without one.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`), https://docs.kernel.org/admin-guide/cgroup-v2.html.
    Never raises: where there are no control groups there is no quota.
    """
    quotas = [quota for folder in _folders(root, membership) for quota in _quotas(folder)]
    return min(quotas, default=None)


def _folders(root: Path, membership: Path) -> Iterator[Path]:
    """Folders of the group and of all above it; in a container the mounted root may be the group itself."""
    for line in (_read(membership) or "0::/").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        tops = (root / controllers, root / "cpu") if controllers else (root, root / "unified")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            yield from (top.joinpath(*parts[:count]) for count in range(len(parts) + 1))


def _quotas(folder: Path) -> Iterator[float]:
    given = (_read(folder / "cpu.max") or "").split()
    if len(given) != 2:
        given = [(_read(folder / f"cpu.cfs_{name}_us") or "").strip() for name in ("quota", "period")]
    quota, period = given
    if quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0:  # "max" and -1 are no limit
        yield int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _may_use(cores: Cores) -> str:
    whole = (
        f"{cores.allowed} of {cores.present[0]} cores" if cores.allowed < cores.present[0] else f"{cores.allowed} cores"
    )
    limits = cores.quota is not None and cores.quota < cores.allowed
    return f"this process may use {whole}" + (f", {cores.quota:g} of them by its CPU quota" if limits else "")
