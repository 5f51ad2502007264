"""The settings of upstream's trainers, with everything explicit that TRL or transformers would otherwise choose."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from pathlib import Path

from trl import SFTConfig

from peftkit.training.rates import learning_rate
from peftkit.training.schedule import Schedule
from peftkit.training.spec import TrainSpec
from peftkit.tuning.tuned import Tuned


class _Arguments(SFTConfig):  # type: ignore[misc]
    """TRL's settings for a model that is where it belongs: Trainer would put a sharded one on a GPU whole."""

    @property
    def place_model_on_device(self) -> bool:
        """Never."""
        return False


def sft_arguments(tuned: Tuned, plan: Schedule, spec: TrainSpec, folder: Path, optim: str) -> SFTConfig:
    """TRL's settings, with everything explicit that TRL or transformers would otherwise choose."""
    arguments = _Arguments(
        output_dir=str(folder),
        max_steps=len(plan),
        per_device_train_batch_size=spec.rows_per_step,  # the loader yields a step; training/step splits it
        gradient_accumulation_steps=1,
        learning_rate=learning_rate(tuned, spec),
        lr_scheduler_type="constant",  # what the rate does is `create_scheduler`'s
        optim=optim,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        max_length=None,  # rows are cut or refused in data/, never here
        packing=False,
        bf16=False,  # mixed precision is ours: generation.forward.autocast, the same in evaluation
        fp16=False,
        gradient_checkpointing=False,  # training.memory.checkpoint_activations: upstream knows no single blocks
        activation_offloading=spec.activation_offloading,
        logging_nan_inf_filter=False,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to=spec.report_to or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=tuned.backbone.device.type == "cpu",
        dataloader_pin_memory=False,
        push_to_hub=False,
    )
    # The backbone is on one device; with several visible, Trainer would wrap it in DataParallel, which TRL refuses.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
