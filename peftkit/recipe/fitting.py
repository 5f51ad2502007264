"""`--budget`: change a recipe's settings until its plan fits, and never its effective batch or its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peftkit.base.ref import LocatedBase, read_config
from peftkit.config import Resolved
from peftkit.data.spec import DataSpec
from peftkit.errors import ConfigError
from peftkit.events import Decision, Note, Report
from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.concessions import FIELDS
from peftkit.planning.fit import Fit, fit
from peftkit.recipe.groups import Groups, groups
from peftkit.recipe.lengths import Lengths
from peftkit.recipe.setting import changes, setting_of
from peftkit.recipe.target import Target
from peftkit.render import size
from peftkit.tuning.methods import AdapterSpec

_FREE = ("micro_batch", "evaluation_batch")
"""What a budget may always change: neither changes a gradient or a figure."""


def fitted(
    resolved: Resolved[Any],
    adapter: AdapterSpec,
    architecture: Architecture,
    lengths: Lengths,
    target: Target,
    report: Report,
    *,
    shorter: bool = False,
) -> Resolved[Any]:
    """The settings as the fastest plan within the target's bytes has them; every change is reported with its reason.

    `adapter` is what will be trained: that of a parent, where the settings name one. What the command line or a file
    sets stays, the number of rows at once apart. `shorter` consents to shorter rows.
    Raises TrainingError when nothing fits, ConfigError for consent to cut rows that are never cut.
    """
    assert target.bytes is not None  # a budget was given
    given = replace(groups(resolved.config), adapter=adapter)
    if shorter and not isinstance(given.data, DataSpec):
        raise ConfigError(
            ["--allow-shorter cuts conversations and texts; it leaves rows of a task and preferences as they are"],
            hint="set data.max_length yourself; peftkit recipes show says what data.too_long may be",
        )
    architecture = lengths.headed(architecture)
    before = setting_of(architecture, given, lengths, target)
    found = fit(
        architecture,
        before,
        target.bytes,
        fixed=asked_for(resolved, given) | (frozenset() if isinstance(given.data, DataSpec) else {"longest"}),
        consent=frozenset({"length"} if shorter else set()),
        machine=target.machine,
        tokens_per_row=lengths.mean,
    )
    _tell(found, target, report)
    return resolved.changed(changes(given, before, found.setting), f"budget of {target.name}")


def known_shape(located: LocatedBase) -> Architecture:
    """The architecture of a base. Raises BaseError for one that no plan knows."""
    return architecture(read_config(located.folder))


def asked_for(resolved: Resolved[Any], given: Groups) -> frozenset[str]:
    """The plan's fields that were set by the user: not by a default or a preset."""
    keys = {"bits": f"{given.names['quant']}.bits"}
    keys |= {name: f"{given.names['train']}.{name}" for name in FIELDS if name not in ("bits", *_FREE)}
    sources = {name: resolved.sources.get(key, "default") for name, key in keys.items()}
    return frozenset(name for name, source in sources.items() if source != "default" and "preset" not in source)


def _tell(found: Fit, target: Target, report: Report) -> None:
    for decision in found.decisions:
        name = decision.field.replace("_", " ")
        report(Decision(name, str(decision.after), decision.reason))
    if not found.decisions:
        report(Note(f"the settings fit into {target.name} as they are"))
    if found.next is not None:
        report(Note(f"the next concession would be: {found.next.reason}"))
    report(Note(f"the plan's peak is at most {size(max(stage.bytes.high for stage in found.plan.stages))}"))
