"""Put trainable layers into a backbone, and write what was learned as a plain PEFT checkpoint."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peftkit.backbone.load import Backbone
from peftkit.backbone.shard import whole
from peftkit.errors import TuningError
from peftkit.events import Decision, Report, silent
from peftkit.tuning.fit import check_bare
from peftkit.tuning.methods import AdapterSpec, peft_arguments
from peftkit.tuning.snapshot import Snapshot


@dataclass(frozen=True)
class Tuned:
    """A backbone with trainable layers in it."""

    model: PeftModel
    backbone: Backbone
    spec: AdapterSpec
    parents: tuple[dict[str, str], ...] = field(default=())
    """Versions that this adapter continues, for the lineage."""
    receipts: tuple[dict[str, Any], ...] = field(default=())
    """What was gone on with by an explicit flag, for the manifest."""

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def trainable_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    @contextmanager
    def as_base(self) -> Iterator[PeftModel]:
        """The same model with the adapter off: what the untouched base computes."""
        with self.model.disable_adapter():
            yield self.model


def inject(backbone: Backbone, spec: AdapterSpec, *, report: Report = silent) -> Tuned:
    """Inject a fresh adapter; until it is trained, the logits are bitwise the base's (lora_B starts at zero).

    Adapter weights are float32, whatever the base is: bfloat16 would swallow small updates. Raises TuningError when
    `target_modules` matches nothing.
    """
    check_bare(backbone)
    before = Snapshot(backbone.model)
    with torch.random.fork_rng(devices=_cuda_devices(backbone)), warnings.catch_warnings():
        torch.manual_seed(spec.seed)
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(backbone.model, LoraConfig(**peft_arguments(spec)), autocast_adapter_dtype=True)
        except Exception as error:  # PEFT raises ValueError for what it expects, and anything for what it does not
            before.restore()
            names = sorted(
                {name.rsplit(".", 1)[-1] for name, m in backbone.model.named_modules() if hasattr(m, "weight")}
            )
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TuningError(
                f"adapter.target_modules={spec.target_modules!r} cannot be used: {reason}",
                expected="all-linear, or endings of module names: " + ", ".join(names),
            ) from error
    _keep_float32(model)
    tuned = Tuned(model, backbone, spec)
    layers = len({name.split(".lora_")[0] for name in tuned.trainable})
    report(
        Decision(
            "adapter",
            f"{spec.method} r={spec.r} alpha={spec.lora_alpha:g}",
            f"{layers} linear layers, {tuned.trainable_parameters:,} trainable parameters in float32",
        )
    )
    return tuned


def save_adapter(tuned: Tuned, folder: Path) -> Path:
    """Write the adapter as a PEFT checkpoint: adapter_config.json and adapter_model.safetensors, nothing else.

    The base's name replaces the path of this machine, and embeddings are never added: PEFT's "auto" would ask the Hub
    whether the vocabulary changed. Under FSDP, all processes must call this together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: whole(parameter.detach()) for name, parameter in tuned.trainable.items()}  # under FSDP, parts
    tuned.model.save_pretrained(str(folder), state_dict=values, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    base = tuned.backbone.base
    config["base_model_name_or_path"] = base.portable
    config["revision"] = base.revision
    config["target_modules"] = _sorted(config.get("target_modules"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _keep_float32(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)


def _cuda_devices(backbone: Backbone) -> list[int]:
    device = backbone.device
    return [device.index or 0] if device.type == "cuda" else []
