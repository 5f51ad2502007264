"""Probes: prompts with a check, or secrets that must not be given away; read from a file, all problems at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftkit.config import Spec
from peftkit.data.formats import LISTED
from peftkit.data.readers import read
from peftkit.errors import DataError
from peftkit.evaluation.behaviour.canary import ALTERNATIVES, forms
from peftkit.evaluation.behaviour.checks import Check

GENERAL = Path(__file__).with_name("general.jsonl")


class Message(BaseModel):
    """One turn of a probe's conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class Probe(Spec):
    """One line of a file of probes.

    A prompt (or messages) and a check; or a canary: a secret that follows `prefix` in some training answer, after the
    prompt where there is one, and in plain text where there is none.
    """

    id: str = Field(min_length=1)
    family: Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,31}$")]
    """What it belongs to. A name, because it leaves the run's folder with the figures; the prompts do not."""
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    check: Check | None = None
    prefix: str | None = None
    """What stands before the secret; never empty."""
    secret: str | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The turns before the answer; none for a canary in plain text."""
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        return [{"role": "user", "content": self.prompt}] if self.prompt is not None else []

    @model_validator(mode="after")
    def _whole(self) -> Self:
        wrong = list(_wrong(self))
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def _wrong(probe: Probe) -> list[str]:
    asked = (probe.prompt is not None) + (probe.messages is not None)
    found = ["prompt and messages are both given: one of them"] if asked == 2 else []
    if probe.messages is not None and (not probe.messages or probe.messages[-1].role == "assistant"):
        found.append("messages do not end with a turn that waits for an answer")
    if (probe.family == "canary") != (probe.secret is not None):
        found.append("the family canary, and no other, has prefix and secret")
    elif probe.secret is None:
        found += ["a prompt or messages is missing"] if not asked else []
        found += ["check is missing"] if probe.check is None else []
        found += ["prefix belongs to a canary"] if probe.prefix is not None else []
    else:
        found += ["prefix is missing or empty"] if not probe.prefix else []
        found += ["a canary has no check: it passes when its secret is not repeated"] if probe.check is not None else []
        if forms(probe.secret) <= ALTERNATIVES:
            found.append(
                f"there are {forms(probe.secret)} secrets of the form of {probe.secret!r}, and {ALTERNATIVES} others "
                "to compare it with are needed: two letters or digits at least"
            )
    return found


@dataclass(frozen=True)
class Probes:
    """The probes of a file, and which file it was."""

    probes: tuple[Probe, ...]
    source: str
    sha256: str
    shipped: bool
    """Whether they came with peftkit."""


def load_probes(source: str) -> Probes:
    """Read probes; `general` are those that ship with peftkit. Raises DataError with all problems, by line."""
    path = GENERAL if source == "general" else Path(source)
    records = read(path)  # a Path: a file, never the name of a set on the Hub
    probes: list[Probe] = []
    problems: list[str] = []
    first: dict[str, Any] = {}
    for where, record in records.records:
        try:
            probe = Probe.model_validate(record)
        except ValidationError as error:
            problems += [f"{where}: {_sentence(detail)}" for detail in error.errors()]
            continue
        if probe.id in first:
            problems.append(f"{where}: the id {probe.id!r} stands at {first[probe.id]} too")
        first.setdefault(probe.id, where)
        probes.append(probe)
    if problems:
        shown = "".join(f"\n- {problem}" for problem in problems[:LISTED])
        more = f"\n- and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(
            f"{count} in the probes of {source}:{shown}{more}",
            expected='lines such as {"id": "yes", "family": "format", "prompt": "…", "check": {"kind": "one_of", '
            '"answers": ["yes"]}}',
            hint=f"look at {GENERAL}",
        )
    return Probes(tuple(probes), path.name, records.sha256, path == GENERAL)


def _sentence(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    said = str(detail["msg"]).removeprefix("Value error, ")
    return f"{place}: {said}" if place else said
