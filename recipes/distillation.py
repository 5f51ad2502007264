"""Distillation: LoRA on a 4-bit base learns from a teacher's probabilities of every answer token, beside the answers.

    peftkit train distillation base=Qwen/Qwen3-0.6B distil=Qwen/Qwen3-8B data.train=tickets.jsonl save_as=small
    peftkit train distillation distil=tickets@prod adapter.r=4 data.train=tickets.jsonl    # an adapter as the teacher
    python recipes/distillation.py --preset cpu distil=tickets data.train=tickets.jsonl

Hinton, Vinyals and Dean 2015, arXiv 1503.02531. An adapter of the same base teaches over the same tensors; a larger
base is held in 4 bits beside it, and must have the same vocabulary.
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    DataSpec,
    DistilSpec,
    EvaluateSpec,
    QuantSpec,
    Run,
    Spec,
    TrainSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show distillation`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    distil: DistilSpec = DistilSpec()
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, plan with the teacher, train, measure base against adapter, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from, cfg.distil)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
