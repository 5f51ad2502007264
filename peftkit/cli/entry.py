"""Where the process begins: Ctrl-C and SIGTERM end it quietly while the commands are still being imported."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any


def run() -> None:
    """Console-script entry point."""
    terminate_like_ctrl_c()
    try:
        from peftkit.cli.main import main  # about 0.3 s

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("peftkit: interrupted\n")
        code = 130
    raise SystemExit(code)


def terminate_like_ctrl_c() -> None:
    """Let SIGTERM save what Ctrl-C would save; outside the main thread signals are not ours to set."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with suppress(ValueError):
        signal.signal(signal.SIGTERM, interrupt)
