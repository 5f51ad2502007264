"""Preferences → token ids: both answers behind the same prompt ids, the mask of `data.chat` on each final answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.chat import IGNORED, Example, encode_rows
from peftkit.data.part import Role
from peftkit.data.preference.example import PreferenceExample, PreferencePart
from peftkit.data.preference.rows import PreferenceRow, PreferenceSet
from peftkit.data.preference.spec import PreferenceSpec
from peftkit.errors import DataError


@dataclass(frozen=True)
class PreferenceEncoding:
    """Encoded rows with what did not come through."""

    part: PreferencePart
    refused: tuple[tuple[str, DataError], ...] = ()
    """Place and reason of each row that cannot be compared."""
    too_long: tuple[tuple[str, int], ...] = ()
    """Place of each row with an answer above the limit, and the tokens of its longer sequence."""


def encode_preferences(
    rows: Sequence[PreferenceRow],
    source: PreferenceSet,
    role: Role,
    tokenizer: Tokenizer,
    spec: PreferenceSpec,
    length: int | None,
) -> PreferenceEncoding:
    """Encode what can be encoded, and list the rest; where either answer is above `length` the row is left out."""
    examples, refused = [], []
    too_long: dict[str, int] = {}
    for row, found in zip(rows, _encoded(rows, tokenizer, spec), strict=True):
        if isinstance(found, DataError):
            refused.append((str(row.where), found))
            continue
        tokens = max(len(sequence.input_ids) for sequence in found.sequences)
        if length is not None and tokens > length:
            too_long[found.where] = max(tokens, too_long.get(found.where, 0))
        else:
            examples.append(found)
    dropped = tuple(too_long)
    part = PreferencePart(
        role, source.source, source.sha256, tuple(rows), tuple(examples), dropped, license=spec.license
    )
    return PreferenceEncoding(part, tuple(refused), tuple(too_long.items()))


def contrasted(encoding: PreferenceEncoding, spec: PreferenceSpec, length: int | None) -> PreferenceEncoding:
    """The same, labelled rows with an answer to another prompt each; as it is where rows were refused.

    Raises DataError when all rows have one prompt.
    """
    part = encoding.part
    if spec.kind != "labelled" or not part.examples or encoding.refused:
        return encoding
    return replace(encoding, part=replace(part, examples=tuple(mismatched(part.examples, spec.seed, length))))


def _encoded(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, spec: PreferenceSpec
) -> Iterator[PreferenceExample | DataError]:
    first = encode_rows([row.chosen for row in rows], tokenizer, spec.rendering)
    if spec.kind == "labelled":
        for row, chosen in zip(rows, first, strict=True):
            yield chosen if isinstance(chosen, DataError) else PreferenceExample(chosen[-1], desirable=row.desirable)
        return
    second = encode_rows([row.rejected for row in rows if row.rejected is not None], tokenizer, spec.rendering)
    for chosen, rejected in zip(first, second, strict=True):
        if isinstance(chosen, DataError):
            yield chosen
        elif isinstance(rejected, DataError):
            yield rejected
        else:
            yield _pair(chosen[-1], rejected[-1])


def _pair(chosen: Example, rejected: Example) -> PreferenceExample | DataError:
    if chosen.prompt_ids != rejected.prompt_ids:
        return DataError(
            f"{chosen.where}: the template renders another prompt before 'rejected' than before 'chosen'",
            expected="two answers to one prompt",
            hint="compare both with `peftkit data preview`",
        )
    if chosen.input_ids == rejected.input_ids:
        return DataError(
            f"{chosen.where}: both answers are the same tokens",
            expected="two different answers",
            hint="set data.think=keep, if they differ in their think blocks alone; else remove the row",
        )
    return PreferenceExample(chosen, rejected)


def mismatched(examples: Sequence[PreferenceExample], seed: int, length: int | None) -> list[PreferenceExample]:
    """Give each labelled row an answer to another prompt, which takes the place of one that the policy draws itself.

    The answer is that of the next row with another prompt in an order drawn with `seed`; what would pass `length` is
    cut. TRL takes the row before it in the file, which in unpaired pairs is an answer to the same prompt. Raises
    DataError when all rows have one prompt.
    """
    prompts = [tuple(example.prompt_ids) for example in examples]
    if len(set(prompts)) < 2:
        raise DataError(
            f"{len(examples):,} labelled rows have {len(set(prompts))} distinct prompt(s)",
            expected="at least two prompts on each side: KTO compares answers with answers to other prompts",
            hint="add rows, or learn from pairs with the recipe dpo",
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    # From the last to the first, twice round: the next row with another prompt is this one's, or this one's next.
    partner: dict[int, int] = {}
    for at in reversed(range(2 * len(order))):
        index, after = order[at % len(order)], order[(at + 1) % len(order)]
        if prompts[after] != prompts[index]:
            partner[index] = after
        elif after in partner:
            partner[index] = partner[after]
    return [
        replace(example, mismatched=_joined(example.chosen, examples[partner[index]].chosen, length))
        for index, example in enumerate(examples)
    ]


def _joined(asked: Example, answered: Example, length: int | None) -> Example:
    prompt, answer = asked.prompt_ids, answered.input_ids[answered.answer_start :]
    ids = [*prompt, *answer][:length]
    labels = [*[IGNORED] * len(prompt), *answer][:length]
    return Example(ids, labels, len(prompt), asked.row, asked.where)
