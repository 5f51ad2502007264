"""Partial fine-tuning of an LLM: the last blocks are trained in float32, everything below stays packed in 4 bits.

    peftkit train top_layers_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl adapter.top_layers=2 save_as=tickets
    python recipes/top_layers_sft.py --preset cpu data.train=tickets.jsonl

What enters the first trained block is computed once for every row and kept in a file (train.trunk_cache), so that from
the second epoch on the frozen blocks cost nothing. What was learned is registered as tensors, not as a LoRA;
`peftkit combine NAME --method svd --rank 32 --save-as X` extracts one, with its error.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show top_layers_sft`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec(method="top_layers", top_layers=4, train_head=False)
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec(trunk_cache=True)
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
