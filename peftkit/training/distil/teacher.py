"""The model that is learned from: an adapter over the tensors of the base that is trained, or a base of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import TrainingError
from peftkit.events import Decision, Report, silent
from peftkit.registry.store import Registry, Version
from peftkit.training.distil.loss import Scored, scored
from peftkit.training.distil.spec import DistilSpec
from peftkit.training.passes.paths import Paths
from peftkit.training.passes.trying import find_paths
from peftkit.tuning.attach import attach, open_adapters
from peftkit.tuning.methods import AdapterSpec, MethodName
from peftkit.tuning.tuned import Tuned


@dataclass(frozen=True)
class Teacher:
    """A model that says what it finds likely, and is not trained."""

    name: str
    """name@version of an adapter, or a base's source."""
    model: Any
    backbone: Backbone
    """What it runs on; the student's own, where it is an adapter of the same base."""
    paths: Paths
    """How its head's logits are made in chunks."""

    def score(self, batch: dict[str, Any]) -> Scored:
        """What it says at the labels of a student's batch, without gradients and in its own precision."""
        self.model.eval()
        here = {name: value.to(self.backbone.device) for name, value in batch.items()}
        with torch.no_grad(), self.around():
            said = scored(self.model, here, self.paths)
        return Scored(said.states, said.targets, said.head, self.around)

    def around(self) -> AbstractContextManager[Any]:
        """Its own autocast, inside the student's: a teacher of 32 bits stays one."""
        dtype, kind = self.backbone.placement.compute_dtype, self.backbone.device.type
        context: AbstractContextManager[Any] = (
            torch.autocast(kind, enabled=False) if dtype == torch.float32 else torch.autocast(kind, dtype=dtype)
        )
        return context

    def record(self) -> dict[str, str]:
        """What it is by content, for checkpoints and manifests."""
        return {"name": self.name, "base": self.backbone.identity.fingerprint, "held in": self.backbone.label}


def teacher_of(
    spec: DistilSpec,
    backbone: Backbone,
    cache: Path,
    *,
    registry: Registry | None = None,
    report: Report = silent,
) -> Teacher:
    """Find and load the teacher that `spec` names, beside the bare backbone of the student.

    It must be called before anything is injected into `backbone`. Raises TrainingError where no teacher is named or its
    vocabulary is another one, TuningError for a backbone that is not bare, and what loading a base or attaching an
    adapter raises.
    """
    if spec.teacher is None:
        raise TrainingError(
            "distil.teacher is not set",
            expected="an adapter of the registry, or a base",
            hint="peftkit train distillation … distil.teacher=NAME",
        )
    version = _version(spec.teacher, registry)
    if version is None:
        own = load_backbone(BaseSpec(source=spec.teacher), _bits(spec, backbone), cache, report=report)
        name, model, why = own.base.source, own.model, f"a base in {own.label}"
        method: MethodName = "norms"
    elif version.manifest.base.fingerprint == backbone.identity.fingerprint:
        own, model = backbone, attach(backbone, version, report=report).model
        name, method, why = version.reference, _like(version), "an adapter over the tensors of the base that is trained"
    else:
        host = open_adapters([version], cache, bits=spec.teacher_bits, report=report)
        own, model, method = host.backbone, host.model, _like(version)
        name, why = version.reference, f"an adapter of {version.manifest.base.source}, in {own.label}"
    check_vocabulary(backbone, own, name)
    report(Decision("teacher", name, why))
    return Teacher(name, model, own, find_paths(Tuned(model, own, AdapterSpec(method=method), ()), rows_as_batch=True))


def check_vocabulary(student: Backbone, teacher: Backbone, name: str) -> None:
    """Raise TrainingError unless a token id means the same token to both; added padding of the vocabulary is no token.

    Equal digests of the tokenizers say so; where they differ (in how text is cut, say), every token is compared.
    """
    if student.identity.tokenizer == teacher.identity.tokenizer:
        return
    ours, theirs = (backbone.tokenizer.hf.get_vocab() for backbone in (student, teacher))
    differing = sorted({*ours.items()} ^ {*theirs.items()}, key=lambda pair: (pair[1], pair[0]))
    if differing:
        shown = ", ".join(f"{token!r} = {at}" for token, at in differing[:5])
        raise TrainingError(
            f"{name} has another vocabulary than {student.base.source}: {len(theirs):,} and {len(ours):,} tokens, and "
            f"only one of them has {shown}" + (f" and {len(differing) - 5:,} more" if len(differing) > 5 else ""),
            expected="a teacher of the same family: its probabilities are compared token by token",
            hint="distil.teacher=… with the same tokenizer",
        )


def _version(name: str, registry: Registry | None) -> Version | None:
    """The adapter of that name; None where the registry has none, so that it is a base's."""
    known = registry is not None and name.partition("@")[0] in registry.names()
    return registry.resolve(name) if registry is not None and known else None


def _like(version: Version) -> MethodName:
    """A method whose model is called the same way."""
    return "lora" if version.manifest.kind == "peft" else "norms"


def _bits(spec: DistilSpec, backbone: Backbone) -> QuantSpec:
    return QuantSpec(bits=spec.teacher_bits, device=backbone.quant.device)
