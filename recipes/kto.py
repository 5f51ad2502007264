"""Kahneman-Tversky optimization with LoRA on a 4-bit base: from single answers that are wanted or not.

    peftkit train kto base=Qwen/Qwen3-4B data.train=ratings.jsonl save_as=polite
    python recipes/kto.py --preset cpu data.train=ratings.jsonl

Ethayarajh et al. 2024, arXiv 2402.01306. The reference is the base with the adapter detached: no second model in
memory. Rows: `prompt`, `completion` and `label` (true or false); of pairs, each gives a wanted and an unwanted answer.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show kto`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: PreferenceSpec = PreferenceSpec(kind="labelled")
    # LLaMA-Factory's llama3_lora_kto.yaml. The paper's divergence is estimated over a step: 16 rows are few enough.
    train: PreferenceTrainSpec = PreferenceTrainSpec(
        loss="kto", beta=0.1, learning_rate=5e-6, num_train_epochs=1, warmup_ratio=0.1
    )
    evaluate: PreferenceEvaluateSpec = PreferenceEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias.
    The reference is the base without it all the same."""
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
