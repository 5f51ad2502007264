"""Run folders: what survives a kill, a full disk and damage."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import RunError
from peftkit.events import Decision, Event, Note, Progress, Warned
from peftkit.runs import RunFolder, folder, list_runs, load_run, read_events, read_metrics


def begin(root: Path, recipe: str = "qlora_sft") -> RunFolder:
    return RunFolder.create(root, recipe, {"train": {"lr": 1e-5, "name": "1e-5"}}, {"python": "3.11"})


def edit(run: RunFolder, **changes: Any) -> None:
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, **changes}))


def test_a_new_run_has_its_files_and_nothing_else(tmp_path: Path) -> None:
    run = begin(tmp_path / "deep/runs")
    assert re.fullmatch(r"\d{8}-\d{6}-qlora_sft-[0-9a-f]{4}", run.id)
    assert run.path == tmp_path / "deep/runs" / run.id
    assert sorted(os.listdir(run.path)) == [".lock", "config.yaml", "environment.json", "status.json"]
    assert os.listdir(run.path.parent) == [run.id]
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"train": {"lr": 1e-5, "name": "1e-5"}}
    assert json.loads((run.path / "environment.json").read_text()) == {"python": "3.11"}
    status = load_run(tmp_path / "deep/runs", run.id)
    assert (status.state, status.recipe, status.ended, status.error) == ("running", "qlora_sft", None, None)


def test_ids_are_safe_names_whatever_the_recipe(tmp_path: Path) -> None:
    run = begin(tmp_path, "../my recipes/tüv v1.5.py")
    assert re.fullmatch(r"\d{8}-\d{6}-t-v-v1-5-[0-9a-f]{4}", run.id)
    assert load_run(tmp_path, run.id).recipe == "../my recipes/tüv v1.5.py"


def test_two_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter(["aaaa", "1111", "2222", "3333", "aaaa", "cccc", "bbbb", "4444", "5555", "6666"])
    monkeypatch.setattr(folder.secrets, "token_hex", lambda _: next(draws))
    monkeypatch.setattr(folder, "datetime", FrozenClock)
    first = begin(tmp_path)
    left_by_a_killed_one = tmp_path / f".{first.id[:-4]}cccc.new"
    left_by_a_killed_one.mkdir()
    second = begin(tmp_path)
    left_by_a_killed_one.rmdir()
    assert (first.id[-4:], second.id[-4:]) == ("aaaa", "bbbb")
    assert sorted(os.listdir(tmp_path)) == [first.id, second.id]


class FrozenClock(folder.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)


def test_a_root_that_cannot_be_written_is_a_run_error_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="no run folder can be made"):
        begin(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="No space left"):
        begin(tmp_path / "root")
    assert os.listdir(tmp_path / "root") == []


def full_disk(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_events_and_metrics_come_back_in_order(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.record(Decision("dtype", "bf16", "SM 8.9 \udc80 é"))
    run.record(Progress(3, {"loss": float("nan")}))
    run.log_metrics(1, {"loss": 2.5})
    run.log_metrics(2, {"loss": float("nan"), "norm": float("inf"), "low": float("-inf")})
    with (run.path / "events.jsonl").open("a") as handle:
        handle.write("[1]\n")
    events = read_events(run.path)
    assert [event["event"] for event in events] == ["Decision", "Progress"]
    assert events[0]["reason"] == "SM 8.9 \udc80 é"
    assert events[1]["figures"] == {"loss": "nan"}
    assert repr(read_metrics(run.path)) == "[(1, {'loss': 2.5}), (2, {'loss': nan, 'norm': inf, 'low': -inf})]"
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_scalars_of_other_libraries_become_numbers(tmp_path: Path) -> None:
    class Scalar:
        def item(self) -> float:
            return 1.5

    run = begin(tmp_path)
    run.log_metrics(1, {"loss": Scalar(), "odd": object()})  # type: ignore[dict-item]
    line = json.loads((run.path / "metrics.jsonl").read_text())
    assert line["figures"]["loss"] == 1.5
    assert line["figures"]["odd"].startswith("<object")


@given(cut=st.integers(0, 400))
@settings(max_examples=60)
def test_a_torn_end_costs_at_most_the_torn_line(tmp_path_factory, cut: int) -> None:
    run = begin(tmp_path_factory.mktemp("runs"))
    for step in range(5):
        run.log_metrics(step, {"loss": step / 10})
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    kept = whole[: min(cut, len(whole))]
    path.write_bytes(kept)
    steps = [step for step, _ in read_metrics(run.path)]
    complete = kept.count(b"\n")
    assert steps in (list(range(complete)), list(range(complete + 1)))
    assert load_run(run.path.parent, run.id).figures == ({"loss": steps[-1] / 10} if steps else {})


def test_a_full_disk_loses_lines_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    heard: list[Event] = []
    run.notify = heard.append
    run.record(Note("one"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        run.record(Note("lost"))
        run.log_metrics(1, {"loss": 1.0})
    run.record(Note("two"))
    assert run.lost == 2
    assert len(heard) == 1
    assert isinstance(heard[0], Warned)
    assert "No space left" in heard[0].text
    assert [event["text"] for event in read_events(run.path)] == ["one", "two"]
    run.finish("done")
    assert load_run(tmp_path, run.id).lost_records == 2


def test_half_a_line_on_a_full_disk_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        run.record(Note("torn"))
    run.record(Note("whole"))
    run.record(Note("next"))
    assert [event["text"] for event in read_events(run.path)] == ["whole", "next"]
    assert b"\n\n" not in (run.path / "events.jsonl").read_bytes()
    assert run.lost == 1


def test_finish_says_how_it_ended(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.log_metrics(1, {"loss": 3.0})
    run.finish("done", saved_as="tickets@1", figures={"loss": 0.25}, receipts=[Path("a")])
    status = load_run(tmp_path, run.id)
    assert (status.state, status.saved_as, status.figures) == ("done", "tickets@1", {"loss": 0.25})
    assert status.ended is not None
    assert status.started is not None
    assert status.started <= status.ended
    assert status.seconds is not None
    assert json.loads((run.path / "status.json").read_text())["receipts"] == ["a"]
    failed = begin(tmp_path)
    failed.log_metrics(1, {"loss": 3.0})
    failed.finish("failed", error=ValueError("x = 1"))
    status = load_run(tmp_path, failed.id)
    assert (status.state, status.error, status.figures) == ("failed", "x = 1", {"loss": 3.0})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    assert run.write_json("report/a.json", {"x": float("nan")}) == run.path / "report/a.json"
    run.write_text("b.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(RunError, match="No space left"):
            run.write_text("b.txt", "new")
    assert (run.path / "b.txt").read_text() == "old"
    assert json.loads((run.path / "report/a.json").read_text()) == {"x": "nan"}
    assert not list(run.path.rglob("*.new"))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "", ".", "a/../../x"])
def test_a_name_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    run = begin(tmp_path)
    with pytest.raises(RunError, match="inside the run folder"):
        run.write_text(name, "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from peftkit.events import Note
from peftkit.runs import RunFolder
run = RunFolder.create(Path(sys.argv[1]), "demo", {}, {})
for step in range(3):
    run.record(Note(f"step {step}"))
    run.log_metrics(step, {"loss": 1.0 - step / 10})
print(run.id, flush=True)
sys.stdin.read()
"""


def test_kill_9_is_seen_as_died_and_loses_no_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        assert load_run(tmp_path, run).state == "running"
        os.kill(process.pid, signal.SIGKILL)
        # Not reaped yet: a zombie is dead, too.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert load_run(tmp_path, run).state == "died"
    status = load_run(tmp_path, run)
    assert status.state == "died"
    assert "without a word" in (status.error or "")
    assert status.ended is not None
    assert status.figures == {"loss": 0.8}
    assert [event["text"] for event in read_events(status.path)] == ["step 0", "step 1", "step 2"]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"started": 1}, "died"),  # the pid lives, but belongs to a process that started at another time
        ({"boot": "another"}, "died"),
        ({"pid": 2**22 + 1}, "died"),
        ({"host": "another", "pid": 2**22 + 1}, "running"),  # a shared disk: this machine cannot know
    ],
)
def test_which_process_counts_as_alive(tmp_path: Path, change: dict[str, Any], state: str) -> None:
    run = begin(tmp_path)
    edit(run, process={**json.loads((run.path / "status.json").read_text())["process"], **change})
    assert load_run(tmp_path, run.id).state == state


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    made = [begin(tmp_path) for _ in range(3)]
    for run, day in zip(made, (2, 3, 1), strict=True):
        edit(run, started=f"2026-01-0{day}T00:00:00.000Z")
    (tmp_path / ".gitignore").touch()
    (tmp_path / ".draft.new").mkdir()
    assert [run.id for run in list_runs(tmp_path)] == [made[1].id, made[0].id, made[2].id]
    assert list_runs(tmp_path / "none") == []


DAMAGE = ["", "{", "[]", "null", "{}", '{"state": 3}', "\x00\xff", '{"a":' * 5000]
FIELDS = {"state": "odd", "format": 2, "started": "yesterday", "figures": 3, "process": None}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_status_is_listed_not_raised(tmp_path: Path, text: str) -> None:
    run, good = begin(tmp_path), begin(tmp_path)
    (run.path / "status.json").write_bytes(text.encode("latin-1"))
    states = {status.id: status.state for status in list_runs(tmp_path)}
    assert states == {run.id: "damaged", good.id: "running"}
    assert "status.json is unusable" in (load_run(tmp_path, run.id).error or "")


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_is_damage(tmp_path: Path, field: str) -> None:
    run = begin(tmp_path)
    edit(run, **{field: FIELDS[field]})
    assert load_run(tmp_path, run.id).state == "damaged"


def test_a_wrong_duration_of_a_finished_run_is_damage(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.finish("done")
    edit(run, seconds="x")
    assert load_run(tmp_path, run.id).state == "damaged"


def test_a_folder_without_status_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "20260102-030405-x-abcd").mkdir()
    (tmp_path / "notes").mkdir()
    newest, other = list_runs(tmp_path)
    assert (newest.state, newest.started) == ("damaged", "2026-01-02T03:04:05.000Z")
    assert (other.id, other.started, other.error) == ("notes", None, "status.json is missing")


def test_a_run_is_found_by_a_unique_beginning(tmp_path: Path) -> None:
    for name in ("20260101-000000-a-1111", "20260101-000000-b-2222", "20260202-000000-a-3333"):
        begin(tmp_path).path.rename(tmp_path / name)
    assert load_run(tmp_path, "20260202").id == "20260202-000000-a-3333"
    with pytest.raises(RunError, match="2 runs begin with '20260101-': 20260101-000000-a-1111, 20260101-000000-b-2222"):
        load_run(tmp_path, "20260101-")
    with pytest.raises(RunError, match=r"expected: one of 20260101-000000-b-2222\n"):
        load_run(tmp_path, "2222")
    with pytest.raises(RunError, match="no run ''"):
        load_run(tmp_path, "")
    with pytest.raises(RunError, match="there is none yet"):
        load_run(tmp_path / "empty", "x")
