"""Extractive question answering: the answer is a span of the context, or there is none.

    peftkit train extractive_qa base=embedded:minilm quant.bits=32 data.train=squad.json save_as=answers
    peftkit train extractive_qa base=Qwen/Qwen3-1.7B data.train=squad.json data.max_length=384 data.stride=128

Rows are SQuAD's JSON (1.1 or 2.0) or a table of question, context and answers. Long contexts become windows that share
data.stride tokens; no answer is the first token. Measured by SQuAD's exact match and F1 beside the longest span and the
sentence most like the question.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show extractive_qa`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="extractive_qa")
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
