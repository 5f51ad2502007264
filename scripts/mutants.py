"""Plant each bug of tests/mutants into a copy of this tree, run the tests that should notice, and say which one did.

    python scripts/mutants.py            every bug
    python scripts/mutants.py rslora     those whose file name holds this text

A bug is a patch whose lines before the first `diff` say `bug:` (what it is) and `tests:` (files or test ids to run).
The copy lies in a temporary folder; this tree is not touched. Exit code 1 when a bug was not caught, or its patch no
longer fits.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "mutants"
_COPIED = ("peftkit", "tests", "recipes", "benchmarks", "docs", "scripts", "pyproject.toml", "README.md", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """A bug to plant."""

    name: str
    patch: str
    bug: str
    tests: tuple[str, ...]


def mutants(wanted: str = "") -> list[Mutant]:
    """The bugs whose file name holds `wanted`, in name order. Raises ValueError for a patch without its two lines."""
    found = []
    for path in sorted(MUTANTS.glob("*.patch")):
        if wanted in path.name:
            text = path.read_text(encoding="utf-8")
            head = text.partition("\ndiff ")[0]
            bug, tests = (re.search(rf"^{key}: *(.+)$", head, re.MULTILINE) for key in ("bug", "tests"))
            if bug is None or tests is None:
                raise ValueError(f"{path.name} needs a line `bug: …` and a line `tests: …` before its first diff")
            found.append(Mutant(path.stem, text, bug[1], tuple(tests[1].split())))
    return found


def copy_tree(to: Path) -> None:
    """Copy what the tests need."""
    skipped = shutil.ignore_patterns("__pycache__", "results", ".pytest_cache")
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=skipped)
        else:
            shutil.copy2(source, to / name)


def plant(mutant: Mutant, tree: Path, *, undo: bool = False) -> bool:
    """Apply a patch to a tree, or take it back; False when it does not fit."""
    command = ["git", "apply", "--unsafe-paths", f"--directory={tree}", *(["--reverse"] if undo else []), "-"]
    # Outside of any repository git takes the folder as it is.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(command, input=mutant.patch, text=True, cwd=tree, env=environment, capture_output=True)
    return done.returncode == 0


def first_failure(mutant: Mutant, tree: Path) -> str | None:
    """The id of the first test that fails in a tree with the bug, None when none does."""
    options = [
        "-x",
        "-q",
        "-rfE",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not full and not gpu and not engines",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options, *mutant.tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode} on {mutant.name}:\n{done.stdout}{done.stderr}")
    return None


def main(arguments: list[str]) -> int:
    """Plant the bugs one after the other and print the table."""
    missed = 0
    with tempfile.TemporaryDirectory(prefix="peftkit-mutants-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        copy_tree(tree)
        for mutant in mutants(*arguments[:1]):
            if not plant(mutant, tree):
                outcome = "DOES NOT FIT: the code that it changes is another now"
            else:
                failure = first_failure(mutant, tree)
                outcome = failure or "NOT CAUGHT"
                plant(mutant, tree, undo=True)
            missed += outcome.startswith(("DOES NOT FIT", "NOT CAUGHT"))
            print(f"{mutant.name}\n    {mutant.bug}\n    {outcome}", flush=True)
    print(f"{missed} not caught" if missed else "all caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
