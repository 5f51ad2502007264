"""Questions and contexts → windows in which the answer is a first and a last token."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.tasks.encoding import Encoding, Policy
from peftkit.data.tasks.pieces import Pieces, tokenize
from peftkit.data.tasks.problems import Problems, shown
from peftkit.data.tasks.task import Answer, TaskExample, TaskRow
from peftkit.data.tasks.windows import windows

NULL = 0
"""The position that stands for "no answer": [CLS] on encoders; never one of the context, as the question goes first."""


def encode_spans(
    rows: Sequence[TaskRow], tokenizer: Tokenizer, policy: Policy, found: Encoding, *, labelled: bool
) -> None:
    """Windows over every row's context, each after the whole question; the first of several answers is the target.

    A row that is cut before its answer ends is dropped. Raises DataError for a question that leaves no room, and for
    an answer that no window holds whole: taught as they are, such windows would say that there is none.
    """
    problems = Problems("questions")
    pieces = tokenize(tokenizer, [row.pair or "" for row in rows], [row.text for row in rows])
    for at, (row, whole) in enumerate(zip(rows, pieces, strict=True)):
        where = str(row.where)
        if found.refused(where, len(whole.ids), policy):
            continue
        try:
            over = _windows(whole, policy)
        except ValueError as error:
            problems.add(where, f"the question and special tokens take {len(whole.ids) - len(whole.second)}: {error}")
            continue
        answer = answer_tokens(row.target[0], whole) if labelled and row.target else None
        if labelled and row.target and answer is None:
            found.unseen[where] = f"{row.target[0].text!a}"
            found.dropped[where] = None
            continue
        held = answer is None or any(answer.start in window and answer[-1] in window for window in over)
        cut = policy.over(len(whole.ids)) and policy.too_long == "truncate"
        if cut:
            (found.truncated if held else found.dropped)[where] = None
        if held:
            found.examples += [_example(whole, window, answer, at, where, labelled) for window in over]
        elif not cut and answer is not None:
            text = shown(row.target[0].text)
            problems.add(where, f"the answer {text} of {len(answer)} tokens is in no window as a whole")
    hint = "set data.max_length higher, or data.stride to the tokens of the longest answer"
    problems.refuse(len(rows), "windows that hold every question and answer whole", hint)


def answer_tokens(answer: Answer, whole: Pieces) -> range | None:
    """The tokens of the context that hold an answer, counted from the context's first; None where none does."""
    end = answer.start + len(answer.text)
    spans = [whole.offsets[at] for at in whole.second]
    inside = [at for at, span in enumerate(spans) if span[0] < span[1] and span[0] < end and span[1] > answer.start]
    return range(inside[0], inside[-1] + 1) if inside else None


def _windows(whole: Pieces, policy: Policy) -> list[range]:
    length = len(whole.second)
    room = length if policy.length is None else policy.length - (len(whole.ids) - length)
    if room < 1:
        raise ValueError(f"no room for the context within {policy.length}")
    if policy.too_long == "truncate" and room < length:
        return [range(room)]
    return windows(length, room, policy.stride)


def _example(whole: Pieces, window: range, answer: range | None, at: int, where: str, labelled: bool) -> TaskExample:
    body = whole.second
    kept = whole.keep(whole.first, body[window.start : window.stop])
    ids, types = whole.take(kept)
    offsets = tuple(whole.offsets[position] if position in body else (0, 0) for position in kept)
    target: tuple[float, ...] = (NULL, NULL) if labelled else ()
    if answer is not None and answer.start in window and answer[-1] in window:
        shift = body.start - window.start
        target = (answer.start + shift, answer[-1] + shift)
    return TaskExample(ids, target, at, where, types, offsets=offsets)
