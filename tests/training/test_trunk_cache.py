"""Training with a cached trunk is training: bitwise in the batches that the cache was filled in, 1e-5 in others.

A cached trunk needs its rows side by side, so the bitwise twin is an uncached run on padded rows. What an uncached run
does by itself, rows one behind the other, is the same to 1e-5; with dropout it is another draw.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trunk_bases import WRITERS

from peftkit.backbone.contain import base_tensors
from peftkit.data.chat import Example
from peftkit.errors import ConfigError, OutOfMemory, TrainingError
from peftkit.events import Decision, Event, Note, Warned
from peftkit.training import sft
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths
from peftkit.training.schedule import schedule
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.trunk.cached import Proof, cached_trunk, in_memory
from peftkit.training.trunk.frozen import Trunk, frozen_trunk, hidden
from peftkit.training.trunk.passes import Index, Pass, training_passes
from peftkit.training.trunk.states import States
from peftkit.training.trunk.top import top_of
from peftkit.tuning.tuned import Tuned

Make = Callable[..., Tuned]
Rows = Callable[..., list[Example]]
Trace = dict[int, dict[str, float]]
Values = dict[str, torch.Tensor]

# Ragged micro-batches, and a third step that begins in the first epoch and ends in the second.
LENGTHS = (5, 9, 12, 7, 6, 11, 8, 10, 4, 6)
SPEC = TrainSpec(
    num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=2,
    learning_rate=1e-3, warmup_ratio=0.0, save_steps=1, save_total_limit=100,
)  # fmt: skip
CACHED = SPEC.model_copy(update={"trunk_cache": True})
WHOLE_STEPS_OF_EPOCH_1 = 2
AT_ONCE = 2 * max(LENGTHS)
"""Tokens at once of these settings."""
TRIED = (3, 11)
"""Made-up rows that shortcuts are tried on; as many of the run's own would be more than AT_ONCE."""
LORA = {"method": "lora", "layers": "top:2"}
HEAD = {"method": "top_layers", "top_layers": 0, "train_head": True}


class Killed(BaseException):
    """Stands for kill -9: nothing of peftkit's may catch it."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny base of four blocks."""
    root = tmp_path_factory.mktemp("families")

    def base(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            folder.mkdir()
            WRITERS[name](folder)
        return folder

    return base


class Run:
    """One training run: what it logged, and the trained tensors before each step's update and after the last."""

    def __init__(self, tuned: Tuned, rows: Rows, folder: Path, spec: TrainSpec, **options: Any) -> None:
        self.trace: Trace = {}
        self.before: dict[int, Values] = {}
        self.events: list[Event] = []
        self.tuned = tuned
        kill_at = options.pop("kill_at", None)

        def log(step: int, figures: dict[str, float]) -> None:
            if step == kill_at:
                raise Killed
            kept = {key: figures[key] for key in figures if key in ("loss", "grad_norm", "held_out_nll")}
            self.trace.setdefault(step, {}).update(kept)
            self.before.setdefault(step, values(tuned))

        examples, held_out = rows(LENGTHS), rows((6, 10), seed=1)
        train(
            tuned, examples, spec, folder / "trainer", held_out=held_out, cache=folder / "cache", log=log,
            report=self.events.append, **options,
        )  # fmt: skip
        self.after = values(tuned)


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncached runs lay their rows side by side, as those with a cached trunk do."""

    def side_by_side(tuned: Tuned, spec: TrainSpec, **options: Any) -> Paths:
        return find_paths(tuned, rows_as_batch=True, logits=bool(spec.regularize.r_drop), **options)

    monkeypatch.setattr(sft, "paths_for", side_by_side)


def values(tuned: Tuned) -> Values:
    return {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}


def same(left: Values, right: Values) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def said(events: list[Event], what: str) -> str:
    return next(event.choice for event in events if isinstance(event, Decision) and event.what == what)


# -- the same training


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {**LORA, "lora_dropout": 0.1}),
        ("untied", {"method": "top_layers", "top_layers": 1}),
        ("qwen2", HEAD),
        ("gpt2", {"method": "top_layers", "top_layers": 2, "train_head": False}),
        ("gemma2", LORA),
        ("llama", {**LORA, "bits": 4}),
        pytest.param("llama", {"method": "top_layers", "top_layers": 1, "bits": 8}, marks=pytest.mark.full),
        pytest.param("llama", {**LORA, "dtype": "bfloat16"}, marks=pytest.mark.full),
    ],
)
@pytest.mark.usefixtures("padded")
def test_cached_training_equals_uncached_training(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any, family: str, settings: dict[str, Any]
) -> None:
    plain = Run(tuned(bases(family), **settings), rows, tmp_path, SPEC)
    model = tuned(bases(family), **settings)
    base = {name: tensor.clone() for name, tensor in base_tensors(model.backbone.model).items()}
    cached = Run(model, rows, tmp_path, CACHED)

    assert len(plain.trace) == len(cached.trace) == 8
    first = range(1, WHOLE_STEPS_OF_EPOCH_1 + 1)
    assert [cached.trace[step] for step in first] == [plain.trace[step] for step in first]
    assert same(cached.before[WHOLE_STEPS_OF_EPOCH_1 + 1], plain.before[WHOLE_STEPS_OF_EPOCH_1 + 1])
    assert not same(plain.after, plain.before[1])  # it learned something
    apart = max(float((cached.after[name] - plain.after[name]).abs().max()) for name in plain.after)
    assert apart <= 1e-5
    now = base_tensors(model.backbone.model)
    assert [name for name in base if not torch.equal(base[name], now[name])] == []
    with torch.no_grad():
        ids = torch.tensor([rows((9,))[0].input_ids])
        assert torch.allclose(model.model(input_ids=ids).logits, plain.tuned.model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_uncached_run_on_rows_without_padding_is_the_same_but_for_rounding(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any, family: str
) -> None:
    plain, cached = (Run(tuned(bases(family), **LORA), rows, tmp_path, spec) for spec in (SPEC, CACHED))
    assert ("rows without padding" in said(plain.events, "passes")) is (family != "gemma2"), "which attends eagerly"
    assert "rows without padding" not in said(cached.events, "passes")
    for step, figures in plain.trace.items():
        assert cached.trace[step] == pytest.approx(figures, rel=1e-5)
    assert max(float((cached.after[name] - plain.after[name]).abs().max()) for name in plain.after) <= 1e-5


def test_a_resumed_run_is_the_uninterrupted_one_with_its_cache_or_without(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any
) -> None:
    def run(folder: Path, **options: Any) -> Run:
        checkpoints = Checkpoints(folder / "checkpoints")
        start = checkpoints.newest() if options.pop("resume", False) else None
        model = tuned(bases("llama"), lora_dropout=0.2, layers="top:2")
        return Run(model, rows, folder, CACHED, checkpoints=checkpoints, start=start, **options)

    whole = run(tmp_path / "whole")
    for name, again in (("kept", "used again"), ("lost", "made")):
        with pytest.raises(Killed):
            run(tmp_path / name, kill_at=4)
        if name == "lost":
            shutil.rmtree(tmp_path / name / "cache" / "trunk")
        resumed = run(tmp_path / name, resume=True)
        assert said(resumed.events, "trunk cache").startswith(again)
        assert sorted(resumed.trace) == [4, 5, 6, 7, 8]
        assert all(resumed.trace[step] == whole.trace[step] for step in resumed.trace)
        assert same(resumed.after, whole.after)


# -- the same settings of training


@pytest.mark.parametrize(
    ("settings", "changes", "bitwise"),
    [
        ({**LORA, "method": "adalora", "r": 2}, {}, True),
        pytest.param(
            LORA, {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 3.0}, True, marks=pytest.mark.full
        ),
        pytest.param(
            {"method": "top_layers", "top_layers": 2}, {"gradient_checkpointing": True}, True, marks=pytest.mark.full
        ),
        (HEAD, {"regularize": {"l2_sp": 0.5}}, True),
        ({**LORA, "lora_dropout": 0.1}, {"regularize": {"r_drop": 1.0}}, False),  # its batches hold every row twice
        (
            {"method": "top_layers", "top_layers": 2},
            {"unfreeze": {"direction": "deep_first", "every_steps": 2}, "num_train_epochs": 2},
            True,
        ),
    ],
    ids=["adalora", "early stopping", "checkpointing", "l2_sp", "r_drop", "unfreezing"],
)
@pytest.mark.usefixtures("padded")
def test_settings_of_training_mean_the_same_with_a_cached_trunk(
    tuned: Make,
    rows: Rows,
    tmp_path: Path,
    bases: Any,
    settings: dict[str, Any],
    changes: dict[str, Any],
    bitwise: bool,
) -> None:
    def run(trunk_cache: bool) -> Run:
        spec = TrainSpec.model_validate({**SPEC.model_dump(), **changes, "trunk_cache": trunk_cache})
        return Run(tuned(bases("llama"), **settings), rows, tmp_path, spec)

    plain, cached = run(trunk_cache=False), run(trunk_cache=True)
    assert list(cached.trace) == list(plain.trace)
    first = range(1, WHOLE_STEPS_OF_EPOCH_1 + 1)
    assert not bitwise or [cached.trace[step] for step in first] == [plain.trace[step] for step in first]
    apart = max(float((cached.after[name] - plain.after[name]).abs().max()) for name in plain.after)
    assert apart <= 1e-5
    notes = [[event.text for event in one.events if isinstance(event, Note)] for one in (plain, cached)]
    if "early_stopping_patience" in changes:
        assert any("the adapter is that of step" in text for text in notes[1])
    if "unfreeze" in changes:
        assert sum("thawed" in text for text in notes[1]) >= 2
    if settings["method"] == "adalora":
        patterns = [one.tuned.model.peft_config["default"].rank_pattern for one in (plain, cached)]
        assert patterns[0] == patterns[1]
        assert patterns[1] is not None


def no_room(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Fail by a real allocation where a block is given more tokens than the longest row has."""
    rows, longest = (args[0] if args else kwargs["hidden_states"]).shape[:2]
    if rows * longest > max(LENGTHS) and (rows, longest) != TRIED:
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.usefixtures("padded")
def test_where_one_row_fits_a_run_goes_on_with_one(tuned: Make, rows: Rows, tmp_path: Path, bases: Any) -> None:
    """In the trunk, in the comparison with the whole model, and in training, as without a cache."""

    def run(spec: TrainSpec) -> Run:
        model = tuned(bases("llama"), **LORA)
        for block in (model.inner.model.layers[0], model.inner.model.layers[-1]):
            block.register_forward_pre_hook(no_room, with_kwargs=True)
        return Run(model, rows, tmp_path, spec)

    plain, cached = (run(spec.model_copy(update={"num_train_epochs": 1.0})) for spec in (SPEC, CACHED))
    said = [event.text for event in cached.events if isinstance(event, Warned)]
    assert sum("the cached trunk is compared with the whole model on 1" in text for text in said) == 2
    repeated = [text for text in said if "the step is repeated" in text]
    assert len(repeated) == 1
    assert "2 rows at once, the longest of 11 tokens" in repeated[0]
    assert "with 11 tokens at once, and so from here on" in repeated[0], "half of what was too much"
    assert len(cached.trace) == len(plain.trace) == 3
    assert max(float((cached.after[name] - plain.after[name]).abs().max()) for name in plain.after) <= 1e-5


@pytest.mark.parametrize("at", [0, 3])
def test_where_one_row_is_too_much_the_error_says_so(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any, at: int
) -> None:
    model = tuned(bases("llama"), **LORA)

    def exhausted(module: torch.nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            torch.empty(1 << 60, dtype=torch.uint8)

    model.inner.model.layers[at].register_forward_pre_hook(exhausted)
    with pytest.raises(OutOfMemory, match=r"before step 1, with a single row of \d+ tokens") as caught:
        prepared(model, rows(LENGTHS), tmp_path)
    assert "lower data.max_length" in str(caught.value)


# -- what may be cached


def prepared(tuned: Tuned, rows: list[Example], cache: Path, *, dropout: float | None = None) -> list[Event]:
    """Make the cache of a run and train nothing; what was reported."""
    events: list[Event] = []
    plan = schedule(rows, SPEC)
    with cached_trunk(tuned, training_passes(rows, plan, AT_ONCE), cache, dropout, events.append):
        pass
    return events


@pytest.mark.parametrize(
    ("settings", "top"),
    [
        (LORA, 2),
        ({"layers": "3"}, 3),
        (HEAD, 4),
        ({"method": "norms", "layers": "1"}, 1),
        ({"method": "patterns", "patterns": ["model.norm.weight"]}, 4),
    ],
)
def test_the_trunk_ends_below_the_lowest_trained_tensor(
    tuned: Make, bases: Any, settings: dict[str, Any], top: int
) -> None:
    model = tuned(bases("llama"), **settings)
    for parameter in model.trainable.values():  # as gradual unfreezing begins
        parameter.requires_grad_(False)
    assert frozen_trunk(model).top == top
    assert not any(parameter.requires_grad for parameter in model.trainable.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": "all"},
        {"method": "trainable_tokens", "tokens": ["<|im_end|>"]},
        {"method": "prompt_tuning", "num_virtual_tokens": 2},
        {"method": "patterns", "patterns": ["model.embed_tokens.weight"]},
    ],
)
def test_where_training_reaches_the_first_block_there_is_no_trunk(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match="what is trained reaches the first of 4") as caught:
        prepared(tuned(bases("llama"), **settings), rows(LENGTHS), tmp_path)
    assert ("adapter.layers" in str(caught.value)) == ("layers" in settings), "only what the method has"
    assert "train.trunk_cache=false" in str(caught.value)


def test_learned_positions_below_the_blocks_are_seen(tuned: Make, rows: Rows, tmp_path: Path, bases: Any) -> None:
    """GPT-2's position embeddings hang neither on a block nor on the token embeddings."""
    model = tuned(bases("gpt2"), method="patterns", patterns=["transformer.wpe.weight"])
    with pytest.raises(TrainingError, match="reaches the first of 4"):
        prepared(model, rows(LENGTHS), tmp_path)


def test_dropout_in_the_trunk_is_refused_unless_training_switches_it_off(
    tuned: Make, rows: Rows, tmp_path: Path, bases: Any
) -> None:
    model = tuned(bases("gpt2 with dropout"), method="top_layers", top_layers=1)
    with pytest.raises(TrainingError, match=r"draw random numbers while training \(dropout of 0\.1\)"):
        prepared(model, rows(LENGTHS), tmp_path)
    prepared(model, rows(LENGTHS), tmp_path, dropout=0.0)
    with pytest.raises(TrainingError, match="draw random numbers"):
        prepared(tuned(bases("llama"), **LORA), rows(LENGTHS), tmp_path, dropout=0.1)


def test_noise_on_the_embeddings_is_refused() -> None:
    with pytest.raises(
        (ConfigError, ValueError), match=r"trunk_cache and regularize\.neftune_alpha exclude each other"
    ):
        TrainSpec.model_validate({"trunk_cache": True, "regularize": {"neftune_alpha": 5.0}})


# -- planted bugs


@pytest.fixture
def made(tuned: Make, rows: Rows, bases: Any) -> tuple[Trunk, States, Any, Pass]:
    """A trunk, the true states of two rows, its output's form, and their batch."""
    trunk = frozen_trunk(tuned(bases("llama"), **LORA))
    batch = Pass(tuple(rows((6, 9))), training=True)
    form = trunk.output(batch)
    return trunk, in_memory(batch, hidden(form)), form, batch


def test_the_proof_holds_for_true_states(made: Any) -> None:
    trunk, states, form, batch = made
    Proof(trunk, [batch]).check(top_of(trunk, states, form))


@pytest.mark.parametrize("bug", ["block below", "row order", "one bit", "another input", "shifted"])
def test_a_wrong_cache_is_caught_before_the_first_step(made: Any, bug: str) -> None:
    trunk, states, form, batch = made
    index, true = states.index, states.values
    if bug == "block below":
        wrong = in_memory(batch, hidden(replace(trunk, top=trunk.top - 1).output(batch)))
    elif bug == "row order":
        wrong = States(index, torch.cat([true[6:], true[:6]]))
    elif bug == "one bit":
        bits = true.clone().view(torch.int32)
        bits[13, 0] ^= 1 << 12  # of the token that the last label is predicted from
        wrong = States(index, bits.view(torch.float32))
    elif bug == "another input":
        wrong = States(index, true * 1.001)
    else:
        wrong = States(index, true.roll(1, dims=0))
    with pytest.raises(TrainingError, match="computes logits that differ by"):
        Proof(trunk, [batch]).check(top_of(trunk, wrong, form))


def test_rows_are_found_in_any_batch_and_strangers_are_not(made: Any, rows: Rows) -> None:
    _, states, _, batch = made
    short, long = (torch.tensor([row.input_ids]) for row in batch.rows)
    both = torch.zeros(2, 9, dtype=torch.long)
    both[0] = long
    both[1, :6] = short
    mask = torch.ones_like(both)
    mask[1, 6:] = 0
    found = states.of(both, mask)
    assert torch.equal(found[0], states.values[6:])
    assert torch.equal(found[1, :6], states.values[:6])
    assert not found[1, 6:].any()
    assert torch.equal(states.of(short, torch.ones_like(short))[0], states.values[:6])
    stranger = short.clone()
    stranger[0, -1] += 1
    with pytest.raises(TrainingError, match="a row of 6 tokens has no states"):
        states.of(stranger, torch.ones_like(stranger))


def test_every_row_of_a_run_is_in_the_passes_once(rows: Rows) -> None:
    """The micro-batches are those of the steps, and rows with the same ids share their states."""
    examples = [*rows(LENGTHS), rows(LENGTHS)[3]]
    plan = schedule(examples, SPEC)
    passes = training_passes(examples, plan, AT_ONCE)
    index = Index(passes)
    assert len(index.starts) == len(LENGTHS)
    assert index.positions == sum(LENGTHS)
    first = [examples[at] for at in plan.steps[0]]
    ordered = sorted(first, key=lambda row: len(row.input_ids))
    fit = [count for count in range(1, 5) if count * len(ordered[count - 1].input_ids) <= AT_ONCE]
    assert 1 < len(fit) < 4
    assert list(passes[0].rows) == ordered[: len(fit)]
