"""Keys and values of a sweep's command line: what they mean, and everything that is wrong with them at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import ConfigError
from peftkit.recipe import find, load
from peftkit.recipe.sweeping.plan import read_plan
from peftkit.recipe.sweeping.space import Choices, Range, Space, read_space, space_of

CONFIG = load(find("lora_sft")).config


def one(argument: str) -> Choices | Range | str:
    space, problems = read_space(CONFIG, [argument])
    assert problems == []
    (found,) = space.dimensions or space.fixed
    return found


@pytest.mark.parametrize(
    ("argument", "means"),
    [
        ("learning_rate=1e-5..1e-3", Range("train.learning_rate", 1e-5, 1e-3, True, False)),
        ("train.learning_rate=1e-5..1e-3:linear", Range("train.learning_rate", 1e-5, 1e-3, False, False)),
        ("lora_dropout=0..0.3", Range("adapter.lora_dropout", 0.0, 0.3, False, False)),
        ("lora_dropout=0.1..0.3:log", Range("adapter.lora_dropout", 0.1, 0.3, True, False)),
        ("r=4..64", Range("adapter.r", 4.0, 64.0, True, True)),
        ("r=4..8", Range("adapter.r", 4.0, 8.0, False, True)),
        ("warmup_ratio=.01...1", Range("train.warmup_ratio", 0.01, 0.1, True, False)),
        ("r=4,8,16", Choices("adapter.r", ("4", "8", "16"))),
        ("bases=a/one,b/two", Choices("base.source", ("a/one", "b/two"))),
        ("base=a/one,b/two", Choices("base.source", ("a/one", "b/two"))),
        ("target_modules=[q,v],all-linear", Choices("adapter.target_modules", ("[q,v]", "all-linear"))),
        ('instructions="Be brief, please",none', Choices("evaluate.instructions", ("Be brief, please", "none"))),
        ("target_modules=[q_proj,v_proj]", "adapter.target_modules=[q_proj,v_proj]"),
        ("instructions=Don't, please", Choices("evaluate.instructions", ("Don't", "please"))),
        ("num_train_epochs=2", "train.num_train_epochs=2"),
        ("data.train=../rows.jsonl", "data.train=../rows.jsonl"),
        ("layerwise.decay=0.9", "train.layerwise.decay=0.9"),
        ("data.template_kwargs.enable_thinking=false", "data.template_kwargs.enable_thinking=false"),
    ],
)  # fmt: skip
def test_what_an_argument_means(argument: str, means: Choices | Range | str) -> None:
    assert one(argument) == means


def test_a_comma_in_the_name_of_a_file_is_no_choice(tmp_path: Path) -> None:
    file = tmp_path / "a,b.jsonl"
    assert one(f"data.train={file}") == Choices("data.train", tuple(str(file).split(",")))
    file.touch()
    assert one(f"data.train={file}") == f"data.train={file}"


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("learning_rat=1,2", "learning_rat: unknown setting; did you mean train.learning_rate"),
        ("seed=1,2", "seed: may be adapter.seed, data.seed or train.seed; write it whole"),
        ("adapter=1,2", "adapter: a group of settings; name one of them, such as adapter.method"),
        ("r", "'r': a setting is written key=value"),
        ("=1", "'=1': a setting is written key=value"),
        ("r=4,,8", "adapter.r: an empty value stands among the choices"),
        ("r=4,8,4", "adapter.r: 4 stands twice"),
        ("r=8..4", "the first end must be below the second"),
        ("r=4..4", "the first end must be below the second"),
        ("r=1e400..1e500", "adapter.r: takes whole numbers"),
        ("learning_rate=0..1:log", "has no logarithm"),
        ("learning_rate=1..2:cubic", "may end in :log or :linear"),
        ("r=1.5..3", "takes whole numbers, and 1.5..3 has other ends"),
        ("format=1..2", "takes no numbers, so 1..2 is no range"),
    ],
)
def test_what_cannot_be_meant(argument: str, problem: str) -> None:
    space, problems = read_space(CONFIG, [argument])
    assert space == Space((), ())
    (found,) = problems
    assert problem in found


def test_all_problems_are_named_at_once() -> None:
    wrong = [
        "learning_rat=1",
        "seed=1,2",
        "init_r=8..4",
        "r=0,4",
        "weight_decay=-1..1",
        "lora_dropout=0.1,1.5",
        "format=x,alpaca",
    ]
    with pytest.raises(ConfigError) as caught:
        read_plan("lora_sft", [*wrong, "save_as=mine"], metric="score")
    found = caught.value.problems
    starts = [
        "learning_rat:",
        "seed:",
        "adapter.init_r: 8..4",
        "metric 'score'",
        "save_as:",
        "adapter.r: must be at least 1",
        "data.format: must be one of",
        "train.weight_decay: must be at least 0",
        "adapter.lora_dropout: must be at least 0 and less than 1",
    ]
    assert [[start for start in starts if problem.startswith(start)] for problem in found] == [[s] for s in starts]


def test_of_many_problems_twenty_are_shown_and_all_are_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        read_plan("lora_sft", [f"nothing{i}=1" for i in range(25)])
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "… and 5 more"


def test_a_key_given_twice_is_refused_under_any_spelling() -> None:
    _, problems = read_space(CONFIG, ["r=4,8", "adapter.r=16"])
    assert problems == ["adapter.r: given twice"]


def test_values_that_contradict_only_each_other_are_found() -> None:
    """Each is right beside the first value of the other."""
    plan = ["lr_scheduler_type=cosine,constant", "warmup_ratio=0.03,0.2"]
    with pytest.raises(ConfigError, match=r"constant has no warm-up, and warmup_ratio=0\.2 would be ignored"):
        read_plan("lora_sft", plan)


def test_a_sweep_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is searched"):
        read_plan("lora_sft", ["r=4"])


def test_a_space_is_read_back_from_its_record() -> None:
    space, _ = read_space(CONFIG, ["r=4,8", "learning_rate=1e-5..1e-3", "max_steps=3", "top_layers=1..30"])
    assert space_of(space.record()) == space
    assert space.size == math.inf
    assert read_space(CONFIG, ["r=4,8", "top_layers=1..30"])[0].size == 60


ends = st.floats(min_value=1e-30, max_value=1e30)


@given(ends, ends, st.booleans(), st.floats(min_value=0, max_value=1))
def test_a_value_is_used_as_it_is_written(one: float, other: float, log: bool, share: float) -> None:
    low, high = sorted((one, other))
    if not low < high:
        return
    dimension = Range("x", low, high, log, False)
    text = dimension.text(low + (high - low) * share)
    assert dimension.holds(text)
    assert dimension.text(float(text)) == text
    assert all(dimension.holds(end) for end in (*dimension.tried_first, dimension.middle))


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.booleans(), st.floats(min_value=0, max_value=1))
def test_a_whole_number_stays_one(low: int, more: int, log: bool, share: float) -> None:
    dimension = Range("x", low, low + more, log, True)
    text = dimension.text(low + more * share)
    assert text == str(int(text))
    assert dimension.holds(text)
