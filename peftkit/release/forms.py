"""The forms of an adapted base that are measured: as it was trained, over 16-bit weights, and merged into files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.spec import QuantSpec
from peftkit.backbone.upload import agree_with_upload
from peftkit.base.ref import BaseSpec, LocatedBase, read_config
from peftkit.errors import DeltaError
from peftkit.events import Report, silent
from peftkit.registry.manifest import Version
from peftkit.release.base_of import find_base
from peftkit.release.drift import Side
from peftkit.release.positions import Loaded
from peftkit.tuning.attach import attach, head_of, quant_of

SIXTEEN = QuantSpec(bits=16)
"""On a CPU these are computed, and held, in float32."""


@dataclass(frozen=True)
class Trained:
    """Where an adapter's base lies, and how it was held while the adapter was trained."""

    version: Version
    spec: BaseSpec
    located: LocatedBase
    quant: QuantSpec
    cache: Path
    other_base: bool
    report: Report

    @property
    def folder(self) -> Path:
        """The base's files."""
        return self.located.folder

    @property
    def uploaded_in_few_bits(self) -> bool:
        """Whether the base's own files are quantized, so that no original weights are known."""
        return bool(read_config(self.folder).get("quantization_config"))

    def load(self, quant: QuantSpec) -> Backbone:
        """The base with the version's head, in the precision of `quant`."""
        options: dict[str, Any] = {"head": head_of(self.version), "report": self.report, "located": self.located}
        return load_backbone(self.spec, quant, self.cache, **options)


def trained(
    version: Version, cache: Path, *, base: str | None = None, other_base: bool = False, report: Report = silent
) -> Trained:
    """Find the base of a version. Raises BaseError when it is not on this machine."""
    spec, found = find_base(version, cache, base, report)
    quant = quant_of(version.manifest.base.quantization or {}, None)
    return Trained(version, spec, found, quant, cache, other_base, report)


def as_trained(form: Trained) -> Side:
    """Base and adapter as training had them: the base quantized if it was."""
    return Side(f"{form.version.name} as trained", partial(_attached, form, form.quant))


def over_original(form: Trained) -> Side:
    """The base's own 16-bit weights with the adapter beside them: what a merge onto `original` is before it rounds."""
    return Side("original + ΔW", partial(_attached, form, SIXTEEN))


def over_dequantized(form: Trained) -> Side:
    """The dequantized weights with the adapter beside them: what a merge onto `dequantized` is before it rounds."""
    return Side("dequantized + ΔW", partial(_dequantized, form))


def merged_in(folder: Path, cache: Path, report: Report = silent) -> Side:
    """A merged model in the files of `folder`."""
    return Side(f"merged in {folder.name}", partial(_merged, folder, cache, report))


def merged_quant(folder: Path) -> QuantSpec:
    """How to load a merged model so that its weights are those of its files."""
    config = read_config(folder)
    stored = config.get("quantization_config")
    if stored:
        bits = 4 if isinstance(stored, dict) and stored.get("load_in_4bit") else 8
        return agree_with_upload(QuantSpec.model_validate({"bits": bits}), config, str(folder))
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype == "float32":
        return QuantSpec(bits=32)
    if dtype == "float16" and torch.cuda.is_available():  # as bfloat16 they would be rounded a second time
        return QuantSpec(bits=16, compute_dtype="float16")
    return SIXTEEN


@contextmanager
def _attached(form: Trained, quant: QuantSpec) -> Iterator[Loaded]:
    host = attach(form.load(quant), form.version, other_base=form.other_base, report=form.report)
    yield _loaded(host.backbone, host.model)


@contextmanager
def _dequantized(form: Trained) -> Iterator[Loaded]:
    layers = quantized_linears(form.load(form.quant).model)  # the rest of the quantized model is let go of here
    if not layers:
        raise DeltaError(f"{form.version.reference} was trained on weights that are not quantized")
    backbone = form.load(SIXTEEN)
    for name in list(layers):
        weight = backbone.model.get_submodule(name).weight
        weight.data.copy_(dense_weight(layers.pop(name)))
    host = attach(backbone, form.version, other_base=form.other_base, report=form.report)
    yield _loaded(backbone, host.model)


@contextmanager
def _merged(folder: Path, cache: Path, report: Report) -> Iterator[Loaded]:
    backbone = load_backbone(BaseSpec(source=str(folder)), merged_quant(folder), cache, report=report)
    yield _loaded(backbone, backbone.model)


def _loaded(backbone: Backbone, model: Any) -> Loaded:
    return Loaded(model, backbone.device, backbone.placement.compute_dtype)
