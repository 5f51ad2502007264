"""Whether a probability means what it says: expected calibration error, likelihood and Brier score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction
from peftkit.evaluation.tasks.metric import Metric, Numbers, Values, mean_of

BINS = 15


def calibration(head: Head, wanted: Sequence[str], predictions: Sequence[Prediction], right: Numbers) -> list[Metric]:
    """ECE where every prediction has a confidence; NLL (nats) and Brier score where every one has probabilities.

    Brier is Σ_k (p_k − y_k)², between 0 and 2. A probability of 0 counts as 2.2e-16 (a float64's smallest step), as in
    scikit-learn's log_loss.
    """
    metrics = []
    confidences = [prediction.confidence for prediction in predictions]
    if all(confidence is not None for confidence in confidences):
        values = expected_calibration_error(np.array(confidences, dtype=np.float64), right)
        metrics.append(_lower("ece", values, right.size))
    if all(len(prediction.probabilities) == len(head.labels) for prediction in predictions):
        given = np.array([prediction.probabilities for prediction in predictions], dtype=np.float64)
        true = np.array([head.labels.index(label) for label in wanted])
        likely = given[np.arange(true.size), true]
        nll = -np.log(np.clip(likely, np.finfo(np.float64).eps, 1.0))
        brier = (given**2).sum(axis=1) - 2 * likely + 1
        metrics += [_lower("nll", mean_of(nll), true.size), _lower("brier", mean_of(brier), true.size)]
    return metrics


def expected_calibration_error(confidence: Numbers, right: Numbers) -> Values:
    """ECE = Σ_b |B_b|/n · |acc(B_b) − conf(B_b)| over 15 bins ((b−1)/15, b/15] of equal width (Guo et al. 2017, eq. 3).

    Noise adds to the gap of a bin and never takes away: resamples lie above the set's own ECE, and a small one may lie
    below its interval.
    Since |B|·(acc − conf) is the sum of right − confidence over a bin, the sums per bin are all that is needed.
    """
    edges = np.linspace(0.0, 1.0, BINS + 1)
    # right=True: a confidence on an edge belongs to the bin below it; 0 itself to the first.
    bins = np.digitize(confidence, edges[1:-1], right=True)
    gaps = np.zeros((right.size, BINS))
    gaps[np.arange(right.size), bins] = right - confidence

    def value(weights: Numbers) -> Numbers:
        total: Numbers = np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)
        return total

    return value


def _lower(name: str, values: Values, rows: int) -> Metric:
    return Metric(name, float(values(np.ones((1, rows)))[0]), values, higher_is_better=False)
