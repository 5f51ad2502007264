"""Plans of a task's head and of preferences, against what a real step and real measuring hold."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from headed_lab import HEADS, examples
from plan_lab import CLOSE, check_terms, planned_terms, step_terms
from tiny_bases import write_base

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec, read_config
from peftkit.data.chat import IGNORED, Example
from peftkit.data.preference.example import PreferenceExample
from peftkit.planning.architecture import Architecture, TaskHead, architecture
from peftkit.planning.evaluation import measuring
from peftkit.planning.fit import fit
from peftkit.planning.memory import plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.time import Workload, cpu, measuring_seconds, plan_time, training_flops
from peftkit.planning.weights import trained_parameters
from peftkit.recipe.setting import what_is_trained
from peftkit.training.course import MEASURED_AT_ONCE
from peftkit.training.ledger import Ledger
from peftkit.training.memory import checkpoint_activations
from peftkit.training.objective import objective
from peftkit.training.passes.head import LOGITS_BYTES
from peftkit.training.preference.paths import preference_paths
from peftkit.training.preference.reference import reference_scored
from peftkit.training.preference.spec import PreferenceTrainSpec
from peftkit.training.spec import TrainSpec
from peftkit.training.tasks.paths import task_paths
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.partial import dense_layers
from peftkit.tuning.tuned import Tuned

ROWS, TOKENS = 2, 64
SHAPE = {"num_hidden_layers": 5, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
WIDE = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 49152}
"""The logits of a chunk are what limits it."""
TASKS = {"sequence": TaskHead("sequence", 3), "token": TaskHead("token", 3), "span": TaskHead("span", 2),
         "several": TaskHead("sequence", 3), "number": TaskHead("sequence", 1),
         "many": TaskHead("sequence", 3000)}  # fmt: skip
LOADED = {**HEADS, "many": Head("sequence", tuple(map(str, range(3000))))}
WAYS: list[tuple[dict[str, Any], int, bool]] = [
    ({"method": "lora", "r": 8}, 32, False), ({"method": "lora", "r": 8}, 4, True),
    ({"method": "dora", "r": 8}, 4, False), ({"method": "lora", "r": 8, "layers": "top:2"}, 32, False),
    ({"method": "top_layers", "top_layers": 2}, 4, False), ({"method": "top_layers", "top_layers": 0}, 32, False),
    ({"method": "full"}, 32, False), ({"method": "norms"}, 32, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "llama", **SHAPE)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "wide", **WIDE)


def tuned_on(
    folder: Path, cache: Path, values: dict[str, Any], bits: int, head: str | None = None, compute: str = "float32"
) -> Tuned:
    spec = AdapterSpec(**values)
    quant = QuantSpec(bits=bits, compute_dtype=compute, device="cpu")  # type: ignore[arg-type]
    given: dict[str, Any] = {"head": LOADED[head] if head else None, "dense": dense_layers(spec)}
    return inject(load_backbone(BaseSpec(source=str(folder)), quant, cache, **given), spec)


def setting_of(base: Architecture, values: dict[str, Any], bits: int, checkpointing: bool, **more: Any) -> Setting:
    given = {"longest": TOKENS, "labelled": TOKENS, "micro_batch": ROWS, "rows_per_step": ROWS, "max_new_tokens": 0,
             "evaluation_batch": 1, "compute_dtype": "float32", "dtype": "float32", **more}  # fmt: skip
    trained = what_is_trained(base, AdapterSpec(**values))
    return Setting(**trained, bits=bits, gradient_checkpointing=checkpointing, device="cpu", **given)  # type: ignore[arg-type]


def check_task(
    folder: Path, head: str, values: dict[str, Any], bits: int, checkpointing: bool, cache: Path,
    compute: str = "float32",
) -> None:  # fmt: skip
    base = architecture(read_config(folder)).with_task(TASKS[head])
    tuned = tuned_on(folder, cache, values, bits, head, compute)
    if checkpointing:
        checkpoint_activations(tuned, None)
    rows = examples("sequence" if head == "many" else head, [TOKENS] * ROWS)
    paths = task_paths(tuned, TrainSpec(), rows)
    real = step_terms(tuned, rows, objective(tuned, TrainSpec().regularize, paths), paths)
    setting = setting_of(base, values, bits, checkpointing, compute_dtype=compute, dtype=compute)
    check_terms(planned_terms(base, setting), real)
    assert trained_parameters(base, setting) == sum(each.numel() for each in tuned.trainable.values())


@pytest.mark.parametrize(
    ("head", "way"), [("sequence", 0), ("sequence", 4), ("token", 1), ("token", 6), ("span", 5), ("many", 5)]
)
def test_a_step_under_a_tasks_head_holds_what_was_planned(folder: Path, head: str, way: int, tmp_path: Path) -> None:
    check_task(folder, head, *WAYS[way], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("head", TASKS)
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_every_way_under_every_head_does(folder: Path, head: str, way: int, tmp_path: Path) -> None:
    check_task(folder, head, *WAYS[way], tmp_path)


@pytest.mark.parametrize(("head", "way"), [("token", 0), ("sequence", 4)])
def test_16_bit_products_under_a_tasks_head(folder: Path, head: str, way: int, tmp_path: Path) -> None:
    values, _, checkpointing = WAYS[way]
    check_task(folder, head, values, 16, checkpointing, tmp_path, compute="bfloat16")


def test_an_untied_base_under_a_tasks_head(tmp_path: Path) -> None:
    base = write_base(tmp_path / "untied", **SHAPE, tie_word_embeddings=False)
    check_task(base, "number", *WAYS[6], tmp_path / "cache")


@pytest.mark.parametrize("head", TASKS)
def test_measuring_under_a_tasks_head_holds_what_was_planned(folder: Path, head: str, tmp_path: Path) -> None:
    tuned = tuned_on(folder, tmp_path, {"method": "lora", "r": 8}, 32, head)
    tuned.model.eval()
    rows = examples("sequence" if head == "many" else head, [TOKENS] * 4)
    paths = task_paths(tuned, TrainSpec(), rows)
    with Ledger(tuned.model) as ledger:
        paths.measure(tuned.model, rows, pad_id=2, device=torch.device("cpu"), batch_size=4)
    base = architecture(read_config(folder)).with_task(TASKS[head])
    setting = replace(setting_of(base, {"method": "lora", "r": 8}, 32, False), evaluation_batch=4)
    planned = measuring(base, replace(setting, evaluation_longest=TOKENS)).expected
    assert planned == pytest.approx(ledger.account().peak, rel=2 * CLOSE)


def sequence(draw: random.Random, length: int) -> Example:
    ids, start = [draw.randrange(3, 259) for _ in range(length)], length // 4
    return Example(ids, [IGNORED] * start + ids[start:], start, 0, "made:1")


def preferences(loss: str, count: int, length: int) -> list[PreferenceExample]:
    """Rows of `length` tokens in all, as they are when the base has scored them."""
    draw, known = random.Random(0), {"reference": (-1.0, -1.0), "divergence": 0.0}
    if loss == "kto":
        sides = [(sequence(draw, length), sequence(draw, length)) for _ in range(count)]
        return [PreferenceExample(one, desirable=True, mismatched=two, **known) for one, two in sides]  # type: ignore[arg-type]
    sides = [(sequence(draw, length // 2), sequence(draw, length // 2)) for _ in range(count)]
    return [PreferenceExample(one, two, **known) for one, two in sides]  # type: ignore[arg-type]


def check_preferences(
    folder: Path, loss: str, values: dict[str, Any], bits: int, checkpointing: bool, cache: Path, rows: int = ROWS,
    compute: str = "float32",
) -> None:  # fmt: skip
    base = architecture(read_config(folder))
    tuned = tuned_on(folder, cache, values, bits, compute=compute)
    if checkpointing:
        checkpoint_activations(tuned, None)
    train = PreferenceTrainSpec(loss=loss)  # type: ignore[arg-type]
    paths = preference_paths(tuned, train)
    given = preferences(loss, rows, 2 * TOKENS)
    real = step_terms(tuned, given, objective(tuned, train.regularize, paths), paths)
    sizes: dict[str, Any] = {"compute_dtype": compute, "dtype": compute}
    sizes |= {"longest": 2 * TOKENS, "labelled": 2 * TOKENS * 3 // 4, "micro_batch": rows, "rows_per_step": rows}
    check_terms(
        planned_terms(base, setting_of(base, values, bits, checkpointing, compares_answers=True, **sizes)), real
    )


@pytest.mark.parametrize(("loss", "way"), [("dpo", 0), ("dpo", 6), ("orpo", 4), ("kto", 1)])
def test_a_step_of_preferences_holds_what_was_planned(folder: Path, loss: str, way: int, tmp_path: Path) -> None:
    check_preferences(folder, loss, *WAYS[way], tmp_path)


@pytest.mark.parametrize("values", [{"method": "lora", "r": 8}, {"method": "full"}], ids=lambda each: each["method"])
def test_logits_of_preferences_are_those_of_a_chunk(wide: Path, values: dict[str, Any], tmp_path: Path) -> None:
    check_preferences(wide, "dpo", values, 32, False, tmp_path, rows=4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_16_bit_products_of_preferences(wide: Path, loss: str, tmp_path: Path) -> None:
    check_preferences(wide, loss, {"method": "lora", "r": 8}, 16, False, tmp_path, rows=4, compute="bfloat16")


@pytest.mark.parametrize(("loss", "sequences"), [("dpo", 2), ("kto", 1)])
def test_preferences_in_mid_run_hold_what_was_planned(folder: Path, loss: str, sequences: int, tmp_path: Path) -> None:
    tuned, rows = tuned_on(folder, tmp_path, {"method": "lora", "r": 8}, 32), preferences(loss, 8, 2 * TOKENS)
    paths = replace(preference_paths(tuned, PreferenceTrainSpec(loss=loss)), flat=False)  # type: ignore[arg-type]
    tuned.model.eval()
    with Ledger(tuned.model) as ledger:
        paths.measure(tuned.model, rows, pad_id=2, device=torch.device("cpu"), batch_size=MEASURED_AT_ONCE)
    base = architecture(read_config(folder))
    setting = setting_of(base, {"method": "lora", "r": 8}, 32, False, compares_answers=True, evaluation_batch=2,
                         evaluation_longest=2 * TOKENS // sequences)  # fmt: skip
    at_end, mid_run = (plan_memory(base, replace(setting, compared_at_once=count)) for count in (0, sequences))
    resting = at_end.stage("evaluate").bytes.expected - measuring(base, setting).expected
    assert mid_run.stage("evaluate").bytes.expected - resting == pytest.approx(ledger.account().peak, rel=2 * CLOSE)


def test_what_the_base_gives_is_scored_a_chunk_at_a_time(wide: Path, tmp_path: Path) -> None:
    """A partial fine-tune's base is another tree of modules, with a head of its own."""
    tuned, rows = tuned_on(wide, tmp_path, {"method": "full"}, 32), preferences("dpo", 8, 2 * TOKENS)
    rows = [replace(row, reference=()) for row in rows]
    paths = preference_paths(tuned, PreferenceTrainSpec(per_device_train_batch_size=8))
    with tuned.as_base() as base, Ledger(base) as ledger:
        scored = reference_scored(tuned, rows, paths)
    assert ledger.account().peak < 2.5 * LOGITS_BYTES  # a chunk and its log-softmax; whole logits take twice as much
    plain = reference_scored(tuned, rows, replace(paths, head=None))
    assert [row.reference for row in scored] == [pytest.approx(row.reference, rel=1e-5) for row in plain]


@pytest.mark.full
@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_every_way_of_every_preference_does(folder: Path, loss: str, way: int, tmp_path: Path) -> None:
    check_preferences(folder, loss, *WAYS[way], tmp_path)


BASE = architecture(
    {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
)  # fmt: skip


def test_a_tasks_head_by_hand() -> None:
    headed = BASE.with_task(TaskHead("token", 4))
    assert BASE.parameters - headed.parameters == 128256 * 4096  # no language head is loaded
    setting = Setting(r=16, max_new_tokens=0)
    assert trained_parameters(headed, setting) - trained_parameters(BASE, setting) == 4 * 4096 + 4
    plan = plan_memory(headed, setting)
    assert plan.part("KV cache").bytes.high == 0  # nothing is generated
    assert plan.part("evaluation logits").bytes.expected == 16 * 1024 * 4 * 10
    assert training_flops(headed, setting, 1024) < training_flops(BASE, setting, 1024)


@pytest.mark.parametrize("top_layers", [0, 2])
def test_a_cached_trunk_under_a_head_by_hand(top_layers: int) -> None:
    """What stands below the lowest trained block is given back, the embedding with it: no head shares its weight."""
    headed = BASE.with_task(TaskHead("sequence", 4))
    setting = Setting(bits=16, method="top_layers", top_layers=top_layers, longest=128, max_new_tokens=0)
    plain, cached = (plan_memory(headed, replace(setting, trunk_cache=cache)) for cache in (False, True))
    blocks = 32 - top_layers
    each = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    norms = headed.norm_parameters * blocks // 32
    assert cached.part("released trunk").bytes.expected == 2 * (blocks * each + 128256 * 4096 + norms)
    assert cached.stage("train").bytes.expected < plain.stage("train").bytes.expected


def test_a_base_that_is_asked_too_is_there_twice_with_its_language_head() -> None:
    headed = BASE.with_task(TaskHead("sequence", 4))
    once, twice = (plan_memory(headed, Setting(max_new_tokens=0, asked_rows=rows, asked_tokens=640)) for rows in (0, 8))
    more = twice.stage("evaluate").bytes.expected - once.stage("evaluate").bytes.expected
    bare = plan_memory(BASE, Setting())
    held = ("linear layers", "quantization constants", "code tables", "embeddings", "head", "norms and biases")
    keys_and_values = 8 * 640 * 32 * 2 * 1024 * 2
    assert more == sum(bare.part(name).bytes.expected for name in held) + keys_and_values
    assert twice.stage("evaluate").bytes.low == once.stage("evaluate").bytes.low  # it may have no words to be asked in
    assert twice.stage("train") == once.stage("train")


def test_preferences_read_the_base_before_and_kto_reads_more_in_every_step() -> None:
    machine, setting = cpu(1e12, 1e11), Setting(device="cpu", max_new_tokens=0, compares_answers=True)
    work = Workload(steps=10, tokens_per_row=100)
    plain, dpo, kto = (
        plan_time(BASE, setting, machine, each)
        for each in (work, replace(work, tokens_before=8000.0), replace(work, read_besides=100.0))
    )
    reads = Workload(0, 0.0, held_out_rows=80, held_out_tokens=100)
    assert dpo.total.expected - plain.total.expected == pytest.approx(
        measuring_seconds(BASE, setting, machine, reads).expected
    )
    assert dpo.step == plain.step
    each = measuring_seconds(BASE, setting, machine, replace(reads, held_out_rows=setting.rows_per_step))
    assert kto.step.expected - plain.step.expected == pytest.approx(each.expected)
    assert kto.total.expected - plain.total.expected == pytest.approx(10 * each.expected)


@pytest.mark.parametrize("changes", [{}, {"compares_answers": True}], ids=["head", "preferences"])
def test_a_budget_fits_them(changes: dict[str, Any]) -> None:
    base = BASE if changes else BASE.with_task(TaskHead("sequence", 4))
    asked = Setting(longest=1024, labelled=512, micro_batch=16, evaluation_batch=64, max_new_tokens=0, **changes)
    found = fit(base, asked, 12_000_000_000)
    assert max(stage.bytes.high for stage in found.plan.stages) <= 12_000_000_000
    assert found.setting.rows_per_step == asked.rows_per_step
    assert found.decisions


def test_mid_run_pairs_are_bounded_by_their_logits() -> None:
    setting = Setting(evaluation_longest=2048, evaluation_batch=16, max_new_tokens=0, compares_answers=True)
    once, mid_run = (plan_memory(BASE, replace(setting, compared_at_once=count)).stage("evaluate") for count in (0, 2))
    assert mid_run == once  # one pair goes through at once, which is no more than the single answers take
