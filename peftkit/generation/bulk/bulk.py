"""Every row of a file answered by every adapter that is named, on one loaded base; an interrupted run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit import durable
from peftkit.data.chat import prompt_for
from peftkit.data.formats import Row
from peftkit.data.questions import Questions, look_through
from peftkit.errors import DataError, GenerationError, PeftkitError
from peftkit.events import Note, Phase, Progress, Report, Warned, silent
from peftkit.generation.answer import ASKED, record, stopped
from peftkit.generation.bulk.answers_file import AnswersFile, refuse_place
from peftkit.generation.bulk.who import Who, reference, what_answers_depend_on
from peftkit.generation.check import check
from peftkit.generation.constrain import Grammar
from peftkit.generation.limits import Limits
from peftkit.generation.opening import Opened, find_base, open_engine
from peftkit.generation.requests import Completion, Request, Sampling
from peftkit.generation.running import Ticket
from peftkit.registry.store import Registry, Version

_WINDOW = 8  # batches of rows that are looked at together, so that prompts of one length are read together
_REFILL = 8  # an eighth of the rows must be free before new prompts are read: 7 to 12 % fewer passes than with one


@dataclass(frozen=True)
class Outcome:
    """What answering a file gave."""

    out: Path
    answers: int
    asked: int
    """How many of them this time: the others were there already."""
    failed: int
    cut: int
    """How many ended at max_new_tokens."""
    tokens: int
    """Generated this time."""
    seconds: float
    """Spent on that."""
    first_error: str | None = None
    receipts: tuple[dict[str, Any], ...] = ()
    """What was gone on with by `other_base`."""

    def as_record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "out": str(self.out), "receipts": list(self.receipts)}


def generate_file(
    registry: Registry,
    rows: str | Path,
    adapters: Sequence[str],
    out: Path,
    *,
    cache: Path,
    with_base: bool = False,
    adapter_column: str | None = None,
    like: Request = ASKED,
    batch: int = 32,
    base: str | None = None,
    bits: int | None = None,
    other_base: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
    report: Report = silent,
) -> Outcome:
    """Answer every row of `rows` with every one of `adapters`, and with the base if asked; the answers go to `out`.

    `adapter_column` names a column that says who answers a row instead; empty is the base. `like` holds the settings;
    row i is sampled with its seed + i. Answers are kept as they come: the same call goes on after whatever ended the
    last one, and asks again what failed; once `out` is whole, it asks nothing.

    Raises DataError for rows that cannot be read, ConfigError for settings, what `open_engine` raises, and
    GenerationError when `out` holds something else (unless `overwrite`), or what was kept belongs to something else
    (unless `fresh`). A row that cannot be answered is a line that says so.
    """
    check(replace(like, prompt=(0,)), sys.maxsize)
    refuse_place(out)
    questions = look_through(rows, adapter_column)
    check(replace(like, prompt=(0,), sampling=_of_row(questions.count - 1, like)), sys.maxsize)
    who = Who.named(registry, adapters, with_base, questions)
    if out.exists() and out.samefile(questions.path):
        raise GenerationError(f"{out} holds the rows themselves", expected="another file for the answers")
    found = find_base(who.versions, cache, base=base, bits=bits, report=report)
    about, jobs = what_answers_depend_on(questions, who, found, like), questions.count * who.width
    with AnswersFile(out, about, jobs, who.job, fresh=fresh, overwrite=overwrite) as kept:
        if kept.finished is not None:
            there, receipts = kept.finished, tuple(kept.finished["receipts"])
            return Outcome(out, there["answers"], 0, there["failed"], there.get("cut", 0), 0, 0.0, receipts=receipts)
        _say(questions, kept, report)
        work = _Work(questions, who, kept, like, batch, report)
        receipts = ()
        if kept.done < jobs:
            limits = Limits(rows=batch)
            opened = open_engine(found, who.versions, cache, other_base=other_base, limits=limits, report=report)
            work.run(opened)
            receipts = opened.fleet.receipts
        if durable.digest_file(questions.path) != questions.sha256:
            raise questions.changed()
        kept.finish({"answers": jobs, "failed": work.failed, "cut": kept.cut, "receipts": list(receipts)})
    return work.outcome(receipts)


@dataclass
class _Asked:
    """One answer that is wanted."""

    row: int
    order: int
    version: Version | None
    request: Request | None = None
    ticket: Ticket | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt) if self.request else 0


@dataclass
class _Work:
    """Asks what is not answered yet."""

    questions: Questions
    who: Who
    kept: AnswersFile
    like: Request
    batch: int
    report: Report
    asked: int = 0
    failed: int = 0
    tokens: int = 0
    first_error: str | None = None
    begun: float = field(default_factory=time.monotonic)
    flying: list[_Asked] = field(default_factory=list)

    def run(self, opened: Opened) -> None:
        """Ask everything; what is finished is kept, whatever ends this."""
        if self.like.json_schema is not None:
            Grammar.of(self.like.json_schema, opened.backbone.tokenizer)
        check(replace(self.like, prompt=(0,)), opened.backbone.model.config.get_text_config().vocab_size)
        self.begun = time.monotonic()
        self.report(Phase("answering", self.questions.count * self.who.width, "answers"))
        try:
            for window in self._windows(opened):
                for each in sorted(window, key=lambda each: (each.order, each.length)):
                    if len(self.flying) >= self.batch:
                        self._answer(self.batch - self.batch // _REFILL, opened)
                    self._submit(each, opened)
            self._answer(1, opened)
        except KeyboardInterrupt:
            self._collect(opened)
            self.kept.sync()
            raise KeyboardInterrupt(f"interrupted; {self._how_to_go_on()}") from None

    def _answer(self, fewer: int, opened: Opened) -> None:
        """Step until fewer than `fewer` are on their way."""
        while len(self.flying) >= fewer:
            opened.engine.step()
            self._collect(opened)

    def outcome(self, receipts: tuple[dict[str, Any], ...]) -> Outcome:
        """What was done."""
        answers, seconds = self.questions.count * self.who.width, time.monotonic() - self.begun
        spent = seconds if self.asked else 0.0
        counts = answers, self.asked, self.failed, self.kept.cut, self.tokens
        return Outcome(self.kept.out, *counts, spent, self.first_error, receipts)

    def _windows(self, opened: Opened) -> Iterator[list[_Asked]]:
        rows = enumerate(self.questions)
        size = max(1, _WINDOW * self.batch // self.who.width)
        while taken := list(islice(rows, size)):
            window = []
            for index, (row, name) in taken:
                for order, version in enumerate(self.who.of(name)):
                    each = _Asked(index, order, version)
                    if not self.kept.has(self.who.job({"row": index, "adapter": reference(version)})):
                        window += [each] if self._render(each, row, opened) else []
            yield window

    def _render(self, each: _Asked, row: Row, opened: Opened) -> bool:
        try:
            prompt = prompt_for(row, opened.backbone.tokenizer, opened.rendering(each.version))
        except DataError as error:
            self._fail(each, error, opened)
            return False
        name, sampling = reference(each.version), _of_row(each.row, self.like)
        each.request = replace(self.like, prompt=tuple(prompt), adapter=name, sampling=sampling)
        return True

    def _submit(self, each: _Asked, opened: Opened) -> None:
        assert each.request is not None
        try:
            each.ticket = opened.engine.submit(each.request)
        except PeftkitError as error:
            self._fail(each, error, opened)
        else:
            self.flying.append(each)

    def _collect(self, opened: Opened) -> None:
        """Keep what has been answered."""
        done = [each for each in self.flying if each.ticket is not None and each.ticket.done]
        for each in done:
            ticket = each.ticket
            assert ticket is not None
            assert ticket.completion is not None
            if ticket.error is not None and not isinstance(ticket.error, PeftkitError):
                raise self._stopped(ticket.error) from ticket.error
            self._keep(each, ticket.completion, opened)
            self.flying.remove(each)

    def _fail(self, each: _Asked, error: PeftkitError, opened: Opened) -> None:
        self._keep(each, Completion("", [], stopped=False, finish="failed", error=str(error)), opened)

    def _keep(self, each: _Asked, completion: Completion, opened: Opened) -> None:
        line = {"row": each.row, **record(completion, opened.backbone.tokenizer), "adapter": reference(each.version)}
        if self.kept.has(self.who.job(line)):
            return  # what interrupts may come between keeping an answer and forgetting that it was asked
        self.kept.add(line)
        self.asked += 1
        self.tokens += len(completion.ids)
        if completion.finish == "failed":
            self.failed += 1
            self.first_error = self.first_error or f"row {each.row}: {completion.error}"
        rate = self.tokens / max(time.monotonic() - self.begun, 1e-9)
        self.report(Progress(self.kept.done + self.asked, {"tokens_per_s": rate}))

    def _stopped(self, error: BaseException) -> GenerationError:
        """What is wrong with all rows, such as no memory, and not with one of them."""
        fewer = f", with less memory under --batch {self.batch // 2}" if self.batch > 1 else ""
        return stopped(error, f"{self._how_to_go_on()}{fewer}")

    def _how_to_go_on(self) -> str:
        kept, name = self.kept.done + self.asked - self.failed, self.kept.path
        return f"{kept:,} answers are kept in {name}, and the same command goes on"


def _of_row(row: int, like: Request) -> Sampling:
    return replace(like.sampling, seed=like.sampling.seed + row)


def _say(questions: Questions, kept: AnswersFile, report: Report) -> None:
    if questions.left_out:
        report(Note(f"columns that are no part of the question: {', '.join(map(repr, questions.left_out))}"))
    if kept.done:
        report(Note(f"{kept.done:,} answers were kept in {kept.path.name}; the rest is asked"))
    if kept.dropped:
        report(Warned(f"{kept.dropped:,} bytes at the end of {kept.path.name} were torn, and are asked again"))
