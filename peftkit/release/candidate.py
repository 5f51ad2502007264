"""A combination as a version that can be attached: canonical LoRA, kept in a registry of its own until it is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftkit.data.part import Part
from peftkit.deltas.canonical import canonical_lora, write
from peftkit.deltas.combining.combine import Combined
from peftkit.environment import environment
from peftkit.errors import DeltaError
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.release.gate import likelihoods
from peftkit.release.parents import Parents
from peftkit.release.scratch import scratch_folder
from peftkit.tuning.attach import Attached


def write_payload(combined: Combined, parents: Parents, folder: Path) -> dict[str, Any]:
    """Write the combination as a PEFT checkpoint; returns what its manifest says about the adapter.

    Raises DeltaError for what no LoRA checkpoint can hold.
    """
    recorded = parents.versions[0].manifest.base
    modules = {name.rpartition(".")[0] for name in parents.base}
    made = canonical_lora(combined, base_model=recorded.source, revision=recorded.revision, modules=modules)
    write(made, folder)
    return {
        "method": "lora",
        "r": made.config["r"],
        "lora_alpha": made.config["lora_alpha"],
        "lora_dropout": 0.0,
        "target_modules": made.config["target_modules"],
        "trainable_parameters": sum(tensor.numel() for tensor in made.tensors.values()),
        "combined": combined.how.method,
    }


def draft_of(parents: Parents, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's fields that follow from the parents: base, data, lineage."""
    base = parents.versions[0].manifest.base.model_dump(mode="json")
    data = {(d.role, d.sha256): d.model_dump(mode="json") for v in parents.versions for d in v.manifest.data}
    lineage = {v.reference: {"name": v.name, "version": v.id, "relation": "combined"} for v in parents.versions}
    return {
        "kind": "peft",
        "base": {**base, "quantization": dict(parents.quantization) if parents.quantization else None},
        "adapter": dict(adapter),
        "data": list(data.values()),
        "environment": environment(),
        "parents": list(lineage.values()),
    }


class Candidates:
    """A registry of candidates that is gone when the block ends."""

    def __init__(self, root: Path, parents: Parents) -> None:
        self.root, self.parents, self.made = root, parents, 0
        self.registry = Registry(root / "registry")

    def version(self, combined: Combined) -> Version:
        """The combination as a version that `attach` takes."""
        self.made += 1
        payload = self.root / f"payload-{self.made}"
        fields = draft_of(self.parents, write_payload(combined, self.parents, payload))
        fields["base"]["record"] = self.parents.record.id
        name, draft = f"candidate-{self.made}", Draft.model_validate(fields)
        return self.registry.publish(name, payload, draft, base=self.parents.record)

    def drop(self, version: Version) -> None:
        """Forget a candidate's files, so that a long search needs the disk of one."""
        for path in (version.path, self.root / f"payload-{version.name.removeprefix('candidate-')}"):
            for file in path.glob("*"):
                file.unlink()


@contextmanager
def candidates(parents: Parents, cache: Path) -> Iterator[Candidates]:
    """A place for candidates below the cache."""
    with scratch_folder(cache / "scratch", "combine") as folder:
        yield Candidates(folder, parents)


def scores(host: Attached, name: str | None, parts: Mapping[str, Part], batch_size: int) -> list[float]:
    """NLL per answer token on each part, with one attached adapter active. Raises DeltaError for parts without any."""
    found = []
    for reference, part in parts.items():
        if not part.answer_tokens:
            raise DeltaError(f"the rows of {reference} have no answer tokens")
        found.append(sum(likelihoods(host, name, part, batch_size)) / part.answer_tokens)
    return found
