"""Hand-made preferences with known labels, and an adapter whose matrices are not zero."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from peftkit.data.chat import IGNORED, Example
from peftkit.data.preference.encode import mismatched
from peftkit.data.preference.example import PreferenceExample


def _sequence(prompt: list[int], answer: list[int], row: int) -> Example:
    labels = [IGNORED] * len(prompt) + answer
    return Example(prompt + answer, labels, len(prompt), row, f"made.jsonl:{row + 1}")


@pytest.fixture(scope="session")
def preferences() -> Callable[..., list[PreferenceExample]]:
    """Preferences of given (prompt, chosen, rejected) lengths; `labelled` makes every other answer an unwanted one."""

    def make(
        shapes: Sequence[tuple[int, int, int]], *, labelled: bool = False, seed: int = 0
    ) -> list[PreferenceExample]:
        draw = random.Random(seed)

        def drawn(length: int) -> list[int]:
            return [draw.randrange(3, 259) for _ in range(length)]

        made = []
        for row, (asked, better, worse) in enumerate(shapes):
            prompt = drawn(asked)
            chosen, rejected = _sequence(prompt, drawn(better), row), _sequence(prompt, drawn(worse), row)
            one = PreferenceExample(chosen, desirable=row % 2 == 0) if labelled else PreferenceExample(chosen, rejected)
            made.append(one)
        return mismatched(made, 0, None) if labelled else made

    return make


@pytest.fixture
def adapted(tuned: Callable[..., Any]) -> Callable[..., Any]:
    """As `tuned`, and the adapter does something: B is drawn too."""

    def make(**settings: Any) -> Any:
        made = tuned(**settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.trainable.values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return made

    return make
