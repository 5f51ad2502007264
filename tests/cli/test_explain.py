"""`peftkit explain` as it is typed, on adapters that recipes have trained and registered."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tiny_bases import write_base
from tiny_encoders import write_bert
from typer.testing import CliRunner

from peftkit.cli import explain as command
from peftkit.errors import ConfigError, DataError, PeftkitError
from peftkit.evaluation.explaining import integrate
from peftkit.evaluation.explaining.explanation import Explanation
from peftkit.evaluation.explaining.words import Word
from peftkit.recipe import configure, execute, find, load

for needed in ("captum", "sklearn", "scipy"):
    pytest.importorskip(needed)


def run(*arguments: str, fails: bool = False) -> str:
    app = typer.Typer()
    app.command()(command.explain)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=fails)
    if fails and isinstance(result.exception, PeftkitError):
        raise result.exception
    assert result.exit_code == (2 if fails else 0), result.output
    return result.output if fails else result.stdout


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("registry", "runs", "cache"):
        monkeypatch.setenv(f"PEFTKIT_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def train(places: Path) -> Callable[..., None]:
    """Two steps of a recipe on rows of a few words, into this test's registry."""

    def train(recipe: str, base: Path, rows: Path, *more: str) -> None:
        loaded = load(find(recipe))
        settings = [
            f"base={base}", f"data.train={rows}", "data.held_out_share=0.3", "train.max_steps=2", "save_as=made",
            "train.per_device_train_batch_size=4", "evaluate.baselines=false", "evaluate.resamples=100", *more,
        ]  # fmt: skip
        assert execute(loaded, configure(loaded, overrides=settings)).saved_as is not None

    return train


def reviews(folder: Path) -> Path:
    draw = random.Random(0)
    words = {"good": ["fine", "lovely", "kind"], "bad": ["vile", "dull", "rude"]}
    lines = [(f"{draw.choice(words[label])} film {at}", label) for at in range(10) for label in words]
    path = folder / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in lines))
    return path


def test_a_trained_encoder_from_the_registry_to_figures_and_a_page(
    places: Path, train: Callable[..., None], tmp_path: Path
) -> None:
    train("text_classification", write_bert(tmp_path / "bert"), reviews(tmp_path), "quant.bits=32")
    stored = {path: path.read_bytes() for path in (places / "registry").rglob("*.safetensors")}
    arguments = ["made", "--text", "vile [film] 3"]
    found = json.loads(run(*arguments, "--json"))
    assert found["adapter"].startswith("made@")
    assert found["prediction"] == max(found["probabilities"], key=found["probabilities"].get)
    assert found["explained"] == f"the logit of {found['prediction']!r}"
    assert found["residual"] <= integrate.TOLERANCE
    assert [word["text"] for word in found["words"]] == ["[CLS]", "vile", "[film]", "3", "[SEP]"]
    assert found["sum"] == pytest.approx(sum(token["value"] for token in found["tokens"]))
    other = "bad" if found["prediction"] == "good" else "good"
    asked = json.loads(run(*arguments, "--json", "--target", other, "--baseline", "zero", "--steps", "8"))
    assert (asked["explained"], asked["baseline"]) == (f"the logit of {other!r}", "zero")
    assert asked["prediction"] == found["prediction"]

    page = tmp_path / "why.html"
    said = run(*arguments, "--out", str(page))
    assert re.search(r"\[film\]\([+-]", said), "square brackets are words, not markup"
    assert f"prediction     {found['prediction']}" in said
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "exists; --overwrite" in re.sub(r"\s*│\s*", " ", run(*arguments, "--out", str(page), fails=True))
    assert stored == {path: path.read_bytes() for path in (places / "registry").rglob("*.safetensors")}
    assert stored


def test_the_tag_of_a_word_on_a_4_bit_causal_base(places: Path, train: Callable[..., None], tmp_path: Path) -> None:
    people = "".join(f"{name} B-PER\nslept O\n\n" for name in ("Ada", "Bob", "Eve", "Max", "Kim", "Lea", "Tom", "Ann"))
    (tmp_path / "rows.conll").write_text(people)
    base = write_base(tmp_path / "llama", initializer_range=0.2, pad_token_id=None)
    train("token_classification", base, tmp_path / "rows.conll")
    with pytest.raises(ConfigError, match="--word is missing: 1 Ida "):
        run("made", "--text", "Ida slept", fails=True)
    found = json.loads(run("made", "--text", "Ida slept", "--word", "1", "--json"))
    assert len(found["prediction"]) == 2
    assert found["explained"] == f"the logit of {found['prediction'][0]!r} for word 1, 'Ida'"
    assert found["residual"] <= integrate.TOLERANCE
    later = [word["value"] for word in found["words"] if word["text"] == "slept"]
    assert later == [0.0], "a causal base does not see what follows"


def test_an_adapter_that_answers_in_words_is_refused_before_its_base_is_loaded(
    places: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli.published import factors, publish

    publish(places, tiny_base, "tone", factors(tiny_base, 2, 2), alpha=4)
    monkeypatch.setattr("peftkit.evaluation.explaining.explain.open_adapters", None)
    with pytest.raises(DataError, match="was not trained for a task"):
        run("tone", "--text", "hello", fails=True)


def test_the_terminal_shades_strong_words_and_nothing_else() -> None:
    words = (Word("yes", "text", 2.0), Word("and", "text", 0.01), Word("n\x1bo", "text", -1.0))
    line = command.shaded(Explanation(
        what="x", prediction=None, labels=(), words=words, tokens=(), score=1, at_baseline=0, baseline="pad",  # type: ignore[arg-type]
        steps=8, residual=0,
    ))  # fmt: skip
    assert line.plain == "yes(+2) and n\N{REPLACEMENT CHARACTER}o(-1)"
    styles = {line.plain[span.start : span.end].strip(): str(span.style) for span in line.spans}
    assert "blue" in styles["yes"]
    assert "red" in styles["n\N{REPLACEMENT CHARACTER}o"]
    assert "underline" in styles["n\N{REPLACEMENT CHARACTER}o"]
    plain = Console(force_terminal=False, width=80)
    with plain.capture() as shown:
        plain.print(line)
    assert "\x1b" not in shown.get()
