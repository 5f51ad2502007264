"""Adapters for the tests of the bank: PEFT's own models with lively numbers, and their factors by the definition."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.generation.bank.bank import Bank
from peftkit.tuning.skeleton import skeleton

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def peft_model(model: Any, seed: int, **settings: Any) -> Any:
    """PEFT's model of a LoRA over the tensors of `model`, every A and B random and none of them small."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **settings})
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft = get_peft_model(skeleton(model), config).eval()
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return peft


def factors_of(peft: Any) -> Factors:
    """B · A · scaling by the definition, from PEFT's own parameters and config, not from what PEFT derived of it."""
    config, found = peft.peft_config["default"], {}
    for path, module in peft.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            own = [alpha for key, alpha in config.alpha_pattern.items() if path == key or path.endswith("." + key)]
            alpha, rank = (own or [config.lora_alpha])[0], a.shape[0]
            found[path] = a, b * (alpha / rank**0.5 if config.use_rslora else alpha / rank)
    assert found
    return found


def fill(bank: Bank, adapters: Sequence[Any]) -> Bank:
    for slot, adapter in enumerate(adapters):
        bank.put(slot, factors_of(adapter))
    return bank


def bank_of(model: Any, adapters: Sequence[Any] = (), slots: int = 32) -> Bank:
    return fill(Bank(model, dtype=torch.float32, device=torch.device("cpu"), slots=slots), adapters)


def ragged(rows: int, longest: int, vocabulary: int = 200) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Prompts padded on the right: ids, mask, lengths from 1 to `longest`."""
    ids = torch.randint(3, vocabulary, (rows, longest), generator=torch.Generator().manual_seed(5))
    lengths = [1 + (7 * row + longest - 1) % longest for row in range(rows)]
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask, lengths


def alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one prompt, computed by itself."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def answers(bank: Bank, slots: Sequence[int], ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a batch, one slot for each row."""
    with torch.no_grad(), bank.seated(slots, ids.shape[1]) as model:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


class _Products(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def products() -> Iterator[list[int]]:
    """How many matrix products are computed within; the list has its one number when the block has ended."""
    found: list[int] = []
    with _Products() as mode:
        yield found
    found.append(sum(mode.counts[name] for name in ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul")))
