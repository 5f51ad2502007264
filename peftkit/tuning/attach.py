"""Attach registered adapters to one backbone, swap between them, and take them off again.

Each adapter gets a model of its own: a skeleton of the base (skeleton.py) with the adapter's layers in it. The base's
layers and tensors are shared and never changed, the running models are never touched, and a swap is which model is
handed out. Adapters of any method and kind lie side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.locate import locate_again
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec
from peftkit.errors import TuningError
from peftkit.events import Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.configs import peft_type
from peftkit.tuning.fit import check_bare, check_base
from peftkit.tuning.initial_pissa import freeze_halves
from peftkit.tuning.methods import METHODS, AdapterSpec
from peftkit.tuning.parents import parent_spec
from peftkit.tuning.partial import inject_partial
from peftkit.tuning.resident import Resident, Spares, check_config_of, explained, inject_stored
from peftkit.tuning.skeleton import skeleton
from peftkit.tuning.snapshot import Snapshot
from peftkit.tuning.stored import Stored, read
from peftkit.tuning.tensors import fits
from peftkit.tuning.tuned import Tuned, trained_names


@dataclass(frozen=True)
class _State:
    """Everything that an operation may change; replaced by one assignment, so it is the old one or the new one."""

    active: str | None = None
    residents: Mapping[str, Resident] = field(default_factory=dict)
    receipts: tuple[dict[str, Any], ...] = ()


class Attached:
    """Adapters beside one backbone; at most one is active, None means the base alone.

    Models may be called from several threads while another attaches or swaps; only one may change the host at a time.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._state = _State()
        self._spares = Spares()

    @property
    def active(self) -> str | None:
        """Name of the active adapter."""
        return self._state.active

    @property
    def model(self) -> Any:
        """What to call: the base, or the base with the active adapter. It stays that adapter's after a swap."""
        state = self._state
        return self.backbone.model if state.active is None else state.residents[state.active].model

    @property
    def versions(self) -> dict[str, Version]:
        """Attached versions by name."""
        return {name: resident.version for name, resident in self._state.residents.items()}

    @property
    def receipts(self) -> tuple[dict[str, Any], ...]:
        """What was gone on with by an explicit flag, for the manifest of whatever is made here."""
        return self._state.receipts

    def attach(
        self, version: Version, name: str | None = None, *, other_base: bool = False, report: Report = silent
    ) -> str:
        """Load a version beside the base under `name` and return that name; it is not active yet.

        A version that is attached under this name already stays as it is: its id is its content. Raises BaseMismatch
        when the version belongs to another base (unless `other_base`), AdapterDamaged when its files differ from its
        manifest, TuningError when it does not fit. Whatever is raised, nothing has changed.
        """
        name = name or version.name
        present = self._state.residents.get(name)
        if present is not None and present.version.reference == version.reference:
            return name
        if present is not None:
            raise TuningError(
                f"{present.version.reference} is already attached under the name {name!r}",
                hint="detach it, or choose a name",
            )
        stored = read(version)
        check_head(version, self.backbone)
        check_config_of(stored, self.backbone)
        receipts = check_base(version, self.backbone, other_base=other_base, report=report)
        check_bare(self.backbone)
        resident = self._spares.build(self.backbone, stored)
        state = self._state
        known = [receipt for receipt in receipts if receipt not in state.receipts]
        self._state = replace(state, residents={**state.residents, name: resident}, receipts=(*state.receipts, *known))
        return name

    def activate(self, name: str | None) -> None:
        """Make one attached adapter current, or none. Raises TuningError for an unknown name."""
        if name is not None:
            self._known(name)
        self._state = replace(self._state, active=name)

    def detach(self, name: str) -> None:
        """Remove an adapter and free its tensors; a model of it that was handed out raises when it is called.

        Parts taken out of that model must not be kept: the next adapter of its shape moves into them.
        """
        resident = self._known(name)
        state = self._state
        left = {other: kept for other, kept in state.residents.items() if other != name}
        self._state = replace(state, active=None if state.active == name else state.active, residents=left)
        self._spares.take(resident)

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Activate `name` for a block and return to what was active before, whatever happens inside."""
        before = self.active
        try:
            self.activate(name)
            yield self.model
        finally:
            # The block may have detached what was active before.
            self.activate(before if before in self._state.residents else None)

    def _known(self, name: str) -> Resident:
        residents = self._state.residents
        if name not in residents:
            known = ", ".join(sorted(residents)) or "none"
            raise TuningError(f"no adapter named {name!r} is attached", expected=f"one of: {known}")
        return residents[name]


def attach(backbone: Backbone, *versions: Version, other_base: bool = False, report: Report = silent) -> Attached:
    """Attach versions beside a backbone; the first becomes active."""
    host = Attached(backbone)
    for name, version in zip(names_for(versions), versions, strict=True):
        host.attach(version, name, other_base=other_base, report=report)
    if versions:
        host.activate(names_for(versions)[0])
    return host


def names_for(versions: Sequence[Version]) -> list[str]:
    """A name for each version to attach it under: its adapter's, or name@version where two are of one adapter."""
    names = [version.name for version in versions]
    return [v.reference if names.count(v.name) > 1 else v.name for v in versions]


def resume_adapter(
    backbone: Backbone,
    version: Version,
    spec: AdapterSpec,
    *,
    asked: Collection[str] | None = None,
    other_base: bool = False,
    report: Report = silent,
) -> Tuned:
    """Load a version as trainable, to continue from it; it becomes the parent in the lineage.

    `asked` names the fields of `spec` that the user set; without it, those that were given to it. Raises
    TuningError when they ask for another adapter than the parent's: its shape is fixed by its tensors.
    """
    stored = read(version)
    check_head(version, backbone)
    check_config_of(stored, backbone)
    _check_trained_here(stored, backbone)
    receipts = check_base(version, backbone, other_base=other_base, report=report)
    check_bare(backbone)
    parent = parent_spec(version, spec, asked)
    relation = {"name": version.name, "version": version.id, "relation": "continued"}
    if version.manifest.kind == "tensors":
        fits(stored, skeleton(backbone.model), backbone.placement)
        tuned = inject_partial(backbone, parent, start=stored.tensors, report=report)
        return replace(tuned, parents=(relation,), receipts=receipts)
    before = Snapshot(backbone.model)
    try:
        with explained(version):
            model, _ = inject_stored(backbone.model, stored, backbone.device, trainable=True)
    except BaseException:
        before.restore()
        raise
    if parent.method == "pissa":
        freeze_halves(model)
    return Tuned(model, backbone, parent, trained_names(model), (relation,), receipts)


def check_head(version: Version, backbone: Backbone) -> None:
    """Raise TuningError where a version was trained with another head than the backbone has."""
    check_same_head(version, backbone.head, "this backbone has")


def check_same_head(version: Version, head: Head | None, whose: str = "this run has") -> None:
    """Raise TuningError where a version was trained with another head than `head`; `whose` says whose that is."""
    own = head_of(version)
    if own != head:
        raise TuningError(
            f"{version.reference} was trained with {_described(own)}, and {whose} {_described(head)}",
            expected="adapters of one task and one set of labels on one backbone",
            hint=f"peftkit show {version.name} says what it was trained for",
        )


def _described(head: Head | None) -> str:
    if head is None:
        return "the language head"
    return f"a {head.kind} head" + (f" of {len(head.labels)} labels" if head.labels else "")


def _check_trained_here(stored: Stored, backbone: Backbone) -> None:
    """Raise TuningError for an adapter that can be attached, but is not what `inject` makes for its method."""
    if stored.version.manifest.kind == "tensors":
        return
    config, method = stored.config, str(stored.version.manifest.adapter.get("method", "lora"))
    kind = str(config.get("peft_type"))
    made = [name for name in METHODS if METHODS[name].kind == "peft" and peft_type(name) == kind]
    if not made:
        raise TuningError(
            f"{stored.version.reference} is of {kind} and cannot be continued",
            expected=", ".join(sorted({peft_type(name) for name in METHODS if METHODS[name].kind == "peft"})),
        )
    if method not in made:
        raise TuningError(
            f"{stored.version.reference} is of {kind} and cannot be continued: its manifest says method {method}",
            expected=f"method {' or '.join(made)}",
        )
    refused = ("modules_to_save", "lora_bias", "prefix_projection")
    extras = [key for key in refused if config.get(key) and not (key == refused[0] and backbone.head is not None)]
    if extras:
        raise TuningError(
            f"{stored.version.reference} is of {kind} with {', '.join(extras)} and cannot be continued",
            expected=f"{kind} with nothing beside it",
        )


def open_adapters(
    versions: Sequence[Version],
    cache: Path,
    *,
    base: str | None = None,
    bits: int | None = None,
    other_base: bool = False,
    report: Report = silent,
) -> Attached:
    """Load the base that `versions` were trained on, with their head and in their precision, and attach them.

    `base` and `bits` override what the first version's manifest says. Raises what `attach` raises.
    """
    recorded = versions[0].manifest.base
    known = BaseSpec(source=base) if base else None
    spec = known or locate_again(recorded.source, recorded.revision, recorded.record, cache)
    quant, head = quant_of(recorded.quantization or {}, bits), head_of(versions[0])
    backbone = load_backbone(spec, quant, cache, head=head, report=report)
    return attach(backbone, *versions, other_base=other_base, report=report)


def head_of(version: Version) -> Head | None:
    """The task's head that a version was trained with; None for a language head."""
    recorded = version.manifest.adapter.get("head")
    return Head.of(recorded) if isinstance(recorded, Mapping) else None


def quant_of(recorded: Mapping[str, Any], bits: int | None) -> QuantSpec:
    """The quantization of the training run; compute dtypes are decided anew for this machine."""
    wanted = bits if bits is not None else recorded.get("bits", 16)
    if wanted not in (4, 8, 16, 32):
        raise TuningError(f"bits={wanted}", expected="4, 8, 16 or 32", hint="--bits 4")
    settings = {key: recorded[key] for key in ("quant_type", "double_quant") if key in recorded}
    return QuantSpec.model_validate({"bits": wanted, **(settings if wanted == 4 else {})})
