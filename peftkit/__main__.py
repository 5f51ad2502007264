"""`python -m peftkit`."""

from peftkit.cli.entry import run

run()
