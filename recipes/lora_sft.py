"""Supervised fine-tuning with LoRA on 16- or 32-bit weights: the ground truth for the quantized recipes.

    peftkit train lora_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl save_as=tickets
    python recipes/lora_sft.py --preset cpu data.train=tickets.jsonl

Hu et al. 2021, arXiv 2106.09685. On a CPU 16 bits compute in float32 by default, 32 bits everywhere.
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    DataSpec,
    EvaluateSpec,
    QuantSpec,
    Run,
    Spec,
    TrainSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show lora_sft`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=16)
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, plan, train, measure base against adapter, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
