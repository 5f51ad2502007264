"""Which tensor of a base's files becomes which of the model with a task's head, and which tensors the head brings.

A base's files may name tensors without the model's prefix, hold a language head that the task's model has no place
for, or the head of another task. transformers' own rule for names decides, as it does when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from peftkit.backbone.converted import shapes_only
from peftkit.backbone.heads import check_absent, renamed
from peftkit.base.head import Head

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Headed:
    """A base's files under a task's head."""

    head: Head
    architecture: str
    """Class of the model, as config.json names it."""
    files: Mapping[str, str]
    """Tensor of the files → what it is called in the model; what the model has no place for is left out."""
    absent: Mapping[str, Shape]
    """Tensors of the head that the files do not hold, or hold for other labels → their shapes."""
    left_out: tuple[str, ...] = ()
    """Tensors of the files that the model has no place for, sorted."""

    @property
    def answers(self) -> bool:
        """Whether the head is the decoder that the base has, so that nothing is new."""
        return self.head.kind == "seq2seq"

    def record(self) -> dict[str, Any]:
        """What a receipt says."""
        return self.head.record() | {"added": sorted(self.absent), "left_out": list(self.left_out)}


def headed(head: Head, config: Mapping[str, Any], shapes: Mapping[str, Shape], folder: str) -> Headed:
    """How the tensors of `shapes`, by their names in the files of `folder`, lie in the model with this head.

    Raises BackboneError where the files lack tensors that are not the head's.
    """
    model = shapes_only(config, head)
    kind = type(model).__name__
    if head.kind == "seq2seq":
        return Headed(head, kind, {name: name for name in shapes}, {})
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files, converted = _placed(model, renamed(head, str(config["model_type"])), shapes, own)
    absent = {name: shape for name, shape in own.items() if name not in {*files.values(), *converted}}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    absent = {name: shape for name, shape in absent.items() if name not in tied}
    check_absent(absent, model, folder)
    return Headed(head, kind, files, absent, tuple(sorted(shapes.keys() - files.keys())))


def _placed(
    model: Any, names: dict[str, str], shapes: Mapping[str, Shape], own: Mapping[str, Shape]
) -> tuple[dict[str, str], set[str]]:
    """File's tensor → its name in the model, and the model's tensors that are made of several of the files'."""
    mapping = get_model_conversion_mapping(model, names or None)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix, meta = model.base_model_prefix, model.state_dict()
    files, made = {}, set()
    for name, shape in shapes.items():
        found, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if found not in own and name in own:
            found, pattern = rename_source_key(name, [], [], prefix, meta)
        if found not in own:
            continue
        if pattern is not None:
            files[name] = name
            made.add(found)
        elif own[found] == shape:
            files[name] = found
    return files, made
