"""Token classification (named entities, parts of speech): a tag for every word, on an encoder or on a 4-bit base.

    peftkit train token_classification base=embedded:minilm quant.bits=32 data.train=train.conll data.held_out=dev.conll
    peftkit train token_classification base=Qwen/Qwen3-1.7B data.train=rows.jsonl data.text=tokens data.label=tags

Rows are CoNLL files or columns of words and tags. A word's tag is learned and read at its first sub-token; rows above
the limit become windows, in which every word counts once. A causal base sees only the words before: an encoder of the
same size does better. Measured by strict spans (seqeval) beside the most frequent tag of each word.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show token_classification`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="token_classification")
    train: TrainSpec = TrainSpec(learning_rate=5e-4, num_train_epochs=5)
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
