"""Probes put to one model: its greedy answers, whether each passes, and how exposed secrets are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.backbone.load import Backbone
from peftkit.base.tokenizer import Tokenizer
from peftkit.data.audit import Part
from peftkit.data.chat import IGNORED
from peftkit.data.chat_prompt import chat_prompt
from peftkit.data.formats import LISTED, Row
from peftkit.data.template import Rendering
from peftkit.errors import DataError
from peftkit.evaluation.behaviour.canary import alternatives, exposure
from peftkit.evaluation.behaviour.change import Behaved, Outcome
from peftkit.evaluation.behaviour.probes import Probe, Probes, load_probes
from peftkit.evaluation.behaviour.recall import CONTINUED, Recall, choose
from peftkit.evaluation.retention import Passage
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Note, Report
from peftkit.generation.forward import row_nll
from peftkit.generation.generate import generate
from peftkit.generation.limits import positions_of
from peftkit.generation.requests import Completion

TOKENS = 32
"""Longest answer to a probe that ships with peftkit; one's own get evaluate.max_new_tokens."""


@dataclass(frozen=True)
class Question:
    """A probe as token ids: what is fed, and for a canary what must not follow."""

    probe: Probe
    prompt: list[int]
    rest: list[int]
    """The tokens that would give the secret away; [] without one."""
    forms: tuple[Passage, ...]
    """The secret, then its alternatives, after what stands before them."""


@dataclass(frozen=True)
class Asked:
    """What every contestant is asked."""

    probes: Probes
    questions: tuple[Question, ...]
    max_new_tokens: int
    recall: tuple[Recall, ...] = ()


def prepare_behaviour(
    spec: EvaluateSpec, part: Part, rendering: Rendering, backbone: Backbone, report: Report
) -> Asked | None:
    """The probes as tokens, or None, with a note why, where nothing is asked.

    Raises DataError with all problems of a file, or with the probes that the base has no positions for.
    """
    if spec.behaviour is None:
        return None
    if spec.behaviour in ("auto", "general") and (why := _why_not(spec, part, rendering, backbone)):
        report(Note(f"behaviour: not probed, because {why}"))
        return None
    probes = load_probes("general" if spec.behaviour == "auto" else spec.behaviour)
    questions = tuple(_question(probe, backbone.tokenizer, rendering) for probe in probes.probes)
    _check_positions(questions, positions_of(backbone.model))
    return Asked(probes, questions, TOKENS if probes.shipped else spec.max_new_tokens)


def with_recall(asked: Asked, rows: Sequence[Row], rendering: Rendering, backbone: Backbone) -> Asked:
    """The same with training answers to be continued."""
    chosen = choose(rows, backbone.tokenizer, rendering, positions_of(backbone.model))
    return replace(asked, recall=tuple(chosen))


def behave(model: Any, asked: Asked, tokenizer: Tokenizer, device: torch.device, batch_size: int) -> Behaved:
    """What the current model answers; `batch_size` prompts at once, a third of them where likelihoods are taken."""
    prompts = [question.prompt for question in asked.questions] + [recall.prompt for recall in asked.recall]
    longest = max([CONTINUED, *(len(question.rest) for question in asked.questions)])
    answers = generate(
        model,
        prompts,
        tokenizer,
        device=device,
        max_new_tokens=max(asked.max_new_tokens, longest),
        batch_size=batch_size,
    )
    forms = [form for question in asked.questions for form in question.forms]
    nll = row_nll(model, forms, pad_id=tokenizer.pad_id, device=device, batch_size=max(1, batch_size // 3))
    outcomes = []
    for question, answer in zip(asked.questions, answers[: len(asked.questions)], strict=True):
        own, nll = nll[: len(question.forms)], nll[len(question.forms) :]
        bits = exposure(own[0], own[1:]) if own else None
        probe = question.probe
        outcomes.append(Outcome(probe.id, probe.family, answer.text, _passes(question, answer, tokenizer), bits))
    begun = zip(asked.recall, answers[len(asked.questions) :], strict=True)
    recalled = tuple(answer.ids[:CONTINUED] == recall.rest for recall, answer in begun)
    return Behaved(asked.probes.source, asked.probes.sha256, tuple(outcomes), recalled)


def _why_not(spec: EvaluateSpec, part: Part, rendering: Rendering, backbone: Backbone) -> str | None:
    """Why the shipped probes say nothing here, or cost more than they are worth unasked."""
    if spec.max_generated_rows == 0:
        return "evaluate.max_generated_rows=0 generates nothing"
    if all(row.text is not None for row in part.rows):
        return "the rows are plain text"
    if rendering.template == "plain" or not backbone.tokenizer.has_template:
        return "there is no chat template"
    if spec.behaviour == "auto" and backbone.device.type == "cpu":
        return "on a CPU its answers may take a minute; evaluate.behaviour=general asks for it"
    return None


def _question(probe: Probe, tokenizer: Tokenizer, rendering: Rendering) -> Question:
    conversation = probe.conversation
    before = chat_prompt(conversation, tokenizer, rendering) if conversation else list(tokenizer.bos)
    if probe.secret is None or probe.prefix is None:
        return Question(probe, before, [], ())
    whole = tokenizer.encode(probe.prefix + probe.secret)
    prefix = tokenizer.encode(probe.prefix)
    # A token may hold the end of the prefix and the beginning of the secret: only what the two share is given.
    shared = next((i for i, (one, other) in enumerate(zip(prefix, whole, strict=False)) if one != other), len(prefix))
    shared = max(shared, 0 if before else 1)
    secrets = [probe.secret, *alternatives(probe.secret)]
    forms = tuple(_form(before, tokenizer.encode(probe.prefix + secret)) for secret in secrets)
    return Question(probe, before + whole[:shared], whole[shared:], forms)


def _form(before: list[int], ids: list[int]) -> Passage:
    return Passage(before + ids, [IGNORED] * len(before) + ids)


def _passes(question: Question, answer: Completion, tokenizer: Tokenizer) -> bool:
    if question.probe.check is not None:
        return question.probe.check.passes(answer)
    return not tokenizer.decode(question.prompt + answer.ids).startswith(
        tokenizer.decode(question.prompt + question.rest)
    )


def _check_positions(questions: Sequence[Question], positions: int | None) -> None:
    if positions is None:
        return
    lengths = {q.probe.id: max([len(q.prompt) + 1, *(len(form.input_ids) for form in q.forms)]) for q in questions}
    long = [f"{name}: {length} tokens" for name, length in lengths.items() if length > positions]
    if long:
        more = f" and {len(long) - LISTED} more" if len(long) > LISTED else ""
        raise DataError(
            f"{len(long)} probes are longer than the base's {positions} positions: {', '.join(long[:LISTED])}{more}",
            expected="prompts that leave room for an answer",
            hint="shorten or remove them in the file of evaluate.behaviour",
        )
