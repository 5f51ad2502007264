"""Regression: a number for a text, or for two: LoRA and a head on a 4-bit base, or on an encoder.

    peftkit train regression base=Qwen/Qwen3-1.7B data.train=ratings.csv data.label=stars save_as=stars
    peftkit train regression base=embedded:minilm quant.bits=32 data.train=pairs.csv data.pair=sentence2

The squared error is minimized on the numbers as they are: scale a label of large numbers before. Measured beside the
mean and TF-IDF with ridge regression.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show regression`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="regression")
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
