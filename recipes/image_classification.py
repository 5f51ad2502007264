"""Image classification: a head on a frozen trunk, LoRA on its layers, or any part of it.

    peftkit train image_classification base=google/vit-base-patch16-224 data.train=photos/ save_as=signs
    peftkit train image_classification base=microsoft/resnet-50 data.train=photos/ adapter.method=lora \
        "adapter.target_modules=[convolution]"

Photographs lie in a folder for each class, or in a table of image and label; the base's own preprocessor prepares them.
A frozen trunk stays in evaluation mode, and the statistics of batch norms are the base's, bit for bit, whatever is
trained. Measured beside the most frequent class and logistic regression on small grey pictures.
"""

import sys

from peftkit import (
    MEMORY_PRESETS,
    AdapterSpec,
    BaseSpec,
    QuantSpec,
    Run,
    Spec,
    TaskEvaluateSpec,
    TaskSpec,
    TrainSpec,
    run_recipe,
)

PRESETS = MEMORY_PRESETS


class Config(Spec):
    """Settings of this recipe; each group's fields are in `peftkit recipes show image_classification`."""

    base: BaseSpec = BaseSpec(source="embedded:efficientnet-lite0")
    quant: QuantSpec = QuantSpec(bits=32)
    adapter: AdapterSpec = AdapterSpec(method="top_layers", top_layers=0)
    data: TaskSpec = TaskSpec(task="image_classification")
    train: TrainSpec = TrainSpec(learning_rate=1e-2, num_train_epochs=20)
    evaluate: TaskEvaluateSpec = TaskEvaluateSpec()
    init_from: str | None = None
    """Continue from an adapter of the registry: name, name@version or name@alias."""
    save_as: str | None = None
    """Name in the registry; the recipe's own name when left out."""


def main(cfg: Config, run: Run) -> None:
    """Audit the rows, train head and adapter, measure them beside what is trivial, keep the adapter."""
    run.audit(cfg.base, cfg.data)
    tuned = run.plan(cfg.base, cfg.quant, cfg.adapter, cfg.train, cfg.init_from)
    run.train(tuned, cfg.train)
    comparison = run.evaluate(tuned, cfg.evaluate)
    run.publish(tuned, comparison, cfg.save_as)


if __name__ == "__main__":
    sys.exit(run_recipe(__file__))
