"""Plan and probe before a run, and a budget: what they say, what they change, what they never change."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from peftkit import locations
from peftkit.errors import BackboneError, ConfigError, OutOfMemory, RunError, TrainingError, TuningError
from peftkit.events import Decision, Event, Note, Warned
from peftkit.planning.architecture import architecture
from peftkit.recipe import Result, configure, execute, find, load
from peftkit.recipe import ahead as ahead_module
from peftkit.recipe.forecast import workload
from peftkit.recipe.groups import groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.outlook import outlook
from peftkit.recipe.setting import changes, setting_of
from peftkit.recipe.target import Target, card, this_machine
from peftkit.recipe.to_train import foreign_rate
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry
from peftkit.runs import list_runs, read_metrics
from peftkit.training import step as module_step

pytestmark = pytest.mark.usefixtures("places")

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def config_8b(tmp_path: Path) -> Path:
    """A folder with the config of an 8B base and nothing else."""
    folder = tmp_path / "8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.fixture
def settings(tiny_base: Path, short_rows: Path) -> list[str]:
    return [
        f"base={tiny_base}", f"data.train={short_rows}", "data.held_out_share=0.25", "adapter.r=4", "train.max_steps=2",
        "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2", "evaluate.max_generated_rows=2",
        "evaluate.max_new_tokens=3", "evaluate.retention_passages=1", "save_as=tickets",
    ]  # fmt: skip


def go(settings: list[str], report: Callable[[Event], None] = lambda event: None, **options: Any) -> Result:
    recipe = load(find("qlora_sft"))
    return execute(recipe, configure(recipe, overrides=settings), report=report, **options)


def plan(base: Path, target: Target, *overrides: str, recipe: str = "qlora_sft", **options: Any) -> Any:
    resolved = configure(load(find(recipe)), overrides=[f"base={base}", *overrides])
    return outlook(resolved, locations.cache_root().path, registry(), target, **options)


def registry() -> Registry:
    return Registry(locations.registry_root().path)


def quant() -> Any:
    return groups(configure(load(find("qlora_sft"))).config).quant


# -- a plan from the config alone


def test_a_plan_reads_nothing_but_the_config(config_8b: Path) -> None:
    found, _ = plan(config_8b, card(quant(), "RTX 3060 12GB", None), "data.max_length=2048")
    assert found.setting.longest == 2048
    assert found.setting.compute_dtype == "bfloat16"
    assert found.memory.part("linear layers").bytes.expected == 6_979_321_856 // 2  # 4 bits of the 8B's linear layers
    with pytest.raises(OutOfMemory, match="the RTX 3060 12GB has") as caught:
        found.check_memory(lambda event: None)
    assert "--budget" in str(caught.value)
    assert {part["where"] for part in found.as_record()["disk"]} == {"runs", "registry", "out"}


def test_what_cannot_be_loaded_is_not_planned(config_8b: Path) -> None:
    config = {**LLAMA_8B, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (config_8b / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="already quantized with gptq"):
        plan(config_8b, card(quant(), None, "12GB"))


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["adapter.method=loha"], "loha does not go with quant.bits=4"),
        (["adapter.method=full"], "full does not go with quant.bits=4"),
        (["adapter.method=loftq", "quant.bits=16"], "loftq does not go with quant.bits=16"),
        (["adapter.method=prefix_tuning", "train.gradient_checkpointing=true"], "its prefixes lie in the cache"),
        (["adapter.method=pissa", "train.weight_decay=0.1"], "pulls away from the base"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_what_a_run_refuses_is_not_planned(config_8b: Path, settings: list[str], why: str, fit: bool) -> None:
    with pytest.raises((TuningError, TrainingError), match=re.escape(why)):
        plan(config_8b, card(quant(), None, "200GB"), *settings, fit=fit)


def of_a_parent(folder: Path, adapter: dict[str, Any]) -> str:
    """A version that was trained so; a plan reads its manifest alone."""
    (folder / "payload").mkdir()
    (folder / "payload" / "tensors.safetensors").write_bytes(save({"model.norm.weight": torch.ones(4096)}))
    fields = {"base": {"source": "8b", "fingerprint": "0" * 64}, "adapter": adapter, "kind": "tensors"}
    return registry().publish("parent", folder / "payload", Draft.model_validate(fields)).reference


def test_a_plan_is_that_of_the_parent_that_is_continued(config_8b: Path, tmp_path: Path) -> None:
    asked = [f"init_from={of_a_parent(tmp_path, {'method': 'full'})}", "quant.bits=16", "data.max_length=512"]
    found, _ = plan(config_8b, card(quant(), None, "200GB"), *asked)
    assert found.setting.method == "full"
    assert found.memory.part("trained copies").bytes.expected == 4 * architecture(LLAMA_8B).parameters
    with pytest.raises(TuningError, match="has method=full, but the settings ask for"):
        plan(config_8b, card(quant(), None, "200GB"), *asked, "adapter.method=lora")


def test_a_budget_lowers_no_bits_that_the_parent_is_not_trained_over(config_8b: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"  # bits as the recipe's own default: what the command line sets stays
    recipe.write_text(find("qlora_sft").read_text().replace("bits=4", "bits=16"))
    overrides = [f"base={config_8b}", "data.max_length=512", f"init_from={of_a_parent(tmp_path, {'method': 'full'})}"]
    resolved = configure(load(recipe), overrides=overrides)
    places = tmp_path / "cache", registry(), card(quant(), None, "12GB")
    with pytest.raises(TrainingError, match="the smallest peak is"):
        outlook(resolved, *places, fit=True)


@pytest.mark.parametrize("recipe", ["qlora_sft", "text_classification", "dpo"])
def test_planning_starts_light(config_8b: Path, recipe: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'safetensors'}"
    settings = f"base={config_8b}", "data.max_length=512"
    script = (
        "import sys; from pathlib import Path\n"
        "from peftkit.recipe import configure, find, load\nfrom peftkit.recipe.outlook import outlook\n"
        "from peftkit.recipe.groups import groups\nfrom peftkit.recipe.target import card\n"
        "from peftkit.registry.store import Registry\n"
        f"resolved = configure(load(find({recipe!r})), overrides={settings!r})\n"
        "target = card(groups(resolved.config).quant, None, '12GB')\n"
        "outlook(resolved, Path('cache'), Registry(Path('registry')), target)\n"
        f"sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tasks_head_stands_in_place_of_the_language_head(config_8b: Path) -> None:
    target, settings = (
        card(quant(), "RTX 3060 12GB", None),
        ["data.max_length=512", "train.per_device_train_batch_size=1"],
    )
    answers, _ = plan(config_8b, target, *settings)
    labels, _ = plan(config_8b, target, *settings, recipe="text_classification")
    assert answers.memory.part("head").bytes.expected == 2 * 128256 * 4096
    assert labels.memory.part("head").bytes.expected == 2 * 2 * 4096
    assert labels.setting.max_new_tokens == 0
    assert labels.memory.part("logits").bytes.expected < answers.memory.part("logits").bytes.expected
    written, _ = plan(config_8b, target, *settings, recipe="translation")  # texts are written by the language head
    assert written.memory.part("head").bytes.expected == 2 * 128256 * 4096
    assert written.setting.max_new_tokens == 128
    asked, _ = plan(config_8b, target, *settings, "evaluate.shots=4", recipe="text_classification")
    assert asked.memory.part("asked base").bytes.expected > answers.memory.part("linear layers").bytes.expected
    assert (asked.setting.asked_rows, asked.setting.asked_tokens) == (16, 5 * 512 + 128)
    assert "loads the base once more" in " ".join(asked.assumed)


@pytest.mark.parametrize("recipe", ["dpo", "orpo", "kto"])
def test_a_pair_is_a_row_of_two_answers(config_8b: Path, recipe: str) -> None:
    found, _ = plan(config_8b, card(quant(), "RTX 3060 12GB", None), "data.max_length=512", recipe=recipe)
    assert found.setting.compares_answers
    assert found.setting.longest == (512 if recipe == "kto" else 1024)
    assert found.setting.evaluation_longest == 512
    assert found.setting.max_new_tokens == 0


@pytest.mark.parametrize("recipe", ["token_classification", "dpo"])
def test_a_budget_fits_tasks_and_preferences_and_cuts_no_row_of_theirs(config_8b: Path, recipe: str) -> None:
    target = card(quant(), None, "12GB")
    batch = ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2", "data.max_length=2048"]
    found, changed = plan(config_8b, target, *batch, recipe=recipe, fit=True)
    assert max(stage.bytes.high for stage in found.memory.stages) <= 12e9
    assert changed.config.train.rows_per_step == 16
    with pytest.raises(TrainingError, match="the smallest peak is") as caught:
        plan(config_8b, card(quant(), None, "6GB"), *batch, recipe=recipe, fit=True)
    assert "cut rows" not in str(caught.value)
    with pytest.raises(ConfigError, match="--allow-shorter cuts conversations"):
        plan(config_8b, target, *batch, recipe=recipe, fit=True, shorter=True)


@pytest.mark.parametrize(
    ("recipe", "setting", "why"),
    [("image_classification", "train.trunk_cache=true", "images have none"),
     ("dpo", "data.kind=labelled", "learns from pairs rows"), ("kto", "data.kind=pairs", "learns from labelled rows")],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on_so_are_not_planned(
    config_8b: Path, recipe: str, setting: str, why: str
) -> None:
    with pytest.raises((TrainingError, ConfigError), match=why):
        plan(config_8b, card(quant(), None, "200GB"), setting, recipe=recipe)


def test_mid_run_measures_losses_and_writes_no_answers(config_8b: Path) -> None:
    """Of 1,000 translations: all by the adapter, and by the base as many as are prompted."""
    lengths = Lengths(512, 512, 512, 400.0, 2000, 1000, 400.0)
    for recipe, answers in (("translation", 1048), ("qlora_sft", 2 * 48), ("dpo", 0)):
        resolved = configure(load(find(recipe)), overrides=[f"base={config_8b}", "train.eval_steps=5"])
        work = workload(groups(resolved.config), lengths, 20)
        assert (work.passes, work.answers) == (2 + 4, answers)
    work = workload(groups(configure(load(find("kto")), overrides=[f"base={config_8b}"]).config), lengths, 20)
    assert work.tokens_before == 2 * 3000 * 400
    assert work.read_besides == 400


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [("image_classification", ["adapter.method=lora"], "0.01 is this recipe's rate for top_layers"),
     ("text_classification", ["adapter.method=full", "quant.bits=16"], "0.0005 is this recipe's rate for lora"),
     ("text_classification", ["adapter.method=lora"], None), ("qlora_sft", ["adapter.method=dora"], None),
     ("text_classification", ["adapter.method=full", "quant.bits=16", "train.learning_rate=5e-4"], None),
     ("text_classification", ["adapter.method=full", "quant.bits=16", "train.learning_rate=null"], None)],
)  # fmt: skip
def test_a_recipes_rate_with_another_method_is_told(recipe: str, settings: list[str], said: str | None) -> None:
    warning = foreign_rate(configure(load(find(recipe)), overrides=settings))
    assert (warning is None) if said is None else (warning is not None and said in warning.text)


def test_a_plan_says_that_the_teacher_is_not_in_it(config_8b: Path) -> None:
    events: list[Event] = []
    plan(config_8b, card(quant(), None, "200GB"), recipe="distillation", report=events.append)
    assert any("does not count the teacher" in event.text for event in events if isinstance(event, Warned))


def test_a_card_is_never_larger_than_it_is(config_8b: Path) -> None:
    found, _ = plan(config_8b, card(quant(), "RTX 3060 12GB", "24GB"), "data.max_length=512")
    assert found.target.bytes is not None
    assert found.target.bytes < 12 * 2**30


def test_an_old_card_has_no_bfloat16(config_8b: Path) -> None:
    found, _ = plan(config_8b, card(quant(), "T4", None))
    assert found.setting.compute_dtype == "float32"


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_changes_and_settings_agree(config_8b: Path, tmp_path: Path, bits: int) -> None:
    """What a fit wrote into the settings is the setting that it planned, the optimizer that `auto` means included."""
    recipe = tmp_path / "mine.py"  # bits as the recipe's own default: what the command line sets stays
    recipe.write_text(find("qlora_sft").read_text().replace("bits=4", f"bits={bits}"))
    for budget in ("11GB", "14GB", "20GB", "40GB", "200GB"):
        target = card(quant(), None, budget)
        resolved = configure(load(recipe), overrides=[f"base={config_8b}", "data.max_length=1024"])
        found, changed = outlook(resolved, tmp_path / "cache", registry(), target, fit=True)
        again = setting_of(architecture(LLAMA_8B), groups(changed.config), found.lengths, target)
        assert again == found.setting
        assert changes(groups(changed.config), found.setting, again) == {}


@pytest.mark.parametrize(("name", "budget", "named"), [
    ("RTX 3060", None, "RTX 3060 8GB, RTX 3060 12GB"), ("RTX 9999", None, "not a card known here"),
    (None, "12", "12GB"), (None, "-3GB", "is not a size"),
])  # fmt: skip
def test_a_wrong_target_is_named(name: str | None, budget: str | None, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        card(quant(), name, budget)


def test_a_budget_keeps_the_effective_batch_and_what_was_asked_for(config_8b: Path) -> None:
    said: list[Event] = []
    target = card(quant(), None, "12GB")
    batch = ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=2", "data.max_length=2048"]
    found, changed = plan(config_8b, target, *batch, fit=True, report=said.append)
    train = changed.config.train
    assert train.rows_per_step == 16
    assert (train.per_device_train_batch_size, train.gradient_checkpointing) == (4, True)
    assert max(stage.bytes.high for stage in found.memory.stages) <= 12e9
    assert changed.sources["train.gradient_checkpointing"].startswith("budget of")
    assert any("keeps the effective batch 16" in event.reason for event in said if isinstance(event, Decision))
    assert any("the next concession would be" in event.text for event in said if isinstance(event, Note))
    with pytest.raises(TrainingError, match="the smallest peak is") as caught:
        plan(config_8b, card(quant(), None, "9.2GB"), *batch, "train.gradient_checkpointing=false", fit=True)
    assert "let gradient_checkpointing False → True" in str(caught.value)


def test_rows_are_cut_only_with_consent(config_8b: Path) -> None:
    target = card(quant(), None, "12GB")
    with pytest.raises(TrainingError, match="cut rows at"):
        plan(config_8b, target, "data.max_length=8192", fit=True)
    found, changed = plan(config_8b, target, "data.max_length=8192", fit=True, shorter=True)
    assert changed.config.data.max_length == found.setting.longest < 8192
    assert changed.config.data.too_long == "truncate"


# -- before a run


def test_a_run_keeps_its_plan_and_its_probe(settings: list[str]) -> None:
    go(settings)
    (run,) = list_runs(locations.runs_root().path)
    kept = json.loads((run.path / "plan.json").read_text())
    probed = json.loads((run.path / "probe.json").read_text())
    assert kept["steps"] == 2
    assert kept["limit"] in {stage["name"] for stage in kept["stages"]}
    rows = {row["what"]: row for row in probed["rows"]}
    assert rows["weights"]["predicted"] == pytest.approx(rows["weights"]["measured"], rel=0.05)
    assert all(row["measured"] > 0 for row in probed["rows"])
    assert set(probed["seconds"]) == {"training", "measuring"}


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_probe_leaves_no_trace(settings: list[str], monkeypatch: pytest.MonkeyPatch, checkpointing: str) -> None:
    """With dropout: adapter and random states after a probe are those without one, bit by bit."""
    settings = [*settings, "adapter.lora_dropout=0.2", f"train.gradient_checkpointing={checkpointing}"]

    def trained() -> dict[str, torch.Tensor]:
        version = Registry(locations.registry_root().path).resolve(str(go(settings).saved_as))
        return load_file(version.path / "adapter_model.safetensors")

    first = trained()
    monkeypatch.setattr(ahead_module.Ahead, "probe", lambda self, tuned, plan, paths: None)
    second = trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_probe_runs_as_training_will(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing, in every pass over training rows."""
    seen = []
    true = module_step.Step.gradients

    def watched(self: Any, size: int) -> float:
        seen.append(self.model.get_base_model().is_gradient_checkpointing)
        return true(self, size)

    monkeypatch.setattr(module_step.Step, "gradients", watched)
    go([*settings, "train.gradient_checkpointing=true"])
    assert seen == [True] * 3, "the probe, and two steps"


def test_a_plan_that_cannot_fit_stops_before_the_weights_are_loaded(settings: list[str]) -> None:
    said: list[Event] = []
    with pytest.raises(TrainingError, match="the smallest peak is"):
        go(settings, said.append, budget="1MB")
    assert not any(isinstance(event, Decision) and event.what == "weights" for event in said)


def test_a_budget_is_kept_in_the_runs_settings(settings: list[str], tmp_path: Path) -> None:
    """Rows at once change, the effective batch and the loss do not."""
    rows = [{"prompt": f"count {i}", "completion": " ".join(str(i * n) for n in range(60))} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [*settings, f"data.train={tmp_path / 'rows.jsonl'}", "evaluate.batch_size=1"]  # a step needs most

    def peak(micro_batch: int) -> int:
        batch = [
            f"train.per_device_train_batch_size={micro_batch}",
            f"train.gradient_accumulation_steps={8 // micro_batch}",
        ]
        resolved = configure(load(find("qlora_sft")), overrides=[*settings, *batch])
        found, _ = outlook(resolved, tmp_path / "cache", registry(), this_machine(quant()))
        return max(stage.bytes.high for stage in found.memory.stages)

    assert peak(1) < peak(8)
    go([*settings, "save_as=free"])
    go(settings, budget=f"{(peak(1) + peak(8)) // 2}B")
    fitted, free = list_runs(locations.runs_root().path)
    kept = configure(load(find("qlora_sft")), files=[fitted.path / "config.yaml"]).config.train
    assert (kept.rows_per_step, kept.per_device_train_batch_size < 8) == (8, True)
    losses = [[figures["loss"] for _, figures in read_metrics(run.path) if "loss" in figures] for run in (fitted, free)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_full_disk_stops_a_run_before_its_first_step(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.recipe import forecast as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunError, match=r"the disk has 1\.0 kB free and the run needs") as caught:
        go(settings)
    assert "peftkit runs gc" in str(caught.value)


def test_a_base_that_no_plan_knows_is_trained_without_one(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "shape_of", lambda located: None)
    said: list[Event] = []
    assert go(settings, said.append).saved_as is not None
    assert any("no plan of memory and time" in event.text for event in said if isinstance(event, Warned))
