"""Ways to answer rows of different adapters, timed on equal numbers through equal caches: `serving.py` runs them.

Every way has the model's forward pass and transformers' DynamicCache; what differs is how adapters get into the pass.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from peftkit import locations
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.generation.bank.bank import Bank
from peftkit.generation.bank.sites import in_and_out, linear_layers
from peftkit.tuning.skeleton import skeleton

RANK, SCALING = 16, 2.0
AGREE = 1e-4
"""Largest difference of a logit between two ways, in float32; the logits themselves reach 30."""
PREFIXES = ("bank ", "peft adapter_names ", "peft set_adapter ", "a model for each ")
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
Forward = Callable[[torch.Tensor, DynamicCache], torch.Tensor]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 16
    context: int = 100
    counts: tuple[int, ...] = (1, 2, 4, 16)
    slots: int = 16
    steps: int = 3
    """Decode steps timed in a row, after one that is not counted."""
    rounds: int = 8
    prefill_rounds: int = 5


QUICK = Sizes(rows=4, context=12, counts=(1, 2, 4), slots=4, steps=1, rounds=1, prefill_rounds=1)


def backbone_of() -> Backbone:
    """The embedded base in float32."""
    return load_backbone(BaseSpec(), QuantSpec(bits=32), locations.cache_root().path)


def random_adapters(model: Any, count: int) -> list[Adapter]:
    """Path of a linear layer → (A of shape (r, in), B of shape (out, r)), the head excluded as PEFT does."""
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    shapes = {path: in_and_out(layer) for path, layer in linear_layers(model).items() if layer is not head}

    def normal(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(shape, generator=generator)

    return [{path: (normal(RANK, i), normal(o, RANK)) for path, (i, o) in shapes.items()} for _ in range(count)]


def bank_of(backbone: Backbone, adapters: Sequence[Adapter]) -> Bank:
    """A bank with one slot for each adapter."""
    bank = Bank(backbone.model, dtype=torch.float32, device=backbone.device, slots=len(adapters))
    for slot, adapter in enumerate(adapters):
        bank.put(slot, {path: (a, b * SCALING) for path, (a, b) in adapter.items()})
    return bank


def peft_of(backbone: Backbone, adapters: Sequence[Adapter]) -> Any:
    """A PEFT model of the adapters, named 0, 1 …, over the base's own tensors; it holds the adapters' tensors too."""
    config = LoraConfig(r=RANK, lora_alpha=int(RANK * SCALING), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(skeleton(backbone.model), config, adapter_name="0", low_cpu_mem_usage=True)
    for i in range(1, len(adapters)):
        model.add_adapter(str(i), config, low_cpu_mem_usage=True)
    layers = dict(model.base_model.model.named_modules())
    for i, adapter in enumerate(adapters):
        for path, pair in adapter.items():
            for held, tensor in zip((layers[path].lora_A, layers[path].lora_B), pair, strict=True):
                held[str(i)].weight = torch.nn.Parameter(tensor, requires_grad=False)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


@dataclass
class Way:
    """One way to answer all rows: calls that follow each other, each with its rows."""

    config: Any
    parts: list[tuple[list[int], Forward]]
    caches: list[DynamicCache] = field(default_factory=list)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Read the prompts into new caches; the last position's logits, of shape (rows, vocabulary)."""
        self.caches = [DynamicCache(config=self.config) for _ in self.parts]
        return self._run(ids)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One decode step of every row; the caches are as long afterwards as before."""
        logits = self._run(tokens)
        for cache in self.caches:
            cache.crop(-1)
        return logits

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        found = [forward(ids[rows], cache) for (rows, forward), cache in zip(self.parts, self.caches, strict=True)]
        if len(found) == 1:
            return found[0]
        order = torch.tensor([row for rows, _ in self.parts for row in rows])
        whole: torch.Tensor = torch.cat(found)[order.argsort()]
        return whole


def ways(backbone: Backbone, sizes: Sizes) -> tuple[dict[str, Way], dict[str, Any]]:
    """All ways by name (those of one number of adapters answer alike), and what holds the adapters."""
    config, rows = backbone.model.config, list(range(sizes.rows))
    adapters = random_adapters(backbone.model, 2 * sizes.slots)
    bank, larger = bank_of(backbone, adapters[: sizes.slots]), bank_of(backbone, adapters)
    peft, larger_peft = peft_of(backbone, adapters[: sizes.slots]), peft_of(backbone, adapters)
    alone = [peft_of(backbone, [adapter]) for adapter in adapters[: sizes.slots]]
    found = {"base": Way(config, [(rows, _plain(backbone.model))])}
    for count in sizes.counts:
        # Neighbouring rows have different adapters, as requests come.
        slots = [row % count for row in rows]
        groups = [(slot, [row for row in rows if slots[row] == slot]) for slot in range(count)]
        found |= {
            f"bank {count}": Way(config, [(rows, _seated(bank, slots))]),
            f"peft adapter_names {count}": Way(config, [(rows, _named(peft, [str(slot) for slot in slots]))]),
            f"peft set_adapter {count}": Way(config, [(mine, _set(peft, str(slot))) for slot, mine in groups]),
            f"a model for each {count}": Way(config, [(mine, _plain(alone[slot])) for slot, mine in groups]),
        }
    spread = random.Random(0).sample(range(2 * sizes.slots), max(sizes.counts))
    seats = [spread[row % len(spread)] for row in rows]
    of = f"{len(spread)} of {len(adapters)}"
    found[f"bank {of}"] = Way(config, [(rows, _seated(larger, seats))])
    found[f"peft adapter_names {of}"] = Way(config, [(rows, _named(larger_peft, [str(seat) for seat in seats]))])
    return found, {"bank": bank, "larger": larger, "peft": peft}


def _plain(model: Any, **options: Any) -> Forward:
    def forward(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    return forward


def _named(model: Any, names: list[str]) -> Forward:
    return _plain(model, adapter_names=names)


def _seated(bank: Bank, slots: list[int]) -> Forward:
    def forward(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        with bank.seated(slots, ids.shape[1]) as model:
            return _plain(model)(ids, cache)

    return forward


def _set(model: Any, name: str) -> Forward:
    def forward(ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        model.set_adapter(name)
        return _plain(model)(ids, cache)

    return forward


def differences(found: Mapping[str, Way], ids: torch.Tensor) -> dict[str, float]:
    """Largest difference of a logit from PEFT's answer, over prefill and the decode step after it."""
    logits = {name: torch.stack([way.prefill(ids), way.step(ids[:, :1])]) for name, way in found.items()}
    largest = {}
    for name, mine in logits.items():
        if name != "base":
            count = next(start for start in PREFIXES if name.startswith(start))
            largest[name] = float((mine - logits[f"peft adapter_names {name.removeprefix(count)}"]).abs().max())
            assert float((mine - logits["base"]).abs().amax(dim=(0, 2)).min()) > 0.1, f"{name} answers like the base"
    return largest


def timed(found: Mapping[str, Way], act: Callable[[Way], Any], rounds: int, repeat: int, warm: int) -> Times:
    """Milliseconds of each way, one figure a round; every other round goes backwards through the ways."""
    taken: Times = {name: [] for name in found}
    for number in range(rounds):
        for name in list(found)[:: 1 if number % 2 == 0 else -1]:
            way, spans = found[name], []
            for attempt in range(warm + repeat):
                start = time.perf_counter()
                act(way)
                if attempt >= warm:
                    spans.append(1000 * (time.perf_counter() - start))
            taken[name].append(statistics.median(spans))
    return taken


def memory(held: Mapping[str, Any], sizes: Sizes) -> dict[str, float]:
    """Bytes of one adapter's factors, in the bank and in PEFT."""
    peft = sum(value.nbytes for name, value in held["peft"].named_parameters() if "lora_" in name)
    return {
        "bank_bytes_per_adapter": held["bank"].bytes / sizes.slots,
        "larger_bank_bytes_per_adapter": held["larger"].bytes / (2 * sizes.slots),
        "peft_bytes_per_adapter": peft / sizes.slots,
    }
