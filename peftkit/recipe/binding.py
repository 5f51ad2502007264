"""What a run's checkpoints are bound to: collected stage by stage, compared as soon as a stage knows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftkit.config import Resolved
from peftkit.environment import versions
from peftkit.process_group import launched
from peftkit.recipe.files import Recipe

if TYPE_CHECKING:  # torch takes seconds to import
    from peftkit.backbone.load import Backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.data.audit import Audit


class Binding:
    """The values that a resumed run must share, by group; with `then`, those of a checkpoint, each is compared.

    Every method raises RunError naming all that differs.
    """

    def __init__(self, run: str, then: Mapping[str, Any] | None = None) -> None:
        self.run = run
        self.then = then
        self.values: dict[str, dict[str, Any]] = {}

    def settings(self, recipe: Recipe, resolved: Resolved[Any]) -> None:
        """Bind to the recipe, its settings and the versions, before anything costs time."""
        from peftkit.recipe.groups import by_kind
        from peftkit.training.bound import settings

        self._bind(
            versions={name: version for name, version in versions().items() if name != "python"},
            recipe={"name": recipe.name, "SHA-256": recipe.sha256[:16]},
            settings=settings(by_kind(resolved.config)),
            # Another number of them adds up gradients in another order, and draws other dropout.
            processes={"number": launched().size, "base": launched().how},
        )

    def data(self, data: Audit) -> None:
        """Bind to the rows, as the model sees them."""
        from peftkit.training.bound import rows_digest

        parts = {"training": data.train.examples, "held-out": data.held_out.examples}
        counts: dict[str, Any] = {f"{name} sequences": len(examples) for name, examples in parts.items()}
        digests = {f"SHA-256 of {name} rows": rows_digest(examples)[:16] for name, examples in parts.items()}
        self._bind(data=counts | digests)

    def held_to(self, quant: QuantSpec) -> QuantSpec:
        """`quant` with the compute dtype that the run began with, where that was measured then."""
        found = (self.then or {}).get("base", {}).get("compute dtype")
        if quant.compute_dtype != "measured" or found is None:
            return quant
        return quant.model_copy(update={"compute_dtype": found})

    def base(self, backbone: Backbone) -> None:
        """Bind to the base by content, and to how it is held."""
        placement = backbone.placement
        self._bind(
            base={
                "weights by content": backbone.identity.fingerprint[:16],
                "record": backbone.identity.id[:16],
                "held in": backbone.label,
                "compute dtype": str(placement.compute_dtype).removeprefix("torch."),
                "attention": placement.attention,
                "device": placement.device.type,
            }
        )

    def work(self, besides: dict[str, Any]) -> None:
        """Bind to what the result depends on besides."""
        if besides:
            self._bind(besides={name: repr(value) for name, value in besides.items()})

    def _bind(self, **groups: dict[str, Any]) -> None:
        from peftkit.training.bound import refuse_differences

        self.values |= groups
        if self.then is not None:
            refuse_differences(self.then, groups, self.run)
