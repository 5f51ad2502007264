"""`peftkit doctor`."""

from __future__ import annotations

import shutil
from typing import Any

from peftkit import locations, render
from peftkit.cli.console import show
from peftkit.cli.options import AsJson
from peftkit.environment import hardware, versions


def doctor(as_json: AsJson = False) -> None:
    """Show versions, GPU, the bitsandbytes path really used, memory, disk, and where things live.

    Example: peftkit doctor
    """
    from peftkit.backbone.diagnose import diagnose

    places = {
        "registry": locations.registry_root(),
        "runs": locations.runs_root(),
        "cache": locations.cache_root(),
    }
    facts: list[tuple[str, Any]] = [*versions().items(), *hardware().items(), *diagnose().items()]
    for name, place in places.items():
        facts.append((name, f"{place.path}  ({place.reason})"))
        parent = next(p for p in (place.path, *place.path.parents) if p.exists())
        facts.append((f"free disk for {name}", render.size(shutil.disk_usage(parent).free)))
    show(dict(facts), as_json=as_json, text=render.facts(facts))
