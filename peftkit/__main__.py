"""`python -m peftkit`."""

from peftkit.cli.main import run

run()
