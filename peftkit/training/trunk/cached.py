"""Training with a cached trunk: what lies below the lowest trained block is computed once per row, and then released.

Nobody is trusted: before the first step, one batch goes through the whole model and through the top with the states of
the file, and their logits must be bitwise the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from peftkit.environment import versions
from peftkit.errors import TrainingError
from peftkit.events import Decision, Phase, Progress, Report, Warned
from peftkit.generation.forward import autocast
from peftkit.training import random_state
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.memory import release
from peftkit.training.parallel import Team
from peftkit.training.passes.paths import Paths
from peftkit.training.regularize.dropout import dropout_at, places_of_dropout
from peftkit.training.spec import TrainSpec
from peftkit.training.trunk.frozen import Trunk, check_divisible, drew, frozen_trunk, hidden
from peftkit.training.trunk.memory import only_in, released
from peftkit.training.trunk.passes import Index, Pass
from peftkit.training.trunk.states import States
from peftkit.training.trunk.store import Shape, TrunkStore
from peftkit.training.trunk.top import top_of
from peftkit.tuning.depth import find_blocks
from peftkit.tuning.tuned import Tuned

T = TypeVar("T")
_COMPUTED_BY = ("torch", "transformers", "bitsandbytes", "peft")


@contextmanager
def cached_trunk(
    tuned: Tuned,
    passes: Sequence[Pass],
    cache: Path,
    dropout: float | None,
    report: Report,
    paths: Paths | None = None,
) -> Iterator[Tuned]:
    """The tuned model from its lowest trained block up, with the states of all rows of `passes` in a mapped file.

    The file is made, or one of an earlier run with the same key is used. Until the end the memory of what lies below
    is free, and the full model cannot be called. `dropout` is what training sets the base's to, `paths` how rows go
    through the model. Raises TrainingError
    where nothing below the trained tensors is frozen, where the trunk draws random numbers, where the top's logits
    are not the full model's, or for a full disk; OutOfMemory when a single row is too much.
    """
    with _as_trained(tuned, dropout):
        trunk = frozen_trunk(tuned, paths)
        form, states = _prepared(trunk, passes, cache, report)
    top = top_of(trunk, states, form)  # with the base's own dropout, which training sets anew
    with released(trunk, top, cache) as freed:
        mapped = "the rest is mapped from the base's files: the system drops it when memory is short"
        reason = f"nothing below the lowest trained block is called; {mapped}"
        report(Decision("trunk memory", f"{freed:,} bytes released", reason))
        yield top


@contextmanager
def _as_trained(tuned: Tuned, dropout: float | None) -> Iterator[None]:
    """With the run's dropout in the base; random generators are afterwards what they were."""
    device = tuned.backbone.device
    before = random_state.capture(device)
    try:
        with nullcontext() if dropout is None else dropout_at(places_of_dropout(tuned.model), dropout):
            yield
    finally:
        random_state.restore(before, device)


def _prepared(trunk: Trunk, passes: Sequence[Pass], cache: Path, report: Report) -> tuple[Any, States]:
    """An output of the trunk's last block, and the states of all rows, both proven."""
    tuned, counted = trunk.tuned, trunk.paths.counted
    first = next((one for one in passes if counted(one.rows)), passes[0])
    form, states, proof = _that_fits(first, partial(_proven, trunk), trunk, report)
    spare = sum(storage.nbytes() for storage in only_in(tuned.model, top_of(trunk, states, form).model))
    made = _states(trunk, Index(passes), states, cache, spare, report)
    top = top_of(trunk, made, form)
    proof.check(top)
    for one in [one for one in passes if not one.training][:1]:
        _that_fits(one, lambda fits: Proof(trunk, [fits]).check(top), trunk, report)
    return form, made


def _proven(trunk: Trunk, one: Pass) -> tuple[Any, States, Proof]:
    """What the trunk's last block gives for a batch, its states, and the proof that the top needs no more."""
    form = _undrawn_output(trunk, one)
    states = in_memory(one, hidden(form).cpu())
    proof = Proof(trunk, [one])
    proof.check(top_of(trunk, states, form))
    return form, states, proof


def _that_fits(one: Pass, action: Callable[[Pass], T], trunk: Trunk, report: Report) -> T:
    """What `action` gives for a batch, or for half of its rows, as often as memory asks for that.

    Raises OutOfMemory when a single row is too much.
    """
    while True:
        try:
            return action(one)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            check_divisible(one, error)
        release(trunk.tuned.backbone.device)  # only here the failed attempt's tensors are free
        tried, longest = len(one.rows), max(len(row.input_ids) for row in one.rows)
        one = next((half for half in one.halves if trunk.paths.counted(half.rows)), one.halves[0])
        fact = f"out of memory before step 1 with {tried} rows at once, the longest of {longest:,} tokens"
        report(Warned(f"{fact}: the cached trunk is compared with the whole model on {len(one.rows)}"))


def check_cached(spec: TrainSpec, team: Team, epochs: float, report: Report) -> None:
    """Refuse settings that a cached trunk does not go with, and say when it brings nothing."""
    if team.size > 1:
        raise TrainingError(
            f"train.trunk_cache is for one process, and there are {team.size}",
            expected="one process",
            hint="train.trunk_cache=false",
        )
    if spec.activation_offloading:
        raise TrainingError(
            "train.activation_offloading with train.trunk_cache has not been run on a GPU yet",
            expected="one of the two",
            hint="train.activation_offloading=false: most activations are those of the trunk",
        )
    if epochs <= 1:
        text = "train.trunk_cache saves time from the second epoch on, and this run has no second one"
        report(Warned(text, "train.trunk_cache=false, unless later runs use the same rows"))


def _states(trunk: Trunk, index: Index, proof: States, cache: Path, spare: int, report: Report) -> States:
    """The states of all rows: mapped from the file of an earlier run with the same key, or computed.

    Nothing is computed where the disk has no room for them and `spare` bytes more.
    """
    store = TrunkStore(cache, report)
    shape = Shape(index.positions, proof.values.shape[1], proof.values.dtype)
    ingredients = _ingredients(trunk, index, proof)
    with store.making(ingredients):
        values = store.load(ingredients, shape)
        how = "used again"
        if values is None:
            values, how = store.write(ingredients, shape, _computed(trunk, index, report), spare), "made"
    total = len(find_blocks(trunk.tuned.inner)[1])
    what = f"blocks 0 to {trunk.top - 1} of {total}, {len(index.starts):,} rows, {index.positions:,} tokens"
    report(Decision("trunk cache", f"{how}, {shape.bytes:,} bytes", f"{what}; {store.path(ingredients)}"))
    return States(index, values)


def _computed(trunk: Trunk, index: Index, report: Report) -> Iterator[torch.Tensor]:
    report(Phase("trunk cache", len(index.passes), "batches"))
    for done, (one, new) in enumerate(index.passes, start=1):
        states = trunk.states(one)
        for at in new:
            yield states[at]
        report(Progress(done, {}))


def _ingredients(trunk: Trunk, index: Index, proof: States) -> dict[str, Any]:
    """What the states depend on. The digest of a computed batch covers what no name does: the processor's kernels and
    threads, and frozen layers in the trunk that are not the base's."""
    tuned, backbone = trunk.tuned, trunk.tuned.backbone
    installed = versions()
    return {
        "base": backbone.identity.fingerprint,
        "weights": backbone.quantization_record(),
        "device": backbone.device.type,
        "attention": str(tuned.inner.config._attn_implementation),
        "blocks": trunk.top,
        "rows": index.digest(),
        "padding": backbone.tokenizer.pad_id,
        "versions": {name: installed[name] for name in _COMPUTED_BY},
        "computed": _digest(proof.values),
    }


def in_memory(one: Pass, values: torch.Tensor) -> States:
    """The states of one batch, given as (rows, longest, hidden), without a file."""
    index = Index([one])
    new = index.passes[0][1]
    return States(index, torch.cat([values[at, : len(one.rows[at].input_ids)] for at in new]))


def _undrawn_output(trunk: Trunk, one: Pass) -> Any:
    """What the trunk's last block gives; raises TrainingError where random numbers were drawn for it."""
    device = trunk.tuned.backbone.device
    before = random_state.capture(device)
    output = trunk.output(one)
    if drew(before, random_state.capture(device)):
        places = (place for block in trunk.blocks for place in places_of_dropout(block))
        rates = sorted({rate for module, name in places if (rate := getattr(module, name)) > 0})
        said = f" (dropout of {', '.join(f'{rate:g}' for rate in rates)})" if rates else ""
        raise TrainingError(
            f"the frozen blocks draw random numbers while training{said}: a cache would fix one draw for ever",
            expected="a trunk that computes the same in every epoch",
            hint="train.trunk_cache=false; or no dropout: remove train.regularize.dropout, or set it to 0 where the "
            "base has its own",
        )
    return output


class Proof:
    """What the whole model gives for some batches, which a top must equal bit by bit."""

    def __init__(self, trunk: Trunk, passes: Sequence[Pass]) -> None:
        self.paths, self.device = trunk.paths, trunk.tuned.backbone.device
        self.random = random_state.capture(self.device)  # both have the same dropout draws
        self.expected = [(one, self._given(trunk.tuned, one)) for one in passes]

    def check(self, top: Tuned) -> None:
        """Raise TrainingError, with the largest difference, unless the top gives the same."""
        for one, expected in self.expected:
            found = self._given(top, one)
            if not torch.equal(found, expected):
                apart = float((found.double() - expected.double()).abs().max())
                raise TrainingError(
                    f"with its trunk cached, {type(top.inner).__name__} computes logits that differ by {apart:.3g} "
                    "from those of the whole model",
                    expected="the same logits, bit for bit",
                    hint="train.trunk_cache=false",
                )

    def _given(self, tuned: Tuned, one: Pass) -> torch.Tensor:
        """What there is to compare for a batch."""
        random_state.restore(self.random, self.device)
        backbone = tuned.backbone
        options: dict[str, Any] = {"flat": False, "pad_id": backbone.tokenizer.pad_id, "device": backbone.device}
        tuned.model.train(one.training)
        try:
            with (
                torch.no_grad(),
                autocast(backbone.device, backbone.placement.compute_dtype),
                self.paths.laid(tuned.model, one.rows, **options) as batch,
            ):
                return self.paths.compared(tuned.model, batch)
        finally:
            tuned.model.eval()


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(values.contiguous().view(torch.uint8).numpy())).hexdigest()
