"""Whole texts: classification and regression, and texts that become other texts."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.tasks.encoding import Encoding, Policy
from peftkit.data.tasks.pieces import Pieces, tokenize
from peftkit.data.tasks.task import TaskExample, TaskRow


def target_of(row: TaskRow, head: Head) -> tuple[float, ...]:
    """What a sequence or image head is to give: index of the label, 0 or 1 for every label, or the number."""
    if head.problem == "regression":
        return (float(row.target),)
    if head.problem == "multi_label":
        return tuple(float(label in row.target) for label in head.labels)
    return (head.labels.index(row.target),)


def encode_texts(
    rows: Sequence[TaskRow], head: Head, tokenizer: Tokenizer, policy: Policy, found: Encoding, *, labelled: bool
) -> None:
    """A sequence for every row; a row that is cut loses the end of its longer text."""
    pieces = tokenize(tokenizer, [row.text for row in rows], [row.pair for row in rows])
    for at, (row, whole) in enumerate(zip(rows, pieces, strict=True)):
        where = str(row.where)
        if found.refused(where, len(whole.ids), policy):
            continue
        if policy.over(len(whole.ids)):
            found.truncated[where] = None
        ids, types = whole.take(_cut(whole, policy.length))
        target = target_of(row, head) if labelled else ()
        found.examples.append(TaskExample(ids, target, at, where, types))


def encode_pairs_of_texts(
    rows: Sequence[TaskRow],
    tokenizer: Tokenizer,
    policy: Policy,
    found: Encoding,
    instruction: str | None,
    *,
    labelled: bool,
) -> None:
    """A source and a target for every row; a source that is cut keeps its special tokens, a target loses its eos.

    A cut target without eos teaches no false end; a tokenizer that names no eos ends targets as its template does.
    """
    asked = f"{instruction} " if instruction else ""
    sources = tokenize(tokenizer, [asked + row.text for row in rows])
    eos = tokenizer.hf.eos_token_id
    for at, (row, whole) in enumerate(zip(rows, sources, strict=True)):
        where, target = str(row.where), ()
        if labelled:
            ids = tokenizer.hf(text_target=row.target, verbose=False)["input_ids"]
            target = tuple(ids if eos is None or ids[-1:] == [eos] else [*ids, eos])
        longest = max(len(whole.ids), len(target))
        if found.refused(where, longest, policy):
            continue
        if policy.over(longest):
            found.truncated[where] = None
        ids, types = whole.take(_cut(whole, policy.length))
        found.examples.append(TaskExample(ids, target[: policy.length], at, where, types, per_token=True))


def _cut(whole: Pieces, length: int | None) -> list[int]:
    """The positions that are left within so many tokens: the longer text is shortened first, from its end."""
    first, second = len(whole.first), len(whole.second)
    over = 0 if length is None else max(0, len(whole.ids) - length)
    for _ in range(min(over, first + second)):
        if first > second:
            first -= 1
        else:
            second -= 1
    return whole.keep(whole.first[:first], whole.second[:second])
