"""Summarization: LoRA on a 4-bit base that chats, or on an encoder-decoder such as T5, Pegasus or BART.

    peftkit train summarization base=Qwen/Qwen3-1.7B data.train=articles.jsonl data.too_long=truncate save_as=brief
    peftkit train summarization base=google-t5/t5-small data.train=articles.jsonl data.instruction=summarize:

Rows are a csv, jsonl or parquet with a text and its summary; the columns are found by their usual names, or named with
data.text and data.label. A base that chats is asked "Summarize the text in a few sentences." before each text, or what
data.instruction says. data.too_long=truncate cuts texts, and never summaries on a base that chats. Measured with ROUGE
beside the first sentences (lead-3, lead-1) and the base itself, with evaluate.shots also shown solved rows.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show summarization`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: TaskSpec = TaskSpec(task="summarization")
    train: TrainSpec = TrainSpec(learning_rate=2e-4, num_train_epochs=3)
    evaluate: TaskEvaluateSpec = TaskEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, train the adapter, measure what it writes beside the base and lead-3, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
