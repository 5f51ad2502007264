"""Open what answering needs, in one place: the base that adapters were trained on, a fleet of them, and an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.locate import locate, locate_again
from peftkit.backbone.spec import QuantSpec
from peftkit.base.identity import identify
from peftkit.base.ref import BaseSpec, LocatedBase
from peftkit.data.audit import recorded_rendering
from peftkit.data.template import Rendering
from peftkit.errors import AdapterNotFound, BaseError, TuningError
from peftkit.events import Report, silent
from peftkit.generation.engine import Engine
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.limits import Limits, positions_of
from peftkit.registry.store import Version
from peftkit.tuning.attach import head_of, quant_of

_TRIED = 16  # adapters that are loaded before anything is asked: a damaged one is told at once


@dataclass(frozen=True)
class Found:
    """A base on this machine, and the precision to load it in."""

    spec: BaseSpec
    located: LocatedBase
    quant: QuantSpec
    fingerprint: str


@dataclass(frozen=True)
class Opened:
    """A base in memory with an engine over it; requests name versions by their reference."""

    backbone: Backbone
    fleet: Fleet
    engine: Engine
    first: Version | None
    """Whose rendering the base is asked with; None: the default one."""
    versions: dict[str, Version] = field(default_factory=dict)
    """What references mean, unless `open_engine` was told how to resolve them; may be added to and taken from."""

    def rendering(self, version: Version | None) -> Rendering:
        """How the training of what answers rendered its rows."""
        return rendering_of(version or self.first)


def rendering_of(version: Version | None) -> Rendering:
    """How a version's training rendered its rows; the default where nothing says."""
    recipe = version.manifest.recipe if version else None
    return recorded_rendering(recipe.config if recipe else {})


def find_base(
    versions: Sequence[Version],
    cache: Path,
    *,
    base: str | None = None,
    bits: int | None = None,
    report: Report = silent,
) -> Found:
    """The base that `versions` were trained on and its precision, without loading it.

    `base` and `bits` override what the first version's manifest says; without versions, `base` says which one. Raises
    BaseError when it cannot be found, TuningError for a version that was trained for a task and does not answer in
    words.
    """
    check_answers(versions)
    spec, recorded = _meant(versions, base, cache)
    quant = quant_of(recorded, bits)
    located = locate(spec, cache, report)
    return Found(spec, located, quant, identify(located.folder, cache).fingerprint)


def open_engine(
    found: Found,
    versions: Sequence[Version],
    cache: Path,
    *,
    resolve: Callable[[str], Version] | None = None,
    other_base: bool = False,
    limits: Limits | None = None,
    report: Report = silent,
) -> Opened:
    """Load the base and put an engine over it; `resolve` says what names mean, by default the `versions` only.

    Adapters take a quarter of the memory that is left then, keys and values (unless `limits` says) another.
    Raises BaseMismatch for a version of another base (unless `other_base`), AdapterDamaged and TuningError for one that
    cannot be used.
    """
    backbone = load_backbone(found.spec, found.quant, cache, report=report, located=found.located)
    by_reference = {version.reference: version for version in versions}
    resolve, memory = resolve or _among(by_reference), _free(backbone.device) // 4
    fleet = Fleet(backbone, resolve, memory=memory, other_base=other_base, report=report)
    for at, version in enumerate(versions):
        identity = fleet.identify(version.reference)
        if at < _TRIED and (seat := fleet.seat(identity)) is not None:
            fleet.release(seat)
    return Opened(backbone, fleet, engine_over(fleet, limits), versions[0] if versions else None, by_reference)


def engine_over(fleet: Fleet, limits: Limits | None = None) -> Engine:
    """An engine over a fleet; unless `limits` says, keys and values take a quarter of the memory that is free."""
    backbone = fleet.backbone
    limits = limits or Limits()
    if limits.cache_bytes is None:
        limits = replace(limits, cache_bytes=_free(backbone.device) // 4)
    config = backbone.model.config.get_text_config()
    return Engine(
        fleet,
        backbone.tokenizer,
        device=backbone.device,
        vocabulary=config.vocab_size,
        compute_dtype=backbone.placement.compute_dtype,
        positions=positions_of(backbone.model),
        limits=limits,
    )


def _meant(versions: Sequence[Version], base: str | None, cache: Path) -> tuple[BaseSpec, Mapping[str, Any]]:
    """The base that is asked for, and the quantization that its first adapter was trained with."""
    recorded = versions[0].manifest.base if versions else None
    quantization = (recorded.quantization if recorded else None) or {}
    if base is not None:
        return BaseSpec(source=base), quantization
    if recorded is None:
        raise BaseError(
            "neither an adapter nor a base was named", expected="one of them", hint="--base embedded:smollm2-135m"
        )
    return locate_again(recorded.source, recorded.revision, recorded.record, cache), quantization


def check_answers(versions: Sequence[Version]) -> None:
    """Raise TuningError, naming each, for versions with a task's head."""
    for_tasks = [(version, head) for version in versions if (head := head_of(version)) is not None]
    if for_tasks:
        said = ", ".join(f"{version.reference} (a {head.kind} head)" for version, head in for_tasks)
        first, _ = for_tasks[0]
        raise TuningError(
            f"trained for a task, so not for prompts and chat: {said}",
            expected="adapters with a language head, as qlora_sft trains them",
            hint=f"peftkit predict {first.name} FILE",
        )


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _among(versions: Mapping[str, Version]) -> Callable[[str], Version]:
    def resolve(name: str) -> Version:
        if name not in versions:
            raise AdapterNotFound(f"no adapter {name!r} was opened", expected=f"one of: {', '.join(versions)}")
        return versions[name]

    return resolve
