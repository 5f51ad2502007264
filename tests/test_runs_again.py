"""Going on with a run: one writer, time that adds up, one trace; and the page that it writes meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import RunError
from peftkit.events import Decision, Event, Note, Table, Warned
from peftkit.runs import RunFolder, folder, load_run, read_events, read_metrics
from peftkit.runs.page import run_page
from peftkit.runs.records import last_figures

CHILD = """
import sys
from pathlib import Path
from peftkit.runs import RunFolder
run = RunFolder.create(Path(sys.argv[1]), "demo", {}, {}) if len(sys.argv) < 3 else RunFolder.reopen(Path(sys.argv[2]))
run.log_metrics(1, {"loss": 1.0})
print(run.path, flush=True)
sys.stdin.read()
"""


def begin(root: Path) -> RunFolder:
    return RunFolder.create(root, "demo", {"a": 1}, {"python": "3.11"})


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def status(run: RunFolder) -> dict[str, Any]:
    return json.loads((run.path / "status.json").read_text())


@pytest.mark.parametrize("state", ["interrupted", "failed", "done"])
def test_an_ended_run_goes_on_and_its_seconds_add_up(tmp_path: Path, state) -> None:
    first = begin(tmp_path)
    first.finish(state, error="stopped", figures={"loss": 1.0}, saved_as="tickets@1" if state == "done" else None)
    changed = {**status(first), "seconds": 100.0}
    (first.path / "status.json").write_text(json.dumps(changed))
    again = RunFolder.reopen(first.path)
    found = load_run(tmp_path, again.id)
    assert (found.state, found.error, found.ended, found.saved_as, found.pid) == (
        "running",
        None,
        None,
        None,
        os.getpid(),
    )
    assert len(found.resumed) == 1
    assert found.seconds is not None
    assert 100 <= found.seconds < 200
    again.log_metrics(5, {"loss": 0.5})
    assert json.loads((again.path / "metrics.jsonl").read_text())["seconds"] >= 100
    again.finish("done", saved_as="tickets@2")
    third = RunFolder.reopen(first.path)
    third.finish("interrupted")
    end = status(third)
    assert end["seconds"] >= 100
    assert len(end["resumed"]) == 2
    assert end["saved_before"] == [*(["tickets@1"] if state == "done" else []), "tickets@2"]


def test_a_run_in_progress_is_refused_by_its_pid_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    with child(str(tmp_path)) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        with pytest.raises(RunError, match=f"still running, in process {process.pid}: it cannot be gone on with"):
            RunFolder.reopen(path)
        os.kill(process.pid, signal.SIGKILL)
    again = RunFolder.reopen(path)
    assert load_run(tmp_path, path.name).state == "running"
    again.finish("done")


def test_of_two_that_go_on_one_is_refused_even_without_a_word_in_the_status(tmp_path: Path) -> None:
    first = begin(tmp_path)
    first.finish("interrupted")
    ended = (first.path / "status.json").read_text()
    with child("-", str(first.path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(first.path)
        with pytest.raises(RunError, match="still running"):
            RunFolder.reopen(first.path)
        (first.path / "status.json").write_text(ended)  # as between the lock and the status of the other
        with pytest.raises(RunError, match=f"another process holds the run {first.id}"):
            RunFolder.reopen(first.path)
        process.kill()
    RunFolder.reopen(first.path).finish("done")


def test_what_is_no_run_does_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        RunFolder.reopen(tmp_path / "none")
    first = begin(tmp_path)
    first.finish("interrupted")
    (first.path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot be gone on with: status\.json is unusable"):
        RunFolder.reopen(first.path)
    (first.path / "status.json").unlink()
    with pytest.raises(RunError, match=r"status\.json is missing"):
        RunFolder.reopen(first.path)


def test_a_line_torn_by_a_kill_costs_nothing_that_follows(tmp_path: Path) -> None:
    first = begin(tmp_path)
    first.record(Note("whole"))
    first.finish("interrupted")
    with (first.path / "events.jsonl").open("a") as handle:
        handle.write('{"event": "No')
    again = RunFolder.reopen(first.path)
    again.record(Note("after"))
    again.finish("done")
    assert [event["text"] for event in read_events(first.path)] == ["whole", "after"]


@given(kills=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11)), max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_trace_of_a_run_that_went_back_is_that_of_one_that_never_stopped(tmp_path_factory, kills) -> None:
    def steps(run: RunFolder, first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.log_metrics(step, {"loss": 1 / step})
            if step % 3 == 0:
                run.log_metrics(step, {"held_out_nll": 2 / step})

    root = tmp_path_factory.mktemp("runs")
    whole, torn = begin(root), begin(root)
    steps(whole, 1, 12)
    reached = 0
    for killed_at, checkpoint in kills:
        steps(torn, min(checkpoint, reached) + 1, killed_at)
        reached = max(reached, killed_at)
    steps(torn, 1 if not reached else min(reached, 6), 12)
    steps(torn, 1, 12)
    assert read_metrics(torn.path) == read_metrics(whole.path)
    assert last_figures(torn.path) == {"loss": 1 / 12}


def test_the_last_figures_come_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    run = begin(tmp_path)
    lines = [json.dumps({"step": step, "seconds": 0.0, "figures": {"loss": step}}) for step in range(1, 20_001)]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert last_figures(run.path) == {"loss": 20_000.0}
    assert last_figures(tmp_path) == {}


# The page.


def full(run: RunFolder) -> None:
    run.record(Decision("dtype", "bf16", "SM 8.9"))
    run.record(Table("data", ("", "rows"), (("train", 480),)))
    run.record(Warned("3 rows were cut <b>", hint="raise data.max_length"))
    for step in range(1, 21):
        figures = {"loss": 3 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 100.0, "answer_tokens": 50.0,
                   "tokens_per_s": 900.0, "peak_gb": 1.5, "micro_batches": 2.0}  # fmt: skip
        run.log_metrics(step, figures)
    run.log_metrics(10, {"held_out_nll": 0.7})
    run.log_metrics(20, {"held_out_nll": 0.9})
    finding = {"rule": "no-eos", "severity": "error", "count": 3, "share": 0.25, "examples": ["line 4"],
               "text": "rows <i> without an end", "mend": "data.template=…"}  # fmt: skip
    run.write_json("audit.json", {"findings": [finding], "tokens": {"edges": [0, 64, 128], "counts": [5, 9]}})
    part = {"name": "weights <x>", "low": 1e9, "expected": 2e9, "high": 3e9}
    disk = {"name": "adapter", "bytes": 53_100_000, "where": "/runs"}
    run.write_json("plan.json", {"parts": [part], "stages": [part], "disk": [disk], "time": {"train": 3.5},
                                 "budget": 12_000_000_000})  # fmt: skip
    row = {"what": "peak of a step", "predicted": 2e9, "measured": 1e9, "unit": "B"}
    run.write_json("probe.json", {"rows": [row]})
    step = run.path / "checkpoints/step-00000010"
    step.mkdir(parents=True)
    (step / "state.safetensors").write_bytes(b"x" * 1000)


FIGURES = {
    "training": {"steps": 20},
    "evaluation": {
        "before": {"answer_nll": {"point": 3.142, "low": 2.99, "high": 3.31}},
        "after": {"answer_nll": {"point": 0.5, "low": 0.4, "high": 0.6}},
        "other": {"answer_nll_change": {"point": -2.6, "low": None, "high": None}},
    },
}


def test_a_page_shows_what_the_files_say(tmp_path: Path) -> None:
    run = begin(tmp_path)
    full(run)
    live = run_page(run.path)
    assert 'http-equiv="refresh" content="10"' in live
    run.finish("done", saved_as="tickets@1", figures=FIGURES)
    html = (run.path / "report.html").read_text()
    assert html == run_page(run.path)
    assert "refresh" not in html
    for text in ("tickets@1", "3.14 [2.99, 3.31]", "0.50 [0.40, 0.60]", "3 rows were cut &lt;b&gt;", "no-eos", "25.00%",
                 "line 4", "rows &lt;i&gt; without an end", "weights &lt;x&gt;", "2.0 GB", "53.1 MB", "12.0 GB",
                 "1.5 GB", "SM 8.9", "steps 10; 1.0 kB", ">0.5</td>", "lowest 0.7 at 10"):  # fmt: skip
        assert text in html, text
    assert html.count("<svg") == 7


NAMES = ["status.json", "config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "audit.json", "plan.json",
         "probe.json"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_page_without_one_of_its_files_says_so_and_shows_the_rest(tmp_path: Path, name: str) -> None:
    run = begin(tmp_path)
    full(run)
    run.finish("done", saved_as="tickets@1", figures=FIGURES)
    (run.path / name).unlink()
    html = run_page(run.path)
    said = {"metrics.jsonl": "No step has been recorded", "events.jsonl": "events.jsonl is missing or empty",
            "status.json": "status.json is missing"}  # fmt: skip
    assert said.get(name, f"there is no {name}") in html
    assert "cannot be shown" not in html


ODD = ["", "{", "null", "[]", '{"findings": 3, "parts": 3, "rows": 3, "tokens": []}', '{"rows": [1], "parts": [null]}',
       '{"findings": [{}], "tokens": {"edges": [1], "counts": [1, 2]}}', "\x00\xff", '{"a":' * 5000,
       '{"parts": [{"name": {}, "low": "x"}], "time": [1], "budget": "x", "disk": [{}]}']  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_a_page_of_odd_files_is_still_a_page(tmp_path: Path, text: str) -> None:
    for name in NAMES:
        run = begin(tmp_path / name)
        full(run)
        run.finish("done", saved_as="tickets@1", figures=FIGURES)
        (run.path / name).write_bytes(text.encode("latin-1"))
        html = run_page(run.path)
        assert html.startswith("<!DOCTYPE html>")
        assert "Settings" in html


def test_an_empty_or_missing_folder_has_a_page(tmp_path: Path) -> None:
    assert "status.json is missing" in run_page(tmp_path)
    assert "status.json is missing" in run_page(tmp_path / "none")


def test_a_page_of_ten_thousand_steps_is_small(tmp_path: Path) -> None:
    run = begin(tmp_path)
    keys = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "peak_gb", "micro_batches")
    lines = [json.dumps({"step": s, "seconds": 1.0, "figures": dict.fromkeys(keys, s * 7919 % 1000 / 7)})
             for s in range(1, 10_001)]  # fmt: skip
    (run.path / "metrics.jsonl").write_text("\n".join(lines))
    for index in range(3000):
        run.record(Warned(f"warning {index} " + "x" * 200))
    assert len(run_page(run.path).encode()) < 1_000_000


def test_a_page_is_written_now_and_then_and_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(folder.time, "monotonic", lambda: now[0])
    run = begin(tmp_path)
    heard: list[Event] = []
    run.notify = heard.append
    page = run.path / "report.html"
    run.write_page()
    assert page.exists()
    page.unlink()
    now[0] += 9
    run.write_page()
    assert not page.exists()
    run.write_page(force=True)
    assert page.exists()
    page.unlink()
    now[0] += 11
    run.write_page()
    assert page.exists()

    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        run.write_page(force=True)
        run.write_page(force=True)
    assert [type(event) for event in heard] == [Warned]
    assert not list(run.path.glob(".report*"))
    run.finish("done")
