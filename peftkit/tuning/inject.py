"""Put trainable layers into a backbone, and write what was learned as a plain PEFT checkpoint."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftkit.backbone.load import Backbone
from peftkit.backbone.shard import whole
from peftkit.data.chat import Example
from peftkit.errors import PeftkitError, TuningError
from peftkit.events import Decision, Note, Report, Warned, silent
from peftkit.process_group import launched
from peftkit.tuning.adapted import adapted
from peftkit.tuning.allocator import ranks_as_they_are
from peftkit.tuning.configs import peft_config
from peftkit.tuning.feedforward import name_feedforward
from peftkit.tuning.fit import check_bare
from peftkit.tuning.initial import NAME
from peftkit.tuning.initial_eva import begin_eva
from peftkit.tuning.initial_loftq import begin_loftq
from peftkit.tuning.initial_pissa import begin_pissa
from peftkit.tuning.initial_prompt import begin_prefix, begin_prompt
from peftkit.tuning.methods import METHODS, AdapterSpec, check_over
from peftkit.tuning.partial import inject_partial
from peftkit.tuning.prompted import PromptedModel
from peftkit.tuning.snapshot import Snapshot
from peftkit.tuning.target_modules import linear_endings
from peftkit.tuning.tuned import Tuned, trained_names

_SHARDABLE = ("lora", "rslora", "dora", "lora_plus", "loftq", "eva")


def inject(backbone: Backbone, spec: AdapterSpec, *, rows: Sequence[Example] = (), report: Report = silent) -> Tuned:
    """Inject a fresh adapter; the base's own tensors stay as they are, bit for bit.

    Until it is trained the logits are the base's: bitwise, or to rounding with dora, oft and pissa. LoftQ begins nearer
    to the unquantized base, and prompt_tuning and prefix_tuning with real tokens before every input. Adapter weights
    are float32, whatever the base is: bfloat16 would swallow small updates. `rows` are what eva reads. Raises
    TuningError for settings that the base does not have a place for.
    """
    check_over(spec, backbone.quant.bits)
    if METHODS[spec.method].kind == "tensors":
        return _told(inject_partial(backbone, spec, report=report), report)
    _refuse_sharded(spec)
    check_bare(backbone)
    before = Snapshot(backbone.model)
    with torch.random.fork_rng(devices=_cuda_devices(backbone)), _undone(before, backbone, spec):
        torch.manual_seed(spec.seed)
        config = peft_config(backbone, spec)
        kind = PromptedModel if config.is_prompt_learning else adapted
        model = kind(backbone.model, config, autocast_adapter_dtype=True)
        name_feedforward(config, model)
        _keep_float32(model)
        names = trained_names(model)
        if not names:
            raise ValueError("it would train nothing")
        _begin(model, backbone, spec, rows, report)
    return _told(Tuned(model, backbone, spec, names), report)


@contextmanager
def _undone(before: Snapshot, backbone: Backbone, spec: AdapterSpec) -> Iterator[None]:
    """Leave the backbone as it was, and say TuningError, when something is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PeftkitError:
        before.restore()
        raise
    except Exception as error:  # PEFT raises ValueError for what it expects, and anything for what it does not
        before.restore()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if spec.target_modules is None:
            raise TuningError(f"adapter.method={spec.method} cannot be used over this base: {reason}") from error
        raise TuningError(
            f"adapter.target_modules={spec.target_modules!r} cannot be used: {reason}",
            expected="all-linear, or endings of module names: " + ", ".join(linear_endings(backbone.model)),
        ) from error
    except BaseException:
        before.restore()
        raise


def _begin(model: Any, backbone: Backbone, spec: AdapterSpec, rows: Sequence[Example], report: Report) -> None:
    """Numbers to begin with that are not PEFT's own."""
    r, count = spec.r or 0, spec.num_virtual_tokens or 0
    if spec.method == "pissa":
        begin_pissa(model, r)
        report(Note("half of the trained numbers are the beginning, which is taken off and stays as it is"))
    elif spec.method == "loftq":
        begin_loftq(model, backbone, r, report)
    elif spec.method == "eva":
        begin_eva(model, rows, r, seed=spec.seed, report=report)
    elif spec.method in ("prompt_tuning", "prefix_tuning"):
        ids = (begin_prompt if spec.method == "prompt_tuning" else begin_prefix)(model, backbone, count, spec.seed)
        text = backbone.tokenizer.decode(ids[:6])
        report(
            Note(f"the virtual tokens begin as {count} of the vocabulary's ({text!r} …): the logits are not the base's")
        )
    elif spec.method == "oft":
        _tell_block_sizes(model, spec, report)


def _tell_block_sizes(model: Any, spec: AdapterSpec, report: Report) -> None:
    """PEFT takes another size for layers whose width oft_block_size does not divide."""
    others = {
        name: layer.oft_block_size[NAME]
        for name, layer in model.named_modules()
        if NAME in getattr(layer, "oft_block_size", {}) and layer.oft_block_size[NAME] != spec.oft_block_size
    }
    if others:
        name, size = next(iter(others.items()))
        fact = f"{len(others)} layers have blocks of another size than oft_block_size={spec.oft_block_size}"
        report(
            Warned(f"{fact}, which does not divide their width: {name.removeprefix('base_model.model.')} has {size}")
        )


def _refuse_sharded(spec: AdapterSpec) -> None:
    if launched().sharded and spec.method not in _SHARDABLE:
        raise TuningError(
            f"adapter.method={spec.method} does not go with FSDP",
            expected=", ".join(_SHARDABLE),
            hint="start it with DDP: accelerate launch --multi_gpu, or adapter.method=lora",
        )


def _told(tuned: Tuned, report: Report) -> Tuned:
    shown = {key: value for key, value in tuned.spec.record().items() if key not in ("method", "seed") and value != []}
    settings = " ".join(f"{key}={value}" for key, value in shown.items())
    count = f"{len(tuned.names)} tensors, {tuned.trainable_parameters:,} trainable parameters in float32"
    report(Decision("adapter", f"{tuned.spec.method} {settings}".strip(), count))
    return tuned


def save_adapter(tuned: Tuned, folder: Path) -> Path:
    """Write what was learned: a PEFT checkpoint and nothing else, or the tensors that stand in for the base's.

    In a checkpoint the base's name replaces the path of this machine, and embeddings are never added: PEFT's "auto"
    would ask the Hub whether the vocabulary changed. Under FSDP, all processes must call this together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: whole(parameter.detach()) for name, parameter in tuned.trainable.items()}  # under FSDP, parts
    if tuned.kind == "tensors":
        save_file({name: value.contiguous().cpu() for name, value in values.items()}, folder / "tensors.safetensors")
        return folder
    values |= _stored_besides(tuned.model, values)
    with ranks_as_they_are(tuned) if tuned.spec.method == "adalora" else nullcontext():
        tuned.model.save_pretrained(
            str(folder), state_dict=values, safe_serialization=True, save_embedding_layers=False
        )
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    base = tuned.backbone.base
    config["base_model_name_or_path"] = base.portable
    config["revision"] = base.revision
    config["auto_mapping"] = None  # where PEFT has no word for the task it names classes to import, which none needs
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(key), list):  # sets, in the order of the day
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _stored_besides(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What PEFT stores besides: trained tensors by their other names (rows of a tied head), and VeRA's projections.

    These are drawn and not trained; a reader without PEFT's generator could not draw them again.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {id(names[name]): name for name in values}
    found = {name: values[first[id(p)]] for name, p in names.items() if id(p) in first and name not in values}
    buffers = model.named_buffers(remove_duplicate=False)
    return found | {name: held for name, held in buffers if name.startswith("base_model.vera_")}


def _keep_float32(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)


def _cuda_devices(backbone: Backbone) -> list[int]:
    device = backbone.device
    return [device.index or 0] if device.type == "cuda" else []
