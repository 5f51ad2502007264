"""A model's modules as they are now, and back: the one undo for everything PEFT does to a base.

PEFT replaces layers, adds attributes and flips flags, and undoes only part of it when loading fails half-way or the
last adapter is unloaded. A snapshot holds references, not copies of tensors, so it costs no memory to speak of.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

# A module's hooks lie in an OrderedDict.
_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """What every module of a model holds now: children, parameters, buffers, attributes, and what requires grad."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, _shallow(vars(module))) for module in model.modules()]
        self._grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put exactly these objects back; whatever was added since is forgotten."""
        for module, before in self._attributes:
            now = vars(module)
            for name in now.keys() - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                if content is not None:
                    _refill(value, content)
                now[name] = value
        for parameter, requires_grad in self._grad:
            parameter.requires_grad_(requires_grad)


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its content where it is a container, which may be changed in place."""
    return {
        name: (value, type(value)(value) if type(value) in _CONTAINERS else None) for name, value in attributes.items()
    }


def _refill(container: Any, content: Any) -> None:
    """Give a container its content back without replacing it: PEFT shares some between modules."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
