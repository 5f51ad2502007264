"""One process of a training run that `accelerate launch` or torchrun starts several of; the tests read what it writes.

several_processes.py SETTINGS   a JSON object: base, folder, quant, adapter, train, lengths, kill_at, resume, plant
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftkit.backbone.load import load_backbone
from peftkit.backbone.shard import whole
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import IGNORED, Example
from peftkit.errors import PeftkitError
from peftkit.events import Event, Warned
from peftkit.generation.forward import row_nll
from peftkit.process_group import launched
from peftkit.training import step as steps
from peftkit.training.checkpoint import Checkpoints
from peftkit.training.regularize import losses
from peftkit.training.sft import Stopped, train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject, save_adapter
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned


def rows(lengths: list[int], seed: int = 0) -> list[Example]:
    """Rows of given lengths; the second half of each is the answer."""
    draw = random.Random(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = [draw.randrange(3, 259) for _ in range(length)]
        labels = [token if at >= length // 2 else IGNORED for at, token in enumerate(ids)]
        made.append(Example(ids, labels, length // 2, index, f"made.jsonl:{index + 1}"))
    return made


def mean_of_means(self: steps.Step, total: float, tokens_at_once: int) -> steps.StepResult:
    """The bug to be caught: each process divides by its own tokens, and the mean over processes is taken."""
    own = sum(label != IGNORED for row in self.share for label in row.labels[1:])
    assert own  # rows for every process in every step
    factor = self.answer_tokens / own / self.team.size
    for parameter in self.model.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor
    return true_finish(self, total * factor, tokens_at_once)


true_finish, true_loss = steps.Step.finish, losses.TokenLoss.__call__


def main(given: dict[str, Any]) -> None:
    group, folder = launched(), Path(given["folder"])
    seen: dict[str, Any] = {"rank": group.rank, "rows": [], "trace": {}, "said": []}
    gradients: dict[str, torch.Tensor] = {}
    torch.manual_seed(1234 if given.get("resume") else 0)

    def watched(self: steps.Step, total: float, tokens_at_once: int) -> steps.StepResult:
        seen["rows"].append([row.where for row in self.share])
        result = (mean_of_means if given.get("plant") else true_finish)(self, total, tokens_at_once)
        if len(seen["rows"]) == 1:
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            gradients.update({n: whole(p.grad).clone() for n, p in named.items()})
        return result

    steps.Step.finish = watched  # type: ignore[method-assign]

    def exhausted(
        self: losses.TokenLoss, model: Any, batch: dict[str, Any], *paths: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The device of one process has no room for two rows at once after the first step."""
        starts = batch.get("cu_seq_lens_q")  # of rows without padding
        beside = len(batch["labels"]) if starts is None else len(starts) - 1
        if group.rank == given.get("exhausted") and beside > 1 and seen["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return true_loss(self, model, batch, *paths)

    losses.TokenLoss.__call__ = exhausted  # type: ignore[method-assign]

    def log(step: int, figures: dict[str, float]) -> None:
        kept = ("loss", "grad_norm", "learning_rate", "tokens", "answer_tokens", "held_out_nll")
        seen["trace"].setdefault(step, {}).update({key: figures[key] for key in figures if key in kept})
        if given.get("kill_at") == step and group.rank == given.get("kill_rank", 0):
            os.kill(os.getpid(), getattr(signal, given["signal"]))

    def report(event: Event) -> None:
        if isinstance(event, Warned):
            seen["said"].append(event.text)

    tuned: Tuned | None = None
    try:
        backbone = load_backbone(BaseSpec(source=given["base"]), QuantSpec(**given["quant"]), folder / "cache")
        tuned = inject(backbone, AdapterSpec(**{"r": 4, **given.get("adapter", {})}))
        checkpoints = Checkpoints(folder / "checkpoints")
        trained = train(
            tuned,
            rows(given["lengths"]),
            TrainSpec(**given["train"]),
            folder / f"trainer-{group.rank}",
            held_out=rows([6, 10], seed=1),
            checkpoints=checkpoints if group.leads else None,
            start=checkpoints.newest() if given.get("resume") else None,
            report=report,
            log=log,
        )
        seen["steps"] = trained.steps
        device = backbone.device
        seen["nll"] = row_nll(tuned.model, rows([6, 10], seed=1), pad_id=2, device=device)
        if given.get("generate"):
            from peftkit.generation.generate import generate

            prompts = [[5] * 20 + [9], [5] * 20 + [9, 10]]
            answers = generate(tuned.model, prompts, backbone.tokenizer, device=device, max_new_tokens=4)
            seen["answers"] = [answer.ids for answer in answers]
            with tuned.as_base() as base:
                seen["base_nll"] = row_nll(base, rows([6, 10], seed=1), pad_id=2, device=device)
    except (PeftkitError, Stopped) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    failed = "error" in seen and not seen["error"].startswith("Stopped")
    if tuned is not None and not failed:
        save_file(
            {n: whole(p.detach()).clone() for n, p in tuned.trainable.items()}, folder / f"{group.rank}.safetensors"
        )
        save_adapter(tuned, folder / f"adapter-{group.rank}")
    if gradients:
        save_file(gradients, folder / f"gradients-{group.rank}.safetensors")
    (folder / f"{group.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
