"""Rows of a task → sequences with their targets, under the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftkit.base.head import Head
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audited import longest_allowed
from peftkit.data.tasks.encode_spans import encode_spans
from peftkit.data.tasks.encode_texts import encode_pairs_of_texts, encode_texts, target_of
from peftkit.data.tasks.encode_words import encode_words
from peftkit.data.tasks.encoding import Encoding, Policy
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskExample, TaskRow
from peftkit.errors import ConfigError


@dataclass(frozen=True)
class Encoded:
    """The sequences of some rows, and what was lost on the way."""

    examples: tuple[TaskExample, ...]
    dropped: tuple[str, ...] = ()
    """Places of rows without a sequence: too long where such are dropped, or without a token that counts."""
    truncated: tuple[str, ...] = ()
    """Places of rows that were cut."""
    too_long: dict[str, int] = field(default_factory=dict)
    """Place of each row above the limit, with its tokens, where the policy is to raise; such rows have no sequence."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Place of each row with words that the tokenizer makes no token of, or none of their own, with these words."""


def policy_of(spec: TaskSpec, limit: int | None) -> Policy:
    """What happens to long rows of a task. Raises ConfigError for windows where a row has one answer as a whole."""
    windowed = spec.task in ("token_classification", "extractive_qa")
    if spec.too_long == "windows" and not windowed:
        fact = f"data.too_long=windows: a row of {spec.task} has one answer as a whole"
        raise ConfigError([fact], hint="choose data.too_long=truncate, drop or raise")
    length = longest_allowed(spec.max_length, limit)
    return Policy(length, spec.too_long or ("windows" if windowed else "raise"), spec.stride)


def encode(
    rows: Sequence[TaskRow],
    head: Head,
    tokenizer: Tokenizer | None,
    limit: int | None,
    spec: TaskSpec,
    *,
    labelled: bool = True,
    positions: int = 1,
) -> Encoded:
    """Encode rows for a head; `limit` is the base's longest sequence, `positions` how large an image is to it.

    | head | input | target |
    |---|---|---|
    | sequence | text, or the tokenizer's pair of text and pair | index of the label; 0 or 1 per label; the number |
    | token | the words joined by spaces | index of a word's tag at its first sub-token, IGNORED elsewhere |
    | span | the pair of question and context | positions of the answer's first and last token, (0, 0) without one |
    | seq2seq | `spec.instruction` and the source | target tokens and eos |
    | image | `range(positions)` | index of the label |

    A long row of words becomes windows, and every word counts in one of them: where it has most context. A long
    context becomes windows too; (0, 0) is the target of those without the whole answer. Position 0 is [CLS] on encoders
    such as BERT; on a causal base it is the question's first token (or BOS), whose score for "no answer" cannot see
    the row: there, compare answers with each other and set the threshold (`null_bias`) on held-out rows.

    Without `labelled` sequence, span and image targets are empty, those of tokens IGNORED throughout. Raises DataError
    for rows whose question leaves no room for the context, or whose answer no window holds whole.
    """
    if head.kind == "image":
        images = tuple(
            TaskExample(range(positions), target_of(row, head) if labelled else (), at, str(row.where), image=row.image)
            for at, row in enumerate(rows)
        )
        return Encoded(images)
    if tokenizer is None:
        raise ConfigError([f"a {head.kind} head needs the base's tokenizer, and there is none"])
    policy, found = policy_of(spec, limit), Encoding()
    if head.kind == "token":
        encode_words(rows, head, tokenizer, policy, found, labelled=labelled)
    elif head.kind == "span":
        encode_spans(rows, tokenizer, policy, found, labelled=labelled)
    elif head.kind == "seq2seq":
        encode_pairs_of_texts(rows, tokenizer, policy, found, spec.instruction, labelled=labelled)
    else:
        encode_texts(rows, head, tokenizer, policy, found, labelled=labelled)
    return Encoded(
        tuple(found.examples), tuple(found.dropped), tuple(found.truncated), dict(found.too_long), dict(found.unseen)
    )
