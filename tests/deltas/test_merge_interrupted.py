"""Merges that are killed, run out of room, meet another one, or find what other inputs left; and their memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import pytest
from deltas.interrupted_merge import SETTINGS, deltas
from tiny_bases import write_base

from peftkit.base.dense import dense_tensors
from peftkit.deltas import merge as merging
from peftkit.deltas.merge import MergeSettings, merge
from peftkit.events import Event, Note

SCRIPT = Path(__file__).with_name("interrupted_merge.py")
MEMORY = Path(__file__).with_name("large_merge.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("interrupted") / "base")


def run(base: Path, folder: Path, *scenarios: str) -> dict[str, list[dict[str, Any]]]:
    """What each scenario said."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(base), str(folder), *scenarios]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        if "scenario" in said:
            lines = found.setdefault(said["scenario"], [])
        else:
            lines.append(said)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(folder: Path, said: dict[str, list[dict[str, Any]]]) -> int:
    """Every killed merge published nothing or all, and gave the same bytes when it was repeated; how many resumed."""
    whole, resumed = files(folder / "count"), 0
    for scenario, lines in said.items():
        if not scenario.startswith("kill"):
            continue
        first = next(line for line in lines if "published" in line)
        assert first["ended"] == -9, scenario
        if not first["published"]:
            assert lines[-1]["ended"] == 0
        resumed += any("going on after" in line.get("note", "") for line in lines)
        out = folder / scenario.replace(":", "-")
        assert files(out) == whole, scenario
    return resumed


@pytest.fixture(scope="module")
def happened(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """One process for all that the default tier looks at."""
    folder = tmp_path_factory.mktemp("happened")
    return folder, run(base, folder, "count", "kills:5", "full:50000", "two")


def test_killed_merges_go_on_and_give_the_same_bytes(happened: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, said = happened
    assert int((folder / "calls").read_text()) > 40
    assert sum(scenario.startswith("kill") for scenario in said) == 5
    assert check(folder, said) >= 2


@pytest.mark.full
def test_killed_at_every_change_of_the_disk(base: Path, tmp_path: Path) -> None:
    said = run(base, tmp_path, "count", "kills:1000")
    calls = int((tmp_path / "calls").read_text())
    assert len(said) == 1 + calls
    assert check(tmp_path, said) > calls / 2


def test_room_that_ends(happened: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, said = happened
    refused, ended, *resumed = said["full:50000"]
    assert "is full after" in refused["refused"]
    assert (ended["ended"], ended["published"]) == (3, False)
    assert "going on after" in resumed[0]["note"]
    assert resumed[-1]["ended"] == 0
    assert files(folder / "full-50000") == files(folder / "count")


def test_a_second_process_is_sent_away(happened: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, said = happened
    assert "another process merges" in said["two"][0]["refused"]
    assert {"second": 3} in said["two"]
    assert files(folder / "two") == files(folder / "count")


def test_nothing_hidden_is_left(happened: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, said = happened
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    late = {scenario for scenario, lines in said.items() if lines[0] == {"ended": -9, "published": True}}
    assert hidden <= {f".{scenario.replace(':', '-')}.merging" for scenario in late}
    for name in hidden:  # killed between publishing and tidying up
        assert {path.name for path in (folder / name).iterdir()} <= {"lock", "journal.jsonl"}


def left_by_another(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
    """What a merge with other settings leaves when it dies after its tensors were written."""

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merging, "_write_companions", dies)
        with pytest.raises(KeyboardInterrupt):
            merge(base, deltas(base), out, MergeSettings(**{**SETTINGS.model_dump(), **other}))
    assert not out.exists()


@pytest.mark.parametrize("other", [{"dtype": "float16"}, {"shard_size": 1 << 30}, {"seed": 1}], ids=str)
def test_what_other_inputs_left_is_not_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    left_by_another(base, tmp_path / "out", monkeypatch, **other)
    notes: list[Event] = []
    merge(base, deltas(base), tmp_path / "out", SETTINGS, report=notes.append)
    assert any(isinstance(note, Note) and "other inputs: beginning anew" in note.text for note in notes)
    merge(base, deltas(base), tmp_path / "fresh", SETTINGS)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_interrupted_again_and_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Event] = []
    for _ in range(2):
        left_by_another(base, tmp_path / "out", monkeypatch)
    merge(base, deltas(base), tmp_path / "out", SETTINGS, report=notes.append)
    units = len(dense_tensors(base))
    assert Note(f"going on after {units} tensors that an earlier attempt finished") in notes
    merge(base, deltas(base), tmp_path / "fresh", SETTINGS)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["a flipped bit", "a short file", "a torn journal", "no files"])
def test_what_was_damaged_meanwhile_is_written_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    left_by_another(base, tmp_path / "out", monkeypatch)
    folder = tmp_path / ".out.merging"
    written = sorted((folder / "model").glob("*.safetensors"))
    data = written[1].read_bytes()
    if damage == "a flipped bit":
        written[1].write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "a short file":
        written[1].write_bytes(data[:-9])
    elif damage == "a torn journal":
        journal = folder / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-25])
    else:
        shutil.rmtree(folder / "model")
    merge(base, deltas(base), tmp_path / "out", SETTINGS)
    merge(base, deltas(base), tmp_path / "fresh", SETTINGS)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not folder.exists()


def test_nothing_counts_as_written_before_it_is_synced(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal names only synced bytes; every file and folder was synced as it is when the rename publishes it.

    The files are small: each is synced once, so no earlier sync hides a journal that runs ahead.
    """
    synced: dict[str, int] = {}
    named: list[int] = []
    sync, rename = os.fsync, os.rename

    def watched_sync(descriptor: int) -> None:
        sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[str(path)] = os.fstat(descriptor).st_mtime_ns
        if path.name == "journal.jsonl":
            lines = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
            assert all(line["end"] <= ends.get(line["file"], 0) for line in lines)
            named.append(len(lines))
        elif path.suffix == ".safetensors":
            ends[path.name] = os.fstat(descriptor).st_size

    def watched_rename(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out":
            found = [Path(source), *Path(source).rglob("*")]
            assert {str(path): path.stat().st_mtime_ns for path in found}.items() <= synced.items()
            published.append(len(found))
        rename(source, target)

    ends: dict[str, int] = {}
    published: list[int] = []
    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    merge(base, deltas(base), tmp_path / "out", SETTINGS)
    assert len(named) > 2, "there is more than one file"
    assert published == [1 + len(files(tmp_path / "out"))]
    assert str(tmp_path) in synced


@pytest.mark.full
def test_memory_on_a_model_of_2_gb(tmp_path: Path) -> None:
    """At most twice the largest tensor and the adapter, above the imports, in a process of its own."""
    said: dict[str, int] = {}
    for step in ("make", "measure"):  # the model is made in another process, whose memory is not counted
        command = [sys.executable, str(MEMORY), str(tmp_path), step]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said |= json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert said["model"] >= 2e9
    assert said["peak"] <= 2 * said["largest"] + said["adapter"]
