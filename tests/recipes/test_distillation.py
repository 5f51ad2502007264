"""The distillation recipe runs whole on the tiny base, a registered adapter as its teacher (plumbing, no scores)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit import locations
from peftkit.errors import RunError, TrainingError
from peftkit.events import Event, Progress
from peftkit.recipe import Interrupted, configure, execute, find, load
from peftkit.recipe.resume import recipe_and_settings
from peftkit.registry.store import Registry
from peftkit.runs import list_runs

pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture
def settings(tiny_base: Path, short_rows: Path) -> list[str]:
    """Overrides for a run of three small steps on the tiny base."""
    return [
        f"base={tiny_base}",
        f"data.train={short_rows}",
        "data.held_out_share=0.25",
        "adapter.r=4",
        "train.max_steps=3",
        "train.save_steps=1",
        "train.per_device_train_batch_size=2",
        "evaluate.max_generated_rows=0",
        "evaluate.retention=null",
    ]


def stopping(step: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == step:
            raise KeyboardInterrupt

    return stop


def test_a_registered_adapter_teaches_and_is_named(settings: list[str]) -> None:
    sft, distillation = load(find("lora_sft")), load(find("distillation"))
    execute(sft, configure(sft, overrides=[*settings, "quant.bits=4", "save_as=teacher"]))
    store = Registry(locations.registry_root().path)
    teacher = store.resolve("teacher")
    store.tag(teacher.reference, "prod")
    with pytest.raises(TrainingError, match=r"distil\.teacher is not set"):
        execute(distillation, configure(distillation, overrides=settings))
    taught = [*settings, "distil.teacher=teacher@prod", "save_as=small"]
    result = execute(distillation, configure(distillation, overrides=taught))
    assert result.saved_as is not None
    manifest = store.resolve("small").manifest
    assert manifest.adapter["teacher"]["name"] == teacher.reference  # type: ignore[index,call-overload]
    with pytest.raises(Interrupted):
        execute(distillation, configure(distillation, overrides=taught), report=stopping(2))
    execute(sft, configure(sft, overrides=[*settings, "quant.bits=4", "adapter.seed=1", "save_as=teacher"]))
    store.tag(store.resolve("teacher").reference, "prod")
    runs = locations.runs_root().path
    stopped = next(run.id for run in list_runs(runs) if run.state == "interrupted")
    status, recipe, resolved = recipe_and_settings(runs, stopped, overrides=())
    with pytest.raises(RunError, match="besides, teacher"):  # the alias points at another adapter now
        execute(recipe, resolved, resume=status)
