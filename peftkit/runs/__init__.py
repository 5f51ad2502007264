"""Runs: one execution of a recipe each, with its folder, id, environment, events, metrics, status and page."""

from __future__ import annotations

from peftkit.runs.folder import RunFolder
from peftkit.runs.records import read_events, read_metrics
from peftkit.runs.status import RunStatus, list_runs, load_run

__all__ = ["RunFolder", "RunStatus", "list_runs", "load_run", "read_events", "read_metrics"]
