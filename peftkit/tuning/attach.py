"""Attach registered adapters to one backbone, swap between them, and take them off again.

The base's bytes never change: adapters are added beside its layers, and detaching the last one gives the layers back.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from peft import PeftModel

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import PeftkitError, TuningError
from peftkit.events import Report, silent
from peftkit.registry.store import Version
from peftkit.tuning.fit import check_bare, check_base, check_tensors, check_version
from peftkit.tuning.inject import Tuned
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.snapshot import Snapshot


class Attached:
    """Adapters beside one backbone; at most one is active, None means the base alone."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.active: str | None = None
        self._versions: dict[str, Version] = {}
        self._labels: dict[str, str] = {}
        self._count = 0
        self._peft: PeftModel | None = None
        self._bare: Snapshot | None = None

    @property
    def model(self) -> Any:
        """What to call: the base, or the base with the active adapter."""
        return self.backbone.model if self._peft is None else self._peft

    @property
    def versions(self) -> dict[str, Version]:
        """Attached versions by name."""
        return dict(self._versions)

    def attach(
        self, version: Version, name: str | None = None, *, other_base: bool = False, report: Report = silent
    ) -> str:
        """Load a version beside the base under `name` and return that name; it is not active yet.

        Raises BaseMismatch when the version belongs to another base (unless `other_base`), AdapterDamaged when its
        files differ from its manifest, TuningError when it does not fit. Whatever is raised, nothing has changed.
        """
        name = name or version.name
        if name in self._versions:
            raise TuningError(f"an adapter named {name!r} is already attached", hint="detach it, or choose a name")
        check_version(version)
        check_base(version, self.backbone, other_base=other_base, report=report)
        if self._peft is None:
            check_bare(self.backbone)
            self._bare = Snapshot(self.backbone.model)
        # PEFT uses the label as a module name, where dots are not allowed and names could collide.
        label, peft = f"adapter_{self._count}", self._peft
        with _undone_on_error(self.model, version):
            if peft is None:
                peft = PeftModel.from_pretrained(self.backbone.model, str(version.path), adapter_name=label)
            else:
                peft.load_adapter(str(version.path), adapter_name=label)
            check_tensors(peft, version, label)
        self._peft, self._count = peft, self._count + 1
        self._versions[name], self._labels[name] = version, label
        peft.eval()
        self.activate(self.active)
        return name

    def activate(self, name: str | None) -> None:
        """Make one attached adapter current, or none. Raises TuningError for an unknown name."""
        if name is not None and name not in self._versions:
            known = ", ".join(sorted(self._versions)) or "none"
            raise TuningError(f"no adapter named {name!r} is attached", expected=f"one of: {known}")
        if self._peft is not None:
            if name is None:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(self._labels[name])
            self._peft.requires_grad_(False)
        self.active = name

    def detach(self, name: str) -> None:
        """Remove an adapter; the last one gives the base its own layers back."""
        if name not in self._versions or self._peft is None:
            known = ", ".join(sorted(self._versions)) or "none"
            raise TuningError(f"no adapter named {name!r} is attached", expected=f"one of: {known}")
        if self.active == name:
            self.activate(None)
        del self._versions[name]
        label = self._labels.pop(name)
        if self._versions:
            self._peft.delete_adapter(label)
            self.activate(self.active)
        elif self._bare is not None:
            self._bare.restore()
            self._peft = self._bare = None

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Activate `name` for a block and return to what was active before, whatever happens inside."""
        before = self.active
        self.activate(name)
        try:
            yield self.model
        finally:
            self.activate(before)


@contextmanager
def _undone_on_error(model: Any, version: Version) -> Iterator[None]:
    """Restore `model` when the block fails, and say TuningError for what PEFT raises about a version's files."""
    before = Snapshot(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BaseException as error:
        before.restore()
        if isinstance(error, PeftkitError) or not isinstance(error, Exception):
            raise
        # PEFT raises whatever its code runs into: KeyError, TypeError, ValueError, RuntimeError, AttributeError.
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise TuningError(f"{version.reference} does not fit the base: {reason}") from error


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

    `asked` names the fields of `spec` that the user set; without it, those that differ from their default. Raises
    TuningError when they ask for another adapter than the parent's: its shape is fixed by its tensors.
    """
    check_version(version)
    check_base(version, backbone, other_base=other_base, report=report)
    check_bare(backbone)
    recorded = version.manifest.adapter
    parent = AdapterSpec.model_validate({key: recorded[key] for key in AdapterSpec.model_fields if key in recorded})
    if asked is None:
        asked = [key for key, field in AdapterSpec.model_fields.items() if getattr(spec, key) != field.default]
    wanted = {key: getattr(spec, key) for key in asked if key != "seed"}
    differ = {key: value for key, value in wanted.items() if getattr(parent, key) != value}
    if differ:
        raise TuningError(
            f"init_from={version.reference} has {', '.join(f'{key}={getattr(parent, key)}' for key in differ)}, "
            f"but the settings ask for {', '.join(f'adapter.{key}={value}' for key, value in differ.items())}",
            expected="the parent's own adapter settings",
            hint="leave adapter.* out when continuing from an adapter",
        )
    with _undone_on_error(backbone.model, version):
        model = PeftModel.from_pretrained(backbone.model, str(version.path), is_trainable=True)
        check_tensors(model, version, "default")
    relation = {"name": version.name, "version": version.id, "relation": "continued"}
    return Tuned(model, backbone, parent, (relation,))


def open_adapters(
    versions: Sequence[Version],
    cache: Path,
    *,
    base: str | None = None,
    bits: int | None = None,
    other_base: bool = False,
    report: Report = silent,
) -> Attached:
    """Load the base that `versions` were trained on, in the precision they were trained on, and attach them.

    `base` and `bits` override what the first version's manifest says. Raises BaseMismatch as `attach` does, before
    the adapters are loaded.
    """
    recorded = versions[0].manifest.base
    spec = BaseSpec(source=base or recorded.source, revision=None if base else recorded.revision)
    backbone = load_backbone(spec, _quant(recorded.quantization or {}, bits), cache, report=report)
    return attach(backbone, *versions, other_base=other_base, report=report)


def _quant(recorded: Mapping[str, Any], bits: int | None) -> QuantSpec:
    """The quantization of the training run; compute dtypes are decided anew for this machine."""
    wanted = bits if bits is not None else recorded.get("bits", 16)
    if wanted not in (4, 8, 16, 32):
        raise TuningError(f"bits={wanted}", expected="4, 8, 16 or 32", hint="--bits 4")
    settings = {key: recorded[key] for key in ("quant_type", "double_quant") if key in recorded}
    return QuantSpec.model_validate({"bits": wanted, **(settings if wanted == 4 else {})})
