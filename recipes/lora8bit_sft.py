"""Supervised fine-tuning with LoRA on an 8-bit base: closer to the 16-bit weights, twice the memory of 4 bits.

    peftkit train lora8bit_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl save_as=tickets
    python recipes/lora8bit_sft.py --preset cpu data.train=tickets.jsonl

Dettmers et al. 2022, arXiv 2208.07339 (LLM.int8). Evaluation runs on the path that training ran on.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show lora8bit_sft`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=8)
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
