"""Plant each bug of tests/mutants into a copy of this tree, run the tests that should notice, and say which one did.

    python scripts/mutants.py                every bug
    python scripts/mutants.py rslora         those whose file name holds this text
    python scripts/mutants.py --json FILE    keep the table, with the versions that it was made with

A bug is a patch whose lines before the first `diff` say `bug:` (what it is) and `tests:` (files or test ids to run).
The copy lies in a temporary folder; this tree is not touched. Exit code 1 when a bug was not caught, or its patch no
longer fits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = ROOT / "tests" / "mutants"
_COPIED = ("peftkit", "tests", "recipes", "benchmarks", "docs", "scripts", "pyproject.toml", "README.md", "Makefile")

_OPTIONS = ("-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not full and not gpu and not engines")
_SLOW_TO_IMPORT = ("torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "hypothesis")

NOT_CAUGHT = "NOT CAUGHT"
DOES_NOT_FIT = "DOES NOT FIT: the code that it changes is another now"


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


class _FirstFailure:
    """A plugin of pytest that writes down which test failed first."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self._place.exists():
            self._place.write_text(report.nodeid, encoding="utf-8")


def first_failure(tests: Sequence[str], tree: Path) -> str | None:
    """The id of the first of these tests that fails in a tree, None when none does. Raises RuntimeError."""
    output, failed = tree.parent / "output.txt", tree.parent / "failed.txt"
    failed.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        _become_pytest(tests, tree, output, failed)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    if code:
        raise RuntimeError(f"pytest ended with {code}:\n{output.read_text(encoding='utf-8')}")
    return None


def _become_pytest(tests: Sequence[str], tree: Path, output: Path, failed: Path) -> NoReturn:
    """Run the tests of a tree in this process, whose packages are imported already, and end it."""
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}  # for what the tests start
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(tree))
        code = int(pytest.main([*_OPTIONS, *tests], [_FirstFailure(failed)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _warm_up() -> None:
    """Import once what every test needs and no bug is planted in; peftkit itself must come from the copy."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that started threads cannot be forked
    for name in _SLOW_TO_IMPORT:
        importlib.import_module(name)
    if "peftkit" in sys.modules:
        raise RuntimeError("peftkit was imported from this tree, so the tests would not meet the bugs of the copy")


def outcomes(wanted: str = "") -> Iterator[tuple[Mutant, str]]:
    """Plant the bugs one after the other; each with the id of the first test that failed, or why there is none."""
    with tempfile.TemporaryDirectory(prefix="peftkit-mutants-") as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir()
        copy_tree(tree)
        found = mutants(wanted)
        _warm_up()
        broken = first_failure(list(dict.fromkeys(test for mutant in found for test in mutant.tests)), tree)
        if broken:
            raise RuntimeError(f"{broken} fails without any bug: mend that first")
        for mutant in found:
            if not plant(mutant, tree):
                yield mutant, DOES_NOT_FIT
                continue
            yield mutant, first_failure(mutant.tests, tree) or NOT_CAUGHT
            plant(mutant, tree, undo=True)


def main(arguments: list[str]) -> int:
    """Print the table, and keep it where that is asked for."""
    parser = argparse.ArgumentParser(description="Plant known bugs and name the test that catches each.")
    parser.add_argument("wanted", nargs="?", default="", help="only bugs whose file name holds this")
    parser.add_argument("--json", type=Path, help="file to keep the table in")
    options = parser.parse_args(arguments)
    table, started = [], time.monotonic()
    for mutant, outcome in outcomes(options.wanted):
        print(f"{mutant.name}\n    {mutant.bug}\n    {outcome}", flush=True)
        caught = outcome not in (DOES_NOT_FIT, NOT_CAUGHT)
        table.append({"name": mutant.name, "bug": mutant.bug, "caught": caught, "first_failure": outcome})
    missed = sum(not line["caught"] for line in table)
    if options.json:
        from peftkit.environment import environment  # not before the last test was run: see _warm_up

        kept = {"environment": environment(), "seconds": round(time.monotonic() - started), "bugs": table}
        options.json.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{missed} of {len(table)} not caught" if missed else f"all {len(table)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
