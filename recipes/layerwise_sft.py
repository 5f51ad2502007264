"""LoRA on a 4-bit base with layer-wise learning rates: the top learns fastest, every layer below it a little slower.

    peftkit train layerwise_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl train.layerwise.decay=0.95
    python recipes/layerwise_sft.py --preset cpu data.train=tickets.jsonl

Howard and Ruder 2018, arXiv 1801.06146, section 3.2; 0.95 is Zhang et al.'s factor for BERT, arXiv 2006.05987. Any
adapter.method goes with it; a table of rates instead of one factor is
train.layerwise.decay=null "train.layerwise.rates={0-17: 0.1, 18-35: 1}".
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    DataSpec,
    EvaluateSpec,
    LayerwiseSpec,
    QuantSpec,
    Run,
    Spec,
    TrainSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show layerwise_sft`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec(layerwise=LayerwiseSpec(decay=0.95))
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
