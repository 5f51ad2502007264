"""Continued pre-training on plain text: every token is learned, documents of any length are split and lose nothing.

    peftkit train continued_pretraining base=Qwen/Qwen3-4B-Base data.train=handbook.jsonl save_as=handbook
    python recipes/continued_pretraining.py --preset cpu data.train=handbook.txt

Rows are {"text": ...} or lines of a txt file. The rank is higher than for answers, since text holds more to learn
(Biderman et al. 2024, arXiv 2405.09673); adapter.method=full with quant.bits=16 trains every tensor instead. Likelihood
on held-out text is measured, and what was forgotten of general text; no answers are generated.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show continued_pretraining`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec(r=64, lora_alpha=128)
    data: DataSpec = DataSpec(format="text", max_length=1024, too_long="split")
    train: TrainSpec = TrainSpec(num_train_epochs=1)
    evaluate: EvaluateSpec = EvaluateSpec(max_generated_rows=0)
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
