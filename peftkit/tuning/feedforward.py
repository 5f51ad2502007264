"""IA3's feed-forward layers, whose input is scaled and not their output."""

from __future__ import annotations

from typing import Any

from peftkit.backbone.load import Backbone
from peftkit.base.ref import read_config
from peftkit.errors import BaseError, TuningError
from peftkit.planning.architecture import architecture
from peftkit.planning.trained import adapted_linears, feed_forward
from peftkit.tuning.target_modules import Targets, ending, is_target, linear_endings


def check_feedforward(backbone: Backbone, wanted: Targets, inputs: list[str]) -> None:
    """Raise TuningError for feed-forward layers that are not adapted or that the base does not have."""
    if isinstance(wanted, list):
        outside = [end for end in inputs if end not in wanted]
        fact, expected = f"which adapter.target_modules={wanted!r} does not have", "some of adapter.target_modules"
        hint = f"adapter.target_modules=[{','.join([*wanted, *outside])}]"
    else:
        linears = [name for name, module in backbone.model.named_modules() if is_target(name, module, "all-linear")]
        outside = [end for end in inputs if not any(is_target(name, None, [end]) for name in linears)]
        fact, expected = "which no linear layer is called", "endings of names of linear layers"
        hint = f"adapter.feedforward_modules, from: {', '.join(sorted({ending(name) for name in linears}))}"
    if outside:
        raise TuningError(f"adapter.feedforward_modules names {outside}, {fact}", expected=expected, hint=hint)


def name_feedforward(config: Any, model: Any) -> None:
    """Name IA3's feed-forward layers in full where PEFT has written all-linear as full names.

    PEFT 0.21.2 leaves their endings as they are given, and refuses to read the config that it wrote: there
    feedforward_modules is no subset of target_modules (IA3Config.__post_init__).
    """
    if config.peft_type != "IA3" or set(config.feedforward_modules) <= set(config.target_modules):
        return
    layers = model.get_base_model().named_modules()
    config.feedforward_modules = {name for name, layer in layers if getattr(layer, "is_feedforward", False)}


def keys_values_feedforward(backbone: Backbone) -> tuple[list[str], list[str]]:
    """IA3's own choice: keys, values and the last layer of every MLP; and those of them whose input is scaled."""
    try:
        shape = architecture(read_config(backbone.base.folder))
    except BaseError as error:
        raise TuningError(
            f"which layers of {type(backbone.model).__name__} are its keys, values and feed-forward ends is not known",
            expected="adapter.target_modules and adapter.feedforward_modules, from: "
            + ", ".join(linear_endings(backbone.model)),
            hint="adapter.target_modules=[k_proj,v_proj,down_proj] adapter.feedforward_modules=[down_proj]",
        ) from error
    return [linear.name for linear in adapted_linears(shape, "auto")], [feed_forward(shape)]
