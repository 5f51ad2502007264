"""Explain what a task's adapter says of one text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.backbone.quiet import quiet
from peftkit.base.head import Head
from peftkit.base.ref import longest_sequence, read_config
from peftkit.data.readers import Where
from peftkit.data.tasks.decode import decode
from peftkit.data.tasks.encode import encode
from peftkit.data.tasks.pieces import Pieces, tokenize
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskExample, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.explaining.asked import asked_of, check_asked
from peftkit.evaluation.explaining.embeddings import check_same, ends, score_of
from peftkit.evaluation.explaining.explanation import Explanation
from peftkit.evaluation.explaining.integrate import integrated_gradients, method
from peftkit.evaluation.explaining.spec import ExplainSpec
from peftkit.evaluation.explaining.words import Part, by_word
from peftkit.evaluation.tasks.registered import task_of
from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
from peftkit.events import Report, silent
from peftkit.generation.tasks import outputs
from peftkit.registry.store import Version
from peftkit.tuning.attach import Attached, open_adapters

_TOKENS_AT_ONCE = 2048


def explain_version(
    version: Version,
    text: str,
    pair: str | None = None,
    spec: ExplainSpec = ExplainSpec(),
    *,
    cache: Path,
    base: str | None = None,
    bits: int | None = None,
    other_base: bool = False,
    report: Report = silent,
) -> Explanation:
    """Load a registered version with its base and explain what it says of a text.

    `base` and `bits` override what the manifest says. Raises what `explain_attached` and `open_adapters` raise; what
    can be seen without the base is seen first.
    """
    task_of(version)
    method()
    host = open_adapters([version], cache, base=base, bits=bits, other_base=other_base, report=report)
    return explain_attached(host, version, text, pair, spec, report=report)


def explain_attached(
    host: Attached, version: Version, text: str, pair: str | None = None, spec: ExplainSpec = ExplainSpec(),
    *, report: Report = silent,
) -> Explanation:  # fmt: skip
    """Explain what an attached version says of a text (of question answering: `text` the context, `pair` the question).

    Words to tag are what stands between spaces. Raises what `explain` raises, DataError for an adapter of no task.
    """
    task = task_of(version)
    where = Where("text", None, 0)
    row = TaskRow(where, text=text, pair=pair)
    if task.task == "token_classification":
        row = TaskRow(where, pair=pair, words=tuple(text.split()))
    (name, *_) = [name for name, held in host.versions.items() if held.reference == version.reference]
    with host.using(name) as model:
        return explain(model, host.backbone, task, row, spec, report=report)


def explain(
    model: Any,
    backbone: Backbone,
    task: TaskSpec,
    row: TaskRow,
    spec: ExplainSpec = ExplainSpec(),
    measure: TaskEvaluateSpec = TaskEvaluateSpec(),
    *,
    report: Report = silent,
) -> Explanation:
    """Integrated gradients of one score of a row with respect to its input embeddings, summed to words.

    `model` is the backbone's own or one with an adapter; it is left as it was. The baseline is the same sequence with
    the tokens of its texts replaced: special tokens stay, and so have no share. Raises ConfigError for what does not
    fit the head or the row, DataError for a row above the length limit, BackboneError for a base without a path from
    embeddings to scores.
    """
    head = backbone.head
    assert head is not None  # `task_of` has refused language heads
    check_asked(head, row, spec)
    whole, parts = _texts(head, row, backbone)
    example = _sequence(head, row, whole, backbone, task)
    with _evaluating(model), quiet():  # transformers warns of padding, and a single row has none
        scores = outputs(model, backbone, [example], batch_size=1)[0]
        most = measure.max_answer_tokens
        (prediction,) = decode(
            head, [row], [example], [scores], task=task.task, threshold=measure.threshold, max_answer_tokens=most
        )
        asked = asked_of(head, row, example, scores, spec, max_answer_tokens=most)
        point, baseline = ends(model, backbone, whole, spec.baseline)
        score = score_of(model, backbone, example, asked, point.dtype)
        check_same(score, point, float(asked.of(scores[None])[0]), scores, backbone)
        at_once = max(1, _TOKENS_AT_ONCE // len(example.input_ids))
        found = integrated_gradients(
            score, point.float(), baseline.float(), steps=spec.steps, at_once=at_once, report=report
        )
    values = found.values.sum(dim=-1).tolist()
    names = [str(token) for token in backbone.tokenizer.hf.convert_ids_to_tokens(list(example.input_ids))]
    words = by_word(values, names, whole, *parts)
    return Explanation(
        asked.what,
        prediction,
        head.labels,
        tuple(words),
        tuple(zip(names, values, strict=True)),
        found.at_point,
        found.at_baseline,
        spec.baseline,
        found.steps,
        found.residual,
    )


def _texts(head: Head, row: TaskRow, backbone: Backbone) -> tuple[Pieces, tuple[Part, Part | None]]:
    """The row's tokens as the head's encoding has them, and the texts that they are of, in the order of the tokens."""
    first, second = Part.of("text", row.text), None
    if head.kind == "token":
        first = Part.of_words("text", row.words)
    elif head.kind == "span":
        first, second = Part.of("question", row.pair or ""), Part.of("context", row.text)
    elif row.pair is not None:
        second = Part.of("pair", row.pair)
    (whole,) = tokenize(backbone.tokenizer, [first.text], [second.text] if second is not None else ())
    return whole, (first, second)


def _sequence(head: Head, row: TaskRow, whole: Pieces, backbone: Backbone, task: TaskSpec) -> TaskExample:
    """The one sequence of a row. Raises DataError for a row above the limit: half of a text explains nothing."""
    limit = longest_sequence(read_config(backbone.base.folder))
    found = encode(
        [row], head, backbone.tokenizer, limit, task.model_copy(update={"too_long": "raise"}), labelled=False
    )
    if found.too_long:
        raise DataError(
            f"the text has {len(whole.ids)} tokens, above the limit of {task.max_length or limit}",
            expected="a text that the model reads at once",
            hint="explain one part of it",
        )
    if not found.examples:
        raise DataError("the tokenizer makes no token of these words", expected="a text with words")
    (example,) = found.examples
    assert tuple(example.input_ids) == whole.ids
    return example


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout inside the block, and every module as it was after it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
