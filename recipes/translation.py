"""Translation: LoRA on a 4-bit base that chats, or on an encoder-decoder such as T5, Marian or BART.

    peftkit train translation base=Qwen/Qwen3-1.7B data.train=train.en.gz+train.de.gz save_as=en-de
    peftkit train translation base=Helsinki-NLP/opus-mt-en-de data.train=pairs.csv

Rows are two files of as many lines, or a table with columns such as source and target, or en and de: the second is the
target. A base that chats is asked "Translate into German." before each text, or what data.instruction says; an
encoder-decoder gets data.instruction before each source, and nothing without. Measured with chrF and BLEU of the whole
held-out set beside the copied source and the base itself, with evaluate.shots also shown solved rows.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show translation`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="translation")
    train: TrainSpec = TrainSpec(learning_rate=2e-4, num_train_epochs=3)
    evaluate: TaskEvaluateSpec = TaskEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, train the adapter, measure what it writes beside the base and the source, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
