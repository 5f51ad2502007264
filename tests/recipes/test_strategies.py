"""Partial fine-tuning, layer-wise rates, gradual unfreezing, plain text: whole runs, their adapters, and resuming."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_bases import write_base

from peftkit import locations
from peftkit.errors import ConfigError, TuningError
from peftkit.events import Event, Note, Progress, Report, Table
from peftkit.recipe import Interrupted, configure, execute, find, load
from peftkit.recipe.resume import recipe_and_settings
from peftkit.registry.store import Registry, Version
from peftkit.runs import list_runs, read_metrics

pytestmark = pytest.mark.usefixtures("places")

LAYERS = 4


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of four layers."""
    return write_base(tmp_path_factory.mktemp("deep") / "base", num_hidden_layers=LAYERS)


@pytest.fixture
def settings(deep_base: Path, short_rows: Path) -> list[str]:
    """Six steps on twelve rows: three epochs of two steps of six rows."""
    return [
        f"base={deep_base}", f"data.train={short_rows}", "data.held_out_share=0.25", "train.num_train_epochs=3",
        "train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2", "train.learning_rate=1e-3",
        "evaluate.max_generated_rows=0", "evaluate.retention_passages=1", "save_as=tuned",
    ]  # fmt: skip


Go = Callable[..., Version]


@pytest.fixture
def go(settings: list[str]) -> Go:
    """Run a recipe in this process; the version that it published."""

    def go(recipe: str, *more: str, report: Report = lambda event: None) -> Version:
        loaded = load(find(recipe))
        result = execute(loaded, configure(loaded, overrides=[*settings, *more]), report=report)
        assert result.saved_as is not None
        return registry().resolve(result.saved_as)

    return go


def registry() -> Registry:
    return Registry(locations.registry_root().path)


def tensors(version: Version) -> dict[str, torch.Tensor]:
    (file,) = version.path.glob("*.safetensors")
    return dict(load_file(file))


def losses() -> list[float]:
    return [figures["loss"] for _, figures in read_metrics(list_runs(locations.runs_root().path)[0].path)
            if "loss" in figures]  # fmt: skip


def test_top_layers_are_registered_as_tensors(go: Go) -> None:
    version = go("top_layers_sft", "adapter.top_layers=2")
    assert version.manifest.kind == "tensors"
    assert set(version.manifest.files) == {"tensors.safetensors"}
    assert version.manifest.adapter["method"] == "top_layers"
    assert {name.split(".")[2] for name in tensors(version)} == {"2", "3"}
    assert len(tensors(version)) == 2 * 9
    assert version.manifest.adapter["trainable_parameters"] == sum(t.numel() for t in tensors(version).values())
    assert (
        version.manifest.metrics.after["answer_nll"]["point"] != version.manifest.metrics.before["answer_nll"]["point"]
    )


def test_the_trunk_cache_changes_nothing_but_time(go: Go) -> None:
    said: list[Event] = []
    cached, plain = (
        go("top_layers_sft", "adapter.top_layers=2", f"train.trunk_cache={on}", report=said.append)
        for on in ("true", "false")
    )
    # The probe runs the whole model in both: its figures are those of the uncached run, and are called so.
    tried = [event for event in said if isinstance(event, Table) and event.title.startswith("the longest rows")]
    assert [tuple(cell.replace(" without the trunk cache", "") for cell in column) for column in told(tried[0])] == [
        *told(tried[1])
    ]
    assert "memory of a step without the trunk cache" in told(tried[0])[0]
    times = [event.text for event in said if isinstance(event, Note) and event.text.startswith("the run will take")]
    assert re.match(
        r"the run will take at most .*: training at most .* without the trunk cache, measuring at", times[0]
    )
    assert times[1].startswith("the run will take about ")
    first, second = tensors(cached), tensors(plain)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


def told(table: Table) -> list[tuple[str, ...]]:
    """Names and predictions of a probe's table."""
    return [tuple(row[at] for row in table.rows) for at in (0, 1)]


def test_gradual_unfreezing_trains_every_group(go: Go, deep_base: Path) -> None:
    version = go("gradual_unfreezing_sft", "adapter.top_layers=2", "train.unfreeze.every_epochs=0.5")
    learned, base = tensors(version), load_file(deep_base / "model.safetensors")
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    assert {"lm_head.weight", "model.norm.weight"} < learned.keys()
    assert all(not torch.equal(value, base[name].float()) for name, value in learned.items())


def test_layerwise_rates_make_a_plain_lora(go: Go) -> None:
    version = go("layerwise_sft", "train.layerwise.decay=0.5")
    assert version.manifest.kind == "peft"
    moved = {
        layer: max(float(value.abs().max()) for name, value in tensors(version).items()
                   if f"layers.{layer}." in name and "lora_B" in name)
        for layer in range(LAYERS)
    }  # fmt: skip
    assert moved[0] < moved[1] < moved[2] < moved[3], "AdamW's first steps are as large as their rate"


def test_plain_text_is_learned_whole(go: Go, tmp_path: Path) -> None:
    text = tmp_path / "handbook.jsonl"
    text.write_text("".join(f'{{"text": "{chr(97 + at) * (90 + at)}"}}\n' for at in range(12)))
    version = go("continued_pretraining", f"data.train={text}", "data.max_length=64", "adapter.r=4")
    (train,) = (part for part in version.manifest.data if part.role == "train")
    assert (train.rows, train.dropped) == (9, 0)
    assert train.tokens is not None
    assert train.tokens > 9 * 90, "texts of 90 tokens and more are split at 64, and nothing is lost"


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("top_layers_sft", ["adapter.top_layers=2"]),
        (
            "gradual_unfreezing_sft",
            ["adapter.top_layers=2", "train.unfreeze.every_steps=2", "train.unfreeze.every_epochs=null"],
        ),
        ("layerwise_sft", ["adapter.lora_dropout=0.1"]),
        ("layerwise_sft", ["adapter.method=norms", "train.layerwise.decay=null", "train.freezeout.t_0=0.5"]),
    ],
    ids=["trunk cache", "unfreezing", "layer-wise", "freeze-out"],
)
def test_a_resumed_run_is_the_undisturbed_one(go: Go, recipe: str, more: list[str]) -> None:
    whole, whole_losses = tensors(go(recipe, *more)), losses()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        go(recipe, *more, report=stop)
    runs = locations.runs_root().path
    status, loaded, resolved = recipe_and_settings(runs, list_runs(runs)[0].id, overrides=())
    execute(loaded, resolved, resume=status)
    resumed = tensors(registry().resolve("tuned"))
    assert losses() == whole_losses
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert len(whole_losses) == 6


def test_a_partial_fine_tune_is_continued(go: Go) -> None:
    first = go("top_layers_sft", "adapter.top_layers=1")
    second = go("top_layers_sft", "init_from=tuned")
    assert second.manifest.parents[0].version == first.id
    assert second.manifest.adapter["top_layers"] == 1
    assert tensors(first).keys() == tensors(second).keys()
    with pytest.raises(TuningError, match=r"adapter\.top_layers=3"):
        go("top_layers_sft", "init_from=tuned", "adapter.top_layers=3")


def test_a_continued_run_is_resumed_though_its_recipe_makes_something_else(go: Go) -> None:
    go("lora_sft", "adapter.method=norms", "save_as=first")

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        go("lora_sft", "init_from=first", report=stop)
    runs = locations.runs_root().path
    status, loaded, resolved = recipe_and_settings(runs, list_runs(runs)[0].id, overrides=())
    execute(loaded, resolved, resume=status)
    assert registry().resolve("tuned").manifest.adapter["method"] == "norms"


def test_a_recipe_for_one_method_does_not_continue_another(go: Go) -> None:
    go("layerwise_sft", "save_as=first")
    with pytest.raises(TuningError, match=r"first@\w+ has method=lora.*adapter\.method=top_layers"):
        go("top_layers_sft", "init_from=first")


def settings_of(recipe: str, *more: str) -> Any:
    return configure(load(find(recipe)), overrides=list(more)).config


def test_any_method_goes_into_any_recipe() -> None:
    config = settings_of("gradual_unfreezing_sft", "adapter.method=ia3")
    assert (config.adapter.method, config.adapter.top_layers) == ("ia3", None)
    assert settings_of("qlora_sft", "adapter.method=top_layers").adapter.top_layers == 2


def test_another_direction_leaves_out_the_recipes_pace() -> None:
    recipe = "gradual_unfreezing_sft"
    assert settings_of(recipe, "train.unfreeze.direction=none").train.unfreeze.every_epochs is None
    assert settings_of(recipe, "train.unfreeze.direction=deep_first").train.unfreeze.every_epochs == 0.5
    other = settings_of(recipe, "train.unfreeze.direction=shallow_first", "train.unfreeze.every_steps=3").train.unfreeze
    assert (other.every_epochs, other.every_steps) == (None, 3)


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [("gradual_unfreezing_sft", "train.freezeout.t_0=0.5"), ("layerwise_sft", "train.layerwise.rates={0-3: 0.1}")],
)
def test_a_message_names_every_override_at_once(recipe: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(recipe, wanted)
    mend = re.findall(r"train\.[\w.]+=[a-z]\w*", str(caught.value))
    assert settings_of(recipe, wanted, *mend).train
