"""Build a registered adapter again from what its manifest says, and compare the result byte for byte."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import locations
from peftkit.backbone.locate import locate_again
from peftkit.config import Resolved, dump_yaml
from peftkit.environment import environment
from peftkit.errors import RunError
from peftkit.events import Note, Report, Warned, silent
from peftkit.recipe.execute import execute
from peftkit.recipe.files import Recipe, configure
from peftkit.registry.manifest import Version
from peftkit.registry.store import Registry
from peftkit.runs import list_runs
from peftkit.tuning.methods import AdapterSpec


@dataclass(frozen=True)
class Reproduction:
    """What building an adapter again gave."""

    reference: str
    files: dict[str, tuple[str, str | None]]
    """Digest by payload file: as registered, and as built again."""
    environment: dict[str, tuple[str | None, str | None]]
    """What differs in versions and hardware: then, and now."""

    @property
    def same(self) -> bool:
        """Whether every payload file has the same bytes."""
        return all(registered == built for registered, built in self.files.values())


def reproduce(
    version: Version,
    recipe: Recipe,
    registry: Path,
    *,
    runs: Path,
    overrides: Sequence[str] = (),
    report: Report = silent,
) -> Reproduction:
    """Run the recipe of `version` with its settings, rows and parent in a scratch registry, and compare digests.

    Paths of rows come from the run's folder, where it still exists, or from `overrides` (data.train=…). Raises
    RunError when the manifest names no recipe, or the rows are not those that it names. The registry is not changed.
    """
    resolved = _settings(version, recipe, runs, overrides, report)
    _check_rows(version, resolved.config)
    differs = _differing(version.manifest.environment, environment())
    for what, (then, now) in differs.items():
        report(Warned(f"{what} was {then}, and is {now}: the bytes may differ for that reason"))
    with tempfile.TemporaryDirectory(prefix="peftkit-reproduce-") as scratch:
        target = Path(scratch) / "registry"
        built = execute(
            recipe,
            resolved,
            registry=registry,
            publish_to=target,
            runs=Path(scratch) / "runs",
            report=report,
            other_base=any(receipt["type"] == "other_base" for receipt in version.manifest.receipts),
        )
        found = Registry(target).resolve(str(built.saved_as)).manifest.files
    registered = version.manifest.files
    files = {path: (file.sha256, found[path].sha256 if path in found else None) for path, file in registered.items()}
    return Reproduction(version.reference, files, differs)


def _settings(version: Version, recipe: Recipe, runs: Path, overrides: Sequence[str], report: Report) -> Resolved[Any]:
    recorded = version.manifest.recipe
    if recorded is None:
        raise RunError(f"{version.reference} was not made by a recipe", expected="an adapter that peftkit train made")
    if recipe.sha256 != recorded.sha256:
        report(Warned(f"{recipe.path} is not the file that made {version.reference}: it has another digest"))
    settings = [*_parent_settings(version), *_rate_setting(version), *_dtype_setting(version)]
    # A manifest may name any run; only the run that says itself that it made this version is believed.
    kept = next((run.path for run in list_runs(runs) if run.saved_as == version.reference), None)
    if kept is not None and (kept / "config.yaml").is_file():
        report(Note(f"settings and paths from {kept / 'config.yaml'}"))
        return configure(recipe, files=[kept / "config.yaml"], overrides=[*settings, *overrides])
    config = _harmless(recorded.config, report)
    base = version.manifest.base
    found = locate_again(base.source, base.revision, base.record, locations.cache_root().path)
    config["base"] = found.model_dump()
    with tempfile.TemporaryDirectory(prefix="peftkit-settings-") as scratch:
        file = Path(scratch) / f"{version.name}.yaml"
        file.write_text(dump_yaml(config), encoding="utf-8")
        return configure(recipe, files=[file], overrides=[*settings, *overrides])


def _harmless(recorded: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Settings of a manifest that may come from a stranger: no paths of this machine, no trackers."""
    groups = {key: dict(value) if isinstance(value, dict) else value for key, value in recorded.items()}
    for group, key in (("data", "train"), ("data", "held_out"), ("evaluate", "retention"), ("evaluate", "behaviour")):
        if isinstance(groups.get(group), dict) and isinstance(groups[group].get(key), str):
            groups[group][key] = Path(groups[group][key]).name
    if isinstance(groups.get("train"), dict):
        groups["train"].pop("report_to", None)
    evaluate = groups.get("evaluate")
    if isinstance(evaluate, dict) and str(evaluate.get("instructions") or "").startswith("sha256:"):
        evaluate["instructions"] = None
        report(Note("evaluate.instructions are not kept in a registry, so figures with them are not measured again"))
    report(Note("settings from the manifest: " + json.dumps(groups)))
    return groups


def _parent_settings(version: Version) -> list[str]:
    """The exact parent, whatever its alias points at today, and the adapter settings that it fixes."""
    continued = [parent for parent in version.manifest.parents if parent.relation == "continued"]
    if not continued:
        return []
    fixed = {key: value for key, value in version.manifest.adapter.items() if key in AdapterSpec.model_fields}
    return [
        f"init_from={continued[0].name}@{continued[0].version}",
        *(f"adapter.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in fixed.items()),
    ]


def _rate_setting(version: Version) -> list[str]:
    """The rate that was used where the settings leave it to the method, whose default may be another one today."""
    assert version.manifest.recipe is not None  # the caller's check
    asked, done = version.manifest.recipe.config.get("train"), version.manifest.metrics.other.get("training")
    left_open = isinstance(asked, Mapping) and "learning_rate" in asked and asked["learning_rate"] is None
    used = done.get("learning_rate") if isinstance(done, Mapping) else None
    return [f"train.learning_rate={json.dumps(used)}"] if left_open and isinstance(used, int | float) else []


def _dtype_setting(version: Version) -> list[str]:
    """The compute dtype that a measurement found then: on another machine, or a busy one, it may find the other."""
    assert version.manifest.recipe is not None  # the caller's check
    asked, held = version.manifest.recipe.config.get("quant"), version.manifest.base.quantization or {}
    found = held.get("compute_dtype")
    left_open = isinstance(asked, Mapping) and asked.get("compute_dtype") == "measured"
    return [f"quant.compute_dtype={found}"] if left_open and found in ("float32", "bfloat16") else []


def _check_rows(version: Version, config: Any) -> None:
    """Raise RunError unless the files of rows have the digests that the manifest names."""
    data = getattr(config, "data", None)
    given = {"train": getattr(data, "train", None), "held_out": getattr(data, "held_out", None)}
    for record in version.manifest.data:
        path = given.get(record.role)
        if path is None or (record.role == "train" and ":" in path and not Path(path).exists()):
            continue
        where = f"data.{record.role}"
        if not Path(path).is_file():
            raise RunError(
                f"{where}={path} is not here",
                expected=f"{record.source}, SHA-256 {record.sha256[:16]}…",
                hint=f"peftkit reproduce {version.name} {where}=/path/to/{record.source}",
            )
        with open(path, "rb") as rows:
            digest = hashlib.file_digest(rows, "sha256").hexdigest()
        if digest != record.sha256:
            raise RunError(
                f"{where}={path} has the SHA-256 {digest[:16]}…",
                expected=f"{record.sha256[:16]}…, the rows that {version.reference} was trained on",
                hint="give the file as it was then",
            )


def _differing(then: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    return {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
