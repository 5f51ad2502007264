"""What the base gives to every answer, measured once before training: the reference is no second model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from peftkit.data.chat import Example
from peftkit.data.preference.example import PreferenceExample
from peftkit.errors import OutOfMemory
from peftkit.events import Phase, Report, Warned, silent
from peftkit.generation.forward import autocast
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.memory import release
from peftkit.training.passes.split import tokens_of
from peftkit.training.preference.paths import PreferencePaths
from peftkit.tuning.tuned import Tuned


def reference_scored(
    tuned: Tuned, examples: Sequence[PreferenceExample], paths: PreferencePaths, report: Report = silent
) -> tuple[PreferenceExample, ...]:
    """The rows with the log-likelihoods of their answers under the base, its adapter detached, in evaluation mode.

    They go through the same passes and autocast as in training, so that an adapter that changes nothing has ratios of
    zero but for the rounding of other batches. ORPO needs none, and gets the rows back. Fewer tokens at once are tried
    where the memory does not suffice; raises OutOfMemory when one sequence is too much.
    """
    if not examples or not paths.spec.compares_with_base:
        return tuple(examples)
    backbone = tuned.backbone
    report(Phase("score the answers under the base", len(examples), "rows"))
    sequences = [each for example in examples for each in _compared(example)]
    tokens, mode = tokens_of(cast(Any, examples), paths.spec, backbone.device), tuned.model.training
    longest = max(len(sequence.input_ids) for sequence in sequences)
    with tuned.as_base() as base:
        if tuned.kind == "tensors":  # the base is another tree of modules, and its head another module
            head = replace(paths.head, module=base.get_output_embeddings()) if paths.head is not None else None
            paths = replace(paths, head=head, flat=False)
        base.eval()
        try:
            while True:
                try:
                    found = paths.scored(
                        base,
                        sequences,
                        tokens,
                        pad_id=backbone.tokenizer.pad_id,
                        device=backbone.device,
                        forward=lambda: autocast(backbone.device, backbone.placement.compute_dtype),
                    )
                    break
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    fact = f"out of memory while scoring {tokens:,} tokens under the base"
                    if tokens <= longest:
                        raise OutOfMemory(fact, hint="lower data.max_length") from error
                release(backbone.device)
                tokens //= 2
                report(Warned(f"{fact}; it goes on with {tokens:,}", "lower train.per_device_train_batch_size"))
        finally:
            tuned.model.train(mode)
    return tuple(replace(example, reference=(found[2 * at], found[2 * at + 1])) for at, example in enumerate(examples))


def _compared(example: PreferenceExample) -> tuple[Example, Example]:
    """The two sequences whose log-likelihoods under the base a loss reads."""
    second = example.mismatched if example.rejected is None else example.rejected
    assert second is not None  # data.preference gives every labelled row one
    return example.chosen, second
