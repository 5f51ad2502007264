"""What a run's checkpoints are bound to, and what differs when it is resumed.

A resumed run is the uninterrupted one only where nothing changed that training depends on: rows, base, recipe with its
settings, versions. Longer training, logging, measuring and saving may change.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.data.chat import Example
from peftkit.data.encoded import EncodedRows
from peftkit.errors import RunError

Bound = dict[str, dict[str, Any]]
"""Group → name → value: `settings`, `recipe`, `versions`, `data`, `base`."""

_MAY_CHANGE = (
    "train.num_train_epochs",
    "train.max_steps",
    "train.max_tokens",
    "train.save_steps",
    "train.save_total_limit",
    "train.eval_steps",
    "train.early_stopping_patience",
    "train.report_to",
    "evaluate.",
    "save_as",
    "data.license",
    "data.cache",
    # What these name is compared by content, in the groups `data` and `base`.
    "data.train",
    "data.mixture",
    "data.held_out",
    "data.against",
    "base.source",
    "base.revision",
)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share, by dotted key."""
    found = dict(_leaves(config))
    return {key: value for key, value in found.items() if not key.startswith(_MAY_CHANGE)}


def rows_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids, images and labels of all rows, in their order."""
    if isinstance(examples, EncodedRows):
        return examples.sha256
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        if image := getattr(example, "image", None):
            digest.update(Path(image).read_bytes())
    return digest.hexdigest()


def refuse_differences(then: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], run: str) -> None:
    """Raise RunError naming every value of the groups in `now` that differs from those of the checkpoint."""
    changed = [
        f"{group}, {key}: {before.get(key, 'not set')!r} → {after.get(key, 'not set')!r}"
        for group, after in now.items()
        for before in [then.get(group, {})]
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    if changed:
        listed = "".join(f"\n- {difference}" for difference in changed)
        raise RunError(
            f"run {run} cannot be resumed, because it would not be the same run:{listed}",
            expected="the data, base, recipe, settings and versions it began with; what may change is how long it "
            "trains, measures, logs and saves",
            hint="set back what changed, or start a new run without --resume",
        )


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
