"""What an engine would refuse or misread of an adapter, said before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.deltas.delta import Added, Deltas, LowRank, Place, Stacked
from peftkit.errors import DeltaError
from peftkit.events import Report, Warned
from peftkit.release.export.capability_table import BLOCKING, CELLS, FEATURES, RANKS, Cell, Engine

_FEW = 3
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_HEADS = ("lm_head", "embed_out", "output")


@dataclass(frozen=True)
class Features:
    """What one adapter has, computed from its configuration and its tensors."""

    reference: str
    found: Mapping[str, tuple[str, ...]]
    """Feature (a key of `FEATURES`) → tensors that have it; empty where it is a setting of the whole adapter."""
    rank: int
    """The largest rank; 0 without factors."""


@dataclass(frozen=True)
class Finding:
    """What an engine makes of one thing an adapter has."""

    engine: Engine
    feature: str
    cell: Cell
    where: tuple[str, ...] = ()

    @property
    def blocking(self) -> bool:
        """Whether the export must not be written."""
        return self.cell.outcome in BLOCKING

    def describe(self) -> str:
        """One line: what it is, where, what the engine does, and the source."""
        few = ", ".join(self.where[:_FEW]) + (f" and {len(self.where) - _FEW} more" if len(self.where) > _FEW else "")
        at = f" in {few}" if few else ""
        return f"{FEATURES[self.feature]}{at}: {self.cell.outcome}: {self.engine} {self.cell.fact} ({self.cell.source})"


def features_of(
    deltas: Deltas, config: Mapping[str, Any], *, quantized: bool = False, repaired: bool = False
) -> Features:
    """What an adapter has: `config` is its adapter_config.json.

    `quantized` says whether its base was held in few bits, `repaired` whether it begins with the error of that. The
    tensors decide; a setting is counted only where they cannot show it.
    """
    found: dict[str, list[str]] = {}
    for tensor, delta in deltas.changes.items():
        place = deltas.places.get(tensor, Place(tensor.rpartition(".")[0], "other"))
        found.setdefault(_feature_of(delta, place, config), []).append(tensor)
    ranks = {rank for delta in deltas.changes.values() for rank in _ranks(delta)}
    if len(ranks) > 1:
        found["mixed_ranks"] = []
    if deltas.untied:
        found["tied"] = sorted(deltas.sources)
    for feature, setting in (
        ("rslora", "use_rslora"),
        ("rank_pattern", "rank_pattern"),
        ("alpha_pattern", "alpha_pattern"),
    ):
        if config.get(setting):
            found[feature] = []
    if config.get("trainable_token_indices"):
        found["token_rows"] = []
    if "tensors" in found and not any(_is_matrix(deltas, tensor) for tensor in found["tensors"]):
        found["vectors"] = found.pop("tensors")
    if repaired:
        found["repaired"] = []
    elif quantized:
        found["quantized_base"] = []
    return Features(deltas.reference, {name: tuple(where) for name, where in found.items()}, max(ranks, default=0))


def check(engine: Engine, features: Features) -> list[Finding]:
    """What `engine` makes of each thing that the adapter has, blocking findings first."""
    found = dict(features.found)
    limits = RANKS.get(engine)
    if limits and features.rank > limits[-1]:
        found["rank"] = ()
    findings = [Finding(engine, feature, CELLS[engine][feature], where) for feature, where in found.items()]
    return sorted(findings, key=lambda finding: (not finding.blocking, finding.feature))


def refuse(engine: Engine, name: str, findings: Sequence[Finding], more: Sequence[str] = ()) -> None:
    """Raise DeltaError with all blocking findings and what works instead; `more` are offers with their figures."""
    blocking = [finding for finding in findings if finding.blocking]
    if not blocking:
        return
    repaired = [finding for finding in blocking if finding.feature == "repaired"]
    more = () if repaired else more  # nothing but that mends it
    offers = dict.fromkeys(
        offer for finding in repaired or blocking if (offer := finding.cell.instead.format(name=name))
    )
    raise DeltaError(
        f"{name} cannot be exported for {engine}:\n- " + "\n- ".join(finding.describe() for finding in blocking),
        expected=f"an adapter that {engine} reads right",
        hint="\n  or ".join([*more, *offers]),
    )


def say(findings: Sequence[Finding], report: Report) -> None:
    """Report what is read right over another base than the one it was trained on."""
    for finding in findings:
        if finding.cell.outcome == "differs":
            hint = "compare answers of both before you rely on it: peftkit eval, and the engine on the same rows"
            report(Warned(finding.describe(), hint))


def _feature_of(delta: Any, place: Place, config: Mapping[str, Any]) -> str:
    leaf = place.module.rpartition(".")[2]
    if isinstance(delta, Stacked):
        return "experts"
    if isinstance(delta, LowRank):
        return _kind_of_layer(place, leaf)
    if delta.kind == "DoRA":
        return "dora"
    if isinstance(delta, Added) and place.parameter == "bias" and config.get("lora_bias"):
        return "lora_bias"
    if not config.get("peft_type"):
        return "tensors"
    if config["peft_type"] != "LORA":
        return "method"
    if place.parameter == "bias" and config.get("bias", "none") != "none":
        return "bias"
    if config.get("trainable_token_indices") and leaf in _EMBEDDINGS + _HEADS:
        return "token_rows"
    if leaf in _EMBEDDINGS + _HEADS and leaf not in (config.get("modules_to_save") or ()):
        return "vocabulary"
    return "modules_to_save"


def _is_matrix(deltas: Deltas, tensor: str) -> bool:
    """Whether LoRA has a layer for a tensor that replaces the base's."""
    place = deltas.places.get(tensor)
    return len(deltas.changes[tensor].shape) > 1 and place is not None and place.layer != "other"


def _kind_of_layer(place: Place, leaf: str) -> str:
    if place.layer == "embedding":
        return "embedding"
    if place.layer in ("conv", "experts"):
        return {"conv": "convolution", "experts": "experts"}[place.layer]
    return "head" if leaf in _HEADS else "linear"


def _ranks(delta: Any) -> list[int]:
    if isinstance(delta, LowRank):
        return [delta.rank]
    return [block.rank for block in delta.blocks] if isinstance(delta, Stacked) else []
