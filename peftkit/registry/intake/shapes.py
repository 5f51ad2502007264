"""The shapes of an adapter's tensors against its configuration and against the tensors of the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peftkit.registry.intake.methods import Method
from peftkit.registry.intake.rules import AdapterRefused, shown
from peftkit.registry.intake.tensors import EMBEDDINGS, Place

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_shapes(
    config: Mapping[str, Any],
    method: Method,
    tensors: Shapes,
    places: Mapping[str, Place],
    base_shapes: Shapes | None,
    base_dtypes: Mapping[str, str] | None = None,
) -> list[str]:
    """Raise AdapterRefused when a tensor contradicts the configuration or the base; returns notes on what was not
    compared. `base_shapes` are those of the base's checkpoint, linear weights as [out, in]."""
    base = None if base_shapes is None else Base(base_shapes, base_dtypes or {})
    notes = ["the base was not given: no shape was compared with it"] if base is None else []
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        if place.part == "saved" or place.part == "bias":
            notes += _check_copy(name, place, tensors[name], config, base)
        else:
            groups.setdefault(place.module, []).append(name)
    unknown = 0
    for module, names in groups.items():
        widths = list(_widths(module, config, base))
        unknown += bool(module) and base is not None and widths == [None]
        _check_module(module, {name: tensors[name] for name in names}, places, config, method, widths)
    if unknown:
        notes.append(f"{unknown} modules of the base are packed, fused or not plain weights and were not compared")
    return notes


def check_replacements(tensors: Shapes, base_shapes: Shapes | None) -> list[str]:
    """Raise AdapterRefused when a tensor of kind `tensors` has the name of a base tensor and another shape."""
    if base_shapes is None:
        return ["the base was not given: no shape was compared with it"]
    base, added = Base(base_shapes, {}), 0
    for name, shape in tensors.items():
        own = base.named(name)
        if own is None:
            added += 1
        elif tuple(base_shapes[own]) != shape:
            raise AdapterRefused("shape.base", f"{shown(name)} is {shape}, the base has {tuple(base_shapes[own])}")
    return [f"{added} tensors are not the base's and are added to it"] if added else []


class Base:
    """The base's tensors, found by the names that PEFT gives modules."""

    def __init__(self, shapes: Shapes, dtypes: Mapping[str, str]) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._dtypes = dtypes
        self._modules = {name[:at] for name in shapes for at in range(len(name)) if name[at] == "."}

    def module(self, module: str) -> str | None:
        """The base's own name of a module; checkpoints often leave out the name of the inner model."""
        for name in (module, module.partition(".")[2], f"model.{module}"):
            if name in self._modules:
                return name
        if module.rpartition(".")[2] in EMBEDDINGS:
            return self._embedding()  # tied: the checkpoint holds the matrix once
        return None

    def named(self, tensor: str) -> str | None:
        """The base's own name of a tensor; that of the embedding for a tied head."""
        module, _, parameter = tensor.rpartition(".")
        names = (tensor, f"{self.module(module)}.{parameter}")
        return next((name for name in names if name in self._shapes), None)

    def weight(self, module: str, parameter: str = "weight") -> Shape | None:
        """Shape of a parameter; None when it is packed, fused or there is none."""
        name = f"{module}.{parameter}"
        shape = self._shapes.get(name)
        if shape is not None and self._dtypes.get(name) in ("U8", "I32", "F4"):
            return None
        return shape

    def _embedding(self) -> str | None:
        found = [name for name in self._modules if name.rpartition(".")[2] in EMBEDDINGS and self.weight(name)]
        return found[0] if len(found) == 1 else None


def _widths(module: str, config: Mapping[str, Any], base: Base | None) -> Iterator[tuple[Shape, int, int] | None]:
    """What (shape, out, in) of a module may be; None where it is not known."""
    # QA-LoRA and BD-LoRA narrow the factors.
    if base is None or not module or config.get("use_qalora") or config.get("use_bdlora"):
        yield None
        return
    own = base.module(module)
    if own is None:
        if config.get("target_parameters"):
            yield None
            return
        raise AdapterRefused("shape.absent", f"the base has no module {shown(module)}")
    shape = base.weight(own)
    if shape is None or (config.get("target_parameters") and len(shape) > 2):
        yield None
        return
    first, second = shape[0], shape[1] if len(shape) > 1 else shape[0]
    yield shape, first, second
    if config.get("fan_in_fan_out") and len(shape) == 2:  # GPT-2 keeps [in, out]
        yield shape, second, first


def _check_module(
    module: str,
    tensors: Shapes,
    places: Mapping[str, Place],
    config: Mapping[str, Any],
    method: Method,
    widths: Sequence[tuple[Shape, int, int] | None],
) -> None:
    """All tensors of one module must fit one reading of its widths."""
    wrong = ""
    for width in widths:
        values = dict(config) | {"r": rank_of(config, method, module)}
        values |= {"out": None, "in": None} if width is None else {"out": width[1], "in": width[2]}
        loose = (width is not None and len(width[0]) > 2) or bool(config.get("target_parameters"))
        bad = [name for name in tensors if not fits(tensors[name], places[name].extents, values, loose)]
        if not bad:
            return
        wrong = wrong or bad[0]
    rank = rank_of(config, method, module)
    extents = places[wrong].extents or ()
    known = dict(config) | {"r": rank, "out": None, "in": None}
    rule = "shape.base" if fits(tensors[wrong], extents, known, loose=True) else "shape.rank"
    said = f" with r {rank}" if rank else ""
    base = f", the base's weight is {widths[0][0]}" if widths[0] else ""
    fact = f"{shown(wrong)} is {tensors[wrong]}, expected [{', '.join(extents)}]{said}{base}"
    raise AdapterRefused(rule, fact)


def _check_copy(name: str, place: Place, shape: Shape, config: Mapping[str, Any], base: Base | None) -> list[str]:
    note = f"{shown(name)} replaces a tensor of the base"
    own = base.module(place.module) if base else None
    if base is None or own is None:
        if base is not None and config.get("task_type") not in _HEADS:
            raise AdapterRefused("shape.absent", f"the base has no module {shown(place.module)}")
        return [note if base is None else f"{shown(name)} is new: the base has no such module"]
    held = base.weight(own, place.suffix)
    if held is not None and held != shape:
        resized = held[1:] == shape[1:] and own.rpartition(".")[2] in EMBEDDINGS
        rule = "shape.vocabulary" if resized else "shape.base"
        raise AdapterRefused(rule, f"{shown(name)} is {shape}, the base has {held}")
    return [note]


def rank_of(config: Mapping[str, Any], method: Method, module: str) -> int | None:
    """The rank of one module: rank_pattern as PEFT matches it, else the method's own; None where there is none."""
    pattern = config.get("rank_pattern") or {}
    if method.name == "ADALORA":
        for name, mask in pattern.items():
            if isinstance(mask, list) and f"{module}." in name:
                return sum(mask)
        return config.get("init_r")
    for name in sorted(pattern):  # sorted: the stored configuration is, and PEFT takes the first that matches
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            value = pattern[name]
            return value if isinstance(value, int) else None
    rank = config.get("r")
    return rank if isinstance(rank, int) else None


def fits(shape: Shape, extents: Sequence[str] | None, values: Mapping[str, Any], loose: bool = False) -> bool:
    """Whether a shape is what the table's extents say; `loose` lets further extents follow (convolutions)."""
    if extents is None:
        return True
    if len(shape) < len(extents) or (len(shape) > len(extents) and not loose):
        return False
    if values.get("target_parameters") and len(shape) == 2:
        return True  # fused experts: r counts once for each of them
    return all(_fits(extent, symbol, values) for extent, symbol in zip(shape, extents, strict=False))


def _fits(extent: int, symbol: str, values: Mapping[str, Any]) -> bool:
    return any(wanted is None or wanted == extent for wanted in (_value(one, values) for one in symbol.split("|")))


def _value(symbol: str, values: Mapping[str, Any]) -> int | None:
    """An extent in numbers; None where it may be anything, -1 where no number would do."""
    over, _, under = symbol.partition("/")
    product = 1
    for factor in over.split("*"):
        value = int(factor) if factor.isdigit() else values.get(factor)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        product *= value
    if not under:
        return product
    divisor = values.get(under)
    if not isinstance(divisor, int) or divisor < 1:
        return None
    return product // divisor if product % divisor == 0 else -1
