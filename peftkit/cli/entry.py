"""Where the process begins: Ctrl-C and SIGTERM end it quietly while the commands are still being imported."""

from __future__ import annotations

import signal
import sys
from typing import Any


def run() -> None:
    """Console-script entry point."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from peftkit.cli.main import main  # about 0.3 s

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("peftkit: interrupted\n")
        code = 130
    raise SystemExit(code)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
