"""Which of a run's processes this one is: what `accelerate launch` and torchrun tell their children.

The variables are read once. What accelerate and transformers would do on their own account when they see them (wrap
the model, cast it, load empty weights on all processes but one) is peftkit's to do, so `take_over` removes those.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from peftkit.errors import RunError

# Ways of training that a launcher can ask for and peftkit does not have, with what to use instead.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "use --use_fsdp --fsdp_version 2, or --multi_gpu"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use --use_fsdp --fsdp_version 2, or --multi_gpu"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "use --use_fsdp --fsdp_version 2, or --multi_gpu"),
}
_REFUSED_WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": ("FSDP with parameters in host memory", "set fsdp_offload_params: false"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "FSDP's own activation checkpointing",
        "set fsdp_activation_checkpointing: false, and train.gradient_checkpointing=true",
    ),
}
_TAKEN_OVER = ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, and the place of this one among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine, which is the number of its GPU."""
    sharded: bool = False
    """Whether the base is spread over the processes (FSDP); otherwise each has a copy (DDP)."""
    reshard: bool = True
    """Whether FSDP frees a layer's weights between its forward and its backward pass."""

    @property
    def leads(self) -> bool:
        """Whether this is the one process that reports and writes."""
        return self.rank == 0

    @property
    def how(self) -> str:
        """How the processes share the base, in a word."""
        return "sharded (FSDP)" if self.sharded else "replicated (DDP)" if self.size > 1 else "alone"


def read_launcher(variables: Mapping[str, str]) -> ProcessGroup:
    """The group that a launcher's environment variables describe; alone without them.

    Raises RunError for what peftkit does not do, naming it.
    """
    for name, (what, hint) in _REFUSED.items():
        if _is_set(variables, name):
            raise RunError(f"the launcher asks for {what}", expected="DDP or FSDP (version 2)", hint=hint)
    size = _number(variables, "WORLD_SIZE", 1)
    if size == 1:
        return ProcessGroup()
    rank, local = _number(variables, "RANK", -1), _number(variables, "LOCAL_RANK", -1)
    if not 0 <= rank < size or local < 0 or "MASTER_ADDR" not in variables:
        raise RunError(
            f"WORLD_SIZE={size}, RANK={variables.get('RANK')}, LOCAL_RANK={variables.get('LOCAL_RANK')} and "
            f"MASTER_ADDR={variables.get('MASTER_ADDR')} do not name one of several processes",
            expected="the variables of `accelerate launch` or torchrun",
            hint="start with `accelerate launch`, or unset WORLD_SIZE",
        )
    sharded = _is_set(variables, "ACCELERATE_USE_FSDP")
    if sharded:
        _check_fsdp(variables)
    return ProcessGroup(rank, size, local, sharded, variables.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false")


@functools.cache
def launched() -> ProcessGroup:
    """The group of this process, read from its environment once."""
    return read_launcher(os.environ)


def process_name(variables: Mapping[str, str] = os.environ) -> str:
    """What tells this process's messages from those of the others: nothing when it is alone. Never raises."""
    size = _number(variables, "WORLD_SIZE", 1)
    return f", process {variables.get('RANK')} of {size}" if size > 1 else ""


def take_over(variables: MutableMapping[str, str] = os.environ) -> ProcessGroup:
    """The group of this process; from here on, accelerate and transformers do not see what peftkit does itself."""
    group = launched()
    if group.size > 1:
        for name in _TAKEN_OVER:
            variables.pop(name, None)
    return group


def _check_fsdp(variables: Mapping[str, str]) -> None:
    if variables.get("FSDP_VERSION", "1") != "2":
        raise RunError(
            "the launcher asks for FSDP version 1, which packs float32 adapters and 16-bit weights into one tensor",
            expected="FSDP version 2, which shards every parameter by itself",
            hint="accelerate launch --use_fsdp --fsdp_version 2",
        )
    for name, (what, hint) in _REFUSED_WITH_FSDP.items():
        if _is_set(variables, name):
            raise RunError(f"the launcher asks for {what}", expected="plain FSDP version 2", hint=hint)


def _is_set(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true", "yes")


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    return int(text) if text.isdigit() else default
