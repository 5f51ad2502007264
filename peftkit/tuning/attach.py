"""Attach registered adapters to one backbone, swap between them, and take them off again.

The base's bytes never change: adapters are added beside its layers, and detaching the last one gives the layers back.
"""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import AdapterDamaged, BaseMismatch, TuningError
from peftkit.events import Report, Warned, silent
from peftkit.registry.store import Version
from peftkit.registry.verify import check
from peftkit.tuning.inject import Tuned
from peftkit.tuning.methods import AdapterSpec


class Attached:
    """Adapters beside one backbone; at most one is active, None means the base alone."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.active: str | None = None
        self._versions: dict[str, Version] = {}
        self._peft: PeftModel | None = None

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
        files differ from its manifest, TuningError when its tensors do not fit.
        """
        name = name or version.name
        if name in self._versions:
            raise TuningError(f"an adapter named {name!r} is already attached", hint="detach it, or choose a name")
        check_version(version)
        check_base(version, self.backbone, other_base=other_base, report=report)
        label = _label(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self.backbone.model, str(version.path), adapter_name=label)
                else:
                    self._peft.load_adapter(str(version.path), adapter_name=label)
            check_tensors(self._peft, version, label)
        except (TuningError, ValueError, RuntimeError, KeyError) as error:
            self._take_off(label)
            if isinstance(error, TuningError):
                raise
            raise TuningError(f"{version.reference} does not fit the base: {str(error).splitlines()[0]}") from error
        self._versions[name] = version
        self._peft.eval()
        self._freeze()
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
                self._peft.set_adapter(_label(name))
            self._freeze()
        self.active = name

    def detach(self, name: str) -> None:
        """Remove an adapter; the last one gives the base its own layers back."""
        if name not in self._versions:
            raise TuningError(f"no adapter named {name!r} is attached")
        if self.active == name:
            self.activate(None)
        del self._versions[name]
        self._take_off(_label(name))
        if self._peft is not None:
            self.activate(self.active)

    @contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """Activate `name` for a block and return to what was active before, whatever happens inside."""
        before = self.active
        self.activate(name)
        try:
            yield self.model
        finally:
            self.activate(before)

    def _take_off(self, label: str) -> None:
        if self._peft is None:
            return
        if label in self._peft.peft_config and len(self._peft.peft_config) > 1:
            self._peft.delete_adapter(label)
        if not self._versions:
            self._peft.unload()
            # PEFT leaves its config on the base, which would make the next attach add to an adapter that is gone.
            if hasattr(self.backbone.model, "peft_config"):
                del self.backbone.model.peft_config
            self._peft = None

    def _freeze(self) -> None:
        if self._peft is not None:
            self._peft.requires_grad_(False)


def attach(backbone: Backbone, *versions: Version, other_base: bool = False, report: Report = silent) -> Attached:
    """Attach versions beside a backbone; the first becomes active."""
    host = Attached(backbone)
    names = [host.attach(version, other_base=other_base, report=report) for version in versions]
    if names:
        host.activate(names[0])
    return host


def resume_adapter(
    backbone: Backbone, version: Version, spec: AdapterSpec, *, other_base: bool = False, report: Report = silent
) -> Tuned:
    """Load a version as trainable, to continue from it; it becomes the parent in the lineage.

    Raises TuningError when `spec` asks for another adapter than the parent's: its shape is fixed by its tensors.
    """
    check_version(version)
    check_base(version, backbone, other_base=other_base, report=report)
    recorded = version.manifest.adapter
    parent = AdapterSpec.model_validate({key: recorded[key] for key in AdapterSpec.model_fields if key in recorded})
    asked = {key: value for key, value in spec.model_dump().items() if value != AdapterSpec.model_fields[key].default}
    differ = {key: value for key, value in asked.items() if key != "seed" and getattr(parent, key) != value}
    if differ:
        raise TuningError(
            f"init_from={version.reference} has {', '.join(f'{key}={getattr(parent, key)}' for key in differ)}, "
            f"but the settings ask for {', '.join(f'adapter.{key}={value}' for key, value in differ.items())}",
            expected="the parent's own adapter settings",
            hint="leave adapter.* out when continuing from an adapter",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(backbone.model, str(version.path), is_trainable=True)
    check_tensors(model, version, "default")
    relation = {"name": version.name, "version": version.id, "relation": "continued"}
    return Tuned(model, backbone, parent, (relation,))


def check_version(version: Version) -> None:
    """Raise AdapterDamaged when a version's files are not what its manifest promises."""
    problems = check(version)
    if problems:
        raise AdapterDamaged(
            f"{version.reference} is damaged: " + "; ".join(problems),
            expected="the bytes that were published",
            hint=f"peftkit log {version.name} lists other versions",
        )
    if version.manifest.kind != "peft":
        raise TuningError(
            f"{version.reference} is of kind {version.manifest.kind!r}",
            expected="kind 'peft': named tensors replace weights of the base and cannot lie beside it",
        )


def check_base(version: Version, backbone: Backbone, *, other_base: bool, report: Report) -> None:
    """Raise BaseMismatch when the version was trained on other bytes, naming what differs."""
    recorded = version.manifest.base
    differing = backbone.identity.differences(recorded.parts)
    quantized = recorded.quantization or {}
    if quantized.get("label", backbone.quant.label) != backbone.quant.label:
        report(
            Warned(
                f"{version.reference} was trained on {quantized['label']} weights and is used on {backbone.quant.label}"
            )
        )
    if not differing:
        return
    what = ", ".join(name.replace("_", " ") for name in differing)
    fact = f"{version.reference} was trained on {recorded.source}; {backbone.base.source} differs in: {what}"
    if not other_base:
        raise BaseMismatch(
            fact, expected="the same base, by content", hint=f"use base={recorded.source}, or --other-base"
        )
    report(Warned(fact, "--other-base was given, so the adapter is used all the same"))


def check_tensors(model: PeftModel, version: Version, label: str) -> None:
    """Raise TuningError unless every stored tensor was loaded and every injected one was stored.

    PEFT loads with strict=False: a missing key silently leaves the base's behaviour.
    """
    loaded = get_peft_model_state_dict(model, adapter_name=label, save_embedding_layers=False)
    with safe_open(str(version.path / "adapter_model.safetensors"), framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    problems = [f"{name} is stored and has no place in the base" for name in sorted(stored.keys() - loaded.keys())]
    problems += [f"{name} is needed and not stored" for name in sorted(loaded.keys() - stored.keys())]
    problems += [
        f"{name}: stored {stored[name]}, needed {tuple(tensor.shape)}"
        for name, tensor in loaded.items()
        if name in stored and stored[name] != tuple(tensor.shape)
    ]
    if problems:
        listed = "\n- ".join(problems[:8])
        raise TuningError(f"{version.reference} has {len(problems)} tensors that do not fit:\n- {listed}")
    if any(not torch.isfinite(tensor).all() for tensor in loaded.values()):
        raise TuningError(f"{version.reference} holds NaN or infinite numbers", expected="finite weights")


def _label(name: str) -> str:
    """PEFT's name for an adapter: a module name, so without dots."""
    return "adapter_" + name.replace(".", "_dot_").replace("-", "_dash_")


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
    settings = {key: recorded[key] for key in ("quant_type", "double_quant") if key in recorded}
    return QuantSpec.model_validate({"bits": wanted, **(settings if wanted == 4 else {})})
