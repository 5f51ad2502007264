"""Direct preference optimization with LoRA on a 4-bit base: from pairs of a better and a worse answer.

    peftkit train dpo base=Qwen/Qwen3-4B data.train=pairs.jsonl save_as=polite
    python recipes/dpo.py --preset cpu data.train=pairs.jsonl

Rafailov et al. 2023, arXiv 2305.18290. The reference is the base with the adapter detached: no second model in
memory. Rows: `prompt`, `chosen`, `rejected`, or LLaMA-Factory's and alpaca's forms of them.
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
    """Settings of this recipe; each group's fields are in `peftkit recipes show dpo`."""

    base: BaseSpec = BaseSpec()
    quant: QuantSpec = QuantSpec(bits=4, quant_type="nf4", double_quant=True)
    adapter: AdapterSpec = AdapterSpec()
    data: PreferenceSpec = PreferenceSpec(kind="pairs")
    # The rate of zephyr-7b-dpo-qlora (alignment-handbook, LoRA r=16) and of LLaMA-Factory's llama3_lora_dpo.yaml: a
    # fortieth of what supervised LoRA takes.
    train: PreferenceTrainSpec = PreferenceTrainSpec(
        loss="dpo", beta=0.1, learning_rate=5e-6, num_train_epochs=1, warmup_ratio=0.1
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
