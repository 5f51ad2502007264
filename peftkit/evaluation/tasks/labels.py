"""Labels given against labels wanted: one of each row, or any number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.tasks.calibration import calibration
from peftkit.evaluation.tasks.metric import (
    Measures,
    Metric,
    Numbers,
    Values,
    divide,
    f1,
    from_sums,
    mean_defined,
    mean_of,
    table,
)
from peftkit.extras import extra


def single_label(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Accuracy, macro-F1 and, where every prediction has probabilities, calibration.

    A prediction that names no label ("") is wrong: a miss of the true label, and of no label a false alarm.
    Macro-F1 is the mean over the labels that occur in the references or the predictions, as scikit-learn's.
    """
    with extra("tasks", "measuring labels"):
        from scipy.sparse import csr_array
        from sklearn.metrics import accuracy_score, f1_score
    wanted, given = [row.target for row in rows], [prediction.value for prediction in predictions]
    right = np.array([a == b for a, b in zip(wanted, given, strict=True)], dtype=np.float64)
    names = list(head.labels)
    macro = f1_score(wanted, given, labels=names, average="macro", zero_division=np.nan)
    sides = [csr_array(_one_hot(head, side)) for side in (wanted, given)]
    metrics = [
        Metric("accuracy", float(accuracy_score(wanted, given)), mean_of(right), mean_of_shares=True),
        Metric("macro_f1", float(macro), _macro_f1(sides[0], sides[1])),
    ]
    nameless = sum(value not in head.labels for value in given)
    notes = (f"{nameless} of {len(given)} predictions name no label: they count as wrong",) if nameless else ()
    calibrated = calibration(head, wanted, predictions, right)
    labels = _by_label(head, sides[0], sides[1])
    return Measures((*metrics, *calibrated), "macro_f1", right, labels, {}, notes)


def multi_label(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """Micro-F1, macro-F1 and the share of rows whose labels are all right and no others."""
    with extra("tasks", "measuring labels"):
        from scipy.sparse import csr_array
        from sklearn.metrics import accuracy_score, f1_score
    wanted = _indicators(head, [row.target for row in rows])
    given = _indicators(head, [prediction.value for prediction in predictions])
    right = (wanted == given).all(axis=1).astype(np.float64)
    micro, macro = (
        float(f1_score(wanted, given, average=average, zero_division=np.nan)) for average in ("micro", "macro")
    )
    a, b = csr_array(wanted), csr_array(given)
    totals = np.column_stack([(wanted * given).sum(axis=1), given.sum(axis=1), wanted.sum(axis=1)])
    metrics = (
        Metric("micro_f1", micro, from_sums(totals, lambda s: f1(s[:, 0], s[:, 1], s[:, 2]))),
        Metric("macro_f1", macro, _macro_f1(a, b)),
        Metric("subset_accuracy", float(accuracy_score(wanted, given)), mean_of(right), mean_of_shares=True),
    )
    return Measures(metrics, "micro_f1", right, _by_label(head, a, b), {})


def _macro_f1(wanted: Any, given: Any) -> Values:
    """Of indicators (rows × labels, sparse: at most one entry of a row need be there)."""
    hits = wanted.multiply(given).tocsr()

    def value(weights: Numbers) -> Numbers:
        return mean_defined(f1(weights @ hits, weights @ given, weights @ wanted))

    return value


def _by_label(head: Head, wanted: Any, given: Any) -> dict[str, dict[str, float | None]]:
    sums = (np.asarray(side.sum(axis=0)).ravel() for side in (wanted.multiply(given), given, wanted))
    return table(head.labels, *sums)


def _one_hot(head: Head, values: Sequence[Any]) -> Any:
    """A sparse indicator per row; a value that is no label has none."""
    from scipy.sparse import coo_array

    codes = {label: i for i, label in enumerate(head.labels)}
    known = [(i, codes[value]) for i, value in enumerate(values) if value in codes]
    places = np.array(known, dtype=np.int64).reshape(-1, 2)
    return coo_array((np.ones(len(known)), (places[:, 0], places[:, 1])), shape=(len(values), len(codes)))


def _indicators(head: Head, values: Sequence[Sequence[str]]) -> Numbers:
    return np.array([[float(label in given) for label in head.labels] for given in values])


def rates(wanted: Numbers, chosen: Numbers, weights: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Selection rate, true and false positive rate for each draw; `wanted` and `chosen` are 0 or 1 per row."""
    selected = divide(weights @ chosen, weights.sum(axis=1))
    true = divide(weights @ (chosen * wanted), weights @ wanted)
    false = divide(weights @ (chosen * (1 - wanted)), weights @ (1 - wanted))
    return selected, true, false
