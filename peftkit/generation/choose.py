"""The next token of each row of logits: the likeliest, or one drawn by a request's own sampling and seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit.generation.requests import Logprob, Sampling

UNDECIDED = -1
"""In place of a token where a row has no best one: NaN or infinite logits, or a mask that allows nothing."""

# Sorting so many of the likeliest is enough for nearly every top-p, and a tenth of the work of sorting a vocabulary.
_LIKELIEST = (512, 8192)


class Chooser:
    """Chooses the tokens of one request; it holds the request's random numbers.

    They are drawn on the CPU, one per token, so an answer depends neither on the device nor on other requests.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.sampling.temperature == 0

    def choose(self, logits: Tensor, mask: Tensor | None = None) -> int:
        """The next token by logits (vocab,), of those that `mask` (vocab,) bool allows; UNDECIDED when there is none.

        A mask that is shorter than the logits allows none of the tokens beyond it.
        """
        return choose_all(logits.unsqueeze(0), [self], None if mask is None else [mask])[0]

    def draw(self, logits: Tensor) -> int:
        """A token drawn by logits (vocab,) on the CPU; -inf is never drawn."""
        weights = kept_weights(logits, self.sampling)
        if weights is None:
            return UNDECIDED
        upto = weights.cumsum(0)
        point = torch.rand(1, generator=self._random, dtype=torch.float64) * upto[-1]
        # In the order of ids, not of likelihood: two logits that change places by rounding do not change the token.
        return int(torch.searchsorted(upto, point, right=True))


def choose_all(logits: Tensor, choosers: Sequence[Chooser], masks: Sequence[Tensor | None] | None = None) -> list[int]:
    """The next token of every row of logits (rows, vocab), which stay as they are; see `Chooser.choose`.

    Greedy rows share one reduction on the logits' device; only rows that are drawn are copied to the CPU.
    """
    allowed = logits if masks is None else _masked(logits, masks)
    best, likeliest = allowed.max(dim=-1)
    tokens: list[int] = torch.where(best.isfinite(), likeliest, UNDECIDED).tolist()
    drawn = [row for row, chooser in enumerate(choosers) if not chooser.greedy]
    if drawn:
        rows = (allowed if len(drawn) == len(tokens) else allowed[drawn]).cpu()
        for row, scores in zip(drawn, rows, strict=True):
            tokens[row] = choosers[row].draw(scores)
    return tokens


def _masked(logits: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    forbidden = torch.ones((len(rows), logits.shape[1]), dtype=torch.bool)
    for i, mask in enumerate(mask for mask in masks if mask is not None):
        width = min(len(mask), logits.shape[1])
        torch.logical_not(mask[:width], out=forbidden[i, :width])
    allowed = logits.clone()
    allowed[rows] = logits[rows].masked_fill(forbidden.to(logits.device), -torch.inf)
    return allowed


def kept_weights(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """What tokens are drawn by, (vocab,) float64, the likeliest 1 and 0 for those that top-k or top-p leave out.

    The order is that of transformers: temperature, top-k (with all ties of the last), top-p (with the token that
    crosses it; of equals the lower id first). None when the largest logit is not a number.
    """
    scores = logits.double()
    best = scores.max()
    if not best.isfinite():
        return None
    scores = (scores - best) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    weights = scores.exp()
    return weights if sampling.top_p >= 1 else _nucleus(weights, sampling.top_p)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    wanted = top_p * weights.sum()
    candidates = _likely(weights, wanted)
    ordered, order = weights[candidates].sort(descending=True, stable=True)
    before = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)[:-1]])
    kept = candidates[order[before < wanted]]
    return torch.zeros_like(weights).index_copy(0, kept, weights[kept])


def _likely(weights: Tensor, wanted: Tensor) -> Tensor:
    """Ids, ascending, of the likeliest tokens that weigh `wanted` together, and perhaps of some more."""
    for count in _LIKELIEST:
        if count < len(weights):
            floor = weights.topk(count).values[-1]
            ids = ((weights >= floor) & (weights > 0)).nonzero()[:, 0]
            if weights[ids].sum() >= wanted:
                return ids
    return weights.nonzero()[:, 0]


def logprobs(logits: Tensor, token: int, count: int) -> Logprob:
    """Log-probabilities of `token` and of the `count` likeliest tokens, by raw logits (vocab,) in float32."""
    values = torch.log_softmax(logits.float(), dim=-1)
    likeliest = values.topk(count)
    chosen, *best = torch.cat([values[token : token + 1], likeliest.values]).tolist()
    return Logprob(token, chosen, tuple(zip(likeliest.indices.tolist(), best, strict=True)))
