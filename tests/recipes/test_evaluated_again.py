"""Translations, summaries and preferences measured again by `peftkit eval`, as the runs measured them (tiny bases)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes.figures_lab import flat, preferences, same_figures, written
from tiny_bases import write_base
from tiny_encoders import write_t5

from peftkit import locations
from peftkit.cli.main import main
from peftkit.data.preference.rows import PreferenceSet, load_preferences
from peftkit.data.tasks.read import TaskDataset, read_rows
from peftkit.errors import DataError
from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
from peftkit.evaluation.registered.preferences import evaluate_preferences
from peftkit.evaluation.registered.reading import read_as_trained
from peftkit.evaluation.registered.recorded import preference_settings, task_settings
from peftkit.evaluation.registered.texts import evaluate_texts
from peftkit.evaluation.tasks.registered import evaluate_tasks, task_of
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Event, Note, Phase
from peftkit.recipe import configure, execute, find, load
from peftkit.registry.store import Registry, Version
from peftkit.tuning.attach import open_adapters

Eval = Callable[..., tuple[int, Any, str]]
STEPS = ["quant.bits=32", "adapter.r=4", "train.max_steps=1", "train.per_device_train_batch_size=4"]
TEXTS = [
    "evaluate.max_new_tokens=6",
    "evaluate.max_prompted_rows=2",
    "evaluate.resamples=100",
    "train.learning_rate=0.1",
]
PAIRS = ("data.train={shelf}/train.jsonl", "data.held_out={shelf}/held.jsonl", "train.learning_rate=0.01")
LINES = ("data.train={shelf}/train.en+{shelf}/train.de", "data.held_out={shelf}/held.en+{shelf}/held.de")
MORE = {
    "kto": ("kto", *PAIRS, "evaluate.retention=null"),
    "dpo4": ("dpo", *PAIRS, "quant.bits=4"),
    "summary": ("summarization", *LINES, *TEXTS, "evaluate.metric=rouge1"),
}
"""Adapters that a test trains itself: a recipe and its settings."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with the adapters `asked`, `t5` and `dpo`, beside the files that their runs held out."""
    folder = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("registry", "runs", "cache"):
            patch.setenv(f"PEFTKIT_{name.upper()}", str(folder / name))
        base, t5 = write_base(folder / "base", initializer_range=0.2), write_t5(folder / "t5")
        for name, count in (("train", 8), ("held", 3)):
            (folder / f"{name}.en").write_text("".join(f"{name} dog {i}\n" for i in range(count)))
            (folder / f"{name}.de").write_text("".join(f"Hund {i}\n" for i in range(count)))
            written(folder / f"{name}.jsonl", preferences(count, name))
        train("translation", base, "asked", [*LINES, *TEXTS, "evaluate.instructions=Be brief."])
        train("translation", t5, "t5", [*LINES, *TEXTS])
        train("dpo", base, "dpo", [*PAIRS, "evaluate.retention_passages=2", "data.max_length=60"])
        yield folder


def train(recipe: str, base: Path, name: str, settings: Sequence[str]) -> None:
    loaded = load(find(recipe))
    given = [setting.format(shelf=base.parent) for setting in settings]
    execute(loaded, configure(loaded, overrides=[f"base={base}", f"save_as={name}", *STEPS, *given]))


@pytest.fixture
def measured(shelf: Path, capfd: pytest.CaptureFixture[str]) -> Eval:
    """Run `peftkit eval … --json`: exit code, figures, what was told."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main(["eval", *arguments, "--json"])
        out, err = capfd.readouterr()
        assert "bug in peftkit" not in err, err
        return code, json.loads(out) if code == 0 else None, err

    return run


def version(name: str) -> Version:
    return Registry(locations.registry_root().path).resolve(name)


@pytest.mark.parametrize("name", ["asked", "t5", "dpo", *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_the_rows_that_a_run_held_out_have_its_figures(name: str, shelf: Path, measured: Eval) -> None:
    if name in MORE:
        recipe, *settings = MORE[name]
        train(recipe, shelf / "base", name, settings)
    lines = name in ("asked", "t5", "summary")
    rows = f"{shelf}/held.en+{shelf}/held.de" if lines else str(shelf / "held.jsonl")
    more = ("--set", "instructions=Be brief.") if name == "asked" else ()
    code, figures, told = measured(name, "--data", rows, *more)
    assert code == 0, told
    ((reference, found),) = figures.items()
    assert reference == version(name).reference
    assert found.pop("receipts") == []
    recorded = json.loads(version(name).manifest.model_dump_json())["metrics"]
    assert recorded["other"].pop("training")
    same_figures(found, recorded)
    if lines:
        wanted = {"summary": ["lead-3", "lead-1", "base"], "t5": ["source", "base"]}
        assert list(found["other"]["baselines"]) == wanted.get(name, ["source", "base", "base + instructions"])
        assert found["other"]["baselines"]["base"]["rows"] == 2
    else:
        assert found["other"]["measured"] == {"pairs": 3}


def test_what_is_asked_otherwise_goes_before_what_is_recorded(shelf: Path, measured: Eval) -> None:
    lines = f"{shelf}/held.en+{shelf}/held.de"
    code, figures, told = measured("asked", "--data", lines, "--set", "max_prompted_rows=1", "--set", "baselines=false")
    assert code == 0
    (found,) = figures.values()
    assert list(found["other"]["baselines"]) == ["base"]
    assert found["other"]["baselines"]["base"]["rows"] == 1
    assert "of those of the run the manifest has a digest alone" in told
    code, figures, _ = measured("dpo", "--data", str(shelf / "held.jsonl"), "--set", "retention=null")
    assert not any("retention" in path for path, _ in flat(figures))
    assert measured("asked", "--data", lines, "--set", "shots=2")[0] == 1
    assert measured("t5", "--data", lines, "--set", "shots=2")[0] == 1


def test_the_base_is_measured_once(shelf: Path) -> None:
    """One version under two names, so that both have the same figures."""
    asked, dpo, seen = version("asked"), version("dpo"), list[Event]()
    spec, rows = task_settings(asked), f"{shelf}/held.en+{shelf}/held.de"
    how = TaskEvaluateSpec(max_new_tokens=4, resamples=100, instructions="Be brief.")
    data, host = read_rows(spec, rows), open_adapters([asked, asked], locations.cache_root().path)
    first, second = evaluate_texts(host, [asked, asked], rows, data, spec, how, report=seen.append)
    assert first.figures() == second.figures()
    answers = load_preferences(shelf / "held.jsonl", "pairs")
    host, quiet = open_adapters([dpo, dpo], locations.cache_root().path), PreferenceEvaluateSpec(retention_passages=1)
    one, two = evaluate_preferences(host, [dpo, dpo], answers, preference_settings(dpo), quiet, report=seen.append)
    assert one.figures() == two.figures()
    phases = [event.name for event in seen if isinstance(event, Phase)]
    names = ["base", "base + instructions", asked.reference, asked.reference, "base", dpo.reference, dpo.reference]
    assert phases == ["baselines", *(f"measure {name}" for name in names)]


def test_an_encoder_decoder_base_decodes_once(shelf: Path) -> None:
    t5, seen = version("t5"), list[Event]()
    host, rows = open_adapters([t5, t5], locations.cache_root().path), f"{shelf}/held.en+{shelf}/held.de"
    how = TaskEvaluateSpec(max_new_tokens=4, resamples=100)
    first, second = evaluate_tasks(host, [t5, t5], rows, task_of(t5), how, report=seen.append)
    assert first.figures() == second.figures()
    assert list(first.contestants) == ["source", "base", "adapter"]
    assert sum(isinstance(event, Phase) and event.name == "predict" for event in seen) == 3


def test_what_a_run_did_not_measure_is_asked_as_training_asked(shelf: Path) -> None:
    told: list[Event] = []
    bare = version("asked")
    bare = replace(bare, manifest=bare.manifest.model_copy(update={"metrics": type(bare.manifest.metrics)()}))
    host = open_adapters([bare], locations.cache_root().path)
    rows = written(shelf / "source.jsonl", [{"source": "a dog", "target": "Hund"}])
    options: dict[str, Any] = {"measure": TaskEvaluateSpec(max_new_tokens=2, resamples=100), "report": told.append}
    data = read_rows(task_settings(bare), str(rows))
    (found,) = evaluate_texts(host, [bare], str(rows), data, task_settings(bare), **options)
    assert found.instruction == "Translate into German."  # by the name of the files that it was trained on
    other = bare.manifest.metrics.model_copy(update={"other": {"instruction": "Say it."}})
    another = replace(bare, manifest=bare.manifest.model_copy(update={"metrics": other}))
    (found,) = evaluate_texts(host, [another], str(rows), data, task_settings(bare), **options)
    assert found.instruction == "Say it."
    assert any(isinstance(event, Note) and "asked as 'Say it.'" in event.text for event in told)
    with pytest.raises(DataError, match=r"data\.instruction: Translate into German\. and Say it\."):
        evaluate_texts(host, [bare, another], str(rows), data, task_settings(bare), **options)


def test_conversations_are_measured_as_such_and_told(shelf: Path, measured: Eval) -> None:
    rows = written(shelf / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(4)])
    quiet = ("--set", "max_generated_rows=0", "--set", "retention=null", "--set", "behaviour=null")
    code, figures, told = measured("dpo", "asked", "--data", str(rows), *quiet)
    assert code == 0, told
    assert all("answer_nll_change" in found["other"] for found in figures.values())
    assert not any("preference_accuracy" in path or "chrf" in path for path, _ in flat(figures))
    assert "was trained on pairs of answers, and as these the rows cannot be read" in told
    assert "was trained on sources and the texts wanted, and as these the rows cannot be read" in told


def test_a_file_that_is_neither_is_told_as_what_was_trained_on(shelf: Path, measured: Eval) -> None:
    rows = written(shelf / "other.jsonl", [{"colour": "red", "size": 3}])
    assert "rows hold no preference" in measured("dpo", "--data", str(rows))[2]
    told = measured("asked", "--data", str(rows))[2]
    assert "the target text: no column is named like it" in told
    assert "name the columns: --text COLUMN --label COLUMN" in told
    assert "nowhere.jsonl" in measured("dpo", "--data", str(shelf / "nowhere.jsonl"))[2]
    empty = written(shelf / "empty.jsonl", [{"source": "a", "target": "b"}, {"source": "", "target": "b"}])
    assert "empty.jsonl:2" in measured("asked", "--data", str(empty))[2]


def test_columns_of_another_file(shelf: Path, measured: Eval) -> None:
    rows = written(shelf / "named.jsonl", [{"satz": "a dog", "wanted": "Hund"}, {"satz": "a cat", "wanted": "Katze"}])
    code, figures, told = measured("asked", "--data", str(rows), "--text", "satz", "--label", "wanted")
    assert code == 0, told
    assert next(iter(figures.values()))["other"]["instruction"] == "Translate into German."
    conversations = written(shelf / "asked.jsonl", [{"prompt": "a", "completion": "b"}])
    code, _, told = measured("asked", "--data", str(conversations), "--text", "satz", "--label", "wanted")
    assert code == 1
    assert "'satz' is no column" in told
    away = written(shelf / "french.jsonl", [{"en": "a dog", "fr": "chien"}])
    assert "targets are of several languages" in measured("asked", "--data", str(away))[2]


@pytest.mark.parametrize(
    ("name", "option", "why"),
    [
        ("dpo", ("--text", "x"), "was trained on preferences"),
        ("dpo", ("--columns", "a,b"), "was trained on preferences"),
        ("asked", ("--pair", "x"), "was trained for translation, whose rows have none"),
        ("t5", ("--pair", "x"), "was trained for translation, whose rows have none"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    name: str, option: tuple[str, str], why: str, shelf: Path, measured: Eval
) -> None:
    code, _, told = measured(name, "--data", str(shelf / "held.jsonl"), *option)
    assert code == 2
    assert option[0] in told
    assert why in " ".join(told.replace("│", " ").split())


def test_rows_that_cannot_be_ranked_or_read(shelf: Path, measured: Eval) -> None:
    long = written(shelf / "long.jsonl", [*preferences(2, "short"), *preferences(1, "long" * 30)])
    code, _, told = measured("dpo", "--data", str(long))
    assert code == 1
    assert "too_long: 1 row longer than 60 tokens" in told
    assert "--too-long drop leaves them out" in told
    code, figures, told = measured("dpo", "--data", str(long), "--too-long", "drop")
    assert code == 0
    assert next(iter(figures.values()))["other"]["measured"] == {"pairs": 2}
    assert "left out" in told
    assert "too_long: Input should be 'raise' or 'drop'" in measured("dpo", "--data", str(long), "--too-long", "cut")[2]
    same = written(shelf / "same.jsonl", [*preferences(2, "short"), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert "the same answer as 'chosen'" in measured("dpo", "--data", str(same))[2]
    code, _, told = measured("asked", "--data", str(written(shelf / "far.jsonl", [{"en": "a" * 600, "de": "b"}])))
    assert code == 1
    assert "--too-long truncate cuts their sources" in told


def labelling(one: Version) -> Version:
    """The version as if it had been trained on labelled rows."""
    assert one.manifest.recipe is not None
    config: dict[str, Any] = json.loads(one.manifest.model_dump_json())["recipe"]["config"]
    config["data"]["kind"] = "labelled"
    recipe = one.manifest.recipe.model_copy(update={"config": config})
    return replace(one, manifest=one.manifest.model_copy(update={"recipe": recipe}))


def test_labelled_rows(shelf: Path) -> None:
    kto, quiet = labelling(version("dpo")), PreferenceEvaluateSpec(retention=None)
    host, spec = open_adapters([kto], locations.cache_root().path), preference_settings(kto)
    rows = [{"prompt": "one", "completion": f"it is {i}", "label": i > 1} for i in range(5)]
    answers = read_as_trained([kto], str(written(shelf / "labels.jsonl", rows)), {})
    assert isinstance(answers, PreferenceSet)
    (found,) = evaluate_preferences(host, [kto], answers, spec, quiet)  # one prompt: KTO's training needs several
    assert found.figures()["other"]["measured"] == {"wanted": 3, "unwanted": 2}
    wanted = load_preferences(written(shelf / "wanted.jsonl", rows[2:]), "labelled")
    with pytest.raises(DataError, match=r"(?s)all 3 held-out rows have the same label.*add rows of the other label"):
        evaluate_preferences(host, [kto], wanted, spec, quiet)


def test_a_text_of_forgetting_that_is_not_here_is_named(shelf: Path, measured: Eval) -> None:
    code, _, told = measured("dpo", "--data", str(shelf / "held.jsonl"), "--set", "retention=mine.txt")
    assert code == 1
    assert "--set retention=FILE says where it is" in told


def test_rows_of_two_kinds_are_not_mixed(shelf: Path) -> None:
    both = [{"source": "a", "target": "b", "prompt": "a", "chosen": "b", "rejected": "c"}]
    rows = str(written(shelf / "both.jsonl", both))
    with pytest.raises(DataError, match="would be read in different ways"):
        read_as_trained([version("asked"), version("dpo")], rows, {})
    assert isinstance(read_as_trained([version("asked")], rows, {}), TaskDataset)
    two = [version("dpo"), labelling(version("dpo"))]
    host, answers = open_adapters(two[:1], locations.cache_root().path), load_preferences(rows, "pairs")
    with pytest.raises(DataError, match=r"data\.kind: pairs and labelled"):
        evaluate_preferences(host, two, answers, preference_settings(two[0]), PreferenceEvaluateSpec())
