"""Fine-tune large language models on one consumer GPU; keep, compare, swap, combine and merge the adapters.

Names are imported on first use: `import peftkit` and `peftkit --help` load neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftkit.version import __version__

# Public name -> the module that defines it. Recipes import from here and from nowhere else.
_PUBLIC = {
    "AdapterSpec": "peftkit.tuning.methods",
    "BaseSpec": "peftkit.base.ref",
    "DataSpec": "peftkit.data.audit",
    "DistilSpec": "peftkit.training.distil.spec",
    "EvaluateSpec": "peftkit.evaluation.spec",
    "Fleet": "peftkit.generation.fleet.fleet",
    "How": "peftkit.deltas.combining.methods",
    "LayerwiseSpec": "peftkit.training.layerwise",
    "Limits": "peftkit.generation.limits",
    "MEMORY_PRESETS": "peftkit.training.spec",
    "Order": "peftkit.release.merge",
    "PeftkitError": "peftkit.errors",
    "PreferenceEvaluateSpec": "peftkit.evaluation.preference_spec",
    "PreferenceSpec": "peftkit.data.preference.spec",
    "PreferenceTrainSpec": "peftkit.training.preference.spec",
    "QuantSpec": "peftkit.backbone.spec",
    "RegularizeSpec": "peftkit.training.regularize.spec",
    "Registry": "peftkit.registry.store",
    "Request": "peftkit.generation.requests",
    "Run": "peftkit.recipe",
    "Sampling": "peftkit.generation.requests",
    "Spec": "peftkit.config",
    "TaskEvaluateSpec": "peftkit.evaluation.tasks.spec",
    "TaskSpec": "peftkit.data.tasks.spec",
    "TrainSpec": "peftkit.training.spec",
    "UnfreezeSpec": "peftkit.training.layerwise",
    "ask": "peftkit.generation.answer",
    "attach": "peftkit.tuning.attach",
    "combine_adapters": "peftkit.release.combine",
    "engine_over": "peftkit.generation.opening",
    "export_for": "peftkit.release.export.entry",
    "find_base": "peftkit.generation.opening",
    "generate_file": "peftkit.generation.bulk.bulk",
    "inject": "peftkit.tuning.inject",
    "load_backbone": "peftkit.backbone.load",
    "merge_adapters": "peftkit.release.merge",
    "open_engine": "peftkit.generation.opening",
    "run_recipe": "peftkit.cli.main",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from peftkit.backbone.load import load_backbone
    from peftkit.backbone.spec import QuantSpec
    from peftkit.base.ref import BaseSpec
    from peftkit.cli.main import run_recipe
    from peftkit.config import Spec
    from peftkit.data.audit import DataSpec
    from peftkit.data.preference.spec import PreferenceSpec
    from peftkit.data.tasks.spec import TaskSpec
    from peftkit.deltas.combining.methods import How
    from peftkit.errors import PeftkitError
    from peftkit.evaluation.preference_spec import PreferenceEvaluateSpec
    from peftkit.evaluation.spec import EvaluateSpec
    from peftkit.evaluation.tasks.spec import TaskEvaluateSpec
    from peftkit.generation.answer import ask
    from peftkit.generation.bulk.bulk import generate_file
    from peftkit.generation.fleet.fleet import Fleet
    from peftkit.generation.limits import Limits
    from peftkit.generation.opening import engine_over, find_base, open_engine
    from peftkit.generation.requests import Request, Sampling
    from peftkit.recipe import Run
    from peftkit.registry.store import Registry
    from peftkit.release.combine import combine_adapters
    from peftkit.release.export.entry import export_for
    from peftkit.release.merge import Order, merge_adapters
    from peftkit.training.distil.spec import DistilSpec
    from peftkit.training.layerwise import LayerwiseSpec, UnfreezeSpec
    from peftkit.training.preference.spec import PreferenceTrainSpec
    from peftkit.training.regularize.spec import RegularizeSpec
    from peftkit.training.spec import MEMORY_PRESETS, TrainSpec
    from peftkit.tuning.attach import attach
    from peftkit.tuning.inject import inject
    from peftkit.tuning.methods import AdapterSpec


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'peftkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
