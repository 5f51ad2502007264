"""Few-shot runs for real on a tiny base: finished ones are found again, and all are measured on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftkit import locations
from peftkit.errors import RunError
from peftkit.events import Event, Note, Progress
from peftkit.recipe import Interrupted
from peftkit.recipe.few_shot import Curve, few_shot, few_shot_folder, read_few_shot
from peftkit.runs import list_runs

pytestmark = [pytest.mark.usefixtures("places"), pytest.mark.full]
pytest.importorskip("scipy")


@pytest.fixture
def settings(tiny_base: Path, short_rows: Path) -> list[str]:
    return [
        f"base={tiny_base}", f"data.train={short_rows}", "data.held_out_share=0.25", "r=4", "max_steps=2",
        "train.per_device_train_batch_size=2", "evaluate.max_generated_rows=0", "retention_passages=1",
    ]  # fmt: skip


def go(settings: list[str], report: list[Event] | None = None, stop_in: int | None = None, draws: int = 2) -> Curve:
    asked = read_few_shot("lora_sft", settings, draws=draws)
    said = report if report is not None else []

    def tell(event: Event) -> None:
        said.append(event)
        if stop_in is not None and isinstance(event, Progress) and len(runs(settings)) == stop_in:
            raise KeyboardInterrupt

    return few_shot(few_shot_folder(locations.runs_root().path, asked), asked, report=tell)


def runs(settings: list[str]) -> list[str]:
    asked = read_few_shot("lora_sft", settings)
    return [run.id for run in list_runs(few_shot_folder(locations.runs_root().path, asked) / "runs")]


def test_every_draw_is_run_once_however_often_it_is_stopped(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="interrupted at n = 8, draw 1"):
        go(["n=4,8", *settings], stop_in=2)
    said: list[Event] = []
    curve = go(["n=4,8", *settings], said)
    found = [event.text for event in said if isinstance(event, Note) and "done before" in event.text]
    assert len(found) == 1
    assert len(runs(["n=8", *settings])) == 5, "four, and the one that was stopped"
    assert [(point.rows, point.draws) for point in curve.points] == [(4, 2), (8, 2)]
    values = {(draw.rows, draw.draw): draw.objective for draw in curve.draws}
    assert len({found.value for found in values.values() if found}) == 4, "other rows, other figures"
    assert len({draw.held_out for draw in curve.draws}) == 1
    assert curve.before is not None
    again = go(["n=4,8,12", *settings])
    assert len(runs(["n=8", *settings])) == 7, "two more, of twelve rows"
    assert {(draw.rows, draw.draw): draw.objective for draw in again.draws if draw.rows < 12} == values
    assert [point for point in again.points if point.rows < 12] == list(curve.points)
    assert list_runs(locations.runs_root().path) == []
    assert not (tmp_path / "registry").exists()
    assert list((curve.folder / "registry").iterdir()) == []
    assert [len(list(path.glob("checkpoints/*"))) for path in (curve.folder / "runs").iterdir()] == [0] * 7


def test_too_few_rows_and_changed_held_out_rows_are_refused(settings: list[str]) -> None:
    with pytest.raises(RunError, match="n = 13: there are only 12 training rows"):
        go(["n=4,13", *settings], draws=1)
    curve = go(["n=4", *settings], draws=1)
    binding = curve.folder / "runs" / str(curve.draws[0].run) / "binding.json"
    facts = json.loads(binding.read_text())
    facts["data"]["SHA-256 of held-out rows"] = "another"
    binding.write_text(json.dumps(facts))
    with pytest.raises(RunError, match="2 different sets of held-out rows"):
        go(["n=4,8", *settings], draws=1)
