"""What preferences minimize, from the log-likelihoods of whole answers; each a float32 tensor with a value per row.

Against TRL 1.16, on the same batch: dpo (sigmoid, robust, hinge, ipo) and kto are its formulas. ORPO's odds are its
too; the NLL beside them is that of the answer per token and pair, as in the paper (eq. 6), where TRL takes the mean
over all tokens of a batch, prompts included. The NLL of RPO is per token and pair as well (arXiv 2404.19733, eq. 1),
where TRL takes the mean over a batch's answer tokens: such a mean changes with how a step is split.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from peftkit.training.preference.spec import PreferenceTrainSpec


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    spec: PreferenceTrainSpec,
) -> torch.Tensor:
    """The loss of each pair: log-likelihoods in nats under the policy and the base, and answer tokens, all (pairs,)."""
    better, worse = chosen - reference_chosen, rejected - reference_rejected
    if spec.loss_type == "ipo":
        margin = better / chosen_tokens - worse / rejected_tokens
        loss = (margin - 1 / (2 * spec.beta)) ** 2
    else:
        margin = spec.beta * (better - worse)
        if spec.loss_type == "hinge":
            loss = torch.relu(1 - margin)
        elif spec.loss_type == "robust":
            flipped = spec.label_smoothing
            loss = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
        else:
            loss = -logsigmoid(margin)
    if spec.sft_weight:
        loss = loss - spec.sft_weight * chosen / chosen_tokens
    return loss


def orpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The loss of each pair: NLL of the better answer per token - β · log σ(log odds ratio), (pairs,).

    log odds(y) = log p - log(1 - p), where log p is the mean log-likelihood of a token (eq. 3 and 4 of the paper).
    """
    better, worse = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = (better - worse) - (_log1mexp(better) - _log1mexp(worse))
    return -better - beta * logsigmoid(log_odds)


def kto(
    answer: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    divergence: torch.Tensor,
    spec: PreferenceTrainSpec,
) -> torch.Tensor:
    """The loss of each answer: λ · (1 - σ(± β · (log-ratio - divergence))), (rows,); `desirable` is a bool tensor."""
    above = spec.beta * (answer - reference - divergence)
    wanted = spec.desirable_weight * (1 - torch.sigmoid(above))
    unwanted = spec.undesirable_weight * (1 - torch.sigmoid(-above))
    return torch.where(desirable, wanted, unwanted)


def _log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler 2012).

    A mean log-likelihood of 0 (every token certain) is taken as the next float below it: the odds would be infinite.
    """
    x = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    near = x > -0.6931472
    # `where` lets gradients of both branches through, so that each gets numbers it can differentiate.
    small, large = torch.where(near, x, -1.0), torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
