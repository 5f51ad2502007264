"""A task's head in place of the language head: which model class has it, and which of its tensors are new.

The base's own tensors come from its files as ever. What the files do not have is the head, drawn from a seed; whatever
else is missing is an error, since transformers would fill it with random numbers too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from peftkit.base.head import Head, HeadKind
from peftkit.errors import BackboneError

_CLASSES: dict[HeadKind, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
    "image": AutoModelForImageClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
_POOLER = "pooler"


def model_class(head: Head | None) -> Any:
    """The auto class of transformers that loads a base with this head; the language head's where there is none."""
    return _CLASSES[head.kind] if head is not None else AutoModelForCausalLM


def settings_of(head: Head | None, kind: str) -> dict[str, Any]:
    """What a base's config says besides, with this head. Raises BackboneError for a base that has no such head."""
    if head is None:
        return {}
    check_kind(head.kind, kind)
    if head.kind in ("span", "seq2seq"):
        return {}
    names = dict(enumerate(head.labels))
    problems = {"multi_label": "multi_label_classification", "regression": "regression"}
    return {
        "id2label": names,
        "label2id": {label: index for index, label in names.items()},
        "problem_type": problems.get(head.problem, "single_label_classification"),
    }


def check_kind(wanted: HeadKind, kind: str) -> None:
    """Raise BackboneError where transformers has no such head for a model type."""
    known = _CLASSES[wanted]._model_mapping.keys()
    if kind not in {str(config.model_type) for config in known}:
        raise BackboneError(
            f"transformers has no {wanted} head for the model type {kind!r}",
            expected="a base with one: " + _examples(wanted),
            hint="choose another base",
        )


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the modules that belong to the task's head, of those with parameters; () for a language head.

    They are what stands beside the base model, and the pooler, which a base's files may lack.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    if not prefix or _generates(model):
        return ()
    base = _parts(model, prefix)
    if not base:
        return ()
    beside = [name for name, child in model.named_children() if child not in base and _holds(child)]
    poolers = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and name.rpartition(".")[2] == _POOLER and _holds(module)
    ]
    return (*poolers, *beside)


def head_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of `head_modules`, in the model's order."""
    heads = head_modules(model)
    return tuple(name for name, _ in model.named_parameters() if _in(name, heads))


def check_absent(absent: Collection[str], model: nn.Module, folder: str) -> None:
    """Raise BackboneError where a base's files lack tensors that are not the head's."""
    heads = head_modules(model)
    lost = sorted(name for name in absent if not _in(name, heads))
    if lost:  # transformers fills them with random numbers
        raise BackboneError(
            f"{folder} lacks {len(lost)} tensors of the model: {', '.join(lost[:3])}",
            expected="all tensors that config.json asks for",
            hint="fetch the base again",
        )


def linear_names(model: nn.Module) -> Iterator[str]:
    """Names of the head's linear layers, which are never quantized: they are trained."""
    heads = head_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _in(f"{name}.", heads):
            yield name


def outputs_of(head: Head, result: Any) -> torch.Tensor:
    """A head's scores in float32: (rows, labels), of tokens (rows, longest, labels), of spans (rows, longest, 2)."""
    if head.kind == "span":
        return torch.stack([result.start_logits, result.end_logits], dim=-1).float()
    scores: torch.Tensor = result.logits
    return scores.float()


def renamed(head: Head | None, kind: str) -> dict[str, str]:
    """Pattern → replacement for names in a causal base's files, where the head's class calls the base otherwise.

    LlamaForQuestionAnswering and its like say `transformer` for what the files call `model`.
    """
    known = {str(config.model_type): config for config in AutoModelForCausalLM._model_mapping.keys()}  # noqa: SIM118
    if head is None or kind not in known:
        return {}
    both = (model_class(head), AutoModelForCausalLM)
    own, files = (str(auto._model_mapping[known[kind]].base_model_prefix) for auto in both)
    return {} if own == files else {rf"^{files}\.": f"{own}."}


def _parts(model: Any, prefix: str) -> list[nn.Module]:
    """The base model, or where the head's class has no such module (T5's for spans) its embeddings and stacks."""
    base = getattr(model, prefix, None)
    if isinstance(base, nn.Module):
        return [base]
    stacks = [getattr(model, name, None) for name in ("encoder", "decoder")]
    return [model.get_input_embeddings(), *stacks] if all(isinstance(each, nn.Module) for each in stacks) else []


def _examples(kind: HeadKind) -> str:
    names: Mapping[Any, Any] = _CLASSES[kind]._model_mapping
    preferred = ("bert", "llama", "qwen3", "vit", "resnet", "efficientnet", "t5", "bart")
    known = {str(config.model_type) for config in names.keys()}  # noqa: SIM118  (a lazy mapping of transformers)
    return ", ".join(name for name in preferred if name in known)


def _generates(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _in(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
