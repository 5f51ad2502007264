"""A request that cannot be answered is refused with everything that is wrong with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from peftkit.errors import ConfigError
from peftkit.generation.check import check
from peftkit.generation.requests import Request, Sampling

GOOD = Request((1, 2, 3))

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampling": Sampling(temperature=-0.1)}, "temperature is -0.1"),
    ({"sampling": Sampling(temperature=math.nan)}, "temperature is nan"),
    ({"sampling": Sampling(temperature=math.inf)}, "temperature is inf"),
    ({"sampling": Sampling(top_p=0.0)}, "top_p is 0.0"),
    ({"sampling": Sampling(top_p=1.1)}, "top_p is 1.1"),
    ({"sampling": Sampling(top_p=math.nan)}, "top_p is nan"),
    ({"sampling": Sampling(top_k=-1)}, "top_k is -1"),
    ({"sampling": Sampling(seed=2**64)}, "seed is 18446744073709551616"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"stop": ("\n", "")}, "a stop string is empty"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 101}, "logprobs is 101: take 0 to 100"),
    ({"prompt": ()}, "the prompt is empty"),
    ({"prompt": (5, 100, -1)}, "prompt has ids outside the vocabulary of 100 tokens: 100, -1"),
    ({"prompt": tuple(range(200, 210))}, "200, 201, 202, 203, 204 and 5 more"),
    ({"prompt": (1,) * 32}, "the prompt has 32 tokens: take fewer than 32"),
    ({"stop_ids": (100,)}, "stop_ids has ids outside the vocabulary of 100 tokens: 100"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_each_setting_out_of_range_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(replace(GOOD, **change), 100, 32)
    assert len(caught.value.problems) == 1
    assert named in caught.value.problems[0]


def test_all_problems_are_named_at_once() -> None:
    bad = Request((), max_new_tokens=0, sampling=Sampling(-1.0, top_p=2.0, top_k=-1), stop=("",), logprobs=-1)
    with pytest.raises(ConfigError) as caught:
        check(bad, 100)
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sampling": Sampling(temperature=1e-9, top_p=1.0, top_k=1000, seed=-1)},
        {"sampling": Sampling(temperature=2.0, top_p=1e-6, seed=2**64 - 1)},
        {"logprobs": 0, "max_new_tokens": 1},
        {"logprobs": 100, "stop": ("x",), "stop_ids": (0, 99)},
        {"prompt": (0, 99)},
        {"prompt": (1,) * 31},
    ],
)
def test_what_can_be_answered_passes(change: dict[str, Any]) -> None:
    check(replace(GOOD, **change), 100, 32)


def test_without_positions_a_prompt_may_be_of_any_length() -> None:
    check(replace(GOOD, prompt=(1,) * 10_000), 100)
