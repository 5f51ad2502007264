"""The model itself, on cases worked by hand, and the recorder: a change that it does not see must be noticed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faults.disk import TOP, Disk, Event, Tree
from faults.recorder import Recorder, read_tree

CREATE = Event("create", 1, ((TOP, "a"),))
WRITE = Event("write", 1, data=b"1234")


def states(*events: Event) -> list[Tree]:
    disk = Disk.holding({}, lambda path: path.startswith("tmp"))
    for event in events:
        disk.feed(event)
    found = []
    for tree in disk.crash_states(random.Random(0)):
        if tree not in found:
            found.append(tree)
    return found


def fsync(inode: int) -> Event:
    return Event("fsync", inode)


def test_a_file_needs_two_fsyncs() -> None:
    torn = [{"a": b"1234"}, {"a": b""}, {"a": b"12"}, {"a": bytes(4)}]
    assert states(CREATE, WRITE) == [*torn, {}]
    assert states(CREATE, WRITE, fsync(TOP)) == torn
    assert states(CREATE, WRITE, fsync(1)) == [{"a": b"1234"}, {}]
    assert states(CREATE, WRITE, fsync(1), fsync(TOP)) == [{"a": b"1234"}]
    assert states(CREATE, fsync(1), fsync(TOP), WRITE) == torn, "a write after the fsync is not covered by it"


def test_entries_reach_the_disk_in_any_order() -> None:
    folder, inside = Event("mkdir", 1, ((TOP, "d"),)), Event("create", 2, ((1, "x"),))
    other = Event("create", 3, ((TOP, "o"),))
    assert states(folder, inside) == [{"d": None, "d/x": b""}, {"d": None}, {}]
    assert states(folder, inside, fsync(1)) == [{"d": None, "d/x": b""}, {}], "its own folder may be lost"
    assert {"o": b""} in states(folder, inside, other), "the later one alone"


def test_a_rename_is_kept_or_lost_as_a_whole() -> None:
    made = [Event("mkdir", 1, ((TOP, "from"),)), Event("mkdir", 2, ((TOP, "to"),)), fsync(TOP)]
    file = [Event("create", 3, ((1, "x"),)), fsync(1), Event("rename", 3, ((1, "x"), (2, "y")))]
    old, new = {"from": None, "from/x": b"", "to": None}, {"from": None, "to": None, "to/y": b""}
    assert states(*made, *file) == [new, old]
    assert states(*made, *file, fsync(2)) == [new]
    assert states(*made, *file, fsync(1)) == [new]


def test_a_later_change_of_an_entry_needs_the_earlier_one() -> None:
    again = [CREATE, fsync(TOP), Event("unlink", 1, ((TOP, "a"),)), Event("mkdir", 2, ((TOP, "a"),))]
    assert states(*again) == [{"a": None}, {}, {"a": b""}]


def test_what_is_hidden_is_not_enumerated() -> None:
    many = [Event("create", n, ((1, f"f{n}"),)) for n in range(2, 12)]
    found = states(Event("mkdir", 1, ((TOP, "tmp"),)), fsync(TOP), *many)
    assert len(found) == 1
    assert set(found[0]) - {"tmp"} in (set(), {f"tmp/f{n}" for n in range(2, 12)}), "all of it, or none"


def test_many_pending_changes_are_sampled() -> None:
    many = [Event("create", n, ((TOP, f"f{n}"),)) for n in range(1, 11)]
    found = states(*many)
    sizes = [len(tree) for tree in found]
    assert {0, 1, 9, 10} <= set(sizes), "none, each alone, all but one, all"
    assert sizes.count(1) >= 10
    assert sizes.count(9) >= 10
    assert len(found) > 40


def test_replayed_changes_give_the_real_folder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Disk(lambda path: False))
    with recorder.recording():
        (tmp_path / "d").mkdir()
        with open(tmp_path / "d" / "x", "xb") as file:
            file.write(b"xy")
        os.link(tmp_path / "d" / "x", tmp_path / "y")
        os.rename(tmp_path / "d", tmp_path / "e")
        os.unlink(tmp_path / "y")
    recorder.check()
    assert read_tree(tmp_path) == {"e": None, "e/x": b"xy"}
    assert recorder.calls == ["mkdir", "open", "write", "link", "rename", "unlink"]
    with recorder.recording():
        (tmp_path / "e" / "unseen").touch()
        os.truncate(tmp_path / "e" / "x", 1)
    with pytest.raises(AssertionError, match="changed unseen"):
        recorder.check()


def test_what_the_model_does_not_know_stops_the_test(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Disk(lambda path: False))
    with recorder.recording():
        (tmp_path / "d").mkdir()
        with pytest.raises(AssertionError, match="does not know"):
            open(tmp_path / "x", "w")  # noqa: SIM115
