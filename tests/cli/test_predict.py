"""`peftkit predict`, and `peftkit eval` on an adapter of a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import write_bert

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec
from peftkit.recipe.fields import base_fields
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec

Cli = Callable[..., tuple[int, str, str]]
HEAD = Head("sequence", ("bad", "good"))
TEXTS = ["fine thing", "poor thing", "a, b", "so so"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture
def tasks(places: Path, bert: Path) -> Path:
    """Two adapters of one task, `one` and `two`, that were not trained: their heads were drawn."""
    for seed, name in ((1, "one"), (2, "two")):
        source = BaseSpec(source=str(bert))
        backbone = load_backbone(source, QuantSpec(bits=32), places / "cache", head=HEAD, seed=seed)
        tuned = inject(backbone, AdapterSpec(r=2))
        with torch.no_grad():
            for parameter in tuned.trainable.values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        data = {"task": "text_classification", "train": "mails.csv", "text": "body", "label": "kind", "max_length": 24}
        recipe = {"name": "text_classification", "sha256": "0" * 64, "config": {"data": data}}
        fields = {
            "kind": "peft", "base": base_fields(backbone), "recipe": recipe,
            "adapter": {**tuned.spec.record(), "head": HEAD.record()},
        }  # fmt: skip
        payload = save_adapter(tuned, places / "payloads" / name)
        Registry(places / "registry").publish(
            name, payload, Draft.model_validate(fields), base=backbone.identity.record
        )
    rows = places / "rows.csv"
    rows.write_text("body,kind\n" + "".join(f'"{text}",{HEAD.labels[at % 2]}\n' for at, text in enumerate(TEXTS)))
    return rows


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_gets_a_label(cli: Cli, tasks: Path, places: Path) -> None:
    code, shown, err = cli("predict", "one", str(tasks))
    assert code == 0, err
    assert "\n4 rows\n" in shown
    assert len([line for line in shown.splitlines() if line.startswith("  rows.csv:")]) == 4
    out = places / "out.jsonl"
    code, shown, err = cli("predict", "one", "two", str(tasks), "--out", str(out))
    assert (code, err.count("Traceback")) == (0, 0), err
    found = records(out)
    assert [record["index"] for record in found] == [0, 1, 2, 3]
    for record in found:
        assert set(record["predictions"]) == {"one", "two"}
        for said in record["predictions"].values():
            assert said["value"] in HEAD.labels
            assert set(said["probabilities"]) == set(HEAD.labels)
            assert sum(said["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert said["confidence"] == max(said["probabilities"].values()) == said["probabilities"][said["value"]]
    assert any(record["predictions"]["one"] != record["predictions"]["two"] for record in found)


def test_two_adapters_say_what_each_says_alone(cli: Cli, tasks: Path, places: Path) -> None:
    alone = []
    for name in ("one", "two"):
        code, shown, err = cli("predict", name, str(tasks), "--json")
        assert code == 0, err
        alone.append([record["predictions"][name] for record in json.loads(shown)])
    code, shown, _ = cli("predict", "two", "one", str(tasks), "--json")
    both = [[record["predictions"][name] for record in json.loads(shown)] for name in ("one", "two")]
    assert both == alone


def test_what_is_there_is_not_overwritten(cli: Cli, tasks: Path, places: Path) -> None:
    out = places / "out.jsonl"
    out.write_text("mine")
    code, _, err = cli("predict", "one", str(tasks), "--out", str(out))
    assert code == 2
    assert "--overwrite" in err
    assert out.read_text() == "mine"
    assert cli("predict", "one", str(tasks), "--out", str(out), "--overwrite")[0] == 0
    assert len(records(out)) == 4


def test_bad_calls_say_what_mends_them(cli: Cli, tasks: Path, places: Path) -> None:
    code, _, err = cli("predict", str(tasks))
    assert code == 2
    assert "at least one adapter and a file" in err.replace("\n", " ")
    code, _, err = cli("predict", "three", str(tasks))
    assert code == 1
    assert "three" in err
    code, _, err = cli("predict", "one", str(places / "none.csv"))
    assert code == 1
    assert "none.csv" in err
    other = places / "other.csv"
    other.write_text("words\nfine thing\n")
    code, _, err = cli("predict", "one", str(other))
    assert code == 1
    assert "body" in err
    assert "words" in err
    code, shown, err = cli("predict", "one", str(other), "--text", "words")
    assert code == 0, err
    assert "\n1 rows\n" in shown
    code, _, err = cli("predict", "one", str(tasks), "--too-long", "shred")
    assert code in (1, 2)
    assert "Traceback" not in err
    code, _, err = cli("predict", "one", str(tasks), "--set", "treshold=1")
    assert code == 1
    assert "threshold" in err


def test_long_rows_are_listed_or_cut(cli: Cli, tasks: Path, places: Path) -> None:
    """As in training, 24 tokens: letters and two special ones."""
    long = places / "long.csv"
    long.write_text(f"body\nfine\n{'x' * 40}\n")
    out = places / "out.jsonl"
    code, _, err = cli("predict", "one", str(long), "--out", str(out))
    assert code == 1
    assert "1 of 2 rows are longer" in err
    assert "42 tokens" in err
    assert "--too-long" in err
    assert not out.exists()
    code, shown, _ = cli("predict", "one", str(long), "--out", str(out), "--too-long", "truncate")
    assert code == 0
    assert "1 of 2 rows are cut" in shown
    assert len(records(out)) == 2
    code, shown, _ = cli("predict", "one", str(long), "--out", str(out), "--too-long", "drop", "--overwrite")
    assert code == 0
    assert "left out" in shown
    assert [record["predictions"]["one"]["value"] is None for record in records(out)] == [False, True]


def test_an_adapter_that_answers_in_words_is_refused(cli: Cli, tasks: Path, adapters: dict[str, Any]) -> None:
    code, _, err = cli("predict", "tickets", str(tasks))
    assert code == 1
    assert "was not trained for a task" in err
    assert "peftkit generate FILE --adapter tickets" in err


def test_measured_by_its_own_metrics(cli: Cli, tasks: Path, places: Path) -> None:
    code, shown, err = cli("eval", "one", "two", "--data", str(tasks), "--json", "--set", "resamples=100")
    assert code == 0, err
    figures = json.loads(shown)
    assert len(figures) == 2
    code, said, _ = cli("predict", "one", str(tasks), "--json")
    right = sum(
        record["predictions"]["one"]["value"] == HEAD.labels[at % 2] for at, record in enumerate(json.loads(said))
    )
    (own,) = [value for reference, value in figures.items() if reference.startswith("one@")]
    assert own["after"]["accuracy"]["point"] == right / 4
    wrong = places / "wrong.csv"
    wrong.write_text("body,kind\nfine,goode\n")
    code, _, err = cli("eval", "one", "--data", str(wrong))
    assert code == 1
    assert "did you mean 'good'" in err
