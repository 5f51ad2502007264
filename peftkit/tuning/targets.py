"""Which layers an adapter's settings mean, by PEFT's own rule: an adapter that lacks one of them is not whole."""

from __future__ import annotations

import peftkit.backbone.bnb  # noqa: F401  first: peft would import bitsandbytes with its Hub kernels

# isort: split

from collections.abc import Iterable, Set

from peft.tuners.tuners_utils import check_target_module_exists

from peftkit.tuning.resident import explained, peft_config_of
from peftkit.tuning.stored import Stored


def targeted(stored: Stored, layers: Iterable[str], all_linear: Set[str]) -> set[str]:
    """Those of `layers`, paths in the model, that PEFT would change; `all_linear` is what it takes `all-linear` for.

    Raises TuningError for settings that this PEFT does not know.
    """
    with explained(stored.version):
        config = peft_config_of(stored, trainable=False)
        if str(config.target_modules).lower() == "all-linear":
            config.target_modules = set(all_linear)
        return {path for path in layers if check_target_module_exists(config, path) is True}
