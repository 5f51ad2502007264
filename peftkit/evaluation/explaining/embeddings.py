"""A task's score as a function of its input embeddings, and the two ends of the path that is integrated over."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from peftkit.backbone.heads import outputs_of
from peftkit.backbone.load import Backbone
from peftkit.data.tasks.pieces import Pieces
from peftkit.data.tasks.task import TaskExample
from peftkit.errors import BackboneError, ConfigError
from peftkit.evaluation.explaining.asked import Asked
from peftkit.evaluation.explaining.integrate import Score
from peftkit.evaluation.explaining.spec import Baseline
from peftkit.generation.forward import autocast


def ends(model: Any, backbone: Backbone, whole: Pieces, kind: Baseline) -> tuple[torch.Tensor, torch.Tensor]:
    """The input embeddings of a sequence and of its baseline, each of shape (tokens, width), in the model's dtype."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "inputs_embeds" not in inspect.signature(inner.forward).parameters or inner.config.is_encoder_decoder:
        raise BackboneError(
            f"{type(inner).__name__} cannot be called with embeddings in place of token ids",
            expected="an encoder or a causal base of transformers that takes inputs_embeds",
        )
    embedding = inner.get_input_embeddings()
    with torch.no_grad(), autocast(backbone.device, backbone.placement.compute_dtype):
        point = embedding(_ids(whole.ids, backbone)).detach()
        replaced = torch.zeros_like(point[0])
        if kind != "zero":
            replaced = embedding(_ids([_stand_in(kind, backbone)], backbone))[0].detach()
    baseline = point.clone()
    baseline[[*whole.first, *whole.second]] = replaced
    return point, baseline


def _ids(ids: Sequence[int], backbone: Backbone) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=backbone.device)


def _stand_in(kind: Baseline, backbone: Backbone) -> int:
    """The id of the token that stands for no text."""
    if kind == "pad":
        return backbone.tokenizer.pad_id
    mask = backbone.tokenizer.hf.mask_token_id
    if mask is None:
        raise ConfigError(["--baseline mask: this base's tokenizer has no mask token"], hint="--baseline pad or zero")
    return int(mask)


def score_of(model: Any, backbone: Backbone, example: TaskExample, asked: Asked, dtype: torch.dtype) -> Score:
    """Embeddings of shape (n, tokens, width) → the asked score of each, computed as predictions are."""
    head, length = backbone.head, len(example.input_ids)
    assert head is not None
    fixed = {"attention_mask": torch.ones(1, length, dtype=torch.long, device=backbone.device)}
    if example.type_ids is not None:
        fixed["token_type_ids"] = _ids(example.type_ids, backbone)[None]

    def score(embeds: torch.Tensor) -> torch.Tensor:
        with autocast(backbone.device, backbone.placement.compute_dtype):
            more = {name: value.expand(len(embeds), -1) for name, value in fixed.items()}
            result = model(inputs_embeds=embeds.to(dtype), **more)
        scores: torch.Tensor = asked.of(outputs_of(head, result))
        return scores

    return score


def check_same(score: Score, point: torch.Tensor, wanted: float, scores: NDArray[Any], backbone: Backbone) -> None:
    """Raise BackboneError where a base computes something else from embeddings than from token ids."""
    with torch.no_grad():
        found = float(score(point[None])[0])
    # Kernels differ by batch in their last bits; int8 layers also round what goes in, to 127 steps.
    step = 1 / 127 if backbone.quant.bits == 8 else torch.finfo(backbone.placement.compute_dtype).eps
    if abs(found - wanted) > 32 * step * max(1.0, float(abs(scores).max())):
        raise BackboneError(
            f"{type(backbone.model).__name__} gives {found:.6g} from embeddings and {wanted:.6g} from token ids",
            expected="the same score",
            hint="this base cannot be explained",
        )
