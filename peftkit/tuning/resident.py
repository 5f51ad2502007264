"""One version built and checked, beside the running model: a PEFT model over a skeleton of the base."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from peftkit.backbone.load import Backbone
from peftkit.errors import PeftkitError, TuningError
from peftkit.registry.store import Version
from peftkit.tuning.adapted import adapted
from peftkit.tuning.attachable import check_config, task_type
from peftkit.tuning.fit import fitted
from peftkit.tuning.prompted import PromptedModel
from peftkit.tuning.skeleton import places, skeleton
from peftkit.tuning.stored import Stored
from peftkit.tuning.tensors import replace_tensors

Slot = tuple[dict[str, Any], str]
# Old upload tools write these; they say where an adapter came from, not what it computes.
_NOT_FOR_LOADING = ("auto_mapping", "megatron_config", "megatron_core", "runtime_config", "peft_version")
_MOST_SPARES = 4


@dataclass(frozen=True)
class Resident:
    """An attached version."""

    version: Version
    model: Any
    """What to call; it shares every layer and tensor with the base and has its own containers."""
    own: tuple[Slot, ...]
    """Where the tensors hang that the base does not have."""
    slots: Mapping[str, Slot]
    """Stored tensor → where it hangs, when the model can serve another version of the same shape; otherwise empty."""
    key: str
    """Versions with equal keys differ in their numbers only."""


class Spares:
    """Built models without tensors, by shape, so that the next adapter of a known shape costs no injection.

    The first LoRA of a shape in the 210 linear layers of SmolLM2-135M costs 330 ms besides reading its file, 165 of
    them PEFT's injection; a spare is filled in 11. It holds no tensors and 7 MB of Python objects.
    """

    def __init__(self) -> None:
        self._spares: OrderedDict[str, Resident] = OrderedDict()

    def build(self, backbone: Backbone, stored: Stored) -> Resident:
        """A resident for `stored`, filled from a spare when there is one. Raises TuningError when it does not fit."""
        check_config_of(stored, backbone)
        key = _key(stored)
        spare = self._spares.get(key)
        with explained(stored.version):
            if spare is None:
                return _build(backbone, stored, key)
            needed = {name: held[slot] for name, (held, slot) in spare.slots.items()}
            placed = _on(backbone.device, fitted(needed, stored.tensors, stored.version))
            # From here on nothing can fail but an interrupt, after which the spare is not used again.
            del self._spares[key]
            for name, (held, slot) in spare.slots.items():
                held[slot] = nn.Parameter(placed[name], requires_grad=False)
            return Resident(stored.version, spare.model, spare.own, spare.slots, key)

    def take(self, resident: Resident) -> None:
        """Let go of a resident's tensors, whoever still holds its model, and keep what can be filled again."""
        for held, name in resident.own:
            held[name] = _without_data(held[name])
        if resident.slots:
            model = _rehoused(resident.model)
            self._spares[resident.key] = Resident(resident.version, model, resident.own, resident.slots, resident.key)
            while len(self._spares) > _MOST_SPARES:
                self._spares.popitem(last=False)


def check_config_of(stored: Stored, backbone: Backbone) -> None:
    """Raise TuningError when a version's settings cannot be used over this backbone."""
    if stored.version.manifest.kind == "peft":
        task = task_type(backbone.head)
        check_config(stored.config, stored.version.reference, backbone.quant.bits, task)


def inject_stored(
    model: nn.Module, stored: Stored, device: torch.device, *, trainable: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Let PEFT put a version's layers into `model` and load its tensors; returns the PEFT model and those tensors.

    Raises TuningError when the tensors do not fit. `model` is changed, half-way when something is raised.
    """
    config = peft_config_of(stored, trainable=trainable)
    meta = not trainable and _plain_lora(config)
    kind = PromptedModel if config.is_prompt_learning else adapted
    base = {_storage(tensor) for _, _, tensor in places(model)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        peft = kind(model, config, low_cpu_mem_usage=meta)
    needed = get_peft_model_state_dict(peft, save_embedding_layers=False)
    shared = [name for name, tensor in needed.items() if not tensor.is_meta and _storage(tensor) in base]
    if shared:
        raise TuningError(f"{stored.version.reference} would overwrite tensors of the base: {', '.join(shared[:3])}")
    tensors = _on(device, fitted(needed, stored.tensors, stored.version))
    set_peft_model_state_dict(peft, tensors, low_cpu_mem_usage=meta)
    unfilled = [name for _, name, tensor in places(peft) if tensor.is_meta]
    if unfilled:
        raise TuningError(f"{stored.version.reference} leaves {len(unfilled)} tensors empty: {', '.join(unfilled[:3])}")
    if meta:
        _hang_again(peft, tensors)
    return peft, tensors


@contextmanager
def explained(version: Version) -> Iterator[None]:
    """Say TuningError for what PEFT raises about a version's files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PeftkitError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise TuningError(
            f"the device has no memory left for {version.reference}", hint="detach another adapter first"
        ) from error
    except Exception as error:
        # PEFT raises whatever its code runs into: KeyError, TypeError, ValueError, RuntimeError, AttributeError.
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise TuningError(f"{version.reference} does not fit the base: {reason}") from error


def _build(backbone: Backbone, stored: Stored, key: str) -> Resident:
    base = {_storage(tensor) for _, _, tensor in places(backbone.model)}
    model = skeleton(backbone.model)
    placed: dict[str, torch.Tensor] = {}
    if stored.version.manifest.kind == "peft":
        model, placed = inject_stored(model, stored, backbone.device)
    else:
        replace_tensors(model, stored, backbone.placement)
    model.eval()
    own = tuple((held, name) for held, name, tensor in places(model) if _storage(tensor) not in base)
    for held, name in own:
        held[name].requires_grad_(False)
    return Resident(stored.version, model, own, _slots(own, placed), key)


def _hang_again(peft: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the numbers as they were trained where PEFT has hung copies in the base's dtype.

    What it loads into a model on the meta device it rounds to 16 bits over a base of 16 bits (peft 0.21.2,
    `_move_adapter_to_device_of_base_layer`).
    """
    loaded = get_peft_model_state_dict(peft, save_embedding_layers=False)
    names = {_storage(tensor): name for name, tensor in loaded.items()}
    for held, key, tensor in list(places(peft)):
        if _storage(tensor) in names:
            held[key] = nn.Parameter(tensors[names[_storage(tensor)]], requires_grad=False)


def _slots(own: tuple[Slot, ...], placed: Mapping[str, torch.Tensor]) -> dict[str, Slot]:
    """Stored tensor → where it hangs; empty unless that accounts for every own tensor and every stored one."""
    names = {_storage(tensor): name for name, tensor in placed.items()}
    slots = {names[_storage(held[key])]: (held, key) for held, key in own if _storage(held[key]) in names}
    return slots if len(slots) == len(own) == len(placed) else {}


def _plain_lora(config: Any) -> bool:
    """Whether a model can be built on the meta device, where initial values cost nothing: all tensors are stored.

    DoRA over 8 bits would move the skeleton's base weights there, and other methods derive tensors from initial ones.
    """
    extras = ("use_dora", "modules_to_save", "trainable_token_indices")
    return config.peft_type == PeftType.LORA and not any(getattr(config, key) for key in extras)


def peft_config_of(stored: Stored, *, trainable: bool) -> Any:
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[stored.config["peft_type"]]
    fields = {key: value for key, value in stored.config.items() if key not in _NOT_FOR_LOADING}
    # A newer PEFT writes settings that this one does not have: left alone they do nothing, set they would be ignored.
    unknown = sorted(key for key in fields.keys() - kind.__dataclass_fields__.keys())
    if used := [key for key in unknown if fields[key]]:
        raise TuningError(
            f"{stored.version.reference} sets {', '.join(used)}, which this PEFT does not know",
            expected=f"settings of {kind.__name__}",
            hint="pip install --upgrade peft",
        )
    known = {key: value for key, value in fields.items() if key not in unknown}
    task = known.get("task_type") or "CAUSAL_LM"
    return kind(**{**known, "task_type": task, "inference_mode": not trainable})


def _key(stored: Stored) -> str:
    """What two versions must share for one's model to serve the other: settings, names, shapes and dtypes."""
    settings = {key: value for key, value in stored.config.items() if key not in _NOT_FOR_LOADING}
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in stored.tensors.items()}
    return json.dumps([stored.version.manifest.kind, settings, shapes], sort_keys=True)


def _on(device: torch.device, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _rehoused(model: Any) -> Any:
    """The same inner model under a new outer one; the old outer one is emptied, so that nobody calls it by mistake."""
    twin = object.__new__(type(model))
    twin.__dict__.update({**vars(model), "_modules": dict(vars(model)["_modules"])})
    model._modules.clear()
    return twin
