"""Text classification with one label per row, or several: LoRA and a head on a 4-bit base, or on an encoder.

    peftkit train text_classification base=Qwen/Qwen3-1.7B data.train=mails.csv save_as=topics
    peftkit train text_classification base=embedded:minilm quant.bits=32 data.train=mails.csv data.multi_label=true

Rows are a csv, jsonl or parquet with a text and a label; the columns are found by their usual names, or named with
data.text, data.pair and data.label. The head reads the last token of a causal base, and the first of an encoder.
Measured beside the most frequent label and TF-IDF with logistic regression, and with evaluate.shots the base itself,
asked in words.
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    QuantSpec,
    Run,
    Spec,
    TaskEvaluateSpec,
    TaskSpec,
    TrainSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show text_classification`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="text_classification")
    train: TrainSpec = TrainSpec(learning_rate=5e-4, num_train_epochs=3)
    evaluate: TaskEvaluateSpec = TaskEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, train head and adapter, measure them beside what is trivial, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
