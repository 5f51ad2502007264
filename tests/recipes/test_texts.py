"""Translation and summarization run whole on tiny bases that chat, T5 and BART: plumbing, no scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_bases import write_base
from tiny_encoders import write_t5

from peftkit import locations
from peftkit.data.audit import recorded_rendering
from peftkit.data.spec import DataSpec
from peftkit.errors import DataError
from peftkit.evaluation.tasks.registered import predict_rows, task_of
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.recipe import configure, execute, find, load
from peftkit.registry.store import Registry, Version
from peftkit.runs import list_runs

pytestmark = pytest.mark.usefixtures("places")

SECRET = "quixote"  # stands in every row: where it turns up, a user's row has been kept
ANSWER = f"{SECRET} ja"


def write_bart(folder: Path) -> Path:
    """A random BART of two layers a side, with T5's byte tokenizer; its decoder starts with another token than T5's."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    write_t5(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _BART.items()}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=259,
            d_model=64,
            max_position_embeddings=128,
            forced_eos_token_id=1,
            init_std=0.2,
            **sides,
            **ends,
        )
        BartForConditionalGeneration(config).save_pretrained(str(folder))
    return folder


_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 128}


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Overrides for a run over two files a side; every target is the same, so that a few steps teach something."""
    for name, word, count in (("train", "dog", 12), ("held", "cat", 5)):
        (tmp_path / f"{name}.en").write_text("".join(f"{SECRET} {word} {i}\n" for i in range(count)))
        (tmp_path / f"{name}.de").write_text("".join(f"{ANSWER}{'!' * (i % 2)}\n" for i in range(count)))
    return [
        f"data.train={tmp_path}/train.en+{tmp_path}/train.de",
        f"data.held_out={tmp_path}/held.en+{tmp_path}/held.de",
        "quant.bits=32",
        "train.max_steps=2",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=1",
        "evaluate.max_new_tokens=16",
        "evaluate.max_prompted_rows=3",
        "evaluate.resamples=100",
    ]


def run(name: str, base: Path, settings: Sequence[str]) -> tuple[Version, list[dict[str, Any]]]:
    recipe = load(find(name))
    result = execute(recipe, configure(recipe, overrides=[f"base={base}", *settings]))
    assert result.saved_as is not None
    (folder,) = list_runs(locations.runs_root().path)
    version = Registry(locations.registry_root().path).resolve(name)
    assert SECRET not in version.manifest.model_dump_json()
    return version, json.loads((folder.path / "samples.json").read_text())


def metrics(version: Version) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(version.manifest.model_dump_json())["metrics"]
    return found


def sacrebleu_agrees(figures: dict[str, Any], samples: Sequence[dict[str, Any]], name: str) -> float:
    """Compare a contestant's figures with sacrebleu's own of the answers that were kept; returns chrF."""
    from sacrebleu import corpus_bleu, corpus_chrf

    rows = [row for row in samples if name in row]
    given, wanted = [row[name] for row in rows], [[row["reference"] for row in rows]]
    assert figures["rows"] == len(rows)
    assert figures["chrf"]["point"] == pytest.approx(corpus_chrf(given, wanted).score)
    assert figures["bleu"]["point"] == pytest.approx(corpus_bleu(given, wanted).score)
    return float(figures["chrf"]["point"])


@pytest.mark.parametrize("steps", [1, pytest.param(60, marks=pytest.mark.full)])
def test_translation_on_a_base_that_chats(steps: int, settings: list[str], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", initializer_range=0.2)  # of larger logits than the tiny base
    learn = ["adapter.r=16", f"train.max_steps={steps}", "train.learning_rate=2e-2", "evaluate.shots=2"]
    version, samples = run("translation", base, [*settings, *learn])
    found = metrics(version)
    rivals = found["other"]["baselines"]
    assert list(rivals) == ["source", "base", "base + 2 examples"]
    assert "head" not in version.manifest.adapter
    assert found["other"]["instruction"] == "Translate into German."
    assert found["other"]["answer_nll_change"]["high"] < 0
    assert found["after"]["answer_nll"]["point"] < found["before"]["answer_nll"]["point"]
    assert {"retention_nll", "stopped"} <= found["after"].keys()
    for name in rivals:
        sacrebleu_agrees(rivals[name], samples, name)
    assert rivals["base"]["rows"] == rivals["base + 2 examples"]["rows"] == 3
    assert {record.role for record in version.manifest.data} == {"train", "held_out", "retention"}
    with pytest.raises(DataError, match=r"it answers in words.*\n.*\n.*peftkit generate FILE"):
        task_of(version)
    score = sacrebleu_agrees(found["after"], samples, "adapter")
    assert score > 50 or steps == 1  # the one answer that there is to learn


@pytest.mark.parametrize("name", ["translation", "summarization"])
def test_an_adapter_is_asked_later_as_it_was_trained(name: str) -> None:
    assert recorded_rendering(configure(load(find(name))).as_dict()) == DataSpec().rendering


@pytest.mark.full
def test_summarization_on_a_base_that_chats(tiny_base: Path, settings: list[str], tmp_path: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    rows = [{"document": f"{SECRET} one {i}. two. three. four.", "summary": f"two {i}"} for i in range(12)]
    path, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    held.write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    named = [f"data.train={path}", f"data.held_out={held}", "evaluate.instructions=Be very brief."]
    version, samples = run("summarization", tiny_base, [*settings[2:], *named])
    found = metrics(version)
    assert list(found["other"]["baselines"]) == ["lead-3", "lead-1", "base", "base + instructions"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for name in ("lead-3", "adapter"):
        figures = found["after"] if name == "adapter" else found["other"]["baselines"][name]
        each = [scorer.score(row["reference"], row[name])["rougeL"].fmeasure for row in samples]
        assert figures["rougeL"]["point"] == pytest.approx(sum(each) / len(each))


@pytest.mark.full
def test_an_encoder_decoder_learns(settings: list[str], tmp_path: Path) -> None:
    learn = ["adapter.r=16", "train.max_steps=60", "train.learning_rate=1e-2"]
    version, samples = run("translation", write_t5(tmp_path / "t5"), [*settings, *learn])
    found = metrics(version)
    assert version.manifest.adapter["head"]["kind"] == "seq2seq"
    assert list(found["other"]["baselines"]) == ["source", "base"]
    assert found["other"]["baselines"]["base"]["rows"] == 3
    for name in ("source", "base"):
        sacrebleu_agrees(found["other"]["baselines"][name], samples, name)
    assert sacrebleu_agrees(found["after"], samples, "adapter") > 50


@pytest.mark.full
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_writes_what_peft_alone_decodes(kind: str, settings: list[str], tmp_path: Path) -> None:
    """Transformers, PEFT and a loop over the most likely next token, without peftkit; the registered adapter too."""
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from peftkit.tuning.attach import open_adapters

    base = write_t5(tmp_path / kind) if kind == "t5" else write_bart(tmp_path / kind)
    learn = ["adapter.r=16", "train.max_steps=10", "train.learning_rate=1e-2"]
    version, samples = run("translation", base, [*settings, *learn])
    plain = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(str(base)), str(version.path)).eval()
    assert type(plain).__name__ == "PeftModelForSeq2SeqLM"
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    sources = (tmp_path / "held.en").read_text().splitlines()
    written = [decoded(plain, tokenizer, source) for source in sources]
    assert written == [row["adapter"] for row in samples]
    with plain.disable_adapter():
        bare = [decoded(plain, tokenizer, source) for source in sources[:3]]
    assert bare == [row["base"] for row in samples[:3]]
    assert bare != written[:3]
    host = open_adapters([version], locations.cache_root().path)
    held = settings[1].removeprefix("data.held_out=")
    predicted = predict_rows(host, [version], held, task_of(version), TaskEvaluateSpec(max_new_tokens=16))
    (given,) = predicted.by_name.values()
    assert [each.value for each in given] == written


def decoded(model: Any, tokenizer: Any, source: str) -> str:
    """The most likely next token, 16 times or until the end."""
    import torch

    ids = torch.tensor([tokenizer(source)["input_ids"]])
    answer = [model.config.decoder_start_token_id]
    with torch.no_grad():
        for _ in range(16):
            scores = model(input_ids=ids, decoder_input_ids=torch.tensor([answer])).logits[0, -1]
            answer.append(int(scores.argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(answer, skip_special_tokens=True))
