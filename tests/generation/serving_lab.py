"""What every registered version answers alone, by PEFT's own loader and the plainest decoder: the oracle of serving."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from generation.adapters_lab import Lab
from generation.engine_lab import alone, ids
from safetensors.torch import load_file
from tuning.method_zoo import reload

from peftkit.generation.engine import Engine
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.running import Row, Ticket
from peftkit.registry.store import Version


@dataclass
class Oracle:
    """Answers of versions alone, each computed once; None is the base."""

    lab: Lab
    _models: dict[str | None, Any] = field(default_factory=dict)
    _answers: dict[tuple[str | None, tuple[int, ...], int], list[int]] = field(default_factory=dict)

    def ids(self, version: Version | None, prompt: Sequence[int], new: int) -> list[int]:
        """Up to `new` greedy tokens."""
        key = version.id if version else None, tuple(prompt), new
        if key not in self._answers:
            self._answers[key] = alone(self._model(version), list(prompt), new)
        return self._answers[key]

    def logprobs(self, version: Version | None, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Of every token at every position of an answer and right after it: float64, (len(answer) + 1, vocabulary)."""
        with torch.no_grad():
            logits = self._model(version)(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        return logits[-len(answer) - 1 :].double().log_softmax(-1)  # counted from the end: some begin with more tokens

    def check(self, ticket: Ticket, version: Version | None) -> None:
        """The answer is this version's and says so: its tokens and, when asked for, their log-probabilities."""
        request, found = ticket.request, ids(ticket)
        assert found == self.ids(version, request.prompt, request.max_new_tokens)
        assert ticket.completion is not None
        assert ticket.completion.adapter == (version.reference if version else None)
        if request.logprobs is None:
            return
        known = self.logprobs(version, request.prompt, found)
        assert len(ticket.completion.logprobs) == len(found)
        for given, token, row in zip(ticket.completion.logprobs, found, known, strict=False):
            assert given.token == token
            for each, value in ((given.token, given.value), *given.top):
                assert math.isclose(value, float(row[each]), abs_tol=1e-4)

    def _model(self, version: Version | None) -> Any:
        key = version.id if version else None
        if key not in self._models:
            self._models[key] = self._made(version) if version else self.lab.backbone().model
        return self._models[key]

    def _made(self, version: Version) -> Any:
        model = copy.deepcopy(self.lab.backbone().model)
        if version.manifest.kind == "peft":
            return reload(model, version.path)
        _, unknown = model.load_state_dict(load_file(version.path / "tensors.safetensors"), strict=False)
        assert not unknown
        return model


def rows_of(engine: Engine) -> list[Row]:
    return [row for _, lane in engine._lanes.values() for row in lane.rows]


def check_seats(engine: Engine, fleet: Fleet) -> None:
    """Every row of an adapter has a seat, nobody else has one, and nobody sits where another does."""
    rows = [row for row in rows_of(engine) if row.seat.reference is not None]
    residents, bank = fleet._residents, fleet.bank
    users = {digest: resident.users for digest, resident in residents.items() if resident.users}
    assert users == {digest: sum(row.seat.digest == digest for row in rows) for digest in {r.seat.digest for r in rows}}
    assert all(row.seat == residents[row.seat.digest].seat for row in rows)
    slots = [resident.seat.slot for resident in residents.values() if resident.need.ranks is not None]
    assert len(set(slots)) == len(slots) <= bank.most
    assert all(0 <= slot < bank.slots for slot in slots)
    assert len(residents) - len(slots) <= bank.most
    counted, memory = fleet.statistics(), fleet._room.memory
    assert memory is None or counted.bytes <= memory
