"""TRL contained: each line of `training/sft.py` that undoes something of TRL's, and the upstream fact behind it.

A test whose name begins with `test_contract_` fails when upstream changes; then the line that it explains can go.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer
from trl.trainer import base_trainer

from peftkit.backbone.contain import base_tensors
from peftkit.data.chat import IGNORED, Example
from peftkit.errors import TrainingError
from peftkit.events import Decision, Phase, Progress
from peftkit.generation.forward import row_nll
from peftkit.training import trainer as sft
from peftkit.training.arguments import sft_arguments
from peftkit.training.schedule import Schedule, schedule
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.training.trainer import AnswerTrainer
from peftkit.tuning.methods import METHODS
from peftkit.tuning.tuned import Tuned

Rows = Callable[..., list[Example]]
Make = Callable[..., Tuned]


def disturb(tuned: Tuned, size: float = 0.1) -> Tuned:
    """Move every adapter tensor off its initial value, to numbers that bfloat16 does not hold."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trainable.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def trainer_for(tuned: Tuned, examples: list[Example], folder: Path, **spec: Any) -> AnswerTrainer:
    settings = TrainSpec(**spec)
    plan = schedule(examples, settings)
    trainer = AnswerTrainer(tuned, examples, plan, settings, folder, lambda event: None, lambda step, figures: None)
    trainer.create_optimizer_and_scheduler(num_training_steps=len(plan))
    return trainer


def values(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tuned.trainable.items()}


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take our line away, to see what TRL does."""
    monkeypatch.setattr(sft, "_restore", lambda *args: None)


# -- dtypes


@pytest.mark.parametrize("bits", [4, 8])
def test_contract_trl_casts_adapters_of_quantized_bases_to_bfloat16(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    without(monkeypatch)
    model = tuned(bits=bits)
    trainer_for(model, rows((5, 9)), tmp_path)
    assert {parameter.dtype for parameter in model.trainable.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_adapters_keep_dtype_and_value(tuned: Make, rows: Rows, tmp_path: Path, bits: int, method: str) -> None:
    """A float32 that went through bfloat16 has lost 16 bits: continuing from an adapter would round it first."""
    model = disturb(tuned(bits=bits, method=method))
    before = values(model)
    trainer_for(model, rows((5, 9)), tmp_path)
    assert {parameter.dtype for parameter in model.trainable.values()} == {torch.float32}
    changed = [name for name, value in values(model).items() if not torch.equal(value, before[name])]
    assert changed == []


def test_the_base_keeps_dtypes_and_bytes(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=4, dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in base_tensors(model.model).items()}
    trainer_for(model, rows((5, 9)), tmp_path)
    after = base_tensors(model.model)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- forward


def test_contract_trl_replaces_the_bases_forward(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch)
    model = tuned(bits=4)
    trainer_for(model, rows((5, 9)), tmp_path)
    assert "forward" in model.model.get_base_model().__dict__


def test_the_bases_forward_is_its_own(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=4)
    base = model.model.get_base_model()
    train(model, rows((5, 9)), TrainSpec(max_steps=1), tmp_path)
    assert "forward" not in base.__dict__


def test_a_forward_that_somebody_else_put_there_stays(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=4)
    base = model.model.get_base_model()
    original = base.forward
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    base.forward = counting
    train(model, rows((5, 9)), TrainSpec(max_steps=1), tmp_path)
    assert base.forward is counting


def test_the_bases_configuration_is_its_own(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    """Trainer aligns the model's special tokens with the tokenizer's, and says so on the terminal."""
    model = tuned(bits=4)
    base = model.model.get_base_model()
    before = base.config.to_dict(), base.generation_config.to_dict()
    train(model, rows((5, 9)), TrainSpec(max_steps=1), tmp_path)
    after = base.config.to_dict(), base.generation_config.to_dict()
    changed = [key for old, new in zip(before, after, strict=True) for key in new if old.get(key) != new[key]]
    assert changed == []


# -- telemetry


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What TRL would send, on a machine that has not opted out."""
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **what: sent.append(what))
    return sent


def test_contract_trl_sends_telemetry_from_its_constructor(
    tuned: Make, rows: Rows, tmp_path: Path, telemetry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(AnswerTrainer, "_send_telemetry")
    trainer_for(tuned(bits=4), rows((5, 9)), tmp_path)
    assert len(telemetry) == 1


def test_nothing_is_sent(tuned: Make, rows: Rows, tmp_path: Path, telemetry: list[Any]) -> None:
    assert AnswerTrainer._send_telemetry is not SFTTrainer._send_telemetry
    train(tuned(bits=4), rows((5, 9)), TrainSpec(max_steps=1), tmp_path)
    assert telemetry == []


def test_nothing_is_written(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    train(tuned(bits=4), rows((5, 9)), TrainSpec(max_steps=2), tmp_path / "trainer")
    assert [path for path in (tmp_path / "trainer").rglob("*") if path.is_file()] == []


# -- settings that upstream would choose otherwise


def test_contract_upstream_defaults(tmp_path: Path) -> None:
    default = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert default["max_length"] == 1024
    assert default["gradient_checkpointing"] is True
    assert default["logging_nan_inf_filter"] is True
    assert default["remove_unused_columns"] is True
    assert default["save_strategy"] == "steps"
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is True


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_upstream_would_choose_is_explicit(tuned: Make, tmp_path: Path, checkpointing: bool) -> None:
    spec = TrainSpec(gradient_checkpointing=checkpointing, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    plan = Schedule(((0, 1), (1, 0)), 10)
    arguments = sft_arguments(tuned(bits=4), plan, spec, tmp_path, "adamw_torch")
    assert arguments.max_length is None
    assert arguments.packing is False
    assert (arguments.bf16, arguments.fp16) == (False, False)
    assert arguments.gradient_checkpointing is False, "it is switched on block by block, beside upstream"
    assert arguments.logging_nan_inf_filter is False
    assert arguments.gradient_accumulation_steps == 1
    assert arguments.per_device_train_batch_size == 6
    assert arguments.max_steps == 2
    assert arguments.report_to == []
    assert arguments.save_strategy == "no"
    assert arguments.push_to_hub is False


def test_rows_longer_than_1024_tokens_are_trained_whole(
    tuned: Make, rows: Rows, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    model = tuned(make_base(tmp_path / "long", max_position_embeddings=2048), bits=16)
    examples = rows((1500, 1100), labelled=(1090, 1499))
    expected = row_nll(model.model.eval(), examples, pad_id=2, device=torch.device("cpu"))
    trained = train(model, examples, TrainSpec(max_steps=1, per_device_train_batch_size=2), tmp_path / "trainer")
    assert trained.tokens == 2600
    assert trained.answer_tokens == 3
    assert trained.first_loss == pytest.approx(sum(expected) / 3, rel=1e-5)


# -- what is learned


@pytest.mark.parametrize("bits", [4, 16])
def test_labels_come_from_the_rows_alone(tuned: Make, rows: Rows, tmp_path: Path, bits: int) -> None:
    """Labels are planted that are not the next tokens; the gradient must be that of these labels."""
    model = disturb(tuned(bits=bits))
    examples = rows((12, 20, 7), labelled=())
    planted = {(0, 4): 9, (1, 2): 200, (1, 19): 33, (2, 6): 2}
    examples = [
        dataclasses.replace(row, labels=[planted.get((i, at), IGNORED) for at in range(len(row.input_ids))])
        for i, row in enumerate(examples)
    ]
    trainer = trainer_for(model, examples, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    loss = trainer.training_step(model.model, (0, 1, 2))
    found = {name: parameter.grad.clone() for name, parameter in model.trainable.items()}
    model.model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for (row, at), label in planted.items():
        logits = model.model(input_ids=torch.tensor([examples[row].input_ids[:at]])).logits[0, -1]
        total = total + cross_entropy(logits, torch.tensor(label)) / len(planted)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in model.trainable.items():
        assert float((found[name] - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, name


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_only_the_adapter_changes(tuned: Make, rows: Rows, tmp_path: Path, bits: int, method: str) -> None:
    model = tuned(bits=bits, method=method)
    with torch.no_grad():
        model.model(input_ids=torch.tensor([[1, 2, 3]]))  # int8 layers move their weights at the first forward
    frozen = {name: tensor.clone() for name, tensor in base_tensors(model.model).items()}
    adapter, modules = values(model), [(name, type(module)) for name, module in model.model.named_modules()]
    train(model, rows((5, 9, 12, 6)), TrainSpec(max_steps=4, per_device_train_batch_size=2), tmp_path)
    after = base_tensors(model.model)
    assert frozen.keys() == after.keys()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert all(not torch.equal(value, adapter[name]) for name, value in values(model).items())
    assert all(p.grad is None for p in model.model.parameters() if not p.requires_grad)
    assert [(name, type(module)) for name, module in model.model.named_modules()] == modules
    assert not model.model.training


def test_the_loss_falls(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    examples = rows((8, 9, 10, 11))
    trained = train(tuned(bits=4, r=8), examples, TrainSpec(max_steps=30, learning_rate=1e-2), tmp_path)
    assert trained.steps == 30
    assert trained.last_loss < trained.first_loss - 0.5


def test_the_same_seed_gives_the_same_adapter_bitwise(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    examples, spec = rows((8, 9, 10, 11)), TrainSpec(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(found))
        model = tuned(bits=4, lora_dropout=0.2)
        train(model, examples, spec.model_copy(update={"seed": seed}), tmp_path)
        found.append(values(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


# -- the order, the rate, the norm


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (1, 4), (2, 2)])
def test_the_trainer_sees_the_schedule(
    tuned: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, accumulation: int
) -> None:
    seen: list[tuple[int, ...]] = []
    at_once: list[int] = []

    class Watched(sft.Step):
        def gradients(self, tokens_at_once: int) -> float:
            seen.append(tuple(row.row for row in self.rows))
            at_once.append(tokens_at_once)
            return super().gradients(tokens_at_once)

    monkeypatch.setattr(sft, "Step", Watched)
    examples = rows([5 + i % 7 for i in range(10)])
    spec = TrainSpec(
        num_train_epochs=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, seed=3
    )
    trained = train(tuned(bits=4), examples, spec, tmp_path)
    plan = schedule(examples, spec)
    assert seen == list(plan.steps)
    assert [len(step) for step in seen] == [4, 4, 4, 4, 4]
    assert set(at_once) == {size * 11}, "so many rows of the longest"
    assert (trained.steps, trained.tokens) == (5, plan.tokens)


def test_steps_may_end_with_a_smaller_one(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    spec = TrainSpec(num_train_epochs=1, per_device_train_batch_size=4)
    assert train(tuned(bits=4), rows([6] * 10), spec, tmp_path).steps == 3


def cosine(t: int, warm: int, total: int) -> float:
    if t < warm:
        return t / max(1, warm)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (t - warm) / max(1, total - warm))))


def linear(t: int, warm: int, total: int) -> float:
    return t / max(1, warm) if t < warm else max(0.0, (total - t) / max(1, total - warm))


@pytest.mark.parametrize(
    ("name", "formula"),
    [("cosine", cosine), ("linear", linear), ("constant_with_warmup", lambda t, warm, total: min(1.0, t / warm))],
)
def test_learning_rates_are_the_formulas(
    tuned: Make, rows: Rows, tmp_path: Path, name: str, formula: Callable[[int, int, int], float]
) -> None:
    logged: dict[int, dict[str, float]] = {}
    spec = TrainSpec(
        max_steps=12,
        per_device_train_batch_size=1,
        learning_rate=3e-3,
        lr_scheduler_type=name,
        warmup_ratio=0.25,
    )
    train(tuned(bits=4), rows((5, 6)), spec, tmp_path, log=logged.__setitem__)
    rates = [logged[step]["learning_rate"] for step in range(1, 13)]
    assert rates == pytest.approx([3e-3 * formula(t, 3, 12) for t in range(12)], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_gradients_are_scaled_down_to_max_grad_norm(tuned: Make, rows: Rows, tmp_path: Path, limit: float) -> None:
    model = disturb(tuned(bits=16))
    before = values(model)
    spec = TrainSpec(max_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0, max_grad_norm=limit)
    examples = rows((9, 12))
    probe = trainer_for(model, examples, tmp_path)
    probe.training_step(model.model, (0, 1) * 4)
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.trainable.values()))
    model.model.zero_grad(set_to_none=True)
    assert norm > 1e-2
    train(model, examples, spec, tmp_path)
    moved = math.sqrt(sum(float((v - before[n]).double().pow(2).sum()) for n, v in values(model).items()))
    assert moved == pytest.approx(min(norm, limit), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_checkpointing_gives_the_same_gradients(tuned: Make, rows: Rows, tmp_path: Path, bits: int) -> None:
    moved = []
    for checkpointing in (False, True):
        model = disturb(tuned(bits=bits))
        before = values(model)
        spec = TrainSpec(
            max_steps=1,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=1.0,
            max_grad_norm=1e9,
            gradient_checkpointing=checkpointing,
        )
        train(model, rows((9, 12, 30)), spec, tmp_path)
        moved.append({name: value - before[name] for name, value in values(model).items()})
    for name, step in moved[0].items():
        assert float((moved[1][name] - step).norm() / step.norm()) < 1e-6, name


def test_checkpointing_really_recomputes(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    counts = {}
    for checkpointing in (False, True):
        model = tuned(bits=4)
        calls: list[int] = []
        layer = model.model.get_base_model().model.layers[0]

        def count(mlp: Any, args: Any, calls: list[int] = calls) -> None:
            calls.extend([1] * mlp.training)  # shortcuts are tried in evaluation mode, before the first step

        layer.mlp.register_forward_pre_hook(count)
        train(model, rows((9, 12)), TrainSpec(max_steps=1, gradient_checkpointing=checkpointing), tmp_path)
        counts[checkpointing] = len(calls)
    assert counts == {False: 1, True: 2}


def test_after_checkpointed_training_the_model_evaluates_and_generates(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    from peftkit.generation.generate import generate

    answers, likelihoods = [], []
    for checkpointing in (False, True):
        model = tuned(bits=4)
        examples = rows((9, 12))
        train(model, examples, TrainSpec(max_steps=1, gradient_checkpointing=checkpointing), tmp_path)
        device = torch.device("cpu")
        likelihoods.append(row_nll(model.model, examples, pad_id=2, device=device))
        prompts = [[1, *range(40, 60)], [1, *range(40, 60), 7]]
        answers.append(generate(model.model, prompts, model.backbone.tokenizer, device=device, max_new_tokens=4))
    assert likelihoods[0] == likelihoods[1]
    assert answers[0] == answers[1]


# -- what is refused, and what is said


def test_float16_is_refused(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="float16 is for inference"):
        train(tuned(bits=16, compute_dtype="float16"), rows((5, 9)), TrainSpec(max_steps=1), tmp_path)


def test_a_nan_stops_the_run_and_names_the_rows(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    model = tuned(bits=4)
    logged: list[int] = []
    with torch.no_grad():
        next(iter(model.trainable.values()))[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"the loss is nan.*made\.jsonl"):
        train(model, rows((5, 9)), TrainSpec(max_steps=3), tmp_path, log=lambda step, figures: logged.append(step))
    assert logged == []


def test_a_gradient_that_is_not_finite_in_the_last_step_is_not_kept(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    """The loss of the last step was taken before its update, so it cannot tell that the update spoilt everything."""
    model = tuned(bits=4)
    next(iter(model.trainable.values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError):
        train(model, rows((5, 9)), TrainSpec(max_steps=1), tmp_path)


def test_diverging_stops_the_run(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    spec = TrainSpec(max_steps=40, learning_rate=1e30, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e30)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf)"):
        train(disturb(tuned(bits=4)), rows((5, 9)), spec, tmp_path)


def test_what_is_reported(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    said: list[Any] = []
    logged: dict[int, dict[str, float]] = {}
    examples = rows((5, 9, 7, 6))
    spec = TrainSpec(max_steps=3, per_device_train_batch_size=2)
    trained = train(tuned(bits=4), examples, spec, tmp_path, report=said.append, log=logged.__setitem__)
    assert [(event.what, event.choice) for event in said if isinstance(event, Decision)] == [
        ("passes", f"rows without padding, head at labels, {2**26 // (4 * 259)} rows at once, LoRA fused"),
        ("optimizer", "adamw_torch"),
        ("learning rate", f"{METHODS['lora'].learning_rate:g}"),
    ]
    assert [event.total for event in said if isinstance(event, Phase)] == [3]
    assert [event.done for event in said if isinstance(event, Progress)] == [1, 2, 3]
    assert sorted(logged) == [1, 2, 3]
    figures = {
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "answer_tokens",
        "tokens_per_s",
        "micro_batches",
        "peak_gb",
    }
    assert set(logged[1]) == figures
    assert trained.tokens == sum(figures["tokens"] for figures in logged.values())
    assert (trained.first_loss, trained.last_loss) == (logged[1]["loss"], logged[3]["loss"])
    assert trained.peak_bytes > 0
    assert trained.seconds > 0


def test_the_optimizer_asked_for_is_the_one_used(tuned: Make, rows: Rows, tmp_path: Path) -> None:
    said: list[Any] = []
    model = tuned(bits=4)
    trainer = trainer_for(model, rows((5, 9)), tmp_path, optim="sgd")
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    train(model, rows((5, 9)), TrainSpec(max_steps=1, optim="sgd"), tmp_path, report=said.append)
    decisions = [event for event in said if isinstance(event, Decision) and event.what == "optimizer"]
    assert [(event.choice, event.reason) for event in decisions] == [("sgd", "asked for")]
