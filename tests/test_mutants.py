"""The planted bugs of tests/mutants: every patch fits the tree and names its tests, and the runner tells the truth."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "mutants.py"


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("mutants_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MUTANTS = runner()
BUGS = MUTANTS.mutants()


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_are_enough_and_each_says_what_it_is() -> None:
    assert len(BUGS) >= 18
    assert len({bug.bug for bug in BUGS}) == len(BUGS)
    assert len({bug.patch.partition("\ndiff ")[2] for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_named_tests_exist(bug: Any) -> None:
    assert 1 <= len(bug.tests) <= 2
    for test in bug.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), test
        assert not name or name.partition("[")[0] in functions(path), test


def test_every_patch_fits_changes_what_is_shipped_and_is_taken_back(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "peftkit", tree / "peftkit", ignore=shutil.ignore_patterns("__pycache__"))
    shipped = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    for bug in BUGS:
        assert MUTANTS.plant(bug, tree), f"{bug.name}.patch does not fit the tree: plant the bug anew"
        changed = [path for path, content in shipped.items() if path.read_bytes() != content]
        assert changed, bug.name
        for path in changed:
            ast.parse(path.read_text(encoding="utf-8"), path.name)
        assert MUTANTS.plant(bug, tree, undo=True)
        assert all(path.read_bytes() == shipped[path] for path in changed), bug.name


def test_the_kept_table_holds_every_bug() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text(encoding="utf-8"))
    found = {line["name"]: line["bug"] for line in kept["bugs"]}
    assert found == {bug.name: bug.bug for bug in BUGS}, "run scripts/mutants.py --json benchmarks/results/mutants.json"
    assert kept["environment"]["torch"]


_DRIVER = """
import sys
sys.path.insert(0, "SCRIPTS")
from pathlib import Path
import mutants
mutants.ROOT, mutants._COPIED, mutants._SLOW_TO_IMPORT = Path("."), ("peftkit", "tests"), ()
mutants.MUTANTS = Path("tests/mutants")
raise SystemExit(mutants.main(sys.argv[1:]))
"""
_PATCH = """bug: {name}
tests: tests/test_add.py
diff --git a/peftkit/__init__.py b/peftkit/__init__.py
--- a/peftkit/__init__.py
+++ b/peftkit/__init__.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return {before}
+    return {after}
"""


def small(folder: Path, **bugs: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script on a package of one function, whose test looks at 1 + 1 alone."""
    (folder / "peftkit").mkdir()
    (folder / "peftkit" / "__init__.py").write_text("def add(a, b):\n    return a + b\n")
    (folder / "tests" / "mutants").mkdir(parents=True)
    test = "import peftkit\nimport pytest\n\n@pytest.mark.parametrize('n', [1], ids=['a space'])\n"
    (folder / "tests" / "test_add.py").write_text(test + "def test_add(n):\n    assert peftkit.add(n, n) == 2\n")
    for name, (before, after) in bugs.items():
        patch = _PATCH.format(name=name, before=before, after=after)
        (folder / "tests" / "mutants" / f"{name}.patch").write_text(patch)
    command = [sys.executable, "-c", _DRIVER.replace("SCRIPTS", str(SCRIPT.parent))]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_runner_tells_caught_from_not_caught_and_from_a_patch_that_does_not_fit(tmp_path: Path) -> None:
    done = small(tmp_path, caught=("a + b", "a - b"), missed=("a + b", "2 * a"), stale=("a * b", "a"))
    assert done.stdout.splitlines() == [
        *("caught", "    caught", "    tests/test_add.py::test_add[a space]"),
        *("missed", "    missed", "    NOT CAUGHT"),
        *("stale", "    stale", "    DOES NOT FIT: the code that it changes is another now"),
        "2 of 3 not caught",
    ], done.stderr
    assert done.returncode == 1
    assert (tmp_path / "peftkit" / "__init__.py").read_text() == "def add(a, b):\n    return a + b\n"


@pytest.mark.full
def test_every_bug_is_caught() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"all {len(BUGS)} caught"
