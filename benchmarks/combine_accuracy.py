"""How far a combined adapter's ΔW is from what its method defines: peftkit beside PEFT's add_weighted_adapter.

    python benchmarks/combine_accuracy.py

2, 4 and 8 random LoRA adapters (r 16, alpha 32, two layers of 384 x 512, unequal weights) are combined by every method
of both. The references are float64 loops over numpy arrays of this file, from the papers' formulas (PEFT's TIES by its
own: signs elected without weights, divided by the count); PEFT's draws cannot be replayed, so its DARE has no error.
`error` is ‖found − reference‖ / ‖reference‖ on what reading the saved float32 factors gives; `from_sum` is the distance
from Σ wᵢ ΔWᵢ, which is what PEFT's methods on A and B mean to approach. Then one adapter of weight 1, which must come
back as it was: plain, rsLoRA, patterns, lora_bias, DoRA; ΔW is what merging adds to the base, saved and loaded again.
The lines are printed and kept in benchmarks/results/combine_accuracy.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peftkit.backbone.bnb  # noqa: F401

# isort: split

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peftkit.base.dense import dense_tensors
from peftkit.deltas.canonical import canonical_lora, write
from peftkit.deltas.combining.combine import combine
from peftkit.deltas.combining.methods import METHODS, How
from peftkit.deltas.delta import Deltas
from peftkit.deltas.reading.read import read_deltas
from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "combine_accuracy.json"
OUT, IN, RANK, ALPHA, SEED, DENSITY = 384, 512, 16, 32, 11, 0.5
LAYERS = ("q_proj", "v_proj")
Arrays = dict[str, list[np.ndarray]]
Found = dict[str, np.ndarray]


def base_model() -> torch.nn.ModuleDict:
    """Two linear layers with biases."""
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(IN, OUT) for name in LAYERS})


def adapter(folder: Path, seed: int, **settings: Any) -> Path:
    """A saved adapter with random tensors."""
    torch.manual_seed(seed)
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(LAYERS), **settings}
    model = get_peft_model(base_model(), LoraConfig(**config))
    torch.manual_seed(seed + 1000)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder))
    return folder


def true_deltas(folders: Sequence[Path]) -> Arrays:
    """(alpha / r) B A of each adapter, float64, from the files."""
    found: Arrays = {name: [] for name in LAYERS}
    for folder in folders:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        for name in LAYERS:
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].numpy().astype(np.float64) for x in "AB")
            found[name].append(ALPHA / RANK * b @ a)
    return found


# --- the definitions ---


def trim(delta: np.ndarray, count: int, skip: int = 0) -> np.ndarray:
    """The `count` largest magnitudes after the first `skip`."""
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")[skip : skip + count]
    kept = np.zeros(delta.size)
    kept[order] = delta.reshape(-1)[order]
    return kept.reshape(delta.shape)


def share(delta: np.ndarray) -> int:
    """How many entries DENSITY keeps."""
    return round(DENSITY * delta.size)


def weighted(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ wᵢ ΔWᵢ."""
    return sum((w * d for w, d in zip(weights, deltas, strict=True)), np.zeros_like(deltas[0]))


def elect(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """peftkit's disjoint mean: weighted votes, weighted mean of those that agree."""
    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.sign(sum(scaled))
    agree = [(np.sign(d) == sign) & (sign != 0) for d in scaled]
    shares = sum(abs(w) * a for w, a in zip(weights, agree, strict=True))
    return sum(d * a for d, a in zip(scaled, agree, strict=True)) / np.where(shares > 0, shares, 1)


def elect_as_peft(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """PEFT's: votes without weights, 0 counts as +, weighted sum of those that agree over their number."""
    sign = np.where(sum(deltas) >= 0, 1, -1)
    agree = [np.sign(d) == sign for d in deltas]
    total = sum(w * d * a for w, d, a in zip(weights, deltas, agree, strict=True))
    return total / np.maximum(sum(a.astype(float) for a in agree), 1)


def slerp(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """On the directions; lengths and weights enter linearly."""
    norms = [np.linalg.norm(d) for d in deltas]
    t = weights[1] / sum(weights)
    angle = np.arccos(np.clip((deltas[0] * deltas[1]).sum() / norms[0] / norms[1], -1, 1))
    way = (np.sin((1 - t) * angle) * deltas[0] / norms[0] + np.sin(t * angle) * deltas[1] / norms[1]) / np.sin(angle)
    return (weights[0] * norms[0] + weights[1] * norms[1]) * way


def knots(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """U Σ TIES(V)."""
    u, s, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int((s > s[0] * 1e-10).sum())
    parts = np.split(vh[:rank], len(deltas), axis=1)
    return (u[:, :rank] * s[:rank]) @ elect([trim(p, share(p)) for p in parts], weights)


def reference(
    name: str, layer: str, deltas: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str]
) -> Any:
    """peftkit's methods by their formulas."""
    if name in ("exact", "svd", "linear"):
        return weighted(deltas, weights)
    if name == "slerp":
        return slerp(deltas, weights)
    if name == "knots":
        return knots(deltas, weights)
    if name == "breadcrumbs":
        top = [round(0.01 * d.size) for d in deltas]
        return weighted([trim(d, share(d), t) for d, t in zip(deltas, top, strict=True)], weights)
    if name in ("ties", "magnitude_prune"):
        trimmed = [trim(d, share(d)) for d in deltas]
        return (elect if name == "ties" else weighted)(trimmed, weights)
    draws = How(name, options(name)).draws(f"{layer}.weight", 0, names)
    chance = [torch.rand(d.shape, generator=g, dtype=torch.float64).numpy() for d, g in zip(deltas, draws, strict=True)]
    kept = [np.full(d.shape, DENSITY) for d in deltas]
    if name == "della":
        ranks = [np.argsort(np.argsort(-np.abs(d), axis=1, kind="stable"), axis=1) for d in deltas]
        kept = [DENSITY - 0.1 * (r / (IN - 1) - 0.5) for r in ranks]
    thinned = [d * (c < k) / k for d, c, k in zip(deltas, chance, kept, strict=True)]
    return (weighted if name == "dare_linear" else elect)(thinned, weights)


def peft_reference(name: str, deltas: Arrays, weights: Sequence[float]) -> Found | None:
    """What a PEFT method defines on ΔW; None where it draws, from a generator that its own set-up moves."""
    kind = name.removesuffix("_svd")
    if kind in ("linear", "cat", "svd"):
        return {layer: weighted(found, weights) for layer, found in deltas.items()}
    if kind in ("ties", "magnitude_prune"):
        choose = elect_as_peft if kind == "ties" else weighted
        return {
            layer: choose([trim(d, int(DENSITY * d.size)) for d in found], weights) for layer, found in deltas.items()
        }
    return None


# --- the measurements ---


def options(name: str) -> dict[str, float]:
    """The same density and seed for all."""
    wanted = {"density": DENSITY, "seed": SEED}
    return {key: value for key, value in wanted.items() if key in METHODS[name].options}


def distance(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """‖found − expected‖ / ‖expected‖ over all layers."""
    off = sum(float(((found[name] - expected[name]) ** 2).sum()) for name in expected)
    return float((off / sum(float((value**2).sum()) for value in expected.values())) ** 0.5)


def deltas_of(folder: Path, base: Path) -> Deltas:
    """peftkit's reading of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    return read_deltas(folder.name, "peft", config, tensors, dense_tensors(base), {})


def from_files(folder: Path) -> Found:
    """(alpha / r) B A from a saved plain adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    found = {}
    for name in LAYERS:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].numpy().astype(np.float64) for x in "AB")
        found[name] = config["lora_alpha"] / config["r"] * b @ a
    return found


def ours(folders: Sequence[Path], weights: Sequence[float], base: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Every method of peftkit, at the sum of the ranks and at full rank."""
    true, parents = true_deltas(folders), [deltas_of(folder, base) for folder in folders]
    total = {name: weighted(found, weights) for name, found in true.items()}
    for name, method in METHODS.items():
        if method.pair and len(folders) != 2:
            continue
        references = [parent.reference for parent in parents]
        expected = {layer: reference(name, layer, found, weights, references) for layer, found in true.items()}
        for rank in [RANK * len(folders), OUT] if method.ranked and method.factored is None else [RANK * len(folders)]:
            how = How(name, options(name))
            made = combine(
                parents, weights, how, dense_tensors(base), rank=rank if method.ranked else None, max_residual=9
            )
            found = from_files(write(canonical_lora(made, task_type=None), scratch / "ours"))
            yield {
                "by": "peftkit",
                "method": name,
                "adapters": len(folders),
                "rank": rank,
                "error": distance(found, expected),
                "from_sum": distance(found, total),
                "stated_residual": made.residual,
            }


PEFT_METHODS = (
    *("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)


def theirs(folders: Sequence[Path], weights: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Every combination_type of PEFT; those by SVD at the sum of the ranks and at full rank."""
    true = true_deltas(folders)
    total = {name: weighted(found, weights) for name, found in true.items()}
    model = PeftModel.from_pretrained(base_model(), str(folders[0]), adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), f"a{i}")
    for name in PEFT_METHODS:
        expected = peft_reference(name, true, weights)
        for rank in [RANK * len(folders), OUT] if name.endswith("_svd") else [RANK * len(folders)]:
            torch.manual_seed(SEED)
            model.add_weighted_adapter(
                [f"a{i}" for i in range(len(folders))],
                list(weights),
                f"{name}{rank}",
                combination_type=name,
                svd_rank=rank,
                svd_full_matrices=False,
                density=DENSITY,
            )
            found = {}
            for layer in LAYERS:
                module = model.base_model.model[layer]
                a, b = (getattr(module, f"lora_{x}")[f"{name}{rank}"].weight.detach().double().numpy() for x in "AB")
                found[layer] = module.scaling[f"{name}{rank}"] * b @ a
                held = int(a.shape[0])
            model.delete_adapter(f"{name}{rank}")
            yield {
                "by": "PEFT",
                "method": name,
                "adapters": len(folders),
                "rank": held,
                "error": None if expected is None else distance(found, expected),
                "from_sum": distance(found, total),
            }


IDENTITIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 7}},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
}


def added(model: Any) -> Found:
    """What merging adds to the base, biases included."""
    still, merged = base_model().state_dict(), copy.deepcopy(model).merge_and_unload().state_dict()
    return {name: merged[name].double().numpy() - still[name].double().numpy() for name in still}


def identities(base: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """One adapter of weight 1."""
    for kind, settings in IDENTITIES.items():
        folder = adapter(scratch / kind, 77, **settings)
        expected = added(PeftModel.from_pretrained(base_model(), str(folder)))
        how, rank = (How("svd"), OUT) if kind == "DoRA" else (How("exact"), None)
        made = combine([deltas_of(folder, base)], [1.0], how, dense_tensors(base), rank=rank)
        canonical = write(canonical_lora(made, task_type=None), scratch / f"{kind}-ours")
        found = added(PeftModel.from_pretrained(base_model(), str(canonical)))
        yield {"by": "peftkit", "identity": kind, "method": how.method, "error": distance(found, expected)}
        model = PeftModel.from_pretrained(base_model(), str(folder), adapter_name="one")
        model.add_weighted_adapter(["one"], [1.0], "merged", combination_type="linear")
        model.set_adapter("merged")
        line = {"by": "PEFT", "identity": kind, "method": "linear", "error": distance(added(model), expected)}
        model.save_pretrained(str(scratch / f"{kind}-theirs"), selected_adapters=["merged"])
        try:
            again = PeftModel.from_pretrained(base_model(), str(scratch / f"{kind}-theirs" / "merged"))
            yield {**line, "reloaded": distance(added(again), expected)}
        except RuntimeError as error:
            yield {**line, "reloaded": None, "why": " ".join(str(error).split())[:160]}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="*", default=[2, 4, 8])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    lines: list[dict[str, Any]] = []

    def keep(measured: Iterator[dict[str, Any]]) -> None:
        for line in measured:
            print(json.dumps(line), flush=True)
            lines.append(line)

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        save_file(base_model().state_dict(), str(base / "model.safetensors"))
        for count in arguments.adapters:
            folders = [adapter(Path(scratch) / f"a{i}", i) for i in range(count)]
            weights = [(1 + i % 3) / sum(1 + j % 3 for j in range(count)) for i in range(count)]
            keep(ours(folders, weights, base, Path(scratch)))
            keep(theirs(folders, weights))
        keep(identities(base, Path(scratch)))
    setting = {"layers": [[OUT, IN]] * len(LAYERS), "r": RANK, "alpha": ALPHA, "density": DENSITY, "seed": SEED}
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"environment": environment(), "setting": setting, "lines": lines}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
