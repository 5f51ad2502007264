"""For llama.cpp and Ollama: a LoRA GGUF, read back, over the base's GGUF, or the merged model as one GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import torch

from peftkit import durable
from peftkit.base import embedded
from peftkit.base.raw import json_file
from peftkit.deltas.delta import Deltas, LowRank
from peftkit.deltas.merge import MergeSettings, merge
from peftkit.deltas.merging.settings import Onto
from peftkit.deltas.spectrum import norm, relative, stacked
from peftkit.errors import DeltaError
from peftkit.events import Note, Report, Warned, silent
from peftkit.release.export.capabilities import Finding
from peftkit.release.export.gguf_file import Dtype
from peftkit.release.export.gguf_kept import kept_in
from peftkit.release.export.gguf_lora import write_lora_gguf
from peftkit.release.export.gguf_model import write_model_gguf
from peftkit.release.export.gguf_names import interleaved, layout
from peftkit.release.export.ollama import write_modelfile
from peftkit.release.export.receipt import adapter_figures
from peftkit.release.export.source import Cut, Source

ADAPTER, BASE, MODEL, MODELFILE = "adapter.gguf", "base.gguf", "model.gguf", "Modelfile"
_NAMES: dict[str | None, Dtype] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
MODEL_TYPES: tuple[Dtype, ...] = ("f32", "f16", "bf16", "q8_0")
_BETWEEN = ("type", "weights", "groups", "tensors", "files", "model")
"""What a merge's receipt says of the folder that it wrote, which is not kept: the file is measured instead."""


def dtype_of(name: str | None, default: Dtype, allowed: Sequence[Dtype]) -> Dtype:
    """GGUF's name of a dtype. Raises DeltaError for one that the file cannot have."""
    found = default if name is None else _NAMES.get(name)
    if found is None or found not in allowed:
        known = [name for name, value in _NAMES.items() if name and value in allowed]
        raise DeltaError(f"dtype {name!r}", expected=" or ".join(known), hint=f"--dtype {known[0]}")
    return found


def write_adapter(
    source: Source,
    original: Deltas,
    folder: Path,
    findings: Sequence[Finding],
    *,
    cut: Cut | None = None,
    dtype: str | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Write the adapter as a LoRA GGUF into `folder`, read it back, and return the receipt's figures.

    Raises DeltaError for what a LoRA GGUF cannot say (`write_lora_gguf`) and for another dtype than float32, float16.
    """
    stored = cast(Literal["f32", "f16"], dtype_of(dtype, "f32", ("f32", "f16")))
    written = write_lora_gguf(source.deltas, source.base.folder, folder / ADAPTER, stored, report=report)
    errors = lora_errors(original, source.base.folder, folder / ADAPTER)
    return adapter_figures(findings, errors, source.features.rank, cut) | {"notes": list(written.notes)}


def lora_errors(original: Deltas, base_folder: Path, path: Path) -> dict[str, float]:
    """‖ΔW registered − ΔW written‖ / ‖ΔW registered‖ of every tensor, scaled as llama.cpp does, from the file.

    The registered rows are put into llama.cpp's order first (`interleaved`).
    """
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    plan = layout(json_file(base_folder / "config.json"))
    errors = {}
    for tensor, delta in sorted(original.changes.items()):
        target = plan.target(tensor)
        if target is None or not isinstance(delta, LowRank):
            raise DeltaError(f"{tensor} is not in {path.name}", expected="LoRA", hint="this is a bug in peftkit")
        a, b = held.pop(f"{target.name}.lora_a"), held.pop(f"{target.name}.lora_b")
        if target.name == "token_embd.weight":
            a, b = b, a.T
        left = delta.left if target.head_rows is None else interleaved(delta.left, target.head_rows)
        mine = LowRank(delta.shape, left, delta.right, delta.scale)
        theirs = LowRank(delta.shape, b, a, alpha / a.shape[0])
        errors[tensor] = relative(norm(stacked([mine, theirs], [1.0, -1.0])), norm(mine))
    if held:
        raise DeltaError(f"{path.name} holds {min(held)}, which the adapter has not", expected="its tensors alone")
    return errors


def write_merged(
    source: Source,
    folder: Path,
    onto: Onto,
    cache: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Merge into the base, write the model as one GGUF into `folder`, read it back, and return the receipt's figures.

    Raises what `merge` and `write_model_gguf` raise, and DeltaError when the file keeps less than 90 % of the delta,
    unless it is forced. The merged folder between the two is not kept.
    """
    stored = dtype_of(dtype, "bf16", MODEL_TYPES)
    version, between = source.version, folder / "merged"
    # float32 between the two: what the file rounds to then is the only rounding that shows.
    settings = MergeSettings(onto=onto, dtype="float32", force=force)
    trained_on = version.manifest.base.quantization
    merged = merge(source.base, source.deltas, between, settings, trained_on=trained_on, cache=cache, report=report)
    own = _own_gguf(source, cache)
    written = write_model_gguf(between, folder / MODEL, stored, name=version.reference, like=own, report=report)
    durable.delete(between)
    kept = kept_in(
        written.path, stored, source.base.folder, source.deltas, settings, trained_on=trained_on, report=report
    )
    lost = kept.lost()
    if lost is not None and not force:
        raise lost
    if lost is not None:
        report(Warned(f"{lost.fact}; it is written because of --force"))
    asked = {key: value for key, value in merged.as_record().items() if key not in _BETWEEN}
    forced = {"forced": lost is not None}
    return {"merge": asked, "written": kept.record() | forced, "notes": list(written.notes)}


def write_over_base(
    source: Source, folder: Path, cache: Path, *, dtype: str | None = None, report: Report = silent
) -> list[str]:
    """Write the base as GGUF beside the LoRA GGUF in `folder`, and return the notes on it.

    Raises DeltaError for a base that is not known.
    """
    stored = dtype_of(dtype, "bf16", MODEL_TYPES)
    report(Note(f"writing the base as {BASE} ({stored})"))
    own, name = _own_gguf(source, cache), source.version.manifest.base.source
    written = write_model_gguf(source.base.folder, folder / BASE, stored, name=name, like=own, report=report)
    return list(written.notes)


def write_for_ollama(source: Source, folder: Path) -> tuple[list[str], list[str]]:
    """Write the Modelfile of what lies in `folder`, the merged model or base and adapter: Ollama's command, and notes.

    Raises DeltaError for a chat template that Ollama cannot have.
    """
    merged = (folder / MODEL).exists()
    model, adapter = folder / (MODEL if merged else BASE), None if merged else folder / ADAPTER
    written = write_modelfile(folder / MODELFILE, model, source.base.folder, adapter=adapter)
    return ["ollama", "create", source.version.name, "-f", MODELFILE], written.notes


def _own_gguf(source: Source, cache: Path) -> Path | None:
    """The base's own GGUF file, whose metadata and tokenizer are then copied; None for a base of safetensors."""
    base = source.base
    if base.kind == "embedded":
        return embedded.gguf_path(base.source.removeprefix("embedded:"), cache)
    return Path(base.source).expanduser() if base.kind == "gguf" else None
