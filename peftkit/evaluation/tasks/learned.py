"""Baselines that scikit-learn fits: words weighted by TF-IDF, or grey pixels, under a linear model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.picture import rgb
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.errors import DataError
from peftkit.evaluation.tasks.metric import Numbers
from peftkit.extras import extra

SIDE = 16
"""Images are shrunk to 16 × 16 grey pixels."""
STEPS = 1000
"""At most so many steps of the solver."""


def linear_on_words(
    head: Head, train_rows: Sequence[TaskRow], rows: Sequence[TaskRow], seed: int
) -> dict[str, list[Prediction]]:
    """TF-IDF of single words (sublinear term frequency) under logistic regression, or ridge for numbers.

    C = 10: scikit-learn's default of 1 over-regularises rows of length one. Measured on ag_news with 100 and 1000
    training rows and sst2: accuracy .626, .840, .818 against .568, .839, .797; with word pairs .596, .829, .813.
    Several labels are told apart one by one. Empty where no training text has a word that counts.
    """
    with extra("tasks", "the TF-IDF baseline"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    texts, unseen = [_text(row) for row in train_rows], [_text(row) for row in rows]
    if not any(vectorizer.build_analyzer()(text) for text in texts):
        return {}
    x, y = vectorizer.fit_transform(texts), vectorizer.transform(unseen)
    if head.problem == "regression":
        given = Ridge(random_state=seed).fit(x, np.array([row.target for row in train_rows])).predict(y)
        return {"TF-IDF + ridge": [Prediction(float(value)) for value in given]}
    return {"TF-IDF + LR": _classified(head, x, y, train_rows, _linear(10.0, seed))}


def linear_on_pixels(
    head: Head, train_rows: Sequence[TaskRow], rows: Sequence[TaskRow], seed: int
) -> dict[str, list[Prediction]]:
    """Logistic regression on 16 × 16 grey pixels, each between 0 and 1."""
    x, y = (np.array([_pixels(row) for row in part]) for part in (train_rows, rows))
    return {"pixels + LR": _classified(head, x, y, train_rows, _linear(1.0, seed))}


def _linear(c: float, seed: int) -> Any:
    with extra("tasks", "the linear baseline"):
        from sklearn.linear_model import LogisticRegression
    return LogisticRegression(C=c, max_iter=STEPS, random_state=seed)


def _text(row: TaskRow) -> str:
    return row.text if row.pair is None else f"{row.text} {row.pair}"


def _pixels(row: TaskRow) -> Numbers:
    if row.image is None:
        raise DataError(f"{row.where}: the row has no image", expected="a path to an image")
    return np.asarray(rgb(row.image).convert("L").resize((SIDE, SIDE)), dtype=np.float64).ravel() / 255


def _classified(head: Head, x: Any, y: Any, train_rows: Sequence[TaskRow], model: Any) -> list[Prediction]:
    if head.problem == "multi_label":
        columns = [[label in row.target for row in train_rows] for label in head.labels]
        odds = np.column_stack([_odds(x, y, column, (False, True), model)[:, 1] for column in columns])
        return [_several(head, line) for line in odds]
    odds = _odds(x, y, [row.target for row in train_rows], head.labels, model)
    best = odds.argmax(axis=1)
    return [
        Prediction(head.labels[i], float(line[i]), tuple(map(float, line))) for i, line in zip(best, odds, strict=True)
    ]


def _several(head: Head, odds: Numbers) -> Prediction:
    value = tuple(label for label, share in zip(head.labels, odds, strict=True) if share >= 0.5)
    return Prediction(value, None, tuple(map(float, odds)))


def _odds(x: Any, y: Any, targets: Sequence[Any], labels: Sequence[Any], model: Any) -> Numbers:
    """Probability of every label (rows × labels); one that no training row has gets 0."""
    odds = np.zeros((y.shape[0], len(labels)))
    if len(set(targets)) == 1:
        odds[:, list(labels).index(targets[0])] = 1.0
        return odds
    model.fit(x, np.array(targets))
    places = [list(labels).index(label) for label in model.classes_.tolist()]
    odds[:, places] = model.predict_proba(y)
    return odds
