"""Odds ratio preference optimization with LoRA on a 4-bit base: answers and preferences learned in one run.

    peftkit train orpo base=Qwen/Qwen3-4B data.train=pairs.jsonl save_as=polite
    python recipes/orpo.py --preset cpu data.train=pairs.jsonl

Hong, Lee and Thorne 2024, arXiv 2403.07691. No reference: the better answer's likelihood is learned as in supervised
training, and beta weighs the odds against the worse one. Start from a base, not from an SFT adapter.
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    PreferenceEvaluateSpec,
    PreferenceSpec,
    PreferenceTrainSpec,
    QuantSpec,
    Run,
    Spec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show orpo`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: PreferenceSpec = PreferenceSpec(kind="pairs")
    # TRL's examples/scripts/orpo.py: 8e-5 with LoRA r=16, ten times that of full fine-tuning.
    train: PreferenceTrainSpec = PreferenceTrainSpec(
        loss="orpo", beta=0.1, learning_rate=8e-5, num_train_epochs=1, warmup_ratio=0.1
    )
    evaluate: PreferenceEvaluateSpec = PreferenceEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, plan, train, measure which answers base and adapter prefer, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
