"""Gradual unfreezing of an LLM: first the head, then one block after another from the top, over a 4-bit trunk.

    peftkit train gradual_unfreezing_sft base=Qwen/Qwen3-4B data.train=tickets.jsonl save_as=tickets
    python recipes/gradual_unfreezing_sft.py --preset cpu data.train=tickets.jsonl

ULMFiT: Howard and Ruder 2018, arXiv 1801.06146: deep layers first, rates that fall by 2.6 from layer to layer, and the
slanted triangular schedule. In their ablation (table 7) unfreezing alone helps on one of three data sets, together with
the other two on all. train.unfreeze.direction=shallow_first train.unfreeze.every_epochs=0.5 begins at the other end;
any adapter.method goes with it.
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
    UnfreezeSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show gradual_unfreezing_sft`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec(method="top_layers", top_layers=4, train_head=True)
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec(
        lr_scheduler_type="slanted_triangular",
        layerwise=LayerwiseSpec(decay=1 / 2.6),
        unfreeze=UnfreezeSpec(direction="deep_first", every_epochs=0.5),
    )
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
