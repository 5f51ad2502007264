"""A cached trunk under a task's head: the same training as without, bitwise in the batches that filled the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from headed_lab import examples, load
from tiny_bases import write_base
from tiny_encoders import write_bert, write_bert_tokenizer, write_image_base, write_t5

from peftkit.backbone.contain import base_tensors
from peftkit.data.tasks.task import TaskExample
from peftkit.errors import TrainingError
from peftkit.events import Decision, Event
from peftkit.training import sft
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.paths import task_paths
from peftkit.training.trunk.passes import Index, Pass
from peftkit.training.trunk.states import States
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec

LENGTHS = (5, 9, 12, 7, 6, 11, 8, 10, 4, 6)
SPEC = TrainSpec(
    num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=2,
    learning_rate=1e-3, warmup_ratio=0.0,
)  # fmt: skip
WHOLE_STEPS_OF_EPOCH_1 = 2
TOP, LORA = {"method": "top_layers", "top_layers": 1}, {"method": "lora", "r": 4, "layers": "top:2"}
ALONE = {"method": "top_layers", "top_layers": 0}
"""The head alone: what the classic practice calls feature extraction."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    llama = write_base(folder / "llama", num_hidden_layers=4)
    return {"llama": llama, "bert": write_bert(folder / "bert", num_hidden_layers=4)}


def paired(rows: list[TaskExample]) -> list[TaskExample]:
    """Pairs: the second half of each is of another type; every third row has the ids of the one before it."""
    found = []
    for at, row in enumerate(rows):
        ids = found[-1].input_ids if at % 3 == 2 else row.input_ids
        types = tuple(int(2 * place >= len(ids)) for place in range(len(ids)))
        found.append(replace(row, input_ids=ids, type_ids=tuple(0 for _ in ids) if at % 3 == 2 else types))
    return found


def run(
    base: Path, head: str, values: dict[str, Any], bits: int, folder: Path, *, pairs: bool = False, **changes: Any
) -> tuple[Any, list[dict[str, float]], list[Event]]:
    """Train; the tuned model, the figures of every step, and what was said."""
    tuned = inject(load(base, head, bits), AdapterSpec(**values))
    spec, rows, said = SPEC.model_copy(update=changes), examples(head, LENGTHS), list[Event]()
    rows = paired(rows) if pairs else rows
    figures: dict[int, dict[str, float]] = {}

    def log(step: int, found: dict[str, float]) -> None:
        kept = {name: value for name, value in found.items() if name in ("loss", "grad_norm", "held_out_nll")}
        figures.setdefault(step, {}).update(kept)

    options: dict[str, Any] = {"held_out": examples(head, (6, 10), seed=1), "cache": folder / "cache", "log": log}
    train(tuned, rows, spec, folder / "run", paths=task_paths(tuned, spec, rows), report=said.append, **options)
    return tuned, list(figures.values()), said


@pytest.mark.parametrize(
    ("base", "head", "values", "bits"),
    [("llama", "sequence", ALONE, 4), ("llama", "token", LORA, 32), ("llama", "span", TOP, 32),
     ("bert", "several", ALONE, 32), ("bert", "number", TOP, 32), ("bert", "token", LORA, 4),
     ("bert pairs", "sequence", TOP, 32)],
)  # fmt: skip
def test_cached_training_equals_uncached_training(
    bases: dict[str, Path], tmp_path: Path, base: str, head: str, values: dict[str, Any], bits: int
) -> None:
    base, *pairs = base.split()
    changes: dict[str, Any] = {"pairs": bool(pairs), "early_stopping_patience": 9}
    changes |= {"regularize": RegularizeSpec(dropout=0.0)} if base == "bert" else {}
    plain, expected, _ = run(bases[base], head, values, bits, tmp_path / "plain", **changes)
    cached, found, said = run(bases[base], head, values, bits, tmp_path / "cached", trunk_cache=True, **changes)
    first = WHOLE_STEPS_OF_EPOCH_1
    assert found[:first] == expected[:first]
    assert len(found) == len(expected)
    assert found == [pytest.approx(figures, rel=1e-4) for figures in expected]
    for name, parameter in plain.trainable.items():
        assert torch.allclose(cached.trainable[name], parameter, atol=1e-5), name
    ours, theirs = base_tensors(cached.backbone.model), base_tensors(plain.backbone.model)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    made = next(event for event in said if isinstance(event, Decision) and event.what == "trunk cache")
    assert made.choice.startswith("made")


def test_the_head_and_nothing_else(bases: dict[str, Path]) -> None:
    tuned = inject(load(bases["llama"], "token"), AdapterSpec(method="top_layers", top_layers=0, train_head=False))
    assert sorted(tuned.trainable) == ["score.bias", "score.weight"]


@pytest.mark.parametrize(("spec", "headed"), [(TrainSpec(), True), (PreferenceTrainSpec(), False)])
def test_what_was_never_run_under_fsdp_is_refused(spec: TrainSpec, headed: bool) -> None:
    team: Any = SimpleNamespace(sharded=True, size=2)
    with pytest.raises(TrainingError, match="under FSDP: it was never run so"):
        sft._check_team(team, spec, headed=headed)
    sft._check_team(team, TrainSpec(), headed=False)


def test_a_trunk_that_draws_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="draw random numbers while training") as caught:
        run(bases["bert"], "sequence", ALONE, 32, tmp_path, trunk_cache=True)
    assert "(dropout of 0.1)" in str(caught.value)
    assert "0 where the base has its own" in str(caught.value)


def test_blocks_that_are_called_more_than_once_are_refused(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    folder = tmp_path / "albert"
    sizes: dict[str, Any] = {"vocab_size": 300, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    AlbertModel(AlbertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)).save_pretrained(folder)
    write_bert_tokenizer(folder)
    with pytest.raises(TrainingError, match="has 3 layers and 1 blocks"):
        run(folder, "sequence", ALONE, 32, tmp_path, trunk_cache=True)


@pytest.mark.parametrize("head", ["image", "seq2seq", "sequence"])
def test_rows_without_one_text_are_refused(tmp_path: Path, head: str) -> None:
    base = write_image_base(tmp_path / "vit", "vit") if head == "image" else write_t5(tmp_path / "t5")
    tuned = inject(load(base, head), AdapterSpec(method="top_layers", top_layers=0))
    with pytest.raises(TrainingError, match=r"train\.trunk_cache finds states by a row's token ids"):
        task_paths(tuned, TrainSpec(trunk_cache=True), [])


def test_the_same_tokens_of_other_types_have_states_of_their_own() -> None:
    """A text with a separator in it, and a pair that is apart at the same place."""
    (row,) = examples("sequence", [4])
    pair = replace(row, type_ids=(0, 0, 1, 1))
    index = Index([Pass((row, pair), training=True)])
    assert index.positions == 8
    states = States(index, torch.arange(8.0)[:, None])
    ids, mask = torch.tensor([row.input_ids]), torch.ones(1, 4, dtype=torch.long)
    assert states.of(ids, mask)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert states.of(ids, mask, torch.tensor([pair.type_ids]))[0, :, 0].tolist() == [4, 5, 6, 7]
