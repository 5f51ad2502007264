"""Tiny models, a decoder written from its definition, and adapters that are counted: what the engine's tests share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from tiny_families import FAMILIES

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import AdapterNotFound
from peftkit.generation.engine import Engine
from peftkit.generation.lanes import Together
from peftkit.generation.limits import Limits
from peftkit.generation.requests import Request
from peftkit.generation.running import Ticket
from peftkit.generation.seats import NO_SLOT, Alone, Seat

CPU = torch.device("cpu")
LIVELY: dict[str, Any] = {
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # answers that depend on every token before them
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
}


def tiny(name: str = "LlamaForCausalLM", *, seed: int = 5, **settings: Any) -> Any:
    """A random model of a transformers class."""
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(kind.config_class(**{**SHAPE, **LIVELY, **settings})).eval()


def family(kind: str, **changes: Any) -> Any:
    """A random model of tests/tiny_families.py, with norms and biases that do something."""
    name, settings = FAMILIES[kind]
    model = tiny(name, **{**settings, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.12)
    return model


def numbers(length: int, seed: int) -> list[int]:
    """Random byte tokens, no control tokens."""
    return list(map(int, torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed))))


def alone(model: Any, prompt: tuple[int, ...] | list[int], new: int, stops: tuple[int, ...] = (2,)) -> list[int]:
    """Greedy decoding from its definition: no cache, no neighbours, the highest logit each time."""
    ids: list[int] = []
    with torch.no_grad():
        while len(ids) < new:
            given = torch.tensor([[*prompt, *ids]])
            token = int(model(input_ids=given, use_cache=False).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids


class Several:
    """Adapters by name, each a model of its own; counts seats, and raises when one is released twice."""

    def __init__(self, models: Mapping[str | None, Any], digests: Mapping[str | None, str] | None = None) -> None:
        self.models: dict[str | None, Alone] = {name: Alone(model) for name, model in models.items()}
        self.digests = dict(digests or {name: f"digest of {name}" for name in models})
        self.held: Counter[str] = Counter()
        self.given = 0
        self.free: int | None = None
        """How many seats there are; None is any number."""
        self.broken: set[str | None] = set()
        """Names whose adapter cannot be loaded."""

    def identify(self, name: str | None) -> tuple[str | None, Alone, str]:
        if name not in self.models:
            raise AdapterNotFound(f"no adapter named {name!r}")
        return name, self.models[name], self.digests[name]

    def seat(self, identity: tuple[str | None, Alone, str]) -> Seat | None:
        name, model, digest = identity
        if name in self.broken:
            raise OSError(f"{name} cannot be read")
        if self.free is not None and self.held.total() >= self.free:
            return None
        self.held[digest] += 1
        self.given += 1
        return Seat(model, NO_SLOT, digest, name)

    def release(self, seat: Seat) -> None:
        assert self.held[seat.digest] > 0, f"{seat.reference} was released more often than it was given"
        self.held[seat.digest] -= 1


def engine_of(models: Any, tokenizer: Tokenizer, *, positions: int | None = None, **limits: Any) -> Engine:
    """An engine over one model, over models by name, or over adapters."""
    adapters = (
        models if isinstance(models, Several) else Several(models if isinstance(models, dict) else {None: models})
    )
    return Engine(adapters, tokenizer, device=CPU, vocabulary=259, positions=positions, limits=Limits(**limits))


def seats_in_use(engine: Engine) -> int:
    adapters = engine._adapters
    assert isinstance(adapters, Several)
    return adapters.held.total()


def held_bytes(engine: Engine) -> int:
    """Memory of the keys and values of all rows, as their storages have it."""
    lanes = [lane for _, lane in engine._lanes.values() if isinstance(lane, Together)]
    layers = [layer for lane in lanes for layer in lane._kept.cache.layers if layer.is_initialized]
    return sum(part.untyped_storage().nbytes() for layer in layers for part in (layer.keys, layer.values))


def ask(engine: Engine, prompt: list[int] | tuple[int, ...], new: int = 8, **wishes: Any) -> Ticket:
    return engine.submit(Request(tuple(prompt), max_new_tokens=new, **wishes))


def ids(ticket: Ticket) -> list[int]:
    """The tokens of an answer that came to its end."""
    assert ticket.error is None, ticket.error
    assert ticket.completion is not None
    assert ticket.completion.finish in ("stop", "length"), ticket.completion
    return ticket.completion.ids


def read_by(model: Any) -> list[tuple[int, int]]:
    """A list that grows by (rows, tokens of a row) with every pass of `model`."""
    seen: list[tuple[int, int]] = []

    def note(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        seen.append(tuple(inputs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen
