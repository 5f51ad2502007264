"""Plan the memory of runs that others published, from their conditions alone, and compare.

    python benchmarks/plan_published.py

One JSON line per row of benchmarks/published_memory.json that states its conditions, then a summary; all of it goes to
benchmarks/results/plan_published.json. Other implementations differ from ours; a row says how, and `terms` turns that
into terms of the plan. The plan has one fitted constant, CUDA's context, which fitcheck's T4 rows gave: they are
printed and not scored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.environment import environment
from peftkit.planning.activations import activations
from peftkit.planning.architecture import Architecture, architecture
from peftkit.planning.memory import CONTEXT, plan_memory
from peftkit.planning.setting import Setting
from peftkit.planning.tokens import labelled_tokens
from peftkit.planning.weights import largest_tensor, optimizer, trained_parameters, weights

TABLE = Path(__file__).with_name("published_memory.json")
RESULTS = Path(__file__).with_name("results") / "plan_published.json"
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30, "GB": 10**9}
WITHIN = 0.10

# Bytes per logit at the head's peak.
LOSSES = {
    "own": 12,  # log-softmax, its gradient and the logits' in float32
    "transformers": 14,  # 16-bit logits, their float32 copy, its shifted copy, log-softmax
    "16-bit": 8,  # LitGPT in bf16-true: logits, log-softmax and two gradients in 16 bits
    "chunked": 1.5,  # an eighth of 12
    "in place": 2,  # Unsloth writes the gradient over the 16-bit logits
}


@dataclass(frozen=True)
class Terms:
    """A published run in terms of the plan, in bytes."""

    weights: int
    trained: int
    """Adapter, gradients, optimizer."""
    step: int
    context: int

    @property
    def total(self) -> int:
        """Predicted bytes."""
        return self.weights + self.trained + self.step + self.context


def setting_of(conditions: dict[str, Any]) -> Setting:
    """The conditions of a row as a setting; where it runs without autocast, products are in the dtype of the base."""
    dtype = conditions.get("dtype", "bfloat16")
    plain = {
        "bits": conditions.get("bits", 16),
        "double_quant": conditions.get("double_quant", True),
        "compute_dtype": conditions.get("compute", dtype),
        "dtype": dtype,
        "attention": conditions.get("attention", "sdpa"),
        "method": conditions["method"],
        "in_place": conditions["method"] == "full",
        "r": conditions.get("r", 16),
        "lora_dropout": conditions.get("lora_dropout", 0.0),
        "micro_batch": conditions["rows"],
        "passes": "plain",
        "rows_per_step": conditions["rows"],
        "longest": conditions["length"],
        "labelled": conditions["length"],
        "gradient_checkpointing": conditions.get("checkpointing", False),
        "optim": {"none": "sgd", "paged_adamw_32bit": "adamw_torch"}.get(conditions["optim"], conditions["optim"]),
    }
    targets = conditions.get("target_modules")
    return Setting(**plain, **({"target_modules": tuple(targets)} if targets else {}))


def terms(row: dict[str, Any], base: Architecture, memory: str) -> Terms:
    """A row's conditions as terms of the plan."""
    conditions = row["conditions"]
    context = CONTEXT.expected if memory == "device" else 0
    if row["kind"] != "train":
        setting = setting_of({"method": "lora", "optim": "sgd", "rows": 1, "length": 1, **conditions})
        adapter = trained_parameters(base, setting) * conditions.get("adapter_bytes", 4) if row["kind"] == "load" else 0
        loading = plan_memory(base, setting).stage("load").bytes.expected - CONTEXT.expected
        return Terms(held(base, setting), adapter, loading - held(base, setting), context)
    setting = setting_of(conditions)
    return Terms(held(base, setting), trained(base, setting, conditions), step(base, setting, conditions), context)


def base_of(row: dict[str, Any], table: dict[str, Any]) -> Architecture:
    """The base of a row, as the implementation of the row writes it."""
    base, conditions = architecture(table["models"][row["model"]]), row["conditions"]
    if "activation" in conditions:
        base = replace(base, activation=conditions["activation"])
    if conditions.get("fused_qkv") and len(base.family.qkv) == 3:  # LitGPT: one projection, heads put together anew
        base = fused(base)
    if "quantizable" in conditions:
        base = replace(base, family=replace(base.family, quantizable=conditions["quantizable"]))
    return base


def fused(base: Architecture) -> Architecture:
    """A base whose queries, keys and values come from one projection, `qkv_proj`."""
    own = [linear for linear in base.linears if linear.name.endswith(base.family.qkv)]
    one = replace(own[0], name=f"{base.family.attention}.qkv_proj", out=sum(linear.out for linear in own))
    others = tuple(linear for linear in base.linears if linear not in own)
    family = replace(base.family, qkv=("qkv_proj",), partial_rotary=True)
    return replace(base, family=family, linears=(one, *others))


def held(base: Architecture, setting: Setting) -> int:
    """Weights at rest."""
    return sum(part.bytes.expected for part in weights(base, setting))


def trained(base: Architecture, setting: Setting, conditions: dict[str, Any]) -> int:
    """Adapter, gradients and optimizer states; other implementations hold adapters in 16 bits too."""
    count = trained_parameters(base, setting)
    states = optimizer(base, setting).bytes.expected
    if setting.method == "full":
        one = largest_tensor(base) * 2
        gradients = one if conditions.get("gradients") == "one at a time" else 0  # else they grow in the step's peak
        return states + gradients
    size = conditions.get("adapter_bytes", 4)
    eight_bit = setting.optim in ("adamw_8bit", "paged_adamw_8bit")
    return count * size + (states if eight_bit else states * size // 4)


def step(base: Architecture, setting: Setting, conditions: dict[str, Any]) -> int:
    """Forward and backward passes with the row's loss, or all gradients at the update."""
    if conditions.get("keeps_inputs"):  # bitsandbytes 0.41 kept the input of 4-bit layers, as our int8 ones do
        setting = replace(setting, bits=8)
    found = activations(base, setting, masked=conditions.get("masked", False))
    count = labelled_tokens(setting) * base.vocabulary
    logits = int(count * LOSSES[conditions.get("loss", "own")])
    passes = found.kept + max(logits, found.hump)
    count = trained_parameters(base, setting)
    if setting.method == "full":
        gradients = count * 2
        if conditions.get("gradients") == "one at a time":
            return passes
        scratch = gradients if setting.optim == "adamw_torch" else 0  # square roots of all second moments
        return max(passes, gradients + scratch, min(found.peak, passes + gradients))
    gradients = count * conditions.get("adapter_bytes", 4)
    return passes + gradients if setting.gradient_checkpointing else max(passes, gradients)


def compare(row: dict[str, Any], table: dict[str, Any]) -> dict[str, Any] | None:
    """One line: published and planned GB, and their ratio; None for a row without conditions."""
    source, conditions = table["sources"][row["source"]], row["conditions"]
    if row["model"] is None or (row["kind"] == "train" and not {"method", "rows", "length"} <= set(conditions)):
        return None
    found = terms(row, base_of(row, table), source["memory"])
    published = row["published"] * UNITS[source["unit"]]
    error = found.total / published - 1
    return {
        "row": row["id"],
        "source": row["source"],
        "kind": row["kind"],
        "published_gb": round(published / 1e9, 2),
        "planned_gb": round(found.total / 1e9, 2),
        "error": round(error, 4),
        "within": abs(error) <= WITHIN,
        "scored": row["scored"],
        "terms_gb": {name: round(value / 1e9, 2) for name, value in vars(found).items()},
        **({"why_not": row["why_not"]} if "why_not" in row else {}),
    }


def summary(lines: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """How many rows there are, are scored, and lie within a tenth; training rows apart."""
    scored = [line for line in lines if line["scored"]]
    training = [line for line in scored if line["kind"] == "train"]
    return {
        "rows": rows,
        "with_conditions": len(lines),
        "scored": len(scored),
        "within": sum(line["within"] for line in scored),
        "share": round(sum(line["within"] for line in scored) / len(scored), 4),
        "training_scored": len(training),
        "training_within": sum(line["within"] for line in training),
        "sources": {
            name: [sum(line["within"] for line in own), len(own)]
            for name in sorted({line["source"] for line in scored})
            for own in [[line for line in scored if line["source"] == name]]
        },
        "misses": {line["row"]: line["error"] for line in scored if not line["within"]},
    }


def score() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every line, and the summary."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    lines = [line for row in table["rows"] if (line := compare(row, table)) is not None]
    return lines, summary(lines, len(table["rows"]))


def main() -> None:
    """Print and keep every line."""
    lines, total = score()
    for line in [*lines, total]:
        print(json.dumps(line))
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"summary": total, "rows": lines, "environment": environment()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
