"""Several processes train as one: same gradients, same trace, whoever has which rows and however the base is held.

Two real processes over gloo, started by `accelerate launch`. The gradients are compared with a plain loss over all rows
that shares no code with the step.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from several_processes import rows

from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.shard import hold_packed_bytes_as
from peftkit.errors import BackboneError, RunError, TrainingError
from peftkit.process_group import ProcessGroup, process_name, read_launcher
from peftkit.training import parallel
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.parallel import Team
from peftkit.training.schedule import schedule
from peftkit.training.sft import _check_team, train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import save_adapter
from peftkit.tuning.tuned import Tuned

Make = Callable[..., Tuned]
SCRIPT = Path(__file__).parents[1] / "several_processes.py"
DDP, FSDP = ("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")
# Ragged, so that a mean of means shows; the last of six steps has one row, and so none for the second process.
LENGTHS = [5, 9, 12, 7, 40, 11, 8]
TRAIN = {
    "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "save_steps": 1, "eval_steps": 2, "save_total_limit": 100,
}  # fmt: skip
# The sums of a step's some hundred terms are taken in another order: √300 times float32's unit roundoff of 6e-8.
ROUNDING = 1e-6
# Six optimizer steps divide such differences by the square root of small second moments.
TRACE_ROUNDING = 1e-5


@dataclass(frozen=True)
class Pair:
    """What two processes left behind."""

    folder: Path
    told: tuple[dict[str, Any], dict[str, Any]]
    stderr: str

    @property
    def losses(self) -> list[float]:
        return [figures["loss"] for figures in self.told[0]["trace"].values()]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.folder / f"{name}.safetensors")
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerate(launcher: Sequence[str], *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes."""
    fixed = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    start = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *fixed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [*start, "--main_process_port", str(free_port()), *command],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip


def two(folder: Path, base: Path, launcher: Sequence[str], *, rc: int = 0, **settings: Any) -> Pair:
    """A training run in two processes."""
    folder.mkdir(exist_ok=True)
    quant = {"bits": 32, "device": "cpu", **settings.pop("quant", {})}
    whole = {"base": str(base), "folder": str(folder), "lengths": LENGTHS, "train": TRAIN, "quant": quant, **settings}
    done = accelerate(launcher, str(SCRIPT), json.dumps(whole))
    assert done.returncode == rc, done.stderr[-3000:]
    told = tuple(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return Pair(folder, (told[0], told[1]), done.stderr)


@pytest.fixture(scope="module")
def single(tuned: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[float], Tuned]]:
    """The losses of one process with the same settings, and what it trained."""

    def single(more: Mapping[str, Any] = TRAIN, **quant: Any) -> tuple[list[float], Tuned]:
        model, losses = tuned(**{"bits": 32, **quant}), []
        spec = TrainSpec(**{**TRAIN, **more})
        folder = tmp_path_factory.mktemp("single")
        train(model, rows(LENGTHS), spec, folder, held_out=rows([6, 10], seed=1), log=lambda step, figures: (
            losses.append(figures["loss"]) if "loss" in figures else None
        ))  # fmt: skip
        return losses, model

    return single


def plain_gradients(tuned: Tuned, wanted: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The gradient of Σ NLL / Σ answer tokens, row by row through the model's own logits."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in wanted:
        logits = tuned.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double()
        targets = torch.tensor(row.labels[1:])
        nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        total, count = total + nll, count + int((targets != -100).sum())
    (total / count).backward()
    return {name: parameter.grad.clone() for name, parameter in tuned.trainable.items() if parameter.grad is not None}


def assert_gradients(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    worst = [
        float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
        if float(expected[name].norm()) > 0  # lora_A while lora_B is zero
    ]
    assert len(worst) == len(expected) // 2
    return max(worst)


# -- in two processes


@pytest.fixture(scope="module")
def ddp(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return two(tmp_path_factory.mktemp("ddp"), tiny_base, DDP)


def test_the_rows_of_a_step_are_shared_out(ddp: Pair) -> None:
    """Together the processes have the rows of the schedule; a row twice in a step (of two epochs) is there twice."""
    steps = schedule(rows(LENGTHS), TrainSpec(**TRAIN)).steps
    assert len(ddp.told[0]["rows"]) == len(ddp.told[1]["rows"]) == len(steps) == 6
    for step, first, second in zip(steps, ddp.told[0]["rows"], ddp.told[1]["rows"], strict=True):
        assert sorted(first + second) == sorted(f"made.jsonl:{index + 1}" for index in step)
    told = zip(ddp.told[0]["rows"], ddp.told[1]["rows"], strict=True)
    assert [(len(first), len(second)) for first, second in told] == [(2, 2)] * 5 + [(1, 0)]
    assert ddp.told[0]["rows"] != ddp.told[1]["rows"]


def test_the_gradients_and_the_trace_are_those_of_one_process(ddp: Pair, tuned: Make, single: Any) -> None:
    first = [rows(LENGTHS)[index] for index in schedule(rows(LENGTHS), TrainSpec(**TRAIN)).steps[0]]
    expected = plain_gradients(tuned(bits=32), first)
    assert assert_gradients(ddp.tensors("gradients-0"), expected) < ROUNDING
    losses, _ = single()
    assert ddp.losses == pytest.approx(losses, rel=TRACE_ROUNDING)
    assert ddp.losses[0] == pytest.approx(losses[0], rel=ROUNDING)


def test_all_processes_end_with_one_adapter_and_one_trace(ddp: Pair) -> None:
    first, second = ddp.told
    assert first["trace"] == second["trace"]
    assert first["nll"] == second["nll"]
    left, right = ddp.tensors("0"), ddp.tensors("1")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert ddp.tensors("gradients-0").keys() == ddp.tensors("gradients-1").keys()
    assert Checkpoints(ddp.folder / "checkpoints").steps() == [1, 2, 3, 4, 5, 6]


def test_nf4_spread_by_fsdp_is_one_process(tiny_base: Path, tmp_path: Path, tuned: Make, single: Any) -> None:
    found = two(tmp_path / "fsdp", tiny_base, FSDP, quant={"bits": 4}, generate=True)
    losses, one = single(bits=4)
    assert found.losses == pytest.approx(losses, rel=TRACE_ROUNDING)
    assert found.told[0]["trace"] == found.told[1]["trace"]
    assert found.told[0]["answers"] == found.told[1]["answers"]
    assert found.told[0]["base_nll"] != found.told[0]["nll"], "the base is measured with the adapter off"
    step = [rows(LENGTHS)[index] for index in schedule(rows(LENGTHS), TrainSpec(**TRAIN)).steps[0]]
    assert assert_gradients(found.tensors("gradients-0"), plain_gradients(tuned(bits=4), step)) < ROUNDING
    # What was saved is whole, and named as one process names it.
    saved = load_file(found.folder / "adapter-0" / "adapter_model.safetensors")
    expected = load_file(save_adapter(one, tmp_path / "one") / "adapter_model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in expected.items()}
    assert all(torch.isfinite(value).all() for value in saved.values())
    first = found.tensors("0")
    assert {value.sum().item() for value in first.values()} == {value.sum().item() for value in saved.values()}


@pytest.mark.full
def test_a_mean_of_means_would_be_caught(tiny_base: Path, tmp_path: Path, tuned: Make) -> None:
    """The bug of October 2024 in its form for several processes, planted."""
    lengths = [5, 9, 40, 7]  # 23 answer tokens on one process, 9 on the other
    settings = {**TRAIN, "num_train_epochs": 1}
    found = two(tmp_path / "ddp", tiny_base, DDP, plant=True, lengths=lengths, train=settings)
    expected = plain_gradients(tuned(bits=32), rows(lengths))
    assert assert_gradients(found.tensors("gradients-0"), expected) > 100 * ROUNDING


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "quant", "more", "rounding"),
    [
        (FSDP, {"bits": 32}, {}, TRACE_ROUNDING),
        (FSDP, {"bits": 32}, {"gradient_checkpointing": True}, TRACE_ROUNDING),
        # bfloat16 keeps 8 bits: batches of other shapes round differently by 2^-8 in every activation.
        (FSDP, {"bits": 16, "compute_dtype": "bfloat16"}, {}, 2**-8),
        (FSDP, {"bits": 4, "compute_dtype": "bfloat16"}, {"gradient_checkpointing": True}, 2**-8),
        (DDP, {"bits": 4}, {}, TRACE_ROUNDING),
        (DDP, {"bits": 8}, {}, TRACE_ROUNDING),
        (DDP, {"bits": 4}, {"unfreeze": {"direction": "deep_first", "every_steps": 2}}, TRACE_ROUNDING),
    ],
    ids=["fsdp-32", "fsdp-32-checkpointing", "fsdp-bf16", "fsdp-nf4-bf16", "ddp-nf4", "ddp-int8", "ddp-unfreezing"],
)
def test_every_way_to_hold_the_base(
    tiny_base: Path, tmp_path: Path, single: Any, launcher: Any, quant: Any, more: Any, rounding: float
) -> None:
    found = two(tmp_path / "two", tiny_base, launcher, quant=quant, train={**TRAIN, **more})
    losses, _ = single(more, **quant)
    assert found.losses == pytest.approx(losses, rel=rounding)
    assert found.told[0]["trace"] == found.told[1]["trace"]


@pytest.mark.full
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_stopped_by_a_signal_to_one_and_resumed_is_uninterrupted(
    tiny_base: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    """With dropout, which each process draws for itself, and measurements in between."""
    settings: dict[str, Any] = {"quant": {"bits": 4}, "adapter": {"lora_dropout": 0.2}}
    whole = two(tmp_path / "whole", tiny_base, launcher, **settings)
    cut = two(tmp_path / "cut", tiny_base, launcher, **settings, kill_at=3, kill_rank=1, signal="SIGINT")
    assert [told["error"] for told in cut.told] == ["Stopped: stopped after step 3 of 6"] * 2
    assert [len(told["said"]) for told in cut.told] == [0, 1]
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps() == [1, 2, 3]
    resumed = two(tmp_path / "cut", tiny_base, launcher, **settings, resume=True)
    for told in resumed.told:
        assert sorted(told["trace"]) == ["4", "5", "6"]
        assert {**whole.told[0]["trace"], **told["trace"]} == whole.told[0]["trace"]
    for rank in ("0", "1"):
        left, right = whole.tensors(rank), resumed.tensors(rank)
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    drawn = Checkpoints(tmp_path / "cut" / "checkpoints").load(6).state["random"]
    assert len(drawn) == 2
    assert not torch.equal(drawn[0]["torch"], drawn[1]["torch"]), "each process draws its own dropout"


@pytest.mark.full
def test_one_process_out_of_memory_makes_all_repeat_the_step(tiny_base: Path, tmp_path: Path, single: Any) -> None:
    found = two(tmp_path / "two", tiny_base, DDP, exhausted=1)
    assert found.told[0]["said"] == found.told[1]["said"], "all go on alike, whatever their own rows are"
    (text,) = found.told[0]["said"]
    assert "out of memory in step 2 with 2 rows at once" in text
    assert "tokens at once, and so from here on" in text
    assert found.told[0]["trace"] == found.told[1]["trace"]
    assert found.losses == pytest.approx(single()[0], rel=TRACE_ROUNDING)


@pytest.mark.full
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_penalties_count_once_however_many_processes(
    tiny_base: Path, tmp_path: Path, single: Any, launcher: tuple[str, ...]
) -> None:
    more = {"regularize": {"label_smoothing": 0.1, "l1": 1e-3, "l2": 1e-1, "l2_sp": 1e-1}}
    found = two(tmp_path / "two", tiny_base, launcher, train={**TRAIN, **more})
    losses, one = single(more)
    assert found.losses == pytest.approx(losses, rel=TRACE_ROUNDING)
    left, right = found.tensors("0"), found.tensors("1")
    for name, parameter in one.trainable.items():
        value = parameter.detach()
        assert torch.equal(left[name], right[name])
        # Adam divides the rounding of small gradients by their own size.
        assert float((left[name] - value).norm() / value.norm()) < 1e-3


@pytest.mark.full
def test_out_of_memory_under_fsdp_says_that_the_step_is_lost(tiny_base: Path, tmp_path: Path) -> None:
    found = two(tmp_path / "two", tiny_base, FSDP, exhausted=1)
    assert found.told[1]["error"].startswith("OutOfMemory: process 1 of 2 ran out of memory in step 2; under FSDP")
    assert found.told[0]["error"].startswith("TrainingError: another process of this run has ended")


@pytest.mark.full
def test_int8_under_fsdp_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    found = two(tmp_path / "two", tiny_base, FSDP, quant={"bits": 8})
    for told in found.told:
        assert told["error"].startswith("BackboneError: int8 under FSDP")
        assert told["rows"] == []


@pytest.mark.full
@pytest.mark.parametrize("launcher", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_recipe_in_two_processes_writes_once(tiny_base: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """One run folder, one version, one voice; and the adapter is one that PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"q {i}", "completion": f"answer {7 * i}"}) + "\n" for i in range(16))
    )
    places = {f"PEFTKIT_{name.upper()}": str(tmp_path / name) for name in ("registry", "runs", "cache")}
    settings = [
        f"base={tiny_base}", f"data.train={data}", "data.held_out_share=0.25", "adapter.r=4", "train.max_steps=3",
        "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2", "evaluate.max_generated_rows=2",
        "evaluate.max_new_tokens=3", "evaluate.retention_passages=1", "train.eval_steps=1",
    ]  # fmt: skip
    done = accelerate(launcher, "-m", "peftkit", "train", "qlora_sft", *settings, **places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved as qlora-sft@") == 1
    assert done.stdout.count("  processes: 2  (base") == 1
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    losses = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 3
    (version,) = (tmp_path / "registry" / "qlora-sft" / "versions").iterdir()
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    loaded = PeftModel.from_pretrained(model, version)
    trained = [value for name, value in loaded.state_dict().items() if "lora_B" in name]
    assert trained
    assert all(float(value.abs().max()) > 0 for value in trained)
    kept = Checkpoints(run / "checkpoints")
    bound = kept.load(kept.steps()[-1]).state["bound_to"]["processes"]
    assert bound == {"number": 2, "base": "sharded (FSDP)" if launcher == FSDP else "replicated (DDP)"}


# -- in this process


@given(lengths=st.lists(st.integers(1, 4096), min_size=1, max_size=64), size=st.integers(1, 9))
def test_shares_are_disjoint_complete_and_balanced(lengths: list[int], size: int) -> None:
    shares = Team(ProcessGroup(size=size)).shares(lengths)
    assert len(shares) == size
    assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    # Dealt from the longest down, one process is never more than the longest row ahead of another.
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_alone_nothing_is_exchanged() -> None:
    alone = Team(ProcessGroup())
    assert alone.shares([5, 3, 9]) == [[0, 1, 2]]
    assert (alone.any(True), alone.any(False), alone.total(2.5), alone.most(2.5)) == (True, False, 2.5, 2.5)
    assert (alone.gather("x"), alone.first("x"), alone.weight) == (["x"], "x", 1)


def test_processes_that_differ_are_told_in_what() -> None:
    class Two(Team):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "rows": "others"}]

    with pytest.raises(TrainingError, match=r"the same rows \(process 0: mine, process 1: others\)"):
        Two(ProcessGroup(size=2)).agree({"settings": 1, "rows": "mine"})


def test_a_group_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher said two, and one came."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(parallel, "take_over", lambda: ProcessGroup(0, 2, 0))
        with pytest.raises(TrainingError, match="the launcher started 2 processes, and 1 found one another"):
            parallel.team()
    finally:
        dist.destroy_process_group()


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


def test_what_a_launcher_says() -> None:
    assert read_launcher({}) == ProcessGroup()
    assert read_launcher({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) == ProcessGroup()
    assert read_launcher(LAUNCHED) == ProcessGroup(1, 2, 1)
    assert (read_launcher(LAUNCHED).leads, read_launcher({**LAUNCHED, "RANK": "0"}).leads) == (False, True)
    sharded = {**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert read_launcher(sharded) == ProcessGroup(1, 2, 1, sharded=True)
    assert not read_launcher({**sharded, "FSDP_RESHARD_AFTER_FORWARD": "false"}).reshard
    assert (process_name({}), process_name(LAUNCHED)) == ("", ", process 1 of 2")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "do not name one of several processes"),
        ({**LAUNCHED, "RANK": "2"}, "do not name one of several processes"),
        ({**LAUNCHED, "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({**LAUNCHED, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**LAUNCHED, "ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        (
            {**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "host memory",
        ),
        (
            {**LAUNCHED, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "activation checkpointing",
        ),
    ],
)
def test_what_peftkit_does_not_do_is_refused_by_name(variables: dict[str, str], named: str) -> None:
    with pytest.raises(RunError, match=named) as caught:
        read_launcher(variables)
    assert caught.value.hint


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(TrainingError, match="a step has 3 rows, and there are 4 processes"):
        _check_team(Team(ProcessGroup(size=4)), TrainSpec(per_device_train_batch_size=3))
    with pytest.raises(TrainingError, match="adamw_8bit"):
        _check_team(Team(ProcessGroup(size=2, sharded=True)), TrainSpec(optim="adamw_8bit"))


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on a machine with two GPUs, as torch would describe it."""
    from peftkit.backbone import decide
    from peftkit.backbone.spec import QuantSpec

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(decide, "launched", lambda: ProcessGroup(3, 4, 3))
    with pytest.raises(BackboneError, match="process 3 of this machine has no GPU of its own: torch sees 2"):
        decide.place(QuantSpec())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_bytes_held_as_numbers_mean_the_same_weights(
    tuned: Make, dtype: torch.dtype, double_quant: bool
) -> None:
    """What FSDP needs changes the dtype that 4-bit weights are held in, and not one bit of what they stand for."""
    from peftkit.backbone.contain import quantized_linears
    from peftkit.backbone.quantize import footprint

    model = tuned(bits=4, double_quant=double_quant).model
    ids = torch.arange(3, 40).unsqueeze(0)
    layers = quantized_linears(model)
    before = {name: dense_weight(layer).clone() for name, layer in layers.items()}
    bytes_before, logits = footprint(model), model(input_ids=ids).logits
    assert hold_packed_bytes_as(dtype, model) == len(layers) == 14
    assert {layer.weight.dtype for layer in layers.values()} == {dtype}
    assert [name for name, layer in layers.items() if not torch.equal(dense_weight(layer), before[name])] == []
    assert footprint(model) == bytes_before
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert hold_packed_bytes_as(dtype, model) == 0
