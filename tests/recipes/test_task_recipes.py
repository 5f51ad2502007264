"""The recipes of the classic tasks run whole on tiny random bases: plumbing, no scores."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import write_bert, write_image_base, write_photographs

from peftkit import locations
from peftkit.cli.main import main
from peftkit.errors import BaseError, PeftkitError, TrainingError
from peftkit.events import Event, Progress
from peftkit.recipe import Interrupted, Result, configure, execute, find, load
from peftkit.recipe.resume import recipe_and_settings
from peftkit.registry.store import Registry, Version
from peftkit.runs import list_runs, read_metrics

pytestmark = pytest.mark.usefixtures("places")

SECRET = "zanzibar"  # stands in every row: where it turns up, a user's row has been kept
COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    images = {kind: write_image_base(folder / kind, kind) for kind in ("resnet", "vit", "efficientnet")}
    return {"bert": write_bert(folder / "bert"), "llama": tiny_base, **images}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(folder: Path, task: str, count: int = 16, seed: int = 0) -> Path:
    """A user's own file for a task."""
    draw, path = random.Random(seed), folder / f"{task}-{seed}.jsonl"
    if task == "image_classification":
        return write_photographs(folder / f"photographs-{seed}", each=count // 2, seed=seed)
    if task == "text_classification":
        rows = [
            {"text": f"{SECRET} {COLOURS[i % 3]} {draw.randrange(99)}", "label": COLOURS[i % 3]} for i in range(count)
        ]
    elif task == "regression":
        rows = [{"text": f"{SECRET} {i}", "label": i / 10 + draw.random()} for i in range(count)]
    elif task == "token_classification":
        words = [[SECRET, "met", f"Ann{i}", "Lee", str(draw.randrange(9))] for i in range(count)]
        rows = [{"tokens": each, "tags": ["O", "O", "B-PER", "I-PER", "O"]} for each in words]
    else:
        rows = []
        for i in range(count):
            context, answer = f"{SECRET} box {i} holds {draw.randrange(10, 99)} coins", "coins"
            answers = {"text": [answer], "answer_start": [context.index(answer)]}
            rows.append(
                {
                    "question": f"what is in {i}?",
                    "context": context,
                    "answers": answers if i % 4 else {"text": [], "answer_start": []},
                }
            )
    path.write_text(lines(rows))
    return path


Go = Callable[..., Result]
Capture = pytest.CaptureFixture[str]
SMALL = [
    "data.held_out_share=0.25", "train.max_steps=2", "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=2", "evaluate.resamples=100",
]  # fmt: skip


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Run a recipe in this process."""

    def go(recipe: str, base: Path, *more: str, data: Path | None = None, **options: Any) -> Result:
        loaded = load(find(recipe))
        rows = data or write_rows(tmp_path, recipe)
        method = (
            [] if any(each.startswith("adapter.method") for each in more) else ["adapter.method=lora", "adapter.r=4"]
        )
        settings = [f"base={base}", f"data.train={rows}", *SMALL, *method, *more]
        return execute(loaded, configure(loaded, overrides=settings), **options)

    return go


def version_of(result: Result) -> Version:
    assert result.saved_as is not None
    return Registry(locations.registry_root().path).resolve(result.saved_as)


CASES = [
    ("text_classification", "bert", 4), ("text_classification", "llama", 4), ("regression", "bert", 32),
    ("regression", "llama", 4), ("token_classification", "bert", 32), ("token_classification", "llama", 4),
    ("extractive_qa", "bert", 32), ("extractive_qa", "llama", 4), ("image_classification", "vit", 32),
    ("image_classification", "resnet", 32), ("image_classification", "efficientnet", 32),
]  # fmt: skip
QUICK = [CASES[index] for index in (0, 5, 7, 9)]


@pytest.mark.parametrize(
    ("name", "base", "bits"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.full) for case in CASES]
)
def test_a_recipe_runs_whole(
    go: Go, bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, base: str, bits: int
) -> None:
    """Run, registry, verify, predict, eval."""
    convolutions = ["adapter.target_modules=[convolution]"] if base in ("resnet", "efficientnet") else []
    result = go(name, bases[base], f"quant.bits={bits}", "save_as=task", *convolutions)
    version = version_of(result)
    manifest = version.manifest
    text = manifest.model_dump_json()
    metrics: dict[str, Any] = json.loads(text)["metrics"]
    assert result.figures["objective"]["name"] in metrics["after"]
    assert result.figures["objective"]["direction"] in ("max", "min")
    assert metrics["after"]
    assert metrics["other"]["training"]["steps"] == 2
    assert SECRET not in text
    assert manifest.adapter["head"]["kind"] in ("sequence", "token", "span", "image")
    assert main(["verify"]) == 0
    capfd.readouterr()
    assert main(["list"]) == 0
    assert result.figures["objective"]["name"] in capfd.readouterr().out
    rows, out = write_rows(tmp_path, name, 6, seed=1), tmp_path / "out.jsonl"
    asked = rows
    if name == "image_classification":  # what is to be predicted lies in one folder
        asked = tmp_path / "pictures"
        asked.mkdir()
        for at, file in enumerate(sorted(rows.rglob("*.png"))):
            (asked / f"{at}.png").write_bytes(file.read_bytes())
    assert main(["predict", "task", str(asked), "--out", str(out)]) == 0, capfd.readouterr()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 6
    assert all("value" in record["predictions"]["task"] for record in records)
    capfd.readouterr()
    assert main(["eval", "task", "--data", str(rows), "--json", "--set", "resamples=100"]) == 0, capfd.readouterr()
    (figures,) = json.loads(capfd.readouterr().out).values()
    assert ("baselines" in figures["other"]) == (name == "extractive_qa")  # the others learn from training rows


def test_images_that_are_prepared_in_another_way_are_refused(
    go: Go, bases: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "resnet"
    shutil.copytree(bases["resnet"], base)
    convolutions = "adapter.target_modules=[convolution]"
    kept = version_of(go("image_classification", base, "quant.bits=32", "save_as=signs", convolutions))
    assert kept.manifest.adapter["pixels"]
    file = base / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    rows = write_rows(tmp_path, "image_classification", 6, seed=1)
    assert main(["eval", "signs", "--data", str(rows), "--set", "resamples=100"]) == 1
    assert "was trained on images prepared as" in capfd.readouterr().err


def stopping(step: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and "loss" in event.figures and event.done == step:
            raise KeyboardInterrupt

    return stop


def losses() -> list[float]:
    newest = list_runs(locations.runs_root().path)[0]
    return [figures["loss"] for _, figures in read_metrics(newest.path) if "loss" in figures]


def tensors(version: Version) -> dict[str, torch.Tensor]:
    (file,) = version.path.glob("*.safetensors")
    return dict(load_file(file))


@pytest.mark.parametrize(
    ("name", "base", "more"),
    [
        ("text_classification", "bert", ("adapter.lora_dropout=0.2",)),
        pytest.param(
            "text_classification", "bert", ("adapter.method=top_layers", "adapter.top_layers=1"), marks=pytest.mark.full
        ),
        pytest.param("token_classification", "llama", (), marks=pytest.mark.full),
        pytest.param("image_classification", "resnet", ("adapter.method=full",), marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(
    go: Go, bases: dict[str, Path], name: str, base: str, more: tuple[str, ...]
) -> None:
    steps = ["train.max_steps=5", "train.save_steps=1", "quant.bits=32", "save_as=task", *more]
    whole = tensors(version_of(go(name, bases[base], *steps)))
    expected = losses()
    with pytest.raises(Interrupted):
        go(name, bases[base], *steps, report=stopping(3))
    runs = locations.runs_root().path
    status, loaded, resolved = recipe_and_settings(runs, list_runs(runs)[0].id, overrides=())
    resumed = tensors(version_of(execute(loaded, resolved, resume=status)))
    assert losses() == expected
    assert len(expected) == 5
    assert resumed.keys() == whole.keys()
    assert [key for key, value in resumed.items() if not torch.equal(value, whole[key])] == []


def test_going_on_keeps_the_labels(go: Go, bases: dict[str, Path], tmp_path: Path) -> None:
    first = version_of(go("text_classification", bases["bert"], "save_as=task"))
    labels = list(COLOURS)
    assert first.manifest.adapter["head"] == {"kind": "sequence", "labels": labels, "problem": "single_label"}
    two = tmp_path / "two.jsonl"  # no row is green: the head still has it
    two.write_text(lines([{"text": f"{i} things", "label": ("red", "blue")[i % 2]} for i in range(12)]))
    second = version_of(go("text_classification", bases["bert"], "init_from=task", "save_as=on", data=two))
    assert second.manifest.adapter["head"]["labels"] == labels
    assert second.manifest.parents[0].version == first.id
    other = tmp_path / "other.jsonl"
    other.write_text(lines([{"text": f"{i} things", "label": ("red", "mauve")[i % 2]} for i in range(12)]))
    with pytest.raises(PeftkitError, match="mauve"):
        go("text_classification", bases["bert"], "init_from=task", data=other)


def test_a_run_keeps_its_plan_and_its_probe(go: Go, bases: dict[str, Path]) -> None:
    go("token_classification", bases["llama"], budget="3GB")
    (run,) = list_runs(locations.runs_root().path)
    kept = json.loads((run.path / "plan.json").read_text())
    assert kept["lengths"]["task"] == {"kind": "token", "outputs": 3}
    rows = {row["what"]: row for row in json.loads((run.path / "probe.json").read_text())["rows"]}
    assert rows["weights"]["predicted"] == pytest.approx(rows["weights"]["measured"], rel=0.05)


def test_a_plan_counts_the_rows_of_a_file(bases: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    rows = write_rows(tmp_path, "extractive_qa")
    asked = ["extractive_qa", f"base={bases['llama']}", f"data.train={rows}", "--budget", "8GB", "--json"]
    assert main(["plan", *asked]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["lengths"]["task"]["outputs"] == 2
    assert found["lengths"]["rows"] == 14


def test_a_plan_has_the_labels_of_the_parent(go: Go, bases: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    go("text_classification", bases["llama"], "save_as=task")
    one = tmp_path / "one.jsonl"  # a run that goes on takes rows of one label, and has the parent's three
    one.write_text(lines([{"text": f"{i} things", "label": "red"} for i in range(12)]))
    asked = ["plan", "text_classification", f"base={bases['llama']}", "init_from=task", "--json"]
    capsys.readouterr()
    assert main([*asked, f"data.train={one}"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"]["task"]["outputs"] == 3
    one.write_text(lines([{"text": f"{i} things", "label": ("red", "mauve")[i % 2]} for i in range(12)]))
    assert main([*asked, f"data.train={one}"]) == 1
    assert "mauve" in capsys.readouterr().err


def test_an_encoder_is_not_planned_and_a_dry_run_leaves_nothing(go: Go, bases: dict[str, Path]) -> None:
    with pytest.raises(BaseError, match="'bert' cannot be planned"):
        go("text_classification", bases["bert"], budget="1GB")
    assert main(["plan", "text_classification", f"base={bases['bert']}"]) == 1
    before = len(list_runs(locations.runs_root().path))
    assert go("text_classification", bases["bert"], dry_run=True).saved_as is None
    assert len(list_runs(locations.runs_root().path)) == before
    assert not list(Registry(locations.registry_root().path).names())


def test_a_base_without_such_a_head_is_refused_before_its_tokenizer(go: Go, bases: dict[str, Path]) -> None:
    with pytest.raises(PeftkitError, match="no image head for the model type 'bert'"):
        go("image_classification", bases["bert"])
    with pytest.raises(PeftkitError, match="no sequence head for the model type 'vit'"):
        go("text_classification", bases["vit"])


WAYS = {
    "early": ("train.eval_steps=1", "train.early_stopping_patience=1", "train.max_steps=6"),
    "layerwise": ("train.layerwise.decay=0.5",),
    "deep_first": ("train.unfreeze.direction=deep_first", "train.unfreeze.every_steps=1", "train.max_steps=4"),
    "shallow_first": ("train.unfreeze.direction=shallow_first", "train.unfreeze.every_steps=1", "train.max_steps=4"),
    "freezeout": ("train.freezeout.t_0=0.5", "train.max_steps=4"),
    "slanted": ("train.lr_scheduler_type=slanted_triangular",),
    "neftune": ("train.regularize.neftune_alpha=5",),
    "fgm": ("train.regularize.adversarial=fgm", "train.regularize.adversarial_epsilon=0.5"),
    "mixout": ("train.regularize.mixout=0.5",),
    "l2_sp": ("train.regularize.l2_sp=0.1", "train.regularize.label_smoothing=0.1"),
    "r_drop": ("train.regularize.r_drop=1", "adapter.lora_dropout=0.2"),
    "checkpointing": ("train.gradient_checkpointing=true",),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in ("deep_first", "fgm") else pytest.mark.full) for way in WAYS]
)
def test_ways_of_training_an_encoder(go: Go, bases: dict[str, Path], way: str) -> None:
    result = go(
        "text_classification", bases["bert"], "quant.bits=32", "save_as=task", "evaluate.baselines=false", *WAYS[way]
    )
    found = losses()
    assert version_of(result).manifest.metrics.model_dump()["other"]["training"]["steps"] == len(found)
    assert all(0 < loss < 20 for loss in found)


def test_a_head_on_a_cached_trunk(go: Go, bases: dict[str, Path], tmp_path: Path) -> None:
    """Train, publish, predict: the trunk that was released while it trained is there again."""
    settings = ["adapter.method=top_layers", "adapter.top_layers=1", "train.trunk_cache=true", "quant.bits=32"]
    with pytest.raises(TrainingError, match="draw random numbers while training"):
        go("text_classification", bases["bert"], *settings)
    go("text_classification", bases["bert"], *settings, "train.regularize.dropout=0", "save_as=task")
    rows = write_rows(tmp_path, "text_classification")
    assert main(["predict", "task", str(rows), "--base", str(bases["bert"]), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 16


@pytest.mark.full
@pytest.mark.base
def test_a_real_encoder_learns_what_sentences_say(
    go: Go, cache: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """all-MiniLM-L6-v2 on sst2: better than the most frequent label, with its interval."""
    from peftkit.backbone.locate import locate
    from peftkit.base import embedded as shipped
    from peftkit.base.ref import BaseSpec

    if not shipped.place_of("minilm", cache).exists():
        pytest.skip("embedded:minilm is not in the cache: peftkit base fetch embedded:minilm")
    folder = locate(BaseSpec(source="embedded:minilm"), cache).folder
    rows, held = (test_data / "sst2" / name for name in ("train.tsv", "dev.tsv"))
    result = go(
        "text_classification",
        folder, "quant.bits=32", f"data.held_out={held}", "data.columns=[text,label]", "data.max_train_rows=400",
        "data.max_held_out_rows=200", "train.max_steps=50", "train.per_device_train_batch_size=16",
        "train.gradient_accumulation_steps=1", "train.learning_rate=1e-3", "adapter.r=8", data=rows,
    )  # fmt: skip
    after: dict[str, Any] = json.loads(version_of(result).manifest.model_dump_json())["metrics"]["after"]
    assert after["accuracy"]["low"] > 0.6
