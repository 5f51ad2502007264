"""What one micro-batch contributes to a step's gradients: the NLL, and what regularizers make of it.

The loss that is shown is the NLL of the answer tokens, in nats, as the passes saw it (with their dropout and noise);
nothing that is added to it, so that runs with and without regularizers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from peftkit.errors import TrainingError
from peftkit.training import random_state
from peftkit.training.passes.paths import Loss, Paths
from peftkit.training.regularize.adversarial import ascent, uniform_start
from peftkit.training.regularize.dropout import Place, dropout_at, drops, places_of_dropout
from peftkit.training.regularize.embeddings import Change, changed, neftune, tokens_of, width_of
from peftkit.training.regularize.losses import twice
from peftkit.training.regularize.mixout import mixture
from peftkit.training.regularize.penalties import Penalties
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.tuning.depth import decaying
from peftkit.tuning.methods import METHODS
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True)
class Work:
    """One micro-batch of a step, and how to go through the model with it."""

    model: Any
    batch: dict[str, Any]
    """Inputs and labels, as `passes.paths.Paths.laid` makes them."""
    forward: Callable[[], AbstractContextManager[Any]]
    """Autocast: what belongs around a forward pass alone."""
    backward: Callable[[torch.Tensor], None]
    """Adds the gradients of a sum over answer tokens; the step divides it by the tokens of all its rows."""
    paths: Paths
    """The shortcuts of the passes."""


class Objective:
    """The plain objective: the NLL of the answer tokens."""

    draws = False
    """Whether passes draw random numbers of the objective's own."""

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss = loss or Paths().loss(RegularizeSpec())

    def gradients(self, work: Work) -> float:
        """Add the gradients of one micro-batch; its summed NLL in nats."""
        return self._pass(work)

    def finish(self) -> None:
        """Add what does not depend on rows; called once a step, when the gradients of all processes are summed."""

    def _pass(self, work: Work, share: float = 1.0) -> float:
        with work.forward():
            loss, nll = self.loss(work.model, work.batch, work.paths)
        value = float(nll.detach())
        work.backward(loss if share == 1.0 else loss * share)
        return value


class Regularized(Objective):
    """The NLL with the regularizers of a spec; every random number comes from torch's own generators."""

    def __init__(self, tuned: Tuned, spec: RegularizeSpec, loss: Loss | None = None) -> None:
        super().__init__(loss or Paths().loss(spec))
        self.spec = spec
        self.tuned = tuned
        start = {n: p.detach().clone() for n, p in tuned.trainable.items()} if spec.l2_sp or spec.mixout else {}
        spared = frozenset(tuned.trainable) - decaying(tuned.model, tuned.trainable)
        self.penalties = Penalties(spec.l1, spec.l2, spec.l2_sp, start, spared)
        self.matrices = {name: value for name, value in start.items() if spec.mixout and value.dim() > 1}
        """What mixout mixes the trained matrices with."""
        self.places: list[Place] = places_of_dropout(tuned.model) if spec.dropout is not None else []
        self.draws = bool(spec.dropout or spec.mixout or spec.neftune_alpha or spec.adversarial == "freelb")

    def gradients(self, work: Work) -> float:
        """Add the gradients of one micro-batch; its summed NLL in nats, that of the first pass where there are more."""
        if self.spec.r_drop:
            work = replace(work, batch=twice(work.batch))
        if self.spec.adversarial != "none":
            return self._ascent(work)
        noise = None
        if self.spec.neftune_alpha and work.model.training:
            noise = neftune(tokens_of(work.batch), self.spec.neftune_alpha)
        return self._changed_pass(work, noise)

    def finish(self) -> None:
        """Add the penalties' gradients."""
        if self.spec.l1 or self.spec.l2 or self.spec.l2_sp:
            self.penalties.add_gradients(self.tuned.trainable)

    def _changed_pass(self, work: Work, change: Change | None, share: float = 1.0) -> float:
        """One forward and backward pass; mixture and dropout hold for the recomputation of checkpointing too."""
        with ExitStack() as around:
            if self.matrices:
                around.enter_context(mixture(self.tuned.model, self.matrices, self.spec.mixout))
            if self.spec.dropout is not None:
                around.enter_context(dropout_at(self.places, self.spec.dropout))
            if change is not None:
                around.enter_context(changed(work.model, change))
            return self._pass(work, share)

    def _ascent(self, work: Work) -> float:
        spec, tokens = self.spec, tokens_of(work.batch)
        width = width_of(work.model, work.batch["input_ids"])
        epsilon = spec.adversarial_epsilon
        assert epsilon is not None  # the spec's validator
        if spec.adversarial == "fgm":
            start, steps, step_size = torch.zeros(*tokens.shape[:2], width, device=tokens.device), 2, epsilon
        else:
            start = uniform_start(tokens, width, epsilon)
            steps, step_size = spec.adversarial_steps or 1, spec.adversarial_step_size or 0.0
        drawn = random_state.capture(tokens.device)
        return ascent(
            lambda change, share: self._changed_pass(work, change, share),
            start,
            tokens,
            partial(random_state.restore, drawn, tokens.device),
            epsilon=epsilon,
            steps=steps,
            step_size=step_size,
        )


def objective(
    tuned: Tuned,
    spec: RegularizeSpec,
    paths: Paths | None = None,
    *,
    sharded: bool = False,
    trunk_cache: bool = False,
) -> Objective:
    """The objective of a run, made before its first step: the tensors' values now are where it started.

    `paths` say what the rows are scored by.

    Raises TrainingError for a regularizer that would have no effect, or cannot be right over a base that is `sharded`.
    With `trunk_cache`, its hints leave out what a cached trunk does not go with.
    """
    loss = (paths or Paths()).loss(spec)
    if not spec.active:
        return Objective(loss)
    if sharded:
        _refuse_sharded(spec)
    made = Regularized(tuned, spec, loss)
    if spec.dropout is not None and not made.places:
        raise TrainingError(
            f"train.regularize.dropout={spec.dropout:g} has no effect: {type(tuned.backbone.model).__name__} has no "
            "place for dropout",
            expected="an nn.Dropout, or a rate that attention reads",
            hint="remove train.regularize.dropout"
            + (", or set adapter.lora_dropout" if _has_own_dropout(tuned) else ""),
        )
    if spec.dropout is not None and all(getattr(module, name) == spec.dropout for module, name in made.places):
        raise TrainingError(
            f"train.regularize.dropout={spec.dropout:g} has no effect: the base has that rate already",
            expected="another rate than the base's own",
            hint="remove train.regularize.dropout",
        )
    if spec.mixout and not made.matrices:
        raise TrainingError(
            f"train.regularize.mixout={spec.mixout:g} has no effect: no matrix is trained, only vectors",
            expected="trained matrices",
            hint="remove train.regularize.mixout, or use train.regularize.l2_sp",
        )
    if spec.r_drop and not _drops(made):
        raise TrainingError(
            f"train.regularize.r_drop={spec.r_drop:g} has no effect: nothing drops, so two passes are the same",
            expected="dropout in the adapter or in the base",
            hint=_how_to_drop(made, trunk_cache),
        )
    return made


def _drops(made: Regularized) -> bool:
    rate = made.spec.dropout
    with dropout_at(made.places, rate) if rate is not None else nullcontext():
        return drops(made.tuned.model)


def _has_own_dropout(tuned: Tuned) -> bool:
    return "lora_dropout" in METHODS[tuned.spec.method].fields


def _how_to_drop(made: Regularized, trunk_cache: bool) -> str:
    """A base's dropout is in all its blocks, and so in a trunk."""
    ways = ["adapter.lora_dropout=0.1"] if _has_own_dropout(made.tuned) else []
    if places_of_dropout(made.tuned.model):
        ways.append("train.regularize.dropout=0.1" + (" train.trunk_cache=false" if trunk_cache else ""))
    return f"set {' or '.join(ways)}" if ways else "remove train.regularize.r_drop"


def _refuse_sharded(spec: RegularizeSpec) -> None:
    refused = [*(["mixout"] if spec.mixout else []), *spec.on_embeddings]
    if refused:
        raise TrainingError(
            f"train.regularize.{refused[0]} does not go with FSDP, which holds a part of every tensor on each process",
            expected="penalties, label_smoothing, dropout or r_drop",
            hint=f"remove train.regularize.{refused[0]}, or start with DDP: accelerate launch --multi_gpu",
        )
