"""Texts given against texts wanted: translations (sacrebleu) and summaries (rouge-score)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peftkit.base.head import Head
from peftkit.data.tasks.task import Prediction, TaskRow
from peftkit.evaluation.tasks.metric import Measures, Metric, Numbers, Values, from_sums, mean_of
from peftkit.extras import extra

ROUGE = ("rouge1", "rouge2", "rougeL")


def translation(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """chrF2 and BLEU of the whole set, 0 to 100, with sacrebleu's signatures.

    A resample adds up the n-gram counts that sacrebleu takes of each sentence, as its own bootstrap does.
    """
    with extra("tasks", "measuring translations"):
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    wanted, given = [row.target for row in rows], [prediction.value for prediction in predictions]
    scorers: dict[str, Any] = {"chrf": CHRF(), "bleu": BLEU()}
    metrics, signatures, per_row = [], {}, {}
    for name, scorer in scorers.items():
        point = scorer.corpus_score(given, [wanted]).score
        counts = np.array(scorer._extract_corpus_statistics(given, [wanted]), dtype=np.float64)
        metrics.append(Metric(name, float(point), from_sums(counts, _each(scorer))))
        per_row[name] = _each(scorer)(counts)
        signatures[name] = str(scorer.get_signature())
    return Measures(tuple(metrics), "chrf", per_row["chrf"], {}, signatures)


def _each(scorer: Any) -> Values:
    def value(sums: Numbers) -> Numbers:
        counts = np.rint(sums).astype(np.int64).tolist()
        return np.array([scorer._compute_score_from_stats(line).score for line in counts])

    return value


def summarization(head: Head, rows: Sequence[TaskRow], predictions: Sequence[Prediction]) -> Measures:
    """ROUGE-1, ROUGE-2 and ROUGE-L: mean F over rows, 0 to 1, with Porter's stemmer as published figures have it.

    rouge-score knows the letters a to z and digits only: a note counts the references of which it sees nothing.
    """
    with extra("tasks", "measuring summaries"):
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    scorer, tokenizer = RougeScorer(list(ROUGE), use_stemmer=True), DefaultTokenizer(use_stemmer=True)
    found = [scorer.score(row.target, prediction.value) for row, prediction in zip(rows, predictions, strict=True)]
    columns = {name: np.array([scores[name].fmeasure for scores in found]) for name in ROUGE}
    metrics = tuple(
        Metric(name, float(column.mean()), mean_of(column), mean_of_shares=True) for name, column in columns.items()
    )
    unseen = sum(not tokenizer.tokenize(row.target) for row in rows)
    note = f"{unseen} of {len(rows)} references have no letters a to z: ROUGE sees nothing of them"
    signature = "rouge-score, f-measure, stemmer: Porter, mean over rows"
    return Measures(
        metrics, "rougeL", columns["rougeL"], {}, dict.fromkeys(ROUGE, signature), (note,) if unseen else ()
    )
