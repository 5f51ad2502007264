"""An entry of the store is whole or not there: killed at every call, damaged anywhere, raced, on a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peftkit.data.chat import Example
from peftkit.data.encoded import FILE, EncodedRows, Gathering
from peftkit.data.encoded_store import EncodedStore
from peftkit.data.findings.finding import Tally
from peftkit.events import Event, Warned

KEY = {"rows": "r", "length": 7}
FACTS = {"dropped": ["f:1", "half \ud800"], "too_long": [["f:1", 9]]}


def rows(count: int = 300) -> EncodedRows:
    gathering = Gathering(many=0)
    for at in range(count):
        ids = list(range(at % 17 + 1))
        gathering.add(Example(ids, ids, 0, at, f"f:{at}"))
    found = gathering.done()
    assert isinstance(found, EncodedRows)
    return found


def same(store: EncodedStore) -> bool:
    """Whether the entry is there, as it was written."""
    entry = store.load(KEY)
    return entry is not None and entry.facts == FACTS and list(EncodedRows.mapped(entry.folder)) == list(rows())


def child(work: Callable[[], None]) -> int:
    """Do work in a fork; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die_at(number: int) -> None:
    """Kill this process at its `number`-th call that changes or opens files."""
    left = [number]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "shutil.rmtree", "os.rmdir"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_at_any_call_leaves_an_entry_whole_or_not_there(tmp_path: Path) -> None:
    killed = whole = 0
    for number in range(1, 200):
        cache, told = tmp_path / str(number), list[Event]()

        def work(number: int = number, cache: Path = cache) -> None:
            die_at(number)
            EncodedStore(cache).save(KEY, FACTS, rows().write)

        status = child(work)
        store = EncodedStore(cache, told.append)
        whole += (there := same(store))
        assert there or store.load(KEY) is None
        assert not told, "what was not published is nothing to speak of"
        assert store.save(KEY, FACTS, rows().write) is not None
        assert same(store)
        drafts = [path.name for path in store.root.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        assert not drafts, "what the dead process began is swept"
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        killed += 1
    assert killed >= 10
    assert 0 < whole < killed


def test_a_kill_while_entries_are_removed_leaves_none_that_is_half(tmp_path: Path) -> None:
    killed = 0
    for number in range(1, 100):
        cache, told = tmp_path / str(number), list[Event]()
        EncodedStore(cache).save(KEY, FACTS, rows().write)

        def work(number: int = number, cache: Path = cache) -> None:
            die_at(number)
            EncodedStore(cache).remove()

        status = child(work)
        store = EncodedStore(cache, told.append)
        assert same(store) or store.load(KEY) is None
        assert not told
        store.remove()
        assert [path.name for path in store.root.iterdir()] == [".lock"]
        if status == 0:
            break
        killed += 1
    assert killed >= 3


@pytest.mark.parametrize("name", [FILE, "entry.json"])
def test_damage_anywhere_is_found_told_and_mended(name: str, tmp_path: Path) -> None:
    store = EncodedStore(tmp_path)
    entry = store.save(KEY, FACTS, rows().write)
    assert entry is not None
    file = entry.folder / name
    good = file.read_bytes()
    damages = [good[:cut] for cut in (0, 1, len(good) // 2, len(good) - 1)]
    damages += [good + b"\n"] if name == FILE else []
    step = max(1, len(good) // 30)
    damages += [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), step)]
    assert len(damages) > 30
    for damage in damages:
        file.write_bytes(damage)
        told: list[Event] = []
        found = EncodedStore(tmp_path, told.append).load(KEY)
        assert found is None
        assert [type(event) for event in told] == [Warned]
        assert str(entry.folder) in str(told[0])
        assert store.save(KEY, FACTS, rows().write) is not None
        assert same(store)


def test_a_missing_file_and_an_entry_under_a_wrong_name_are_not_served(tmp_path: Path) -> None:
    store = EncodedStore(tmp_path)
    entry = store.save(KEY, FACTS, rows().write)
    assert entry is not None
    other = {**KEY, "length": 8}
    os.rename(entry.folder, store.path(other))
    assert store.load(KEY) is None
    assert store.load(other) is None, "a key that was not made of this"
    store.save(KEY, FACTS, rows().write)
    (entry.folder / FILE).unlink()
    assert store.load(KEY) is None


def test_of_writers_at_once_one_wins_and_all_are_content(tmp_path: Path) -> None:
    store = EncodedStore(tmp_path)
    go = tmp_path / "go"

    def work() -> None:
        while not go.exists():
            time.sleep(0.001)
        told: list[Event] = []
        mine = EncodedStore(tmp_path, told.append)
        for _ in range(5):
            assert mine.save(KEY, FACTS, rows().write) is not None
            assert same(mine)
        assert not told

    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    go.touch()
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert same(store)
    assert sorted(path.name for path in store.root.iterdir()) == [".lock", store.path(KEY).name]


def test_a_draft_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    store, other = EncodedStore(tmp_path), {**KEY, "length": 8}

    def write(folder: Path) -> None:
        assert child(lambda: needed(EncodedStore(tmp_path).save(other, FACTS, rows().write))) == 0
        rows().write(folder)

    assert store.save(KEY, FACTS, write) is not None
    assert same(store)
    assert len(store.kept()) == 2


def needed(value: object) -> None:
    assert value is not None


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        assert store.save(KEY, FACTS, rows().write) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [type(event) for event in told] == [Warned]
    assert "cannot be kept" in str(told[0])
    assert [path.name for path in store.root.iterdir()] == [".lock"]
    assert store.save(KEY, FACTS, rows().write) is not None


def test_what_was_used_longest_ago_gives_way_to_the_limit(tmp_path: Path) -> None:
    one = EncodedStore(tmp_path / "one")
    one.save(KEY, FACTS, rows().write)
    size = one.kept()[0].bytes
    store = EncodedStore(tmp_path, limit=int(3.5 * size))
    keys = [{**KEY, "length": at} for at in range(4)]
    for at, key in enumerate(keys[:3]):
        store.save(key, FACTS, rows().write)
        os.utime(store.path(key) / "entry.json", (at, at))
    mapped = EncodedRows.mapped(store.path(keys[1]))
    assert store.load(keys[0]) is not None  # used now
    store.save(keys[3], FACTS, rows().write)
    assert [store.load(key) is not None for key in keys] == [True, False, True, True]
    assert list(mapped) == list(rows()), "who has it mapped goes on"
    tiny = EncodedStore(tmp_path, limit=1)
    tiny.save({**KEY, "length": 9}, FACTS, rows().write)
    assert [kept.path for kept in tiny.kept()] == [tiny.path({**KEY, "length": 9})], "the newest stays"


def test_only_the_user_may_read_it_and_all_of_it_can_be_removed(tmp_path: Path) -> None:
    store = EncodedStore(tmp_path)
    assert store.kept() == store.remove() == []
    store.save(KEY, FACTS, rows().write)
    store.save({**KEY, "length": 8}, {})
    for folder in (store.root, *(kept.path for kept in store.kept())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(store.remove()) == 2
    assert [path.name for path in store.root.iterdir()] == [".lock"]


def refused(*arguments: object, **options: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_read_only_cache_serves_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append)
    store.save(KEY, FACTS, rows().write)
    monkeypatch.setattr(os, "utime", refused)
    assert same(store)
    assert not told


def test_what_cannot_be_read_now_is_told_once_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append)
    store.save(KEY, FACTS, rows().write)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", refused)
        assert store.load(KEY) is None
    assert [type(event) for event in told] == [Warned]
    assert "cannot be read: Read-only file system" in str(told[0])
    assert same(store)


def test_what_another_process_has_mended_meanwhile_is_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append)
    entry = store.save(KEY, FACTS, rows().write)
    assert entry is not None
    file = entry.folder / FILE
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    locked = store._locked

    def mended() -> contextlib.AbstractContextManager[None]:
        file.write_bytes(good)
        return locked()

    monkeypatch.setattr(store, "_locked", mended)
    assert same(store)
    assert not told


@pytest.mark.parametrize("which", ["root", "entry"])
@pytest.mark.parametrize("how", ["group", "others", "owner"])
def test_what_another_user_can_have_written_is_not_believed(which: str, how: str, tmp_path: Path) -> None:
    written = EncodedStore(tmp_path).save(KEY, FACTS, rows().write)
    assert written is not None
    folder = written.folder if which == "entry" else written.folder.parent
    if how == "owner":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 1234, -1)
    else:
        folder.chmod(0o720 if how == "group" else 0o702)
    told: list[Event] = []
    store = EncodedStore(tmp_path, told.append)
    assert store.load(KEY) is None
    assert store.load(KEY) is None
    assert [type(event) for event in told] == [Warned]
    assert f"{folder} {'belongs to user 1234' if how == 'owner' else 'can be written by others'}" in str(told[0])
    assert written.folder.is_dir(), "it is not ours to remove"
    if (which, how) == ("root", "owner"):
        assert store.save({**KEY, "length": 8}, FACTS, rows().write) is None
        assert len(told) == 1
        assert len(store.kept()) == 1


def test_counts_of_numpy_can_be_kept(tmp_path: Path) -> None:
    tally = Tally(1, 0)
    tally.say("stop_added", np.int64(3))  # type: ignore[arg-type]
    assert EncodedStore(tmp_path).save(KEY, tally.as_record()) is not None
