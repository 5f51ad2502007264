"""The checks of many rows in a second process, while the first one renders and tokenizes them.

The rows go there and the tally comes back as pickles through pipes between a program and itself. A fresh interpreter is
started rather than a fork: the parent may hold threads and a GPU, and a script without a main guard must not run twice.
"""

from __future__ import annotations

import atexit
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence

from peftkit.data.findings.examine import examine_texts
from peftkit.data.findings.finding import Tally
from peftkit.data.formats import Row
from peftkit.errors import DataError

_MANY = 10_000  # rows; with fewer the checks take less than starting an interpreter
_START = "import sys; sys.path[:] = {path!r}; from peftkit.data.findings.apart import answer; answer()"


def examine_apart(
    train: Sequence[Row],
    held_out: Sequence[Row],
    control: Collection[str],
    against: tuple[str, Sequence[Row]] | None,
) -> Callable[[], Tally]:
    """Begin to look at the texts; the result waits for the end. Both ways give the same tally."""
    if len(train) + len(held_out) < _MANY or not sys.executable:
        return lambda: examine_texts(train, held_out, control, against)
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    given = pickle.dumps((train, held_out, control, against), pickle.HIGHEST_PROTOCOL)
    told: list[tuple[bytes, bytes]] = []
    # A daemon, and the child killed at exit: when the first process fails or is interrupted, neither outlives it.
    thread = threading.Thread(target=lambda: told.append(child.communicate(given)), daemon=True)
    thread.start()
    atexit.register(child.kill)

    def wait() -> Tally:
        thread.join()
        out, errors = told[0]
        if child.returncode:
            reason = errors.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"code {child.returncode}"]
            raise DataError(f"the process that checks the rows ended early: {reason[0]}", expected="enough memory")
        tally: Tally = pickle.loads(out)
        return tally

    return wait


def answer() -> None:
    """What the second process does."""
    tally = examine_texts(*pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(pickle.dumps(tally))
