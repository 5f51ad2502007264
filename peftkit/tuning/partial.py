"""Partial fine-tuning: tensors of the base itself are trained, in a second tree of modules beside it.

The trained tensors are float32 copies in a skeleton of the base (skeleton.py); everything else is shared with it, so
the base stays as it was, and what it computes can be measured at any time. Over 4 or 8 bits, the linear layers that
are trained are loaded unquantized (`dense_layers`): training starts from the numbers of the base's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.heads import head_parameters
from peftkit.backbone.load import Backbone, Dense
from peftkit.errors import TuningError
from peftkit.events import Note, Report, Warned, silent
from peftkit.process_group import launched
from peftkit.tuning.depth import depths
from peftkit.tuning.layers import chosen_layers
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.skeleton import skeleton
from peftkit.tuning.tensors import held, owned, put, unpacked
from peftkit.tuning.tuned import Tuned

# What transformers hangs on a quantized model, and what makes Trainer refuse it: the skeleton's own are unquantized.
_QUANTIZER = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def dense_layers(spec: AdapterSpec) -> Dense | None:
    """What `load_backbone` has to leave unquantized for this method; None where that is nothing."""
    if METHODS[spec.method].kind != "tensors":
        return None
    return lambda model: {
        name.removesuffix(".weight") for name in partial_names(model, spec) if _is_linear(model, name)
    }


def inject_partial(
    backbone: Backbone,
    spec: AdapterSpec,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    report: Report = silent,
) -> Tuned:
    """Make the tensors that `spec` names trainable, in float32; until then the logits are the base's.

    `start` holds other numbers to begin with, and then names the tensors. Raises TuningError when nothing is named,
    for a method that does not go with the base, and where its layers would meet tensors of another dtype.
    """
    _refuse_sharded()
    model = skeleton(backbone.model)
    for name in _QUANTIZER:
        vars(model).pop(name, None)
    wanted = start if start is not None else partial_names(model, spec)
    names = tuple(name for name in owned(model) if name in wanted)  # the order of a checkpoint's optimizer states
    given = start if start is not None else _numbers(model, names, report)
    numbers = {name: given[name].detach().to(backbone.device, torch.float32, copy=True) for name in names}
    _refuse_buffers(model, names)
    put(model, {name: nn.Parameter(value) for name, value in numbers.items()})
    _check_dtypes(model, backbone, spec)
    report(Note(f"{_parted(names, backbone.model)}the base's own tensors stay as they are"))
    return Tuned(model, backbone, spec, names)


def _numbers(model: nn.Module, names: Sequence[str], report: Report) -> dict[str, torch.Tensor]:
    """What training starts from: the base's own numbers, dequantized where the model holds no others."""
    owners, packed = owned(model), {id(layer) for layer in quantized_linears(model).values()}
    dequantized = [name for name in names if owners[name][1] == "weight" and id(owners[name][0]) in packed]
    if dequantized:
        fact = f"{len(dequantized)} of the trained layers are held in few bits: they start from the dequantized numbers"
        report(Warned(fact, "a base of 16-bit files starts from the original ones"))
    return {name: unpacked(owners[name][0]) if name in dequantized else held(*owners[name]) for name in names}


def partial_names(model: Any, spec: AdapterSpec) -> tuple[str, ...]:
    """Names of the tensors that a method trains, in the model's order; the model may be without numbers.

    A task's head is always among them. Raises TuningError when there are none.
    """
    named, heads = _named(model, spec), head_parameters(model)
    return (*named, *(name for name in heads if name not in named))


def _named(model: Any, spec: AdapterSpec) -> tuple[str, ...]:
    at = depths(model)
    tensors = dict(model.named_parameters())
    if spec.method == "full":
        return tuple(tensors)
    if spec.method == "top_layers":
        return _top(model, spec, tensors)
    if spec.method == "patterns":
        return _matching(model, list(tensors), spec.patterns or [])
    inside = chosen_layers(spec.layers or "all", len(at.blocks))
    wanted = _biases if spec.method == "bias_only" else _norms
    found = tuple(
        name for name in wanted(model) if spec.layers in (None, "all") or at.of[name] - 1 in inside
    )  # depth 1 is block 0
    if not found:
        what = {"bias_only": "biases", "norms": "norms"}[spec.method]
        where = "" if spec.layers in (None, "all") else f" in the layers {spec.layers}"
        raise TuningError(
            f"{type(model).__name__} has no {what}{where}, so method {spec.method} would train nothing",
            expected=f"a base with {what}: GPT-2, OPT and BERT have biases, Llama has none",
            hint="adapter.method=norms" if spec.method == "bias_only" else "adapter.method=lora",
        )
    return found


def _top(model: Any, spec: AdapterSpec, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    at, count = depths(model), spec.top_layers or 0
    if count > len(at.blocks):
        raise TuningError(
            f"adapter.top_layers={count}, and the base has {len(at.blocks)} layers",
            expected=f"at most {len(at.blocks)}",
        )
    first = at.top - count
    found = [name for name in tensors if first <= at.of[name] < at.top]
    if spec.train_head:
        found += [name for name in tensors if at.of[name] == at.top]
        found += [name for name in _head(model) if name not in found]  # a tied head is listed as the embedding
    if not found and not head_parameters(model):
        raise TuningError(
            "adapter.top_layers=0 without the head trains nothing",
            expected="at least one layer, or adapter.train_head=true",
        )
    return tuple(found)


def _head(model: Any) -> list[str]:
    """The head's own weight and bias, by the head's name even where the weight is the embedding's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    path = next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
    return [] if head is None or path is None else [f"{path}.{key}" for key, _ in head.named_parameters()]


def _biases(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


def _norms(model: Any) -> list[str]:
    """Every tensor of a layer without children whose weight is a vector: LayerNorm, RMSNorm and their like."""
    found = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and not module._modules:
            found += [f"{path}.{key}" for key, value in module._parameters.items() if value is not None]
    return found


def _matching(model: Any, tensors: list[str], patterns: list[str]) -> tuple[str, ...]:
    names = [*tensors, *(name for name in _head(model) if name not in tensors)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TuningError(
                f"adapter.patterns: {pattern!r} matches none of the base's {len(names)} tensors",
                expected=f"names such as {names[0]} or {names[-1]}, with * and ?",
            )
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise TuningError("adapter.patterns is empty", expected="names of tensors, with * and ?")
    own = [name for name in found if name in tensors]
    tied = [name for name in found if name not in tensors and _embedding(model) not in own]  # else it stays tied
    return (*own, *tied)


def _embedding(model: Any) -> str | None:
    table = model.get_input_embeddings().weight
    return next((name for name, parameter in model.named_parameters() if parameter is table), None)


def _is_linear(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    matrix = module._parameters.get("weight")
    is_table = isinstance(module, nn.Embedding) or matrix is None
    return key == "weight" and not is_table and matrix is not None and matrix.dim() == 2


def _parted(names: tuple[str, ...], base: Any) -> str:
    """A sentence where a head that the base shares with its embeddings becomes one of its own."""
    listed = {name for name, _ in base.named_parameters()}
    apart = [name for name in names if name not in listed]
    return f"{', '.join(apart)} is tied to the embeddings in the base and gets numbers of its own; " if apart else ""


def _refuse_buffers(model: nn.Module, names: Sequence[str]) -> None:
    """An attached version may replace a saved buffer; training has no gradient for one."""
    owners = owned(model)
    buffers = [name for name in names if owners[name][1] in owners[name][0]._buffers]
    if buffers:
        raise TuningError(
            f"{', '.join(buffers[:3])} {'is a buffer' if len(buffers) == 1 else 'are buffers'} of the base, not "
            "trained parameters",
            expected="an adapter of parameters alone to go on from; attached, or merged, it has its buffers too",
        )


def _check_dtypes(model: Any, backbone: Backbone, spec: AdapterSpec) -> None:
    """Raise TuningError where 16-bit layers are handed the float32 results of trained ones, or the other way round.

    Autocast, with its 16-bit compute dtype, casts what enters a product, and some kernels promote: which of a model's
    layers take what they get, two tokens tell (bitsandbytes has another kernel for one).
    """
    placement = backbone.placement
    if placement.dtype == torch.float32:
        return
    cast = placement.compute_dtype != torch.float32
    context = torch.autocast(backbone.device.type, placement.compute_dtype) if cast else nullcontext()
    try:
        with torch.no_grad(), context:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=backbone.device), use_cache=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        held, computed = (str(each).removeprefix("torch.") for each in (placement.dtype, placement.compute_dtype))
        raise TuningError(
            f"adapter.method={spec.method} trains float32 tensors, and {type(model).__name__} in {held}, computing in "
            f"{computed}, cannot use them beside its own: {str(error).splitlines()[0]}",
            expected="what is not quantized in float32",
            hint="quant.dtype=float32",
        ) from error


def _refuse_sharded() -> None:
    if launched().sharded:
        raise TuningError(
            "partial fine-tuning does not go with FSDP",
            expected="one process, or several with DDP",
            hint="accelerate launch --multi_gpu, or adapter.method=lora",
        )
