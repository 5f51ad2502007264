"""Removing runs and leftovers: never what lives or is the only place of something, and never half."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RunError
from peftkit.runs import RunFolder, list_runs, removing
from peftkit.runs.comparing import compare_runs
from peftkit.runs.contents import held
from peftkit.runs.removing import collect, remove_runs

LATER = datetime.now(UTC) + timedelta(days=10)


def ended(root: Path, state: Any = "done", saved_as: str | None = "tickets@1", *, checkpoint: bool = True) -> RunFolder:
    """An ended run with 1,000 bytes of checkpoint and 10 of the trainer's."""
    run = RunFolder.create(root, "demo", {"train": {"lr": 1e-4}}, {"python": "3.11"})
    run.log_metrics(1, {"loss": 2.0})
    if checkpoint:
        put(run.path / "checkpoints/step-00000001/state.safetensors", 1000)
    put(run.path / "trainer/x", 10)
    run.finish(state, saved_as=saved_as)
    return run


def put(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def living(root: Path) -> RunFolder:
    run = RunFolder.create(root, "demo", {}, {})
    put(run.path / "checkpoints/step-00000001/state.safetensors", 1000)
    return run


def died(root: Path) -> RunFolder:
    run = living(root)
    run._lock.release()
    status = json.loads((run.path / "status.json").read_text())
    status["process"]["pid"] = 2**22 + 1
    (run.path / "status.json").write_text(json.dumps(status))
    return run


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name != ".lock")


def test_a_saved_run_is_removed_and_its_bytes_are_told(tmp_path: Path) -> None:
    run, other = ended(tmp_path), ended(tmp_path)
    total = held(run.path).total
    removed = remove_runs(tmp_path, [run.id])
    assert removed.paths == ((run.id, total),)
    assert removed.bytes == total > 1010
    assert os.listdir(tmp_path) == [other.id]


@pytest.mark.parametrize("part", ["adapter/a.safetensors", "interrupted/a.safetensors",
                                  "checkpoints/step-00000003/state.json"])  # fmt: skip
@pytest.mark.parametrize("state", ["done", "failed", "interrupted"])
def test_what_was_learned_and_is_nowhere_else_needs_force(tmp_path: Path, part: str, state: str) -> None:
    run = ended(tmp_path, state, None, checkpoint=False)
    put(run.path / part, 5)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=f"only place of what it learned: .*{part.split('/')[0]}") as raised:
        remove_runs(tmp_path, [run.id])
    assert f"peftkit runs rm {run.id} --force" in str(raised.value)
    assert ("--resume" in str(raised.value)) == part.startswith("checkpoints")
    assert tree(tmp_path) == before
    remove_runs(tmp_path, [run.id], force=True)
    assert os.listdir(tmp_path) == []


def test_a_run_that_learned_nothing_is_removed(tmp_path: Path) -> None:
    run = ended(tmp_path, "failed", None, checkpoint=False)
    (run.path / "adapter").mkdir()
    remove_runs(tmp_path, [run.id])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_run_in_progress_is_refused_also_with_force(tmp_path: Path, force: bool) -> None:
    run = living(tmp_path)
    with pytest.raises(RunError, match=f"still running, in process {os.getpid()}: it cannot be removed"):
        remove_runs(tmp_path, [run.id], force=force)
    # Its status is gone: the lock still tells.
    (run.path / "status.json").write_text("{")
    with pytest.raises(RunError, match="another process holds"):
        remove_runs(tmp_path, [run.id], force=True)
    assert run.path.is_dir()
    run.finish("done", saved_as="a@1")
    remove_runs(tmp_path, [run.id])


def test_all_are_looked_at_before_the_first_is_removed(tmp_path: Path) -> None:
    good, bad = ended(tmp_path), ended(tmp_path, "interrupted", None)
    for names in ([good.id, bad.id], [good.id, "nothing"], [good.id, good.id[:8]]):
        with pytest.raises(RunError):
            remove_runs(tmp_path, names)
        assert good.path.is_dir()
    assert len(remove_runs(tmp_path, [good.id, good.id]).paths) == 1


@pytest.mark.parametrize("name", ["..", ".", "", "/", "../outside", "a/../b", ".hidden"])
def test_a_name_that_leads_elsewhere_is_no_run(tmp_path: Path, name: str) -> None:
    root = tmp_path / "runs"
    ended(root)
    put(tmp_path / "outside/status.json", 3)
    put(root / ".hidden/status.json", 3)
    before = tree(tmp_path)
    with pytest.raises(RunError, match="no run"):
        remove_runs(root, [name], force=True)
    assert tree(tmp_path) == before


def test_links_and_folders_of_others_stay(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = ended(tmp_path / "elsewhere")
    root.mkdir()
    (root / "link").symlink_to(run.path)
    put(root / "data/rows.jsonl", 7)
    with pytest.raises(RunError, match="is a symbolic link to"):
        remove_runs(root, ["link"], force=True)
    with pytest.raises(RunError, match=r"is no run: it has no status\.json"):
        remove_runs(root, ["data"], force=True)
    assert collect(root, older_than=timedelta(days=1), now=LATER).paths == ()
    assert (root / "data/rows.jsonl").exists()
    assert (run.path / "checkpoints").is_dir()


def test_a_link_inside_a_run_is_removed_and_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "big/step-00000001/state.safetensors", 50)
    run = ended(tmp_path / "runs", checkpoint=False)
    (run.path / "checkpoints").symlink_to(tmp_path / "big")
    swept = collect(tmp_path / "runs")
    assert [name for name, _ in swept.paths] == [f"{run.id}/trainer"]
    assert "is a symbolic link to" in swept.kept[0][1]
    remove_runs(tmp_path / "runs", [run.id])
    assert (tmp_path / "big/step-00000001/state.safetensors").exists()


def test_a_crash_while_deleting_leaves_nothing_that_looks_like_a_run(tmp_path: Path, monkeypatch) -> None:
    run = ended(tmp_path)

    def killed(path: Path) -> None:
        (path / "config.yaml").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(removing.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_runs(tmp_path, [run.id])
    assert list_runs(tmp_path) == []
    assert [name.endswith(".removed") for name in os.listdir(tmp_path)] == [True]
    assert len(collect(tmp_path).paths) == 1
    assert os.listdir(tmp_path) == []


def test_gc_takes_checkpoints_of_saved_runs_and_nothing_that_can_go_on(tmp_path: Path) -> None:
    saved, unsaved, stopped = ended(tmp_path), ended(tmp_path, saved_as=None), ended(tmp_path, "interrupted", None)
    failed, hopeless = ended(tmp_path, "failed", None), ended(tmp_path, "failed", None, checkpoint=False)
    gone, alive = died(tmp_path), living(tmp_path)
    expected = {f"{saved.id}/checkpoints": 1000, f"{saved.id}/trainer": 10, f"{hopeless.id}/trainer": 10}
    before = tree(tmp_path)
    assert dict(collect(tmp_path, dry_run=True).paths) == expected
    assert tree(tmp_path) == before
    swept = collect(tmp_path)
    assert dict(swept.paths) == expected
    assert swept.bytes == 1020
    left = set(before) - set(tree(tmp_path))
    assert {entry.split("/")[0] for entry in left} == {saved.id, hopeless.id}
    assert {name.split("/")[1] for name in left} == {"checkpoints", "trainer"}
    assert collect(tmp_path).paths == ()
    for run in (unsaved, stopped, failed, gone, alive):
        assert (run.path / "checkpoints/step-00000001/state.safetensors").exists()
    alive.finish("done")


def test_gc_of_old_runs_takes_their_checkpoints_and_keeps_records_and_adapters(tmp_path: Path) -> None:
    old, alive, gone = ended(tmp_path, "interrupted", None), living(tmp_path), died(tmp_path)
    put(old.path / "interrupted/adapter.safetensors", 3)
    assert collect(tmp_path, older_than=timedelta(days=11), now=LATER).paths == ()
    swept = collect(tmp_path, older_than=timedelta(days=9), now=LATER)
    assert {name for name, _ in swept.paths} == {f"{old.id}/checkpoints", f"{old.id}/trainer", f"{gone.id}/checkpoints"}
    assert (old.path / "interrupted/adapter.safetensors").exists()
    assert (old.path / "metrics.jsonl").exists()
    assert (alive.path / "checkpoints").is_dir()
    alive.finish("done")


def test_gc_takes_drafts_of_dead_processes_only(tmp_path: Path) -> None:
    run = ended(tmp_path)
    status = json.loads((run.path / "status.json").read_text())
    shutil.rmtree(run.path)
    drafts = {"living": status, "dead": {**status, "process": {**status["process"], "boot": "another"}}}
    for name, facts in drafts.items():
        put(tmp_path / f".{name}.new/x", 5)
        (tmp_path / f".{name}.new/status.json").write_text(json.dumps(facts))
    for name, age in (("fresh", 60), ("old", 7200)):
        put(tmp_path / f".{name}.new/x", 5)
        moment = datetime.now().timestamp() - age
        os.utime(tmp_path / f".{name}.new", (moment, moment))
    put(tmp_path / ".git/x.new", 1)
    put(tmp_path / ".gitignore", 1)
    assert {name for name, _ in collect(tmp_path).paths} == {".dead.new", ".old.new"}
    assert sorted(os.listdir(tmp_path)) == [".fresh.new", ".git", ".gitignore", ".living.new"]


def test_gc_leaves_a_run_that_somebody_holds(tmp_path: Path) -> None:
    run = ended(tmp_path)
    lock = removing.hold(run.path)
    swept = collect(tmp_path)
    assert swept.paths == ()
    assert swept.kept == ((run.id, f"another process holds the run {run.id}"),)
    lock.release()
    assert len(collect(tmp_path).paths) == 2


def test_a_comparison_holds_what_differs(tmp_path: Path) -> None:
    first, second = ended(tmp_path), ended(tmp_path, "interrupted", None)
    second.write_text("config.yaml", "train:\n  lr: 0.1\nextra: null\n")
    second.write_json("environment.json", {"python": "3.12"})
    bound = {"data": {"SHA-256 of training rows": "abcd"}, "settings": {"train": {"lr": 1}}}
    (second.path / "checkpoints/step-00000001/state.json").write_text(json.dumps({"bound_to": bound}))
    (first.path / "metrics.jsonl").write_text("")
    runs = sorted(list_runs(tmp_path), key=lambda run: run.state)
    compared = compare_runs(runs)
    assert dict(compared.settings) == {"train.lr": (1e-4, 0.1), "extra": ("(none)", None)}
    assert dict(compared.environment) == {"python": ("3.11", "3.12")}
    assert dict(compared.data) == {"data.SHA-256 of training rows": ("(none)", "abcd")}
    assert compared.losses == ((), ((1, 2.0),))
    html = compared.as_html()
    assert first.id in html
    assert "abcd" in html
    assert compare_runs([runs[0], runs[0]]).settings == ()
    second.write_text("config.yaml", "[: {")
    assert "config.yaml" in dict(compare_runs(runs).settings)
