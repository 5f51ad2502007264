"""Checkpoints: what was written is what is read, and no fault in a write costs an older one."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.disk import Disk
from faults.recorder import Killed, Recorder, read_tree, write_tree
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import RunError
from peftkit.events import Warned
from peftkit.training import checkpoint
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.flat import flatten, unflatten


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {"layer.weight": torch.randn(3, 4, generator=generator)},
        "optimizer": {"state": {0: {"step": torch.tensor(step), "exp_avg": torch.zeros(2)}}, "betas": (0.9, 0.9)},
        "journal": {"step": step, "best": None},
    }  # fmt: skip


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers()
nested = st.recursive(
    plain | st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(torch.tensor),
    lambda inner: (
        st.dictionaries(keys, inner, max_size=3) | st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "$tensor", "$tuple"]), nested, max_size=3))
def test_nested_state_comes_back_as_it_was(value: dict[str, Any]) -> None:
    flat, tensors = flatten(value)
    assert same(unflatten(flat, tensors), value)


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(TypeError, match="a/1 holds a set"):
        flatten({"a": [1, {2}]})


def test_a_later_change_of_a_tensor_does_not_reach_the_checkpoint() -> None:
    tensor = torch.zeros(2)
    _, tensors = flatten({"a": tensor, "b": tensor})
    tensor += 1
    assert all(torch.equal(kept, torch.zeros(2)) for kept in tensors.values())


def test_written_and_read(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "run" / "checkpoints")
    assert kept.steps() == []
    assert kept.newest() is None
    for step in (3, 12, 100_000_000):
        kept.write(step, state(step))
    assert kept.steps() == [3, 12, 100_000_000]
    found = kept.newest()
    assert found is not None
    assert same(found.state, state(100_000_000))


def test_the_last_ones_and_the_best_are_retained(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for step in range(1, 8):
        kept.write(step, state(step))
    kept.retain(2, best=3)
    assert kept.steps() == [3, 6, 7]
    kept.retain(2, best=6)
    assert kept.steps() == [6, 7]
    kept.retain(1, best=None)
    assert kept.steps() == [7]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    said: list[Any] = []
    kept = Checkpoints(tmp_path, said.append)
    kept.write(1, state(1))
    kept.write(2, state(2))
    path = kept.path(2) / file
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_bytes((kept.path(1) / file).read_bytes())
        if file == "state.json":  # of the same size, and a good file of another step
            assert len(data) == path.stat().st_size
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    found = kept.newest()
    assert found is not None
    assert found.step == 1
    assert [type(event) for event in said] == [Warned]
    assert str(kept.path(2)) in said[0].text


def test_another_format_is_named(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.write(1, state(1))
    head = kept.path(1) / "checkpoint.json"
    head.chmod(0o644)
    head.write_text(head.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(RunError, match="has format 3") as caught:
        kept.load(1)
    assert "format 2" in str(caught.value)


def stocked(top: Path) -> Disk:
    """Two checkpoints on a disk that holds them for good."""
    top.mkdir()
    kept = Checkpoints(top / "checkpoints")
    kept.write(1, state(1))
    kept.write(2, state(2))
    return Disk.holding(read_tree(top), lambda path: any(p.startswith((".", "removed-")) for p in path.split("/")))


def sound(top: Path, least: int) -> bool:
    """Every checkpoint under its name is whole, and one of at least the step `least` is there."""
    kept = Checkpoints(top / "checkpoints")
    try:
        return max(kept.steps(), default=0) >= least and all(same(kept.load(s).state, state(s)) for s in kept.steps())
    except RunError:
        return False


def write_one_more(top: Path) -> None:
    kept = Checkpoints(top / "checkpoints")
    kept.write(3, state(3))
    kept.retain(2, best=None)


def unsound_after_power_failures(folder: Path) -> tuple[int, int]:
    """How many states of the disk were looked at after a power failure at any call of a write, and how many are bad."""
    disk = stocked(folder / "top")
    recorder = Recorder(folder / "top", disk)
    with recorder.recording():
        write_one_more(folder / "top")
    recorder.check()
    assert {event.kind for event in recorder.events} >= {"mkdir", "create", "write", "rename", "unlink"}
    assert Checkpoints(folder / "top" / "checkpoints").steps() == [2, 3]
    states = bad = 0
    dice = random.Random(0)
    for event in recorder.events:
        disk.feed(event)
        for tree in disk.crash_states(dice):
            states += 1
            write_tree(folder / f"state-{states}", tree)
            bad += not sound(folder / f"state-{states}", 2)
    return states, bad


def test_power_may_fail_after_every_call(tmp_path: Path) -> None:
    states, bad = unsound_after_power_failures(tmp_path)
    assert (states > 20, bad) == (True, 0)


def test_files_that_are_not_synced_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug that the test above must see."""

    def unsynced(path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)

    monkeypatch.setattr(checkpoint, "write_file", unsynced)
    assert unsound_after_power_failures(tmp_path)[1] > 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), Killed()])
def test_every_call_may_fail(tmp_path: Path, error: BaseException) -> None:
    """A full disk, a broken one, kill -9: at every call of a write, and the next write succeeds."""
    calls = count = 0
    while calls == count:  # until the fault comes after the last call
        count += 1
        top = tmp_path / f"top-{count}"
        disk = stocked(top)

        def fault(number: int, kind: str, path: str, at: int = count) -> None:
            nonlocal calls
            if number == at:
                calls = at
                raise error

        recorder = Recorder(top, disk, fault)
        with contextlib.suppress(type(error)), recorder.recording():
            write_one_more(top)
        assert sound(top, 2)
        write_one_more(top)
        assert sound(top, 3)
        assert Checkpoints(top / "checkpoints").steps() == [2, 3]
        assert sorted(path.name for path in (top / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert count > 15
