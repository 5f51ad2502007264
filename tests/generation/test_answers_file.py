"""Answers on disk: whatever ends a writer, the next one loses nothing that was kept and believes nothing torn."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import GenerationError
from peftkit.generation.bulk.answers_file import AnswersFile, partial_of, refuse_place

JOBS = 40
ABOUT = {"rows": "x", "settings": {"seed": 1}}


def line(job: int) -> dict[str, Any]:
    return {"row": job, "adapter": None, "answer": f"ä{job}" * (job % 7), "finish": "stop"}


def job_of(record: Mapping[str, Any]) -> int:
    return int(record["row"])


def begin(out: Path, about: Mapping[str, Any] = ABOUT, **options: bool) -> AnswersFile:
    return AnswersFile(out, about, JOBS, job_of, **options)


def go_on(out: Path) -> int:
    """Answer what is missing, and finish; how many there were."""
    with begin(out) as kept:
        if kept.finished:
            return JOBS
        done = kept.done
        for job in range(JOBS):
            if not kept.has(job):
                kept.add(line(job))
        kept.finish({"answers": JOBS, "failed": 0})
    return done


def check_finished(out: Path) -> None:
    assert [json.loads(text) for text in out.read_text().splitlines()] == [line(job) for job in range(JOBS)]
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.receipt.json"]
    with begin(out) as kept:
        assert kept.finished
    assert len(list(out.parent.iterdir())) == 2


def test_answers_in_any_order_are_put_in_order(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        for job in random.Random(1).sample(range(JOBS), JOBS):
            kept.add(line(job))
        assert not out.exists()
        kept.finish({"answers": JOBS, "failed": 0})
    check_finished(out)


def test_every_cut_of_the_partial_file_is_gone_on_from(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        for job in range(JOBS // 2):
            kept.add(line(job))
    whole = partial_of(out).read_bytes()
    seen, lines = set(), whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[:at])) for at in range(len(lines) + 1)]
    for cut in {*ends, *(end - 1 for end in ends[1:]), *range(0, len(whole), 29)}:
        partial_of(out).write_bytes(whole[:cut])
        seen.add(go_on(out))
        check_finished(out)
        for path in tmp_path.iterdir():
            path.unlink()
    assert seen == set(range(JOBS // 2 + 1))


def test_what_follows_a_torn_line_is_not_believed(tmp_path: Path) -> None:
    """A power cut may lose a block that was not synced and keep the one after it."""
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        for job in range(6):
            kept.add(line(job))
    lines = partial_of(out).read_bytes().splitlines(keepends=True)
    lines[4] = b"\0" * len(lines[4])
    partial_of(out).write_bytes(b"".join(lines))
    with begin(out) as kept:
        assert kept.done == 3
        assert kept.dropped == sum(map(len, lines[4:]))
        assert partial_of(out).read_bytes() == b"".join(lines[:4])
    assert partial_of(out).read_bytes() == b"".join(lines[:4])


def test_what_failed_is_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        kept.add({**line(3), "finish": "failed"})
        kept.add(line(4))
        assert kept.has(3)
    with begin(out) as kept:
        assert (kept.done, kept.has(3), kept.has(4)) == (1, False, True)
    go_on(out)
    check_finished(out)


@pytest.mark.parametrize("kills", [pytest.param(15, id="some"), pytest.param(200, id="many", marks=pytest.mark.full)])
def test_kill_nine_at_any_point(kills: int, tmp_path: Path) -> None:
    """Every answer that was kept before the kill is there after it, and the rest follows."""
    dice, out, before = random.Random(3), tmp_path / "a.jsonl", 0
    outcomes: set[str] = set()
    for _ in range(kills):
        heard = _killed(out, dice)
        done = JOBS if out.exists() else _done(out)
        assert done >= min(JOBS, before + heard)
        outcomes.add("finished" if out.exists() else "none" if not done else "some")
        before = done
        if out.exists():
            go_on(out)
            check_finished(out)
            for path in tmp_path.iterdir():
                path.unlink()
            before = 0
    go_on(out)
    check_finished(out)
    assert outcomes >= {"some"} if kills < 100 else {"finished", "some"} <= outcomes


def _done(out: Path) -> int:
    with begin(out) as kept:
        return kept.done


def _killed(out: Path, dice: random.Random) -> int:
    """A child that goes on is killed; how many answers it had said to have kept."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with begin(out) as kept:
                for job in range(JOBS):
                    if not kept.finished and not kept.has(job):
                        kept.add(line(job))
                        os.write(writing, b".")
                if not kept.finished:
                    kept.finish({"answers": JOBS, "failed": 0})
            os.write(writing, b"E")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    heard, target = b"", dice.randint(0, 12)
    while len(heard) < target and b"E" not in heard and (more := os.read(reading, 1)):
        heard += more
    for _ in range(dice.randint(0, 3000)):
        pass
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    while more := os.read(reading, 4096):
        heard += more
    os.close(reading)
    return heard.count(b".")


@pytest.mark.parametrize("room", [0, 40, 150, 700, 1100, 2000])
def test_a_full_disk_keeps_what_fitted(room: int, tmp_path: Path) -> None:
    out, (soft, hard) = tmp_path / "a.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    added = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(GenerationError, match="cannot be written"), begin(out) as kept:
            for job in range(JOBS):
                kept.add(line(job))
                added += 1
            kept.finish({"answers": JOBS, "failed": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]
    assert go_on(out) == added
    check_finished(out)


def test_one_process_has_a_file(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        child = os.fork()
        if child == 0:
            try:
                begin(out)
            except GenerationError as error:
                os._exit(7 if "another process" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        kept.add(line(0))
    assert _done(out) == 1


def test_killed_while_finishing(tmp_path: Path) -> None:
    """Both states between the steps of finishing end in the same files."""
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        for job in range(JOBS):
            kept.add(line(job))
    partial = partial_of(out).read_bytes()
    go_on(out)
    partial_of(out).write_bytes(partial)  # killed before the partial file was let go
    assert go_on(out) == JOBS
    check_finished(out)
    partial_of(out).write_bytes(partial)
    out.unlink()  # killed after the receipt
    assert go_on(out) == JOBS
    check_finished(out)


def test_other_answers_are_never_gone_on_with(tmp_path: Path) -> None:
    out, other = tmp_path / "a.jsonl", {**ABOUT, "settings": {"seed": 2}}
    with begin(out) as kept:
        kept.add(line(0))
    before = partial_of(out).read_bytes()
    with pytest.raises(GenerationError, match=r"settings\.seed: 1 there, 2 now(.|\n)*--fresh"):
        begin(out, other)
    assert partial_of(out).read_bytes() == before
    with begin(out, other, fresh=True) as kept:
        assert kept.done == 0
        kept.add(line(0))
    with pytest.raises(GenerationError, match="2 there, 1 now"):
        begin(out)


@pytest.mark.parametrize("torn", ["", '{"row": 1, "ans'])
def test_where_nothing_was_answered_nothing_stands_in_the_way(torn: str, tmp_path: Path) -> None:
    """A mistake that is found when the base is loaded leaves such a file."""
    out = tmp_path / "a.jsonl"
    with begin(out, {**ABOUT, "settings": {"seed": "a longer one"}}):
        pass
    with open(partial_of(out), "a") as stream:
        stream.write(torn)
    assert go_on(out) == 0
    check_finished(out)


def test_bytes_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    out, odd = tmp_path / os.fsdecode(b"\xff.jsonl"), os.fsdecode(b"\\\xff\\u\xfe")
    about = {**ABOUT, "settings": {"stop": [odd]}}
    with begin(out, about) as kept:
        kept.add({**line(3), "answer": odd})
    with begin(out, about) as kept:
        assert kept.done == 1
    assert json.loads(partial_of(out).read_bytes().splitlines()[1])["answer"] == odd


def test_what_an_interrupted_overwrite_kept_stays(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    go_on(out)
    with begin(out, overwrite=True) as kept:
        kept.add(line(0))
    before = partial_of(out).read_bytes()
    with begin(out) as kept:
        assert kept.finished
    assert partial_of(out).read_bytes() == before
    with begin(out, overwrite=True) as kept:
        assert kept.done == 1


def test_cut_answers_are_counted_whenever_they_came(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with begin(out) as kept:
        kept.add({**line(3), "finish": "length"})
    with begin(out) as kept:
        kept.add({**line(4), "finish": "length"})
        kept.add(line(5))
        assert kept.cut == 2


def test_a_finished_file_is_never_replaced_unasked(tmp_path: Path) -> None:
    out, other = tmp_path / "a.jsonl", {**ABOUT, "rows": "y"}
    go_on(out)
    with pytest.raises(GenerationError, match=r'rows: "x" there, "y" now(.|\n)*--overwrite'):
        begin(out, other)
    with begin(out, other, overwrite=True) as kept:
        assert not kept.finished
    check_there = out.read_bytes()
    out.write_bytes(check_there + b"{}\n")
    with pytest.raises(GenerationError, match="not as peftkit wrote it"):
        begin(out)
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(GenerationError, match="is there already"):
        begin(tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


@pytest.mark.parametrize("content", ["mine\n", "mine", '{"a": 1}\n', "[]\n"])
def test_a_file_of_somebody_elses_is_left_alone(content: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    partial_of(out).write_text(content)
    with pytest.raises(GenerationError, match="does not hold answers"):
        begin(out)
    assert partial_of(out).read_text() == content


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("no/a.jsonl", r"is no folder(.|\n)*mkdir -p no"),
        ("there", r"there is a folder(.|\n)*--out there/answers\.jsonl"),
        ("", r"\. is a folder(.|\n)*--out answers\.jsonl"),
    ],
)
def test_nowhere_to_write(out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    with pytest.raises(GenerationError, match=said):
        refuse_place(Path(out))


@pytest.mark.parametrize(("number", "room"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_room_is_asked_for_only_where_none_is_left(
    number: int, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> int:
        raise OSError(number, os.strerror(number))

    with begin(tmp_path / "a.jsonl") as kept:
        monkeypatch.setattr(os, "pwrite", broken)
        with pytest.raises(GenerationError) as caught:
            kept.add(line(0))
        monkeypatch.undo()
    assert ("make room" in str(caught.value)) == room
