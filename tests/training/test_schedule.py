"""Which rows each step sees, decided before the first one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.training.sft import schedule
from peftkit.training.spec import MEMORY_PRESETS, TrainSpec


def made(count: int, length: int = 4) -> list[Example]:
    return [Example([5] * (length + i % 3), [5] * (length + i % 3), 0, i, str(i)) for i in range(count)]


@given(
    count=st.integers(1, 40),
    epochs=st.integers(1, 4),
    size=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_row_equally_often(count: int, epochs: int, size: int, accumulation: int, seed: int) -> None:
    spec = TrainSpec(
        num_train_epochs=epochs,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        seed=seed,
    )
    examples = made(count)
    plan = schedule(examples, spec)
    seen = Counter(row for step in plan.steps for row in step)
    assert seen == dict.fromkeys(range(count), epochs)
    assert {len(step) for step in plan.steps[:-1]} <= {size * accumulation}
    assert plan.tokens == sum(len(examples[row].input_ids) for step in plan.steps for row in step)
    # each pass over the data is complete before the next begins
    order = [row for step in plan.steps for row in step]
    assert all(sorted(order[at : at + count]) == list(range(count)) for at in range(0, len(order), count))


@given(st.integers(1, 30), st.integers(1, 25), st.integers(1, 6))
def test_max_steps_decides_whatever_the_epochs_say(count: int, steps: int, size: int) -> None:
    spec = TrainSpec(max_steps=steps, num_train_epochs=0.01, per_device_train_batch_size=size)
    plan = schedule(made(count), spec)
    assert [len(step) for step in plan.steps] == [size] * steps
    seen = Counter(row for step in plan.steps for row in step)
    assert max(seen.values()) - min(seen.get(row, 0) for row in range(count)) <= 1


@given(st.integers(20, 400))
def test_max_tokens_is_never_exceeded_and_nearly_used(limit: int) -> None:
    examples, spec = made(50), TrainSpec(per_device_train_batch_size=3, num_train_epochs=5)
    plan = schedule(examples, spec.model_copy(update={"max_tokens": limit}))
    free = schedule(examples, spec)
    assert plan.tokens <= limit
    assert plan.steps == free.steps[: len(plan)], "the limit cuts the same order short"
    if len(plan) < len(free):
        assert plan.tokens + sum(len(examples[row].input_ids) for row in free.steps[len(plan)]) > limit


def test_less_tokens_than_a_step() -> None:
    with pytest.raises(TrainingError, match=r"train\.max_tokens=10 is less than the first step of 8 rows"):
        schedule(made(20), TrainSpec(max_tokens=10))


def test_the_seed_decides() -> None:
    examples = made(30)
    assert schedule(examples, TrainSpec(seed=1)) == schedule(examples, TrainSpec(seed=1))
    assert schedule(examples, TrainSpec(seed=1)).steps != schedule(examples, TrainSpec(seed=2)).steps


def test_the_split_into_micro_batches_does_not_change_the_order() -> None:
    examples = made(30)
    specs = [TrainSpec(per_device_train_batch_size=size, gradient_accumulation_steps=12 // size) for size in (1, 3, 12)]
    assert len({schedule(examples, spec).steps for spec in specs}) == 1


def test_epochs_may_be_a_fraction() -> None:
    plan = schedule(made(10), TrainSpec(num_train_epochs=0.5, per_device_train_batch_size=5))
    assert len({row for step in plan.steps for row in step}) == 5
    assert len(schedule(made(10), TrainSpec(num_train_epochs=0.001))) == 1


def test_presets_keep_the_effective_batch() -> None:
    prefix = "train."
    specs: list[TrainSpec] = [
        TrainSpec(**{key.removeprefix(prefix): value for key, value in preset.items() if key.startswith(prefix)})
        for preset in MEMORY_PRESETS.values()
    ]
    assert set(MEMORY_PRESETS) == {"cpu", "8gb", "12gb", "24gb"}
    assert {spec.rows_per_step for spec in specs} == {16}
