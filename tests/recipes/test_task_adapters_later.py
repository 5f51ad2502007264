"""What is done with a task's adapter after its run: as its own figures were taken, and never through another head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_bases import write_base

from peftkit import locations
from peftkit.cli.main import main
from peftkit.errors import DataError, TuningError
from peftkit.evaluation.tasks.registered import check_alike
from peftkit.events import Event, Phase
from peftkit.recipe import configure, execute, find, load
from peftkit.registry.store import Registry, Version

pytestmark = pytest.mark.usefixtures("places")
SMALL = ("train.max_steps=2", "train.per_device_train_batch_size=2", "evaluate.resamples=100")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    made = [{"text": f"{i} things of a kind", "label": ("red", "blue", "red;blue")[i % 3]} for i in range(18)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def trained(recipe: str, base: Path, rows: Path, name: str, *more: str) -> Version:
    loaded = load(find(recipe))
    settings = [f"base={base}", f"data.train={rows}", "adapter.r=2", f"save_as={name}", *more]
    execute(loaded, configure(loaded, overrides=settings))
    return Registry(locations.registry_root().path).resolve(name)


def values(file: Path) -> list[object]:
    return [next(iter(json.loads(line)["predictions"].values()))["value"] for line in file.read_text().splitlines()]


def test_predictions_have_the_threshold_of_the_figures(base: Path, rows: Path, tmp_path: Path) -> None:
    several = ("data.multi_label=true", "evaluate.threshold=0.000001", *SMALL)
    trained("text_classification", base, rows, "several", *several)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert main(["predict", "several", str(rows), "--out", str(first)]) == 0
    assert values(first) == [["blue", "red"]] * 18  # everything is above a threshold of almost nothing
    assert main(["predict", "several", str(rows), "--out", str(second), "--set", "threshold=0.999999"]) == 0
    assert values(second) == [[]] * 18


def test_rows_made_in_different_ways_are_not_mixed(base: Path, rows: Path) -> None:
    cut = trained("text_classification", base, rows, "cut", "data.max_length=8", "data.too_long=truncate", *SMALL)
    whole = trained("text_classification", base, rows, "whole", *SMALL)
    check_alike([cut, cut])
    with pytest.raises(DataError, match=r"data\.max_length: 8 and None"):
        check_alike([cut, whole])
    assert main(["predict", "cut", "whole", str(rows)]) == 1


def test_a_recipes_adapter_merges_from_the_command_line(base: Path, rows: Path, tmp_path: Path) -> None:
    trained("text_classification", base, rows, "labels", *SMALL)
    assert main(["merge", "labels", "--onto", "original", "--out", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_an_adapter_of_answers_is_no_beginning_for_a_head(
    base: Path, rows: Path, short_rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A head that is not among its tensors would neither be trained nor kept."""
    quiet = ("evaluate.max_generated_rows=0", "evaluate.retention=null", *SMALL[:2])
    loaded = load(find("qlora_sft"))
    for name, method in (("part", ["adapter.method=norms"]), ("factors", ["adapter.r=2"])):
        settings = [f"base={base}", f"data.train={short_rows}", f"save_as={name}", *method, *quiet]
        execute(loaded, configure(loaded, overrides=settings))
        classes = load(find("text_classification"))
        asked = [f"base={base}", f"data.train={rows}", f"init_from={name}", *SMALL]
        with pytest.raises(TuningError, match="was trained with the language head, and this run has a sequence head"):
            execute(classes, configure(classes, overrides=asked))
    trained("text_classification", base, rows, "labels", *SMALL)
    assert main(["predict", "labels", "part", str(rows)]) == 1
    assert "was trained with the language head, and this backbone has" in capfd.readouterr().err


def test_what_is_continued_is_what_the_name_meant_at_the_begin(base: Path, rows: Path) -> None:
    store = Registry(locations.registry_root().path)
    first = trained("text_classification", base, rows, "labels", *SMALL)
    store.tag(first.reference, "prod")
    loaded = load(find("text_classification"))
    asked = [f"base={base}", f"data.train={rows}", "init_from=labels@prod", "save_as=on", *SMALL]

    def removing(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "train":
            store.untag("labels", "prod")

    execute(loaded, configure(loaded, overrides=asked), report=removing)
    assert store.resolve("on").manifest.parents[0].version == first.id
