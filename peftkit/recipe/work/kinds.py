"""The kinds of work, told by the settings of a recipe's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peftkit.base.head import Head
from peftkit.data.spec import DataSpec
from peftkit.errors import RunError
from peftkit.events import Report

if TYPE_CHECKING:
    from peftkit.backbone.load import Backbone
    from peftkit.base.ref import LocatedBase
    from peftkit.config import Spec
    from peftkit.registry.store import Registry, Version
    from peftkit.runs import RunFolder
    from peftkit.training.passes.paths import Paths
    from peftkit.training.spec import TrainSpec
    from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True)
class Place:
    """Where a run's work happens."""

    located: LocatedBase
    cache: Path
    registry: Registry
    report: Report
    parent: Version | None = None
    """The adapter that is continued."""


class Work(Protocol):
    """One kind of rows at a run's verbs. `data` is what its own `audit` returned; settings are the recipe's groups."""

    def audit(self, place: Place, spec: Any, evaluate: Any) -> Any:
        """Rows that were read, checked and encoded, in parts `train` and `held_out` with their `examples`."""

    def head(self, data: Any) -> Head | None:
        """The head that takes the place of the language head."""

    def prepare(self, place: Place, backbone: Backbone, way: Any) -> None:
        """What has to be done over the bare backbone, such as loading a teacher.

        `way` is a further group of settings that says what is learned from the rows, where a recipe has one.
        """

    def besides(self) -> dict[str, Any]:
        """What the result depends on besides rows, base and settings: a teacher, how images become numbers.

        Checkpoints are bound to it, and the manifest says it with the adapter's settings.
        """

    def paths(self, place: Place, tuned: Tuned, data: Any, train: TrainSpec) -> Paths | None:
        """How the rows go through the model; None where training finds that itself."""

    def rows(self, place: Place, tuned: Tuned, data: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """The training and held-out examples as they are trained on."""

    def compare(self, place: Place, tuned: Tuned, data: Any, spec: Any) -> Any:
        """Base and adapter on the held-out rows, with `figures`, `samples` and `objective`."""

    def tell(self, comparison: Any, report: Report) -> None:
        """Report a comparison."""

    def keep(self, comparison: Any, folder: RunFolder, report: Report) -> None:
        """Write what stays in the run's folder besides: answers, groups."""

    def sources(self, comparison: Any) -> Sequence[dict[str, Any]]:
        """Further texts that something was measured on, for the manifest."""


def work_for(data: Spec) -> Work:
    """The work that the settings of a recipe's data ask for. Raises RunError for settings that are none."""
    from peftkit.data.preference.spec import PreferenceSpec
    from peftkit.data.tasks.spec import TaskSpec

    if isinstance(data, TaskSpec) and data.task in ("translation", "summarization"):
        from peftkit.recipe.work.texts import Texts

        return Texts()
    if isinstance(data, TaskSpec):
        from peftkit.recipe.work.tasks import Tasks

        return Tasks()
    if isinstance(data, PreferenceSpec):
        from peftkit.recipe.work.preferences import Preferences

        return Preferences()
    if isinstance(data, DataSpec):
        from peftkit.recipe.work.conversations import Conversations

        return Conversations()
    raise RunError(
        f"run.audit was given {type(data).__name__}",
        expected="DataSpec, TaskSpec or PreferenceSpec as the recipe's data",
    )
