"""Taking in an adapter that peftkit did not write: a PEFT checkpoint, bound to a base that somebody named."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from peftkit.base.record import plain
from peftkit.canonical import strict_json
from peftkit.errors import RegistryError
from peftkit.registry import manifest as manifests
from peftkit.registry import receipts
from peftkit.registry.exchange.taking import ImportBase, Taken, read_small
from peftkit.registry.intake import Intake, inspect
from peftkit.registry.intake.quarantine import CONFIG, admit
from peftkit.registry.intake.rules import LARGEST_CONFIG
from peftkit.registry.layout import REQUIRED_FILES, is_name
from peftkit.registry.manifest import Draft, File

_NO_SETTINGS = {"peft_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
_LONGEST_SETTING = 2000


def refuse_no_adapter(source: Path) -> None:
    """Raise AdapterRefused for what is no folder of an adapter at all, before a base is looked for."""
    if not any(all((source / name).is_file() for name in names) for names in REQUIRED_FILES.values()):
        with tempfile.TemporaryDirectory() as folder:
            admit(source, Path(folder) / "quarantine")


def stated_base(source: Path) -> str | None:
    """The base that an adapter's own config names; None when it names none or the config cannot be read."""
    try:
        config = strict_json(read_small(source / CONFIG, LARGEST_CONFIG))
    except (RegistryError, ValueError):
        return None  # intake says later what is wrong with it
    stated = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return stated if isinstance(stated, str) and stated.strip() else None


def legal_name(text: str) -> str:
    """An adapter name made of a folder's or a repository's; `imported` where nothing of it can stay."""
    near = re.sub(r"[^a-z0-9_-]+", "-", text.rpartition("/")[2].partition("@")[0].lower())[:64].strip("-_")
    return near if is_name(near) else f"my-{near}" if is_name(f"my-{near}") else "imported"


def take(source: Path, quarantine: Path, name: str, base: ImportBase, bound: str, origin: str) -> Taken:
    """Copy a foreign adapter into the new folder `quarantine`, made harmless, with a manifest of its own.

    Raises AdapterRefused for what the rules of intake forbid.
    """
    dtypes = {tensor: entry.dtype for tensor, entry in base.record.tensors.items()}
    intake = inspect(source, quarantine, base.record.shapes(), dtypes)
    came = {path: digest for path, (digest, _) in intake.sources.items()}
    left_out = [f"{path}: {why}" for path, why in intake.left_out]
    draft = Draft.model_validate(
        {
            "kind": intake.kind,
            "base": {
                "source": plain(base.source),
                "revision": base.revision,
                "record": base.record.id,
                "fingerprint": base.record.fingerprint,
                "parts": base.record.parts(),
                "license": base.license,
            },
            "adapter": _settings(intake),
            "receipts": [receipts.imported(origin, came, left_out, intake.notes, bound)],
        }
    )
    files = {path: File(sha256=digest, bytes=size) for path, (digest, size) in intake.files.items()}
    complete = manifests.complete(draft, name, files)
    return Taken(complete, manifests.encode(complete), base.record)


def _settings(intake: Intake) -> dict[str, Any]:
    """The settings that `peftkit show` names; the whole config stays in the payload."""
    given = intake.config or {}
    empty: tuple[Any, ...] = (None, {}, [], "")
    settings = {key: value for key, value in given.items() if key not in _NO_SETTINGS and value not in empty}
    if isinstance(targets := settings.get("target_modules"), list) and len(json.dumps(targets)) > _LONGEST_SETTING:
        settings["target_modules"] = sorted({str(target).rpartition(".")[2] for target in targets})
    settings = {key: value for key, value in settings.items() if len(json.dumps(value)) <= _LONGEST_SETTING}
    method = intake.peft_type.lower() if intake.peft_type else intake.kind
    if method == "lora":  # the names that peftkit's own settings use
        method = "dora" if given.get("use_dora") else "rslora" if given.get("use_rslora") else method
    return {"method": method, **settings, "trainable_parameters": intake.parameters}
