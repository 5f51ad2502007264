"""An adapter's tensors, each taken by exactly one reader, and what the readers made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from peftkit.backbone.headed import Headed
from peftkit.base.dense import Dense
from peftkit.deltas.delta import Delta, Deltas, LowRank, Place
from peftkit.deltas.reading.kinds import After, Replaced
from peftkit.deltas.reading.names import Names, Site
from peftkit.errors import DeltaError
from peftkit.registry.intake.tensors import EMBEDDINGS

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in its keys."""


class Checkpoint:
    """One adapter while it is read: what is left of its tensors, and the deltas found so far."""

    def __init__(
        self,
        reference: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        base: Mapping[str, Dense],
        base_config: Mapping[str, Any],
        headed: Headed | None = None,
    ) -> None:
        self.reference = reference
        self.config = config
        self.base = base
        self.headed = headed
        self.names = Names(base, base_config, headed)
        self._left = dict(tensors)
        self._under: dict[str, tuple[Place, Replaced]] = {}
        self._changes: dict[str, Delta] = {}
        self._places: dict[str, Place] = {}
        self._sources: dict[str, str] = {}
        self._with_head = False
        self._added: dict[str, torch.Tensor] = {}

    @property
    def left(self) -> list[str]:
        """Names of the tensors that no reader has taken yet, sorted."""
        return sorted(self._left)

    def modules(self, *suffixes: str) -> list[str]:
        """The modules that still have a tensor with one of these names after theirs, sorted."""
        found = set()
        for name in self._left:
            for suffix in suffixes:
                if name.startswith(PREFIX) and name.endswith(f".{suffix}"):
                    found.add(name.removeprefix(PREFIX).removesuffix(f".{suffix}"))
        return sorted(found)

    def take(self, module: str, suffix: str) -> torch.Tensor:
        """A module's tensor. Raises DeltaError when it is missing."""
        tensor = self.take_if(module, suffix)
        if tensor is None:
            raise DeltaError(
                f"{self.reference} has tensors of {module} and lacks {suffix}",
                expected="all tensors of a layer",
                hint="save the adapter again with PEFT",
            )
        return tensor

    def take_if(self, module: str, suffix: str) -> torch.Tensor | None:
        """A module's tensor, None when there is none."""
        return self.take_named(f"{PREFIX}{module}.{suffix}")

    def take_named(self, name: str) -> torch.Tensor | None:
        """A tensor by its whole name, None when there is none."""
        return self._left.pop(name, None)

    def site(self, module: str, parameter: str = "weight") -> Site:
        """The parameter of a module, with the shape of a copy that replaces the base's."""
        site = self.names.site(module, parameter)
        under = self._under.get(site.read)
        return replace(site, shape=under[1].shape) if under else site

    def put_under(self, site: Site, values: torch.Tensor) -> None:
        """Let values stand for the base's tensor: other changes of it, and of a tied head, begin from them."""
        before = self._under.get(site.read)
        if before and not torch.equal(before[1].values, values):
            raise self.twice(site, "two saved tensors")
        place = Place(site.source.rpartition(".")[0], "embedding") if site.source else site.place
        self._under[site.read] = before or (place, self.replaced(site, values))

    def replaced(self, site: Site, values: torch.Tensor) -> Replaced:
        """A saved tensor in the base's place. Raises DeltaError unless they differ at most in their rows."""
        shape = tuple(values.shape)
        if shape[1:] != site.shape[1:] or (shape != site.shape and not _is_vocabulary(site.tensor)):
            raise self.misfit(site, shape)
        return Replaced(shape, values, site.matrix[0] if len(shape) > 1 else 1)

    def add(self, site: Site, delta: Delta, *, with_head: bool = False) -> None:
        """Note what happens to a parameter, and whether the head of a tied base goes with it.

        Raises DeltaError when something happens to it already.
        """
        if site.tensor in self._changes:
            raise self.twice(site, f"{self._changes[site.tensor].kind} and {delta.kind}")
        under = self._under.get(site.read)
        self._changes[site.tensor] = After(under[1], delta) if under else delta
        self._places[site.tensor] = site.place
        if site.source:
            self._sources[site.tensor] = site.source
        self._with_head |= with_head

    def brings(self, name: str, values: torch.Tensor) -> bool:
        """Whether a tensor is one of a task's head that the base's files do not hold; it is noted then.

        Raises DeltaError where it has another shape than the head.
        """
        shape = self.headed.absent.get(name) if self.headed else None
        if shape is None:
            return False
        if tuple(values.shape) != shape:
            raise DeltaError(
                f"{self.reference} has {name} of shape {tuple(values.shape)}, and the head it was trained with {shape}",
                expected="one output for each label that its manifest names",
            )
        self._added[name] = values
        return True

    def refuse(self, what: str, why: str) -> DeltaError:
        """The error for a method or setting whose ΔW is not a fixed change of the base, or not known exactly."""
        return DeltaError(
            f"{self.reference} is of {what}: {why}",
            expected="an adapter that changes the base's tensors by amounts that its files and the base state",
            hint="use it attached, without combining or merging",
        )

    def check_rank(self, module: str, found: int, said: int) -> None:
        """Raise DeltaError when factors have another rank than the configuration says, which sets their scale."""
        if found != said:
            raise DeltaError(
                f"{self.reference} has factors of rank {found} for {module}, and its configuration says {said}",
                expected="the configuration that it was saved with",
            )

    def twice(self, site: Site, kinds: str) -> DeltaError:
        """The error for a tensor that two parts of the adapter change."""
        return DeltaError(
            f"{self.reference} changes {site.tensor} twice, by {kinds}", expected="one change for each tensor"
        )

    def misfit(self, site: Site, *shapes: tuple[int, ...]) -> DeltaError:
        """The error for tensors that do not fit the base."""
        given = " and ".join(str(tuple(shape)) for shape in shapes)
        return DeltaError(
            f"{self.reference} has tensors of shape {given} for {site.tensor}, which is {site.shape}",
            expected="the shape of the base's tensor",
            hint="use the base that it was trained on",
        )

    def deltas(self) -> Deltas:
        """All that was found. Raises DeltaError when a tensor was not taken, or nothing was found."""
        if self._left:
            named = ", ".join(self.left[:3]) + (f" and {len(self._left) - 3} more" if len(self._left) > 3 else "")
            raise DeltaError(
                f"{self.reference} holds tensors that are no known part of {self.config.get('peft_type')}: {named}",
                expected="only tensors that become part of a ΔW",
            )
        own = dict(self._changes)
        for tensor, (place, delta) in self._under.items():
            if tensor not in own:
                self._changes[tensor], self._places[tensor] = delta, place
        self._check_head()
        if not self._changes and not self._added:
            raise DeltaError(f"{self.reference} changes no tensor of the base", expected="at least one")
        self._part_head(own)
        self._check_vocabulary()
        shared = self._shared()
        return Deltas(self.reference, self._changes, self._places, self._sources, shared, self.headed, self._added)

    def _check_head(self) -> None:
        """Raise DeltaError where the files of an adapter lack a part of its head."""
        lost = sorted((self.headed.absent if self.headed else {}).keys() - self._added.keys())
        if lost:
            raise DeltaError(
                f"{self.reference} lacks {', '.join(lost[:3])}: the base has no such tensor either",
                expected="every tensor of the head that it was trained with",
                hint="train it again, or take another version (peftkit log NAME)",
            )

    def _shared(self) -> dict[str, Place]:
        """The embedding, where it is changed and stays the head too."""
        embedding = self.names.embedding
        if embedding not in self._changes or embedding in self._sources.values():
            return {}
        return {str(embedding): Place(self.names.head.removesuffix(".weight"), "linear")}

    def _part_head(self, own: Mapping[str, Delta]) -> None:
        """Of a tied base, note the head where embedding and head end up different."""
        embedding, head = self.names.embedding, self.names.head
        heads = [tensor for tensor, source in self._sources.items() if source == embedding]
        if embedding is None or (embedding in own and self._with_head) or not (embedding in own or heads):
            return
        if len(heads) == 1 and embedding in own and _same(own[embedding], own[heads[0]]):
            del self._changes[heads[0]], self._places[heads[0]], self._sources[heads[0]]
            return
        if self.names.encoder_decoder:
            raise self.refuse("a change of one of several tied embeddings", "they cannot part in this architecture")
        if not heads:
            self._sources[head] = embedding
            if embedding in self._under:
                self._changes[head] = self._under[embedding][1]
                self._places[head] = Place(head.removesuffix(".weight"), "linear")

    def _check_vocabulary(self) -> None:
        """Raise DeltaError when embedding and head end up with different numbers of rows."""
        rows = {name: dense.shape[0] for name, dense in self.base.items() if _is_vocabulary(name)}
        grown = {name: delta.shape[0] for name, delta in self._changes.items() if _is_vocabulary(name)}
        if grown.items() <= rows.items():
            return
        ends = rows | grown
        if len(set(ends.values())) > 1:
            sizes = ", ".join(f"{name} {count}" for name, count in sorted(ends.items()))
            raise DeltaError(
                f"{self.reference} resized the vocabulary, and not all of it is in its files: {sizes} rows",
                expected="as many rows in the embedding as in the head",
                hint="save it again with the embedding and the head in modules_to_save",
            )


def _is_vocabulary(name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return parameter == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas of one tensor are given by the same numbers: embedding and head stay one tensor then."""
    if isinstance(one, Replaced) and isinstance(other, Replaced):
        return bool(torch.equal(one.values, other.values))
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.scale == other.scale and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in ((one.left, other.left), (one.right, other.right))
        )
    return False
