"""What stands on a base in place of its language head: the kind of a task's head, and the labels it tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peftkit.errors import BaseError

NO_ANSWER = "no answer"
"""The one label that a span head may have: some of the questions it learned from have no answer."""
HeadKind = Literal["sequence", "token", "span", "image", "seq2seq"]
Problem = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class Head:
    """A task's head: what it looks at, and what its outputs mean.

    `sequence` and `image` give one row of scores per input, `token` one per token, `span` a start and an end score per
    token, `seq2seq` is the decoder of an encoder-decoder base and has no labels.
    """

    kind: HeadKind
    labels: tuple[str, ...] = ()
    """Names of the outputs, in their order. A regression has one, the name of its column; a span head none, or
    NO_ANSWER."""
    problem: Problem = "single_label"
    """Of `sequence` and `image`: exactly one label, any number of labels, or numbers."""

    def record(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {"kind": self.kind, "labels": list(self.labels), "problem": self.problem}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Head:
        """The head that a manifest speaks of. Raises BaseError for a record that is none."""
        kind: Any = record.get("kind")
        problem: Any = record.get("problem", "single_label")
        labels = record.get("labels", [])
        names = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        if kind not in get_args(HeadKind) or problem not in get_args(Problem) or not names:
            raise BaseError(f"{dict(record)!r:.200} describes no head", expected="kind, labels and problem")
        return cls(kind, tuple(labels), problem)
