"""What a run ran on: versions and hardware, as plain text, read without importing the packages."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from peftkit.version import __version__

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Installed versions of peftkit and what it builds on; `missing` where a package is not there."""
    found = {"peftkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def hardware() -> dict[str, str]:
    """Operating system, processor and number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"system": f"{platform.system()} {platform.release()}", "processor": _processor(), "cores": str(cores)}


def environment() -> dict[str, str]:
    """Versions and hardware together: what environment.json and the manifest hold."""
    return {**versions(), **hardware()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
