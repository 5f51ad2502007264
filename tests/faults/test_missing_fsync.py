"""Without any one fsync of the registry a crash leaves a bad state; bugs planted on purpose are caught as well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.lab import Lab, Trace
from faults.scenarios import Case
from faults.sites import FOLDER, fsync_sites

from peftkit import durable
from peftkit.registry import Registry


def caught(lab: Lab, traces: list[Trace], site: str) -> str | None:
    for trace in traces:
        concerned = any(site in event.sites for step in trace.steps for event in step.events)
        if concerned and (bad := lab.explore(trace, without=site, again=False).bad):
            return bad[0]
    return None


def test_without_any_one_fsync_a_crash_leaves_a_bad_state(
    lab: Lab, single: list[Case], after_kills: list[Trace]
) -> None:
    traces = [*(Trace(case.start, [case.step]) for case in single), *after_kills]
    sites = fsync_sites()
    assert len(sites) >= 16
    assert [text for site, text in sites.items() if not caught(lab, traces, site)] == []


@pytest.mark.full
@pytest.mark.parametrize("site", sorted(fsync_sites()))
def test_removing_the_line_turns_the_suite_red(site: str, tmp_path: Path) -> None:
    """The same with the source really changed: a copy of peftkit without the line, and the suite run against it."""
    name, number = site.split(":")
    copy = tmp_path / "peftkit"
    shutil.copytree(FOLDER.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (path,) = (path for path in (copy / "durable.py", *(copy / "registry").rglob("*.py")) if path.name == name)
    lines = path.read_text().splitlines()
    lines[int(number) - 1] = lines[int(number) - 1].replace(lines[int(number) - 1].strip(), "pass")
    path.write_text("\n".join(lines) + "\n")
    suite = Path(__file__).with_name("test_crash_states.py")
    options = ["-q", "-x", "-m", "not full", "-p", "no:cacheprovider", str(suite)]
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import peftkit, pytest\n"
        f"assert peftkit.__file__ == {str(copy / '__init__.py')!r}\n"
        f"sys.exit(pytest.main({options!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "AssertionError" in done.stdout


def linked_before_synced(path: Path, data: bytes, tmp: Path) -> None:
    building = tmp / f"{path.name}-new"
    descriptor = os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(descriptor, data)
    os.link(building, path)
    os.fsync(descriptor)
    os.close(descriptor)
    os.unlink(building)
    durable.sync_folder(path.parent)


def written_in_place(path: Path, data: bytes, tmp: Path) -> None:
    durable.write_file(path, data)
    durable.sync_folder(path.parent)


def removed_without_rename(path: Path, tmp: Path) -> None:
    durable.delete(path)
    durable.sync_folder(path.parent)


def renamed_first(true: Callable[..., Any]) -> Callable[..., Any]:
    """Renames the version into place before its manifest is written."""

    def copy(source: Path, target: Path, relatives: list[str]) -> Any:
        files = true(source, target, relatives)
        durable.sync_folder(target)
        early = next(target.parent.parent.glob("*/versions")) / "00000000000000aa"
        durable.move_folder(target, early)
        os.rename(early, target)
        return files

    return copy


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "linked before it is synced": lambda patch: patch.setattr(durable, "create_file", linked_before_synced),
    "an alias written in place": lambda patch: patch.setattr(durable, "create_file", written_in_place),
    "removed without a rename": lambda patch: patch.setattr(durable, "remove", removed_without_rename),
    "renamed before the manifest": lambda patch: patch.setattr(
        "peftkit.registry.payload.copy", renamed_first(__import__("peftkit.registry.payload", fromlist=["copy"]).copy)
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(lab: Lab, single: list[Case], bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug](monkeypatch)
    bad: list[str] = []
    for case in single:
        if case.name in ("publish", "move an alias", "remove a version"):
            found = lab.step(case.start, case.step.plan)
            if found is not None:
                bad += lab.explore(Trace(case.start, [found[0]]), again=False).bad
    assert bad, f"{bug}: no crash state showed it"
    assert Registry(lab.folder / "none").names() == []
