"""Requests of different lengths and adapters from first to last, by several loops: `serving.py` runs each in a process.

A fresh process makes peak memory the loop's own. All decode greedily, stop at the tokenizer's end tokens and count only
tokens that a request asked for: what a padded batch generates beyond them is its own loss.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serving_mechanisms import Adapter, backbone_of, peft_of, random_adapters
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from peftkit.backbone.load import Backbone
from peftkit.backbone.quiet import quiet
from peftkit.generation.engine import Engine
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.limits import Limits
from peftkit.generation.requests import Request
from peftkit.registry.store import Registry

THREADS, ROWS = 2, 16
PROMPT, NEW = (20, 200), (20, 80)
"""Tokens of a prompt, and how many are asked for."""
PAGE = 32


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: list[int]
    new: int
    adapter: int


def workload(count: int, adapters: int) -> list[Ask]:
    """Requests in the order in which they come, `adapters` of them in turn."""
    generator = random.Random(0)
    asks = []
    for i in range(count):
        prompt = [generator.randrange(100, 40000) for _ in range(generator.randint(*PROMPT))]
        asks.append(Ask(prompt, generator.randint(*NEW), i % adapters))
    return asks


def run(loop: str, asks: Sequence[Ask], adapters: int, registry: Path) -> dict[str, Any]:
    """Answer all requests by one loop: the answers' ids, seconds, tokens a second, memory above the loaded model."""
    torch.set_num_threads(THREADS)
    with quiet(), torch.inference_mode():
        with torch.inference_mode(False):
            backbone = backbone_of()
            answer = LOOPS[loop](backbone, adapters, registry)
        answer([Ask(ask.prompt[:8], 2, ask.adapter) for ask in asks[:adapters]])
        gc.collect()
        _forget_peak()
        before, start = _memory("VmRSS"), time.perf_counter()
        answers = answer(asks)
        seconds = time.perf_counter() - start
    kept = [_kept(ids, ask, backbone.tokenizer.stop_ids) for ids, ask in zip(answers, asks, strict=True)]
    tokens = sum(len(ids) for ids in kept)
    return {
        "loop": loop, "adapters": adapters, "requests": len(asks), "tokens": tokens, "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1), "peak_bytes_above_model": _memory("VmHWM") - before,
        "answers": kept,
    }  # fmt: skip


def _kept(ids: list[int], ask: Ask, stops: Any) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: min(end, ask.new)]


def _forget_peak() -> None:
    with suppress(OSError):  # where it cannot be done, the peak is loading's
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name)))


Answer = Callable[[Sequence[Ask]], list[list[int]]]


def _settings(backbone: Backbone, new: int) -> GenerationConfig:
    tokenizer = backbone.tokenizer
    return GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id
    )


def _padded(backbone: Backbone, model: Any, asks: Sequence[Ask], **options: Any) -> list[list[int]]:
    """One padded batch, as long as its longest prompt and its longest answer."""
    longest = max(len(ask.prompt) for ask in asks)
    ids = torch.full((len(asks), longest), backbone.tokenizer.pad_id)
    mask = torch.zeros_like(ids)
    for row, ask in enumerate(asks):
        ids[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
        mask[row, longest - len(ask.prompt) :] = 1
    settings = _settings(backbone, max(ask.new for ask in asks))
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **options)
    found: list[list[int]] = out[:, longest:].tolist()
    return found


def _batches(asks: Sequence[Ask], answer: Callable[[list[Ask]], list[list[int]]], *, ordered: bool) -> list[list[int]]:
    order = sorted(range(len(asks)), key=lambda i: len(asks[i].prompt)) if ordered else list(range(len(asks)))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        found |= dict(zip(chosen, answer([asks[i] for i in chosen]), strict=True))
    return [found[i] for i in range(len(asks))]


def padded(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """The base by `generate`, in batches as requests come."""
    return lambda asks: _batches(asks, lambda some: _padded(backbone, backbone.model, some), ordered=False)


def padded_by_length(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """The base by `generate`, prompts of similar length together."""
    return lambda asks: _batches(asks, lambda some: _padded(backbone, backbone.model, some), ordered=True)


def peft_in_turn(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """PEFT: the requests of one adapter after those of another, each by `generate`."""
    model = peft_of(backbone, _adapters(backbone, adapters))

    def answer(asks: Sequence[Ask]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for adapter in range(adapters):
            mine = [i for i, ask in enumerate(asks) if ask.adapter == adapter]
            model.set_adapter(str(adapter))
            answers = _batches([asks[i] for i in mine], lambda some: _padded(backbone, model, some), ordered=True)
            found |= dict(zip(mine, answers, strict=True))
        return [found[i] for i in range(len(asks))]

    return answer


def peft_mixed(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """PEFT: rows of different adapters in one batch (`adapter_names`), by `generate`."""
    model = peft_of(backbone, _adapters(backbone, adapters))

    def batch(asks: list[Ask]) -> list[list[int]]:
        return _padded(backbone, model, asks, adapter_names=[str(ask.adapter) for ask in asks])

    return lambda asks: _batches(asks, batch, ordered=True)


def continuous(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """The base by transformers' continuous batching, with room for ROWS requests of the largest size."""
    settings = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=-(-ROWS * (PROMPT[1] + NEW[1] + PAGE) // PAGE), max_batch_tokens=512,
        max_requests_per_batch=ROWS, allow_block_sharing=False, auto_switch_to_flash=False,
    )  # fmt: skip

    def answer(asks: Sequence[Ask]) -> list[list[int]]:
        manager = backbone.model.init_continuous_batching(_settings(backbone, NEW[1]), settings)
        manager.start()
        names = [manager.add_request(ask.prompt, max_new_tokens=ask.new) for ask in asks]
        found: dict[str, list[int]] = {}
        while len(found) < len(asks) and manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                found[result.request_id] = result.generated_tokens
        manager.stop(block=True)
        return [found[name] for name in names]

    return answer


def engine_base(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """The base by peftkit's engine."""
    return _engine(backbone, Fleet(backbone, Registry(registry).resolve, slots=1), named=False)


def engine(backbone: Backbone, adapters: int, registry: Path) -> Answer:
    """Adapters of the registry by peftkit's engine; they are resident before the time is taken."""
    return _engine(backbone, Fleet(backbone, Registry(registry).resolve, slots=adapters), named=True)


def _engine(backbone: Backbone, fleet: Fleet, *, named: bool) -> Answer:
    def answer(asks: Sequence[Ask]) -> list[list[int]]:
        made = Engine(
            fleet, backbone.tokenizer, device=backbone.device, vocabulary=backbone.model.config.vocab_size,
            limits=Limits(rows=ROWS, prefix_bytes=0),
        )  # fmt: skip
        tickets = []
        for ask in asks:
            name = f"adapter-{ask.adapter}" if named else None
            tickets.append(made.submit(Request(tuple(ask.prompt), adapter=name, max_new_tokens=ask.new)))
        made.run()
        answers = []
        for ticket in tickets:
            assert ticket.completion is not None
            assert ticket.error is None, ticket.error
            answers.append(ticket.completion.ids)
        return answers

    return answer


def _adapters(backbone: Backbone, count: int) -> list[Adapter]:
    return random_adapters(backbone.model, count)


LOOPS: dict[str, Callable[[Backbone, int, Path], Answer]] = {
    "generate, padded": padded,
    "generate, padded, by length": padded_by_length,
    "transformers' continuous batching": continuous,
    "engine, base": engine_base,
    "peft, one adapter after another": peft_in_turn,
    "peft, adapter_names": peft_mixed,
    "engine": engine,
}
OF_THE_BASE = ("generate, padded", "generate, padded, by length", "transformers' continuous batching", "engine, base")
